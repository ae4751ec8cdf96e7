"""A command run again and again, with something happening at its first, second, ... durable step, until it gets through."""

import errno
import os
import pickle
import shutil
import sqlite3
import tempfile
import threading
import traceback
from pathlib import Path

from sqlalchemy.exc import OperationalError

import adapterhub
from adapterhub.errors import HubError, NotFound
from adapterhub.files import durable
from adapterhub.spec.digest import digest_of

LOCAL = ("write", "fsync", "rename", "link", "unlink", "commit")


class Steps:
    """What `durable.watch` is told, counted; at the n-th step of these kinds something happens."""

    def __init__(self, n=0, happen=None, kinds=LOCAL):
        self.n, self.happen, self.kinds, self.trace = n, happen, kinds, []
        self._lock = threading.Lock()

    def __call__(self, step, path, detail=None):
        if step not in self.kinds:
            return
        with self._lock:
            self.trace.append((step, str(path), detail if isinstance(detail, Path) else None))
            now = len(self.trace)
        if now == self.n:
            self.happen(step, path, detail)

    def __enter__(self):
        durable.watch = self
        return self

    def __exit__(self, *_):
        durable.watch = None


def die(step, path, detail):
    """Before the step; of a write, the first half is done."""
    if step == "write":
        with open(path, "ab") as file:
            file.write(bytes(detail)[: len(detail) // 2])
    os._exit(137)


def full(step, path, detail):
    if step == "commit":
        raise OperationalError("COMMIT", None, sqlite3.OperationalError("database or disk is full"))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def child(work):
    """work() in a forked process: (exit code, what it returned or the error it raised)."""
    with tempfile.TemporaryFile() as answer:
        pid = os.fork()
        if pid == 0:
            try:
                try:
                    result = work()
                except HubError as error:
                    result = (type(error).__name__, str(error), error.hint)
                os.write(answer.fileno(), pickle.dumps(result))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer.seek(0)
        return code, pickle.load(answer) if code == 0 else None


def every_step(command, before, room, happen, kinds=LOCAL):
    """Run `command(folder)` on copies of `before` with `happen` at step 1, 2, ...; yields (n, folder, code, answer)."""
    for n in range(1, 1000):
        folder = Path(shutil.copytree(before, room / f"step{n}", symlinks=True))

        def work(folder=folder, n=n):
            with Steps(n, happen, kinds) as steps:
                command(folder)
            return "through" if len(steps.trace) < n else "survived"

        code, answer = child(work)
        yield n, folder, code, answer
        shutil.rmtree(folder)
        if answer == "through":
            return
    raise AssertionError("the command never gets through")


def hub_in(folder):
    """An empty hub.db with no blobs is none yet: nothing is lost, and `init` goes on."""
    database = folder / "hub.db"
    if database.exists() and not database.stat().st_size and not (folder / "blobs").exists():
        try:
            adapterhub.open(folder)
            raise AssertionError("an empty file is no hub")
        except NotFound:
            return False
    return database.exists()


def is_lost(folder):
    """A hub whose index is damaged, or gone: it says so, and nothing else."""
    try:
        adapterhub.open(folder).releases()
        return False
    except NotFound:
        return True
    except HubError as error:
        assert error.code == 4 and error.hint
        return True


def state(folder):
    """What anyone can see of every hub in the folder and of an exported bundle; every hub is sound."""
    seen = {}
    for name in ("hub", "fresh", "registry", "lost", "restored"):
        if name == "lost" and (folder / name).exists() and is_lost(folder / name):
            continue
        if hub_in(folder / name):
            hub = adapterhub.open(folder / name)
            assert hub.verify() == [], hub.verify()
            seen[name] = tuple((str(row), row.digest, row.tags, row.yanked) for row in hub.releases())
    if (folder / "out").exists():
        seen["out"] = tuple(sorted(path.name for path in (folder / "out").rglob("*")))
    if (folder / "torn").exists():  # repair mends one blob after the other
        seen["torn"] = "sound" if adapterhub.open(folder / "torn").verify() == [] else "damaged"
    if (folder / "out.tar").exists():
        seen["backup"] = digest_of((folder / "out.tar").read_bytes())
    return seen


def needless(folder):
    """Files in the hub's blobs that no release is made of, and half-written ones anywhere."""
    hub = adapterhub.open(folder / "hub")
    needed = {hub.store.path(b.digest) for file in hub.index.files() for b in hub.store.blobs(file)}
    return sorted(half_written(folder) | {path for path in hub.root.glob("blobs/*/*/*") if path not in needed})


def half_written(folder):
    found = folder.rglob("*" + durable.TEMPORARY)
    return {path for path in found if not any(above.name.endswith(durable.TEMPORARY) for above in path.parents)}
