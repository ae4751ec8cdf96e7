"""The affine form: hidden states scaled and shifted, number by number ((IA)3, Liu et al., 2022; BitFit, Ben Zaken et al.,
2022; LoFiT's head offsets, Yin et al., 2024; norms with other gains)."""

from __future__ import annotations

import torch
from torch import Tensor

from adapterhub.errors import IncompatibleBase
from adapterhub.kinds.modification import Modification, Step
from adapterhub.sites import Site


class Affine(Modification):
    """h + g*h + s: gain g and shift s, each (width,) or left out; side () uint8 says of which h: 0, what comes out of the
    site; 1, what goes in. The gain is that of the change: 0 leaves h as it is ((IA)3's vector less one)."""

    form = "affine"
    stores = ("gain", "shift", "side")
    optional = frozenset({"gain", "shift"})
    constants = frozenset({"side"})

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self.into = bool(self.side)
        self.additive = not self.into and "gain" not in tensors

    @classmethod
    def of(cls, *, gain: Tensor | None = None, shift: Tensor | None = None, into: bool = False) -> Affine:
        named = {"gain": gain, "shift": shift, "side": torch.tensor(int(into), dtype=torch.uint8)}
        return cls(**{name: tensor for name, tensor in named.items() if tensor is not None})

    @property
    def changes_input(self) -> bool:
        return self.into

    @property
    def changes_output(self) -> bool:
        return not self.into

    def check(self, site: Site) -> None:
        inputs, outputs = site.inputs, site.outputs
        width = inputs if self.into else outputs
        if self.into and (site.embedding or site.columns):
            raise IncompatibleBase(
                "what goes in is not this site's own to scale or shift", "put it at the whole module, or at its output"
            )
        if self.side.tolist() not in (0, 1):
            raise IncompatibleBase(
                f"an affine side is 0 or 1, not {self.side.tolist()}", "get it again from its source"
            )
        if any(t.shape != (width,) for name, t in self.tensors.items() if name != "side") or len(self.tensors) < 2:
            raise IncompatibleBase(
                f"a gain or shift that is not {width} numbers does not fit a site of {inputs} to {outputs}",
                "install the base that the adapter was made for",
            )

    def _change(self, h: Tensor) -> Tensor:
        shift = self.tensors.get("shift")
        if "gain" not in self.tensors:
            return shift.expand_as(h)
        change = h * self.gain
        return change if shift is None else change + shift

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        return self._change(x) if self.into else None

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        return None if self.into else self._change(y)

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        gain, shift = self.tensors.get("gain"), self.tensors.get("shift")
        if self.into:
            return None if gain is None else weight * gain, None if shift is None else weight @ shift
        moved = shift if gain is None or bias is None else gain * bias if shift is None else gain * bias + shift
        return None if gain is None else weight * gain[:, None], moved

    def scaled(self, weight: float) -> Affine:
        copy = {name: t if name == "side" else t * weight for name, t in self.tensors.items()}
        return Affine(**copy)

    @classmethod
    def random(cls, site: Site) -> Affine:
        into = bool(torch.rand(()) < 0.5) and not (site.embedding or site.columns)
        width = site.inputs if into else site.outputs
        return cls.of(gain=0.2 * torch.randn(width), shift=0.05 * torch.randn(width), into=into)
