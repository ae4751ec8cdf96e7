"""Modifications in memory become a release: what import, training, merging and `model.save` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.adapter import Modifications, forms_of
from adapterhub.manifest import Base, Made, Manifest, Parent, Release, check_name
from adapterhub.modification import named_tensors
from adapterhub.tensors import dump

if TYPE_CHECKING:
    from adapterhub.hub import Hub


def publish_tensors(
    hub: Hub,
    parts: Modifications,
    *,
    name: str,
    base: Base,
    sketch: bytes | None = None,
    version: str | None = None,
    method: Made | None = None,
    parents: Sequence[Parent] = (),
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    licence: str | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Release:
    """Store the tensors of {site path: modifications in order} as a release; parameters are stored as they are now.

    sketch: the bytes that go with `base`; None when the hub has them (the base of a parent). files: what else belongs
    to it, by role ("log"). The same content again under the name is no new release: that one is returned.
    Raises UnsafeFile for NaN and infinities, and what `Hub.publish` raises."""
    manifest = Manifest(
        name=check_name(name),
        version="0.0.0",  # the hub assigns it
        base=base,
        method=method,
        forms=forms_of(parts),
        parents=list(parents),
        recipe=dict(recipe or {}),
        metrics=dict(metrics or {}),
        licence=licence,
    )
    tensors = dump(named_tensors(parts))
    return hub.publish(manifest, {"tensors": tensors, **(files or {})}, sketch, version=version)[0]
