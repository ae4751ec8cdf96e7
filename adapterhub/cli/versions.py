"""Commands about versions: search, tags, yanks, differences, and where a release comes from."""

from __future__ import annotations

from typing import Annotated

import typer

import adapterhub
from adapterhub.bases import resolution
from adapterhub.cli.output import Json, json_out, note, out, record, size, table
from adapterhub.errors import UsageError

Ref = Annotated[str, typer.Argument(metavar="REF", help="name, name@version or name@tag.")]
At = Annotated[
    str | None,
    typer.Option("--at", metavar="SOURCE", help="Not here but at this registry: its address, or a source's name."),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name.")]


def tag(
    ref: Ref,
    name: Annotated[str, typer.Argument(metavar="TAG", help="For example: stable.")],
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="X.Y.Z", help="Move it only if it means this version now; none: only if it means nothing."
        ),
    ] = None,
    at: At = None,
) -> None:
    """Point a tag at a release, so that me/x@TAG names it.

    \b
    Example:
      adapterhub tag me/sentiment@0.2.0 stable --expect 0.1.0
    """
    from adapterhub.store.index import ANY

    expected = ANY if expect is None else None if expect == "none" else expect
    if at is None:
        return out(adapterhub.open().tag(ref, name, expected))
    from adapterhub.cli.share import registry_at
    from adapterhub.share import registry_marks

    found = registry_marks.tag(registry_at(at), ref, name, expected)
    return out(f"{found.name}@{found.version}")


def rollback(name: Name, tag: Annotated[str, typer.Argument(metavar="TAG", help="For example: stable.")]) -> None:
    """Let a tag mean again what it meant before.

    \b
    Example:
      adapterhub rollback me/sentiment stable
    """
    from adapterhub.store.history import rollback

    before, now = rollback(adapterhub.open(), name, tag)
    out(f"{name}@{tag}: {before} -> {now}")


def yank(
    ref: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version.")],
    reason: Annotated[str, typer.Option(help="Why nobody should choose it any more.")] = "",
    at: At = None,
) -> None:
    """Take a version out of choice, with a reason. What is locked to it still installs, with a warning.

    \b
    Example:
      adapterhub yank me/sentiment@0.1.0 --reason "labels were swapped"
    """
    out(f"{_yank(ref, reason, at)} is yanked")


def unyank(ref: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version.")], at: At = None) -> None:
    """Take a yank back.

    \b
    Example:
      adapterhub unyank me/sentiment@0.1.0
    """
    out(f"{_yank(ref, None, at)} is no longer yanked")


def _yank(ref: str, reason: str | None, at: str | None) -> str:
    if at is None:
        from adapterhub.store.history import yank

        return str(yank(adapterhub.open(), ref, reason))
    from adapterhub.cli.share import registry_at
    from adapterhub.share import registry_marks

    found = registry_marks.yank(registry_at(at), ref, reason)
    return f"{found.name}@{found.version}"


def log(name: Name, as_json: Json = False) -> None:
    """List the versions of an adapter: when they came, their tags and yanks, and what they were made from.

    \b
    Example:
      adapterhub log me/sentiment
    """
    from adapterhub.errors import IntegrityError

    hub = adapterhub.open()
    hub.resolve(name)
    rows = []
    for row in hub.releases(name):
        try:
            release = hub.index.get(row.name, row.version)
            parents = [f"{p.relation} {p.label}" for p in release.manifest.parents] if release else []
        except IntegrityError:
            parents = ["?"]
        rows.append((row, parents))
    if as_json:
        listed = [
            {
                "version": r.version,
                "digest": r.digest,
                "created": r.created,
                "tags": r.tags,
                "yanked": r.yanked,
                "parents": p,
            }
            for r, p in rows
        ]
        return json_out({"name": name, "versions": listed, "removed": sorted(hub.index.gone(name))})
    table(
        ("VERSION", "CAME", "TAGS", "METHOD", "SIZE", "FROM", ""),
        [
            (
                r.version,
                r.created,
                ", ".join(r.tags),
                r.method,
                size(r.size),
                ", ".join(parents),
                "" if r.yanked is None else f"yanked: {r.yanked}",
            )
            for r, parents in rows
        ],
    )


def diff(
    one: Annotated[str, typer.Argument(metavar="REF", help="The release before.")],
    other: Annotated[str, typer.Argument(metavar="REF", help="The release after.")],
    as_json: Json = False,
) -> None:
    """Compare two releases: what their manifests say, and per site how far apart their changes of the weights are.

    \b
    Example:
      adapterhub diff me/sentiment@0.1.0 me/sentiment@0.2.0
    """
    found = adapterhub.open().diff(one, other)
    if as_json:
        return json_out(found)
    for what, (before, after) in found["manifest"].items():
        out(f"{what}: {before} -> {after}")

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    rows = [
        (
            site["path"],
            *(number(site[key]) for key in ("norm", "relative", "cosine")),
            site["rank"] or "-",
            site["note"],
        )
        for site in found["sites"]
        if site["norm"]
    ]
    total = found["total"]
    if rows:
        rows.append(("all", *(number(total[key]) for key in ("norm", "relative", "cosine")), "", ""))
        table(("SITE", "NORM", "RELATIVE", "COSINE", "RANK", ""), rows)
    same = len(found["sites"]) - max(len(rows) - 1, 0)
    note(f"{found['from']} and {found['to']}: {same} of {len(found['sites'])} sites are equal")


def lineage(
    ref: Ref,
    dot: Annotated[bool, typer.Option("--dot", help="As Graphviz's language.")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As Mermaid's.")] = False,
    as_json: Json = False,
) -> None:
    """Show where a release comes from: its parents, theirs, down to the roots; and what was made from it.

    \b
    Example:
      adapterhub lineage me/merged
    """
    from adapterhub.store.history import lineage

    if dot + mermaid + as_json > 1:
        raise UsageError("--dot, --mermaid and --json exclude one another", "give one of them")
    hub = adapterhub.open()
    release = hub.resolve(ref)
    found, children = list(lineage(hub, release)), hub.index.children(release.digest)
    if as_json:
        fields = ("depth", "label", "digest", "relation", "here")
        return json_out(
            {
                **record(release),
                "ancestors": [{f: getattr(a, f) for f in fields} for a in found[1:]],
                "children": children,
            }
        )
    if dot or mermaid:
        edges, path = [], []
        for one in found:
            path[one.depth :] = [one.label]
            edges += [(one.label, one.relation, path[-2])] if one.depth else []
        arrow = '  "{0}" -> "{2}" [label="{1}"]' if dot else '  {0}["{0}"] -->|{1}| {2}["{2}"]'
        lines = dict.fromkeys(arrow.format(*edge) for edge in edges)
        out("\n".join(["digraph lineage {" if dot else "flowchart TD", *lines, *(["}"] if dot else [])]))
        return None
    for one in found:
        marks = (f"  {one.relation}" if one.relation else "") + ("" if one.here else "  (not here)")
        out(f"{'    ' * one.depth}{one.label}{marks}{'  (see above)' if one.seen else ''}")
    for child in children:
        out(f"-> {child}")
    return None


def search(
    words: Annotated[list[str] | None, typer.Argument(metavar="[WORD...]", help="All must be in it.")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Only for this base model, by its structure: a name, folder or REF."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 50,
    after: Annotated[str, typer.Option(metavar="NAME", help="Go on after this one.")] = "",
    as_json: Json = False,
) -> None:
    """Find adapters by words in their name, method, base or licence, and those that fit a base.

    \b
    Example:
      adapterhub search sql lora --base smollm2
    """
    from dataclasses import asdict

    hub = adapterhub.open()
    rows = hub.index.search(words or (), _structure(hub, base) if base else None, after, limit)
    if as_json:
        return json_out({"adapters": [asdict(r) for r in rows], "next": rows[-1].name if len(rows) == limit else None})
    if not rows:
        return note("nothing has all these words")
    table(
        ("NAME", "NEWEST", "METHOD", "BASE", "SIZE"),
        [(r.name, r.version, r.method, r.base, size(r.size)) for r in rows],
    )
    if len(rows) == limit:
        note(f"there may be more: --after {rows[-1].name}")
    return None


def _structure(hub: adapterhub.Hub, base: str) -> str:
    """The digest of a base's structure: of an adapter's base, or of a base model itself."""
    from adapterhub.errors import NotFound
    from adapterhub.errors import UsageError as Wrong

    try:
        return hub.resolve(base).manifest.base.structure
    except (NotFound, Wrong):
        from adapterhub.bases.fingerprint import fingerprint

        return fingerprint(resolution.resolve(base)).base.structure
