"""The built-in codecs. Floor 2, runtime."""

from adapterhub.kinds.codec import SMALL, Codec, Shapes, absolute, shapes_of

__all__ = ["SMALL", "Codec", "Shapes", "absolute", "shapes_of"]
