"""Commands to run a registry: serve it, and say who may write to it."""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, note, out, table
from adapterhub.errors import NotFound, PluginError, UsageError

if TYPE_CHECKING:
    from adapterhub_registry.accounts import Accounts

app = typer.Typer()
token = typer.Typer()
app.add_typer(token, name="token")

Directory = Annotated[Path | None, typer.Option("--hub", help="The registry's folder; the nearest hub if left out.")]
Database = Annotated[str | None, typer.Option(metavar="URL", help="Index in another database, as for registry serve.")]


@app.callback(invoke_without_command=True)
def registry(context: typer.Context) -> None:
    """Run a registry: serve it, and say who may write to it.

    \b
    Example:
      adapterhub registry serve --hub /srv/adapters
    """
    if context.invoked_subcommand is None:
        context.get_help()


@app.command("serve")
def serve(
    directory: Directory = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="Index in another database, e.g. postgresql+psycopg://...")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="NAME", help="Sign its lists with this key of yours.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds a token that may write everything.")
    ] = None,
    read_by_token: Annotated[bool, typer.Option("--read-by-token", help="Reading takes a token, too.")] = False,
    connections: Annotated[
        int, typer.Option(min=1, help="That one address may hold; more where a proxy stands before it.")
    ] = 256,
) -> None:
    """Serve a hub as a registry over HTTP. Reading is open, unless --read-by-token; writing takes a token.

    `adapterhub registry token add` makes tokens for namespaces. One more, in ADAPTERHUB_REGISTRY_TOKEN or --token-file,
    may write everything.

    \b
    Example:
      adapterhub registry serve --hub /srv/adapters --port 8000
    """
    try:
        from adapterhub_registry.clients import Clients
        from adapterhub_registry.serve import server
        from adapterhub_registry.server import make_app
    except ImportError:
        raise PluginError("the server is not installed", "pip install 'adapterhub[registry]'") from None
    from adapterhub.trust.keys import load_key

    try:
        token = token_file.read_text().strip() if token_file else os.environ.get("ADAPTERHUB_REGISTRY_TOKEN", "")
    except OSError as error:
        raise NotFound(f"{token_file} cannot be read: {error.strerror}", "give a file that holds the token") from None
    hub = adapterhub.open(directory, database=database)
    signing = load_key(key) if key else None
    running = server(make_app(hub, token, signing, read_by_token=read_by_token), host, port, Clients(connections))
    writable = bool(token) or hub.index.accounts.writers() > 0
    note(f"serving {hub.root} at http://{host}:{port}, {'writing with a token' if writable else 'read-only'}")
    running.run()


@wraps(serve, assigned=("__module__", "__annotations__"))
def old_serve(*options: Any, **named: Any) -> None:
    """Serve a hub as a registry: the old name of `adapterhub registry serve`.

    In a later version `adapterhub serve` serves models.

    \b
    Example:
      adapterhub serve --hub /srv/adapters --port 8000
    """
    note("warning: adapterhub serve will serve models in a later version; type adapterhub registry serve")
    serve(*options, **named)


@token.callback(invoke_without_command=True)
def tokens(context: typer.Context) -> None:
    """The tokens that a registry takes.

    \b
    Example:
      adapterhub registry token list
    """
    if context.invoked_subcommand is None:
        context.get_help()


@token.command("add")
def add(
    write: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="What it may write: acme/*, acme/sql or *; may be repeated."),
    ] = None,
    read: Annotated[bool, typer.Option("--read", help="It may only read (registry serve --read-by-token).")] = False,
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the token, for list and rm.")] = "",
    until: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="The last day on which it counts.")] = None,
    directory: Directory = None,
    database: Database = None,
) -> None:
    """Make a token and print it, once: the registry keeps only its hash. Whoever may write may read, too.

    \b
    Example:
      adapterhub registry token add --write 'acme/*' --name ci
    """
    if not write and not read:
        raise UsageError("a token for what?", "say --write 'acme/*', or --read for one that only reads")
    account, secret = _accounts(directory, database).add(write or [], name, until)
    note(f"{account.name}: {_rights(account.write)}{f', until {until}' if until else ''}. It is not shown again:")
    out(secret)


@token.command("list")
def list_(directory: Directory = None, database: Database = None, as_json: Json = False) -> None:
    """List the tokens by name, never the tokens themselves.

    \b
    Example:
      adapterhub registry token list
    """
    found = _accounts(directory, database).all()
    if as_json:
        rows = [{"name": a.name, "write": list(a.write), "until": a.until, "created": a.created} for a in found]
        return json_out({"tokens": rows})
    if not found:
        return note("no tokens yet: adapterhub registry token add --write 'acme/*'")
    rows = [(a.name, _rights(a.write), f"{a.until or ''}{' (over)' if a.ended else ''}", a.created) for a in found]
    table(("NAME", "MAY", "UNTIL", "CREATED"), rows)


@token.command("rm")
def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the token, as list shows it.")],
    directory: Directory = None,
    database: Database = None,
) -> None:
    """Take a token back: from now on it counts no more.

    \b
    Example:
      adapterhub registry token rm ci
    """
    _accounts(directory, database).remove(name)
    out(name)


def _rights(write: list[str] | tuple[str, ...]) -> str:
    return f"write {', '.join(write)}" if write else "read"


def _accounts(directory: Path | None, database: str | None) -> Accounts:
    return adapterhub.open(directory, database=database).index.accounts
