"""Tags and yanks at a registry: set there, and carried along by a push."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from urllib.parse import quote

from adapterhub.errors import NotFound, TagMoved, UsageError
from adapterhub.sources.registry import Registry
from adapterhub.sources.source import Candidate
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import TAG, Reference
from adapterhub.store.history import check_reason
from adapterhub.store.index import ANY, Row
from adapterhub.store.releases import Releases


def tag(registry: Registry, reference: str, name: str, expected: str | None = ANY) -> Candidate:
    """Let a tag at a registry mean the release that a reference means there; returns that.

    expected: the version that it must mean now (None: nothing). Raises TagMoved when it means another, NotFound."""
    if not TAG.fullmatch(name):
        raise UsageError(f"{name!r} is not a tag", "use [a-z][a-z0-9._-]*, for example stable")
    registry.http.require_token()
    found = _there(registry, Reference.parse(reference))
    _tag(registry, found, name, expected)
    return found


def yank(registry: Registry, reference: str, reason: str | None) -> Candidate:
    """Say at a registry why a version should not be chosen any more; None takes it back. Raises NotFound, UsageError."""
    wanted = Reference.parse(reference)
    if wanted.at is None:
        raise UsageError(f"{reference} does not say which version", f"write {reference}@X.Y.Z")
    check_reason(reason)
    registry.http.require_token()
    found = _there(registry, wanted)
    _yank(registry, found, reason)
    return found


def carry(
    hub: Releases, registry: Registry, pushed: Iterable[tuple[Release, bool]], told: Callable[[str], None]
) -> None:
    """Bring the tags and yanks of releases that were just pushed, with whether each was new there.

    A tag that means nothing there is set. One that means another version moves only if the release is new there and the tag
    meant that version here just before, so that nobody can have decided anything else since; else it stays and the user
    is told what to type. A yank is brought, never taken back."""
    for release, new in pushed:
        row = next((row for row in hub.releases(release.name) if row.version == release.version), None)
        if row is None or not (row.tags or row.yanked):
            continue
        there = registry.candidates(release.name)
        one = next((found for found in there if found.digest == release.digest), None)
        if one is None:
            raise NotFound(f"{registry.label} does not list {release}, which was pushed to it", "push it again")
        for name in row.tags:
            _carry_tag(hub, registry, row, name, there, new, told)
        if row.yanked and one.yanked is None:
            _yank(registry, one, row.yanked)
            told(f"{release} is yanked there")


def _carry_tag(
    hub: Releases,
    registry: Registry,
    row: Row,
    name: str,
    there: list[Candidate],
    new: bool,
    told: Callable[[str], None],
) -> None:
    now = next((found.version for found in there if name in found.tags), None)
    if now == row.version:
        return
    before = [version for version in hub.index.tag_moves(row.name, name)[:-1] if version != row.version][-1:]
    if now is None or (new and before == [now]):
        try:
            _tag(registry, Candidate.of(row), name, now)
            return told(f"{row.name}@{name} means {row.version} there" + (f", no longer {now}" if now else ""))
        except TagMoved:  # between our look and our step
            now = "another version"
    told(
        f"{row.name}@{name} means {now} there and was not moved: adapterhub tag {row} {name} --at {registry.label}"
        + (f" --expect {now}" if " " not in now else "")
    )


def _there(registry: Registry, wanted: Reference) -> Candidate:
    """The release that a reference means at a registry. Raises NotFound."""
    found = registry.candidates(wanted.name)
    if not found:
        raise NotFound(f"{registry.label} has no adapter named {wanted.name}", "push it there first")
    if wanted.at is None:
        return next((one for one in found if one.yanked is None), found[0])
    one = next((one for one in found if wanted.at in (one.version, *one.tags)), None)
    if one is None:
        raise NotFound(f"{registry.label} has no {wanted}", f"it has {', '.join(each.version for each in found[:20])}")
    return one


def _tag(registry: Registry, found: Candidate, name: str, expected: str | None) -> None:
    query = {"tag": name, "version": found.version}
    query |= {} if expected == ANY else {"expected": expected or "none"}
    answer = registry.http.request("PUT", f"/v1/tags/{quote(found.name)}", accept=(412,), params=query)
    if answer.status == 412:
        raise TagMoved(
            f"{registry.label}: {found.name}@{name} does not mean {expected or 'nothing'} now"
            + registry.http.told(answer.content),
            "somebody else moved it: look again, then say what you expect",
        )


def _yank(registry: Registry, found: Candidate, reason: str | None) -> None:
    query = {"version": found.version} | ({} if reason is None else {"reason": reason})
    registry.http.request("DELETE" if reason is None else "PUT", f"/v1/yanks/{quote(found.name)}", params=query)
