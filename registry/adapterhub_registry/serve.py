"""Run the server: uvicorn, with a deadline for requests that never end."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS = 30.0
"""Seconds in which a connection must have sent the head of its first, or next, request. uvicorn has no such limit."""
GRACE = 8
"""Seconds that open requests get when the server stops."""


class Deadline(H11Protocol):
    """Closes a connection whose request head does not come in time; bodies have a limit of their own in the handlers."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a head is complete
            self._timer.cancel()

    def _wait(self) -> None:
        if timer := getattr(self, "_timer", None):
            timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(HEADERS, self.transport.close)


def server(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """A server that is ready to run; port 0 takes a free one."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Deadline,
        timeout_graceful_shutdown=GRACE,
        h11_max_incomplete_event_size=64 << 10,
        limit_concurrency=1000,
        log_level="warning",
        server_header=False,
    )
    return uvicorn.Server(config)
