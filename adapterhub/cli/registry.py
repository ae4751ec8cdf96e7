"""Commands of who runs a registry: its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, note, out, table
from adapterhub.errors import UsageError

if TYPE_CHECKING:
    from adapterhub_registry.accounts import Accounts

app = typer.Typer()
token = typer.Typer()
app.add_typer(token, name="token")

Directory = Annotated[Path | None, typer.Option("--hub", help="The registry's folder; the nearest hub if left out.")]
Database = Annotated[str | None, typer.Option(metavar="URL", help="Index in another database, as for serve.")]


@app.callback(invoke_without_command=True)
def registry(context: typer.Context) -> None:
    """Run a registry: who may write to it.

    \b
    Example:
      adapterhub registry token add --write 'acme/*'
    """
    if context.invoked_subcommand is None:
        context.get_help()


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
    read: Annotated[bool, typer.Option("--read", help="It may only read (serve --read-by-token).")] = False,
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
