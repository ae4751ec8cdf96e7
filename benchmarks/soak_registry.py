"""Long runs A11 and B8 of the fault catalogue: a registry that is killed, and one that many use at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

import httpx  # noqa: E402
from crashed import TENSORS, large, publish  # noqa: E402
from failpoints import Steps, die  # noqa: E402
from soak_server import ROOT, TOKEN, WRITE, room, served  # noqa: E402

import adapterhub  # noqa: E402
from adapterhub.errors import HubError  # noqa: E402
from adapterhub.files import durable  # noqa: E402
from adapterhub.share.registry import push  # noqa: E402
from adapterhub.sources import http  # noqa: E402
from adapterhub.sources.registry import Registry  # noqa: E402
from adapterhub.spec.digest import digest_of  # noqa: E402
from adapterhub.store import gc  # noqa: E402

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
            gc.gc(there, force=True)
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
                    gc.gc(there, force=bool(counted["gc"] % 2))
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
