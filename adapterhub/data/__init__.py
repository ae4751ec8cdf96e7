"""Rows of a file, tokens, batches, seeds. Floor 2, runtime."""

from adapterhub.data.rows import Data, Row, read

__all__ = ["Data", "Row", "read"]
