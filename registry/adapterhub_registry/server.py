"""The plain registry server: a hub over HTTP (docs/registry.md). Reading is open, writing needs its one token."""

from __future__ import annotations

import hmac
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from adapterhub.errors import HubError, IntegrityError, ManifestError, NameInUse, NotFound, TagMoved, UsageError
from adapterhub.incoming import Incoming
from adapterhub.index import ANY
from adapterhub.manifest import (
    TAG,
    File,
    Manifest,
    Release,
    canonical,
    check_digest,
    check_name,
    check_version,
    digest_of,
)
from adapterhub.packages import Packages
from adapterhub.trust.keys import PrivateKey
from adapterhub.trust.signature import LARGEST as LARGEST_ENVELOPE
from adapterhub.trust.signature import RELEASE, opened, statement
from adapterhub_registry.reading import add_reading

LARGEST_MANIFEST = 8 << 20
LARGEST_PIECE = 64 << 20
LARGEST_BLOB = 64 << 30
LARGEST_ASK = 100_000
"""Blobs that may be asked about at once."""
LEASE = 24 * 3600
"""Seconds for which gc leaves alone what a push has said it will need."""
_PIECE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_STATUS = {NotFound: 404, NameInUse: 409, TagMoved: 412, UsageError: 400, ManifestError: 400, IntegrityError: 400}


def make_app(hub: Packages, token: str = "", key: PrivateKey | None = None, patience: float = 30) -> FastAPI:
    """The server of a hub.

    token: what a writer must show; without one nobody writes. key: signs the lists of releases. patience: seconds that a
    sender may pause in a body."""
    app = FastAPI(title="adapterhub registry", docs_url=None, redoc_url=None)
    store, index = hub.store, hub.index

    @app.exception_handler(HubError)
    def told(request: Request, error: HubError) -> JSONResponse:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        return JSONResponse({"error": str(error), "hint": error.hint}, status)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    def may_write(request: Request) -> None:
        shown = request.headers.get("authorization", "")
        if not token:
            raise HTTPException(403, "this registry is read-only")
        if not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a token is needed to write", {"www-authenticate": "Bearer"})

    async def body(request: Request, most: int) -> bytes:
        taken = bytearray()
        async for chunk in pieces(request, most):
            taken += chunk
        return bytes(taken)

    async def pieces(request: Request, most: int) -> AsyncIterator[bytes]:
        """The body as it comes: no more than `most` bytes, no pause longer than `patience`."""
        import asyncio

        if int(request.headers.get("content-length") or 0) > most:
            raise HTTPException(413, f"at most {most} bytes")
        total, stream = 0, request.stream()
        while True:
            try:
                chunk = await asyncio.wait_for(anext(stream), patience)
            except StopAsyncIteration:
                return
            except ClientDisconnect:
                raise HTTPException(400, "the sender went away") from None
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {patience} seconds") from None
            total += len(chunk)
            if total > most:
                raise HTTPException(413, f"at most {most} bytes")
            yield chunk

    add_reading(app, hub, key, bool(token))

    # --- writing -----------------------------------------------------------------------------------------------

    @app.post("/v1/missing")
    async def missing(request: Request) -> dict[str, Any]:
        may_write(request)
        try:
            asked = [File(digest=check_digest(d), size=_size(s)) for d, s in json.loads(await body(request, 16 << 20))]
        except (ValueError, TypeError, RecursionError):
            raise HTTPException(400, "the body is a list of [digest, size]") from None
        if len(asked) > LARGEST_ASK:
            raise HTTPException(413, f"at most {LARGEST_ASK} blobs")

        def look() -> list[str]:
            index.lease([blob.digest for blob in asked], time.time() + LEASE)
            return [blob.digest for blob in asked if store.fault(blob, hashing=False) is not None]

        return {"missing": await run_in_threadpool(look)}

    @app.post("/v1/uploads/{digest}")
    async def upload(digest: str, request: Request) -> dict[str, Any]:
        may_write(request)
        try:
            wanted = File(digest=check_digest(digest), size=_size(json.loads(await body(request, 1000))["size"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise HTTPException(400, 'the body is {"size": bytes}') from None

        def begin() -> dict[str, Any]:
            index.lease([digest], time.time() + LEASE)
            if store.fault(wanted) is None:
                return {"there": True}
            incoming = Incoming(store, wanted)
            if wanted.size == 0:
                with store.shared():
                    store.take(wanted, [], "the upload")
                return {"there": True}
            return {"offset": incoming.offset}

        return await run_in_threadpool(begin)

    @app.patch("/v1/uploads/{digest}")
    async def piece(digest: str, request: Request) -> JSONResponse:
        may_write(request)
        found = _PIECE.fullmatch(request.headers.get("content-range", ""))
        if found is None:
            raise HTTPException(400, "content-range: bytes BEGIN-END/SIZE")
        begin, end, size = map(int, found.groups())
        if not begin <= end < size <= LARGEST_BLOB or end - begin >= LARGEST_PIECE:
            raise HTTPException(416, f"no such range; a piece has at most {LARGEST_PIECE} bytes")
        data = await body(request, end - begin + 1)
        if len(data) != end - begin + 1:
            raise HTTPException(400, f"{len(data)} bytes came, {end - begin + 1} were announced")

        def take() -> JSONResponse:
            incoming = Incoming(store, File(digest=check_digest(digest), size=size))
            with store.shared(), incoming.held(wait=False) as mine:
                if not mine:
                    raise HTTPException(409, "another upload of it is under way")
                if incoming.offset != begin:
                    raise HTTPException(416, f"{incoming.offset} bytes are here, the piece begins at {begin}")
                incoming.append([data])
                if end + 1 == size:
                    incoming.finish()
                return JSONResponse({"offset": end + 1}, 201 if end + 1 == size else 202)

        return await run_in_threadpool(take)

    @app.put("/v1/releases")
    async def commit(request: Request) -> JSONResponse:
        may_write(request)
        data = await body(request, LARGEST_MANIFEST)
        return await run_in_threadpool(_commit, hub, data)

    @app.post("/v1/signatures/{digest}")
    async def signed(digest: str, request: Request) -> dict[str, Any]:
        may_write(request)
        envelope = await body(request, LARGEST_ENVELOPE)

        def keep() -> dict[str, Any]:
            release = index.find(check_digest(digest))
            if release is None:
                raise NotFound(f"no release {digest}", "")
            if opened(envelope, RELEASE, ())[0] != statement(release):
                raise HTTPException(400, "it is a signature of another release")
            hub.sign(digest, canonical(json.loads(envelope)))
            return {"signed": digest}

        return await run_in_threadpool(keep)

    @app.put("/v1/tags/{name:path}")
    def tag(
        request: Request,
        name: str,
        tag: str = Query(max_length=96),
        version: str = Query(max_length=40),
        expected: str | None = Query(None, max_length=40),
    ) -> dict[str, Any]:
        """expected: the version that the tag means now, `none` for nothing; without it whatever it means."""
        may_write(request)
        if not TAG.fullmatch(tag):
            raise HTTPException(400, f"{tag!r} is no tag")
        index.set_tag(check_name(name), tag, version, {None: ANY, "none": None}.get(expected, expected))
        return {"tag": tag, "version": version}

    @app.put("/v1/yanks/{name:path}")
    def yank(
        request: Request, name: str, version: str = Query(max_length=40), reason: str = Query(max_length=500)
    ) -> dict[str, Any]:
        may_write(request)
        if not reason.isprintable():
            raise HTTPException(400, "the reason holds control characters")
        index.yank(check_name(name), check_version(version), reason)
        return {"yanked": version}

    @app.delete("/v1/yanks/{name:path}")
    def unyank(request: Request, name: str, version: str = Query(max_length=40)) -> dict[str, Any]:
        may_write(request)
        index.yank(check_name(name), check_version(version), None)
        return {"yanked": None}

    return app


def _commit(hub: Packages, data: bytes) -> JSONResponse:
    """Add a release whose blobs and needed parents are here: 201, or 200 when it is here already."""
    from adapterhub.compose import check_expressions
    from adapterhub.formats.safetensors_header import read_header

    release = Release(Manifest.decode(data), digest_of(data))
    check_expressions(release.manifest)
    with hub.store.shared():
        if hub.index.find(release.digest) is not None:
            return JSONResponse({"digest": release.digest})
        lacking = [str(problem.path.name) for _, problem in hub.store.verify(release.manifest.needs)]
        lacking += [f"{p.name}@{p.version}" for p in release.manifest.required if hub.index.find(p.digest) is None]
        if lacking:
            return JSONResponse({"error": f"it lacks {', '.join(lacking[:5])}", "missing": lacking}, 422)
        if "tensors" in release.manifest.files:
            file = release.manifest.files["tensors"]
            read_header(hub.store.header(file), file.size)
        hub.add([release])
    return JSONResponse({"digest": release.digest}, 201)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_BLOB:
        raise ValueError("no size")
    return value
