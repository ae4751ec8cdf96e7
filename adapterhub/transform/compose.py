"""Save a composition: an expression with every name pinned, as an adapter without tensors."""

from __future__ import annotations

from adapterhub.bases.agreement import common_base
from adapterhub.spec.expression import references
from adapterhub.spec.manifest import Manifest, Parent, Release
from adapterhub.spec.names import check_name
from adapterhub.spec.parents import joined_licences
from adapterhub.store.expand import expand, pin
from adapterhub.store.releases import Releases


def compose(hub: Releases, expression: str, name: str, version: str | None = None) -> Release:
    """Save a composition under a name. It installs, lists and runs as any other adapter.

    Raises ExpressionError, NotFound, IncompatibleBase (its parts were made for unlike bases)."""
    check_name(name)
    pinned = pin(hub, hub.read(expression))
    expand(hub, pinned)  # what could not run is not saved
    releases = {str(ref): hub.resolve(ref) for ref in references(pinned)}
    manifest = Manifest(
        name=name,
        version="0.0.0",  # the hub assigns it
        base=common_base(hub, list(releases.values())),
        compose=str(pinned),
        parents=[
            Parent(name=r.name, version=r.version, digest=r.digest, relation="compose") for r in releases.values()
        ],
        licence=joined_licences(list(releases.values())),
    )
    return hub.publish(manifest, {}, None, version=version)[0]
