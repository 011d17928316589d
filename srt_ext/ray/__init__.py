"""Extraction of a data set on Ray Data."""
