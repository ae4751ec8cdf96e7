"""The built-in mergers, and what a merger subclasses."""

from adapterhub.kinds.merger import Merger

__all__ = ["Merger"]
