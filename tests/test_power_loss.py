"""A power cut: what was not synced is lost, torn or empty, and a name that was not synced may be there or not.

SIGKILL never loses what the kernel has; a power cut does. The steps of a command are logged with their bytes, and for every
moment the states that a file system may leave are built: the worst for the bytes (dropped, zeros, half) times the
worst for the names (lost, or kept). The database is as its last commit left it: that is SQLite's own promise.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from crashed import COMMANDS, make_before

import adapterhub
from adapterhub.files import durable


class Log:
    """Every step with what it did, and the database after each commit."""

    def __init__(self, folder):
        self.folder, self.steps, self.databases = folder, [], []

    def __call__(self, step, path, detail=None):
        if step == "commit":
            self.databases.append(None)  # filled in at the next step, when the commit is done
        data = bytes(detail) if step == "write" else detail
        self._fill()
        self.steps.append((step, Path(path), data))

    def _fill(self):
        path = self.folder / "hub" / "hub.db"
        done = sum(step == "commit" for step, *_ in self.steps)
        while self.databases and done and len(self.databases) >= done and self.databases[done - 1] is None:
            self.databases[done - 1] = path.read_bytes()
            break

    def finish(self):
        self._fill()


def after_the_cut(before, log, moment, torn, keep_names, target):
    """The folder as a cut at `moment` may leave it."""
    folder = Path(shutil.copytree(before, target))
    files: dict[Path, bytes] = {}
    synced: dict[Path, bytes] = {}
    names: list[tuple[Path, Path | None]] = []
    for step, path, detail in log.steps[:moment]:
        if step == "write":
            files[path] = files.get(path, b"") + detail
        elif step == "fsync":
            if path in files:
                synced[path] = files[path]
            else:  # a folder: its names are there for good
                names = [(p, source) for p, source in names if _open(p, source, path, folder, files, synced)]
        elif step in ("rename", "link"):
            names.append((Path(detail), path))
        elif step == "unlink":
            names.append((path, None))
    if keep_names:
        for path, source in names:
            _apply(path, source, folder, files, synced, torn)
    commits = sum(step == "commit" for step, *_ in log.steps[:moment])
    if commits and log.databases[commits - 1] is not None and moment > _index(log, commits):
        (folder / "hub" / "hub.db").write_bytes(log.databases[commits - 1])
    return folder


def _index(log, commits):
    return [i for i, (step, *_) in enumerate(log.steps) if step == "commit"][commits - 1]


def _open(path, source, synced_folder, folder, files, synced):
    """Whether a name is still in doubt; one in a folder that was synced is made here."""
    if path.parent != synced_folder:
        return True
    _apply(path, source, folder, files, synced, None)
    return False


ROOT: dict[str, Path] = {}


def _apply(path, source, folder, files, synced, torn):
    here = folder / path.relative_to(ROOT["ran"])
    if source is None:
        here.unlink(missing_ok=True)
        return
    here.parent.mkdir(parents=True, exist_ok=True)
    if source in files:
        data = synced.get(source)
        if data is None:
            whole = files[source]
            data = {"dropped": b"", "zeros": bytes(len(whole)), "half": whole[: len(whole) // 2], None: b""}[torn]
        here.write_bytes(data)
    else:  # a link to a file that was there for good
        here.write_bytes(Path(source).read_bytes())


@pytest.fixture
def room():
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder).resolve()


def look(folder):
    """What the hub lists, after every byte of it was hashed."""
    hub = adapterhub.open(folder / "hub")
    assert hub.verify() == []
    return tuple((str(row), row.digest) for row in hub.releases())


@pytest.mark.parametrize(
    "name",
    [
        "publish",
        pytest.param("publish parts", marks=pytest.mark.slow),
        pytest.param("install a bundle", marks=pytest.mark.slow),
        "install from a hub",
        "remove",
        "gc",
    ],
)
def test_A4_no_listed_adapter_lacks_a_byte_after_a_power_cut(name, room):
    before = make_before(room / "before")
    ran = Path(shutil.copytree(before, room / "ran"))
    ROOT["ran"] = ran
    old = look(ran)
    log = Log(ran)
    durable.watch = log
    try:
        COMMANDS[name](ran)
    finally:
        durable.watch = None
    log.finish()
    new = look(ran)
    assert len(log.steps) > 2 and log.databases
    seen = set()
    for moment in range(len(log.steps) + 1):
        for torn, keep_names in (("dropped", False), ("dropped", True), ("zeros", True), ("half", True)):
            folder = after_the_cut(before, log, moment, torn, keep_names, room / "cut")
            now = look(folder)
            assert now in (old, new), (moment, torn, keep_names)
            seen.add(now == new)
            shutil.rmtree(folder)
    assert old == new or seen == {False, True}


def test_A4_the_model_sees_a_missing_sync(room):
    """Without the sync of the bytes the same test fails: the model is no formality."""
    before = make_before(room / "before")
    ran = Path(shutil.copytree(before, room / "ran"))
    ROOT["ran"] = ran
    log = Log(ran)
    durable.watch = lambda step, path, detail=None: None if step == "fsync" else log(step, path, detail)
    try:
        COMMANDS["publish"](ran)
    finally:
        durable.watch = None
    log.finish()
    folder = after_the_cut(before, log, len(log.steps), "dropped", True, room / "cut")
    assert adapterhub.open(folder / "hub").verify() != []
