"""Work on several things side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

WORKERS = 4
"""Blobs that are written or fetched side by side: a disk commits what several wait for at once."""


def each(function: Callable, items: Iterable) -> list:
    """The results, several computed side by side; the first error ends it, once what runs has ended."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    # A pool that is interrupted while it starts a thread forgets that thread: none is at work until all have started.
    begin: Future[bool] = Future()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            waiting = [pool.submit(lambda item: begin.result() and function(item), item) for item in items]
            begin.set_result(True)
            return [future.result() for future in waiting]
        except BaseException:
            begin.cancel()
            pool.shutdown(cancel_futures=True)
            raise
