"""The bill of materials of an adapter or a composition: every release it is made of, down to the base, as CycloneDX 1.6."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from adapterhub.spec.expression import references
from adapterhub.spec.manifest import Base, Parent, Release
from adapterhub.store.index import kind
from adapterhub.store.releases import Releases
from adapterhub.trust.policy import policy, trusted_for, verdict


@dataclass(frozen=True)
class Material:
    """One release in the bill."""

    release: Release | None
    """None: it is told of by a child, and is not in this hub."""
    label: str
    digest: str
    signed: str
    """What its signatures are worth: see `policy.Verdict`."""
    needed: bool
    """Whether what was asked for runs only with it; else it tells where it comes from."""


def materials(hub: Releases, expression: str) -> list[Material]:
    """Every release that the expression is made of, and what those come from; what it names first."""
    trust = policy()
    asked = [hub.resolve(reference) for reference in references(hub.read(expression))]
    found: dict[str, Material] = {}
    waiting: list[tuple[Release | Parent, bool]] = [(release, True) for release in asked]
    while waiting:
        one, needed = waiting.pop(0)
        known = found.get(one.digest)
        if known and (known.needed or not needed):
            continue
        release = hub.index.find(one.digest)
        signed = "not here"
        if release is not None:
            signed = verdict(release, hub.index.signatures(one.digest), trusted_for(trust, release.name)).kind
        found[one.digest] = Material(release, f"{one.name}@{one.version}", one.digest, signed, needed)
        for parent in release.manifest.parents if release else ():
            waiting.append((parent, needed and parent.needed))
    return list(found.values())


def cyclonedx(found: Sequence[Material], expression: str) -> dict[str, Any]:
    """The bill in the words of CycloneDX 1.6 (machine-learning-model components, hashes, licences, dependencies)."""
    bases = {m.release.manifest.base.sketch.digest: m.release.manifest.base for m in found if m.release}
    plugins = {
        (distribution, at) for m in found if m.release for distribution, at in m.release.manifest.plugins.items()
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "adapterhub", "version": version("adapterhub")}]},
            "component": {"type": "machine-learning-model", "bom-ref": "asked", "name": expression},
        },
        "components": [
            *(_release(material) for material in found),
            *(_base(base) for _, base in sorted(bases.items())),
            *(
                {"type": "library", "bom-ref": f"pypi:{name}@{at}", "name": name, "version": at}
                for name, at in sorted(plugins)
            ),
        ],
        "dependencies": [_depends(material) for material in found if material.release],
    }


def _release(material: Material) -> dict[str, Any]:
    release = material.release
    properties = {"adapterhub:signature": material.signed, "adapterhub:needed": str(material.needed).lower()}
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": material.digest,
        "name": material.label.partition("@")[0],
        "version": material.label.partition("@")[2],
        "hashes": [{"alg": "SHA-256", "content": material.digest.removeprefix("sha256:")}],
    }
    if release is not None:
        manifest = release.manifest
        properties |= {
            "adapterhub:kind": kind(manifest),
            "adapterhub:size": str(sum(f.size for f in manifest.files.values())),
        }
        properties |= {f"adapterhub:file:{role}": file.digest for role, file in sorted(manifest.files.items())}
        if manifest.licence:
            component["licenses"] = [{"expression": manifest.licence}]
    component["properties"] = [{"name": name, "value": value} for name, value in sorted(properties.items())]
    return component


def _base(base: Base) -> dict[str, Any]:
    facts = {"structure": base.structure, "sketch": base.sketch.digest, "tokenizer": base.tokenizer}
    return {
        "type": "machine-learning-model",
        "bom-ref": f"base:{base.sketch.digest}",
        "name": base.name,
        "properties": [{"name": f"adapterhub:{key}", "value": value} for key, value in facts.items() if value],
    }


def _depends(material: Material) -> dict[str, Any]:
    manifest = material.release.manifest
    on = [parent.digest for parent in manifest.parents] + [f"base:{manifest.base.sketch.digest}"]
    on += [f"pypi:{name}@{at}" for name, at in manifest.plugins.items()]
    return {"ref": material.digest, "dependsOn": sorted(set(on))}
