"""Long runs G1, G2, G5 and G6 of the fault catalogue: a registry that is large, or under load."""

from __future__ import annotations

import http.client as http_client
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

import httpx  # noqa: E402
import scale  # noqa: E402
from crashed import TENSORS, large, publish  # noqa: E402
from soak_server import MB, ROOT, WRITE, Served, milliseconds, room, served, timed  # noqa: E402

import adapterhub  # noqa: E402
from adapterhub.files import durable  # noqa: E402
from adapterhub.sources.registry import Registry  # noqa: E402
from adapterhub.sources.source import closure  # noqa: E402
from adapterhub.spec.digest import digest_of  # noqa: E402
from adapterhub.store.history import lineage  # noqa: E402

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

    from adapterhub.spec.manifest import Parent, Release

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
