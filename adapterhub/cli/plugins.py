"""Commands about installed parts: forms, methods, objectives, recipes, schedules, verifiers, mergers, codecs and bases.

`adapterhub.plugins` is imported inside them: package metadata costs every other command 20 ms."""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.output import Json, json_out, note, out, table
from adapterhub.errors import PluginError

app = typer.Typer()

Part = Annotated[str, typer.Argument(metavar="NAME", help="As adapterhub plugins list shows it.")]


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """List and check the installed parts, or start a package of your own.

    Parts are forms, methods, objectives, recipes, schedules, verifiers, mergers, codecs and bases; ours and those of other
    packages are registered in the same way.

    \b
    Example:
      adapterhub plugins list
    """
    if context.invoked_subcommand is None:
        context.get_help()


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the installed parts and the packages that bring them, without importing any.

    \b
    Example:
      adapterhub plugins list
    """
    from adapterhub import plugins

    rows = []
    for group in plugins.GROUPS:
        for name in plugins.names(group):
            owner = plugins.distribution(group, name)
            package = owner.partition(" ")[0]
            rows.append((group, name, owner, package == "adapterhub" or plugins.is_enabled(package)))
    if as_json:
        fields = ("group", "name", "distribution", "enabled")
        return json_out({"plugins": [dict(zip(fields, row, strict=True)) for row in rows]})
    table(("GROUP", "NAME", "PACKAGE", ""), [(*row[:3], "" if row[3] else "not enabled") for row in rows])


@app.command()
def enable(
    distribution: Annotated[str, typer.Argument(metavar="PACKAGE", help="As adapterhub plugins list shows it.")],
) -> None:
    """Let the code of an installed package run. Shows what it brings; nothing is imported.

    \b
    Example:
      adapterhub plugins enable adapterhub-loreft
    """
    from adapterhub import plugins
    from adapterhub.config import user

    version = plugins.installed(distribution)
    if version is None:
        raise PluginError(
            f"no installed package {distribution!r} brings parts", "adapterhub plugins list shows those that do"
        )
    with user.edited() as document:
        table = document.setdefault("plugins", {})
        table["enabled"] = sorted({*table.get("enabled", []), distribution})
    for group in plugins.GROUPS:
        for name in plugins.names(group):
            if plugins.distribution(group, name) == f"{distribution} {version}":
                out(f"{group[:-1]} {name}")
    note(f"{distribution} {version} may run now")


@app.command()
def disable(
    distribution: Annotated[str, typer.Argument(metavar="PACKAGE", help="As adapterhub plugins list shows it.")],
) -> None:
    """Let the code of a package run no more.

    \b
    Example:
      adapterhub plugins disable adapterhub-loreft
    """
    from adapterhub.config import user

    with user.edited() as document:
        table = document.setdefault("plugins", {})
        if distribution not in table.get("enabled", []):
            raise PluginError(f"{distribution} is not enabled", f"see enabled in {user.config_file()}")
        table["enabled"] = [one for one in table["enabled"] if one != distribution]
    note(f"{distribution} may not run any more")


@app.command()
def show(name: Part) -> None:
    """Show what a part is and which options it takes.

    \b
    Example:
      adapterhub plugins show lora
    """
    from inspect import getdoc

    from adapterhub import plugins

    groups = [group for group in plugins.GROUPS if name in plugins.names(group)]
    if not groups:
        raise PluginError(f"no part named {name!r} is installed", "adapterhub plugins list shows what is")
    for group in groups:
        part = plugins.load(group, name)
        out(f"{group[:-1]} {name}, from {plugins.distribution(group, name)}")
        out(getdoc(part) or "no description")
        config = getattr(part, "Config", None)
        if config is not None and fields(config):
            table(("OPTION", "TYPE", "DEFAULT"), [_option(field) for field in fields(config)])


def _option(field: Field) -> tuple[str, str, str]:
    if field.default_factory is not MISSING:
        default = repr(field.default_factory())
    else:
        default = "must be given" if field.default is MISSING else repr(field.default)
    return field.name, str(field.type), default


@app.command()
def check(
    name: Part,
    law: Annotated[str | None, typer.Option(metavar="NAME", help="Run this law alone, for example rows.")] = None,
    site: Annotated[
        str | None, typer.Option(metavar="ROLE", help="At sites of this role alone (query, ffn): forms and methods.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the laws over a part: what every part of its kind must keep.

    Exit status 1 if it breaks one; each failure is one line with the cause and the author's line.

    \b
    Example:
      adapterhub plugins check loreft --law rows --site block
    """
    from adapterhub.testing import check as run_laws

    results = run_laws(name, law=law, role=site)
    if as_json:
        json_out({"name": name, "results": [asdict(result) for result in results]})
    else:
        table(("GROUP", "LAW", "VERDICT", "DETAIL"), [(r.group, r.law, r.verdict, r.detail) for r in results])
    if any(result.verdict == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the part: small letters, digits and dashes.")],
) -> None:
    """Start a package with a form and a method of its own, in the folder adapterhub-NAME.

    \b
    Example:
      adapterhub plugins new shift && uv pip install ./adapterhub-shift
    """
    from adapterhub.plugins.scaffold import make

    folder = make(name, Path.cwd())
    out(folder)
    note(f"next: uv pip install ./{folder.name} (or pip), then adapterhub plugins enable {folder.name}")
    note(f"and adapterhub plugins check {name.replace('-', '_')}")
