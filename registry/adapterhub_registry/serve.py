"""Run the server: uvicorn, with a deadline for whoever never ends a request and never reads an answer."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from adapterhub_registry.clients import Bounded, Clients

HEADERS = 30.0
"""Seconds in which a connection must have sent the head of its first, or next, request. uvicorn has no such limit."""
STALLED = 30.0
"""Seconds in which a reader must have taken so much of what waits to be sent that there is room for more: a third of..."""
SENDING = 512 << 10
"""...the bytes that the system keeps for each connection. Without a bound they grow to megabytes, and a slow reader, who takes
long for a third of them, looks like one who never reads."""
RECEIVING = 64 << 10
"""Bytes that asyncio takes from a connection at once; its default of four times that counts when hundreds send."""
GRACE = 8
"""Seconds that open requests get when the server stops."""


class Deadline(H11Protocol):
    """Closes a connection whose request head does not come, or whose answer is not read, in time, and one too many of an
    address; bodies have a limit of their own."""

    clients: Clients
    _head: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if (connected := transport.get_extra_info("socket")) is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENDING)
        transport.max_size = RECEIVING
        self._address = (transport.get_extra_info("peername") or ("",))[0]
        if refusal := self.clients.enter(self._address):
            transport.write(refusal)
            transport.close()
        else:
            self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._head, self._sending):
            if timer is not None:
                timer.cancel()
        self.clients.leave(self._address)
        super().connection_lost(error)

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before:  # else the head of the next request was here already
            self._wait()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and self._head is not None:  # a head is complete
            self._head.cancel()

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self._sending = asyncio.get_running_loop().call_later(STALLED, self.transport.abort)

    def resume_writing(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
        self.flow.resume_writing()

    def _wait(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = asyncio.get_running_loop().call_later(HEADERS, self._late)

    def _late(self) -> None:
        """`close` would wait for a reader to take what is left of the last answer."""
        self.transport.abort() if self.transport.get_write_buffer_size() else self.transport.close()


class Server(uvicorn.Server):
    """Tells the application that it stops, so that bodies under way end with an answer."""

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self._application = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._application.state.stopping = True
        await super().shutdown(sockets)


def server(app: FastAPI, host: str, port: int, clients: Clients | None = None) -> Server:
    """A server that is ready to run; port 0 takes a free one."""
    clients = clients or Clients()
    config = uvicorn.Config(
        Bounded(app, clients),
        host=host,
        port=port,
        http=type("Counting", (Deadline,), {"clients": clients}),
        timeout_graceful_shutdown=GRACE,
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
        log_level="warning",
        server_header=False,
        lifespan="off",
    )
    return Server(config, app)
