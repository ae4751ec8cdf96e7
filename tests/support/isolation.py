"""Tests apart from the user: what they may not see of an environment, and what must be the same after them as before."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from adapterhub.bases.resolution import cache_folder
from adapterhub.bases.smollm2 import FOLDER
from adapterhub.config.folders import home
from adapterhub.config.project import FILE
from adapterhub.config.user import config_folder
from adapterhub.store.blobs import DATABASE

FAMILIES = ("ADAPTERHUB_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_", "GIT_CONFIG")
"""Whole families of settings; none of theirs is a test's business."""
SINGLE = {
    "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
    "COLUMNS", "LINES", "TERMINAL_WIDTH", "GITHUB_ACTIONS",
    "WORLD_SIZE", "RANK", "LOCAL_RANK",
}  # fmt: skip
"""How a terminal looks (rich and typer read these), and whether torchrun started this process."""
LEFT_OUT = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis"}
"""Folders that tools write in passing."""


def settings() -> dict[str, str]:
    """The variables of the environment that a test must not see of the user, as they are now."""
    return {name: value for name, value in os.environ.items() if name in SINGLE or name.startswith(FAMILIES)}


Seen = dict[str, tuple[int, int]]
"""Path -> size and time of the last change; folders count by their names alone."""


def places(clone: Path) -> list[Path]:
    """What the suite could reach by mistake: the clone, and the user's hubs and settings, as they are set now. Not caches,
    which whatever else runs may fill meanwhile."""
    above = [folder / name for folder in clone.parents for name in (DATABASE, "blobs", FILE)]
    return [clone, *above, home(), config_folder()]


def snapshot(places: Iterable[Path]) -> Seen:
    """Every file and folder in these places."""
    seen: Seen = {}
    for place in places:
        if place.is_file():
            seen[str(place)] = _look(place)
        for folder, folders, files in os.walk(place):
            folders[:] = [name for name in folders if name not in LEFT_OUT]
            seen |= {os.path.join(folder, name): (0, 0) for name in folders}
            seen |= {os.path.join(folder, name): _look(Path(folder, name)) for name in files}
    return seen


def _look(path: Path) -> tuple[int, int]:
    try:
        status = path.lstat()
    except FileNotFoundError:  # whoever else works here took it away meanwhile
        return -1, 0
    return status.st_size, status.st_mtime_ns


def changed(before: Seen, after: Seen) -> list[str]:
    """What is new, gone or other than it was."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def move_in(home: Path) -> None:
    """Make this process, and those that it starts, a user of their own, whose home is this empty folder.

    Base models that were converted before are lent, as a link: half a gigabyte, made anew in twenty seconds."""
    converted = cache_folder() / FOLDER
    for name in settings():
        del os.environ[name]
    at = {
        "HOME": home,
        "ADAPTERHUB_HOME": home / "hub",
        "ADAPTERHUB_CONFIG": home / "config",
        "ADAPTERHUB_CACHE": home / "cache",
        "HF_HOME": home / "huggingface",
    }
    os.environ.update({name: str(path) for name, path in at.items()})
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["ADAPTERHUB_PLUGINS"] = "*"  # here every installed plugin may run
    os.environ["COLUMNS"], os.environ["TERM"] = "80", "dumb"
    (home / "cache").mkdir()
    if converted.is_dir():
        (home / "cache" / FOLDER).symlink_to(converted.resolve())


def above(folder: Path) -> Path | None:
    """A hub or a project that whoever works in this folder would find by walking up; None where there is none."""
    found = (up / name for up in (folder, *folder.parents) for name in (DATABASE, FILE))
    return next((path for path in found if path.is_file()), None)
