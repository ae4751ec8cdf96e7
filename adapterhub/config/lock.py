"""The lock, `adapterhub.lock`: exactly which releases a project runs on, byte for byte, on every machine.

It names sources, not addresses; those stand in adapterhub.toml. Lines come in one order, so that a change reads as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from adapterhub.config.project import LOCK, Project
from adapterhub.errors import HubError, ManifestError, NotFound, UsageError
from adapterhub.files import durable
from adapterhub.files.bounded import LENGTH, read_toml
from adapterhub.spec.digest import check_digest
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import check_name, check_version
from adapterhub.spec.parser import parse

HEADER = "# Made by adapterhub from adapterhub.toml. Commit it; do not edit it.\n"
VERSION = 1


class StaleLock(HubError):
    """adapterhub.lock is not what adapterhub.toml would give."""


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    pass


class Locked(_Struct):
    """A release."""

    name: str
    version: str
    digest: str
    """Of its manifest, and so of every byte."""
    size: int
    """Bytes of its files."""
    source: str
    """By the name that adapterhub.toml gives it."""
    base: str
    """Digest of the sketch of the base that it was made for: see [[base]]."""
    asked: bool = False
    """Whether adapterhub.toml asks for it; else another needs it."""
    needs: list[str] = []
    """Digests of what it runs only with."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class LockedBase(_Struct):
    """A base that the releases were made for."""

    name: str
    structure: str
    sketch: str
    tokenizer: str = ""


class LockedPlugin(_Struct):
    """A distribution whose code they need to run."""

    name: str
    version: str


class LockedStack(_Struct):
    """A stack with every name at its version."""

    name: str
    expression: str


class Lock(_Struct, kw_only=True):
    """The whole lock."""

    version: int = VERSION
    requirements: list[str]
    """What adapterhub.toml said when it was made: see `Project.stated`."""
    adapter: list[Locked] = []
    stack: list[LockedStack] = []
    base: list[LockedBase] = []
    plugin: list[LockedPlugin] = []

    def chosen(self, name: str) -> Locked | None:
        """What is locked for a name that the project asks for."""
        return next((one for one in self.adapter if one.asked and one.name == name), None)

    def find(self, digest: str) -> Locked | None:
        return next((one for one in self.adapter if one.digest == digest), None)

    def encode(self) -> bytes:
        """The file: UTF-8, one line feed at each end of a line, the same bytes for the same lock."""
        lines = [HEADER, f"version = {self.version}\n", "requirements = [\n"]
        lines += [f"    {_text(line)},\n" for line in self.requirements]
        lines.append("]\n")
        for table in ("adapter", "stack", "base", "plugin"):
            for entry in getattr(self, table):
                lines.append(f"\n[[{table}]]\n")
                lines += [f"{key} = {_text(value)}\n" for key, value in msgspec.to_builtins(entry).items()]
        return "".join(lines).encode()


def read(folder: Path) -> Lock:
    """The lock in a project's folder. Raises NotFound; UsageError for a file that is no lock; HubError for a newer one."""
    path = folder / LOCK
    try:
        found: Mapping[str, Any] = read_toml(durable.read_plain(path, LENGTH + 1))
    except FileNotFoundError:
        raise NotFound(f"there is no {path}", "adapterhub lock makes it") from None
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", "check the file") from None
    except ValueError as error:
        raise StaleLock(f"{path} is no lock: {error}", "restore it, or make it again: adapterhub lock") from None
    if type(found.get("version")) is int and found["version"] > VERSION:
        raise HubError(
            f"{path} is of version {found['version']}, which this adapterhub does not know", "update adapterhub"
        )
    try:
        lock = msgspec.convert(found, Lock)
        _check(lock)
    except (msgspec.ValidationError, ManifestError, UsageError, ValueError) as error:
        raise StaleLock(f"{path} is no lock: {error}", "restore it, or make it again: adapterhub lock") from None
    return lock


def write(folder: Path, lock: Lock) -> bool:
    """Write the lock unless it is there already; returns whether it changed."""
    path, data = folder / LOCK, lock.encode()
    if path.is_file() and durable.read_plain(path, len(data) + 1) == data:
        return False
    durable.write_bytes(path, data)
    return True


def require_fresh(lock: Lock, project: Project, folder: Path) -> None:
    """Raise StaleLock when adapterhub.toml says something else than the lock was made for."""
    before, now = lock.requirements, project.stated()
    if before == now:
        return
    new = next((line for line in now if line not in before), None)
    old = next((line for line in before if line not in now), None)
    told = f"{new!r} is new" if new else f"{old!r} is gone"
    raise StaleLock(f"{folder / LOCK} is stale: {told}", "adapterhub lock brings it up to date")


def require_agreement(one: Locked, release: Release) -> None:
    """Raise StaleLock when a lock says something else of a release than its manifest does."""
    manifest = release.manifest
    said = (one.name, one.version, one.size, one.base, sorted(one.needs))
    size, needs = sum(file.size for file in manifest.files.values()), {parent.digest for parent in manifest.required}
    if said != (release.name, release.version, size, manifest.base.sketch.digest, sorted(needs)):
        raise StaleLock(
            f"the lock does not say of {release} what its manifest says",
            "restore it, or make it again: adapterhub lock",
        )


def _check(lock: Lock) -> None:
    if lock.version != VERSION:
        raise ValueError(f"there is no version {lock.version}")
    digests = {one.digest for one in lock.adapter}
    for one in lock.adapter:
        check_name(one.name)
        check_version(one.version)
        for digest in (one.digest, one.base, *one.needs):
            check_digest(digest)
        if not 0 <= one.size < 1 << 63 or not set(one.needs) <= digests:
            raise ValueError(f"{one} needs what is not in it")
    named = [one.name for one in lock.adapter if one.asked]
    if len(set(named)) != len(named) or len(digests) != len(lock.adapter):
        raise ValueError("something stands in it twice")
    if not {one.base for one in lock.adapter} <= {base.sketch for base in lock.base}:
        raise ValueError("a base is not in it")
    for stack in lock.stack:
        parse(stack.expression)


def _text(value: object) -> str:
    """A value as TOML. JSON's texts are TOML's, but for the one control character that JSON leaves alone."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
