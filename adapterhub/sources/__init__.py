"""Where releases come from: a bundle, another hub on disk, a registry, the Hub. One protocol, one door."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adapterhub.config.source_tables import Table, own_insecure, resolved_path
from adapterhub.errors import ManifestError, NotFound, UsageError
from adapterhub.files import durable
from adapterhub.spec.address import LOOKS, address, shown
from adapterhub.spec.manifest import File, Release
from adapterhub.spec.names import Reference
from adapterhub.spec.parents import check_expressions
from adapterhub.store import DATABASE, Store

if TYPE_CHECKING:
    from pathlib import Path

    from adapterhub.index import Row

AGAIN = "get the adapter again from its source"
LARGEST_GRAPH = 20_000
"""Releases that one may need, itself included."""


@dataclass(frozen=True)
class Candidate:
    """A release that a source offers, before its manifest is looked at."""

    name: str
    version: str
    digest: str
    """The manifest's."""
    created: str = ""
    """When it came there: UTC, ISO 8601; "" when the source does not say."""
    yanked: str | None = None
    """Why it should no longer be chosen."""
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, row: Row) -> Candidate:
        return cls(row.name, row.version, row.digest, row.created, row.yanked, row.tags)


class Source(Protocol):
    """What can be installed from. Nothing that it says is believed before it is hashed."""

    label: str
    """What errors and lists call it."""

    def candidates(self, name: str) -> list[Candidate]:
        """What it has under a name, newest first; [] when it has none."""

    def release(self, name: str, version: str, digest: str | None = None) -> Release:
        """The manifest. Raises NotFound, and IntegrityError when its digest is not the one asked for."""

    def fetch(self, files: Collection[File], store: Store) -> None:
        """Bring every blob behind these files into the store. Raises IntegrityError for other bytes, NotFound."""

    def signatures(self, digest: str) -> list[bytes]:
        """The envelopes that it has for a release."""


def named(text: str, offline: bool = False) -> Source:
    """A source as a user writes it: http(s)://..., a bundle's folder, or the folder of a hub. Raises NotFound, UsageError."""
    if LOOKS.match(text):
        from adapterhub.sources.registry import Registry

        return Registry(text, offline=offline, typed=True, insecure=own_insecure(address(text)))
    folder = durable.user_path(text)
    if (folder / DATABASE).is_file():
        from adapterhub.sources.disk import Disk

        return Disk(folder)
    if (folder / "manifest.json").is_file():
        from adapterhub.sources.bundle import Bundle

        return Bundle(folder)
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"{text} is a PEFT adapter, not a bundle", f"adapterhub import {text} --name NAME")
    if folder.is_dir():
        raise NotFound(
            f"{shown(text)} holds neither {DATABASE} nor manifest.json",
            "name a hub, or make a bundle: adapterhub export NAME --format bundle",
        )
    raise NotFound(f"no folder {shown(text)}", "give a bundle's or a hub's folder, or the address of a registry")


def open_table(name: str, table: Table, folder: Path, offline: bool = False) -> Source:
    """The source of a [sources.NAME] table; `folder` is where its path starts from."""
    if table.url:
        from adapterhub.sources.registry import Registry

        return Registry(table.url, name=name, key=table.key, offline=offline, insecure=table.insecure)
    if table.hf:
        from adapterhub.huggingface.source import Owner

        return Owner(table.hf, name=name, offline=offline)
    return named(str(resolved_path(table.path, folder)))


def names_a_place(text: str) -> bool:
    """Whether a text that is to be installed says where to look, instead of a requirement of what our sources have."""
    if "@sha256:" in text:
        return False
    place, colon, _ = text.rpartition(":")
    folders = [durable.user_path(each) for each in (text, place) if each]
    there = text.startswith("hf:") or bool(LOOKS.match(text)) or (bool(colon) and "/" in place)
    return there or any(folder.is_dir() for folder in folders)


def from_text(text: str) -> tuple[Source, Candidate]:
    """What a user names by its place: a bundle's folder, or HUB:name[@version], HUB a folder with a hub.db.

    Raises NotFound, UsageError."""
    if LOOKS.match(text):
        raise UsageError(
            "an address is not installed from",
            'name the registry in adapterhub.toml: [sources.NAME] with url = "...", then: adapterhub install NAME:acme/sql',
        )
    folder = durable.user_path(text)
    if folder.is_dir():
        if (folder / DATABASE).is_file():
            raise UsageError(f"{text} is a hub, not a bundle", f"say which of its adapters: {text}:NAME")
        bundle = named(text)
        return bundle, bundle.root
    hub, colon, reference = text.rpartition(":")
    if not colon:
        raise NotFound(f"no folder {shown(text)}", "install from a bundle's folder, or from a hub: HUB:name[@version]")
    from adapterhub.sources.disk import Disk

    disk = Disk(durable.user_path(hub))
    return disk, disk.choose(Reference.parse(reference))


def closure(source: Source, roots: Iterable[Release]) -> list[Release]:
    """These releases and everything that they need to run, themselves first.

    Raises ManifestError for a composition of other things, or for more than a source may ask us to take."""
    found = {root.digest: root for root in roots}
    waiting = list(found.values())
    while waiting:
        manifest = waiting.pop().manifest
        check_expressions(manifest)
        for parent in manifest.required:
            if parent.digest in found:
                continue
            release = source.release(parent.name, parent.version, parent.digest)
            if (release.name, release.version) != (parent.name, parent.version):
                raise ManifestError(f"{release} is called {parent.name}@{parent.version} by its child", AGAIN)
            if len(found) == LARGEST_GRAPH:
                raise ManifestError(f"it needs more than {LARGEST_GRAPH} releases", "install its parts by themselves")
            found[release.digest] = release
            waiting.append(release)
    return list(found.values())
