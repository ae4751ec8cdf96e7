"""From what a user writes, or a [sources] table, to a source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub.config.source_tables import Table, own_insecure, resolved_path
from adapterhub.errors import NotFound, UsageError
from adapterhub.files import durable
from adapterhub.sources.source import Candidate, Source
from adapterhub.spec.address import LOOKS, address, shown
from adapterhub.spec.names import Reference
from adapterhub.store.blobs import DATABASE

if TYPE_CHECKING:
    from pathlib import Path


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
        from adapterhub.sources.huggingface import Owner

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
