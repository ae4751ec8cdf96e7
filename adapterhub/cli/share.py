"""Commands that share: push to a registry or the Hub, and serve a registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import adapterhub
from adapterhub.cli.output import note, one_line, out
from adapterhub.errors import NotFound, PluginError, UsageError

if TYPE_CHECKING:
    from adapterhub.sources.registry import Registry


def push(
    ref: Annotated[str, typer.Argument(metavar="REF", help="name, name@version or name@tag.")],
    where: Annotated[
        str, typer.Argument(metavar="WHERE", help="hf:user/repo, the address of a registry, or a source's name.")
    ],
    private: Annotated[bool, typer.Option("--private", help="A repo that is made on the Hub is private.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commits on the Hub.")] = None,
) -> None:
    """Publish a release, with what it needs, where others install it from.

    The Hub takes the token of `hf auth login` (or HF_TOKEN), a registry that of `adapterhub login`, or ADAPTERHUB_TOKEN if
    its address is typed here or stands in ADAPTERHUB_REGISTRY. Tags and yanks come along; a tag that means another
    version there stays, and a line says so.

    \b
    Example:
      adapterhub push acme/sql hf:acme/sql
    """
    hub = adapterhub.open()
    if where.startswith("hf:"):
        from adapterhub.share.huggingface import push as push_to_hub

        release, new = push_to_hub(hub, ref, where.removeprefix("hf:"), private=private, message=message)
    else:
        from adapterhub.share.registry import push as push_to_registry

        lines: list[str] = []
        release, new = push_to_registry(hub, ref, registry_at(where), lines.append)
        for line in lines:
            note(one_line(line))
    out(f"{release}  {release.digest}")
    note(f"{where}: {'published' if new else 'has it already'}")


def registry_at(where: str) -> Registry:
    """The registry at an address that the user typed, or that a source's name stands for. Raises UsageError, NotFound."""
    from adapterhub.config import project
    from adapterhub.install.options import sources
    from adapterhub.sources.opening import named
    from adapterhub.sources.registry import Registry
    from adapterhub.spec.address import LOOKS, shown

    if LOOKS.match(where):
        source = named(where)
    else:
        folder = project.nearest()
        source = sources(adapterhub.open(), folder, project.read(folder) if folder else None).get(where)
    if not isinstance(source, Registry):
        raise UsageError(f"{shown(where)} is no registry", "give the address of one, or a source with a url")
    return source


def serve(
    directory: Annotated[Path | None, typer.Option("--hub", help="Its folder; the nearest hub if left out.")] = None,
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
      adapterhub serve --hub /srv/adapters --port 8000
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
