"""Task arithmetic: the weighted sum of the changes (Ilharco et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adapterhub.kinds.merger import Merger


class Linear(Merger):
    """w1·ΔW1 + w2·ΔW2 + ... ; exact, of any ranks. Weights may be negative."""

    linear = True

    def combine(self, deltas: Sequence[Tensor], weights: Sequence[float], config: Merger.Config) -> Tensor:
        return sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
