"""The user's own settings, `config.toml`: whom they trust, which plugins may run, where they look for adapters.

In the platform's configuration folder, or in ADAPTERHUB_CONFIG. A project's adapterhub.toml may add to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from adapterhub.errors import HubError, UsageError
from adapterhub.files import durable
from adapterhub.files.bounded import read_toml

if TYPE_CHECKING:
    from tomlkit import TOMLDocument


T = TypeVar("T")
LARGEST = 1 << 20
"""Bytes of config.toml."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """config.toml."""

    trust: dict[str, dict[str, Any]] = {}
    """Namespace -> keys, until, require: see adapterhub.trust.policy."""
    plugins: dict[str, Any] = {}
    """`enabled = ["adapterhub-loreft"]`: see adapterhub.plugins."""
    folders: dict[str, Any] = {}
    """hubs, projects: those that are the user's own, see adapterhub.config.folders."""
    sources: dict[str, dict[str, Any]] = {}
    """Name -> url or path, namespaces: see adapterhub.sources."""


def config_folder() -> Path:
    """`ADAPTERHUB_CONFIG`, else the platform's folder for settings."""
    if folder := os.environ.get("ADAPTERHUB_CONFIG"):
        return durable.user_path(folder)
    import platformdirs

    return Path(platformdirs.user_config_dir("adapterhub"))


def config_file() -> Path:
    return config_folder() / "config.toml"


def load() -> Settings:
    """What the user has set; nothing when there is no file. Raises UsageError for a file that does not say it right."""
    path = config_file()
    try:
        found: Mapping[str, Any] = read_toml(path.read_bytes(), LARGEST)
        return msgspec.convert(found, Settings)
    except FileNotFoundError:
        return Settings()
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror}", "check its permissions") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise UsageError(f"{path} is no configuration: {error}", "mend it, or move it away") from None


def enabled(table: Mapping[str, Any]) -> list[str]:
    """The distributions that a [plugins] table enables. Raises UsageError for a table that says something else."""
    found = table.get("enabled", [])
    if set(table) - {"enabled"} or not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UsageError("a table [plugins] is not right", 'it says enabled = ["adapterhub-loreft"]')
    return found


def converted(table: object, kind: type[T], where: str) -> T:
    """A table as what it should be. Raises UsageError, naming the place."""
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{config_file()}: {where}: {error}", "mend it") from None


@contextmanager
def edited() -> Iterator[TOMLDocument]:
    """The file to change, comments kept; it is written when the block ends well. One process at a time."""
    import tomlkit

    path = config_file()
    durable.make_folder(path.parent)
    with durable.lock(path.with_name("config.lock")):
        load()
        document = tomlkit.parse(path.read_text()) if path.exists() else tomlkit.document()
        yield document
        durable.write_bytes(path, tomlkit.dumps(document).encode())
