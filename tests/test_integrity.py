"""Damage is seen, named by its file, and mended from where it is sound; what is not what it should be is refused."""

import json
import os
import random
import shutil
import sqlite3
import threading
import time

import pytest
from crashed import TENSORS, first_schema, large, publish

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import HubError, IntegrityError, ManifestError, UsageError
from adapterhub.recovery import repair
from adapterhub.sources.disk import Disk
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.spec.manifest import File, Manifest
from adapterhub.store import blobs as store
from adapterhub.store import gc, segments, verify


@pytest.fixture
def hub(tmp_path):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    publish(hub, "me/whole")
    publish(hub, "me/parts", large(1))
    return hub


def stored(hub):
    """One file of each kind: (kind, path)."""
    whole, split = (hub.resolve(f"me/{n}").manifest for n in ("whole", "parts"))
    listed, *blobs = hub.store.blobs(split.files["tensors"])
    kinds = {
        "a whole tensor file": whole.files["tensors"].digest,
        "a list of parts": listed.digest,
        "a large part": max(blobs, key=lambda blob: blob.size).digest,
        "a small part": min(blobs, key=lambda blob: blob.size).digest,
        "a log": split.files["log"].digest,
        "a sketch": whole.base.sketch.digest,
    }
    return {kind: hub.store.path(digest) for kind, digest in kinds.items()}


def test_C1_one_flipped_bit_anywhere_in_any_kind_of_file(hub):
    dice = random.Random(0)
    for kind, path in stored(hub).items():
        data = path.read_bytes()
        for bit in dice.sample(range(len(data) * 8), min(200, len(data) * 8)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            found = [problem.path for _, problem in hub.store.verify(hub.index.files())]
            assert set(found) == {path}, (kind, bit)
        with pytest.raises(IntegrityError) as caught:
            for name in ("me/whole", "me/parts"):
                for file in hub.resolve(name).manifest.needs:
                    hub.store.read(file)
        assert str(path) in str(caught.value) and caught.value.code == 4
        path.write_bytes(data)
    assert hub.verify() == []


def test_C1_the_command_names_the_file_and_who_needs_it(hub, monkeypatch, capsys):
    path = stored(hub)["a large part"]
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    monkeypatch.chdir(hub.root)
    assert execute(["verify", "--json"]) == 4
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["path"] == str(path) and problem["releases"] == ["me/parts@0.1.0"]
    assert execute(["verify", "--quick"]) == 0  # its size is right
    path.write_bytes(b"short")
    assert execute(["verify", "--quick"]) == 4
    assert execute(["verify", "--quick", "--full"]) == 2 and execute(["verify", "--subset", "0%"]) == 2


def test_a_share_of_the_blobs_is_another_one_every_day_and_all_in_time(hub):
    for i in range(40):
        publish(hub, f"me/n{i}", TENSORS[:-1] + bytes([i]))
    path = stored(hub)["a whole tensor file"]
    path.write_bytes(TENSORS[:-1] + b"\xff")
    seen = [bool(verify.verify(hub, 0.25, today=day)) for day in range(4)]
    assert seen.count(True) == 1
    with pytest.raises(UsageError):
        verify.parse_share("half")


@pytest.mark.parametrize("size", [0, 1, -1, "n+1"])
def test_C2_a_file_of_another_length(hub, size, monkeypatch):
    """It is found by its length: nothing of it is hashed, however long it is (a list's length is written nowhere)."""

    def hashed(chunks, blob, source):
        assert source != path, "a file of the wrong length was hashed"
        yield from chunks

    monkeypatch.setattr(store, "hashed", hashed)
    for kind, path in stored(hub).items():
        data = path.read_bytes()
        if not data or kind == "a list of parts":
            continue
        path.write_bytes(data + b"x" if size == "n+1" else data[:size])
        for hashing in (True, False):
            [found] = {p for _, p in hub.store.verify(hub.index.files(), lambda blob, yes=hashing: yes)}
            assert found.path == path and f"{path.stat().st_size} bytes instead of {len(data)}" in found.reason
        with pytest.raises(IntegrityError):
            for name in ("me/whole", "me/parts"):
                for file in hub.resolve(name).manifest.needs:
                    hub.store.read(file)
        path.write_bytes(data)


def test_C5_repair_brings_what_is_sound_elsewhere_and_touches_nothing_else(hub, tmp_path, monkeypatch, capsys):
    shutil.copytree(hub.root, tmp_path / "copy")
    places = stored(hub)
    broken = [places["a large part"], places["a list of parts"], places["a sketch"]]
    broken[0].unlink()
    broken[1].write_bytes(b"[]")
    broken[2].write_bytes(b"")
    untouched = {path: path.stat().st_mtime_ns for path in places.values() if path not in broken}
    monkeypatch.chdir(hub.root)
    assert execute(["repair"]) == 4  # nowhere to bring it from
    assert len(hub.verify()) >= 2
    capsys.readouterr()
    assert execute(["repair", "--from", str(tmp_path / "copy"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["mended"]) >= {str(broken[1]), str(broken[2])}
    assert hub.verify() == [] and untouched == {path: path.stat().st_mtime_ns for path in untouched}


def test_C5_a_source_that_is_damaged_too_mends_nothing(hub, tmp_path):
    shutil.copytree(hub.root, tmp_path / "copy")
    path = stored(hub)["a log"]
    path.write_bytes(b"x")
    twin = tmp_path / "copy" / path.relative_to(hub.root)
    twin.write_bytes(b"y")
    done = repair.repair(hub, [Disk(tmp_path / "copy")])
    assert done.mended == [] and [problem.path for problem in done.left] == [path]
    assert path.read_bytes() == b"x"


def test_C7_manifests_that_are_none(hub):
    sound = hub.resolve("me/whole").manifest.encode()
    assert Manifest.decode(sound)
    table = json.loads(sound)
    for bad in (
        sound.replace(b'"name":', b'"name":"me/twice","name":', 1),
        sound + b" ",
        json.dumps(table, indent=1).encode(),
        canonical(table | {"surprise": 1}),
        canonical(table | {"files": {"tensors": {"digest": "sha256:0", "size": 1}}}),
        canonical(table | {"files": {"tensors": {"digest": digest_of(b""), "size": -1}}}),
        canonical(table | {"parents": [{"name": "me/p"}]}),
        canonical(table | {"plugins": {"a\x1b": "1"}}),
        b"",
        b"\xff",
    ):
        with pytest.raises(ManifestError):
            Manifest.decode(bad)


def test_C7_a_bundle_with_another_file_fewer_or_larger(hub, tmp_path):
    hub.export_bundle("me/parts", tmp_path / "sound")
    team = adapterhub.open(tmp_path / "team", create=True)
    for change in ("missing", "larger", "other"):
        folder = shutil.copytree(tmp_path / "sound", tmp_path / change)
        blob = min(path for path in (folder / "blobs").iterdir() if path.stat().st_size > 1)
        if change == "missing":
            blob.unlink()
        else:
            blob.write_bytes(blob.read_bytes() + b"x" if change == "larger" else b"\2" * blob.stat().st_size)
        with pytest.raises(HubError):
            team.install(folder)
        assert team.releases() == [] and not [p for p in team.store.folder.rglob("*") if p.is_file()]
    extra = shutil.copytree(tmp_path / "sound", tmp_path / "extra")
    (extra / "blobs" / ("0" * 64)).write_bytes(b"not named by any manifest")
    team.install(extra)
    assert team.verify() == [] and not team.store.path("sha256:" + "0" * 64).exists()


LISTS = {
    "not a list": b"{}",
    "empty": b"[]",
    "one part": canonical([[digest_of(b"x"), 70200]]),
    "sums to another size": canonical([[digest_of(b"x"), 1], [digest_of(b"y"), 2]]),
    "a negative size": canonical([[digest_of(b"x"), -1], [digest_of(b"y"), 70201]]),
    "a text for a size": canonical([[digest_of(b"x"), "1"], [digest_of(b"y"), 70199]]),
    "a bad digest": canonical([["sha256:../x", 1], [digest_of(b"y"), 70199]]),
    "spaces": b'[["' + digest_of(b"x").encode() + b'", 1], ["' + digest_of(b"y").encode() + b'", 70199]]',
    "deep": b"[" * 100_000,
    "huge number": canonical([[digest_of(b"x"), 10**400], [digest_of(b"y"), 1]]),
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_parts_that_is_none(kind):
    with pytest.raises(IntegrityError):
        segments.decode(LISTS[kind], File(digest=digest_of(LISTS[kind]), size=70200, parts=True))


def test_a_large_tensor_that_two_share_is_stored_once_and_reads_as_it_was(hub):
    data = {seed: large(seed) for seed in (1, 2)}
    second = publish(hub, "me/second", data[2])
    sizes = [path.stat().st_size for path in hub.store.folder.rglob("*") if path.is_file()]
    assert sizes.count(70000) == 1
    first = hub.resolve("me/parts").manifest.files["tensors"]
    assert hub.store.read(first) == data[1] and hub.store.read(second.manifest.files["tensors"]) == data[2]
    assert first.size == len(data[1]) and first.parts
    hub.remove("me/parts")
    assert hub.verify() == [] and hub.store.read(second.manifest.files["tensors"]) == data[2]


def test_C9_a_copy_taken_while_others_work(hub, tmp_path):
    """Restored, it is sound, or says what it lacks; nothing in it is believed that is not what it should be."""
    stop = threading.Event()

    def work():
        i = 0
        while not stop.is_set():
            publish(hub, f"me/n{i}", large(i % 250))
            i += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for turn in range(5):
            time.sleep(0.05)
            copy = tmp_path / f"copy{turn}"
            with hub.store.shared():
                shutil.copytree(hub.root, copy, ignore=shutil.ignore_patterns("*.tmp", "*-journal"))
            try:
                problems = adapterhub.open(copy).verify()
            except HubError as error:
                problems = [error]
            assert all(str(copy) in str(problem) for problem in problems)
    finally:
        stop.set()
        thread.join()
    assert hub.verify() == []


def test_C10_an_older_hub_is_brought_up_to_date_with_a_copy_beside_it(tmp_path):
    first_schema(tmp_path / "old")
    before = (tmp_path / "old" / "hub.db").read_bytes()
    hub = adapterhub.open(tmp_path / "old")
    assert [str(row) for row in hub.releases()] == ["me/first@0.1.0"] and hub.verify() == []
    assert hub.index.search(["first"])[0].name == "me/first"
    assert (tmp_path / "old" / "hub.db.0001.backup").read_bytes() == before
    publish(hub, "me/more", TENSORS)


def test_C10_a_newer_hub_is_refused(hub):
    with sqlite3.connect(hub.root / "hub.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(HubError, match="newer adapterhub") as caught:
        adapterhub.open(hub.root)
    assert caught.value.hint


# --- gc -------------------------------------------------------------------------------------------------------------


def test_gc_says_first_what_would_go(hub, monkeypatch, capsys):
    blob = hub.store.put(b"stray")
    path = hub.store.path(blob.digest)
    (path.parent / f".{path.name}.abcd.tmp").write_bytes(b"half")
    (hub.root / "incoming").mkdir()
    (hub.root / "incoming" / f"{'0' * 64}.part").write_bytes(b"half")
    monkeypatch.chdir(hub.root)
    assert execute(["gc", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["removed"]) == 3 and told["size"] == 13 and path.exists()
    assert execute(["gc"]) == 0
    assert not path.exists() and not list(hub.root.rglob("*.tmp")) and hub.verify() == []
    assert gc.gc(hub) == []


def test_gc_takes_nothing_when_the_index_looks_lost(hub, tmp_path):
    gc.gc(hub)
    everything = sorted(path for path in hub.store.folder.rglob("*") if path.is_file())
    fresh = adapterhub.open(tmp_path / "fresh", create=True)
    shutil.copytree(hub.root / "blobs", fresh.root / "blobs", dirs_exist_ok=True)
    with pytest.raises(HubError, match="although there are blobs"):
        gc.gc(fresh)
    hub.index.remember(gc.FILES_AT_GC, 1000)
    with pytest.raises(HubError, match="1000 at the last gc"):
        gc.gc(hub)
    assert everything == sorted(path for path in hub.store.folder.rglob("*") if path.is_file())
    assert gc.gc(hub, force=True) == []


def test_gc_goes_through_after_most_releases_were_removed_on_purpose(hub):
    for name in ("me/b", "me/c", "me/d"):
        publish(hub, name)
    gc.gc(hub)
    for name in ("me/b", "me/c", "me/d"):
        hub.remove(name)
    listed = sum(1 for _ in hub.index.stored())
    assert hub.index.remembered(gc.FILES_AT_GC) == listed
    assert gc.gc(hub) == [] and hub.verify() == []


def test_gc_takes_nothing_when_a_list_of_parts_is_damaged(hub):
    hub.store.put(b"stray")
    stored(hub)["a list of parts"].write_bytes(b"[]")
    before = sorted(hub.store.folder.rglob("*"))
    with pytest.raises(IntegrityError):
        gc.gc(hub)
    assert before == sorted(hub.store.folder.rglob("*"))


def test_gc_leaves_a_training_that_runs_and_takes_one_that_was_given_up(hub):
    from adapterhub.files import durable

    for name in ("running", "given-up", "recent"):
        (hub.root / "training" / name / "checkpoint").mkdir(parents=True)
        (hub.root / "training" / name / "checkpoint" / "x").write_bytes(b"1")
        (hub.root / "training" / name / "lock").touch()
    (hub.root / "training" / "stages").mkdir()
    (hub.root / "training" / "stages" / "old.json").write_bytes(b"{}")
    past = time.time() - 40 * gc.DAY
    for path in hub.root.glob("training/*/**/*"):
        if "recent" not in str(path):
            os.utime(path, (past, past))
    with durable.lock(hub.root / "training" / "running" / "lock"):
        assert {stray.path.name for stray in gc.gc(hub)} == {"given-up"}  # stages may be the running one's
    assert {stray.path.name for stray in gc.gc(hub)} == {"running", "old.json"}
    assert (hub.root / "training" / "recent").exists()
