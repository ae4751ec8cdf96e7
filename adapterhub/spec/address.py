"""The address of a server: what counts as one, and to which origin a secret may go.

An address holds no secrets: user info, queries and fragments are refused, and no error repeats what it refuses.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from adapterhub.errors import UsageError

LOOKS = re.compile(r"https?:/", re.IGNORECASE)
"""How a text begins that a user means as an address."""
_HOST = re.compile(r"(?!-)[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """A server and the path of what it serves."""

    scheme: str
    host: str
    port: int
    path: str = ""
    """Without a slash at its end."""

    @property
    def origin(self) -> str:
        """scheme://host:port as all spellings of it share it: small letters, no default port, no dot at the end, ASCII."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == _PORTS[self.scheme] else f":{self.port}")

    @property
    def url(self) -> str:
        return self.origin + self.path

    @property
    def loopback(self) -> bool:
        """Whether it is this machine by its very name."""
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:
            return self.host == "localhost"
        return (getattr(found, "ipv4_mapped", None) or found).is_loopback

    @property
    def private(self) -> bool:
        """Whether nobody on the way can read or change what is sent."""
        return self.scheme == "https" or self.loopback


def address(text: str, where: str = "") -> Address:
    """The address that a text is. where: the file or variable that says so, for the error.

    Raises UsageError, which does not repeat the text."""
    place = f"{where}: " if where else ""
    none = UsageError(f"{place}that is not the address of a server", "write it as https://adapters.example")
    if not LOOKS.match(text):
        raise none
    if re.search(r"[\s\x00-\x20\x7f\\]", text):
        raise UsageError(f"{place}an address holds a space, a control character or a backslash", none.hint)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise none from None
    for found, kind in (
        ("@" in parts.netloc, "a user or password"),
        ("?" in text, "a query"),
        ("#" in text, "a fragment"),
    ):
        if found:
            raise UsageError(
                f"{place}an address holds {kind}, which others could read",
                "write it as https://adapters.example, and give the token to: adapterhub login https://adapters.example",
            )
    scheme = parts.scheme.lower()
    if port == 0 or not text[len(scheme) :].startswith("://"):
        raise none
    return Address(scheme, _host(host, none), port or _PORTS[scheme], parts.path.rstrip("/"))


def shown(text: str) -> str:
    """A text that may be an address, as an error may repeat it: without what could be a secret in it."""
    if "//" not in text and not LOOKS.match(text):
        return text
    return re.sub(r"[?#].*", "", re.sub(r"[^/\s]*@", "***@", text), flags=re.DOTALL)


def _host(text: str, none: UsageError) -> str:
    """A host in the spelling that is compared: the one that httpx connects to."""
    if not text.isascii():
        import httpx

        try:
            text = httpx.URL(f"https://{text}/").raw_host.decode("ascii")
        except (httpx.InvalidURL, UnicodeError):
            raise none from None
    text = text.lower().removesuffix(".")
    try:
        return ipaddress.ip_address(text).compressed
    except ValueError:
        if "%" in text or len(text) > 253 or not _HOST.fullmatch(text):
            raise none from None
    return text
