"""The command that shares: push to a registry or the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import adapterhub
from adapterhub.cli.output import note, one_line, out
from adapterhub.errors import UsageError

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
