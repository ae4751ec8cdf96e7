"""What the commands print: data to stdout, warnings to stderr, no colour, and no control characters of foreign text."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from adapterhub.spec.claims import figures
from adapterhub.spec.manifest import Manifest, Release
from adapterhub.store.index import kind

SCHEMA_VERSION = 1
"""Of every JSON document; it changes when a field goes or changes its meaning, not when one is added."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

LINE = 4000
"""Characters of one line that we print: what strangers wrote may be a megabyte long."""
# C0 but tab and line feed, DEL and C1, and what reorders a line: all could make a terminal show what is not there. Lone surrogates
# cannot be printed.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def clean(text: object) -> str:
    """Text that no terminal takes for a command: control characters as Python escapes them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shown(text: object) -> str:
    """Clean, and no line longer than LINE."""
    return "\n".join(map(_cut, clean(text).split("\n")))


def one_line(text: object) -> str:
    """Clean, short, and without line breaks, so that foreign text cannot look like a line of ours."""
    return _cut(clean(re.sub(r"\s+", " ", str(text))))


def _cut(line: str) -> str:
    return line if len(line) <= LINE else f"{line[:LINE]}... ({len(line) - LINE} characters more)"


def out(text: object = "") -> None:
    print(shown(text))


def note(text: object) -> None:
    """What a person wants to know and a script does not."""
    print(shown(text), file=sys.stderr)


def json_out(document: Mapping[str, Any]) -> None:
    print(json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=2, allow_nan=False))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, nothing cut off, so that it can be read and piped."""
    cells = [[one_line(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size(count: int) -> str:
    """1234567 -> "1.2 MB"."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def stored(release: Release) -> int:
    """Bytes of the release's own files (a composition has none)."""
    return sum(file.size for file in release.manifest.files.values())


def record(release: Release) -> dict[str, Any]:
    """A release as JSON, without its manifest; the fields are those of `list`."""
    return {
        "name": release.name,
        "version": release.version,
        "digest": release.digest,
        "method": kind(release.manifest),
        "base": release.manifest.base.name,
        "size": stored(release),
    }


def releases_out(releases: Sequence[Release], as_json: bool) -> None:
    """What a verb has made or brought: one line each, or {"releases": [...]}."""
    if as_json:
        return json_out({"releases": [record(release) for release in releases]})
    for release in releases:
        out(f"{release}  {kind(release.manifest)}  {size(stored(release))}  {release.digest}{_told(release.manifest)}")


def _told(manifest: Manifest) -> str:
    """What the verb measured, in a few words."""
    known = figures(manifest.metrics)
    if "compress" in known:
        lost = known["compress"]
        times = lost["bytes_bf16"] / lost["bytes_after"]
        return f"\n  {times:.1f} times smaller than in bf16; relative error of a site: median {lost['median_error']:.3f}, worst {lost['worst_error']:.3f}"
    if "merge" in known:
        return (
            f"\n  relative error {known['merge']['relative_error']:.1e}, largest rank {known['merge']['largest_rank']}"
        )
    return f"\n  loss at the end {known['train_loss']:.3f}" if "train_loss" in known else ""
