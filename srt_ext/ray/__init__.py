"""Extraction of a data set on Ray Data. :class:`Features` only needs pyarrow and torch."""

from .features import Features

__all__ = ["Features"]
