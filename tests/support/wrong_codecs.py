"""Codecs that hold in one process and not in two; light, since a fresh process imports them."""

from typing import ClassVar

import torch

from adapterhub.codecs import Codec
from adapterhub.errors import CodecError


class Half(Codec):
    tolerance = 2**-8

    def encode(self, tensors, config):
        if any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors.values()):
            raise CodecError("16 bits already", "store them as they are")
        return {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}

    def gives(self, tensors):
        wide = torch.float32
        return {name: (wide if t.is_floating_point() else t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def decode(self, tensors):
        return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


class Hashing(Half):
    """The sign of a tensor hangs on python's hash of its name, which each process seeds anew."""

    def encode(self, tensors, config):
        return self.turned(super().encode(tensors, config))

    def decode(self, tensors):
        return self.turned(super().decode(tensors))

    def turned(self, tensors):
        signs = {name: 1 - 2 * (hash(name) % 2) for name in tensors}
        return {name: signs[name] * t if t.is_floating_point() else t for name, t in tensors.items()}


class Remembering(Half):
    """What it leaves out of the file it keeps in the process."""

    scales: ClassVar[dict] = {}

    def encode(self, tensors, config):
        self.scales.update({name: t for name, t in tensors.items() if name.endswith(".scale")})
        return {name: t for name, t in super().encode(tensors, config).items() if not name.endswith(".scale")}

    def decode(self, tensors):
        return super().decode(tensors) | {
            n: t for n, t in self.scales.items() if n.rpartition(".")[0] + ".up" in tensors
        }


class Silent(Codec):
    """It does not tell what it will give."""

    tolerance = 2**-8
    encode, decode = Half.encode, Half.decode


class Lying(Half):
    """It tells of what is stored."""

    def gives(self, tensors):
        return Codec.gives(self, tensors)


class Trying(Half):
    """It finds out by decoding."""

    def gives(self, tensors):
        return {name: (t.dtype, tuple(t.shape)) for name, t in self.decode(tensors).items()}
