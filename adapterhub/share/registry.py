"""Push a release to a registry: the blobs it lacks, then the manifests, parents first. A broken push goes on where it stopped."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

from adapterhub.errors import HubError, IntegrityError, NameInUse, Unreachable, UsageError
from adapterhub.files.progress import bar
from adapterhub.share.registry_marks import carry
from adapterhub.sources.disk import Disk
from adapterhub.sources.http import Http
from adapterhub.sources.opening import named
from adapterhub.sources.registry import Registry
from adapterhub.sources.source import closure
from adapterhub.spec.manifest import File, Release
from adapterhub.spec.names import Reference
from adapterhub.store.blobs import each
from adapterhub.store.releases import Releases
from adapterhub.trust.policy import known_keys
from adapterhub.trust.signature import with_keys

PIECE = 8 << 20
"""Bytes of a blob that are sent at once."""


def push(
    hub: Releases,
    reference: str | Reference,
    where: str | Registry,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[Release, bool]:
    """Send a release and what it needs to a registry, with its tags and yanks; returns it and whether it is new there.

    where: an address as the user typed it, or a source. told: is given a line for each tag and yank that was set there
    or was not. Raises NameInUse for a version that is there with other content, Unreachable, UsageError without a token."""
    registry = where if isinstance(where, Registry) else named(where)
    if not isinstance(registry, Registry):
        raise UsageError(f"{registry.label} is not a registry", "give the address of one")
    registry.http.require_token()
    http, release = registry.http, hub.resolve(reference)
    with hub.store.shared():
        releases = closure(Disk(hub), [release])
        blobs = {b.digest: b for r in releases for file in r.manifest.needs for b in hub.store.blobs(file)}
        asked = [[blob.digest, blob.size] for blob in blobs.values()]
        lacking = http.request("POST", "/v1/missing", json=asked).field("missing", list)
        sent = [blobs[digest] for digest in lacking if isinstance(digest, str) and digest in blobs]
        with bar(f"push {release}", sum(blob.size for blob in sent)) as advance:
            each(lambda blob: advance(_send(http, hub, blob)), sent)
        committed = [(one, _commit(http, hub, one)) for one in reversed(releases)]
        carry(hub, registry, [(one, new) for one, new in committed if new or one is release], told)
    return release, committed[-1][1]


def _send(http: Http, hub: Releases, blob: File) -> int:
    """One blob, piece by piece from where the registry has it; returns its bytes."""
    data = hub.store.read(blob)
    path = f"/v1/uploads/{blob.digest}"
    offset = _offset(http, path, blob)
    for _ in range(2 * (len(data) // PIECE + 1) + 8):  # a piece may be refused when another has sent it
        if offset is None:
            return blob.size
        piece = data[offset : offset + PIECE]
        answer = http.request(
            "PATCH",
            path,
            accept=(409, 416),
            content=piece,
            headers={"content-range": f"bytes {offset}-{offset + len(piece) - 1}/{blob.size}"},
        )
        if answer.status == 409:
            time.sleep(0.2)
        offset = _offset(http, path, blob) if answer.status in (409, 416) else answer.field("offset", int)
    raise Unreachable(f"{http.url} does not take {blob.digest}", "try again later")


def _offset(http: Http, path: str, blob: File) -> int | None:
    """How many bytes the registry has; None for all of them."""
    answer = http.request("POST", path, json={"size": blob.size})
    return None if answer.says("there") else answer.field("offset", int)


def _commit(http: Http, hub: Releases, release: Release) -> bool:
    answer = http.request("PUT", "/v1/releases", accept=(409, 422), content=release.manifest.encode())
    if answer.status == 409:
        raise NameInUse(
            f"{http.url} does not take {release}{http.told(answer.content)}", "publish it under another version or name"
        )
    if answer.status == 422:
        raise HubError(f"{http.url} does not take {release}{http.told(answer.content)}", "push it again")
    if answer.field("digest", str) != release.digest:
        raise IntegrityError(f"{http.url} took another release for {release}", "ask who runs it")
    for envelope in hub.index.signatures(release.digest):
        signed = http.request(
            "POST", f"/v1/signatures/{release.digest}", accept=(400, 403, 409), json=with_keys(envelope, known_keys())
        )
        if signed.status >= 400:  # a parent's may be for others to bring
            warnings.warn(f"{http.url} keeps no signature of {release}{http.told(signed.content)}", stacklevel=2)
    return answer.status == 201


__all__ = ["push"]
