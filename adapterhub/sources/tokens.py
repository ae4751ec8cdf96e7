"""Tokens of registries: one for each origin, in `tokens.json` beside config.toml, which only its owner reads.

A token goes to its own origin and nowhere else. ADAPTERHUB_TOKEN has no origin of its own: it counts for the one in
ADAPTERHUB_REGISTRY and for an address that the user types in the same call, never for one that a file names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub.config import user
from adapterhub.errors import HubError, NotFound, UsageError
from adapterhub.files import durable
from adapterhub.spec.address import Address, address

VARIABLE = "ADAPTERHUB_TOKEN"
LARGEST = 8192
"""Characters of a token."""
LARGEST_FILE = 4 << 20
"""Bytes of tokens.json."""
_TOKEN = re.compile(r"[\x21-\x7e]+")
_AROUND = " \t\r\n"


def path() -> Path:
    return user.config_folder() / "tokens.json"


def checked(text: str, where: str) -> str:
    """A token as it is sent. White space around it is not part of it: it comes from a file's last line, or a copied cell,
    and no token can hold any. Raises UsageError, without the token, for what no header can carry.

    where: what holds it, for the error."""
    token = text.strip(_AROUND)
    if not token:
        raise UsageError(f"{where} holds no token", "copy it again from who runs the registry")
    if not _TOKEN.fullmatch(token) or len(token) > LARGEST:
        raise UsageError(
            f"{where} holds no token: there is a space, a control character or a letter beyond ASCII in it, or it is too long",
            "copy it again from who runs the registry",
        )
    return token


def token_for(there: Address, typed: bool = False) -> str:
    """The token for an address; "" when there is none. typed: the user wrote the address in this very call.

    Raises UsageError for one that is none."""
    if os.environ.get(VARIABLE) and (typed or there.origin == _registry()):
        return checked(os.environ[VARIABLE], VARIABLE)
    return _read().get(there.origin, "")


def origins() -> list[str]:
    """The origins that a token is kept for, sorted."""
    return sorted(_read())


def keep(there: Address, token: str) -> None:
    """Keep a token for an origin, in place of the one that it has."""
    with _edited() as found:
        found[there.origin] = token


def forget(there: Address) -> None:
    """Forget the token of an origin. Raises NotFound when none is kept."""
    with _edited() as found:
        if found.pop(there.origin, None) is None:
            raise NotFound(
                f"no token is kept for {there.origin}", "adapterhub login --list shows for which there is one"
            )


def _registry() -> str:
    """The origin of ADAPTERHUB_REGISTRY; "" for none."""
    try:
        return address(os.environ.get("ADAPTERHUB_REGISTRY", "")).origin
    except UsageError:
        return ""


def _read() -> dict[str, str]:
    file = path()
    wrong = UsageError(f"{file} is not as `adapterhub login` writes it", "remove it, then log in again")
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST_FILE + 1)
        found = json.loads(data) if len(data) <= LARGEST_FILE else None
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise HubError(f"{file} cannot be read: {error.strerror}", "check its permissions") from None
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(found, dict) or not all(isinstance(v, str) and _TOKEN.fullmatch(v) for v in found.values()):
        raise wrong
    return found


@contextmanager
def _edited() -> Iterator[dict[str, str]]:
    file = path()
    durable.make_private(file.parent)
    with durable.lock(file.with_name("tokens.lock")):
        found = _read()
        yield found
        durable.write_secret(file, json.dumps(found, indent=2, sort_keys=True).encode() + b"\n")
