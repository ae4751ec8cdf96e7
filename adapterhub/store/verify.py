"""What is wrong with a hub: the index against itself, missing parents, blobs."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Literal

from adapterhub.errors import IntegrityError, UsageError
from adapterhub.files.progress import shown
from adapterhub.store.blobs import DATABASE, Problem
from adapterhub.store.gc import DAY
from adapterhub.store.records import expected
from adapterhub.store.releases import Releases

Mode = Literal["quick", "full"] | float
"""quick: everything is there, with its size. full: every byte is hashed. 0.05: one blob in twenty is."""


_SHARE = re.compile(r"(\d{1,3})%")


def verify(hub: Releases, mode: Mode = "full", today: int | None = None) -> list[Problem]:
    """What is wrong with a hub: the index against itself and its manifests, parents that are missing, blobs. Empty when
    all is sound.

    today: days since the epoch; a share of the blobs is another one every day, so that in time all are hashed."""
    problems: list[Problem] = []
    try:
        problems += [Problem(hub.root / DATABASE, reason) for reason in hub.index.check(manifests=mode != "quick")]
        for child, parent in hub.index.missing_parents():
            problems.append(Problem(hub.root / DATABASE, f"the parent {parent} is missing", (child,)))
        needed = hub.index.files()
        chosen = _chosen(mode, int(time.time() // DAY) if today is None else today)
        with hub.store.shared():
            damaged = [*hub.store.verify(shown("verify", needed), chosen)]
        needed = hub.index.files() if damaged else needed  # another process may have removed some meanwhile
        damaged = [
            (file, p) for file, p in damaged if file in needed and (p.path.exists() or expected(hub.index, file))
        ]
        problems += [replace(p, releases=tuple(needed[file])) for file, p in damaged]
    except IntegrityError as error:  # the index cannot be read at all
        problems.append(Problem(hub.root / DATABASE, str(error)))
    return problems


def parse_share(text: str) -> float:
    """`5%` -> 0.05. Raises UsageError."""
    share = _SHARE.fullmatch(text.strip())
    if share is None or not 0 < int(share[1]) <= 100:
        raise UsageError(f"{text!r} is no share of the blobs", "write it as 5%")
    return int(share[1]) / 100


def _chosen(mode: Mode, today: int):
    """Which blobs are hashed; of the others only the size is looked at."""
    if mode == "quick":
        return lambda blob: False
    if mode == "full":
        return lambda blob: True
    turns = round(1 / mode)
    return lambda blob: int(blob.digest[-8:], 16) % turns == today % turns
