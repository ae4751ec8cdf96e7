"""What a registry shows to everybody: lists, manifests, signatures, blobs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse

from adapterhub.errors import NotFound
from adapterhub.spec.digest import canonical, check_digest
from adapterhub.spec.names import check_name
from adapterhub.store.releases import Releases
from adapterhub.trust.keys import PrivateKey
from adapterhub.trust.signature import LIST, sign
from adapterhub_registry.access import Access

PAGE = 200
FRESH = timedelta(days=7)
"""How long a signed list counts."""
CHUNK = 128 << 10
"""Bytes of a blob that are sent at once. Few, because whoever reads slowly has `serve.STALLED` seconds for what waits."""
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


def add_reading(app: FastAPI, hub: Releases, key: PrivateKey | None, access: Access) -> None:
    """Add the routes that change nothing. key: signs the lists of releases."""
    store, index = hub.store, hub.index
    reader: Any = {"dependencies": [Depends(access.reader)]}

    @app.get("/v1/", **reader)
    def about() -> dict[str, Any]:
        return {"registry": "adapterhub", "version": 1, "writable": access.writable, "serial": index.serial()}

    @app.get("/v1/adapters", **reader)
    def adapters(
        q: str = Query("", max_length=200),
        structure: str | None = Query(None, max_length=71),
        after: str = Query("", max_length=96),
        limit: int = Query(PAGE, ge=1, le=PAGE),
    ) -> dict[str, Any]:
        if not f"{q}{after}".isprintable():
            raise HTTPException(400, "the words hold control characters")
        rows = index.search(q.split(), structure and check_digest(structure), after, limit)
        return {"adapters": [asdict(row) for row in rows], "next": rows[-1].name if len(rows) == limit else None}

    @app.get("/v1/adapters/{name:path}", **reader)
    def releases(name: str) -> Response:
        check_name(name)
        rows = index.releases(name)
        if not rows:
            raise NotFound(f"no adapter {name}", "")
        now = datetime.now(UTC)
        fields = ("version", "digest", "created", "yanked", "tags")
        listed = {
            "name": name,
            "serial": index.serial(),
            "issued": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "expires": (now + FRESH).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "releases": [{field: getattr(row, field) for field in fields} for row in rows],
        }
        data = sign(listed, LIST, key) if key else canonical(listed)
        return Response(data, media_type="application/vnd.dsse+json" if key else "application/json")

    @app.get("/v1/manifests/{digest}", **reader)
    def manifest(digest: str) -> Response:
        release = index.find(check_digest(digest))
        if release is None:
            raise NotFound(f"no release {digest}", "")
        return Response(release.manifest.encode(), media_type="application/json", headers={"etag": f'"{digest}"'})

    @app.get("/v1/signatures/{digest}", **reader)
    def signatures(digest: str) -> list[Any]:
        return [json.loads(envelope) for envelope in index.signatures(check_digest(digest))]

    @app.head("/v1/blobs/{digest}", operation_id="blob_head", **reader)
    @app.get("/v1/blobs/{digest}", **reader)
    def blob(digest: str, request: Request) -> Response:
        return _blob(store.path(digest), digest, request)


def _blob(path: Path, digest: str, request: Request) -> Response:
    """A blob, or the one range of it that is asked for."""
    try:
        size, tag = path.stat().st_size, f'"{digest}"'
    except FileNotFoundError:
        raise NotFound(f"no blob {digest}", "") from None
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"etag": tag})
    begin, end, status = 0, size, 200
    wanted = request.headers.get("range")
    if wanted and (found := _RANGE.fullmatch(wanted)):  # several ranges at once get the whole
        begin, end, status = int(found[1]), min(int(found[2] or size - 1) + 1, size), 206
        if begin >= end:
            return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
    headers = {"etag": tag, "accept-ranges": "bytes", "content-length": str(end - begin)}
    headers |= {"content-range": f"bytes {begin}-{end - 1}/{size}"} if status == 206 else {}
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)

    def read() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(begin)
            left = end - begin
            while left and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk

    return StreamingResponse(read(), status, headers, media_type="application/octet-stream")
