"""The built-in mergers. Floor 2, runtime."""

from adapterhub.kinds.merger import Merger

__all__ = ["Merger"]
