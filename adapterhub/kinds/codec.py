"""Codecs: an adapter's tensors to fewer bytes and back. Tensors in, tensors out; what is stored is always safetensors.

Codecs chain: the manifest lists them in the order of encoding, decoding runs in reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adapterhub.plugins.boundary import Wrong

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""What tensors are without their numbers: {name: (dtype, shape)}."""

SMALL = 64
"""What a codec that rounds keeps exactly: floating tensors with fewer entries (scales, narrow biases). Integers always."""


def absolute(name: str) -> bool:
    """Whether a tensor says how large something of the base becomes, not by how much it changes (DoRA's magnitudes): rounded
    by a hundredth it moves the whole weight by as much. A codec that rounds keeps it exactly."""
    return name.endswith(".magnitude")


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """What these tensors are without their numbers."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


class Codec:
    """Encode all tensors of an adapter together (names as stored: `<site path>.<form>.<n>.<tensor>`)."""

    @dataclass(frozen=True)
    class Config:
        """The options; `--set name=value` on the command line."""

    lossless: ClassVar[bool] = False
    """decode(encode(t)) == t bit for bit (a law)."""
    tolerance: ClassVar[float] = 0.0
    """The largest relative error (Frobenius norm) of the default options on normally distributed tensors (a law)."""
    reshapes: ClassVar[bool] = False
    """Decoded tensors may have other shapes (a lower rank); then the tolerance is that of the change of the weight."""
    other_forms: ClassVar[bool] = False
    """Decoded tensors may be of other forms at the same sites (a low-rank pair as a sparse change); implies `reshapes`."""

    def encode(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        """Fewer bytes. Deterministic: equal tensors give equal bytes. Raises CodecError for what it cannot carry."""
        raise NotImplementedError

    def gives(self, tensors: Mapping[str, Tensor]) -> Shapes:
        """What `decode` makes of these tensors, {name: (dtype, shape)}, told from the encoded tensors without making it.

        Whoever decodes a stranger's file holds this against what the base's sites can take, before `decode` allocates
        anything (`adapterhub.adapters.decoding`). The default suits codecs that only rewrite tensors. Raises CodecError."""
        return shapes_of(tensors)

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors again, by their names, in their dtype, as `gives` says; the memory for it is a few times theirs. The
        default suits codecs that only rewrite tensors."""
        return dict(tensors)


def check_shapes(result: object, *arguments: object) -> Shapes:
    """What a codec's `gives` returned, if it is that. Raises Wrong."""
    if not isinstance(result, Mapping):
        raise Wrong(f"a dict of (dtype, shape) by the names of tensors was expected, this is a {type(result).__name__}")
    for name, told in result.items():
        dtype, shape = told if isinstance(told, tuple) and len(told) == 2 else (None, ())
        sizes = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not isinstance(name, str) or not isinstance(dtype, torch.dtype) or not sizes:
            raise Wrong(f"(dtype, shape) was expected for {ascii(name)[:80]}, this is {ascii(told)[:80]}")
    return dict(result)
