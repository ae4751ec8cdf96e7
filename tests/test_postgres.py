"""The index over PostgreSQL: the same calls, the same answers. Runs where a server's programs and psycopg are installed."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crashed import TENSORS, large, publish

import adapterhub
from adapterhub.errors import HubError, NameInUse, TagMoved, UsageError
from adapterhub.versions import lineage, rollback, yank

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
