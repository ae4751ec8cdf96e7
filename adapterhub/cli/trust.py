"""Commands about keys, signatures, trust, and what a composition is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, note, out, size, table
from adapterhub.errors import NotFound

keys = typer.Typer()
trust = typer.Typer()

KeyName = Annotated[str, typer.Argument(metavar="[NAME]", help="Of the key; default if left out.")]
Namespace = Annotated[
    str, typer.Argument(metavar="NAMESPACE", help="acme, for adapters named acme/...; * for all others.")
]


@keys.callback(invoke_without_command=True)
def keys_(context: typer.Context) -> None:
    """Your own keys, to sign releases with.

    \b
    Example:
      adapterhub key new
    """
    if context.invoked_subcommand is None:
        context.get_help()


@keys.command("new")
def new(name: KeyName = "default") -> None:
    """Make a key; prints its public half, which others trust.

    \b
    Example:
      adapterhub key new
    """
    from adapterhub.trust.keys import new_key

    out(new_key(name).public)


@keys.command("list")
def list_(as_json: Json = False) -> None:
    """List your keys.

    \b
    Example:
      adapterhub key list
    """
    from adapterhub.trust.keys import list_keys

    found = [(key.name, key.public.text) for key in list_keys()]
    if as_json:
        return json_out({"keys": [{"name": name, "public": public} for name, public in found]})
    if not found:
        return note("no keys yet: adapterhub key new")
    table(("NAME", "PUBLIC KEY"), found)


@keys.command("rm")
def rm(name: Annotated[str, typer.Argument(metavar="NAME", help="Of the key.")]) -> None:
    """Remove a key. What it signed stays signed.

    \b
    Example:
      adapterhub key rm old
    """
    from adapterhub.trust.keys import remove_key

    remove_key(name)
    out(name)


def sign(
    ref: Annotated[str, typer.Argument(metavar="REF", help="name, name@version or name@tag.")],
    key: Annotated[str, typer.Option(metavar="NAME", help="Which of your keys.")] = "default",
) -> None:
    """Sign a release: its digest, and through it every byte.

    \b
    Example:
      adapterhub sign acme/sql@1.2.0
    """
    from adapterhub.trust.keys import load_key
    from adapterhub.trust.signature import RELEASE, sign, statement

    hub = adapterhub.open()
    release, mine = hub.resolve(ref), load_key(key)
    hub.sign(release.digest, sign(statement(release), RELEASE, mine))
    out(f"{release}  {release.digest}  signed with {mine.public}")


@trust.callback(invoke_without_command=True)
def trust_(context: typer.Context) -> None:
    """Whose signatures count, for which namespace; and which folders are your own.

    \b
    Example:
      adapterhub trust add acme ed25519:... --require
    """
    if context.invoked_subcommand is None:
        context.get_help()


@trust.command("add")
def add(
    namespace: Namespace,
    key: Annotated[str, typer.Argument(metavar="KEY", help="A public key: ed25519:...")],
    until: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="The last day on which it counts.")] = None,
    require: Annotated[bool, typer.Option("--require", help="Install nothing of it without a signature.")] = False,
) -> None:
    """Trust a key for a namespace.

    \b
    Example:
      adapterhub trust add acme ed25519:... --require
    """
    from adapterhub.trust.policy import trust_key

    trust_key(namespace, key, until, require)
    out(f"{namespace}  {key}")


@trust.command("folder")
def folder_(
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="A folder with a hub, a project, or both.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take it off the list instead.")] = False,
    as_json: Json = False,
) -> None:
    """Call a folder your own: its hub is used, and the plugins that its adapterhub.toml enables run.

    Without a path it lists your folders. Hubs that you make are on the list already.

    \b
    Example:
      adapterhub trust folder helpdesk
    """
    from adapterhub.config import folders, project
    from adapterhub.files import durable
    from adapterhub.store.blobs import DATABASE

    path = durable.user_path(path) if path is not None else None
    if path is not None and remove:
        folders.remove(path)
    elif path is not None:
        holds: list[folders.Kind] = []
        holds += ["hubs"] if (path / DATABASE).is_file() else []
        holds += ["projects"] if (path / project.FILE).is_file() else []
        if not holds:
            raise NotFound(f"{path} holds neither {DATABASE} nor {project.FILE}", "name the folder that does")
        for kind in holds:
            folders.add(kind, path)
    rows = [(kind, one) for kind in ("hubs", "projects") for one in folders.listed(kind)]
    if as_json:
        return json_out({kind: [one for listed, one in rows if listed == kind] for kind in ("hubs", "projects")})
    for kind, one in rows:
        out(f"{kind[:-1]:<9}{one}")


@trust.command("list")
def trusted(as_json: Json = False) -> None:
    """List whom you trust.

    \b
    Example:
      adapterhub trust list
    """
    from adapterhub.trust.policy import policy

    rows = [
        (namespace, key.text, str(trusted.until or ""), "required" if trusted.require else "")
        for namespace, trusted in sorted(policy().items())
        for key in trusted.keys
    ]
    if as_json:
        names = ("namespace", "key", "until", "require")
        return json_out({"trust": [dict(zip(names, row, strict=True)) for row in rows]})
    if not rows:
        return note("no key is trusted yet: adapterhub trust add NAMESPACE KEY")
    table(("NAMESPACE", "KEY", "UNTIL", ""), rows)


@trust.command("rm")
def distrust(namespace: Namespace) -> None:
    """Trust nobody for a namespace any more.

    \b
    Example:
      adapterhub trust rm acme
    """
    from adapterhub.trust.policy import distrust

    distrust(namespace)
    out(namespace)


@trust.command("forget")
def forget(
    where: Annotated[str, typer.Argument(metavar="SOURCE", help="A registry: a source's name, or its address.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Forget the serial number that was seen of a registry's lists, after the registry was restored from a backup.

    Until then an older list than one that was seen is refused: somebody may show an old state again.

    \b
    Example:
      adapterhub trust forget team
    """
    import sys

    from adapterhub.cli.share import registry_at
    from adapterhub.errors import NotFound, UsageError
    from adapterhub.sources import serials

    url = registry_at(where).http.url
    seen = serials.remembered(url)
    if not seen:
        raise NotFound(f"no serial number of {url} was seen", "adapterhub lock sees one, where its table has a key")
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError(f"nobody is there to ask whether {url} may show older lists than number {seen}", "--yes")
        if not typer.confirm(f"Take lists of {url} that are older than number {seen}?", err=True):
            raise typer.Exit(1)
    serials.forget(url)
    out(url)


def bom(
    expression: Annotated[str, typer.Argument(metavar="EXPRESSION", help="One adapter, or a composition of several.")],
    as_json: Json = False,
) -> None:
    """List everything that an adapter or a composition is made of: releases, licences, signatures, base, plugins.

    With --json it is a CycloneDX 1.6 document.

    \b
    Example:
      adapterhub bom "acme/sql + 0.5*acme/tone"
    """
    import json

    from adapterhub.analysis.bom import cyclonedx, materials

    found = materials(adapterhub.open(), expression)
    if as_json:
        return print(json.dumps(cyclonedx(found, expression), indent=2, sort_keys=True))
    rows = [
        (
            m.label,
            "needed" if m.needed else "made from",
            (m.release.manifest.licence or "not stated") if m.release else "?",
            m.signed,
            size(sum(f.size for f in m.release.manifest.files.values())) if m.release else "?",
            m.digest,
        )
        for m in found
    ]
    table(("RELEASE", "", "LICENCE", "SIGNATURE", "SIZE", "DIGEST"), rows)
    for name in sorted({m.release.manifest.base.name for m in found if m.release}):
        out(f"base: {name}")
    for name, at in sorted({pair for m in found if m.release for pair in m.release.manifest.plugins.items()}):
        out(f"plugin: {name} {at}")
