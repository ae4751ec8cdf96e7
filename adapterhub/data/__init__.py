"""Rows of a file, tokens, and batches. Rows are read without torch."""

from adapterhub.data.rows import Data, Row, read

__all__ = ["Data", "Row", "read"]
