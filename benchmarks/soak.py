"""Long runs of a registry and a hub under load, by their ids in the fault catalogue (docs/soak.md).

    python benchmarks/soak.py B8                  # at full length; prints a row of the table in docs/soak.md
    python benchmarks/soak.py B8 clients=8 seconds=10

What must hold is asserted. Times are printed, never asserted: they are this machine's."""

from __future__ import annotations

import contextlib
import http.client as http_client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

import httpx  # noqa: E402
import scale  # noqa: E402
from crashed import TENSORS, large, publish  # noqa: E402
from failpoints import Steps, die  # noqa: E402

import adapterhub  # noqa: E402
from adapterhub import care, durable  # noqa: E402
from adapterhub.errors import HubError  # noqa: E402
from adapterhub.manifest import digest_of  # noqa: E402
from adapterhub.sources import closure, http  # noqa: E402
from adapterhub.sources.registry import Registry  # noqa: E402
from adapterhub.sources.registry_push import push  # noqa: E402
from adapterhub.versions import lineage  # noqa: E402

TOKEN = "the-token-of-the-soak"
WRITE = {"authorization": f"Bearer {TOKEN}"}
MB = 1 << 20


# --- a server to measure --------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A registry in a process of its own."""

    url: str
    process: subprocess.Popen

    def status(self, field: str) -> int:
        """Bytes, of /proc: VmRSS, VmHWM (the most that it ever was)."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) << 10

    def files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def served(root: Path, *options: str) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "adapterhub", "serve", "--hub", str(root), "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, "ADAPTERHUB_REGISTRY_TOKEN": TOKEN}, stderr=log)
        try:
            one = Served(f"http://127.0.0.1:{port}", process)
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{one.url}/v1/").status_code == 200:
                        break
                time.sleep(0.1)
            else:
                log.seek(0)
                raise AssertionError(log.read().decode())
            yield one
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError("the server does not end") from None


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """A folder, and a token to push with; short pauses between tries."""
    before = os.environ.get("ADAPTERHUB_TOKEN")
    os.environ["ADAPTERHUB_TOKEN"] = TOKEN
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder)
        finally:
            os.environ.pop("ADAPTERHUB_TOKEN")
            if before is not None:
                os.environ["ADAPTERHUB_TOKEN"] = before


def milliseconds(times: list[float]) -> str:
    times = sorted(times)
    return f"p50 {times[len(times) // 2] * 1e3:.1f} ms, p99 {times[int(len(times) * 0.99)] * 1e3:.1f} ms"


def timed(work, items) -> list[float]:
    found = []
    for item in items:
        begin = time.perf_counter()
        work(item)
        found.append(time.perf_counter() - begin)
    return found


# --- A11 ------------------------------------------------------------------------------------------------------------


def a11(most: int = 1000) -> dict[str, object]:
    """kill -9 the server before each step of an upload, a commit, a tag, a yank and a cancelled upload; after each: sound,
    nothing half, and the same requests go through."""
    with room() as folder:
        mine = adapterhub.open(folder / "mine", create=True)
        publish(mine, "me/x", TENSORS)
        before = adapterhub.open(folder / "before", create=True).root
        publish(adapterhub.open(before), "me/old", TENSORS[:-1] + b"\5")
        for n in range(1, most + 1):
            place = Path(shutil.copytree(before, folder / "registry"))
            died = _killed_at(n, place, mine)
            there = adapterhub.open(place)
            assert there.verify() == [], (n, there.verify())
            assert {row.name for row in there.releases()} <= {"me/old", "me/x"}
            assert _killed_at(0, place, mine) is False, n
            assert there.verify() == [] and [str(row) for row in there.releases()] == ["me/old@0.1.0", "me/x@0.1.0"]
            care.gc(there, force=True)
            assert there.verify() == [] and not [*(place / "incoming").glob("*")]
            shutil.rmtree(place)
            if not died:
                return {"kills": n - 1, "bad": 0}
        return {"kills": most, "bad": 0}


def _killed_at(n: int, root: Path, mine: adapterhub.Hub) -> bool:
    """Serve the hub in a fork that ends at the n-th step (0: never) and send it everything; whether it ended so."""
    from adapterhub_registry.serve import server
    from adapterhub_registry.server import make_app

    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    pid = os.fork()
    if pid == 0:
        try:
            durable.watch = Steps(n, die)
            server(make_app(adapterhub.open(root), TOKEN), "127.0.0.1", 0).run(sockets=[listening])
        finally:
            os._exit(0)
    listening.close()
    try:
        _send_everything(url, mine)
        ended, why = False, None
    except (HubError, httpx.HTTPError) as error:
        ended, why = True, error
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert (code == 137) == ended, (n, code, why)
    return ended


def _send_everything(url: str, mine: adapterhub.Hub) -> None:
    tries, http.TRIES = http.TRIES, 1
    try:
        push(mine, "me/x", url)
    finally:
        http.TRIES = tries
    with httpx.Client(base_url=url, headers=WRITE, timeout=30) as client:
        client.put("/v1/tags/me/x?tag=stable&version=0.1.0").raise_for_status()
        client.put("/v1/yanks/me/x?version=0.1.0&reason=bad").raise_for_status()
        client.delete("/v1/yanks/me/x?version=0.1.0").raise_for_status()
        path = f"/v1/uploads/{digest_of(b'given up')}"
        client.post(path, json={"size": 8}).raise_for_status()
        answer = client.patch(path, content=b"give", headers={"content-range": "bytes 0-3/8"})
        assert answer.status_code in (202, 416)
        client.delete(path).raise_for_status()


# --- B8 -------------------------------------------------------------------------------------------------------------


def b8(clients: int = 64, seconds: float = 1800, every: float = 5) -> dict[str, object]:
    """Clients push, pull, tag, yank, and have their versions deleted, beside a gc every few seconds; all of them share a
    large tensor. After a 201 nobody misses a blob, and nothing is ever damaged."""
    with room() as folder, contextlib.ExitStack() as stack:
        there = adapterhub.open(folder / "there", create=True)
        keep = publish(there, "keep/x", TENSORS)
        one = stack.enter_context(served(there.root))
        end, counted, wrong = time.monotonic() + seconds, dict.fromkeys(("push", "pull", "gc", "deleted"), 0), []
        lock = threading.Lock()

        def count(what: str) -> None:
            with lock:
                counted[what] += 1

        def fresh(name: str) -> adapterhub.Hub:
            with lock:  # Alembic makes one database at a time
                return adapterhub.open(folder / name, create=True)

        def client(i: int) -> None:
            mine, name = fresh(f"mine{i}"), f"c{i}/x"
            while time.monotonic() < end and not wrong:
                try:
                    release = publish(mine, name, large(counted["push"] % 250))
                    push(mine, name, one.url)
                    count("push")
                    team = fresh(f"team{i}")
                    source = Registry(one.url)
                    team.bring(source, [source.release(name, release.version)])
                    assert team.store.read(release.manifest.files["tensors"]) and team.verify() == []
                    count("pull")
                    at = {"version": release.version}
                    with httpx.Client(base_url=one.url, headers=WRITE, timeout=60) as http_:
                        http_.put(f"/v1/tags/{name}", params={**at, "tag": "new"}).raise_for_status()
                        http_.put(f"/v1/yanks/{name}", params={**at, "reason": "r"}).raise_for_status()
                        http_.delete(f"/v1/yanks/{name}", params=at).raise_for_status()
                    there.remove(f"{name}@{release.version}")
                    count("deleted")
                    shutil.rmtree(team.root)
                except Exception as error:
                    wrong.append(f"{name}: {type(error).__name__}: {error}")

        def sweep() -> None:
            while time.monotonic() < end and not wrong:
                try:
                    care.gc(there, force=bool(counted["gc"] % 2))
                except Exception as error:
                    wrong.append(f"gc: {error}")
                count("gc")
                time.sleep(every)

        with ThreadPoolExecutor(clients + 1) as pool:
            pool.submit(sweep)
            list(pool.map(client, range(clients)))
        assert not wrong, wrong[:3]
        assert there.verify() == [] and [str(row) for row in there.releases()] == [str(keep)]
        return {"clients": clients, "seconds": seconds, **counted, "unknown blobs": 0, "damaged": 0}


# --- G1, G2 ---------------------------------------------------------------------------------------------------------


def g1(adapters: int = 100_000, versions: int = 3, asked: int = 1000) -> dict[str, object]:
    """List pages, search, show and resolve over HTTP in a large registry; every adapter is on exactly one page."""
    with room() as folder:
        hub, dice = scale.build(folder / "hub", adapters, versions), random.Random(0)
        names = hub.index.names()
        chosen = dice.sample(names, min(asked, len(names)))
        with served(hub.root) as one, httpx.Client(base_url=one.url, timeout=60) as client:

            def get(path: str, **query: object) -> dict:
                answer = client.get(path, params={k: v for k, v in query.items() if v}).raise_for_status()
                return answer.json()

            after, seen, pages = "", [], []
            while after is not None:
                begin = time.perf_counter()
                page = get("/v1/adapters", after=after)
                pages.append(time.perf_counter() - begin)
                seen += [row["name"] for row in page["adapters"]]
                after = page["next"]
            assert seen == names and len(names) == adapters
            digests = [get(f"/v1/adapters/{name}")["releases"][0]["digest"] for name in chosen]
            figures = {
                "adapters": adapters,
                "releases": adapters * versions,
                "show": milliseconds(timed(lambda digest: get(f"/v1/manifests/{digest}"), digests)),
                "resolve": milliseconds(timed(lambda name: get(f"/v1/adapters/{name}"), chosen)),
                "search": milliseconds(timed(lambda n: get("/v1/adapters", q="sql tone"), range(100))),
                "page": f"first {pages[0] * 1e3:.1f} ms, last {pages[-1] * 1e3:.1f} ms",
                "RSS": f"{one.status('VmHWM') >> 20} MB",
            }
            assert one.status("VmHWM") < 500 * MB
            return figures


def g2(versions: int = 10_000, depth: int = 1000) -> dict[str, object]:
    """An adapter of very many versions, and a chain of parents that each need the next, through a registry's lists."""
    with room() as folder:
        hub = adapterhub.open(folder / "hub", create=True)
        publish(hub, "me/many")
        first = hub.resolve("me/many").manifest
        many = [_changed(first, version=f"0.{n // 1000}.{n % 1000}") for n in range(versions)]
        hub.index.remove([hub.resolve("me/many").digest])
        hub.index.add(many)
        chain = [_changed(first, name="me/chain", version="0.0.0")]
        for n in range(1, depth):
            chain.append(_changed(first, chain[-1], name="me/chain", version=f"0.0.{n}"))
        hub.index.add(chain)
        with served(hub.root) as one:
            source = Registry(one.url)
            begin = time.perf_counter()
            listed = source.candidates("me/many")
            took = {"list": time.perf_counter() - begin}
            assert [c.version for c in listed] == [r.version for r in reversed(many)]
            begin = time.perf_counter()
            needed = closure(source, [source.release("me/chain", chain[-1].version)])
            took["closure"] = time.perf_counter() - begin
            assert {r.digest for r in needed} == {r.digest for r in chain}
        begin = time.perf_counter()
        ancestors = list(lineage(hub, chain[-1]))
        took["lineage"] = time.perf_counter() - begin
        assert [a.digest for a in ancestors] == [r.digest for r in reversed(chain)]
        assert [a.depth for a in ancestors] == list(range(depth))
        return {"versions": versions, "depth": depth, **{what: f"{s:.2f} s" for what, s in took.items()}}


def _changed(manifest, parent=None, **changes):
    import msgspec

    from adapterhub.manifest import Parent, Release

    if parent is not None:
        changes["parents"] = [Parent(name=parent.name, version=parent.version, digest=parent.digest, relation="on")]
    changed = msgspec.structs.replace(manifest, **changes)
    return Release(changed, digest_of(changed.encode()))


# --- G5, G6 ---------------------------------------------------------------------------------------------------------


def g5(clients: int = 200, size: int = 50) -> dict[str, object]:
    """Uploads of so many MB at once: the server's memory stays flat, all complete, none waits long for its turn."""
    with room() as folder:
        there = adapterhub.open(folder / "there", create=True)
        publish(there, "keep/x", TENSORS)
        with served(there.root) as one:
            start, begin = one.status("VmRSS"), time.perf_counter()
            pauses: list[float] = []
            with ThreadPoolExecutor(clients) as pool:
                digests = list(pool.map(lambda i: _upload(one.url, i, size, pauses), range(clients)))
            most, took = one.status("VmHWM"), time.perf_counter() - begin
        assert len(set(digests)) == clients and all(there.store.path(digest).is_file() for digest in digests)
        for digest in digests[:5]:
            assert digest_of(there.store.path(digest).read_bytes()) == digest
        assert most < 300 * MB, most
        assert not [*(there.root / "incoming").glob("*.part")]
        return {
            "uploads": clients,
            "each": f"{size} MB",
            "in all": f"{took:.0f} s",
            "memory": f"{start >> 20} -> {most >> 20} MB at most",
            "longest wait for a piece": f"{max(pauses):.1f} s",
        }


def _upload(url: str, seed: int, size: int, pauses: list[float]) -> str:
    """One blob in pieces of 8 MB, made as it goes, so that this process stays small, too."""
    import hashlib

    unit = random.Random(seed).randbytes(1 << 16)
    piece, total = unit * 128, size * MB
    hasher = hashlib.sha256()
    for begin in range(0, total, len(piece)):
        hasher.update(piece[: total - begin])
    digest = "sha256:" + hasher.hexdigest()
    with httpx.Client(base_url=url, headers=WRITE, timeout=600) as client:
        client.post(f"/v1/uploads/{digest}", json={"size": total}).raise_for_status()
        for begin in range(0, total, len(piece)):
            data, asked = piece[: total - begin], time.perf_counter()
            rng = {"content-range": f"bytes {begin}-{begin + len(data) - 1}/{total}"}
            client.patch(f"/v1/uploads/{digest}", content=data, headers=rng).raise_for_status()
            pauses.append(time.perf_counter() - asked)
    return digest


def g6(seconds: float = 3600, rate: float = 50) -> dict[str, object]:
    """So many requests a second for a long time, of every kind, broken ones among them: memory, open files and temporary
    files stay where they were after the first tenth."""
    with room() as folder:
        there = adapterhub.open(folder / "there", create=True)
        release = publish(there, "me/x", large(1))
        blob = max(there.store.parts(release.manifest.files["tensors"]), key=lambda each: each.size)
        with served(there.root) as one, httpx.Client(base_url=one.url, headers=WRITE, timeout=60) as client:
            paths = ["/v1/", "/v1/adapters?q=x", "/v1/adapters/me/x", f"/v1/manifests/{release.digest}", "/v1/none"]
            paths.append(f"/v1/blobs/{blob.digest}")
            begin, n, samples = time.monotonic(), 0, []
            while (now := time.monotonic() - begin) < seconds:
                _one_of_many(one, client, paths, n)
                n += 1
                if n % max(int(seconds * rate / 40), 1) == 0:
                    samples.append((one.status("VmRSS"), one.files()))
                time.sleep(max(0.0, n / rate - now))
            time.sleep(1)
            warm, last = samples[len(samples) // 10], (one.status("VmRSS"), one.files())
        assert last[1] <= warm[1] + 3, samples
        assert last[0] - warm[0] < 30 * MB, samples
        left = [path for path in there.root.rglob("*") if path.suffix in (".part", durable.TEMPORARY)]
        assert not left and there.verify() == []
        return {
            "seconds": seconds,
            "requests": n,
            "RSS": f"{warm[0] >> 20} -> {last[0] >> 20} MB",
            "open files": f"{warm[1]} -> {last[1]}",
            "temporary files": 0,
        }


def _one_of_many(one: Served, client: httpx.Client, paths: list[str], n: int) -> None:
    kind = n % (len(paths) + 4)
    if kind < len(paths):
        client.get(paths[kind])
    elif kind == len(paths):  # an upload that is given up
        path = f"/v1/uploads/{digest_of(b'%d' % n)}"
        client.patch(path, content=b"half", headers={"content-range": "bytes 0-3/8"}).raise_for_status()
        client.delete(path).raise_for_status()
    elif kind == len(paths) + 1:  # one that is not what its digest says
        client.patch(f"/v1/uploads/{digest_of(b'x')}", content=b"y", headers={"content-range": "bytes 0-0/1"})
    elif kind == len(paths) + 2:  # whoever goes away in the middle
        other = http_client.HTTPConnection(one.url.removeprefix("http://"), timeout=30)
        other.putrequest("PUT", "/v1/releases")
        for key, value in {**WRITE, "content-length": "1000"}.items():
            other.putheader(key, value)
        other.endheaders(b"{")
        other.close()
    else:
        client.put("/v1/tags/me/x", params={"tag": "t", "version": "0.1.0"}).raise_for_status()


# --- those that are tests at full length already --------------------------------------------------------------------


def tests(*selected: str, **environment: str):
    """A run of these tests."""

    def run() -> dict[str, object]:
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "slow or not slow", *selected]
        begin = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **environment})
        return {"tests": " ".join(selected), "took": f"{time.perf_counter() - begin:.0f} s"}

    return run


RUNS = {
    "A11": a11,
    "B8": b8,
    "F4": tests("tests/test_registry_access.py", "-k", "f4"),
    "F5": tests("tests/test_registry_clients.py", "-k", "f5", ADAPTERHUB_F5_EXAMPLES="20000"),
    "F11": tests("tests/test_registry_access.py", "-k", "f11"),
    "G1": g1,
    "G2": g2,
    "G4": tests("tests/test_registry_clients.py", "-k", "g4"),
    "G5": g5,
    "G6": g6,
}
"""Id in the catalogue -> a function whose defaults are the full length; it returns what a row shows, and raises when something
does not hold."""


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in RUNS:
        sys.exit(f"{__doc__}\nids: {', '.join(RUNS)}")
    run, begin = RUNS[arguments[0]], time.perf_counter()
    given = dict(each.split("=", 1) for each in arguments[1:])
    figures = run(**{name: float(value) if "." in value else int(value) for name, value in given.items()})
    shown = ", ".join(f"{name} {value}" for name, value in figures.items())
    print(f"| {arguments[0]} | {shown} | {time.perf_counter() - begin:.0f} s |")


if __name__ == "__main__":
    main(sys.argv[1:])
