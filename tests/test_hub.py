"""The package manager: publish, resolve, tag, remove, verify; which hub is meant; several processes at once."""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

import adapterhub
from adapterhub.errors import HubError, IntegrityError, ManifestError, NameInUse, NotFound, UsageError
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Parent
from adapterhub.spec.names import Reference
from adapterhub.store.gc import gc


def draft(name="me/x", **changes):
    """A manifest as a verb makes it: the hub fills in version, files and sketch."""
    base = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))
    return Manifest(name=name, version="0.0.0", base=base, **{"method": Made(name="lora")} | changes)


def parent(release, relation="on"):
    return Parent(name=release.name, version=release.version, digest=release.digest, relation=relation)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return adapterhub.open(tmp_path_factory.mktemp("empty"), create=True)


@pytest.fixture
def hub(empty, tmp_path):
    shutil.copytree(empty.root, tmp_path / "hub")
    return adapterhub.open(tmp_path / "hub")


@pytest.fixture
def put(hub):
    """put("me/x", b"tensors", version=None, **changes) -> Release."""

    def put(name="me/x", tensors=b"tensors", version=None, **changes):
        return hub.publish(draft(name, **changes), {"tensors": tensors}, b"rows", version)[0]

    return put


def blobs(hub):
    return {path.name for path in (hub.root / "blobs").rglob("*") if path.is_file()}


# --- which hub ------------------------------------------------------------------------------------------------------


def test_the_nearest_hub_walking_up(tmp_path, monkeypatch):
    outer = adapterhub.open(tmp_path / "a", create=True)
    below = tmp_path / "a" / "b" / "c"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert adapterhub.open().root.samefile(outer.root)
    inner = adapterhub.open("..", create=True)
    assert adapterhub.open().root.samefile(inner.root)


def test_the_users_own_hub_is_made_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path / "home" / "hub"))
    monkeypatch.chdir(tmp_path)
    assert adapterhub.open().root == tmp_path / "home" / "hub"
    assert adapterhub.open().releases() == []
    monkeypatch.delenv("ADAPTERHUB_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert adapterhub.open().root.is_relative_to(tmp_path) and adapterhub.open().root.name == "adapterhub"


def test_a_path_is_a_folder_or_its_database(hub):
    assert adapterhub.open(str(hub.root)).root == hub.root
    assert adapterhub.open(hub.root / "hub.db").root == hub.root
    assert adapterhub.open(hub.root, create=True).root == hub.root


def test_a_path_without_a_hub(tmp_path):
    with pytest.raises(NotFound) as caught:
        adapterhub.open(tmp_path / "none")
    assert f"adapterhub init {tmp_path / 'none'}" in caught.value.hint
    assert not (tmp_path / "none").exists()


def test_a_hub_cannot_be_made_where_a_file_stands(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="file"):
        adapterhub.open(tmp_path / "file", create=True)


# --- publish and resolve --------------------------------------------------------------------------------------------


def test_publish_fills_in_what_the_hub_knows(hub):
    release, new = hub.publish(draft(licence="MIT", metrics={"loss": 0.5}), {"tensors": b"tensors"}, b"rows")
    assert new and str(release) == "me/x@0.1.0"
    assert release.digest == digest_of(release.manifest.encode())
    assert release.manifest.files == {"tensors": File(digest=digest_of(b"tensors"), size=7)}
    assert release.manifest.base.sketch == File(digest=digest_of(b"rows"), size=4)
    assert (release.manifest.licence, release.manifest.metrics) == ("MIT", {"loss": 0.5})
    assert hub.store.read(release.manifest.files["tensors"]) == b"tensors"
    assert adapterhub.open(hub.root).resolve("me/x") == release
    row = hub.releases()[0]
    assert (str(row), row.digest, row.method, row.base, row.size) == ("me/x@0.1.0", release.digest, "lora", "tiny", 7)
    assert hub.verify() == []


def test_versions_go_on_by_the_minor(hub, put):
    assert [put(tensors=b"%d" % i).version for i in range(11)][::5] == ["0.1.0", "0.6.0", "0.11.0"]
    put(tensors=b"x", version="2.3.4")
    assert put(tensors=b"y").version == "2.4.0"
    put(tensors=b"z", version="1.0.0")  # an older line goes on; the newest is still 2.4.0
    assert put(tensors=b"w").version == "2.5.0"
    assert [row.version for row in hub.releases("me/x")][:4] == ["2.5.0", "2.4.0", "2.3.4", "1.0.0"]
    assert hub.resolve("me/x").version == "2.5.0"


def test_after_the_last_minor_a_version_must_be_given(hub, put):
    put(version="0.999999999.0")
    with pytest.raises(NameInUse, match=r"me/x@0\.999999999\.0") as caught:
        put(tensors=b"other")
    assert "give a version" in caught.value.hint and len(hub.releases()) == 1
    assert put(tensors=b"other", version="1.0.0").version == "1.0.0"


def test_the_same_content_again_is_no_new_release(hub, put):
    first, second = put(tensors=b"1"), put(tensors=b"2")
    for tensors, version, expected in [(b"2", None, second), (b"1", None, first), (b"1", "0.1.0", first)]:
        assert hub.publish(draft(), {"tensors": tensors}, b"rows", version) == (expected, False)
    assert len(hub.releases()) == 2
    assert hub.publish(draft(), {"tensors": b"1"}, b"rows", "0.3.0")[1]  # said so: the same content as another version
    assert hub.publish(draft("me/y"), {"tensors": b"1"}, b"rows")[1]


@pytest.mark.parametrize(
    "change", [{"tensors": b"other"}, {"licence": "MIT"}, {"metrics": {"loss": 1}}, {"forms": {"a": ["low_rank"]}}]
)
def test_a_version_never_changes(hub, put, change):
    first = put()
    before = blobs(hub)
    with pytest.raises(NameInUse) as caught:
        put(version="0.1.0", **change)
    assert "me/x@0.1.0" in str(caught.value) and caught.value.hint
    assert hub.resolve("me/x") == first and hub.verify() == [] and blobs(hub) == before
    assert put(**change).version == "0.2.0"


def test_files_are_taken_from_paths(hub, tmp_path):
    (tmp_path / "t").write_bytes(b"from a file")
    release, _ = hub.publish(draft(), {"tensors": tmp_path / "t", "log": b"{}"}, b"rows")
    assert hub.store.read(release.manifest.files["tensors"]) == b"from a file"
    assert hub.releases()[0].size == 13


def test_without_a_sketch_the_manifests_own_must_be_here(hub, put):
    base = put().manifest.base
    again = msgspec.structs.replace(draft("me/y"), base=base)
    assert hub.publish(again, {})[0].manifest.base == base
    strange = msgspec.structs.replace(base, sketch=File(digest=digest_of(b"else"), size=4))
    with pytest.raises(IntegrityError, match="missing"):
        hub.publish(msgspec.structs.replace(draft("me/z"), base=strange), {})


def test_parents_must_be_here_with_that_digest(hub, put):
    base = put("me/base")
    child = put("me/child", parents=[parent(base)])
    assert hub.exact(child.manifest.parents[0]) == base
    for wrong in (
        msgspec.structs.replace(parent(base), digest=digest_of(b"else")),
        msgspec.structs.replace(parent(base), version="9.0.0"),
        msgspec.structs.replace(parent(base), name="me/none"),
    ):
        with pytest.raises(NotFound) as caught:
            put("me/other", b"new", parents=[wrong])
        assert f"{wrong.name}@{wrong.version}" in str(caught.value) and caught.value.hint
    assert len(hub.releases()) == 2 and digest_of(b"new").removeprefix("sha256:") not in blobs(hub)


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        (draft("../x"), UsageError),
        (draft("base"), UsageError),
        (draft(metrics={"loss": float("nan")}), ManifestError),
        (draft(recipe={"path": Path("x")}), ManifestError),
        (draft(licence="\x1b[31m"), ManifestError),
        (draft(compose="0.5*me/x"), ManifestError),
    ],
)
def test_a_manifest_that_cannot_be_read_again_is_not_stored(hub, manifest, error):
    with pytest.raises(error):
        hub.publish(manifest, {"tensors": b"tensors"}, b"rows")
    assert hub.releases() == [] and blobs(hub) == set()


@pytest.mark.parametrize("version", ["1", "1.0", "v1.0.0", "1.0.0rc1", ""])
def test_a_version_that_is_none(hub, version):
    with pytest.raises(UsageError, match="version"):
        hub.publish(draft(), {}, b"rows", version)


def test_a_file_that_is_missing(hub, tmp_path):
    with pytest.raises(HubError, match=r"none\.safetensors"):
        hub.publish(draft(), {"tensors": tmp_path / "none.safetensors"}, b"rows")
    assert hub.releases() == [] and blobs(hub) == set()


def test_resolve(hub, put):
    old, new = put(tensors=b"1", version="0.9.0"), put(tensors=b"2", version="0.10.0")
    hub.tag("me/x@0.9.0", "stable")
    assert hub.resolve("me/x") == new
    assert hub.resolve("me/x@0.9.0") == old == hub.resolve(Reference("me/x", "stable"))
    hub.tag("me/x", "stable")
    assert hub.resolve("me/x@stable") == new and hub.releases()[0].tags == ("stable",)


@pytest.mark.parametrize(
    ("reference", "says", "hint"),
    [
        ("me/sentimnet", "me/sentimnet", "did you mean me/sentiment"),
        ("sentiment", "'sentiment'", "did you mean me/sentiment"),
        ("somebody/else-entirely", "somebody", "adapterhub list"),
        ("me/sentiment@9.9.9", "no 9.9.9", "0.1.0"),
        ("me/sentiment@stable", "no stable", "0.1.0"),
    ],
)
def test_what_is_not_here(hub, put, reference, says, hint):
    put("me/sentiment")
    with pytest.raises(NotFound) as caught:
        hub.resolve(reference)
    assert says in str(caught.value) and hint in caught.value.hint
    for verb in (hub.remove, lambda r: hub.tag(r, "t"), lambda r: hub.export_bundle(r, hub.root / "out")):
        with pytest.raises(NotFound) as caught:
            verb(reference)
        assert says in str(caught.value) and caught.value.hint
    assert len(hub.releases()) == 1 and not (hub.root / "out").exists()


@pytest.mark.parametrize("tag", ["1.0.0", "", "Stable", "a b", "0"])
def test_a_tag_that_is_none(hub, put, tag):
    put()
    with pytest.raises(UsageError, match="tag"):
        hub.tag("me/x", tag)


# --- remove and verify ----------------------------------------------------------------------------------------------


def test_remove_keeps_the_blobs_of_others(hub, put):
    one, two = put(tensors=b"1"), put(tensors=b"2")
    put("me/same", b"1")
    assert hub.remove("me/x@0.1.0") == ["me/x@0.1.0"]
    assert hub.store.path(one.manifest.files["tensors"].digest).exists() and hub.verify() == []
    assert hub.remove("me/x") == ["me/x@0.2.0"]
    assert not hub.store.path(two.manifest.files["tensors"].digest).exists()
    assert hub.remove("me/same") == ["me/same@0.1.0"] and blobs(hub) == set()
    with pytest.raises(NotFound):
        hub.remove("me/same")


def test_a_damaged_index_takes_no_bytes_from_others(hub, put):
    put(tensors=b"1")
    put("me/other", b"2")
    with sqlite3.connect(hub.root / "hub.db") as connection:
        connection.execute("DELETE FROM blobs")
    connection.close()
    there = blobs(hub)
    with pytest.raises(NotFound):  # what a failed publish put, it may not take away either
        gone = Parent(name="me/none", version="0.1.0", digest=digest_of(b""), relation="on")
        put("me/third", b"2", parents=[gone])
    assert hub.remove("me/x") == ["me/x@0.1.0"] and blobs(hub) == there
    assert hub.remove("me/other") == ["me/other@0.1.0"]  # nothing is damaged any more
    gc(hub, force=True)
    assert blobs(hub) == set()


def test_remove_all_versions_of_a_name_and_by_tag(hub, put):
    for i in range(3):
        put(tensors=b"%d" % i)
    hub.tag("me/x@0.2.0", "bad")
    assert hub.remove("me/x@bad") == ["me/x@0.2.0"]
    assert hub.remove("me/x") == ["me/x@0.3.0", "me/x@0.1.0"]
    assert hub.releases() == []


def test_remove_refuses_what_others_were_made_from(hub, put):
    base = put("me/base")
    put("me/child", b"child", parents=[parent(base)])
    with pytest.raises(HubError, match=r"me/child@0\.1\.0") as caught:
        hub.remove("me/base")
    assert caught.value.hint and len(hub.releases()) == 2
    assert hub.remove("me/base", force=True) == ["me/base@0.1.0"]
    assert [(p.reason, p.releases) for p in hub.verify()] == [
        ("the parent me/base@0.1.0 is missing", ("me/child@0.1.0",))
    ]
    put("me/base")  # the same bytes again: the same digest, so the child is whole again
    assert hub.verify() == []


def test_parents_and_children_of_one_name_go_together(hub, put):
    first = put()
    put(tensors=b"more", parents=[parent(first, "continue")])
    assert hub.remove("me/x") == ["me/x@0.2.0", "me/x@0.1.0"]


def test_verify_names_each_damaged_file_and_who_needs_it(hub, put):
    release, _ = put(), put("me/sound", b"sound")
    tensors = hub.store.path(release.manifest.files["tensors"].digest)
    tensors.write_bytes(b"tensorz")
    sketch = hub.store.path(release.manifest.base.sketch.digest)
    sketch.unlink()
    found = {problem.path: problem for problem in hub.verify()}
    assert set(found) == {tensors, sketch}
    assert found[tensors].releases == ("me/x@0.1.0",) and "sha256" in found[tensors].reason
    assert found[sketch].releases == ("me/sound@0.1.0", "me/x@0.1.0") and "missing" in found[sketch].reason
    assert str(tensors) in str(found[tensors]) and "me/x@0.1.0" in str(found[tensors])
    put()  # publishing the same again mends it
    assert hub.verify() == []


def test_verify_names_the_database_when_that_is_damaged(hub, put):
    put()
    path = hub.root / "hub.db"
    data = bytearray(path.read_bytes())
    start = data.index(b'{"base"')
    data[start + 3] ^= 1
    path.write_bytes(data)
    assert [problem.path for problem in hub.verify()] == [path]
    with pytest.raises(IntegrityError, match=r"me/x@0\.1\.0"):
        hub.resolve("me/x")
    assert hub.remove("me/x") == ["me/x@0.1.0"]  # and it can be put right
    put()
    assert hub.verify() == []


# --- several at once ------------------------------------------------------------------------------------------------


def in_processes(count, work):
    """Run work(i) in that many forked processes at once; their exit codes."""
    children = []
    for i in range(count):
        child = os.fork()
        if child == 0:
            try:
                work(i)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_eight_processes_publish_under_one_name(hub):
    def work(i):
        mine = adapterhub.open(hub.root)
        for j in range(3):
            assert mine.publish(draft(), {"tensors": b"%d" % (3 * i + j)}, b"rows")[1]

    assert in_processes(8, work) == [0] * 8
    assert [row.version for row in hub.releases()] == [f"0.{i}.0" for i in range(24, 0, -1)]
    stored = {hub.store.read(hub.resolve(str(row)).manifest.files["tensors"]) for row in hub.releases()}
    assert stored == {b"%d" % i for i in range(24)} and hub.verify() == []


def test_eight_processes_publish_the_same(hub):
    assert in_processes(8, lambda i: hub.publish(draft(), {"tensors": b"tensors"}, b"rows")) == [0] * 8
    assert [str(row) for row in hub.releases()] == ["me/x@0.1.0"] and hub.verify() == []


def test_of_two_that_claim_a_version_one_wins(hub):
    def work(i):
        hub.publish(draft(), {"tensors": b"%d" % i}, b"rows", "1.0.0")

    assert sorted(in_processes(4, work)) == [0, 1, 1, 1]
    gc(hub)  # what the losers put while others were at work
    assert len(hub.releases()) == 1 and len(blobs(hub)) == 3 and hub.verify() == []


def test_publish_beside_remove(hub):
    """Blobs shared by what comes and what goes are never lost."""

    def work(i):
        dice = random.Random(i)
        for _ in range(12):
            name = f"me/x{dice.randrange(3)}"
            if dice.random() < 0.5:
                hub.publish(draft(name), {"tensors": b"%d" % dice.randrange(3)}, b"rows")
            else:
                with suppress(NotFound):
                    hub.remove(name)

    assert in_processes(4, work) == [0] * 4
    assert hub.verify() == []


def test_eight_processes_make_a_hub(tmp_path):
    def work(i):
        hub = adapterhub.open(tmp_path / "new", create=True)
        hub.publish(draft(), {"tensors": b"%d" % i}, b"rows")

    assert in_processes(8, work) == [0] * 8
    assert len(adapterhub.open(tmp_path / "new").releases()) == 8


def test_looking_imports_no_torch(hub, put):
    put()
    code = f"""
import sys, adapterhub
hub = adapterhub.open({str(hub.root)!r})
hub.resolve(str(hub.releases()[0])); hub.verify()
late = ("torch", "alembic", "sqlalchemy.orm", "huggingface_hub", "httpx", "numpy", "rich", "transformers")
print([name for name in late if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_emptied_database_beside_blobs_is_damage(hub, put):
    put()
    (hub.root / "hub.db").write_bytes(b"")
    for create in (False, True):
        with pytest.raises(IntegrityError, match="is empty"):
            adapterhub.open(hub.root, create=create)
    assert (hub.root / "hub.db").read_bytes() == b"" and blobs(hub)
