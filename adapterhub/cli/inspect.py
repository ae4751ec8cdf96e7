"""Commands that look into adapters and expressions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import adapterhub
from adapterhub.cli.output import Json, json_out, note, one_line, out, record, size, table
from adapterhub.spec.manifest import Release

BAR = 24
"""Signs of the longest bar."""
Base = Annotated[
    str | None, typer.Option(help="Base model: a known name (smollm2), a folder or a Hugging Face repo id.")
]


def show_sites(release: Release, as_json: bool) -> None:
    """What `show --sites` prints: the header tells it, no tensor is read."""
    from adapterhub.analysis.sites import repeated, touched

    codecs = [codec.name for codec in release.manifest.codecs]
    sites = touched(adapterhub.open(), release)
    if as_json:
        return json_out({**record(release), "codecs": codecs, "sites": _told(release, sites)})
    if sites is None:
        note(f"{release} is packed by {', '.join(codecs)}: without unpacking it only its forms are known")
        return table(("SITES", "COUNT", "FORMS"), _forms(release))
    if codecs:
        note(f"as stored, after {', '.join(codecs)}")
    cells = [(r.pattern, f"x{r.sites}", r.forms, r.shapes, r.numbers, size(r.bytes)) for r in repeated(sites)]
    table(("SITES", "COUNT", "FORMS", "SHAPES", "NUMBERS", "BYTES"), cells)
    numbers, held = (sum(getattr(part, what) for site in sites for part in site.parts) for what in ("numbers", "bytes"))
    note(f"{len(sites)} sites, {numbers} numbers, {size(held)}")


def _told(release: Release, sites: list | None) -> list[dict[str, Any]]:
    if sites is None:
        return [
            {"path": path, "parts": [{"form": form, "tensors": None} for form in forms]}
            for path, forms in release.manifest.forms.items()
        ]
    return [{"path": site.path, "parts": [_part(part) for part in site.parts]} for site in sites]


def _part(part: Any) -> dict[str, Any]:
    tensors = {key: {"dtype": dtype, "shape": list(shape)} for key, (dtype, shape) in part.tensors.items()}
    return {"form": part.form, "size": part.size, "numbers": part.numbers, "bytes": part.bytes, "tensors": tensors}


def _forms(release: Release) -> list[tuple[str, str, str]]:
    from adapterhub.analysis.sites import alike, by_layer

    counts: dict[tuple[str, str], int] = {}
    for path in sorted(release.manifest.forms, key=by_layer):
        key = alike(path), ", ".join(release.manifest.forms[path])
        counts[key] = counts.get(key, 0) + 1
    return [(pattern, f"x{count}", forms) for (pattern, forms), count in counts.items()]


def inspect(
    ref: Annotated[str, typer.Argument(metavar="REF", help="name, name@version or name@tag.")],
    base: Base = None,
    force: Annotated[bool, typer.Option("--force", help="Do it although the base is another model.")] = False,
    as_json: Json = False,
) -> None:
    """Show how strongly an adapter changes its base, site by site.

    With --base against the norms of the base's own weights, without it in absolute numbers.

    \b
    Example:
      adapterhub inspect me/sentiment --base smollm2
    """
    from adapterhub.analysis.inspect import summary

    found = adapterhub.open().inspect(ref, base, force=force)
    if as_json:
        return json_out(found)
    told = summary(found["sites"])
    out(f"{found['release']}, " + (f"against the weights of {found['base']}" if base else "in absolute numbers"))
    if told["weights"]:
        out("\nChanges of weights (Frobenius norms; 90 %: singular values that hold that much of the squared norm)")
        headers = ("SITES", "COUNT", "FORM", "OF", "MEASURE", "MEDIAN", "LARGEST", "AT", "RANK", "90 %")
        table(headers, [_row(row) + _ranks(row) for row in told["weights"]])
    if told["tensors"]:
        out("\nWhat is no change of a weight" + ("" if base else ", or only known with --base"))
        table(
            ("SITES", "COUNT", "FORM", "TENSOR", "MEASURE", "MEDIAN", "LARGEST", "AT"), list(map(_row, told["tensors"]))
        )
    if told["strongest"]:
        out("\nThe strongest")
        most = max(row["value"] for row in told["strongest"]) or 1.0
        bars = [
            (r["path"], r["form"], f"{r['value']:.3g}", "#" * round(BAR * r["value"] / most)) for r in told["strongest"]
        ]
        table(("SITE", "FORM", told["strongest"][0]["measure"].upper(), ""), bars)
    if base is None:
        note("give --base to hold it against the base's own weights")


def _row(row: dict[str, Any]) -> tuple:
    figures = (f"{row['median']:.3g}", f"{row['largest']:.3g}")
    return row["sites"], f"x{row['count']}", row["form"], row["of"], row["measure"], *figures, row["at"]


def _ranks(row: dict[str, Any]) -> tuple[str, str]:
    return tuple(f"{row[key]:g}" if key in row else "" for key in ("rank", "energy_rank"))


def explain(
    expression: Annotated[str, typer.Argument(metavar="EXPR", help="For example 'me/a + 0.5*me/b'.")],
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Say why an expression will or will not run on a base, and what to type next.

    Exit status 1 if it will not. The base's weights are not loaded.

    \b
    Example:
      adapterhub explain "me/sentiment + 0.5*me/topic" --base smollm2
    """
    found = adapterhub.open().explain(expression, base)
    if as_json:
        json_out(found)
    else:
        for step in found["steps"]:
            out(f"{step['state']:<8}  {step['name']:<10}  {one_line(step['told'])}")
            for line in step["details"]:
                out(f"{'':<22}" + line.replace("\n", " "))
            if step["hint"]:
                out(f"{'':<22}hint: {one_line(step['hint'])}")
        if found["runs"]:
            note("it runs" if base else "nothing stands against it; a base may")
        note(f"next: {found['next']}")
    if not found["runs"]:
        raise typer.Exit(1)


def scan(
    ref: Annotated[str, typer.Argument(metavar="REF", help="name, name@version or name@tag.")], as_json: Json = False
) -> None:
    """Hold an adapter's changes against the size of the base's weights, without loading the base.

    Exit status 5 for changes that no training makes. It finds what is broken or absurd, not what is malicious.

    \b
    Example:
      adapterhub scan acme/sql
    """
    from adapterhub.adapters import scan as scanning
    from adapterhub.adapters.adapter import Adapter
    from adapterhub.analysis.sites import require_tensors

    hub = adapterhub.open()
    release = hub.resolve(ref)
    require_tensors(release)
    report = scanning.scan(Adapter.load(hub, release).modifications(), hub.store.read(release.manifest.base.sketch))
    if as_json:
        json_out({"release": str(release), **report})
    else:
        out(
            f"{report['sites']} sites, {report['measured']} held against the base's weights; largest rank {report['rank']}"
        )
        if report["site"]:
            out(f"largest change: {report['relative']:.3g} times the weight's norm, at {report['site']}")
    scanning.check(report, str(release))
