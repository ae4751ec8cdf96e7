"""What a release is: names, versions, references and the manifest. No torch, no database."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from adapterhub import claims
from adapterhub.errors import ManifestError, UsageError
from adapterhub.files.bounded import read_json

PART = r"[a-z0-9][a-z0-9._-]*"
NAME = re.compile(rf"(?:{PART}/)?{PART}")
VERSION = re.compile(r"(?:(?:0|[1-9][0-9]{0,8})\.){2}(?:0|[1-9][0-9]{0,8})")
TAG = re.compile(r"[a-z][a-z0-9._-]*")
RESERVED = {"base", "mix", "gate", "logits"}
"""Words of the expression language; no adapter may have one of them as its whole name."""


def check_name(name: str) -> str:
    """The name itself. Raises UsageError for what is none."""
    if not NAME.fullmatch(name) or ".." in name or name in RESERVED or len(name) > 96:
        raise UsageError(
            f"{name!r} is not a name for an adapter",
            "use [a-z0-9][a-z0-9._-]*, optionally with an owner: me/sentiment (at most 96 characters, not a reserved word)",
        )
    return name


def check_version(text: str) -> str:
    """X.Y.Z itself. Raises UsageError for any other shape."""
    if not VERSION.fullmatch(text):
        raise UsageError(f"{text!r} is not a version", "write it as X.Y.Z, for example 0.2.0")
    return text


def check_seed(seed: int) -> int:
    """The seed itself. Raises UsageError for what is none of torch's and NumPy's."""
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"the seed is {seed}", "give a number from 0 to 4294967295")
    return seed


@dataclass(frozen=True)
class Reference:
    """`me/x`, `me/x@0.1.0` or `me/x@stable`: a name and, perhaps, an exact version or a tag."""

    name: str
    at: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        name, at, version = text.partition("@")
        check_name(name)
        if at and not TAG.fullmatch(version):
            check_version(version)
        return cls(name, version if at else None)

    def __str__(self) -> str:
        return self.name if self.at is None else f"{self.name}@{self.at}"


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    pass


class File(Struct):
    """Bytes that a manifest refers to: one blob, or a list of parts."""

    digest: str
    """"sha256:<64 hex digits>"."""
    size: int
    """Bytes of the file."""
    parts: bool = False
    """The digest is that of the list of its parts (`adapterhub.parts`): the file is their bytes, one after the other."""


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
        again = "get the adapter again from its source"
        try:
            found = read_json(data, claims.LARGEST)
            format = found.get("format", 1) if isinstance(found, dict) else 1
            if type(format) is int and format > 1:
                raise ManifestError(f"manifest format {format} is newer than this adapterhub", "update adapterhub")
            manifest = msgspec.convert(found, cls)
            if manifest.format != 1:
                raise ValueError(f"there is no format {manifest.format}")
            claims.check(manifest)
            same = manifest.encode() == data
        except (ValueError, msgspec.ValidationError) as error:
            raise ManifestError(f"not a manifest of an adapter: {error}", again) from None
        if not same:
            raise ManifestError(f"the manifest of {manifest.name!r} is not written canonically", again)
        for named in (manifest, *manifest.parents):
            check_name(named.name)
            check_version(named.version)
        for addressed in (*manifest.needs, *manifest.parents):
            check_digest(addressed.digest)
        if manifest.base.tokenizer:
            check_digest(manifest.base.tokenizer)
        if any(file.size < 0 for file in manifest.needs):
            raise ManifestError(f"{manifest.name}@{manifest.version} has a file of negative size", again)
        for shown in manifest._shown():
            if not shown.isprintable() or len(shown) > claims.LINE:
                what = f"holds {ascii(shown)[:80]}: control characters, or more than {claims.LINE} of them"
                raise ManifestError(f"{manifest.name}@{manifest.version} {what}", again)
        return manifest


@dataclass(frozen=True)
class Release:
    """A manifest and the digest that names it."""

    manifest: Manifest
    digest: str

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_digest(text: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        raise ManifestError(f"{text[:80]!r} is not a digest", "a digest is sha256: and 64 lower-case hex digits")
    return text
