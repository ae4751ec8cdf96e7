"""Many processes on one hub: all succeed, nothing is torn, and what is needed is never taken away."""

import ast
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from crashed import LARGE, TENSORS, large, publish
from failpoints import child

import adapterhub
from adapterhub.files import durable
from adapterhub.store import gc
from adapterhub.store.blobs import Store

ROOT = Path(__file__).resolve().parent.parent
GC = """
import sys, time, adapterhub
from adapterhub.store import gc as care
from adapterhub.errors import HubError
while True:
    try:
        care.gc(adapterhub.open(sys.argv[1]), force=True)
    except HubError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    time.sleep(0.05)
"""


@pytest.fixture
def source(tmp_path):
    return adapterhub.open(tmp_path / "source", create=True)


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


def started(program, *arguments):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stderr=subprocess.PIPE)


def forked(*works):
    """Each in a process of its own, at once; their exit codes."""
    pids = []
    for work in works:
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                os._exit(1)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_B1_two_processes_install_the_same_at_once(source, hub):
    publish(source, "me/x", LARGE)
    for _ in range(5):
        work = lambda: adapterhub.open(hub.root).install(f"{source.root}:me/x")  # noqa: E731
        assert forked(work, work) == [0, 0]
        assert hub.verify() == [] and len(hub.releases()) == 1
        hub.remove("me/x")


@pytest.mark.slow
def test_B2_sixteen_processes_install_fifty_overlapping_adapters_beside_gc(source, hub):
    shared = [publish(source, f"me/p{i}", large(i)) for i in range(4)]
    names = [publish(source, f"me/a{i}", large(100 + i), [shared[i % 4]]).name for i in range(60)]
    sweeper = started(GC, hub.root)
    dice = random.Random(0)
    command = [sys.executable, "-m", "adapterhub", "install"]
    running = [
        subprocess.Popen(
            [*command, *(f"{source.root}:{name}" for name in dice.sample(names, 50))],
            cwd=hub.root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for _ in range(16)
    ]  # fmt: skip
    told = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 16, told
    assert all("locked" not in text for text in told)
    sweeper.kill()
    assert sweeper.wait() == -9, sweeper.stderr.read()
    assert hub.verify("full") == [] and len(hub.releases()) == 64
    large_blobs = [path for path in hub.store.folder.rglob("*") if path.is_file() and path.stat().st_size == 70000]
    assert len(large_blobs) == 1  # the tensor that all of them share


def test_B3_gc_between_the_blobs_and_the_commit(source, hub, tmp_path):
    """An install that pauses before its row is there; gc waits for it, and then has nothing to take."""
    publish(source, "me/x", LARGE)
    reached, go_on = tmp_path / "reached", tmp_path / "go"

    def install():
        def pause(step, path, detail=None):
            if step == "commit":
                reached.touch()
                while not go_on.exists():
                    time.sleep(0.01)

        durable.watch = pause
        adapterhub.open(hub.root).install(f"{source.root}:me/x")

    pid = os.fork()
    if pid == 0:
        install()
        os._exit(0)
    while not reached.exists():
        time.sleep(0.01)
    taken = []
    sweeping = threading.Thread(target=lambda: taken.extend(gc.gc(hub, force=True)))
    sweeping.start()
    sweeping.join(0.3)
    assert sweeping.is_alive()  # it waits
    go_on.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    sweeping.join(20)
    assert [stray for stray in taken if stray.path.suffix != ".tmp"] == [] and hub.verify() == []
    assert [row.name for row in hub.releases()] == ["me/x"]


def test_B3_a_lease_keeps_what_no_release_needs_yet(hub):
    publish(hub, "me/x")
    blob = hub.store.put(b"on its way")
    hub.index.lease([blob.digest], time.time() + 60)
    assert gc.gc(hub) == []
    hub.index.lease([blob.digest], 0)
    assert [stray.path for stray in gc.gc(hub)] == [hub.store.path(blob.digest)]


def test_B4_the_cache_is_cleaned_beside_those_who_use_it(tmp_path):
    used, free = tmp_path / "used", tmp_path / "free"
    for folder in (used, free):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"1234")
    with durable.lock(tmp_path / "used.lock"):
        gone = {stray.path.name for stray in gc.clean_cache(tmp_path)}
    assert gone == {"free"} and used.exists() and not free.exists()
    assert {stray.path.name for stray in gc.clean_cache(tmp_path)} == {"used", "used.lock"}


def test_B5_a_reader_of_a_blob_that_is_removed_and_comes_back(hub):
    file = hub.store.put(b"weights" * 1000)
    with hub.store.path(file.digest).open("rb") as reader:
        assert reader.read(7) == b"weights"
        hub.store.remove([file.digest])
        hub.store.put(b"weights" * 1000)
        assert reader.read() == b"weights" * 999


def test_B9_a_dead_process_holds_no_lock(hub):
    def hold():
        with hub.store.alone():
            os._exit(137)

    assert child(hold)[0] == 137
    with hub.store.alone(wait=False) as held:
        assert held


def test_B10_eight_processes_read_and_then_write(hub):
    """Each gives the next version to one name, thirty times: no number twice, none refused."""

    def work(seed):
        mine = adapterhub.open(hub.root)
        for i in range(15):
            publish(mine, "me/x", TENSORS[:-1] + bytes([seed]) if i == 0 else large(seed * 20 + i))

    assert forked(*(lambda seed=seed: work(seed) for seed in range(8))) == [0] * 8
    versions = [row.version for row in hub.releases("me/x")]
    assert len(versions) == len(set(versions)) == 8 * 15 and hub.verify() == []


def test_B10_no_transaction_that_writes_begins_deferred():
    """Who will write says so at once: every statement that changes something stands under `self._engine.write()`."""
    tree = ast.parse((ROOT / "registry/adapterhub_registry/database.py").read_text())
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        source = ast.unparse(function)
        changes = any(
            f"{verb}(" in source for verb in (" insert", "(insert", "(delete", "(update", "rows.add", "upgrade")
        )
        if changes and "connection: Connection" not in source.partition("\n")[0]:
            assert "self._engine.write()" in source and "self._engine.read()" not in source, function.name


def test_B11_write_ahead_logging_is_never_on(hub, monkeypatch):
    """It loses commits in versions of SQLite that are still about; a file that has it is set back, and `doctor` tells."""
    with sqlite3.connect(hub.root / "hub.db") as other:
        other.execute("PRAGMA journal_mode = WAL")
    other.close()
    publish(adapterhub.open(hub.root), "me/x")
    with sqlite3.connect(hub.root / "hub.db") as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    other.close()
    done = subprocess.run([sys.executable, "-m", "adapterhub", "doctor"], cwd=hub.root, capture_output=True, text=True)
    assert "journal" in done.stdout


def test_readers_share_and_a_sweeper_waits_for_them(hub):
    order = []

    def sweep():
        with hub.store.alone():
            order.append("swept")

    with hub.store.shared(), hub.store.shared():
        thread = threading.Thread(target=sweep)
        thread.start()
        thread.join(0.2)
        order.append("read")
    thread.join(10)
    assert order == ["read", "swept"]


assert Store and shutil
