"""From an answer of the resolver to a lock."""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub.config.lock import Lock, Locked, LockedBase, LockedPlugin, LockedStack
from adapterhub.config.project import Project
from adapterhub.install.question import Resolution
from adapterhub.spec.expression import Ref as Reading
from adapterhub.spec.expression import substitute
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import Reference
from adapterhub.spec.parser import parse


def made(project: Project, answer: Resolution) -> Lock:
    """The lock of an answer for a project."""
    asked = {release.digest for release, _ in answer.chosen.values()}
    releases = sorted(answer.releases.values(), key=lambda found: (found[0].name, _order(found[0]), found[0].digest))
    bases = {release.manifest.base.sketch.digest: release.manifest.base for release, _ in releases}
    return Lock(
        requirements=project.stated(),
        adapter=[
            Locked(
                name=release.name,
                version=release.version,
                digest=release.digest,
                size=sum(file.size for file in release.manifest.files.values()),
                source=source,
                base=release.manifest.base.sketch.digest,
                asked=release.digest in asked,
                needs=sorted({parent.digest for parent in release.manifest.required}),
            )
            for release, source in releases
        ],
        stack=[
            LockedStack(name=name, expression=_pinned(text, answer.chosen))
            for name, text in sorted(project.stacks.items())
        ],
        base=[
            LockedBase(name=base.name, structure=base.structure, sketch=digest, tokenizer=base.tokenizer)
            for digest, base in sorted(bases.items())
        ],
        plugin=[LockedPlugin(name=name, version=version) for name, version in sorted(answer.plugins.items())],
    )


def _pinned(text: str, chosen: Mapping[str, tuple[Release, str]]) -> str:
    return str(substitute(parse(text), lambda ref: Reading(Reference(ref.name, chosen[ref.name][0].version))))


def _order(release: Release) -> tuple[int, ...]:
    return tuple(map(int, release.version.split(".")))
