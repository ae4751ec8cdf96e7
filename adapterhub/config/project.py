"""The project file, `adapterhub.toml`: which adapters a piece of work needs, how it stacks them, where they come from.

[adapters]
"acme/sql" = ">=1.2,<2"                                  # or "*", or { version = ">=1", source = "team" }
"acme/tone" = "@stable"

[stacks]
helpdesk = "acme/sql + 0.5*acme/tone"                     # hub.load("base", "stack:helpdesk")

[bases]
base = "smollm2"                                         # names for bases, wherever a base is given

[sources.team]
url = "https://adapters.acme.example"                    # a registry; or path = "../hub"; or hf = "user" on the Hub
namespaces = ["acme"]                                    # acme/... is looked for here, and nowhere else
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from adapterhub.config.source_tables import Table, check_tables
from adapterhub.errors import NameInUse, NotFound, UsageError
from adapterhub.files import durable
from adapterhub.files.bounded import read_toml
from adapterhub.spec.expression import references
from adapterhub.spec.names import PART
from adapterhub.spec.parser import parse
from adapterhub.spec.requirement import Requirement

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

FILE = "adapterhub.toml"
LOCK = "adapterhub.lock"
LARGEST = 1 << 20
"""Bytes of adapterhub.toml."""


class Project(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tables of adapterhub.toml."""

    adapters: dict[str, str | dict[str, str]] = {}
    stacks: dict[str, str] = {}
    bases: dict[str, str] = {}
    sources: dict[str, Table] = {}
    plugins: dict[str, Any] = {}
    """`enabled = [...]`: distributions that this project's adapters may bring code from."""

    def requirements(self) -> list[Requirement]:
        """What is asked for: the adapters, and what a stack names besides. Sorted by name."""
        asked = {name: _requirement(name, value) for name, value in self.adapters.items()}
        for names in self.stacked().values():
            for name in names:
                asked.setdefault(name, Requirement(name))
        return [asked[name] for name in sorted(asked)]

    def stacked(self) -> dict[str, list[str]]:
        """Stack -> the names of the adapters in it, sorted."""
        return {
            stack: sorted({reference.name for reference in references(parse(text))})
            for stack, text in sorted(self.stacks.items())
        }

    def stated(self) -> list[str]:
        """All that decides what is locked, line by line: a lock that was made for other lines is stale."""
        lines = [str(requirement) for requirement in self.requirements()]
        lines += [f"stack {name} = {parse(text)}" for name, text in sorted(self.stacks.items())]
        lines += [
            f"source {name} for {', '.join(sorted(table.namespaces))}" for name, table in sorted(self.sources.items())
        ]
        return lines


def nearest() -> Path | None:
    """The folder of the nearest adapterhub.toml, from the working directory upwards."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / FILE).is_file()), None)


def find() -> Path:
    """The same. Raises NotFound when there is none."""
    folder = nearest()
    if folder is None:
        raise NotFound(f"no {FILE} in {Path.cwd()} or above it", "adapterhub add NAME makes one here")
    return folder


def read(folder: Path) -> Project:
    """The project in a folder. Raises UsageError, naming the place, for a file that does not say it right."""
    path = folder / FILE
    try:
        found = read_toml(durable.read_plain(path, LARGEST + 1), LARGEST)
        project = msgspec.convert(found, Project)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", "check the file") from None
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}", _near(found)) from None
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}", "mend it") from None
    _check(project, path)
    return project


@contextmanager
def edited(folder: Path) -> Iterator[TOMLDocument]:
    """The file to change, comments kept; it is written, and read again first, when the block ends well."""
    import tomlkit

    path = folder / FILE
    if path.exists():
        read(folder)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    document = tomlkit.parse(text)
    yield document
    after = tomlkit.dumps(document)
    try:
        _check(msgspec.convert(read_toml(after, LARGEST), Project), path)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path} would not be right: {error}", "nothing was changed") from None
    if after != text:
        durable.write_bytes(path, after.encode())


def add(folder: Path, requirement: Requirement) -> None:
    """Write a requirement into [adapters], in place of what stands there for its name."""
    with edited(folder) as document:
        shown = str(Requirement(requirement.name, requirement.versions, requirement.at))
        value: Any = shown.removeprefix(requirement.name) or "*"
        if requirement.source:
            import tomlkit

            table = tomlkit.inline_table()
            table.update({"version": value, "source": requirement.source})
            value = table
        document.setdefault("adapters", {})[requirement.name] = value


def remove(folder: Path, name: str) -> None:
    """Take a name out of [adapters]. Raises NotFound, and NameInUse while a stack needs it."""
    project = read(folder)
    if name not in project.adapters:
        near = get_close_matches(name, project.adapters, 1)
        raise NotFound(f"{FILE} does not ask for {name}", f"did you mean {near[0]}?" if near else "adapterhub tree")
    if stacks := [stack for stack, names in project.stacked().items() if name in names]:
        raise NameInUse(f"the stack {stacks[0]} is made of {name}", f"change [stacks] in {folder / FILE} first")
    with edited(folder) as document:
        del document["adapters"][name]


def _requirement(name: str, value: str | dict[str, str]) -> Requirement:
    table = {"version": value} if isinstance(value, str) else value
    if unknown := set(table) - {"version", "source"}:
        raise UsageError(f"[adapters] {name}: unknown key {min(unknown)!r}", "it may have version and source")
    version, source = table.get("version", "*"), table.get("source")
    version = "" if version == "*" else version
    if version and version[0] not in "<>=!~@":
        raise UsageError(
            f"[adapters] {name} = {version!r} is no range of versions", 'write ">=1.2,<2", "==1.2.0" or "*"'
        )
    return Requirement.parse((f"{source}:" if source else "") + name + version)


def _check(project: Project, path: Path) -> None:
    asked = {requirement.name: requirement for requirement in project.requirements()}
    check_tables(project.sources, path)
    for requirement in asked.values():
        if requirement.source and requirement.source not in project.sources:
            raise UsageError(
                f"{path}: {requirement.name} is from the source {requirement.source!r}, which is not there",
                "add [sources.NAME]",
            )
    for stack, text in project.stacks.items():
        if not re.fullmatch(PART, stack):
            raise UsageError(f"{path}: {stack!r} is no name for a stack", "use [a-z0-9][a-z0-9._-]*")
        for reference in references(parse(text)):
            if reference.at is not None:
                raise UsageError(
                    f"{path}: the stack {stack} names {reference}; in a stack names stand alone",
                    f'say the version in [adapters]: "{reference.name}" = "=={reference.at}"',
                )


def _near(found: dict[str, Any]) -> str:
    known = ("adapters", "stacks", "bases", "sources", "plugins")
    strange = next((key for key in found if key not in known), "")
    near = get_close_matches(strange, known, 1)
    return f"did you mean [{near[0]}]?" if near else f"the tables are {', '.join(known)}"
