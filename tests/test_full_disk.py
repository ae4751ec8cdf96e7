"""A full disk is given back: what a command brought goes again, what takes room is named, and the same command works after."""

import errno
import os
import time

import pytest
from crashed import LARGE, TENSORS, publish
from served import serving

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import DiskFull
from adapterhub.files import durable
from adapterhub.sources.registry import Registry
from adapterhub.spec.digest import digest_of
from adapterhub.store import gc
from adapterhub.store.blobs import identify
from adapterhub.store.partial import PartialBlob

BIG = os.urandom(3 << 20)


class Full:
    """A disk that is full from the n-th write on, until something is removed."""

    def __init__(self, n):
        self.left = n

    def __call__(self, step, path, detail=None):
        if step == "write":
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self):
        durable.watch = self
        return self

    def __exit__(self, *_):
        durable.watch = None


def files(root):
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path):
    hub = adapterhub.open(tmp_path / "source", create=True)
    publish(hub, "me/big", LARGE)
    publish(hub, "me/small")
    return hub


def test_A5_a_fetch_from_a_registry_at_every_write(source, tmp_path):
    """No part stays, the hub is as it was, and the same command works after."""
    hub = adapterhub.open(tmp_path / "hub", create=True)
    publish(hub, "me/old", TENSORS[:-1] + b"\x09")
    with serving(source) as url:
        for n in range(100):
            before = files(hub.root)
            registry = Registry(url)
            release = registry.release("me/big", "0.1.0")
            try:
                with Full(n):
                    hub.bring(registry, [release])
                break
            except DiskFull as error:
                assert "no space left" in str(error) and error.hint
            after = {name: size for name, size in files(hub.root).items() if not name.endswith(".lock")}
            assert after == {name: size for name, size in before.items() if not name.endswith(".lock")}, n
            assert hub.verify() == [] and [str(row) for row in hub.releases()] == ["me/old@0.1.0"]
    assert n > 3 and hub.verify() == [] and len(hub.releases()) == 2


def test_an_upload_that_fills_the_disk_leaves_no_part(source):
    blob = identify(BIG)
    incoming = PartialBlob(source.store, blob)
    with incoming.held():
        incoming.append([BIG[: 1 << 20]])
        assert incoming.offset == 1 << 20
        with pytest.raises(DiskFull), Full(0):
            incoming.append([BIG[1 << 20 :]])
        assert incoming.offset == 0 and not incoming.path.exists()
        incoming.append([BIG])
        incoming.finish()
    assert source.store.fault(blob) is None


def test_the_hint_says_what_takes_room(source, tmp_path, monkeypatch, capsys):
    source.export_bundle("me/small", tmp_path / "bundle")
    hub = adapterhub.open(tmp_path / "hub", create=True)
    publish(hub, "me/old", LARGE)
    stray = hub.store.put(BIG)
    monkeypatch.chdir(hub.root)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "base").write_bytes(bytes(5000))
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))
    with Full(0):
        assert execute(["install", str(tmp_path / "bundle")]) == 1
    told = capsys.readouterr().err
    assert "no space left" in told and "adapterhub gc would free 3.1 MB" in told and "free; " in told
    assert "cache --clean would free 5.0 kB" in told
    assert execute(["gc"]) == 0 and not hub.store.path(stray.digest).exists()
    assert execute(["install", str(tmp_path / "bundle")]) == 0 and hub.verify() == []


def test_gc_takes_a_dead_part_at_once_and_a_leased_one_when_forced(source):
    """A lease is an upload that may go on; whoever knows that it will not says --force."""
    for content, lease in ((b"dead" * 100, 0), (b"alive" * 100, time.time() + 3600)):
        incoming = PartialBlob(source.store, identify(content))
        with incoming.held():
            incoming.append([content[:100]])
        source.index.lease([digest_of(content)], lease)
    dead, alive = (digest_of(content)[7:] for content in (b"dead" * 100, b"alive" * 100))
    assert {stray.path.stem for stray in gc.gc(source)} == {dead}
    assert {stray.path.stem for stray in gc.gc(source, force=True)} == {alive}
    assert gc.gc(source) == [] and source.verify() == []


def test_gc_waits_for_a_writer_that_lives(source):
    """It holds the hub alone: a part that somebody writes to is never looked at."""
    with source.store.shared(), source.store.alone(wait=False) as held:
        assert not held
    assert gc.reclaimable(source) == 0
    with source.store.shared():
        source.store.put(BIG)
        assert gc.reclaimable(source) == 0  # not known while others are at work, and not waited for
    assert gc.reclaimable(source) == len(BIG)
