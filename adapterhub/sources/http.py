"""HTTP as we speak it: bounded in time, retried where that is safe, and no secret leaves for another host."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from adapterhub import durable
from adapterhub.errors import HubError, IntegrityError, NotFound, Unreachable, UsageError

TRIES = 5
PATIENCE = 60.0
"""Seconds that we wait in all between tries; longer is somebody else's decision."""
_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class Http:
    """One server, by its address."""

    def __init__(self, url: str, token: str = "", offline: bool = False):
        """Raises UsageError for what is no address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UsageError(
                f"{url!r} is no address of a server", "write https://adapters.example, without a token in it"
            )
        self.url = url.rstrip("/")
        self.offline = offline
        headers = {"user-agent": "adapterhub"} | ({"authorization": f"Bearer {token}"} if token else {})
        # httpx drops Authorization when a redirect leads to another origin.
        self._client = httpx.Client(
            base_url=self.url,
            headers=headers,
            follow_redirects=True,
            max_redirects=5,
            timeout=httpx.Timeout(30, connect=10),
        )

    def read(self, path: str, most: int) -> bytes:
        """The body of a GET, of which no more than `most` bytes are ever taken. Raises IntegrityError for more of them."""

        def once() -> bytes:
            durable.announce("send", Path(path))
            with self._client.stream("GET", path) as answer:
                if answer.status_code >= 300:
                    answer.read()
                self._check(answer, ())
                taken = bytearray()
                for chunk in answer.iter_bytes():
                    taken += chunk
                    if len(taken) > most:
                        raise IntegrityError(f"{self.url} gives more than {most} bytes for {path}", "ask who runs it")
                return bytes(taken)

        return self._tried(once)

    def request(self, method: str, path: str, accept: tuple[int, ...] = (), **more: Any) -> httpx.Response:
        """The answer, tried again while the server is busy or away. Only for requests that may be made twice.

        accept: status codes besides 2xx that the caller understands. Raises NotFound for 404, Unreachable, HubError."""

        def once() -> httpx.Response:
            durable.announce("send", Path(path))
            answer = self._client.request(method, path, **more)
            self._check(answer, accept)
            return answer

        return self._tried(once)

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """The answer to a GET before its body is read. Not tried again: the caller knows where it stopped."""
        self._online()
        durable.announce("send", Path(path))
        try:
            with self._client.stream("GET", path, headers=headers) as answer:
                if answer.status_code not in (200, 206, 416):
                    answer.read()
                    self._check(answer, ())
                yield answer
        except httpx.HTTPError as error:
            raise _away(self.url, error) from None

    def _tried(self, once: Any) -> httpx.Response:
        self._online()
        waited = 0.0
        for left in reversed(range(TRIES)):
            try:
                return once()
            except (_Busy, httpx.HTTPError) as error:
                pause = error.after if isinstance(error, _Busy) else 0.0
                pause = max(pause, 0.2 * 2 ** (TRIES - 1 - left)) * random.uniform(1, 1.25)
                waited += pause
                hopeless = isinstance(error, httpx.TooManyRedirects | httpx.UnsupportedProtocol)
                if not left or waited > PATIENCE or hopeless:
                    raise _away(self.url, error) from None
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _check(self, answer: httpx.Response, accept: tuple[int, ...]) -> None:
        code = answer.status_code
        if 200 <= code < 300 or code in accept:
            return
        if code in _AGAIN:
            raise _Busy(f"it answers {code}", _after(answer))
        told = _told(answer)
        if code == 404:
            raise NotFound(f"{self.url} has no {answer.url.path}{told}", "check the name, or ask who runs it")
        if code in (401, 403):
            raise Unreachable(f"{self.url} refuses: {code}{told}", "set ADAPTERHUB_TOKEN to a token that may do this")
        raise HubError(f"{self.url} answers {code}{told}", "see what it says; nothing was changed here")

    def _online(self) -> None:
        if self.offline:
            raise Unreachable(f"{self.url} is not asked: --offline", "run it once without --offline")


class _Busy(Exception):
    """The server asks us to come again."""

    def __init__(self, reason: str, after: float):
        super().__init__(reason)
        self.after = after


def _after(answer: httpx.Response) -> float:
    try:
        return min(max(float(answer.headers.get("retry-after", "0")), 0.0), 2 * PATIENCE)
    except ValueError:  # a date: the next pause is as good a guess
        return 0.0


def _told(answer: httpx.Response) -> str:
    """What the server says is wrong, in a line."""
    try:
        told = answer.json()["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f": {str(told)[:300]}"


def _away(url: str, error: Exception) -> Unreachable:
    return Unreachable(
        f"{url} cannot be reached: {error or type(error).__name__}", "check the address and the network, then try again"
    )
