"""Stress tests for crashes, hangs, leaks and wrong values: see research/README.md."""
