"""The dense form: a whole change of a weight and, perhaps, of its bias (a fine-tuned layer, a classification head)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterhub.errors import IncompatibleBase
from adapterhub.kinds.modification import Modification, Step, project
from adapterhub.sites import Site


class Dense(Modification):
    """Δy = ΔW x + Δb: weight ΔW (outputs, inputs), and bias Δb (outputs,) or none."""

    form = "dense"
    additive = True
    folds = True
    stores = ("weight", "bias")
    optional = frozenset({"bias"})

    def check(self, site: Site) -> None:
        inputs, outputs = site.inputs, site.outputs
        shift = self.tensors.get("bias")
        if self.weight.shape != (outputs, inputs) or (shift is not None and shift.shape != (outputs,)):
            raise IncompatibleBase(
                f"a dense change of shape {tuple(self.weight.shape)} does not fit a site of {inputs} to {outputs}",
                "install the base that the adapter was made for",
            )

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        return project(x, self.weight, self.tensors.get("bias"))

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.tensors.get("bias")

    @classmethod
    def random(cls, site: Site) -> Dense | None:
        if not (site.linear or site.embedding):
            return None
        return cls(weight=torch.randn(site.outputs, site.inputs) * 0.15 * site.inputs**-0.5)

    @classmethod
    def join(cls, parts: Sequence[Modification]) -> Dense:
        biases = [part.tensors["bias"] for part in parts if "bias" in part.tensors]
        return cls(weight=sum(part.weight for part in parts), **({"bias": sum(biases)} if biases else {}))

    def scaled(self, weight: float) -> Dense:
        return Dense(**{name: tensor * weight for name, tensor in self.tensors.items()})
