"""Which name or version a hub gives to what is new. No torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence

from packaging.version import Version

from adapterhub.errors import NameInUse, NameWarning
from adapterhub.spec.names import VERSION, check_name
from adapterhub.store.index import Index, Row

_BETWEEN = re.compile("[-_.]+")


def look_alike(index: Index, name: str) -> str | None:
    """A name of the same owner that differs from a new one by nothing but - _ and . between its words; None for a name that
    is there already."""
    owner, slash, own = name.rpartition("/")
    words = [word for word in _BETWEEN.split(own) if word]
    near = index.names(max(words, key=len)) if words else []
    if name in near:
        return None
    for other in near:
        theirs = other.rpartition("/")
        if theirs[:2] == (owner, slash) and [word for word in _BETWEEN.split(theirs[2]) if word] == words:
            return other
    return None


def check_new(index: Index, name: str) -> str:
    """The name itself, before long work is done for it. Raises UsageError and NameInUse."""
    check_look_alike(index, check_name(name))
    return name


def check_look_alike(index: Index, name: str) -> None:
    """Raise NameInUse for a new name that readers take for one that is there."""
    if other := look_alike(index, name):
        raise NameInUse(f"{name} differs from {other} only by - _ or .", f"take another name, or go on with {other}")


def warn_of_look_alikes(index: Index, names: Iterable[str]) -> None:
    """Say which new names readers take for one that is there."""
    for name in sorted(names):
        if other := look_alike(index, name):
            warnings.warn(f"{name} differs from {other}, which is here, only by - _ or .", NameWarning, stacklevel=3)


def following_version(name: str, rows: Sequence[Row], gone: Collection[str]) -> str:
    """The first version, or the next minor of the newest that was ever there."""
    known = [row.version for row in rows] + list(gone)
    if not known:
        return "0.1.0"
    newest = max(map(Version, known))
    version = f"{newest.major}.{newest.minor + 1}.0"
    if not VERSION.fullmatch(version):
        raise NameInUse(f"after {name}@{newest} there is no next minor version", "give a version, or take another name")
    return version
