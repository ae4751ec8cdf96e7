"""Commands about the tokens of registries: login and logout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.output import Json, json_out, note, out
from adapterhub.errors import NotFound, UsageError

Address = Annotated[str | None, typer.Argument(metavar="URL", help="The registry's, e.g. https://adapters.example.")]
_MOST = 64 << 10
"""Characters that are read of what should be a token."""


def login(
    url: Address = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Holds the token.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only print the registries that a token is kept for.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a token for a registry. It is sent to that one alone: the same scheme, host and port.

    The token is asked for, or read from standard input when that is no terminal. It is never an argument, which the
    shell would remember. The registry is not asked whether it is right.

    \b
    Example:
      adapterhub login https://adapters.example
    """
    from adapterhub.sources import tokens

    if more:  # most likely the token: it is not repeated
        raise UsageError("login takes one address and nothing else", "leave the token out: login asks for it")
    if list_ or as_json:
        found = tokens.origins()
        if as_json:
            return json_out({"registries": found})
        for origin in found:
            out(origin)
        return None if found else note("no token is kept")
    if url is None:
        raise UsageError("login to which registry?", "adapterhub login https://adapters.example, or login --list")
    there = _address(url)
    tokens.keep(there, tokens.checked(*_given(token_file, there.origin)))
    out(there.origin)
    note(f"its token is kept in {tokens.path()}, which only you can read")


def logout(url: Annotated[str, typer.Argument(metavar="URL", help="The registry's.")]) -> None:
    """Forget the token of a registry.

    \b
    Example:
      adapterhub logout https://adapters.example
    """
    from adapterhub.sources import tokens
    from adapterhub.spec.address import address

    there = address(url)
    tokens.forget(there)
    out(there.origin)


def _address(url: str):
    """The address, which a token may be sent to. Raises UsageError."""
    from adapterhub.config.source_tables import own_insecure
    from adapterhub.sources.http import Http
    from adapterhub.spec.address import address

    there = address(url)
    Http(there, insecure=own_insecure(there))
    return there


def _given(file: Path | None, origin: str) -> tuple[str, str]:
    """The token as it was given, and what held it."""
    if file is not None:
        try:
            with file.open(encoding="utf-8") as opened:
                return opened.read(_MOST), str(file)
        except OSError as error:
            raise NotFound(f"{file} cannot be read: {error.strerror}", "give a file that holds the token") from None
        except UnicodeDecodeError:
            raise UsageError(f"{file} is not text", "give a file that holds the token and nothing else") from None
    if sys.stdin is None:
        raise UsageError("there is nobody to ask for the token", "--token-file FILE")
    if sys.stdin.isatty():
        return typer.prompt(f"Token for {origin}", hide_input=True, err=True), "what was typed"
    try:
        return sys.stdin.read(_MOST), "standard input"
    except UnicodeDecodeError:
        raise UsageError("standard input is not text", "give the token and nothing else") from None
