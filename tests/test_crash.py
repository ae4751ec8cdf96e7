"""A command killed, or refused by the disk, at any durable step leaves the old state or the new one.

Every step is tried, not a sample: a child is forked from this warm process for n = 1, 2, ... until the command gets through.
The steps are the calls of the operating system in adapterhub.durable, and the commits of the database.
"""

import errno
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import tempfile
import traceback
from pathlib import Path

import adapterhub_registry.migrate  # noqa: F401 (imported here once, not in each child)
import pytest
from sqlalchemy.engine.default import DefaultDialect

import adapterhub
from adapterhub import durable
from adapterhub.errors import HubError, NotFound
from adapterhub.manifest import Base, File, Made, Manifest, Parent, digest_of

STEPS = ("open", "write", "fsync", "replace", "unlink", "mkdir")
HEADER = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
TENSORS = len(HEADER).to_bytes(8, "little") + HEADER + b"\1\2\3\4"


class Steps:
    """`os` for adapterhub.durable, with something happening at the n-th step of a command."""

    def __init__(self, n, happen):
        self.count, self.n, self.happen, self.trace = 0, n, happen, []

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in STEPS:
            return call

        def step(*args, **more):
            self.at(name, args)
            return call(*args, **more)

        return step

    def at(self, name, args):
        self.count += 1
        self.trace.append((name, args))
        if self.count == self.n:
            self.happen(name, args)

    def install(self, monkeypatch):
        monkeypatch.setattr(durable, "os", self)
        commit = DefaultDialect.do_commit

        def committed(dialect, connection):
            self.at("commit", ())
            commit(dialect, connection)
            self.at("committed", ())

        monkeypatch.setattr(DefaultDialect, "do_commit", committed)


def die(name, args):
    """Before the step; of a write, the first half is done."""
    if name == "write":
        os.write(args[0], bytes(args[1])[: len(args[1]) // 2])
    os._exit(137)


def full(name, args):
    if name == "committed":
        os._exit(137)  # a commit that is done cannot be refused
    if name == "commit":
        raise sqlite3.OperationalError("database or disk is full")
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


def publish(hub, name="me/x", tensors=TENSORS, parents=()):
    base = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))
    parents = [Parent(name=p.name, version=p.version, digest=p.digest, relation="on") for p in parents]
    manifest = Manifest(name=name, version="0.0.0", base=base, method=Made(name="lora"), parents=parents)
    return hub.publish(manifest, {"tensors": tensors, "log": b"log" + name.encode()}, b"rows")[0]


@pytest.fixture(scope="module")
def room():
    """In memory where the system has that: what a power cut would leave is tested by the order of the calls."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder).resolve()


@pytest.fixture
def work_in(room):
    with tempfile.TemporaryDirectory(dir=room) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def before(room):
    """A folder with a hub to work on, and one to install from."""
    folder = room / "before"
    hub = adapterhub.open(folder / "hub", create=True)
    publish(hub, "me/old")
    publish(hub, "me/going", TENSORS[:-1] + b"\5")
    hub.tag("me/going", "stable")
    other = adapterhub.open(folder / "other", create=True)
    parent = publish(other, "me/parent", TENSORS[:-1] + b"\6")
    publish(other, "me/child", TENSORS[:-1] + b"\7", [parent])
    other.export_bundle("me/child", folder / "bundle")
    return folder


COMMANDS = {
    "publish": lambda hub: publish(hub, "me/new", TENSORS[:-1] + b"\x08"),
    "install a bundle": lambda hub: hub.install(hub.root.parent / "bundle"),
    "install from a hub": lambda hub: hub.install(f"{hub.root.parent / 'other'}:me/child"),
    "remove": lambda hub: hub.remove("me/going"),
    "tag": lambda hub: hub.tag("me/old", "stable"),
    "export": lambda hub: hub.export_bundle("me/old", hub.root.parent / "out"),
    "init": lambda hub: publish(adapterhub.open(hub.root.parent / "fresh", create=True)),
}


EVERY = [
    pytest.param(command, marks=[pytest.mark.slow] if command in ("init", "install from a hub") else [])
    for command in COMMANDS
]


def hub_in(folder):
    """An empty hub.db with no blobs is none yet: nothing is lost, and `init` goes on."""
    database = folder / "hub.db"
    if database.exists() and not database.stat().st_size and not (folder / "blobs").exists():
        with pytest.raises(NotFound):
            adapterhub.open(folder)
        return False
    return database.exists()


def state(folder):
    """What anyone can see of every hub in the folder and of the bundle; every hub is sound."""
    seen = {}
    for name in ("hub", "fresh"):
        if hub_in(folder / name):
            hub = adapterhub.open(folder / name)
            assert hub.verify() == []
            seen[name] = tuple((str(row), row.digest, row.tags) for row in hub.releases())
    if (folder / "out").exists():
        seen["out"] = tuple(sorted(path.name for path in (folder / "out").rglob("*")))
    return seen


def leftovers(folder):
    """Files that no release needs."""
    found = half_written(folder)
    for name in ("hub", "fresh"):
        if hub_in(folder / name):
            hub = adapterhub.open(folder / name)
            needed = {hub.store.path(file.digest) for file in hub.index.files()}
            found |= {path for path in (folder / name / "blobs").glob("*/*/*") if path not in needed}
    return sorted(found)


def half_written(folder):
    found = folder.rglob("*" + durable.TEMPORARY)
    return {path for path in found if not any(above.name.endswith(durable.TEMPORARY) for above in path.parents)}


def states_of(command, before, work_in):
    """(old, new): each as a list of acceptable states; `init` shows the empty hub between."""
    folder = Path(shutil.copytree(before, work_in / "reference"))
    old = [state(folder)]
    COMMANDS[command](adapterhub.open(folder / "hub"))
    new = state(folder)
    if command == "init":
        old.append(old[0] | {"fresh": ()})
    shutil.rmtree(folder)
    return old, new


def every_step(command, before, work_in, happen):
    """Run the command with `happen` at step 1, 2, ...; yields (n, folder, exit code, answer) until it gets through."""
    for n in range(1, 400):
        folder = Path(shutil.copytree(before, work_in / f"step{n}"))

        def work(folder=folder, n=n):
            with pytest.MonkeyPatch.context() as patch:
                steps = Steps(n, happen)
                steps.install(patch)
                COMMANDS[command](adapterhub.open(folder / "hub"))
            return "through" if steps.count < n else "survived"

        code, answer = child(work)
        yield n, folder, code, answer
        shutil.rmtree(folder)
        if answer == "through":
            return
    raise AssertionError("the command never gets through")


FEWEST_STEPS = {"remove": 6, "tag": 3}


@pytest.mark.parametrize("command", EVERY)
def test_killed_at_every_step(command, before, work_in):
    old, new = states_of(command, before, work_in)
    seen = []
    for n, folder, code, answer in every_step(command, before, work_in, die):
        assert code == 137 or answer == "through", (n, code, answer)
        now = state(folder)
        assert now in [*old, new], f"killed at step {n}: {now}"
        seen.append(now == new)
        assert len(half_written(folder)) <= 1
        # The next run needs no step by hand. (What is there already is told: a removed release, an exported folder.)
        try:
            COMMANDS[command](adapterhub.open(folder / "hub"))
        except HubError:
            assert now == new and command in ("remove", "export")
        assert state(folder) == new
        # ... and what the kill left goes with the next removal.
        hub = adapterhub.open(folder / "hub")
        hub.remove("me/old", force=True)
        if command not in ("export", "init"):
            assert leftovers(folder) == [], n
    assert seen == sorted(seen) and seen[-1] and not seen[0]  # old, old, ..., new: one step makes it so
    assert len(seen) > FEWEST_STEPS.get(command, 10)


@pytest.mark.parametrize("command", EVERY)
def test_a_full_disk_at_every_step(command, before, work_in):
    old, new = states_of(command, before, work_in)
    errors = 0
    for n, folder, exit_code, answer in every_step(command, before, work_in, full):
        now = state(folder)
        assert now in [*old, new], (n, now)
        if exit_code == 0 and answer not in ("through", "survived"):
            errors += 1
            kind, message, hint = answer
            assert kind == "HubError" and str(folder) in message and "\n" not in message and hint, answer
            # After the row is there, what is left to do is tidying; before it, everything must be as it was.
            if now != new:
                assert leftovers(folder) == [], (n, answer)
        else:
            assert exit_code in (0, 137), (n, exit_code)
        if now != new:
            COMMANDS[command](adapterhub.open(folder / "hub"))
            assert state(folder) == new
    assert errors >= (2 if command == "tag" else 5)


@pytest.mark.parametrize("command", ["publish", "install a bundle", "install from a hub"])
def test_nothing_is_listed_before_its_bytes_are_on_disk(command, before, work_in):
    """The order that survives a power cut: bytes, their sync, the name, its folder's sync; and only then the commit."""
    folder = Path(shutil.copytree(before, work_in / "all"))
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(0, die)
        steps.install(patch)
        COMMANDS[command](adapterhub.open(folder / "hub"))
    trace = steps.trace[: [name for name, _ in steps.trace].index("commit")]
    opened, synced, durable_names, renamed = {}, set(), set(), set()
    last = None
    for name, args in trace:
        if name == "open":
            last = str(args[0])
            opened[last] = args[1]
        elif name == "fsync":
            synced.add(last)
            if last in {str(Path(path).parent) for path in renamed}:
                durable_names |= {path for path in renamed if str(Path(path).parent) == last}
        elif name == "write":
            synced.discard(last)
        elif name == "replace":
            temporary, target = map(str, args)
            assert temporary in synced, "renamed before its bytes were synced"
            renamed.add(target)
    hub = adapterhub.open(folder / "hub")
    old = adapterhub.open(before / "hub")
    fresh = {str(hub.store.path(file.digest)) for file in hub.index.files() if file not in old.index.files()}
    assert len(fresh) >= 2 and fresh == renamed == durable_names
    made = [str(args[0]) for name, args in trace if name == "mkdir"]
    assert all(str(Path(path).parent) in synced for path in made)


def test_rows_go_before_their_blobs(before, work_in):
    folder = Path(shutil.copytree(before, work_in / "all"))
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(0, die)
        steps.install(patch)
        COMMANDS["remove"](adapterhub.open(folder / "hub"))
    names = [name for name, _ in steps.trace]
    assert "unlink" in names and names.index("committed") < names.index("unlink")


@pytest.mark.parametrize("limit", [1 << 10, 4 << 10, 16 << 10, 60 << 10, 200 << 10])
def test_a_real_limit_of_the_file_size(before, work_in, limit):
    """The kernel refuses: a journal, the database or a blob, whichever is too large first."""
    folder = Path(shutil.copytree(before, work_in / "all"))
    old = state(folder)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        publish(adapterhub.open(folder / "hub"), "me/large", TENSORS + bytes(300 << 10))

    code, (kind, message, hint) = child(work)
    assert code == 0 and kind == "HubError" and str(folder) in message and hint
    assert "bytes needed" in message
    assert state(folder) == old and leftovers(folder) == []

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        publish(adapterhub.open(folder / "hub"), "me/small")

    code, answer = child(small)
    assert code == 0, answer
    if answer is not None:  # the database itself could not grow
        assert limit < 60 << 10 and "hub.db" in answer[1] and answer[2]
        assert state(folder) == old and leftovers(folder) == []
    publish(adapterhub.open(folder / "hub"), "me/large", TENSORS + bytes(300 << 10))
    assert ("me/large@0.1.0" in str(state(folder))) and leftovers(folder) == []


def test_a_hub_that_may_only_be_read():
    """Looking works; writing is refused in one line."""
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are closed to other users
        folder = Path(outside)
        os.chmod(folder, 0o755)
        hub = adapterhub.open(folder / "hub", create=True)
        release = publish(hub)
        for path in [*hub.root.rglob("*"), hub.root]:
            os.chmod(path, 0o555 if path.is_dir() else 0o444)

        def look():
            if os.getuid() == 0:
                os.setuid(65534)
            mine = adapterhub.open(hub.root)
            return mine.resolve("me/x").digest, len(mine.releases()), mine.verify()

        def change(verb):
            if os.getuid() == 0:
                os.setuid(65534)
            verb(adapterhub.open(hub.root))

        assert child(look) == (0, (release.digest, 1, []))
        for verb in (lambda h: publish(h, "me/y"), lambda h: h.remove("me/x"), lambda h: h.tag("me/x", "t")):
            code, answer = child(lambda verb=verb: change(verb))
            assert code == 0 and answer[0] == "HubError" and str(hub.root) in answer[1] and answer[2]
        code, answer = child(lambda: change(lambda h: adapterhub.open(hub.root / "below", create=True)))
        assert code == 0 and answer[0] == "HubError" and "below" in answer[1]
        for path in [hub.root, *hub.root.rglob("*")]:
            os.chmod(path, 0o755)
