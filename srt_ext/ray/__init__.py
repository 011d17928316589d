"""Extraction of a data set on Ray Data. :class:`Features` itself needs pyarrow and torch alone."""

from .features import Features

__all__ = ["Features"]
