"""Long runs of a hub on a disk, for `soak.py`. Each function takes a scale (1.0: full length), returns what it measured as
{words: value}, and raises AssertionError where a promise is broken."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

KILLED = (
    "install a bundle",
    "install from a hub",
    "sync",
    "push",
    "gc",
    "repair",
    "rebuild",
    "migrate",
    "backup",
    "restore",
)
KILLS = 200
BLOBS = 1_000_000


def kills(scale: float = 1.0) -> dict[str, object]:
    """SIGKILL at steps spread over ten commands: the state is the old or the new one, all is sound, and the next run works."""
    from crashed import make_wide

    each = max(1, round(KILLS * scale / len(KILLED)))
    done, bad = 0, []
    with _room() as room:
        before = make_wide(room / "before")
        for name in KILLED:
            tried, wrong = _push_killed(before, room, each) if name == "push" else _killed(name, before, room, each)
            done, bad = done + tried, bad + wrong
    assert bad == [], bad
    return {"kills": done, "bad": len(bad)}


def _killed(name: str, before: Path, room: Path, count: int) -> tuple[int, list[str]]:
    from crashed import COMMANDS
    from failpoints import Steps, child, die, state

    from adapterhub.errors import HubError

    command, again = COMMANDS[name], ("rebuild", "backup", "restore")
    folder = Path(shutil.copytree(before, room / "whole"))
    old = state(folder)
    with Steps() as steps:
        command(folder)
    new, total = state(folder), len(steps.trace)
    shutil.rmtree(folder)
    bad = []
    for turn in range(count):
        n = 1 + turn * total // count
        folder = Path(shutil.copytree(before, room / "killed"))

        def work(folder=folder, n=n):
            with Steps(n, die):
                command(folder)

        code, _ = child(work)
        try:
            now = state(folder)  # which asserts that every hub in it is sound
            assert code == 137 and now in (old, new), f"exit {code}"
            try:
                command(folder)
            except HubError:
                assert now == new and name in again
            assert state(folder) == new
        except Exception as error:
            bad.append(f"{name} killed at step {n} of {total}: {error!r}")
        shutil.rmtree(folder)
    return count, bad


def _push_killed(before: Path, room: Path, count: int) -> tuple[int, list[str]]:
    """The client is killed at a request; then the same push, to the same server, goes through."""
    from failpoints import Steps, child, die
    from served import serving

    import adapterhub
    from adapterhub.share.registry import push

    bad = []
    for turn in range(count):
        there = adapterhub.open(room / f"registry{turn}", create=True)
        with (
            serving(there, token="secret") as url,
            patch.dict(os.environ, {"ADAPTERHUB_TOKEN": "secret", "ADAPTERHUB_REGISTRY": url}),
        ):

            def work(url=url, n=1 + turn % 10):
                with Steps(n, die, kinds=("send",)):
                    push(adapterhub.open(before / "other"), "me/child", url)

            code, _ = child(work)
            try:
                assert code in (0, 137) and there.verify() == []
                push(adapterhub.open(before / "other"), "me/child", url)
                assert [row.name for row in there.releases()] == ["me/child", "me/parent"] and there.verify() == []
            except Exception as error:
                bad.append(f"push killed at request {1 + turn % 10}: {error!r}")
        shutil.rmtree(there.root)
    return count, bad


def no_locks(scale: float = 1.0) -> dict[str, object]:
    """B12: a file system whose `flock` fails: what changes a hub refuses in words, doctor says so, looking goes on."""
    from crashed import publish

    import adapterhub
    from adapterhub.errors import HubError
    from adapterhub.files import platforms
    from adapterhub.store import gc

    refused, real = 0, platforms.fcntl.flock
    with _room() as room:
        hub = adapterhub.open(room / "hub", create=True)
        publish(hub)
        for code in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):

            def refuse(handle: int, how: int, code: int = code) -> None:
                raise OSError(code, os.strerror(code))

            platforms.fcntl.flock = refuse
            try:
                for change in (lambda: publish(hub, "me/y"), lambda: hub.remove("me/x"), lambda: gc.gc(hub)):
                    try:
                        change()
                    except HubError as error:
                        assert "has no locks" in str(error)
                        refused += 1
                assert [str(row) for row in hub.releases()] == ["me/x@0.1.0"]
            finally:
                platforms.fcntl.flock = real
        assert hub.verify() == []
    assert refused == 9
    return {"refused in words": refused, "silent": 0}


def million_blobs(scale: float = 1.0) -> dict[str, object]:
    """G8: gc, `verify --quick` and the first command of a hub with a million blobs; memory of each as a process of its own.

    Half of the blobs are needed, so gc takes the other half."""
    count = max(1000, round(BLOBS * scale))
    with _room() as room:
        _fill(room / "hub", count)
        told: dict[str, object] = {"blobs": count}
        for name, code in {
            "verify --quick": "assert hub.verify('quick') == []",
            "list": "hub.index.releases(limit=200)",
            "gc": f"assert len(care.gc(hub)) == {count // 2}",
            "a second gc": "assert care.gc(hub) == []",
        }.items():
            seconds, megabytes = _measured(room / "hub", code)
            told[f"{name}: seconds"], told[f"{name}: MB"] = round(seconds, 1), round(megabytes)
        base = _measured(room / "hub", "pass")[1]
        told["MB of a process that does nothing"] = round(base)
        for name in ("gc", "a second gc"):
            grown = told[f"{name}: MB"] - base  # type: ignore[operator]
            assert grown < 120 + 700 * count / BLOBS, f"{name} took {grown} MB more than nothing for {count} blobs"
    return told


def _fill(root: Path, count: int) -> None:
    """Rows and files as a publish would make them, many at once and without a sync."""
    from adapterhub_registry import rows, seals
    from adapterhub_registry.tables import blobs, manifests, releases, state
    from sqlalchemy import insert

    import adapterhub
    from adapterhub.spec.digest import digest_of
    from adapterhub.spec.manifest import Base, File, Made, Manifest, Release
    from adapterhub.store.records import KEPT

    hub = adapterhub.open(root, create=True)

    def put(data: bytes) -> File:
        file = File(digest=digest_of(data), size=len(data))
        hub.store.path(file.digest).write_bytes(data)
        return file

    sketch = put(b"rows")
    base = Base(name="tiny", architecture="llama", structure=digest_of(b"s"), sketch=sketch)
    names = set()
    with hub.index._engine.write() as connection:
        for n in range(count // 2 // 50):  # 49 files and the manifest of each
            files = {f"file{i}": put(b"%d %d" % (n, i)) for i in range(49)}
            manifest = Manifest(name=f"me/n{n}", version="0.1.0", base=base, method=Made(name="lora"), files=files)
            put(manifest.encode())
            release = Release(manifest, digest_of(manifest.encode()))
            values = rows.columns(release) | {"id": n + 1, "created": "2026-01-01T00:00:00Z"}
            connection.execute(insert(releases).values(values))
            connection.execute(insert(manifests).values(release=n + 1, data=manifest.encode()))
            connection.execute(insert(blobs), [r | {"release": n + 1} for r in rows.related(manifest)[blobs]])
            names.add(release.name)
        rows.refresh(connection, sorted(names))
        connection.execute(insert(state).values(key=KEPT, value=1))
        seals.set_on(connection, ())
    for n in range(count // 2):
        put(b"stray %d" % n)


def _measured(root: Path, code: str) -> tuple[float, float]:
    """(seconds, largest resident memory in MB) of a process that opens the hub and does this."""
    program = (
        "import resource, sys, adapterhub\nfrom pathlib import Path\nfrom adapterhub.store import gc as care\n"
        f"hub = adapterhub.open(Path(sys.argv[1]))\n{code}\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - begun, float(done.stdout)


def _room():
    """A folder in memory where the system has that."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return _Folder(dir=memory, ignore_cleanup_errors=True)


class _Folder(tempfile.TemporaryDirectory):
    def __enter__(self) -> Path:
        return Path(super().__enter__()).resolve()
