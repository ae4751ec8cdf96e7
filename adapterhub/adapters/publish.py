"""Modifications in memory become a release: what import, training, merging and `model.save` share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import plugins
from adapterhub.adapters.adapter import forms_of
from adapterhub.adapters.names import named_tensors
from adapterhub.kinds.modification import Modifications
from adapterhub.spec.expression import Ensemble, Node, Ref, beneath, references
from adapterhub.spec.manifest import Base, Made, Manifest, Parent, Release
from adapterhub.spec.names import Reference, check_name
from adapterhub.spec.parents import weighed
from adapterhub.store.expand import expand
from adapterhub.store.releases import Releases
from adapterhub.tensors.file import dump

if TYPE_CHECKING:
    from adapterhub.bases.fingerprint import Fingerprint


def publish_tensors(
    hub: Releases,
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
        plugins=plugins.needed(part.form for here in parts.values() for part in here),
        parents=list(parents),
        recipe=dict(recipe or {}),
        metrics=dict(metrics or {}),
        licence=licence,
    )
    tensors = dump(named_tensors(parts))
    return hub.publish(manifest, {"tensors": tensors, **(files or {})}, sketch, version=version)[0]


def publish_next(
    hub: Releases,
    key: str,
    parts: Modifications,
    node: Node | Ensemble,
    fingerprint: Fingerprint,
    version: str | None = None,
) -> Release:
    """The next version of the adapter `key` ("name@version") with these tensors, trained in the expression `node`. Its
    parents: the version it goes on from, what it weighs if it is a gate, and the others it was trained over."""
    before = hub.resolve(key)
    children = weighed(before.manifest)
    own = references(expand(hub, Ref(Reference.parse(key))))  # of a gate: what it weighs too
    others = [hub.resolve(r) for r in Counter(references(node)) - Counter(own)]
    parents = [Parent(name=before.name, version=before.version, digest=before.digest, relation="continue"), *children]
    parents += [Parent(name=r.name, version=r.version, digest=r.digest, relation="on") for r in others]
    return publish_tensors(
        hub,
        parts,
        name=before.name,
        version=version,
        base=fingerprint.base,
        sketch=fingerprint.sketch,
        method=before.manifest.method,
        parents=parents,
        recipe={"trained_in": str(node), "beneath": beneath(node, key)} if others else {},
        licence=before.manifest.licence,
    )
