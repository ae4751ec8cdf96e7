"""The index over PostgreSQL: the same calls, the same answers. Runs where a server's programs and psycopg are installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from crashed import TENSORS, large, publish
from fault_server import wait_until

import adapterhub
from adapterhub.errors import HubError, NameInUse, TagMoved, UsageError
from adapterhub.share.registry import push
from adapterhub.sources.registry import Registry
from adapterhub.store.history import lineage, rollback, yank

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("psycopg", reason="psycopg is not installed (the extra postgres)")
    if not BINARIES and not shutil.which("initdb"):
        pytest.skip("no PostgreSQL server is installed")
    home = BINARIES[-1].parent if BINARIES else Path(shutil.which("initdb")).parent
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        user = {}
        if os.getuid() == 0:  # the server refuses to run as root
            os.chmod(folder, 0o777)
            user = {"user": 65534, "group": 65534}
        data = Path(folder) / "data"
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
        subprocess.run([home / "initdb", "-D", data, "-U", "ah", "--auth=trust", "-N"], **quiet)
        running = subprocess.Popen(
            [home / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-F"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user,
        )  # fmt: skip
        try:
            for _ in range(200):
                if not subprocess.run(
                    [home / "pg_isready", "-h", folder], stdout=subprocess.DEVNULL, check=False
                ).returncode:
                    break
                time.sleep(0.05)
            yield folder, home
        finally:
            running.send_signal(signal.SIGINT)  # whoever is still connected is cut off; SIGTERM would wait for them
            running.wait(60)


@pytest.fixture
def url(server, request):
    folder, home = server
    name = f"t{abs(hash(request.node.name))}"
    subprocess.run([home / "createdb", "-h", folder, "-U", "ah", name], check=True)
    return f"postgresql+psycopg://ah@/{name}?host={folder}"


def test_everything_that_an_index_does(url, tmp_path):
    hub = adapterhub.open(tmp_path / "hub", create=True, database=url)
    parent = publish(hub, "me/parent", large(1))
    child = publish(hub, "me/child", large(2), [parent])
    assert hub.resolve("me/child") == child and hub.index.find(parent.digest) == parent
    assert [row.name for row in hub.index.search(["CHILD", "lora"])] == ["me/child"]
    assert [str(row) for row in hub.index.releases(after=("me/child", "0.1.0"))] == ["me/parent@0.1.0"]
    assert hub.index.children(parent.digest) == ["me/child@0.1.0"] and hub.index.missing_parents() == []
    assert len(list(lineage(hub, child))) == 2
    publish(hub, "me/child", large(3), [parent])
    for version in ("0.1.0", "0.2.0"):
        hub.tag(f"me/child@{version}", "stable")
    with pytest.raises(TagMoved):
        hub.tag("me/child@0.1.0", "stable", expected="0.1.0")
    assert rollback(hub, "me/child", "stable") == ("0.2.0", "0.1.0")
    yank(hub, "me/child@0.2.0", "bad")
    assert hub.resolve("me/child").version == "0.1.0"
    hub.index.sign(child.digest, b"{}")
    assert hub.index.signatures(child.digest) == [b"{}"]
    hub.index.lease([child.digest], time.time() + 60)
    assert hub.index.leased(time.time()) == {child.digest}
    hub.remove("me/child@0.1.0")
    with pytest.raises(NameInUse):
        publish_as(hub, "0.1.0")
    assert hub.index.gone("me/child") == {"0.1.0": child.digest} and hub.verify() == []
    again = adapterhub.open(tmp_path / "hub", database=url)
    assert again.releases() == hub.releases() and again.index.serial() == hub.index.serial() > 5
    team = adapterhub.open(tmp_path / "team", create=True)
    assert team.bring(disk(again), [again.resolve("me/parent")]) == [parent] and team.verify() == []


def publish_as(hub, version):
    manifest = hub.resolve("me/child@0.2.0").manifest
    return hub.publish(manifest, {"log": b"other"}, None, version=version)


def disk(hub):
    from adapterhub.sources.disk import Disk

    return Disk(hub)


def test_many_writers_give_no_number_twice(url, tmp_path):
    adapterhub.open(tmp_path / "hub", create=True, database=url)

    def work(i):
        return publish(adapterhub.open(tmp_path / "hub", database=url), "me/x", large(i)).version

    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(work, range(16)))
    assert len(set(versions)) == 16


@pytest.mark.slow
@pytest.mark.parametrize("index", ["sqlite", "postgresql"])
def test_8_writers_at_2_servers_of_one_registry_have_one_winner_a_version(index, tmp_path, request, monkeypatch):
    """All push the same six versions, each with content of its own: of each version one is taken, by both servers alike."""
    address = request.getfixturevalue("url") if index == "postgresql" else None
    there = adapterhub.open(tmp_path / "there", create=True, database=address)
    token = there.index.accounts.add(["me/*"], "all")[1]
    monkeypatch.setenv("ADAPTERHUB_TOKEN", token)
    versions = [f"0.{n + 1}.0" for n in range(6)]
    writers = [adapterhub.open(tmp_path / f"w{i}", create=True) for i in range(8)]
    for i, writer in enumerate(writers):
        for n in range(6):
            publish(writer, "me/x", large(10 * i + n))

    def write(i):
        return [outcome(writers[i], f"me/x@{version}", addresses[i % 2]) for version in versions]

    with two_servers(there.root, address) as addresses, ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(write, range(8)))
        for url in addresses:
            listed = {c.version: c.digest for c in Registry(url).candidates("me/x")}
            winners = {
                v: [w for w, got in zip(writers, outcomes, strict=True) if got[n]] for n, v in enumerate(versions)
            }
            assert [len(won) for won in winners.values()] == [1] * 6
            assert listed == {v: won[0].resolve(f"me/x@{v}").digest for v, won in winners.items()}
    again = adapterhub.open(there.root, database=address)
    assert again.verify() == [] and len(again.releases()) == 6


def outcome(hub, reference, url):
    try:
        return push(hub, reference, url)[1]
    except NameInUse:
        return False


@contextmanager
def two_servers(root, database):
    """Their addresses."""
    addresses = []
    with ExitStack() as stack:
        for _ in range(2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [sys.executable, "-m", "adapterhub", "registry", "serve", "--hub", str(root), "--port", str(port)]
            running = subprocess.Popen([*command, *(["--database", database] if database else [])])
            stack.callback(running.wait, 30)
            stack.callback(running.terminate)
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda url=url: reached(url), 60)
            addresses.append(url)
        yield addresses


def reached(url):
    try:
        return httpx.get(f"{url}/v1/").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_database_that_is_not_there_is_told_without_its_password(tmp_path):
    pytest.importorskip("psycopg", reason="psycopg is not installed (the extra postgres)")
    with pytest.raises(HubError) as caught:
        adapterhub.open(tmp_path, create=True, database="postgresql+psycopg://ah:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value) + caught.value.hint


def test_a_url_that_is_none(tmp_path):
    for text in ("nonsense", "nosuchdialect://x"):
        with pytest.raises(UsageError):
            adapterhub.open(tmp_path, create=True, database=text)


assert TENSORS
