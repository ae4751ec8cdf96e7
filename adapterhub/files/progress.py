"""Progress bars: to stderr, on a terminal only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from adapterhub.errors import plain


def wanted() -> bool:
    """Whether somebody looks."""
    return sys.stderr.isatty() and not os.environ.get("ADAPTERHUB_NO_PROGRESS")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes; call what is yielded with every number of bytes that is done, from any thread."""
    if not wanted():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(plain(title), markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


class HasSize(Protocol):
    """What a bar counts."""

    @property
    def size(self) -> int:
        """Bytes."""


One = TypeVar("One", bound=HasSize)


def shown(title: str, files: Collection[One]) -> Iterator[One]:
    """Yield the files one by one, with a bar of their bytes."""
    with bar(title, sum(file.size for file in files)) as advance:
        for file in files:
            yield file
            advance(file.size)
