"""Blobs on their way into a registry: asked about, begun, sent in pieces, given up."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import suppress
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from adapterhub.errors import HubError, IntegrityError
from adapterhub.files.bounded import read_json
from adapterhub.spec.digest import check_digest
from adapterhub.spec.manifest import File
from adapterhub.store.partial import PartialBlob
from adapterhub.store.releases import Releases
from adapterhub_registry.access import Access
from adapterhub_registry.accounts import Account
from adapterhub_registry.bodies import body, pieces
from adapterhub_registry.faults import FULL, is_full

LARGEST_PIECE = 64 << 20
LARGEST_BLOB = 64 << 30
LARGEST_ASK = 100_000
"""Blobs that may be asked about at once."""
HELD = 256 << 10
"""Bytes of a body that wait in memory for the disk: many uploads at once take little."""
LEASE = 24 * 3600
"""Seconds for which gc leaves a whole blob alone that a push will need."""
PART_LEASE = 15 * 60
"""Seconds after its last piece for which gc leaves a half blob alone."""
_PIECE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def add_uploads(app: FastAPI, hub: Releases, access: Access) -> None:
    """Add the routes by which blobs come. Whoever may write anything may send any blob: what it is, its digest says."""
    store, index, writer = hub.store, hub.index, Depends(access.writer)

    @app.post("/v1/missing")
    async def missing(request: Request, account: Account = writer) -> dict[str, Any]:
        try:
            asked = [_blob(digest, size) for digest, size in read_json(await body(request, 16 << 20))]
        except (ValueError, TypeError, RecursionError):
            raise HTTPException(400, "the body is a list of [digest, size]") from None
        if len(asked) > LARGEST_ASK:
            raise HTTPException(413, f"at most {LARGEST_ASK} blobs")
        return {"missing": await run_in_threadpool(_missing, hub, asked)}

    @app.post("/v1/uploads/{digest}")
    async def upload(digest: str, request: Request, account: Account = writer) -> dict[str, Any]:
        try:
            wanted = _blob(digest, read_json(await body(request, 1000))["size"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise HTTPException(400, 'the body is {"size": bytes}') from None
        return await run_in_threadpool(_begin, hub, wanted)

    @app.patch("/v1/uploads/{digest}")
    async def piece(digest: str, request: Request, account: Account = writer) -> JSONResponse:
        found = _PIECE.fullmatch(request.headers.get("content-range", ""))
        if found is None:
            raise HTTPException(400, "content-range: bytes BEGIN-END/SIZE")
        begin, end, size = map(int, found.groups())
        if not begin <= end < size <= LARGEST_BLOB or end - begin >= LARGEST_PIECE:
            raise HTTPException(416, f"no such range; a piece has at most {LARGEST_PIECE} bytes")
        arriving = _Arriving(hub, File(digest=check_digest(digest), size=size), begin)
        held = bytearray()
        async for chunk in pieces(request, end - begin + 1):
            held += chunk
            if len(held) >= HELD:
                await run_in_threadpool(arriving.take, held)
                held = bytearray()
        if held:
            await run_in_threadpool(arriving.take, held)
        if arriving.offset <= end:
            raise HTTPException(400, f"the piece ended at byte {arriving.offset} of {end + 1}; go on from there")
        return JSONResponse({"offset": end + 1}, 201 if end + 1 == size else 202)

    @app.delete("/v1/uploads/{digest}")
    def cancel(digest: str, account: Account = writer) -> dict[str, Any]:
        incoming = PartialBlob(store, File(digest=check_digest(digest), size=0))
        with store.shared(), incoming.held(wait=False) as mine:
            if not mine:
                raise HTTPException(409, "a piece of it is just being taken")
            incoming.discard()
            if not store.path(digest).is_file():
                index.lease([digest], 0)
        return {"cancelled": digest}


def _missing(hub: Releases, asked: list[File]) -> list[str]:
    """Which of these blobs are not here. The others are leased: gc takes none of them between our look and the push."""
    with hub.store.shared():
        lacking = {blob.digest for blob in asked if hub.store.fault(blob, hashing=False) is not None}
        hub.index.lease([blob.digest for blob in asked if blob.digest not in lacking], time.time() + LEASE)
    return [blob.digest for blob in asked if blob.digest in lacking]


def _begin(hub: Releases, wanted: File) -> dict[str, Any]:
    """Whether a blob is here, or how much of it has come."""
    store, index = hub.store, hub.index
    with store.shared():
        if wanted.size == 0:
            store.take(wanted, [], "the upload")
        if store.fault(wanted) is None or _finished(PartialBlob(store, wanted)):
            index.lease([wanted.digest], time.time() + LEASE)
            return {"there": True}
        if offset := PartialBlob(store, wanted).offset:
            index.lease([wanted.digest], time.time() + PART_LEASE)
        _check_room(hub, wanted.size - offset)
        return {"offset": offset}


def _finished(incoming: PartialBlob) -> bool:
    """Make a part with all its bytes a blob: what a server leaves that ended before it could. Other bytes are thrown away."""
    with incoming.held(wait=False) as mine:
        if not mine or incoming.offset < incoming.blob.size:
            return False
        try:
            incoming.finish()
        except IntegrityError:
            return False
        return True


class _Arriving:
    """A piece of a blob that is written as it comes; the part is held only while bytes are written to it."""

    def __init__(self, hub: Releases, blob: File, begin: int):
        self._hub, self._store, self._blob = hub, hub.store, blob
        self.offset = begin
        self._leased = 0.0

    def take(self, data: bytes | bytearray) -> None:
        incoming = PartialBlob(self._store, self._blob)
        with self._store.shared():  # gc waits
            try:
                self._lease(PART_LEASE)
                with incoming.held(wait=False) as mine:
                    if not mine:
                        raise HTTPException(409, "another upload of it is under way")
                    self._write(incoming, data)
                if self.offset == self._blob.size:
                    self._lease(LEASE)
            except IntegrityError as error:
                raise HTTPException(400, str(error)) from None
            except HubError as error:
                if not is_full(error):
                    raise
                incoming.discard()  # a full disk is given back, so that the next push has room
                with suppress(HubError):
                    self._hub.index.lease([self._blob.digest], 0)
                raise HTTPException(507, f"{FULL}; nothing of {self._blob.digest} was kept") from None

    def _write(self, incoming: PartialBlob, data: bytes | bytearray) -> None:
        if incoming.offset != self.offset:
            raise HTTPException(416, f"{incoming.offset} bytes are here, the piece begins at {self.offset}")
        incoming.append([data])
        self.offset += len(data)
        if self.offset == self._blob.size:
            incoming.finish()

    def _lease(self, seconds: float) -> None:
        """Renewed when a third of it is over, not with every chunk."""
        now = time.time()
        if seconds == LEASE or now - self._leased > seconds / 3:
            self._hub.index.lease([self._blob.digest], now + seconds)
            self._leased = now


def _check_room(hub: Releases, size: int) -> None:
    if shutil.disk_usage(hub.root).free < size:
        raise HTTPException(507, f"{FULL}: there is no room for {size} bytes")


def _blob(digest: Any, size: Any) -> File:
    if type(digest) is not str:
        raise ValueError("no digest")
    if type(size) is not int or not 0 <= size <= LARGEST_BLOB:
        raise ValueError("no size")
    return File(digest=check_digest(digest), size=size)
