"""Push a release to a registry: the blobs it lacks, then the manifests, parents first. A broken push goes on where it stopped."""

from __future__ import annotations

import os
import time
import warnings

import httpx

from adapterhub.errors import HubError, NameInUse, Unreachable, UsageError
from adapterhub.manifest import File, Reference, Release
from adapterhub.packages import Packages
from adapterhub.progress import bar
from adapterhub.sources import closure
from adapterhub.sources.disk import Disk
from adapterhub.sources.http import Http
from adapterhub.store import each
from adapterhub.trust.policy import known_keys
from adapterhub.trust.signature import with_keys

PIECE = 8 << 20
"""Bytes of a blob that are sent at once."""


def push(hub: Packages, reference: str | Reference, url: str) -> tuple[Release, bool]:
    """Send a release and what it needs to the registry at an address; returns it and whether it is new there.

    Needs ADAPTERHUB_TOKEN. Raises NameInUse for a version that is there with other content, Unreachable, UsageError."""
    token = os.environ.get("ADAPTERHUB_TOKEN", "")
    if not token:
        raise UsageError(f"{url} wants a token to write", "set ADAPTERHUB_TOKEN")
    http, release = Http(url, token), hub.resolve(reference)
    with hub.store.shared():
        releases = closure(Disk(hub), [release])
        blobs = {b.digest: b for r in releases for file in r.manifest.needs for b in hub.store.blobs(file)}
        asked = [[blob.digest, blob.size] for blob in blobs.values()]
        lacking = [blobs[digest] for digest in http.request("POST", "/v1/missing", json=asked).json()["missing"]]
        with bar(f"push {release}", sum(blob.size for blob in lacking)) as advance:
            each(lambda blob: advance(_send(http, hub, blob)), lacking)
        new = False
        for one in reversed(releases):
            new = _commit(http, hub, one)
    return release, new


def _send(http: Http, hub: Packages, blob: File) -> int:
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
        if answer.status_code == 409:
            time.sleep(0.2)
        offset = _offset(http, path, blob) if answer.status_code in (409, 416) else answer.json()["offset"]
    raise Unreachable(f"{http.url} does not take {blob.digest}", "try again later")


def _offset(http: Http, path: str, blob: File) -> int | None:
    """How many bytes the registry has; None for all of them."""
    found = http.request("POST", path, json={"size": blob.size}).json()
    return None if found.get("there") else int(found["offset"])


def _commit(http: Http, hub: Packages, release: Release) -> bool:
    answer = http.request("PUT", "/v1/releases", accept=(409, 422), content=release.manifest.encode())
    if answer.status_code == 409:
        raise NameInUse(f"{http.url} has {release} already with other content", "publish it under another version")
    if answer.status_code == 422:
        raise HubError(f"{http.url} does not take {release}: {answer.json().get('error', '')}"[:500], "push it again")
    for envelope in hub.index.signatures(release.digest):
        signed = http.request(
            "POST", f"/v1/signatures/{release.digest}", accept=(400, 403, 409), json=with_keys(envelope, known_keys())
        )
        if signed.status_code >= 400:  # a parent's may be for others to bring
            warnings.warn(f"{http.url} keeps no signature of {release}: {_reason(signed)}", stacklevel=2)
    return answer.status_code == 201


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])[:300]
    except (ValueError, KeyError, TypeError):
        return str(answer.status_code)


__all__ = ["push"]
