"""The highest serial number that was seen of each registry's lists: an older list is a state that somebody shows again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from adapterhub.config import user
from adapterhub.errors import IntegrityError
from adapterhub.files import durable


def check_no_older(url: str, serial: int, label: str) -> None:
    """Remember the serial number of a list that is new. Raises IntegrityError for a lower one than was seen before."""
    path = _path(url)
    durable.make_folder(path.parent)
    with durable.lock(path.with_suffix(".lock")):
        seen = remembered(url)
        if serial < seen:
            raise IntegrityError(
                f"{label}: its list has the serial number {serial}, and {seen} was seen before",
                "somebody shows you an old state of it: ask who runs it; if they restored it from a backup: "
                f"adapterhub trust forget {label}",
            )
        if serial > seen:
            durable.write_bytes(path, str(serial).encode())


def remembered(url: str) -> int:
    """The highest serial number that was seen of a registry; 0 for none."""
    try:
        return int(_path(url).read_text())
    except (OSError, ValueError):
        return 0


def forget(url: str) -> None:
    """Take the next list of a registry, whatever its serial number."""
    path = _path(url)
    durable.make_folder(path.parent)
    with durable.lock(path.with_suffix(".lock")):
        durable.remove(path)


def _path(url: str) -> Path:
    return user.config_folder() / "serials" / hashlib.sha256(url.encode()).hexdigest()[:32]
