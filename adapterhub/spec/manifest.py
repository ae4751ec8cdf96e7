"""What a release is: its manifest. No torch, no database."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from adapterhub.errors import AGAIN, ManifestError
from adapterhub.files.bounded import read_json
from adapterhub.spec.claims import LARGEST, LINE, TEXT
from adapterhub.spec.digest import canonical, check_digest, digest_of
from adapterhub.spec.names import check_name, check_version


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    pass


class File(Struct):
    """Bytes that a manifest refers to: one blob, or a list of parts."""

    digest: str
    """"sha256:<64 hex digits>"."""
    size: int
    """Bytes of the file."""
    parts: bool = False
    """The digest is that of the list of its parts (`adapterhub.store.segments`): the file is their bytes, one after the other."""


class Base(Struct):
    """The base model an adapter was made for: what `adapterhub.bases.fingerprint` compares."""

    name: str
    """As the user wrote it: a known name, a repo id, or the folder's last part. Informative; the fingerprint decides."""
    architecture: str
    """transformers' `model_type`."""
    structure: str
    """Digest of the sorted (name, shape) of all tensors."""
    sketch: File
    """The blob with whole rows of each tensor."""
    tokenizer: str = ""
    """Digest of what its tokenizer does; "" where there is none, or it is not known."""
    computes: dict[str, Any] = {}
    """What the configuration says beyond shapes of how the weights are used: heads, layers, activation, rope, norms."""
    note: str = ""
    """What else is known, e.g. "Q4_1 copy, widened"."""


class Made(Struct):
    """By which method, merger or codec, with which options, from which installed distribution."""

    name: str
    options: dict[str, Any] = {}
    distribution: str = ""
    """"adapterhub-loreft 0.1.0"."""


class Parent(Struct):
    """A release this one was made from, or needs."""

    name: str
    version: str
    digest: str
    """The parent's manifest digest."""
    relation: str
    """"on" (trained over it), "gate" (weighed by it, in this order) or "compose": it is needed to run. "continue", "merge",
    "compress": where it comes from."""

    @property
    def label(self) -> str:
        """`me/x@0.1.0`."""
        return f"{self.name}@{self.version}"

    @property
    def needed(self) -> bool:
        """Whether a release runs only with it. What is not needed does not travel: its name and digest tell of it."""
        return self.relation in ("on", "gate", "compose")


class Manifest(Struct):
    """Everything about a release but its bytes. The digest of its canonical JSON names the release."""

    name: str
    version: str
    base: Base
    format: int = 1
    method: Made | None = None
    """How its tensors were trained; None when imported without a known method, or composed."""
    forms: dict[str, list[str]] = {}
    """Site path -> the forms there, in order."""
    compose: str | None = None
    """A composition's expression, every name pinned to a version; then there are no tensors."""
    parents: list[Parent] = []
    codecs: list[Made] = []
    """In the order of encoding."""
    plugins: dict[str, str] = {}
    """Distributions besides adapterhub whose forms, composers or codecs it needs to run -> the version it was made with."""
    recipe: dict[str, Any] = {}
    """What it takes to make it again: data digest, seed, steps, library versions; merger and weights."""
    metrics: dict[str, Any] = {}
    licence: str | None = None
    files: dict[str, File] = {}
    """"tensors" (safetensors), and what else belongs to it: "log" (loss curve, JSON)."""

    @property
    def label(self) -> str:
        """`me/x@0.1.0`."""
        return f"{self.name}@{self.version}"

    @property
    def needs(self) -> list[File]:
        """Every file it needs, the base's sketch included."""
        return [*self.files.values(), self.base.sketch]

    @property
    def required(self) -> list[Parent]:
        """The parents without which it does not run."""
        return [parent for parent in self.parents if parent.needed]

    def _shown(self) -> Iterator[str]:
        """What lists print; a terminal obeys control characters."""
        yield from (self.base.name, self.base.architecture, self.base.note, self.licence or "")
        yield from (made.name for made in (self.method, *self.codecs) if made is not None)
        yield from (text for pair in self.plugins.items() for text in pair)
        yield from (shown for path, forms in self.forms.items() for shown in (path, *forms))
        yield from self.files

    def encode(self) -> bytes:
        """Canonical JSON: keys sorted, no spaces, UTF-8. The same manifest gives the same bytes everywhere."""
        return canonical(msgspec.to_builtins(self))

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """The manifest in these bytes. Raises ManifestError unless they are its canonical JSON."""
        try:
            found = read_json(data, LARGEST)
            format = found.get("format", 1) if isinstance(found, dict) else 1
            if type(format) is int and format > 1:
                raise ManifestError(f"manifest format {format} is newer than this adapterhub", "update adapterhub")
            manifest = msgspec.convert(found, cls)
            if manifest.format != 1:
                raise ValueError(f"there is no format {manifest.format}")
            check_bounds(manifest)
            same = manifest.encode() == data
        except (ValueError, msgspec.ValidationError) as error:
            raise ManifestError(f"not a manifest of an adapter: {error}", AGAIN) from None
        if not same:
            raise ManifestError(f"the manifest of {manifest.name!r} is not written canonically", AGAIN)
        for named in (manifest, *manifest.parents):
            check_name(named.name)
            check_version(named.version)
        for addressed in (*manifest.needs, *manifest.parents):
            check_digest(addressed.digest)
        if manifest.base.tokenizer:
            check_digest(manifest.base.tokenizer)
        if any(file.size < 0 for file in manifest.needs):
            raise ManifestError(f"{manifest.label} has a file of negative size", AGAIN)
        for shown in manifest._shown():
            if not shown.isprintable() or len(shown) > LINE:
                what = f"holds {ascii(shown)[:80]}: control characters, or more than {LINE} of them"
                raise ManifestError(f"{manifest.label} {what}", AGAIN)
        return manifest


@dataclass(frozen=True)
class Release:
    """A manifest and the digest that names it."""

    manifest: Manifest
    digest: str

    @classmethod
    def decode(cls, data: bytes, digest: str | None = None) -> Release:
        """Return the release whose manifest these bytes are. digest: of the bytes, where it is known. Raises ManifestError."""
        return cls(Manifest.decode(data), digest or digest_of(data))

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


RELATIONS = ("on", "gate", "compose", "continue", "merge", "compress")


COUNTS = {"parents": 20_000, "codecs": 16, "plugins": 1000, "files": 1000, "forms": 65_536}


VALUES = 1 << 18
"""Numbers, texts, lists and tables in the recipe, the metrics and the options together."""


FORMS = 1000
"""Modifications at one site."""


def check_bounds(manifest: Manifest) -> None:
    """Raise ValueError for what no release says of itself."""
    for what, most in COUNTS.items():
        if len(getattr(manifest, what)) > most:
            raise ValueError(f"it has {len(getattr(manifest, what))} {what} (at most {most})")
    if any(len(forms) > FORMS for forms in manifest.forms.values()):
        raise ValueError(f"more than {FORMS} modifications sit at one site")
    for parent in manifest.parents:
        if parent.relation not in RELATIONS:
            raise ValueError(f"{ascii(parent.relation)[:40]} names no relation that we know")
    if manifest.compose is not None and len(manifest.compose) > TEXT:
        raise ValueError(f"its expression has {len(manifest.compose)} characters (at most {TEXT})")
    made = [one for one in (manifest.method, *manifest.codecs) if one is not None]
    _check_values([manifest.recipe, manifest.metrics, manifest.base.computes, *(one.options for one in made)])
    _check_recipe(manifest.recipe)


def _check_values(tables: list[Any]) -> None:
    waiting, count = list(tables), 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > VALUES:
            raise ValueError(f"its recipe, metrics and options hold more than {VALUES} values")
        if isinstance(value, str) and len(value) > TEXT:
            raise ValueError(f"a text in it has {len(value)} characters (at most {TEXT})")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number in it is not finite")
        if isinstance(value, dict):
            if any(len(key) > LINE for key in value):
                raise ValueError(f"a key in it has more than {LINE} characters")
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


def _check_recipe(recipe: Mapping[str, Any]) -> None:
    """What going on with an adapter reads of how it was made."""
    beneath, named = recipe.get("beneath"), [recipe.get("objective"), recipe.get("schedule")]
    if not isinstance(beneath, str | None):
        raise ValueError("'beneath' in its recipe is not an expression")
    several = recipe.get("recipes", [])
    if not isinstance(several, list | tuple):
        raise ValueError("'recipes' in its recipe is not a list")
    for one in (*several, *(one for one in named if one is not None)):
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise ValueError("a part that its recipe tells of has no name")
