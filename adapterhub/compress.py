"""The same adapter in fewer bytes, with what it cost: sizes and relative errors, measured on what was really stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterhub import plugins
from adapterhub.adapter import Adapter, Modifications, forms_of, modifications_of
from adapterhub.errors import CodecError, NoEffect, UsageError
from adapterhub.factors import product_norm
from adapterhub.forms.low_rank import LowRank
from adapterhub.manifest import Made, Manifest, Parent, Release, check_name
from adapterhub.modification import Modification
from adapterhub.tensors import dump, load

if TYPE_CHECKING:
    from adapterhub.hub import Hub


def compress(
    hub: Hub,
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
    coder = plugins.load("codecs", codec)
    config = plugins.options(coder.Config, dict(options or {}))
    release = hub.resolve(ref)
    parent = release.manifest
    if parent.compose is not None:
        raise UsageError(
            f"{release} is a saved composition ({parent.compose}) and has no tensors of its own",
            "compress the adapters it is made of",
        )
    adapter = Adapter.load(hub, release)
    encoded = dump(coder().encode(adapter.tensors, config))
    before = parent.files["tensors"].size
    if len(encoded) >= before:
        raise CodecError(
            f"{codec} would not make {release} smaller: {len(encoded)} bytes, now {before}",
            "keep it as it is, or give options that drop more (adapterhub plugins list)",
        )
    decoded = coder().decode(load(encoded))
    modifications = modifications_of(decoded, parent)
    errors = site_errors(adapter.modifications(), modifications)
    if not any(left for _, left in errors.values()):
        raise NoEffect(f"{codec} leaves nothing of {release}: it would change nothing", "give options that drop less")
    worst = max(errors, key=lambda path: errors[path][0])
    manifest = Manifest(
        name=check_name(name),
        version="0.0.0",  # the hub assigns it
        base=parent.base,
        method=parent.method,
        forms=forms_of(modifications),
        codecs=[Made(name=codec, options=asdict(config), distribution=plugins.distribution("codecs", codec))],
        parents=[
            Parent(name=release.name, version=release.version, digest=release.digest, relation="compress"),
            *(p for p in parent.parents if p.relation == "on"),
        ],
        recipe={"beneath": parent.recipe["beneath"]} if "beneath" in parent.recipe else {},
        metrics={
            "compress": {
                "bytes_before": before,
                "bytes_bf16": len(dump(in_bf16(adapter.tensors))),
                "bytes_after": len(encoded),
                "worst_site": worst,
                "worst_error": errors[worst][0],
                "median_error": median(error for error, _ in errors.values()),
            }
        },
        licence=parent.licence,
    )
    return hub.publish(manifest, {"tensors": encoded}, version=version)[0]


def in_bf16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The usual way to share an adapter: every floating tensor in 16 bits. What ratios of compression are measured against."""
    return {k: t.to(torch.bfloat16) if t.is_floating_point() else t for k, t in tensors.items()}


def site_errors(before: Modifications, after: Modifications) -> dict[str, tuple[float, float]]:
    """{site path: (relative error, norm that is left)}, Frobenius: of the change of the weight where all is low rank, of
    the tensors themselves where other forms stand."""
    errors = {}
    for path, parts in before.items():
        if all(isinstance(m, LowRank) for m in parts):
            (up, down), (new_up, new_down) = _factors(parts), _factors(after[path])
            size, left = product_norm(up, down), product_norm(new_up, new_down)
            distance = product_norm(torch.cat([up, -new_up], 1), torch.cat([down, new_down]))
        else:
            old, new = _flat(parts), _flat(after[path])
            size, left, distance = float(old.norm()), float(new.norm()), float((old - new).norm())
        errors[path] = (distance / size if size else 0.0, left)
    return errors


def _factors(parts: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """(up, down) of all parts side by side, their scales in up; float64."""
    ups = [m.scale.double() * m.up.double() for m in parts]
    return torch.cat(ups, 1), torch.cat([m.down.double() for m in parts])


def _flat(parts: Sequence[Modification]) -> Tensor:
    learned = [t.double().reshape(-1) for m in parts for k, t in sorted(m.tensors.items()) if k not in m.constants]
    return torch.cat(learned) if learned else torch.zeros(0, dtype=torch.float64)
