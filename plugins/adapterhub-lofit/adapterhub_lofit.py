"""LoFiT: select attention heads by training, then add an offset at those (Yin et al., "LoFiT: Localized Fine-tuning on LLM
Representations", 2024). One method, `lofit`; its adapters are of the form `affine`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterhub import BuildContext, Method, Modification, Site, Stage
from adapterhub.errors import UsageError
from adapterhub.forms.affine import Affine
from adapterhub.sites import select


class Offsets(Affine):
    """An affine shift of a site's input, of which the chosen heads' numbers train: the others are 0 and stay 0."""

    heads: tuple[str, ...] = ()
    mask: Tensor | None = None
    """(inputs,) 1 at the chosen heads, else 0. No gradient passes where it is 0."""

    def _change(self, h: Tensor) -> Tensor:
        return (self.shift * self.mask.to(self.shift)).expand_as(h)


class LoFiT(Method):
    """z + v: at a few heads of what goes into the attention's output projection, one vector each, at every token."""

    starts_at_base = False  # v is drawn from N(0, 1e-3)

    @dataclass(frozen=True)
    class Config:
        k: int | None = None
        """How many heads; None: as many as there are layers, the paper's 32 for Llama 2 7B."""
        heads: tuple[str, ...] = ()
        """Which heads, as a recipe names them ("3.7": layer 3, query head 7); then none are selected."""
        l1: float = 1e-3
        """Times the sum of the gains' magnitudes, in the selection."""
        select_share: float = 0.5
        """The selection's share of the steps."""
        select_lr: float = 0.5
        """Its learning rate, as a multiple of the run's."""

        def __post_init__(self) -> None:
            counted, shared = self.k is None or self.k >= 1, 0 < self.select_share < 1
            if not (counted and shared and 0 <= self.l1 < math.inf > self.select_lr > 0):
                raise UsageError(
                    "LoFiT needs k >= 1, l1 >= 0, select_lr > 0 and a select_share between 0 and 1",
                    "for example --set k=16 --set l1=1e-3 --set select_share=0.5",
                )

    def stages(self, config: Config) -> Sequence[Stage]:
        def gains(given: BuildContext) -> dict[str, Affine]:
            return {s.path: Affine.of(gain=1e-3 * torch.randn(s.inputs), into=True) for s in _sites(given.sites)}

        def offsets(given: BuildContext) -> dict[str, Offsets]:
            names = config.heads or _strongest(_sites(given.sites), given.before, config)
            return _offsets(_sites(given.sites), names)

        def norm(parts: Mapping[str, Modification]) -> Tensor:
            return config.l1 * sum(part.gain.abs().sum() for part in parts.values())

        def fits(given: BuildContext) -> None:
            _count(_sites(given.sites), config)

        tune = Stage("offsets", offsets, 1 - config.select_share, note=_named)
        if config.heads:
            return [tune]
        options = ("l1",)  # how many heads are taken decides nothing of the gains: another k shares them
        return [
            Stage("select", gains, config.select_share, lr=config.select_lr, penalty=norm, options=options),
            replace(tune, check=fits),
        ]

    def take_up(self, modifications: Mapping[str, Modification]) -> None:
        for part in modifications.values():  # as stored: zeros at the heads that were not taken
            taken = (part.tensors["shift"] != 0).detach()
            part.tensors["shift"].register_hook(lambda gradient, taken=taken: gradient * taken)


def _sites(sites: Sequence[Site]) -> list[Site]:
    """The attentions' output projections: what goes in are the query heads' results side by side."""
    found = [site for site in select(sites, "attention_output") if site.heads]
    if not found or any(site.heads.queries * site.heads.width != site.inputs for site in found):
        raise UsageError(
            "the heads of this base's attention are not known", "LoFiT needs attention_output sites of heads"
        )
    return found


def _name(site: Site, head: int) -> str:
    return ".".join(filter(None, [site.part, str(site.layer), str(head)]))


def _count(sites: Sequence[Site], config: LoFiT.Config) -> int:
    total = sum(site.heads.queries for site in sites)
    count = len(sites) if config.k is None else config.k
    if count > total:
        raise UsageError(f"k is {count}, and this base has {total} heads", f"give k from 1 to {total}")
    return count


def _strongest(sites: Sequence[Site], before: Mapping[str, Modification], config: LoFiT.Config) -> list[str]:
    """The k heads whose vectors are longest, over all layers; among equals the earlier. Of an adapter that goes on those
    are its offsets', else the gains'."""
    scored = []
    for site in sites:
        if (part := before.get(site.path)) is not None:
            vector = part.tensors["shift" if "shift" in part.tensors else "gain"]
            norms = vector.view(site.heads.queries, site.heads.width).norm(dim=1).tolist()
            scored += [(norm, _name(site, head)) for head, norm in enumerate(norms)]
    scored.sort(key=lambda pair: -pair[0])
    return [name for _, name in scored[: _count(sites, config)]]


def _offsets(sites: Sequence[Site], names: Sequence[str]) -> dict[str, Offsets]:
    known = {_name(site, head): (site, head) for site in sites for head in range(site.heads.queries)}
    if unknown := [name for name in names if name not in known]:
        first, *_, final = known
        raise UsageError(f"this base has no head {unknown[0]!r}", f"heads are named {first} to {final}")
    made = {}
    for site in sites:
        heads = tuple(name for name in known if name in names and known[name][0] is site)
        if not heads:
            continue
        mask = torch.zeros(site.heads.queries, site.heads.width)
        mask[[known[name][1] for name in heads]] = 1
        mask = mask.flatten()
        part = Offsets.of(shift=torch.where(mask > 0, 1e-3 * torch.randn(site.inputs), 0.0), into=True)
        part.heads, part.mask = heads, mask
        made[site.path] = part
    return made


def _named(parts: Mapping[str, Modification]) -> dict[str, list[str]]:
    return {"heads": [name for part in parts.values() for name in part.heads]}
