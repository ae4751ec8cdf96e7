"""What one client may hold of the server: connections, and requests in a time."""

from __future__ import annotations

import json
import time
from collections import Counter, OrderedDict
from ipaddress import IPv6Address, ip_address
from typing import Any

CONNECTIONS = 256
"""That one address may hold."""
IN_ALL = 450
"""Connections of all addresses: a socket and a file for each fit into the 1024 descriptors that a process usually has."""
REQUESTS = 500
"""A second, on average, from one address..."""
BURST = 10
"""...over so many seconds."""
_REMEMBERED = 10_000


class Clients:
    """Counts what each address holds. An IPv6 client has a whole /64 of them, so that counts as one."""

    def __init__(self, connections: int = CONNECTIONS, requests: float = REQUESTS):
        self._most, self._rate = connections, requests
        self._open: Counter[str] = Counter()
        self._budget: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> (requests left, when)

    def enter(self, address: str) -> bytes:
        """Count one more connection; the answer to it when there were enough already. `leave` must follow in either case."""
        self._open[who(address)] += 1
        if self._open[who(address)] > self._most:
            return _full(f"your address holds {self._most} connections already", "close some")
        if self._open.total() > IN_ALL:
            return _full(f"the registry holds {IN_ALL} connections already", "come again later")
        return b""

    def leave(self, address: str) -> None:
        self._open[who(address)] -= 1
        if self._open[who(address)] <= 0:
            del self._open[who(address)]

    def wait(self, address: str) -> float:
        """Count one request: 0, or the seconds after which it may come again."""
        now, most, client = time.monotonic(), self._rate * BURST, who(address)
        left, then = self._budget.pop(client, (most, now))
        left = min(most, left + (now - then) * self._rate)
        self._budget[client] = (max(left - 1, 0), now)
        if len(self._budget) > _REMEMBERED:
            self._budget.popitem(last=False)
        return 0.0 if left >= 1 else 1.0


def who(address: str) -> str:
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    return str(parsed.ipv4_mapped or IPv6Address(int(parsed) >> 64 << 64))


class Bounded:
    """An ASGI application that answers 429 to a client who asks too often."""

    def __init__(self, app: Any, clients: Clients):
        self._app, self._clients = app, clients

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (seconds := self._clients.wait((scope.get("client") or ("",))[0])):
            told = json.dumps(
                {"error": f"too many requests from your address; come again in {seconds:g} s", "hint": ""}
            )
            headers = [
                (b"content-type", b"application/json"),
                (b"retry-after", b"%d" % seconds),
                (b"connection", b"close"),
            ]
            await send({"type": "http.response.start", "status": 429, "headers": headers})
            return await send({"type": "http.response.body", "body": told.encode()})
        return await self._app(scope, receive, send)


def _full(error: str, hint: str) -> bytes:
    """A whole answer, sent before anything was read."""
    told = json.dumps({"error": error, "hint": hint}).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(told)}"
    return f"{head}\r\nretry-after: 5\r\nconnection: close\r\n\r\n".encode() + told
