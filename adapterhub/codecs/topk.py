"""Only the largest entries of each change of a weight, as the sparse form (magnitude pruning of the change; compare
Ansell et al., "Composable Sparse Fine-Tuning", 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapterhub.errors import CodecError, UsageError
from adapterhub.kinds.codec import Codec
from adapterhub.tensors.largest import largest

FORMS = ("low_rank", "dense", "sparse")
"""What says the change of a weight without the base's own; all of them at one site become one sparse change."""


class TopK(Codec):
    """Low-rank, dense and sparse changes at a site become the k largest entries of their sum; a dense one's bias stays, as
    a shift. Other tensors are left alone. Decoding has nothing to do.

    An entry takes eight bytes in float32, six in 16 bits: smaller than low rank of rank r below a density of about
    r·(outputs + inputs)/(2·outputs·inputs)."""

    @dataclass(frozen=True)
    class Config:
        density: float = 0.05
        """The share of a weight's entries that stays, above 0 to 1; of equal ones the first in the weight."""
        scope: Literal["weight", "global"] = "weight"
        """The largest of each weight, or of all weights together."""

    other_forms = True
    reshapes = True
    tolerance = 0.9

    def encode(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        if not 0 < config.density <= 1:
            raise UsageError("topk needs 0 < density <= 1", "for example --set density=0.05")
        sites, encoded = _sites(tensors)
        if not sites:
            raise CodecError(
                "topk finds no low-rank, dense or sparse change of a weight",
                "use a codec that takes any tensors: compeft or int8",
            )
        counts = _counts(sites, config)
        for path, here in sites.items():
            change, dtype = _change(here)
            places = largest(change, counts[path])
            values = change.reshape(-1)[places].to(dtype)
            if not values.isfinite().all():
                raise CodecError(f"the change at {path} is too large for {dtype}", "store it in float32")
            stays = values != 0
            small = torch.int32 if change.numel() <= torch.iinfo(torch.int32).max else torch.int64
            prefix = f"{path}.sparse.0"
            encoded[f"{prefix}.index"] = places[stays].to(small)
            encoded[f"{prefix}.values"] = values[stays]
            encoded[f"{prefix}.shape"] = torch.tensor(tuple(change.shape))
            biases = [named["bias"] for named in here if "bias" in named]
            if biases:
                prefix = _free(f"{path}.affine", encoded)
                encoded[f"{prefix}.shift"] = sum(biases[1:], biases[0]).clone()
                encoded[f"{prefix}.side"] = torch.tensor(0, dtype=torch.uint8)
        return encoded


def _sites(tensors: Mapping[str, Tensor]) -> tuple[dict[str, list[dict[str, Tensor]]], dict[str, Tensor]]:
    """{site path: the tensors of each change there}, and all that is none."""
    changes: dict[str, dict[str, dict[str, Tensor]]] = {}
    others = {}
    for name, tensor in sorted(tensors.items()):
        pieces = name.rsplit(".", 3)
        if len(pieces) == 4 and pieces[1] in FORMS:
            path, form, n, key = pieces
            changes.setdefault(path, {}).setdefault(f"{form}.{n}", {})[key] = tensor
        else:
            others[name] = tensor
    return {path: list(here.values()) for path, here in changes.items()}, others


def _change(here: list[dict[str, Tensor]]) -> tuple[Tensor, torch.dtype]:
    """Their sum, float64 (outputs, inputs), and the widest dtype that it came in."""
    total, dtype = None, None
    for named in here:
        if "up" in named:
            change, kind = named["scale"].double() * named["up"].double() @ named["down"].double(), named["up"].dtype
        elif "index" in named:
            change = torch.zeros(named["shape"].tolist(), dtype=torch.float64)
            change.view(-1)[named["index"].long()] = named["values"].double()
            kind = named["values"].dtype
        else:
            change, kind = named["weight"].double(), named["weight"].dtype
        total = change if total is None else total + change
        dtype = kind if dtype is None else torch.promote_types(dtype, kind)
    return total, dtype


def _counts(sites: Mapping[str, list[dict[str, Tensor]]], config: TopK.Config) -> dict[str, int]:
    """How many entries stay at each site. Globally: one weight in memory at a time, and of the rest the largest so far."""
    sizes = {path: _size(here) for path, here in sites.items()}
    if config.scope == "weight":
        return {path: max(1, round(config.density * size)) for path, size in sizes.items()}
    count = max(1, round(config.density * sum(sizes.values())))
    best, owners = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    for number, here in enumerate(sites.values()):
        magnitudes = _change(here)[0].abs().reshape(-1)
        best = torch.cat([best, magnitudes[largest(magnitudes, min(count, len(magnitudes)))]])
        owners = torch.cat([owners, torch.full((len(best) - len(owners),), number)])
        stays = largest(best, min(count, len(best)))
        best, owners = best[stays], owners[stays]
    kept = owners.bincount(minlength=len(sites)).tolist()
    return dict(zip(sites, kept, strict=True))


def _size(here: list[dict[str, Tensor]]) -> int:
    named = here[0]
    if "up" in named:
        return len(named["up"]) * named["down"].shape[1]
    return int(named["shape"].prod()) if "index" in named else named["weight"].numel()


def _free(prefix: str, taken: Mapping[str, Tensor]) -> str:
    """The next number of a form at a site."""
    numbers = [int(name[len(prefix) + 1 :].partition(".")[0]) for name in taken if name.startswith(f"{prefix}.")]
    return f"{prefix}.{max(numbers, default=-1) + 1}"
