"""HTTP as we speak it: bounded in time and bytes, retried where that is safe, and no secret leaves for another origin."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from adapterhub.errors import HubError, IntegrityError, NotFound, Unreachable, UsageError
from adapterhub.files import durable
from adapterhub.files.bounded import read_json
from adapterhub.spec.address import Address, address

TRIES = 5
HOPS = 5
"""Redirects that are followed."""
PATIENCE = 60.0
"""Seconds that we wait in all between tries; longer is somebody else's decision."""
LONGEST = 300.0
"""Seconds for an answer that is no blob, from its first byte to its last."""
LARGEST_WORDS = 64 << 10
"""Bytes of an answer that says what went wrong, or how a writing request went."""
LARGEST_ANSWER = 16 << 20
"""Bytes of an answer to a writing request."""
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_FULL = 507
_ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError)
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What a server answered, all of it."""

    status: int
    content: bytes

    def field(self, name: str, kind: type[T]) -> T:
        """A field of the JSON object that it is. Raises IntegrityError when it is none, or the field is something else."""
        found = _field(self.content, name)
        if type(found) is not kind:
            raise IntegrityError(f"the registry's answer does not say {name!r}", "ask who runs it")
        return found

    def says(self, name: str) -> bool:
        """Whether it is a JSON object with a field of this name that is true."""
        return _field(self.content, name) is True


class Http:
    """One server, by its address."""

    def __init__(self, where: str | Address, token: str = "", offline: bool = False, insecure: bool = False):
        """insecure: its table allows plain HTTP. Raises UsageError for what is no address, and for plain HTTP without that."""
        self.address = where if isinstance(where, Address) else address(where)
        self.url, self.origin, self.offline = self.address.url, self.address.origin, offline
        self._token = token
        if not (insecure or self.address.private):
            raise UsageError(
                f"{self.url} is plain HTTP: anybody on the way can read and change what is sent",
                "use https; or write insecure = true into the [sources] table that has this url, which for an address that you "
                "type is one of your config.toml",
            )
        try:
            self._client = httpx.Client(
                base_url=self.url,
                headers={"user-agent": "adapterhub", "accept-encoding": "identity"},
                timeout=httpx.Timeout(30, connect=10),
                event_hooks={"request": [self._leave]},
                mounts={self.origin: None} if self.address.loopback else None,  # no proxy between us and us
            )
        except (ValueError, OSError, httpx.InvalidURL):  # the error may hold a proxy's password
            raise UsageError(
                "the proxy or the certificates that the environment names cannot be used",
                "check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR",
            ) from None

    def read(self, path: str, most: int, cut: bool = False) -> bytes:
        """The body of a GET, of which no more than `most` bytes are ever taken. Raises IntegrityError for more of them.

        cut: give the first `most` bytes instead."""

        def once() -> bytes:
            with self._got(path) as answer:
                self._check(answer, ())
                data, whole = _body(answer, most)
            if not whole and not cut:
                raise IntegrityError(f"{self.url} gives more than {most} bytes for {path}", "ask who runs it")
            return data

        return self._tried(path, once)

    def request(self, method: str, path: str, accept: tuple[int, ...] = (), **more: Any) -> Answer:
        """The answer, tried again while the server is busy or away. Only for requests that may be made twice.

        A redirect is not followed: what is written goes to the address that was given, or nowhere.
        accept: status codes besides 2xx that the caller understands. Raises NotFound for 404, Unreachable, HubError."""

        def once() -> Answer:
            with self._client.stream(method, path, **more) as answer:
                self._check(answer, accept)
                data, whole = _body(answer, LARGEST_ANSWER)
            if not whole:
                raise IntegrityError(f"{self.url} answers with more than {LARGEST_ANSWER} bytes", "ask who runs it")
            return Answer(answer.status_code, data)

        return self._tried(path, once)

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """The answer to a GET before its body is read. Not tried again: the caller knows where it stopped."""
        self._online()
        durable.announce("send", Path(path))
        try:
            with self._got(path, headers) as answer:
                if answer.status_code not in (200, 206, 416):
                    self._check(answer, ())
                yield answer
        except (_Busy, *_ERRORS) as error:
            raise self._away(error) from None

    @contextmanager
    def _got(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """The answer to a GET, where redirects lead; httpx would read the body of each whole."""
        request = self._client.build_request("GET", path, headers=headers)
        for _ in range(HOPS + 1):
            answer = self._client.send(request, stream=True)
            try:
                if answer.next_request is None:
                    return (yield answer)
            finally:
                answer.close()
            request = answer.next_request
        raise Unreachable(f"{self.url} answers with more than {HOPS} redirects", "ask who runs it")

    def told(self, content: bytes) -> str:
        """What the server says is wrong, in a line; it may repeat what we sent, and must not have us print that."""
        told = _field(content, "error")
        return "" if told is None else f": {self._safe(str(told))[:300]}"

    def require_token(self) -> None:
        """Raise UsageError when there is no token to write with."""
        if not self._token:
            raise UsageError(
                f"there is no token for {self.origin}, and writing takes one", f"adapterhub login {self.origin}"
            )

    def _tried(self, path: str, once: Callable[[], T]) -> T:
        self._online()
        waited = 0.0
        for left in reversed(range(TRIES)):
            try:
                durable.announce("send", Path(path))
                return once()
            except (_Busy, *_ERRORS) as error:
                pause = error.after if isinstance(error, _Busy) else 0.0
                pause = max(pause, 0.2 * 2 ** (TRIES - 1 - left)) * random.uniform(1, 1.25)
                waited += pause
                hopeless = isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL)
                if not left or waited > PATIENCE or hopeless:
                    raise self._away(error) from None
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _leave(self, request: httpx.Request) -> None:
        """Called for each request that leaves, those that follow a redirect too: the token goes to its own origin alone."""
        request.headers.pop("authorization", None)
        try:
            there = address(f"{request.url.scheme}://{request.url.netloc.decode('ascii')}")
        except UsageError:
            raise Unreachable(f"{self.url} sends us on to what is not an address", "ask who runs it") from None
        if there.origin == self.origin:
            request.headers.update({"authorization": f"Bearer {self._token}"} if self._token else {})
        elif there.scheme == "http" and not (self.address.loopback and there.loopback):
            raise Unreachable(f"{self.url} sends us on to {there.origin}, over plain HTTP", "ask who runs it")

    def _check(self, answer: httpx.Response, accept: tuple[int, ...]) -> None:
        code = answer.status_code
        if 200 <= code < 300 or code in accept:
            return
        told = self.told(_body(answer, LARGEST_WORDS)[0])
        if code in _AGAIN:
            raise _Busy(f"it answers {code}{told}", _after(answer))
        if code == 404:
            raise NotFound(
                f"{self.url} has no {self._safe(answer.url.path)}{told}", "check the name, or ask who runs it"
            )
        if code in (401, 403):
            kept = "another token" if self._token else "a token"
            raise Unreachable(f"{self.url} refuses: {code}{told}", f"it wants {kept}: adapterhub login {self.origin}")
        if code == _FULL:
            raise HubError(
                f"the disk of {self.url} is full{told}", "ask who runs it to make room; then the same command goes on"
            )
        if 300 <= code < 400:
            raise HubError(f"{self.url} answers {code}: it has moved", "ask who runs it for its address, and use that")
        raise HubError(f"{self.url} answers {code}{told}", "see what it says; nothing was changed here")

    def _online(self) -> None:
        if self.offline:
            raise Unreachable(f"{self.url} is not asked: --offline", "run it once without --offline")

    def _away(self, error: Exception) -> Unreachable:
        reason = self._safe(str(error)) or type(error).__name__
        return Unreachable(
            f"{self.url} cannot be reached: {reason}", "check the address and the network, then try again"
        )

    def _safe(self, text: str) -> str:
        return text.replace(self._token, "***") if self._token else text


class _Busy(Exception):
    """The server asks us to come again."""

    def __init__(self, reason: str, after: float):
        super().__init__(reason)
        self.after = after


def _body(answer: httpx.Response, most: int) -> tuple[bytes, bool]:
    """The bytes of an answer as they came, no more than `most`, and whether that is all."""
    taken, begin = bytearray(), time.monotonic()
    for chunk in answer.iter_raw():
        taken += chunk
        if len(taken) > most:
            return bytes(taken[:most]), False
        if time.monotonic() - begin > LONGEST:
            raise Unreachable(f"an answer was not complete after {LONGEST:.0f} seconds", "try again later")
    return bytes(taken), True


def _field(content: bytes, name: str) -> Any:
    """A field of a JSON object; None when there is none."""
    try:
        return read_json(content)[name]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _after(answer: httpx.Response) -> float:
    try:
        return min(max(float(answer.headers.get("retry-after", "0")), 0.0), 2 * PATIENCE)
    except ValueError:  # a date: the next pause is as good a guess
        return 0.0
