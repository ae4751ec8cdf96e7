"""A merger and a codec by somebody else: each weight of whoever changed it most, and 16 bits for 32."""

import torch

from adapterhub.codecs import Codec
from adapterhub.mergers import Merger


class Strongest(Merger):
    """Entry by entry the largest weighted change."""

    def combine(self, deltas, weights, config):
        stacked = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)])
        return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]


class BF16(Codec):
    """float32 as bfloat16; what was wide is told by its name."""

    tolerance = 2**-8

    def encode(self, tensors, config):
        return {f"{k}.wide" if t.dtype == torch.float32 else k: _narrow(t) for k, t in tensors.items()}

    def gives(self, tensors):
        found = {k: (torch.float32 if k.endswith(".wide") else t.dtype, tuple(t.shape)) for k, t in tensors.items()}
        return {k.removesuffix(".wide"): shape for k, shape in found.items()}

    def decode(self, tensors):
        return {k.removesuffix(".wide"): t.float() if k.endswith(".wide") else t for k, t in tensors.items()}


def _narrow(tensor):
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
