"""Campaigns against crashes, hangs, leaks and wrong values: see research/README.md."""
