"""How strongly an adapter changes its base, site by site: norms and ranks of the weight changes, norms of the rest."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor

from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.changes import change_of
from adapterhub.analysis.sites import alike, by_layer, require_tensors
from adapterhub.bases import loading, resolution
from adapterhub.errors import NotFoldable
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.modification import Modification
from adapterhub.sites import Site
from adapterhub.sites.weights import values
from adapterhub.spec.manifest import Release
from adapterhub.store.releases import Releases
from adapterhub.tensors.factors import numerical_rank, product_svd

ENERGY = 0.9
"""The share of a change's squared norm that its energy rank holds."""


def inspect(hub: Releases, ref: str, base: object = None, force: bool = False) -> dict[str, Any]:
    """How strongly an adapter changes each site, as plain data: {"release", "base", "sites": [one entry a modification]}.

    An entry has path, role (with a base), form and
    weight    {"norm", "relative", "rank", "energy_rank", "shape"} of ΔW, or None: Frobenius norms, relative to the base's
              weight (None without base); rank above float32's rounding; singular values that hold 90 % of ΔW's squared norm
    bias      {"norm", "relative"} of Δb, or None
    tensors   {tensor: {"shape", "norm", "rms"}} of the learned tensors, for what is no change of a weight
    note      why there is no weight: the form is none, or its change depends on the base's weight and there is no base

    Each modification is held against the base's own weight, also where several sit at one site. base: a known name, folder
    or repo id; its weights are loaded as they are stored, and computed with in float64.

    Raises NotFound, UsageError for a composition, IncompatibleBase for another base than the adapter's, unless forced."""
    release = hub.resolve(ref)
    require_tensors(release)
    if base is None:
        parts, name, at, model = Adapter.load(hub, release).modifications(), None, {}, None
    else:
        parts, name, at, model = _on_base(hub, release, base, force)
    entries = [_entry(path, part, at.get(path), model) for path in sorted(parts, key=by_layer) for part in parts[path]]
    return {"release": str(release), "base": name, "sites": entries}


def _on_base(hub: Releases, release: Release, base: object, force: bool) -> tuple:
    """The adapter, checked against the base before its weights are loaded; the base's name, sites and model."""
    from adapterhub.bases.fingerprint import fingerprint
    from adapterhub.runtime.residents import Residents
    from adapterhub.sites import sites

    resolved = resolution.resolve(base)
    bare = loading.skeleton(resolved)
    here = sites(bare)
    parts = Residents(bare, here, hub, fingerprint(resolved), force).load(str(release))
    return parts, resolved.name, {site.path: site for site in here}, loading.load_model(resolved, "auto")


def _entry(path: str, part: Modification, site: Site | None, model: torch.nn.Module | None) -> dict[str, Any]:
    part = part.to("cpu", torch.float64)
    weight, bias = _own(site, model)
    entry = {"path": path, "role": site.role if site else None, "form": part.form}
    entry |= {"weight": None, "bias": None, "tensors": {}, "note": ""}
    try:
        if site is not None and weight is None:
            raise NotFoldable("the site is not one weight")
        part.bind(weight)
        if isinstance(part, LowRank):  # ranks by its factors: the product may be large
            values, shape = product_svd(part.scale * part.up, part.down)[1], (len(part.up), part.down.shape[1])
            changes = {"weight": _strength(values, shape, weight)}
        else:
            change, shift = change_of([part], None if weight is None else (weight, bias))
            changes = {} if change is None else {"weight": _strength(_singular(change), change.shape, weight)}
            changes |= {} if shift is None else {"bias": _relative(shift, bias)}
        return entry | changes
    except NotFoldable as reason:
        learned = {k: t for k, t in part.tensors.items() if t.is_floating_point() and k not in part.constants}
        return entry | {"tensors": {key: _size(t) for key, t in learned.items()}, "note": str(reason)}


def _own(site: Site | None, model: torch.nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """The base's weight (outputs, inputs) and bias at a site in float64; None for what is not there."""
    if site is None or model is None:
        return None, None
    module = model.get_submodule(site.module)
    if not (site.linear or site.embedding):
        return None, None
    weight, bias = values(module), getattr(module, "bias", None)
    if site.columns is not None:
        columns = torch.tensor(site.columns.index())
        weight, bias = weight[columns], None if bias is None else bias[columns]
    return weight.double(), None if bias is None else bias.double()


def _strength(values: Tensor, shape: tuple[int, int], weight: Tensor | None) -> dict[str, Any]:
    """Of a change of a weight by its singular values, descending."""
    norm, held = float(values.norm()), values.square().cumsum(0)
    return {
        "norm": norm,
        "relative": _ratio(norm, weight),
        "rank": numerical_rank(values, *shape),
        "energy_rank": int((held < ENERGY * held[-1]).sum()) + 1 if norm else 0,
        "shape": list(shape),
    }


def _singular(change: Tensor) -> Tensor:
    """Its singular values, descending, from the smaller Gram matrix in float64: exact to 1e-8 of the largest, well below
    the float32 rounding at which ranks are counted, at a fraction of an SVD's cost."""
    change = change.double()
    change = change if change.shape[0] <= change.shape[1] else change.mT
    return torch.linalg.eigvalsh(change @ change.mT).clamp(min=0).flip(0).sqrt()


def _relative(change: Tensor, own: Tensor | None) -> dict[str, Any]:
    norm = float(change.norm())
    return {"norm": norm, "relative": _ratio(norm, own)}


def _ratio(norm: float, own: Tensor | None) -> float | None:
    size = 0.0 if own is None else float(own.norm())
    return norm / size if size else None


def _size(tensor: Tensor) -> dict[str, Any]:
    norm = float(tensor.norm())
    return {"shape": list(tensor.shape), "norm": norm, "rms": norm / max(1, tensor.numel()) ** 0.5}


def summary(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What people read of the entries. "weights" and "tensors": a row for each kind of site, with the median, the largest
    and where that is; "strongest": the ten largest changes of weights. "measure" says of what: a norm relative to the
    base's ("relative"), an absolute one ("norm"), or a tensor's root mean square ("rms")."""
    changed: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    tensors: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for entry in entries:
        kind = alike(entry["path"]), entry["form"]
        for what in ("weight", "bias"):
            if entry[what] is not None:
                changed.setdefault((*kind, what), []).append(entry)
        for key, size in entry["tensors"].items():
            tensors.setdefault((*kind, key), []).append((size["rms"], entry["path"]))
    weights = []
    for kind, members in changed.items():
        what = kind[2]
        measure, values = _measured(members, what)
        ranks = (
            {k: median(e["weight"][k] for e in members) for k in ("rank", "energy_rank")} if what == "weight" else {}
        )
        weights.append(_row(kind, measure, values) | ranks)
    of_weights = [entry for entry in entries if entry["weight"] is not None]
    measure, values = _measured(of_weights, "weight")
    strongest = sorted(zip(values, of_weights, strict=True), key=lambda pair: -pair[0][0])[:10]
    return {
        "weights": weights,
        "tensors": [_row(kind, "rms", values) for kind, values in tensors.items()],
        "strongest": [
            {"path": path, "form": entry["form"], "measure": measure, "value": value}
            for (value, path), entry in strongest
        ],
    }


def _measured(entries: list[dict[str, Any]], what: str) -> tuple[str, list[tuple[float, str]]]:
    """Relative norms where every entry has one, else absolute ones, each with its site."""
    measure = "norm" if any(entry[what]["relative"] is None for entry in entries) else "relative"
    return measure, [(entry[what][measure], entry["path"]) for entry in entries]


def _row(kind: tuple[str, str, str], measure: str, values: list[tuple[float, str]]) -> dict[str, Any]:
    largest, at = max(values)
    row = dict(zip(("sites", "form", "of"), kind, strict=True))
    return row | {
        "count": len(values),
        "measure": measure,
        "median": median(value for value, _ in values),
        "largest": largest,
        "at": at,
    }
