"""Several adapters into one. Sums of low-rank changes are joined exactly; other mergers see each weight's dense change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adapterhub import plugins
from adapterhub.adapter import Adapter, Modifications
from adapterhub.compose import common_base, joined_licences, warn_missing_parents
from adapterhub.errors import NoEffect, NotFoldable, NotMergeable, PluginError, UsageError
from adapterhub.factors import balanced, numerical_rank, product_norm, product_svd
from adapterhub.forms.low_rank import LowRank
from adapterhub.manifest import Parent, Release
from adapterhub.mergers import Merger
from adapterhub.modification import Modification
from adapterhub.publish import publish_tensors

if TYPE_CHECKING:
    from adapterhub.hub import Hub

CANCELLED = 1e-6
"""A sum smaller than this part of its terms is rounding."""


def merge(
    hub: Hub,
    refs: Sequence[str],
    merger: str = "linear",
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    name: str,
    version: str | None = None,
) -> Release:
    """One adapter that stands for several of one base; weights default to 1 each.

    The recipe records merger, options and weights; the metrics say how far the stored factors are from the exact result.
    Raises UsageError, PluginError (no such merger), IncompatibleBase, NotMergeable (a form that is no change of a weight;
    a saved composition), NoEffect (the changes cancel). Warns (ParentsWarning) of one trained over another that is not merged."""
    rule = plugins.load("mergers", merger)
    config = plugins.options(rule.Config, dict(options or {}))
    weights = [1.0] * len(refs) if weights is None else [float(weight) for weight in weights]
    if not refs:
        raise UsageError("there is nothing to merge", "name the adapters: adapterhub merge me/a me/b --name me/c")
    if len(weights) != len(refs) or not all(map(math.isfinite, weights)):
        raise UsageError(
            f"{len(refs)} adapters but the weights are {weights}", "give one finite number for each adapter"
        )
    releases = [hub.resolve(ref) for ref in refs]
    for release in releases:
        if release.manifest.compose is not None:
            raise NotMergeable(
                f"{release} is a saved composition ({release.manifest.compose}) and has no tensors of its own",
                "merge the adapters it is made of",
            )
    base = common_base(hub, releases)
    warn_missing_parents(releases)
    merged = merge_modifications(
        [Adapter.load(hub, release).modifications() for release in releases],
        weights,
        rule(),
        config,
        names=[str(release) for release in releases],
    )
    return publish_tensors(
        hub,
        merged.modifications,
        name=name,
        version=version,
        base=base,
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


class Merged(NamedTuple):
    modifications: Modifications
    error: float
    """The largest relative error of a site (Frobenius norm) between what is stored and what was asked for."""
    worst: str
    """That site."""
    rank: int
    """The largest rank stored."""


def merge_modifications(
    adapters: Sequence[Modifications],
    weights: Sequence[float],
    merger: Merger,
    config: Any,
    names: Sequence[str] | None = None,
) -> Merged:
    """Adapters in memory, site by site over the union of their sites, in float32.

    One adapter at weight 1 under a linear merger is itself: whatever its forms, bit for bit."""
    if merger.linear and list(weights) == [1.0]:
        return Merged(dict(adapters[0]), 0.0, "", _largest_rank(adapters[0]))
    names = names or [f"adapter {i}" for i in range(len(adapters))]
    merged: Modifications = {}
    error, worst = 0.0, ""
    for path in _progress(sorted({path for adapter in adapters for path in adapter})):
        parts = [[m.to("cpu", torch.float32) for m in adapter.get(path, [])] for adapter in adapters]
        result = _joined(parts, weights) if merger.linear else None
        if result is None:
            result = _combined(_deltas(parts, path, names), weights, merger, config)
        part, distance = result
        if part is not None:
            merged[path] = [part]
            error, worst = max((error, worst), (distance, path))
    if not merged:
        raise NoEffect(f"the merge of {', '.join(names)} changes nothing: the changes cancel", "give other weights")
    return Merged(merged, error, worst, _largest_rank(merged))


Result = tuple[Modification | None, float]
"""What a site gets (None: nothing is left there) and its relative error."""


def _joined(parts: Sequence[Sequence[Modification]], weights: Sequence[float]) -> Result | None:
    """The weighted sum in the one form that all have, its terms side by side; None if that form has no such sum."""
    weighted = [(w, m) for w, adapter in zip(weights, parts, strict=True) if w for m in adapter]
    scaled = [m.scaled(w) for w, m in weighted]
    if not scaled:
        return None, 0.0
    form = type(scaled[0])
    if not all(
        type(m) is form and type(part) is form and m.additive for part, (_, m) in zip(scaled, weighted, strict=True)
    ):
        return None
    joined = scaled[0] if len(scaled) == 1 else form.join(scaled)
    if joined is None:
        return None
    return _at_useful_rank(joined, weighted) if isinstance(joined, LowRank) else (joined, 0.0)


def _at_useful_rank(joined: LowRank, weighted: Sequence[tuple[float, LowRank]]) -> Result:
    """The factors, made fewer if the weight cannot use them all, measured against the float64 sum; None if it cancels."""
    ups = [w * m.scale.double() * m.up.double() for w, m in weighted]
    downs = [m.down.double() for _, m in weighted]
    size = product_norm(torch.cat(ups, 1), torch.cat(downs))
    if size <= CANCELLED * sum(map(product_norm, ups, downs)):
        return None, 0.0
    (outputs, rank), inputs = joined.up.shape, joined.down.shape[1]
    if rank > min(outputs, inputs):
        u, s, vh = product_svd(joined.up * joined.scale, joined.down)
        joined = _low_rank(u, s, vh)
    stored = joined.scale.double() * joined.up.double()
    if not product_norm(stored, joined.down.double()):  # its weights are too small for float32
        return None, 0.0
    distance = product_norm(torch.cat([stored, *(-up for up in ups)], 1), torch.cat([joined.down.double(), *downs]))
    return joined, distance / size


def _combined(deltas: Sequence[Tensor], weights: Sequence[float], merger: Merger, config: Any) -> Result:
    """What the merger makes of the dense changes, factored again at its numerical rank."""
    total = merger.combine(deltas, weights, config)
    if not isinstance(total, Tensor) or total.shape != deltas[0].shape or not total.isfinite().all():
        raise PluginError(
            f"the merger {type(merger).__name__} did not return finite changes of shape {tuple(deltas[0].shape)}",
            "report it to the merger's author; adapterhub plugins check shows which law it breaks",
        )
    size = float(total.norm())
    if size <= CANCELLED * sum(abs(w) * float(delta.norm()) for w, delta in zip(weights, deltas, strict=True)):
        return None, 0.0
    part = _low_rank(*torch.linalg.svd(total.float(), full_matrices=False))
    return part, float((total - part.up @ part.down).norm()) / size


def _low_rank(u: Tensor, s: Tensor, vh: Tensor) -> LowRank:
    up, down = balanced(u, s, vh, numerical_rank(s, u.shape[0], vh.shape[1]))
    return LowRank(down=down.float().contiguous(), up=up.float().contiguous(), scale=torch.tensor(1.0))


def _deltas(parts: Sequence[Sequence[Modification]], path: str, names: Sequence[str]) -> list[Tensor]:
    """The dense change of each adapter's at one site, zeros where it has none."""
    changes = [sum(_delta(m, path, name) for m in adapter) for adapter, name in zip(parts, names, strict=True)]
    like = next(change for change in changes if isinstance(change, Tensor))
    return [change if isinstance(change, Tensor) else torch.zeros_like(like) for change in changes]


def _delta(modification: Modification, path: str, name: str) -> Tensor:
    try:
        weight, bias = modification.delta_weight(_BaseWeight(), _BaseWeight())
        if bias is not None or weight is None:
            raise NotFoldable(f"the form {modification.form!r} changes a bias")
    except NotFoldable as reason:
        raise NotMergeable(
            f"{name} cannot be merged: at {path}, {reason}",
            "stack them instead, each adapter as it is: adapterhub compose 'a + 0.5*b' --name NAME",
        ) from None
    return weight.detach()


class _BaseWeight:
    """Stands where a form asks for the base's weight, which a merge does not have: a form that reads it cannot be merged."""

    def __getattr__(self, name: str) -> Any:
        raise NotFoldable("its change depends on the base's own weight")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotFoldable("its change depends on the base's own weight")


def _largest_rank(modifications: Modifications) -> int:
    return max(
        (m.down.shape[0] for parts in modifications.values() for m in parts if isinstance(m, LowRank)), default=0
    )


def _progress(paths: Sequence[str]) -> Iterable[str]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(paths, "merging", console=console, transient=True, disable=not console.is_terminal)
