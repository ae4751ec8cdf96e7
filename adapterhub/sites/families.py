"""Families of architectures: roles, fused projections and older names, from architectures.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Family:
    """What architectures.toml says of one family of models."""

    roles: tuple[tuple[re.Pattern, str], ...]
    parts: tuple[tuple[re.Pattern, str], ...]
    fused: tuple[tuple[re.Pattern, Mapping[str, Any]], ...]
    aliases: tuple[tuple[re.Pattern, str], ...]
    own_positions: bool
    """It computes positions from its ids itself: they must not be given."""


@cache
def family(model_type: str) -> Family:
    """The family of transformers' `model_type`; one that says nothing for an unknown type."""
    tables = tomllib.loads(files("adapterhub.sites").joinpath("architectures.toml").read_text()).values()
    table = next((table for table in tables if model_type in table["model_types"]), {})

    def read(key: str) -> tuple:
        return tuple((_pattern(pattern), value) for pattern, value in table.get(key, {}).items())

    return Family(read("roles"), read("parts"), read("fused"), read("aliases"), table.get("own_positions", False))


def _pattern(text: str) -> re.Pattern:
    """`*` is a number, `**` anything; what stands before is whatever wraps the layers ("model.", "transformer.", nothing)."""
    escaped = re.escape(text).replace(r"\*\*", ".*").replace(r"\*", r"(\d+)")
    return re.compile(r"(?P<before>.*\.)?" + escaped)


def first_match(table: tuple[tuple[re.Pattern, Any], ...], path: str, default: Any = "") -> Any:
    return next((value for pattern, value in table if pattern.fullmatch(path)), default)


def named_role(model_type: str, path: str) -> str | None:
    """The role of the module with this path, from its name alone; None for columns of a fused projection."""
    known = family(model_type)
    module, _, last = path.rpartition(".")
    fused = first_match(known.fused, module, None)
    return None if fused and last in fused["order"] else first_match(known.roles, path)


def current_path(model_type: str, path: str) -> str:
    """The path that a module is known by now, of one that an older transformers may have named otherwise."""
    for pattern, new in family(model_type).aliases:
        if hit := pattern.fullmatch(path):
            for number in hit.groups()[1:]:
                new = new.replace("*", number, 1)
            return (hit["before"] or "") + new
    return path
