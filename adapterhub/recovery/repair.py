"""Bring damaged and missing files again, from wherever they are sound."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import HubError
from adapterhub.files.progress import shown
from adapterhub.sources.source import Source
from adapterhub.store.blobs import Problem
from adapterhub.store.records import complete, put
from adapterhub.store.releases import Releases
from adapterhub.store.verify import verify


@dataclass(frozen=True)
class Repaired:
    """What became of damaged files."""

    mended: list[Path]
    left: list[Problem]


def repair(hub: Releases, sources: Sequence[Source]) -> Repaired:
    """Bring every damaged or missing blob again: a manifest from the index, others from the first of the sources that has them
    sound. Nothing else changes.

    What stays damaged is in `left`: no source has it, or it is the index itself."""
    with hub.store.shared():
        complete(hub.index, hub.store)
        damaged = {file: problem for file, problem in hub.store.verify(shown("repair", hub.index.files()))}
        put(hub.store, [data for file in damaged if (data := hub.index.record(file.digest)) is not None])
        for file in damaged:
            for source in sources:
                with suppress(HubError):
                    source.fetch([file], hub.store)
                if not [*hub.store.verify([file])]:
                    break
    left = verify(hub)
    still = {problem.path for problem in left}
    return Repaired([p.path for p in damaged.values() if p.path not in still], left)
