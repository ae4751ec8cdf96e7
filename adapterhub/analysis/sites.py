"""What an adapter touches: its sites and the tensors there, from its manifest and its file's header alone. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapterhub.errors import IntegrityError, UsageError
from adapterhub.files.safetensors_header import DTYPES, read_header
from adapterhub.spec.manifest import Release
from adapterhub.store.releases import Releases

SIZES = {
    "low_rank": ("r", "down", 0),
    "dora": ("r", "down", 0),
    "bottleneck": ("r", "down", 0),
    "prefix": ("n", "keys", 1),
    "sparse": ("k", "values", 0),
}
"""The one number that says how large a part of this form is: what it is called, and which dimension of which tensor."""
FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor -> (dtype as safetensors names it, shape)."""


@dataclass(frozen=True)
class Part:
    """One modification as its file's header tells of it."""

    form: str
    tensors: Shapes

    @property
    def numbers(self) -> int:
        """How many it may have learned: the entries of its floating tensors, scalars left out."""
        return sum(math.prod(shape) for dtype, shape in self.tensors.values() if dtype in FLOATING and shape)

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * DTYPES[dtype] for dtype, shape in self.tensors.values())

    @property
    def size(self) -> int | None:
        """Its rank, its count of entries or of virtual tokens; None for a form that has no such number."""
        _, tensor, dimension = SIZES.get(self.form, ("", "", 0))
        _, shape = self.tensors.get(tensor, ("", ()))
        return shape[dimension] if len(shape) > dimension else None


@dataclass(frozen=True)
class Touched:
    """A site and what happens there, in order."""

    path: str
    parts: tuple[Part, ...]


def touched(hub: Releases, release: Release) -> list[Touched] | None:
    """The sites of an adapter, layer by layer; None where a codec has packed its tensors, so that the header does not tell.

    What a codec that keeps names has changed (a rank) is told as it is stored. Raises UsageError for a composition,
    which has no tensors, and IntegrityError for a file that is not what its manifest says."""
    manifest = release.manifest
    require_tensors(release)
    file = manifest.files["tensors"]
    grouped: dict[str, dict[tuple[str, int], dict]] = {}
    for name, stored in read_header(hub.store.header(file), file.size).items():
        pieces = name.rsplit(".", 3)
        if len(pieces) == 4 and pieces[2].isdecimal():
            site, form, n, key = pieces
            grouped.setdefault(site, {}).setdefault((form, int(n)), {})[key] = stored
        else:
            grouped.setdefault("", {})[name, 0] = {}
    counted = {site: sorted(form for form, _ in parts) for site, parts in grouped.items()}
    if counted != {site: sorted(forms) for site, forms in manifest.forms.items()}:
        if manifest.codecs:
            return None
        raise IntegrityError(f"the tensors of {release} are not those its manifest names", "adapterhub verify")
    result = []
    for site in sorted(grouped, key=by_layer):
        waiting = {form: iter(sorted(n for f, n in grouped[site] if f == form)) for form, _ in grouped[site]}
        parts = [Part(form, grouped[site][form, next(waiting[form])]) for form in manifest.forms[site]]
        result.append(Touched(site, tuple(parts)))
    return result


def require_tensors(release: Release) -> None:
    """Raise UsageError for a saved composition, IntegrityError for another release without tensors."""
    manifest = release.manifest
    if manifest.compose is not None:
        raise UsageError(
            f"{release} is a composition ({manifest.compose}) and has no tensors of its own",
            f"ask about its parts: {', '.join(p.label for p in manifest.parents)}",
        )
    if "tensors" not in manifest.files:
        raise IntegrityError(f"{release} holds no tensors", "get it again from its source")


def by_layer(path: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in path.split(".")]


def alike(path: str) -> str:
    """What the same module of every layer is called: "model.layers.*.self_attn.q_proj"."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1)


@dataclass(frozen=True)
class Repeated:
    """The same module of several layers, as people read it."""

    pattern: str
    sites: int
    forms: str
    """"low_rank r=4-8, affine": ranges where the layers differ."""
    shapes: str
    numbers: int
    bytes: int


def repeated(sites: Iterable[Touched]) -> list[Repeated]:
    """Sites that only their layer tells apart as one row each."""
    groups: dict[tuple, list[Touched]] = {}
    for site in sites:
        key = alike(site.path), tuple((part.form, tuple(sorted(part.tensors))) for part in site.parts)
        groups.setdefault(key, []).append(site)
    rows = []
    for (pattern, _), members in groups.items():
        columns = list(zip(*(site.parts for site in members), strict=True))
        every = [part for column in columns for part in column]
        rows.append(
            Repeated(
                pattern,
                len(members),
                ", ".join(_form(column) for column in columns),
                "; ".join(_shapes(column) for column in columns),
                sum(part.numbers for part in every),
                sum(part.bytes for part in every),
            )
        )
    return rows


def _form(column: tuple[Part, ...]) -> str:
    form, sizes = column[0].form, [part.size for part in column]
    return form if None in sizes else f"{form} {SIZES[form][0]}={_span(sizes)}"


def _shapes(column: tuple[Part, ...]) -> str:
    """ "down 8x576, up 576x8"; scalars left out."""
    told = []
    for key in column[0].tensors:
        shapes = [part.tensors[key][1] for part in column]
        if len({len(shape) for shape in shapes}) == 1 and shapes[0]:
            told.append(f"{key} " + "x".join(_span(sizes) for sizes in zip(*shapes, strict=True)))
    return ", ".join(told)


def _span(numbers: Iterable[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"
