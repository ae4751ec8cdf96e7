"""LT-SFT: train all, keep the places of the weights that moved most, and train those alone from the start (Ansell et al.,
"Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022). One method, `lt_sft`; its adapters are `sparse`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub import BuildContext, Method, Modification, Site, Stage
from adapterhub.errors import UsageError
from adapterhub.forms.dense import Dense
from adapterhub.forms.sparse import Sparse
from adapterhub.kinds.method import require_plain
from adapterhub.sites import select
from adapterhub.tensors.largest import largest


class LTSFT(Method):
    """W + Δ, Δ zero but for the K weights that a full fine-tuning moved most; those K values are what trains."""

    float32_base = True

    @dataclass(frozen=True)
    class Config:
        density: float = 0.01
        """K as a fraction of the weights that may change."""
        k: int | None = None
        """K itself, instead."""
        target_modules: str | tuple[str, ...] = "all-linear"
        """The weights that may change: roles ("embedding"), module names or "all-linear"."""
        l1: float = 0.0
        """Times the mean magnitude of the change over all these weights, added to the loss in both stages."""
        probe_share: float = 0.5
        """The full fine-tuning's share of the steps."""
        mask: str = "largest"
        """largest, or random: K places drawn at random and no full fine-tuning, to compare with. The run's seed draws them:
        equal seeds give equal places."""

        def __post_init__(self) -> None:
            few = 0 < self.density <= 1 and (self.k is None or self.k >= 1)
            if not few or not 0 < self.probe_share < 1 or not 0 <= self.l1 < math.inf:
                raise UsageError(
                    "LT-SFT needs a density above 0 and up to 1 or k >= 1, a probe_share between 0 and 1, and l1 >= 0",
                    "for example --set density=0.01 --set probe_share=0.5",
                )
            if self.mask not in ("largest", "random"):
                raise UsageError(f"unknown mask {self.mask!r}", "one of: largest, random")

    def stages(self, config: Config) -> Sequence[Stage]:
        def everything(given: BuildContext) -> dict[str, Dense]:
            chosen = _changeable(given.sites, config)
            return {site.path: Dense(weight=torch.zeros(site.outputs, site.inputs)) for site in chosen}

        def places(given: BuildContext) -> dict[str, Sparse]:
            chosen, before = _changeable(given.sites, config), given.before
            made = {}
            if any(isinstance(part, Sparse) for part in before.values()):  # an adapter that goes on keeps its places
                index = {path: part.index for path, part in before.items()}
            else:
                if config.mask == "random":
                    moved = torch.randperm(_size(chosen)).double().split([_size([site]) for site in chosen])
                else:
                    moved = [before[site.path].weight for site in chosen]
                found = strongest(moved, _count(chosen, config))
                index = {site.path: where for site, where in zip(chosen, found, strict=True) if len(where)}
            for site in chosen:
                if site.path in index:
                    where = index[site.path]
                    part = made[site.path] = Sparse.at(where, torch.zeros(len(where)), (site.outputs, site.inputs))
                    part.among = _size(chosen)  # what the mean is over, of the penalty
            return made

        def dense_norm(parts: Mapping[str, Modification]) -> Tensor:
            size = sum(part.weight.numel() for part in parts.values())
            return config.l1 / size * sum(part.weight.abs().sum() for part in parts.values())

        def sparse_norm(parts: Mapping[str, Modification]) -> Tensor:
            return sum(config.l1 / part.among * part.values.abs().sum() for part in parts.values())

        def fits(given: BuildContext) -> None:
            _count(_changeable(given.sites, config), config)

        penalty = sparse_norm if config.l1 else None
        train = Stage("train", places, 1 - config.probe_share, penalty=penalty, note=_told, check=fits)
        if config.mask == "random":
            return [train]
        options = ("target_modules", "l1")  # K decides nothing of the probe
        penalty = dense_norm if config.l1 else None
        return [Stage("probe", everything, config.probe_share, penalty=penalty, options=options), train]


def _changeable(sites: Sequence[Site], config: LTSFT.Config) -> list[Site]:
    chosen = select(sites, config.target_modules)
    if wrong := next((site.path for site in chosen if not (site.linear or site.embedding)), None):
        raise UsageError(
            f"LT-SFT changes weights, and target_modules selects {wrong}", "use all-linear or module names"
        )
    require_plain(chosen, "lt_sft")
    return chosen


def _size(sites: Sequence[Site]) -> int:
    return sum(site.outputs * site.inputs for site in sites)


def _count(sites: Sequence[Site], config: LTSFT.Config) -> int:
    count = max(1, round(config.density * _size(sites))) if config.k is None else config.k
    if count > _size(sites):
        raise UsageError(f"k is {count}, and {_size(sites)} weights may change", "give a smaller k, or a density")
    return count


def strongest(changes: Sequence[Tensor], count: int) -> list[Tensor]:
    """Of each tensor, the places (int64, rising, in the flattened tensor) of those of its numbers that are among the
    `count` of largest magnitude of all; among equals the earlier ones. Exactly `count` in all."""
    places = largest(torch.cat([change.flatten() for change in changes]), count)
    ends = torch.tensor([change.numel() for change in changes]).cumsum(0)
    parts = places.tensor_split(torch.searchsorted(places, ends)[:-1])
    return [part - (end - change.numel()) for part, end, change in zip(parts, ends, changes, strict=True)]


def _told(parts: Mapping[str, Modification]) -> dict[str, int]:
    return {"k": sum(len(part.index) for part in parts.values())}
