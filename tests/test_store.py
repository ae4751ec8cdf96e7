"""Files that are there whole or not at all, and blobs that are what their digest says."""

import errno
import hashlib
import os
import random
import threading
import time
from pathlib import Path

import pytest

from adapterhub.errors import HubError, IntegrityError, ManifestError, NameInUse
from adapterhub.files import durable
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import File
from adapterhub.store.blobs import Store, each


def blob_files(store):
    return [path for path in store.folder.rglob("*") if path.is_file()]


def test_put_and_read(tmp_path):
    store = Store(tmp_path)
    file = store.put(b"weights")
    hex_digits = hashlib.sha256(b"weights").hexdigest()
    assert file == File(digest=f"sha256:{hex_digits}", size=7)
    assert store.path(file.digest) == tmp_path / "blobs" / "sha256" / hex_digits[:2] / hex_digits
    assert store.read(file) == b"weights"


def test_put_a_file_larger_than_a_chunk(tmp_path):
    source = tmp_path / "big"
    data = random.Random(0).randbytes(3 * durable.CHUNK + 17)
    source.write_bytes(data)
    store = Store(tmp_path / "hub")
    file = store.put(source)
    assert file == File(digest=digest_of(data), size=len(data))
    assert store.read(file) == data and source.exists()


def test_a_sound_blob_is_not_written_again_and_a_damaged_one_is_mended(tmp_path):
    store = Store(tmp_path)
    file = store.put(b"weights")
    path = store.path(file.digest)
    before = path.stat().st_ino
    store.put(b"weights")
    assert path.stat().st_ino == before
    path.write_bytes(b"Weights")
    store.put(b"weights")
    assert store.read(file) == b"weights"


@pytest.mark.parametrize(
    "damage", [b"", b"w", b"weight", b"weightsx", b"Weights", None], ids=["0", "1", "n-1", "n+1", "bit", "gone"]
)
def test_every_damage_is_seen_by_each_reader(tmp_path, damage):
    store = Store(tmp_path)
    sound, file = store.put(b"sound"), store.put(b"weights")
    path = store.path(file.digest)
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(IntegrityError) as caught:
        store.read(file)
    assert str(path) in str(caught.value) and caught.value.hint
    assert [(f, p.path) for f, p in store.verify([sound, file])] == [(file, path)]
    assert store.read(sound) == b"sound"


def test_one_flipped_bit_anywhere(tmp_path):
    store = Store(tmp_path)
    data = random.Random(1).randbytes(5000)
    file = store.put(data)
    path = store.path(file.digest)
    for bit in random.Random(2).sample(range(len(data) * 8), 200):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert [problem.path for _, problem in store.verify([file])] == [path], bit


def test_bytes_that_are_not_the_expected_ones_are_not_kept(tmp_path):
    store = Store(tmp_path / "hub")
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    for expected in (File(digest=digest_of(b"others!"), size=7), File(digest=digest_of(b"weights"), size=6)):
        with pytest.raises(IntegrityError):
            store.take(expected, [b"weights"], "the bytes given")
        with pytest.raises(IntegrityError):
            store.adopt({expected: source})
    assert blob_files(store) == []


def test_an_endless_source_is_cut_at_the_expected_size(tmp_path):
    """A source that goes on beyond its declared size fills no disk."""
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 40)
    for source in (tmp_path / "long", Path("/dev/zero")):
        with pytest.raises(HubError):
            Store(tmp_path).adopt({File(digest=digest_of(b"x"), size=10): source})
    assert blob_files(Store(tmp_path)) == []


@pytest.mark.parametrize(
    "digest", ["sha256:../../x", "md5:" + "0" * 32, "sha256:" + "A" * 64, "sha256:" + "0" * 63, ""]
)
def test_a_digest_that_is_none_reaches_no_path(tmp_path, digest):
    with pytest.raises(ManifestError):
        Store(tmp_path).path(digest)


def test_what_is_stray_and_what_is_needed(tmp_path):
    store = Store(tmp_path)
    kept, gone = store.put(b"kept"), store.put(b"gone")
    leftover = store.path(kept.digest).parent / f".{'0' * 64}.abcd{durable.TEMPORARY}"
    leftover.write_bytes(b"half")
    assert set(store.stray([kept])) == {store.path(gone.digest), leftover}


def test_a_reader_of_a_replaced_file_sees_the_old_bytes_to_the_end(tmp_path):
    path = tmp_path / "file"
    durable.write_bytes(path, b"old" * 1000)
    with path.open("rb") as reader:
        assert reader.read(3) == b"old"
        durable.write_bytes(path, b"new" * 1000)
        assert reader.read() == b"old" * 999
    assert path.read_bytes() == b"new" * 1000


def test_a_source_that_fails_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    durable.write_bytes(path, b"old")

    def chunks():
        yield b"ne"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        durable.write(path, chunks(), 3)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_is_told_with_path_and_bytes(tmp_path, monkeypatch, call, code):
    def refuse(*_args, **_more):
        raise OSError(code, os.strerror(code))

    store = Store(tmp_path / "hub")
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, call, refuse)
        with pytest.raises(HubError) as caught:
            store.put(b"weights")
    assert str(tmp_path) in str(caught.value) and "bytes" in str(caught.value) and caught.value.hint
    assert ("no space left" in str(caught.value)) == (code == errno.ENOSPC)
    assert blob_files(store) == []
    store.put(b"weights")


def test_a_folder_where_a_file_stands(tmp_path):
    (tmp_path / "hub").write_text("a file")
    with pytest.raises(HubError, match="hub"):
        Store(tmp_path / "hub").put(b"weights")


def test_new_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), durable.new_folder(tmp_path / "out") as folder:
        durable.write_bytes(folder / "a", b"a")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    with durable.new_folder(tmp_path / "out") as folder:
        durable.write_bytes(folder / "below" / "a", b"a")
    assert (tmp_path / "out" / "below" / "a").read_bytes() == b"a"
    with pytest.raises(NameInUse), durable.new_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_the_lock_keeps_others_out(tmp_path):
    entered = threading.Event()

    def enter():
        with durable.lock(tmp_path / "lock"):
            entered.set()

    with durable.lock(tmp_path / "lock"):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(5)
    assert entered.is_set()


def test_a_dead_process_holds_no_lock(tmp_path):
    """The lock is the operating system's: the file may stay, the lock does not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with durable.lock(tmp_path / "lock"):
            os.write(writer, b"x")
            time.sleep(60)
    os.read(reader, 1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    with durable.lock(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("nth", [1, 3])
def test_an_interrupt_while_threads_start_leaves_none_at_work(monkeypatch, nth):
    """A pool does not wait for a thread that it was interrupted in starting: what comes then would never be taken away."""
    start, started, done = threading.Thread.start, [], []

    def interrupted(thread):
        start(thread)
        started.append(thread)
        if len(started) == nth:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            each(lambda item: (time.sleep(0.1), done.append(item)), range(8))
    for thread in started:
        thread.join(10)
    assert len(started) == nth and done == []
