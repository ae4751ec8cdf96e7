"""Commands about releases: what is in the hub, what comes in and what goes out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec
import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, note, one_line, out, record, releases_out, size, table
from adapterhub.cli.project import But, MaxBytes, Newer, Offline, options
from adapterhub.store.index import kind
from adapterhub.training.request import help_of

PAGE = 200
"""Releases that a list shows at once."""
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="name, name@version or name@tag; a name alone is its newest version.")
]
Force = Annotated[bool, typer.Option("--force", help=help_of("force"))]
Licence = Annotated[str | None, typer.Option(help=help_of("licence"))]
Name = Annotated[str, typer.Option(help="Name of what is made: name or owner/name.")]
Version = Annotated[str | None, typer.Option(metavar="X.Y.Z", help=help_of("version"))]


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where; the working directory if left out.")
    ] = Path(),
) -> None:
    """Make a hub in a folder: hub.db, and the blobs beside it.

    \b
    Example:
      adapterhub init my-adapters
    """
    out(adapterhub.open(directory, create=True).root.resolve())


def install(
    wanted: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help='"acme/sql>=1.2,<2" from your sources; hf:user/repo@rev; a bundle\'s folder; HUB:name of another hub.',
        ),
    ],
    offline: Offline = False,
    exclude_newer: Newer = None,
    but: But = None,
    max_bytes: MaxBytes = None,
    as_json: Json = False,
) -> None:
    """Bring adapters, and what they need, into the hub, every byte checked.

    \b
    Example:
      adapterhub install "acme/sql>=1.2,<2"
    """
    from adapterhub.install.question import Asked
    from adapterhub.install.requirements import install
    from adapterhub.sources.opening import names_a_place
    from adapterhub.spec.requirement import Requirement

    hub = adapterhub.open()
    how = options(offline=offline, exclude_newer=exclude_newer, but=but, max_bytes=max_bytes)
    placed = [text for text in wanted if names_a_place(text)]
    asked = [Asked(Requirement.parse(text), "the command line") for text in wanted if text not in placed]
    came = [release for text in placed for release in hub.install(text, offline, how.max_bytes)]
    if asked:
        found, notes = install(hub, asked, how)
        came += found
        for line in notes:
            note(f"warning: {one_line(line)}")
    releases_out(came, as_json)


# No parameter but flags: see _UNASKED in app.py.
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Not only the first page.")] = False, as_json: Json = False
) -> None:
    """List the adapters in the hub, newest version first (also: ls).

    \b
    Example:
      adapterhub list --json
    """
    hub = adapterhub.open()
    rows = hub.index.releases(limit=None if everything or as_json else PAGE + 1)
    if as_json:
        return json_out({"hub": str(hub.root), "releases": [asdict(row) for row in rows]})
    if not rows:
        return note(f"nothing in {hub.root} yet: adapterhub train, import or install brings the first")
    shown = rows if everything else rows[:PAGE]
    cells = [
        (r.name, r.version, ", ".join(r.tags), r.method, r.base, size(r.size), "" if r.yanked is None else "yanked")
        for r in shown
    ]
    table(("NAME", "VERSION", "TAGS", "METHOD", "BASE", "SIZE", ""), cells)
    if len(shown) < len(rows):
        note(f"the first {PAGE}; --all lists everything, adapterhub search finds what you look for")


def show(
    ref: Ref,
    sites: Annotated[bool, typer.Option("--sites", help="Its sites and their tensors instead.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a release is, and how, of what and for which base it was made.

    \b
    Example:
      adapterhub show me/sentiment@0.1.0 --sites
    """
    release = adapterhub.open().resolve(ref)
    if sites:
        from adapterhub.cli.inspect import show_sites

        return show_sites(release, as_json)
    manifest = release.manifest
    if as_json:
        return json_out({**record(release), "manifest": msgspec.to_builtins(manifest)})
    base = manifest.base
    facts = [("release", release), ("digest", release.digest), ("kind", kind(manifest))]
    facts += [("base", f"{base.name} ({base.architecture}{', ' + base.note if base.note else ''})")]
    facts += [("method", _made(manifest.method))] if manifest.method else []
    facts += [("expression", manifest.compose)] if manifest.compose is not None else []
    counts: dict[str, int] = {}
    for forms in manifest.forms.values():
        for form in forms:
            counts[form] = counts.get(form, 0) + 1
    facts += [("forms", ", ".join(f"{count} {form}" for form, count in counts.items()))] if counts else []
    facts += [("parent", f"{p.label} ({p.relation})") for p in manifest.parents]
    facts += [("codec", _made(codec)) for codec in manifest.codecs]
    facts += [("file", f"{name}, {size(file.size)}, {file.digest}") for name, file in manifest.files.items()]
    facts += [("recipe", f"{key} = {value}") for key, value in manifest.recipe.items()]
    facts += [("metric", f"{key} = {value}") for key, value in manifest.metrics.items()]
    facts += [("licence", manifest.licence or "not stated")]
    for key, value in facts:
        out(f"{key + ':':<12}{one_line(value)}")


def _made(made) -> str:
    options = ", ".join(f"{key}={value}" for key, value in made.options.items())
    return (
        made.name + (f" ({options})" if options else "") + (f", from {made.distribution}" if made.distribution else "")
    )


def rm(
    ref: Ref, force: Annotated[bool, typer.Option("--force", help="Although others were made from it.")] = False
) -> None:
    """Remove a release, and the bytes that nothing else needs.

    A name alone removes all its versions.

    \b
    Example:
      adapterhub rm me/sentiment@0.1.0
    """
    for gone in adapterhub.open().remove(ref, force=force):
        out(gone)


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with adapter_config.json.")],
    name: Name,
    version: Version = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, if the folder does not name one that is at hand.")
    ] = None,
    licence: Licence = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take a PEFT adapter into the hub, whatever its type.

    Types without an exact counterpart are refused by name (docs/evidence/peft.md).

    \b
    Example:
      adapterhub import runs/my-lora --name me/x --base smollm2
    """
    release = adapterhub.open().import_adapter(
        folder, name=name, version=version, base=base, licence=licence, force=force
    )
    releases_out([release], as_json)


def export(
    ref: Ref,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    format: Annotated[str, typer.Option(help="peft, or bundle for another hub.")] = "peft",
    base: Annotated[
        str | None, typer.Option(help="The base model that a prefix is laid out for, if its name is not at hand.")
    ] = None,
) -> None:
    """Write an adapter out, for PEFT or for another hub.

    \b
    Example:
      adapterhub export me/sentiment --format peft out/sentiment
    """
    hub = adapterhub.open()
    if format == "bundle":
        hub.export_bundle(ref, folder)
    else:
        hub.export(ref, folder, format=format, base=base)
    out(folder)
