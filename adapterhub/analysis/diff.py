"""How two releases differ: in what their manifests say, and site by site in what they do to the base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.changes import change_of
from adapterhub.analysis.sites import by_layer, require_tensors
from adapterhub.errors import NotFoldable
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.modification import Modification
from adapterhub.spec.manifest import Manifest
from adapterhub.store.index import kind
from adapterhub.store.releases import Releases
from adapterhub.tensors.factors import product_svd

ENERGY = 0.99
"""The share of the difference's squared norm that its rank holds."""


def diff(hub: Releases, one: str, other: str) -> dict[str, Any]:
    """What changes from one release to the other, as plain data: {"from", "to", "manifest", "sites", "total"}.

    manifest  {what: [before, after]} of the base, kind, method, options, forms, licence, parents
    sites     per site {"path", "norm", "relative", "cosine", "rank", "note"}: the Frobenius norm of the difference of the two
              changes of its weight, over that of the first; their cosine; the singular values that hold 99 % of the squared
              norm of the difference. Of a form that is no change of a weight (note says so) the learned tensors are
              compared as one vector, and there is no rank
    total     the same over all sites

    Raises NotFound, UsageError for a composition. Two low ranks are compared by their factors (QR), in float64."""
    releases = [hub.resolve(one), hub.resolve(other)]
    for release in releases:
        require_tensors(release)
    parts = [Adapter.load(hub, release).modifications() for release in releases]
    sites = [_site(path, *(p.get(path, []) for p in parts)) for path in sorted({*parts[0], *parts[1]}, key=by_layer)]
    total = {key: sum(site.pop(key) for site in sites) for key in ("_aa", "_bb", "_ab", "_dd")}
    return {
        "from": str(releases[0]),
        "to": str(releases[1]),
        "manifest": _manifests(*(release.manifest for release in releases)),
        "sites": sites,
        "total": _measures(**total),
    }


def _site(path: str, one: Sequence[Modification], other: Sequence[Modification]) -> dict[str, Any]:
    one, other = ([part.to("cpu", torch.float64) for part in parts] for parts in (one, other))
    rank, note = None, ""
    if all(isinstance(part, LowRank) for part in (*one, *other)):
        (up, down), (up2, down2) = _factors(one), _factors(other)
        norms = {
            "_aa": _dot(up, down, up, down),
            "_bb": _dot(up2, down2, up2, down2),
            "_ab": _dot(up, down, up2, down2),
        }
        values = product_svd(
            torch.cat([u for u in (up, -up2) if u.numel()], 1), torch.cat([d for d in (down, down2) if d.numel()])
        )[1]
        rank = _rank(values)
        norms["_dd"] = float(values.square().sum())
    else:
        try:
            a, b = _dense(one), _dense(other)
            if a[0] is not None or b[0] is not None:
                zero = torch.zeros_like(a[0] if a[0] is not None else b[0])
                change = (a[0] if a[0] is not None else zero) - (b[0] if b[0] is not None else zero)
                rank = _rank(torch.linalg.svdvals(change))
            norms = _vectors(a, b)
        except NotFoldable as reason:
            note = f"{reason}; tensors compared"
            norms = _vectors(_tensors(one), _tensors(other))
    return {"path": path, **_measures(**norms), "rank": rank, "note": note, **norms}


def _factors(parts: Sequence[Modification]) -> tuple[Tensor, Tensor]:
    """(up, down) of the sum of low ranks; of nothing, empty ones."""
    if not parts:
        return torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
    return torch.cat([p.scale * p.up for p in parts], 1), torch.cat([p.down for p in parts])


def _dot(up: Tensor, down: Tensor, up2: Tensor, down2: Tensor) -> float:
    """<up @ down, up2 @ down2> without either product."""
    if not up.numel() or not up2.numel():
        return 0.0
    return float(((up.mT @ up2) * (down @ down2.mT)).sum())


def _dense(parts: Sequence[Modification]) -> tuple[Tensor | None, Tensor | None]:
    return change_of(parts) if parts else (None, None)


def _tensors(parts: Sequence[Modification]) -> list[Tensor]:
    return [
        t
        for part in parts
        for k, t in sorted(part.tensors.items())
        if t.is_floating_point() and k not in part.constants
    ]


def _vectors(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> dict[str, float]:
    """Squared norms and product of two lists of tensors; where shapes differ nothing of one is in the other."""
    found = dict.fromkeys(("_aa", "_bb", "_ab", "_dd"), 0.0)
    length = max(len(one), len(other))
    for a, b in zip([*one, *[None] * (length - len(one))], [*other, *[None] * (length - len(other))], strict=True):
        aa = 0.0 if a is None else float(a.square().sum())
        bb = 0.0 if b is None else float(b.square().sum())
        same = a is not None and b is not None and a.shape == b.shape
        found["_aa"] += aa
        found["_bb"] += bb
        found["_ab"] += float((a * b).sum()) if same else 0.0
        found["_dd"] += float((a - b).square().sum()) if same else aa + bb
    return found


def _measures(_aa: float, _bb: float, _ab: float, _dd: float) -> dict[str, float | None]:
    norm = max(_dd, 0.0) ** 0.5
    return {
        "norm": norm,
        "relative": norm / _aa**0.5 if _aa > 0 else None,
        "cosine": _ab / (_aa * _bb) ** 0.5 if _aa > 0 and _bb > 0 else None,
    }


def _rank(values: Tensor) -> int:
    held = values.square().cumsum(0)
    return int((held < ENERGY * held[-1]).sum()) + 1 if len(values) and held[-1] > 0 else 0


def _manifests(one: Manifest, other: Manifest) -> dict[str, list[Any]]:
    def facts(manifest: Manifest) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for forms in manifest.forms.values():
            for form in forms:
                counts[form] = counts.get(form, 0) + 1
        return {
            "base": f"{manifest.base.name} {manifest.base.sketch.digest}",
            "kind": kind(manifest),
            "options": manifest.method.options if manifest.method else {},
            "forms": counts,
            "licence": manifest.licence,
            "parents": sorted(f"{p.relation} {p.label}" for p in manifest.parents),
        }

    before, after = facts(one), facts(other)
    return {key: [before[key], after[key]] for key in before if before[key] != after[key]}
