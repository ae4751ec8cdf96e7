"""Versions of an adapter over time: where tags went, what was yanked, what came from what. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterhub.errors import NotFound, UsageError
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import Reference
from adapterhub.store.releases import Releases


def rollback(hub: Releases, name: str, tag: str) -> tuple[str, str]:
    """Let a tag mean what it meant before its last move; returns the version it left and the one it means now.

    Nothing moves when another moves it meanwhile (TagMoved). Raises NotFound for a tag that never meant anything else,
    or whose former version was removed."""
    moves = hub.index.tag_moves(name, tag)
    now = moves[-1] if moves else None
    if now is None:
        raise NotFound(f"{name} has no tag {tag}", f"adapterhub log {name} shows its tags")
    here = {row.version for row in hub.releases(name)}
    before = next((version for version in reversed(moves) if version not in (now, None)), None)
    if before is None or before not in here:
        lost = f"{before}, which it meant before, was removed" if before else "it has never meant anything else"
        raise NotFound(f"{name}@{tag} cannot go back: {lost}", f"adapterhub tag {name}@VERSION {tag}")
    hub.index.set_tag(name, tag, before, expected=now)
    return now, before


def yank(hub: Releases, reference: str, reason: str | None) -> Release:
    """Say why a version should not be chosen any more; None takes it back. What is locked to it goes on, with a warning."""
    wanted = Reference.parse(reference)
    if wanted.at is None:
        raise UsageError(f"{reference} does not say which version", f"write {reference}@X.Y.Z")
    check_reason(reason)
    release = hub.resolve(wanted)
    hub.index.yank(release.name, release.version, reason)
    return release


def check_reason(reason: str | None) -> None:
    """Raise UsageError for a reason that nobody can read; None takes a yank back."""
    if reason is not None and (not reason.strip() or not reason.isprintable()):
        raise UsageError("a yank needs a reason that others can read", "--reason 'wrong labels in the data'")


@dataclass(frozen=True)
class Ancestor:
    """One line of a lineage."""

    depth: int
    """0: what was asked about."""
    label: str
    digest: str
    relation: str
    """What it is to its child: "on", "merge", ...; "" for what was asked about."""
    here: bool
    seen: bool
    """Whether what is behind it stands further up."""


def lineage(hub: Releases, release: Release) -> Iterator[Ancestor]:
    """Where a release comes from, down to the roots, each before its own parents."""
    seen: set[str] = set()
    waiting = [(0, str(release), release.digest, "")]
    while waiting:
        depth, label, digest, relation = waiting.pop()
        found = hub.index.find(digest)
        yield Ancestor(depth, label, digest, relation, found is not None, digest in seen)
        if found is not None and digest not in seen:
            parents = reversed(found.manifest.parents)
            waiting += [(depth + 1, p.label, p.digest, p.relation) for p in parents]
        seen.add(digest)
