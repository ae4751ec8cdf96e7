"""A backup is one state of a hub in one file; what is restored of it is that hub, and every other file is refused."""

import io
import json
import shutil
import tarfile
import threading

import pytest
from crashed import TENSORS, large, publish

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import DiskFull, IntegrityError, NameInUse, UsageError
from adapterhub.recovery.backup import BLOCK, backup, restore
from adapterhub.spec.digest import canonical
from adapterhub.store.history import yank


@pytest.fixture
def hub(tmp_path):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    parent = publish(hub, "me/parent", large(1))
    publish(hub, "me/child", large(2), [parent])
    hub.tag("me/child", "stable")
    yank(hub, "me/parent@0.1.0", "old")
    return hub


def rows(hub):
    return [*hub.releases()], hub.index.files(), hub.index.serial(), hub.index.tag_moves("me/child", "stable")


def test_what_is_restored_is_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(hub.root)
    assert execute(["backup", str(tmp_path / "b.tar")]) == 0
    assert execute(["backup", str(tmp_path / "b.tar")]) == 1  # it is there
    assert execute(["restore", str(tmp_path / "b.tar"), str(tmp_path / "new")]) == 0
    again = adapterhub.open(tmp_path / "new")
    assert rows(again) == rows(hub) and again.verify() == []
    assert (tmp_path / "new" / "hub.db").read_bytes() == (hub.root / "hub.db").read_bytes()
    backup(again, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert execute(["restore", str(tmp_path / "b.tar"), str(tmp_path / "new")]) == 1  # it holds a hub
    assert execute(["restore", str(tmp_path / "none.tar"), str(tmp_path / "x")]) == 1
    publish(again, "me/more", TENSORS)
    assert again.verify() == []


def test_any_tar_reads_it(hub, tmp_path):
    backup(hub, tmp_path / "b.tar")
    with tarfile.open(tmp_path / "b.tar") as tar:
        names = tar.getnames()
        listed = json.load(tar.extractfile("backup.json"))
        assert names[:2] == ["backup.json", "hub.db"] and names[2:] == sorted(names[2:])
        assert len(names) == 2 + len(listed["blobs"]) and all(member.isreg() for member in tar)


def test_C9_a_backup_while_others_write_is_one_state(hub, tmp_path):
    """Each has all blobs of all that it lists, and a hub that was there before is in it."""
    stop = threading.Event()

    def work():
        i = 0
        while not stop.is_set():
            publish(hub, f"me/n{i % 7}", large(i % 250))
            if i % 3 == 2:
                hub.remove(f"me/n{i % 7}")
            i += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for turn in range(5):
            backup(hub, tmp_path / f"{turn}.tar")
    finally:
        stop.set()
        thread.join()
    for turn in range(5):
        restored = adapterhub.open(restore(tmp_path / f"{turn}.tar", tmp_path / f"{turn}"))
        assert restored.verify() == [] and restored.resolve("me/child").digest == hub.resolve("me/child").digest


def test_a_damaged_hub_is_not_backed_up_as_if_it_were_sound(hub, tmp_path):
    file = hub.resolve("me/child").manifest.files["log"]
    path = hub.store.path(file.digest)
    for damage in (b"x" * file.size, b"short", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(IntegrityError) as caught:
            backup(hub, tmp_path / "b.tar")
        assert str(path) in str(caught.value) and not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*"))


def test_an_index_elsewhere_is_refused_in_words(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.index._engine, "sqlite", False)
    with pytest.raises(UsageError) as caught:
        backup(hub, tmp_path / "b.tar")
    assert "pg_dump" in caught.value.hint and not list(tmp_path.glob("*.tar"))


def refused(data, tmp_path, error=IntegrityError):
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(error) as caught:
        restore(tmp_path / "bad.tar", tmp_path / "out")
    assert caught.value.hint and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    return str(caught.value)


def test_a_backup_with_any_byte_changed_or_missing_is_refused(hub, tmp_path):
    backup(hub, tmp_path / "b.tar")
    data = (tmp_path / "b.tar").read_bytes()
    for place in [*range(0, len(data), 997), 0, 156, 257, len(data) - 1]:
        refused(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], tmp_path)
    for cut in (0, 1, BLOCK, 5000, len(data) - BLOCK, len(data) - 1):
        refused(data[:cut], tmp_path)
    for more in (b"x", bytes(BLOCK), data):
        refused(data + more, tmp_path)


def rewritten(data, change):
    """The backup with its list changed, its own size and header right."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        size = tar.getmember("backup.json").size
        found = json.load(tar.extractfile("backup.json"))
    change(found)
    listed = canonical(found)
    entry = tarfile.TarInfo("backup.json")
    entry.size = len(listed)
    rest = data[BLOCK + -(-size // BLOCK) * BLOCK :]
    return entry.tobuf(tarfile.GNU_FORMAT) + listed + bytes(-len(listed) % BLOCK) + rest


def test_D6_a_hostile_backup_writes_nothing_outside_and_takes_no_room(hub, tmp_path):
    backup(hub, tmp_path / "b.tar")
    data = (tmp_path / "b.tar").read_bytes()
    changes = [
        lambda found: found.update(format=2),
        lambda found: found.update(blobs=found["blobs"][::-1]),
        lambda found: found.update(blobs=found["blobs"] + found["blobs"][-1:]),
        lambda found: found["blobs"][0].__setitem__(0, "sha256:../../x"),
        lambda found: found["blobs"][0].__setitem__(1, -1),
        lambda found: found["blobs"][0].__setitem__(1, 1 << 60),
        lambda found: found["blobs"][0].__setitem__(1, True),
        lambda found: found["index"].__setitem__(1, 1 << 45),
        lambda found: found.update(blobs=[[]]),
        lambda found: found.pop("index"),
    ]
    for change in changes:
        refused(rewritten(data, change), tmp_path)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        entry = tarfile.TarInfo("hub.db")
        entry.type, entry.linkname = kind, "/etc/passwd"
        entry.size = 0
        start = data.index(b"hub.db\0")
        refused(data[:start] + entry.tobuf(tarfile.GNU_FORMAT) + data[start + BLOCK :], tmp_path)
    refused(b"[" * 100_000, tmp_path)
    big = tarfile.TarInfo("backup.json")
    big.size = 200 << 20
    refused(big.tobuf(tarfile.GNU_FORMAT), tmp_path)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(hub, tmp_path, monkeypatch):
    backup(hub, tmp_path / "b.tar")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        told = refused((tmp_path / "b.tar").read_bytes(), tmp_path, DiskFull)
    assert "1.0 kB are free" in told
    assert restore(tmp_path / "b.tar", tmp_path / "out")
    with pytest.raises(NameInUse):
        restore(tmp_path / "b.tar", tmp_path / "out")
