"""Names of stored tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from adapterhub.kinds.modification import Modification


def named_tensors(modifications: Mapping[str, Sequence[Modification]]) -> dict[str, Tensor]:
    """All tensors of {site path: modifications in order} by their stored names."""
    named = {}
    for path, parts in modifications.items():
        counts: dict[str, int] = {}
        for part in parts:
            n = counts[part.form] = counts.get(part.form, -1) + 1
            named.update({f"{path}.{part.form}.{n}.{key}": tensor for key, tensor in part.tensors.items()})
    return named
