"""The built-in codecs, and what a codec subclasses."""

from adapterhub.kinds.codec import SMALL, Codec, Shapes, absolute, shapes_of

__all__ = ["SMALL", "Codec", "Shapes", "absolute", "shapes_of"]
