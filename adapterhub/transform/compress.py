"""The same adapter in fewer bytes, with what it cost: sizes and relative errors, measured on what was really stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter, forms_of, modifications_of
from adapterhub.adapters.changes import WHOLE, change_of
from adapterhub.errors import CodecError, NoEffect, UsageError
from adapterhub.forms.affine import Affine
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.contracts import make
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.spec.manifest import Made, Manifest, Parent, Release
from adapterhub.spec.names import check_name
from adapterhub.store.releases import Releases
from adapterhub.tensors.factors import product_norm
from adapterhub.tensors.file import dump, load


def compress(
    hub: Releases,
    ref: str,
    codec: str,
    options: Mapping[str, Any] | None = None,
    *,
    name: str,
    version: str | None = None,
) -> Release:
    """A release whose tensors are encoded by a codec; it loads and runs as any other.

    A release that is compressed already is decoded first, so the new one has this codec alone. Metrics: bytes before and
    after, as stored and as bf16; the median and the worst relative error of a site (see `site_errors`).
    Raises UsageError, PluginError (no such codec), CodecError (not smaller, or the codec cannot carry it), NoEffect."""
    coder = make(plugins.load("codecs", codec))
    config = plugins.options(coder.Config, dict(options or {}))
    release = hub.resolve(ref)
    parent = release.manifest
    if parent.compose is not None:
        raise UsageError(
            f"{release} is a saved composition ({parent.compose}) and has no tensors of its own",
            "compress the adapters it is made of",
        )
    adapter = Adapter.load(hub, release)
    original = adapter.modifications()
    encoded = dump(coder.encode(adapter.tensors, config))
    before = parent.files["tensors"].size
    if len(encoded) >= before:
        raise CodecError(
            f"{codec} would not make {release} smaller: {len(encoded)} bytes, now {before}",
            "keep it as it is, or give options that drop more (adapterhub plugins list)",
        )
    modifications = _in_order(coder.decode(load(encoded)), parent, original, codec)
    errors = site_errors(original, modifications)
    if not any(left for _, left in errors.values()):
        raise NoEffect(f"{codec} leaves nothing of {release}: it would change nothing", "give options that drop less")
    bytes_of = {"before": before, "bf16": len(dump(in_bf16(adapter.tensors))), "after": len(encoded)}
    manifest = Manifest(
        name=check_name(name),
        version="0.0.0",  # the hub assigns it
        base=parent.base,
        method=parent.method,
        forms=forms_of(modifications),
        plugins=parent.plugins | plugins.needed([codec], "codecs"),
        codecs=[Made(name=codec, options=asdict(config), distribution=plugins.distribution("codecs", codec))],
        parents=[
            Parent(name=release.name, version=release.version, digest=release.digest, relation="compress"),
            *(p for p in parent.parents if p.relation == "on"),
        ],
        recipe={"beneath": parent.recipe["beneath"]} if "beneath" in parent.recipe else {},
        metrics={"compress": {f"bytes_{when}": size for when, size in bytes_of.items()} | _summary(errors)},
        licence=parent.licence,
    )
    return hub.publish(manifest, {"tensors": encoded}, version=version)[0]


def _summary(errors: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The worst site and the median one of `site_errors`."""
    worst = max(errors, key=lambda path: errors[path][0])
    middle = median(error for error, _ in errors.values())
    return {"worst_site": worst, "worst_error": errors[worst][0], "median_error": middle}


def in_bf16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The usual way to share an adapter: every floating tensor in 16 bits. What ratios of compression are measured against."""
    return {k: t.to(torch.bfloat16) if t.is_floating_point() else t for k, t in tensors.items()}


def _in_order(decoded: Mapping[str, Tensor], parent: Manifest, original: Modifications, codec: str) -> Modifications:
    """The decoded modifications in the order of the original's; in any order at sites whose forms the codec has changed, if
    none there sees what the others do. Raises CodecError otherwise."""
    found = modifications_of(decoded)
    for path, forms in forms_of(found).items():
        if sorted(forms) != sorted(parent.forms.get(path, [])) and not all(
            part.additive for part in (*found[path], *original.get(path, []))
        ):
            raise CodecError(
                f"{codec} would change the forms at {path}, where their order matters ({', '.join(parent.forms[path])})",
                "use a codec that keeps the forms: compeft or int8",
            )
    return modifications_of(decoded, structs.replace(parent, forms=_orders(found, parent)))


def _orders(found: Modifications, parent: Manifest) -> dict[str, list[str]]:
    return {
        path: parent.forms[path] if sorted(forms) == sorted(parent.forms.get(path, [])) else forms
        for path, forms in forms_of(found).items()
    }


def site_errors(before: Modifications, after: Modifications) -> dict[str, tuple[float, float]]:
    """{site path: (relative error, norm that is left)}, Frobenius: of the change of the weight and bias where the forms tell
    it without the base's weight (so across forms: a low-rank pair and the sparse change made of it), of the tensors
    themselves where other forms stand; both together where both do."""
    errors = {}
    for path, parts in before.items():
        (own, others), (new, others_left) = _split(parts), _split(after[path])
        of = _of_factors if all(isinstance(m, LowRank) for m in (*own, *new)) else _of_changes
        old, left = _flat(others), _flat(others_left)
        both = zip(of(own, new), (old.norm(), left.norm(), (old - left).norm()), strict=True)
        size, left, distance = (math.hypot(one, float(other)) for one, other in both)
        errors[path] = (distance / size if size else 0.0, left)
    return errors


def _split(parts: Sequence[Modification]) -> tuple[list[Modification], list[Modification]]:
    """What tells its change of the weight without the base's, and what does not."""
    own = [m for m in parts if isinstance(m, WHOLE) or (isinstance(m, Affine) and m.additive)]
    return own, [m for m in parts if m not in own]


def _of_factors(before: Sequence[LowRank], after: Sequence[LowRank]) -> tuple[float, float, float]:
    """(norm, norm left, distance), never making the matrices whole."""
    if not before:
        return 0.0, 0.0, 0.0
    (up, down), (new_up, new_down) = _factors(before), _factors(after)
    distance = product_norm(torch.cat([up, -new_up], 1), torch.cat([down, new_down]))
    return product_norm(up, down), product_norm(new_up, new_down), distance


def _of_changes(before: Sequence[Modification], after: Sequence[Modification]) -> tuple[float, float, float]:
    size = left = distance = 0.0
    for old, new in zip(_change(before), _change(after), strict=True):
        if old is None and new is None:
            continue
        old, new = (torch.zeros_like(other) if t is None else t for t, other in ((old, new), (new, old)))
        size, left = math.hypot(size, float(old.norm())), math.hypot(left, float(new.norm()))
        distance = math.hypot(distance, float((old - new).norm()))
    return size, left, distance


def _change(parts: Sequence[Modification]) -> tuple[Tensor | None, Tensor | None]:
    return change_of([m.to(dtype=torch.float64) for m in parts])


def _factors(parts: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """(up, down) of all parts side by side, their scales in up; float64."""
    ups = [m.scale.double() * m.up.double() for m in parts]
    return torch.cat(ups, 1), torch.cat([m.down.double() for m in parts])


def _flat(parts: Sequence[Modification]) -> Tensor:
    learned = [t.double().reshape(-1) for m in parts for k, t in sorted(m.tensors.items()) if k not in m.constants]
    return torch.cat(learned) if learned else torch.zeros(0, dtype=torch.float64)
