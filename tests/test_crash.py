"""A command killed, or refused by the disk, at any durable step leaves the old state or the new one.

Every step is tried, not a sample: a child is forked from this warm process for n = 1, 2, ... until the command gets through.
The steps are what adapterhub.files.durable announces; tests/test_strace.py holds them against what the kernel was asked for.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import adapterhub_registry.migrate  # (imported here once, not in each child)
import pytest
from crashed import COMMANDS, LARGE, TENSORS, WIDE, make_before, make_wide, publish
from failpoints import Steps, child, die, every_step, full, half_written, is_lost, needless, state

import adapterhub
from adapterhub.errors import HubError
from adapterhub.files import durable
from adapterhub.share.registry import push
from adapterhub.store import gc


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
    return make_before(room / "before")


@pytest.fixture(scope="module")
def wide(room):
    return make_wide(room / "wide")


LONG = {
    "init",
    "install a bundle",
    "install from a hub",
    "publish parts",
    "rebuild",
    "repair",
    "restore",
    "sync",
}
"""Commands of very many steps. Not `merge`: torch gives slow tests threads, and a process with those cannot fork into it."""
EVERY = [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in COMMANDS]
AGAIN = {"remove", "export", "yank", "rebuild", "backup", "restore"}
"""Commands that say so when what they do is done already."""


def names(paths):
    return sorted(path.name for path in paths)


def states_of(name, before, work_in):
    """(old, new): `old` a list, as `init` shows the empty hub between."""
    folder = Path(shutil.copytree(before, work_in / "reference"))
    old = [state(folder)]
    COMMANDS[name](folder)
    new = state(folder)
    if name == "init":
        old.append(old[0] | {"fresh": ()})
    shutil.rmtree(folder)
    return old, new


@pytest.mark.parametrize("name", EVERY)
def test_A1_A2_killed_at_every_step(name, before, wide, work_in):
    before = wide if name in WIDE else before
    old, new = states_of(name, before, work_in)
    seen = []
    for n, folder, code, answer in every_step(COMMANDS[name], before, work_in, die):
        assert code == 137 or answer == "through", (n, code, answer)
        now = state(folder)
        assert now in [*old, new], f"killed at step {n}: {now}"
        seen.append(now == new)
        try:  # the next run needs no step by hand; what is done already is told
            COMMANDS[name](folder)
        except HubError:
            assert now == new and name in AGAIN, name
        assert state(folder) == new
        if name not in ("export", "init", "backup", "restore"):
            for hub in (
                "hub",
                "fresh",
                *(n for n in ("torn", "lost") if (folder / n).exists() and not is_lost(folder / n)),
            ):
                gc.gc(adapterhub.open(folder / hub))
            left = [path for path in needless(folder) if folder / "project" not in path.parents]  # no folder of gc's
            assert left == [], n
            assert state(folder) == new
    if new not in old:
        assert seen == sorted(seen) and seen[-1] and not seen[0]  # old, old, ..., new: one step makes it so
    assert len(seen) >= 2


@pytest.mark.parametrize("name", EVERY)
def test_A5_a_full_disk_at_every_step(name, before, wide, work_in):
    before = wide if name in WIDE else before
    old, new = states_of(name, before, work_in)
    errors = 0
    for n, folder, code, answer in every_step(COMMANDS[name], before, work_in, full):
        now = state(folder)
        assert now in [*old, new], (n, now)
        assert code == 0, (n, code)
        if answer not in ("through", "survived"):
            errors += 1
            kind, message, hint = answer
            assert kind == "DiskFull" and str(folder) in message and "\n" not in message and hint, answer
            assert now == new or half_written(folder) == set(), (n, answer)
            if now != new and name not in ("gc", "migrate"):
                assert names(needless(folder)) == names(needless(before)), (n, answer)
        if now != new:
            COMMANDS[name](folder)
            assert state(folder) == new
    assert errors >= 1


def test_A1_only_one_step_of_an_install_makes_it_so(before, work_in):
    """Bytes, their sync, the name, its folder's sync; and only then the commit: the order that survives a power cut."""
    folder = Path(shutil.copytree(before, work_in / "all"))
    with Steps() as steps:
        COMMANDS["install a bundle"](folder)
    trace = steps.trace[: [step for step, *_ in steps.trace].index("commit")]
    written, synced, renamed, safe = {}, set(), {}, set()
    for step, path, to in trace:
        if step == "write":
            written[path] = True
            synced.discard(path)
        elif step == "fsync":
            synced.add(path)
            safe |= {target for target in renamed if str(Path(target).parent) == path}
        elif step == "rename":
            assert path in synced, "renamed before its bytes were synced"
            renamed[str(to)] = path
    hub, old = adapterhub.open(folder / "hub"), adapterhub.open(before / "hub")
    had = {b for f in old.index.files() for b in old.store.blobs(f)}
    fresh = {str(hub.store.path(b.digest)) for f in hub.index.files() for b in hub.store.blobs(f) if b not in had}
    assert len(fresh) >= 4 and fresh == set(renamed) == safe


def test_A2_rows_go_before_their_blobs(before, work_in):
    folder = Path(shutil.copytree(before, work_in / "all"))
    with Steps() as steps:
        COMMANDS["remove"](folder)
    names = [step for step, *_ in steps.trace]
    assert "unlink" in names and names.index("commit") < names.index("unlink")


@pytest.fixture
def registry(work_in, monkeypatch):
    """A registry over a hub in `work_in`, in a thread of this process; its address and its hub."""
    from served import serving

    hub = adapterhub.open(work_in / "served", create=True)
    monkeypatch.setenv("ADAPTERHUB_TOKEN", "secret")
    with serving(hub, token="secret") as url:
        yield url, hub


def test_A2_a_push_killed_at_every_request(before, work_in, registry):
    """The registry has no version, or the whole one; what has come is not sent again."""
    url, there = registry
    hub = adapterhub.open(before / "other")

    def command(folder):
        push(hub, "me/child", url)

    seen = []
    for _, _, code, answer in every_step(command, before, work_in, die, kinds=("send",)):
        assert code == 137 or answer == "through"
        assert there.verify() == []
        seen.append([row.name for row in there.releases()])
    assert seen[0] == [] and seen[-1] == ["me/child", "me/parent"] and len(seen) > 5
    assert all(names in ([], ["me/parent"], ["me/child", "me/parent"]) for names in seen)
    with Steps() as steps:
        command(before)
    assert [step for step in steps.trace if str(before) in step[1]] == []  # here it writes nothing


@pytest.mark.parametrize("limit", [1 << 10, 16 << 10, 60 << 10, 200 << 10])
def test_A6_a_real_limit_of_the_file_size(before, work_in, limit):
    """The kernel refuses: a journal, the database or a blob, whichever is too large first."""
    folder = Path(shutil.copytree(before, work_in / "all"))
    old = state(folder)

    def limited(*what):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        publish(adapterhub.open(folder / "hub"), *what)

    code, (kind, message, hint) = child(lambda: limited("me/large", LARGE))
    assert code == 0 and kind in ("DiskFull", "HubError") and str(folder) in message and hint
    assert state(folder) == old and half_written(folder) == set()
    publish(adapterhub.open(folder / "hub"), "me/large", LARGE)
    assert "me/large@0.1.0" in str(state(folder))


def test_A7_a_blob_that_cannot_be_read(before, work_in, monkeypatch):
    folder = Path(shutil.copytree(before, work_in / "all"))
    hub = adapterhub.open(folder / "hub")
    file = hub.resolve("me/going").manifest.files["tensors"]
    path = hub.store.path(file.digest)
    path.unlink()
    path.mkdir()  # reading it is an error of the operating system, for root too
    with pytest.raises(HubError) as caught:
        hub.store.read(file)
    assert caught.value.code == 4 and str(path) in str(caught.value)
    assert hub.store.read(hub.resolve("me/old").manifest.files["tensors"]) == TENSORS
    assert [problem.path for problem in hub.verify()] == [path]


def test_A8_a_hub_that_may_only_be_read():
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
            hub = adapterhub.open(folder / "hub")
            assert hub.resolve("me/x") == release and hub.store.read(release.manifest.files["tensors"]) == TENSORS
            with hub.store.shared():
                assert hub.verify() == []
            for write in (lambda: publish(hub, "me/y"), lambda: hub.remove("me/x"), lambda: hub.tag("me/x", "t")):
                try:
                    write()
                    return "written"
                except HubError as error:
                    assert error.hint and "\n" not in str(error)
            return "refused"

        assert child(look) == (0, "refused")
        for path in [hub.root, *hub.root.rglob("*")]:
            os.chmod(path, 0o755)


def test_A8_no_home_and_a_cache_that_cannot_be_written(tmp_path):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    publish(hub)
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "ADAPTERHUB_CACHE": "/proc/none"}
    environment["ADAPTERHUB_HOME"] = str(hub.root)
    for arguments, code in ((["list"], 0), (["show", "me/x"], 0), (["key", "new"], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "adapterhub", *arguments],
            cwd=hub.root,
            env=environment,
            capture_output=True,
            text=True,
        )
        if code and os.getuid() == 0 and done.returncode == 0:
            shutil.rmtree("/nonexistent", ignore_errors=True)  # root may write anywhere
            continue
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_A9_another_file_system(before, tmp_path):
    """A link cannot cross it: then it is a copy, inside the target."""
    if os.stat(before).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("both folders are on one file system here")
    hub = adapterhub.open(tmp_path / "hub", create=True)
    release = hub.install(f"{before / 'other'}:me/child")[0]
    assert hub.verify() == []
    for blob in hub.store.blobs(release.manifest.files["tensors"]):
        assert hub.store.path(blob.digest).stat().st_nlink == 1


def test_A9_on_one_file_system_a_blob_gets_a_second_name(before, work_in):
    hub = adapterhub.open(work_in / "hub", create=True)
    release = hub.install(f"{before / 'other'}:me/child")[0]
    large = hub.store.parts(release.manifest.files["tensors"])[-1]
    assert hub.store.path(large.digest).stat().st_nlink == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_A10_a_signal_in_the_middle(before, work_in, number, code):
    """The temporary file goes, the lock is free, and the exit status says which signal it was."""
    folder = Path(shutil.copytree(before, work_in / "all"))
    program = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell starts in the background ignores it
        "from adapterhub.files import durable\n"
        "def watch(step, path, detail=None):\n"
        "    if step == 'rename':\n"
        "        sys.stdout.write('now\\n')\n"
        "        sys.stdout.flush()\n"
        "        time.sleep(2)\n"
        "durable.watch = watch\n"
        "from adapterhub.cli.app import main\n"
        "sys.argv = ['adapterhub', 'install', sys.argv[1]]\n"
        "main()\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program, str(folder / "bundle")],
        env={**os.environ, "ADAPTERHUB_HOME": str(folder / "hub")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert running.stdout.readline().startswith(b"now")
    running.send_signal(number)
    _, told = running.communicate(timeout=20)
    assert running.returncode == code and b"Traceback" not in told, told
    assert half_written(folder) == set() and names(needless(folder)) == names(needless(before))
    with adapterhub.open(folder / "hub").store.alone(wait=False) as held:
        assert held


def test_A10_a_reader_that_goes_away(before):
    """`adapterhub list | head -0`: the status of SIGPIPE, and no word about it."""
    running = subprocess.Popen(
        [sys.executable, "-m", "adapterhub", "list"],
        env={**os.environ, "ADAPTERHUB_HOME": str(before / "hub")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    running.stdout.close()
    assert (running.wait(), running.stderr.read()) == (141, b"")


def test_A12_a_clock_that_was_set(before, work_in, monkeypatch):
    """A year back or forward: leases, ages and shares of verify do not fail, and nothing needed goes."""
    for shift in (-365, 365):
        folder = Path(shutil.copytree(before, work_in / f"clock{shift}"))
        old = state(folder)
        now = time.time()
        with monkeypatch.context() as patch:
            patch.setattr(gc.time, "time", lambda now=now, shift=shift: now + shift * 86400)
            hub = adapterhub.open(folder / "hub")
            (hub.root / "training" / "run").mkdir(parents=True)
            (hub.root / "training" / "run" / "x").write_bytes(b"1")
            gone = {stray.path.name for stray in gc.gc(hub)}
            assert ("run" in gone) == (shift > 0)
            assert hub.verify(0.05) == []
        assert state(folder) == old


@pytest.mark.slow
def test_A3_twenty_processes_killed_at_any_moment(before, work_in):
    """Whole processes running whatever commands, SIGKILLed by the clock."""
    folder = Path(shutil.copytree(before, work_in / "all"))
    program = "import sys; from crashed import loop; loop(sys.argv[1], int(sys.argv[2]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "support")}
    for seed in range(20):
        running = subprocess.Popen(
            [sys.executable, "-c", program, str(folder), str(seed)], env=environment, stdout=subprocess.PIPE
        )
        assert running.stdout.readline()
        timer = threading.Timer(0.05 + 0.06 * seed, running.kill)
        timer.start()
        running.wait()
        timer.cancel()
        assert running.returncode == -9
        hub = adapterhub.open(folder / "hub")
        assert hub.verify() == [] and len(half_written(folder)) <= (seed + 1) * durable_workers()
    gc.gc(adapterhub.open(folder / "hub"), force=True)
    assert needless(folder) == []


def durable_workers():
    from adapterhub.store.blobs import WORKERS

    return WORKERS


assert durable and adapterhub_registry
