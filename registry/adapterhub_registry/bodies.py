"""The bodies of requests: bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

RATE = 1024
"""Bytes a second that a sender must reach, on top of the first pause."""


async def body(request: Request, most: int) -> bytes:
    """All of it, at most so many bytes."""
    taken = bytearray()
    async for chunk in pieces(request, most):
        taken += chunk
    return bytes(taken)


async def pieces(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body as it comes: no more than `most` bytes, no pause longer than the server's patience, nobody slower than RATE
    for longer than that. A server that stops ends it, and the sender may go on later."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:19]) > most:
        raise HTTPException(413, f"at most {most} bytes")
    patience: float = request.app.state.patience
    total, begin, stream = 0, time.monotonic(), request.stream()
    while True:
        late = begin + patience + total / RATE - time.monotonic()
        try:
            chunk = await _next(request, stream, min(late, patience))
        except ClientDisconnect:
            raise HTTPException(400, "the sender went away") from None
        except TimeoutError:
            slow = f"nothing came for {patience:g} seconds" if late > patience else f"slower than {RATE} bytes a second"
            raise HTTPException(408, slow, {"connection": "close"}) from None
        if chunk is None:
            return
        total += len(chunk)
        if total > most:
            raise HTTPException(413, f"at most {most} bytes")
        yield chunk


async def _next(request: Request, stream: AsyncIterator[bytes], seconds: float) -> bytes | None:
    """The next chunk, None at the end. It looks up now and then, because whoever stops the server does not wait for bodies."""
    coming: asyncio.Task[Any] = asyncio.ensure_future(anext(stream, None))
    end = time.monotonic() + seconds
    try:
        while not coming.done():
            if request.app.state.stopping:
                raise HTTPException(503, "the registry stops; go on later", {"retry-after": "5", "connection": "close"})
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            await asyncio.wait({coming}, timeout=min(left, 0.5))
        return coming.result()
    finally:
        coming.cancel()
