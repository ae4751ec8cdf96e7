"""Several adapters into one, site by site: sums of what can be added as it is, else each weight's dense change.

How the result is stored is one rule (`adapterhub.adapters.changes`): exactly, in the fewest bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter, current
from adapterhub.adapters.changes import CANCELLED, WHOLE, Result, change_of, cheapest, side_by_side, weighted_sum
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.agreement import common_base
from adapterhub.errors import NoEffect, NotFoldable, NotMergeable, UsageError
from adapterhub.forms.affine import Affine
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.contracts import make
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.merger import Merger
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.runtime.residents import Residents
from adapterhub.sites import sites
from adapterhub.sites.weights import values
from adapterhub.spec.manifest import Parent, Release
from adapterhub.spec.parents import joined_licences, warn_missing_parents
from adapterhub.store.releases import Releases

INSTEAD = "adapterhub compose 'a + 0.5*b' --name NAME"


def merge(
    hub: Releases,
    refs: Sequence[str],
    merger: str = "linear",
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    name: str,
    version: str | None = None,
    base: object = None,
) -> Release:
    """One adapter that stands for several of one base; weights default to 1 each.

    base (known name, folder, repo id or loaded model): only for a change that depends on its weights, such as half of a
    DoRA or a TIES merge with one; without it such a merge is refused.
    The recipe records merger, options and weights; the metrics say how far the stored factors are from the exact result.
    Raises UsageError, PluginError (no such merger), IncompatibleBase, NotMergeable (a form that is no change of a weight;
    a saved composition), NoEffect (the changes cancel). Warns (ParentsWarning) of one trained over another that is not merged."""
    rule = make(plugins.load("mergers", merger))
    config = plugins.options(rule.Config, dict(options or {}))
    weights = _one_weight_each(refs, weights)
    releases = [hub.resolve(ref) for ref in refs]
    for release in releases:
        if release.manifest.compose is not None:
            raise NotMergeable(
                f"{release} is a saved composition ({release.manifest.compose}) and has no tensors of its own",
                "merge the adapters it is made of",
            )
    record = common_base(hub, releases)
    warn_missing_parents(releases)
    names = [str(release) for release in releases]
    if base is None:
        adapters, weight_at = _without_base(hub, releases, record.architecture), None
    else:
        adapters, weight_at = _on_base(hub, base, names)
    merged = merge_modifications(adapters, weights, rule, config, names, weight_at)
    return publish_tensors(
        hub,
        merged.modifications,
        name=name,
        version=version,
        base=record,
        method=releases[0].manifest.method if len(releases) == 1 else None,
        parents=[Parent(name=r.name, version=r.version, digest=r.digest, relation="merge") for r in releases],
        recipe={
            "merger": merger,
            "options": asdict(config),
            "weights": weights,
            "distribution": plugins.distribution("mergers", merger),
        },
        metrics={"merge": {"relative_error": merged.error, "worst_site": merged.worst, "largest_rank": merged.rank}},
        licence=joined_licences(releases),
    )


def _one_weight_each(refs: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """The weights as numbers, 1 each if none are given. Raises UsageError unless there is one for each adapter."""
    weights = [1.0] * len(refs) if weights is None else [float(weight) for weight in weights]
    if not refs:
        raise UsageError("there is nothing to merge", "name the adapters: adapterhub merge me/a me/b --name me/c")
    if len(weights) != len(refs) or not all(map(math.isfinite, weights)):
        raise UsageError(
            f"{len(refs)} adapters but the weights are {weights}", "give one finite number for each adapter"
        )
    return weights


def _without_base(hub: Releases, releases: Sequence[Release], architecture: str) -> list[Modifications]:
    """The adapters with today's paths: one of several may have been made by an older transformers, under other ones."""
    adapters = [Adapter.load(hub, release).modifications() for release in releases]
    if len(releases) == 1:
        return adapters
    named = zip(adapters, map(str, releases), strict=True)
    return [current(parts, architecture, name) for parts, name in named]


def _on_base(hub: Releases, base: object, names: Sequence[str]) -> tuple[list[Modifications], BaseWeight]:
    """The adapters checked against the base, and where its weights are. Raises IncompatibleBase."""
    from adapterhub.bases import loading, resolution
    from adapterhub.bases.fingerprint import fingerprint

    if isinstance(base, nn.Module):
        model, print_of_base = base, fingerprint(base)
    else:
        resolved = resolution.resolve(base)
        model, print_of_base = loading.load_model(resolved, "float32"), fingerprint(resolved)
    at = {site.path: site for site in sites(model)}

    def weight_at(path: str) -> tuple[Tensor | None, Tensor | None]:
        module, columns = model.get_submodule(at[path].module), at[path].columns
        known = at[path].linear or at[path].embedding
        weight, bias = values(module) if known else None, getattr(module, "bias", None)
        here = slice(None) if columns is None else torch.tensor(columns.index())
        both = [None if t is None else t.detach().to("cpu", torch.float32)[here] for t in (weight, bias)]
        return both[0], both[1]

    residents = Residents(model, list(at.values()), hub, print_of_base, force=False)
    return [residents.load(name) for name in names], weight_at


class Merged(NamedTuple):
    modifications: Modifications
    error: float
    """The largest relative error of a form at a site (Frobenius norm) between what is stored and what was asked for."""
    worst: str
    """That site."""
    rank: int
    """The largest rank stored."""


BaseWeight = Callable[[str], tuple[Tensor | None, Tensor | None]]
"""The base's weight (outputs, inputs) and bias (outputs,) at a site, float32 on the CPU; None for what is not there."""


def merge_modifications(
    adapters: Sequence[Modifications],
    weights: Sequence[float],
    merger: Merger,
    config: Any,
    names: Sequence[str] | None = None,
    base: BaseWeight | None = None,
) -> Merged:
    """Adapters in memory, site by site over the union of their sites, in float32; how each site is stored: `changes`.

    One adapter at weight 1 is itself, whatever its forms and the merger, bit for bit."""
    if list(weights) == [1.0]:
        return Merged(dict(adapters[0]), 0.0, "", _largest_rank(adapters[0]))
    names = names or [f"adapter {i}" for i in range(len(adapters))]
    _require_weight_changes(adapters, weights, names)
    merged: Modifications = {}
    error, worst = 0.0, ""
    for path in _progress(sorted({path for adapter in adapters for path in adapter})):
        parts = [[m.to("cpu", torch.float32) for m in adapter.get(path, [])] for adapter in adapters]
        here, distance = _merged(parts, weights, merger, config, _Where(path, names, base))
        if here:
            merged[path] = here
            error, worst = max((error, worst), (distance, path))
    if not merged:
        raise NoEffect(f"the merge of {', '.join(names)} changes nothing: the changes cancel", "give other weights")
    _require_own_outputs(merged)
    return Merged(merged, error, worst, _largest_rank(merged))


class _Where(NamedTuple):
    path: str
    names: Sequence[str]
    base: BaseWeight | None


def _merged(
    parts: Sequence[list[Modification]], weights: Sequence[float], merger: Merger, config: Any, where: _Where
) -> Result:
    if merger.linear:
        terms = [(w, here) for w, here in zip(weights, parts, strict=True) if w and here]
        result = weighted_sum(terms) if terms else ([], 0.0)
        if result is not None:
            return result
    elif (side := _one_side(parts)) is not None:
        vectors = [{k: t for m in here for k, t in m.tensors.items() if k != "side"} for here in parts]
        left = {key: _combined([v.get(key) for v in vectors], weights, merger, config) for key in ("gain", "shift")}
        left = {key: tensor for key, tensor in left.items() if tensor is not None}
        return ([Affine.of(**left, into=side)] if left else []), 0.0
    changes = _deltas(parts, where)
    total = _combined([weight for weight, _ in changes], weights, merger, config)
    shift = _combined([bias for _, bias in changes], weights, merger, config)
    made = cheapest(total, shift)
    if total is None or not made:
        return made, 0.0
    stored, _ = change_of([m for m in made if not isinstance(m, Affine)])
    return made, float((total - stored).norm() / total.norm())


def _one_side(parts: Sequence[Sequence[Modification]]) -> bool | None:
    """Whether into the site, if all that anyone has there is one gain and shift of the same side; else None.

    Then a merger sees gains and shifts themselves, as the TIES paper merges (IA)3: it needs no base for that."""
    sides = {m.into if isinstance(m, Affine) else None for here in parts for m in here}
    alone = all(len(here) <= 1 for here in parts) and len(sides) == 1
    return sides.pop() if alone else None


def _combined(deltas: Sequence[Tensor | None], weights: Sequence[float], merger: Merger, config: Any) -> Tensor | None:
    """What the merger makes of the changes (None: zeros) of one weight or bias; None if nobody has one or they cancel."""
    like = next((delta for delta in deltas if delta is not None), None)
    if like is None:
        return None
    deltas = [torch.zeros_like(like) if delta is None else delta for delta in deltas]
    total = merger.combine(deltas, weights, config)
    terms = sum(abs(w) * float(delta.norm()) for w, delta in zip(weights, deltas, strict=True))
    return None if float(total.norm()) <= CANCELLED * terms else total.float()


def _deltas(parts: Sequence[list[Modification]], where: _Where) -> list[tuple[Tensor | None, Tensor | None]]:
    """(ΔW, Δb) of each adapter at one site."""
    weight, bias = where.base(where.path) if where.base else (None, None)
    known = None if weight is None else (weight, bias)
    changes = []
    for here, name in zip(parts, where.names, strict=True):
        try:
            changes.append(change_of([_bound(part, weight) for part in here], known))
        except NotFoldable as reason:
            raise NotMergeable(
                f"{name} cannot be merged so: at {where.path}, {reason}",
                f"stack them instead: {INSTEAD}"
                if where.base
                else "give the base model: adapterhub merge ... --base NAME",
            ) from None
    return changes


def _bound(part: Modification, weight: Tensor | None) -> Modification:
    """A copy that has met the weight, where there is one: the caller's own may be in use on its model."""
    if weight is None:
        return part
    part = copy(part)
    call(part, "bind", weight)
    return part


def _require_weight_changes(adapters: Sequence[Modifications], weights: Sequence[float], names: Sequence[str]) -> None:
    """Refuse forms that are no change of a weight: half a prefix has no meaning in a file."""
    for adapter, weight, name in zip(adapters, weights, names, strict=True):
        for path, part in ((path, part) for path, here in adapter.items() for part in here if weight):
            if type(part).delta_weight is Modification.delta_weight:
                raise NotMergeable(
                    f"{name} cannot be merged: at {path}, the form {part.form!r} is not a change of a weight",
                    f"stack them instead, each adapter as it is: {INSTEAD}",
                )


def _require_own_outputs(merged: Modifications) -> None:
    """Refuse a change of a whole fused projection beside a gain on some of its columns: the gain would see the change."""
    for path, here in merged.items():
        whole = merged.get(path.rpartition(".")[0], [])
        # No module lies inside one that is a weight: what stands below such a path are its columns.
        if any(type(part) in WHOLE for part in whole) and not side_by_side([*whole, *here]):
            raise NotMergeable(
                f"at {path}, a gain on some outputs of {path.rpartition('.')[0]} and a change of the whole have no sum",
                f"stack them instead: {INSTEAD}",
            )


def _largest_rank(modifications: Modifications) -> int:
    return max(
        (m.down.shape[0] for parts in modifications.values() for m in parts if isinstance(m, LowRank)), default=0
    )


def _progress(paths: Sequence[str]) -> Iterable[str]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(paths, "merging", console=console, transient=True, disable=not console.is_terminal)
