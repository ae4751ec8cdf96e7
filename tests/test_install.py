"""Install from a bundle and from another hub: everything is checked, parents come along, all of it or nothing."""

import json
import os
import random
import shutil
import struct

import msgspec
import pytest

import adapterhub
from adapterhub.errors import HubError, IntegrityError, ManifestError, NameInUse, NotFound, UnsafeFile, UsageError
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Parent, Release


def safetensors(*values, name="a.low_rank.0.up"):
    """A file as the format's definition says: length, JSON header, data."""
    data = struct.pack(f"<{len(values)}f", *values)
    header = json.dumps({name: {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def publish(hub, name, tensors, parents=(), **changes):
    base = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))
    relation = "compose" if "compose" in changes else "on"
    parents = [Parent(name=p.name, version=p.version, digest=p.digest, relation=relation) for p in parents]
    manifest = Manifest(name=name, version="0.0.0", base=base, method=Made(name="lora"), parents=parents, **changes)
    return hub.publish(manifest, {"tensors": tensors} if tensors else {}, b"rows")[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `source`, a hub in which me/stack was made from me/a and me/b, and both of those from me/root;
    `bundle`, me/stack as a bundle; and `target`, an empty hub. Copied for each test."""
    folder = tmp_path_factory.mktemp("made")
    hub = adapterhub.open(folder / "source", create=True)
    root = publish(hub, "me/root", safetensors(0.5))
    a, b = (publish(hub, f"me/{n}", safetensors(v, v), [root]) for n, v in (("a", 1.0), ("b", 2.0)))
    publish(hub, "me/stack", None, [a, b], compose="me/a@0.1.0 + me/b@0.1.0", licence="MIT")
    publish(hub, "me/stranger", safetensors(9.0))
    hub.export_bundle("me/stack", folder / "bundle")
    adapterhub.open(folder / "target", create=True)
    return folder


@pytest.fixture
def family(made, tmp_path):
    shutil.copytree(made / "source", tmp_path / "source")
    return adapterhub.open(tmp_path / "source")


@pytest.fixture
def bundle(made, tmp_path):
    return shutil.copytree(made / "bundle", tmp_path / "bundle")


@pytest.fixture
def target(made, tmp_path):
    shutil.copytree(made / "target", tmp_path / "target")
    return adapterhub.open(tmp_path / "target")


def listing(hub):
    return {str(row): row.digest for row in hub.releases()}


def blobs(hub):
    return {path.name for path in (hub.root / "blobs").rglob("*") if path.is_file()}


def refused(target, source, error, says):
    with pytest.raises(error) as caught:
        target.install(source)
    assert says in str(caught.value), caught.value
    assert caught.value.hint and "\n" not in str(caught.value) + caught.value.hint
    assert listing(target) == {} and blobs(target) == set() and target.verify() == []


FAMILY = ["me/a@0.1.0", "me/b@0.1.0", "me/root@0.1.0", "me/stack@0.1.0"]


@pytest.mark.parametrize("how", ["bundle", "hub", "hub.db", "version", "tag"])
def test_parents_come_along_byte_for_byte(family, bundle, target, how):
    family.tag("me/stack", "best")
    source = {
        "bundle": str(bundle),
        "hub": f"{family.root}:me/stack",
        "hub.db": f"{family.root}/hub.db:me/stack",
        "version": f"{family.root}:me/stack@0.1.0",
        "tag": f"{family.root}:me/stack@best",
    }[how]
    installed = target.install(source)
    assert str(installed[0]) == "me/stack@0.1.0" and sorted(map(str, installed)) == FAMILY
    assert listing(target) == {name: digest for name, digest in listing(family).items() if name in FAMILY}
    assert target.resolve("me/stack").manifest == family.resolve("me/stack").manifest
    assert target.resolve("me/stack").manifest.licence == "MIT"
    assert target.verify() == [] and blobs(target) < blobs(family)
    before = target.releases()
    assert target.install(source) == installed and target.releases() == before


def test_a_bundle_is_what_its_page_says(family, bundle):
    found = {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert digest_of(found.pop("manifest.json")) == family.resolve("me/stack").digest
    kinds = {name.split("/")[0] for name in found}
    assert kinds == {"manifests", "blobs"} and len(found) == 3 + 4
    for name, data in found.items():
        assert digest_of(data) == "sha256:" + name.split("/")[1].removesuffix(".json")


def test_a_release_without_parents(family, target, tmp_path):
    family.export_bundle("me/stranger", tmp_path / "alone")
    assert list(map(str, target.install(tmp_path / "alone"))) == ["me/stranger@0.1.0"]


def test_install_mends_damage(bundle, target):
    target.install(bundle)
    for path in (path for path in (target.root / "blobs").rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes()[:-1])
    assert len(target.verify()) == 8  # four files and four manifests
    target.install(bundle)
    assert target.verify() == []


def test_export_refuses_to_write_over_something(family, bundle):
    before = sorted(bundle.rglob("*"))
    with pytest.raises(NameInUse):
        family.export_bundle("me/stranger", bundle)
    assert sorted(bundle.rglob("*")) == before


def test_export_of_a_damaged_release_leaves_nothing(family, tmp_path):
    damaged = family.store.path(family.resolve("me/a").manifest.files["tensors"].digest)
    damaged.write_bytes(b"damaged")
    with pytest.raises(IntegrityError) as caught:
        family.export_bundle("me/stack", tmp_path / "out")
    assert str(damaged) in str(caught.value)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


def test_a_version_that_is_here_with_other_content(family, bundle, target):
    theirs = publish(target, "me/b", safetensors(3.0))
    before = listing(target), blobs(target)
    for source in (bundle, f"{family.root}:me/stack"):
        with pytest.raises(NameInUse, match=r"me/b@0\.1\.0") as caught:
            target.install(source)
        assert caught.value.hint
        assert (listing(target), blobs(target)) == before
    assert target.resolve("me/b") == theirs and target.verify() == []


# --- sources that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "source", "error", "says", "hint"),
    [
        (None, "nowhere", NotFound, "nowhere", "HUB:name"),
        (None, "me/x", NotFound, "me/x", "HUB:name"),
        (None, "nowhere:me/x", NotFound, "nowhere", "adapterhub init"),
        ("empty/", "empty", NotFound, "manifest.json", "--format bundle"),
        ("peft/adapter_config.json", "peft", UsageError, "PEFT", "adapterhub import"),
        (None, "source", UsageError, "is a hub", ":NAME"),
        (None, "source:me/none", NotFound, "me/none", "adapterhub list"),
        (None, "source:me/stack@7.0.0", NotFound, "7.0.0", "0.1.0"),
        (None, "source:Not A Name", UsageError, "not a name", "a-z0-9"),
        (None, "source:", UsageError, "not a name", "a-z0-9"),
    ],
)
def test_what_cannot_be_installed_from(family, target, tmp_path, monkeypatch, make, source, error, says, hint):
    monkeypatch.chdir(tmp_path)
    if make:
        folder, _, file = make.partition("/")
        (tmp_path / folder).mkdir()
        if file:
            (tmp_path / folder / file).write_text("{}")
    refused(target, source, error, says)
    with pytest.raises(HubError) as caught:
        target.install(source)
    assert hint in caught.value.hint


# --- bundles that lie -----------------------------------------------------------------------------------------------


def a_blob(bundle, family, name="me/a"):
    digest = family.resolve(name).manifest.files["tensors"].digest
    return bundle / "blobs" / digest.removeprefix("sha256:")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "append", "gone"])
def test_a_damaged_blob(family, bundle, target, damage):
    path = a_blob(bundle, family)
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = bytes([*data[:-1], data[-1] ^ 1])
        path.write_bytes({"flip": flipped, "cut": data[:-1], "empty": b"", "append": data + b"\0"}[damage])
    refused(target, bundle, NotFound if damage == "gone" else IntegrityError, path.name)


def test_a_damaged_blob_in_another_hub(family, target):
    path = family.store.path(family.resolve("me/a").manifest.files["tensors"].digest)
    data = path.read_bytes()
    path.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
    refused(target, f"{family.root}:me/stack", IntegrityError, path.name)
    path.unlink()
    refused(target, f"{family.root}:me/stack", HubError, path.name)


def test_a_parent_missing_from_the_source(family, bundle, target):
    (bundle / "manifests" / (family.resolve("me/root").digest.removeprefix("sha256:") + ".json")).unlink()
    refused(target, bundle, NotFound, "manifests/")
    family.remove("me/root", force=True)
    refused(target, f"{family.root}:me/stack", NotFound, "me/root@0.1.0")


def test_a_parents_manifest_changed(family, bundle, target):
    path = bundle / "manifests" / (family.resolve("me/a").digest.removeprefix("sha256:") + ".json")
    path.write_bytes(path.read_bytes().replace(b"tiny", b"TINY"))
    refused(target, bundle, IntegrityError, "me/a@0.1.0")


def test_a_parent_called_by_another_name(bundle, target):
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"me/a", b"me/z"))
    refused(target, bundle, ManifestError, "me/z@0.1.0")


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (b'"compose":"me/a@0.1.0 + me/b@0.1.0"', b'"compose":"me/a@0.1.0 + me/stack@0.1.0"', "me/stack@0.1.0"),
        (b'"compose":"me/a@0.1.0 + me/b@0.1.0"', b'"compose":"me/a@0.1.0"', "me/b@0.1.0"),
        (b'"compose":"me/a@0.1.0', b'"compose":"me/a', "me/a"),
        (b'"compose":"me/a@0.1.0', b'"compose":"me/a@stable', "me/a@stable"),
        (b'"compose":"me/a@0.1.0 +', b'"compose":"me/a@0.1.0 +++', "does not parse"),
        (b'"compose":"me/a', b'"compose":"\\u001b[2Jme/a', "no"),
        (b'"compose":"', b'"compose":"' + b"(" * 100_000, "does not parse"),
        (b'"relation":"compose"', b'"relation":"merge"', "me/a@0.1.0, me/b@0.1.0"),
        (b'"licence"', b'"forms":{"a":["low_rank"]},"licence"', "tensors of its own"),
    ],
    ids=["unlisted", "left out", "unpinned", "tag", "syntax", "control", "deep", "relation", "forms"],
)
def test_a_composition_of_other_things_than_its_parents(bundle, target, before, after, says):
    path = bundle / "manifest.json"
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, after))
    refused(target, bundle, ManifestError, says)


def test_a_composition_of_other_things_in_another_hub(family, target):
    """A row that was changed, with its digest."""
    release = family.resolve("me/stack")
    changed = msgspec.structs.replace(release.manifest, compose="me/stack@0.2.0", version="0.2.0")
    family.index.add([Release(changed, digest_of(changed.encode()))])
    refused(target, f"{family.root}:me/stack", ManifestError, "me/stack@0.2.0")


@pytest.mark.parametrize("at", range(0, 200, 20))
def test_a_flipped_bit_in_the_manifest(bundle, target, at):
    """The root's own digest is nowhere in the bundle: what still reads as a manifest is another adapter, with its digest."""
    path = bundle / "manifest.json"
    data = bytearray(path.read_bytes())
    data[random.Random(at).randrange(len(data))] ^= 4
    path.write_bytes(data)
    try:
        installed = target.install(bundle)
    except HubError as error:
        assert error.hint and listing(target) == {} and blobs(target) == set()
    else:
        assert installed[0].digest == digest_of(bytes(data))
    assert target.verify() == []


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "blobs/x.pt", "deep/er/optimizer.pkl", "m.ckpt", "m.pickle", "m.PT"]
)
def test_D4_a_pickle_anywhere_is_refused(bundle, target, name):
    path = bundle / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x80\x04N.")
    refused(target, bundle, UnsafeFile, path.name)


@pytest.mark.parametrize("what", ["file", "folder", "manifest", "pipe", "loop"])
def test_D6_links_and_pipes_are_not_followed(family, bundle, target, tmp_path, what):
    path = a_blob(bundle, family)
    outside = tmp_path / "outside"
    if what == "folder":
        (bundle / "blobs").rename(outside)
        (bundle / "blobs").symlink_to(outside)
        refused(target, bundle, UnsafeFile, "no plain file")
        return
    if what == "manifest":
        path = bundle / "manifest.json"
    path.rename(outside)
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if what == "loop" else outside)
    refused(target, bundle, UnsafeFile, path.name)


def test_a_bundle_may_itself_be_a_link(bundle, target, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert len(target.install(tmp_path / "link")) == 4


def test_D12_a_manifest_without_end(bundle, target):
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    refused(target, bundle, ManifestError, "too large")


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (b"", IntegrityError),
        (b"\x80\x04N.", HubError),
        (safetensors(1.0)[:-1], IntegrityError),
        (safetensors(1.0, name="../../etc/passwd"), UnsafeFile),
        (safetensors(1.0, name="a\x1b[2J"), UnsafeFile),
        (struct.pack("<Q", 1 << 60) + b"{}", HubError),
    ],
    ids=["empty", "pickle", "truncated", "path", "control", "huge header"],
)
def test_D2_D4_hostile_tensors_under_a_true_digest(family, target, tmp_path, tensors, error):
    """Whoever makes the manifest makes the digests too, so a right digest makes no file safe."""
    hub = adapterhub.open(tmp_path / "hostile", create=True)
    base = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))
    hub.publish(Manifest(name="me/x", version="0.0.0", base=base), {"tensors": tensors}, b"rows")
    hub.export_bundle("me/x", tmp_path / "out")
    refused(target, tmp_path / "out", error, "")
    refused(target, f"{hub.root}:me/x", error, "")


def test_what_the_manifest_does_not_name_is_not_read(bundle, target):
    (bundle / "README.md").write_text("hello")
    (bundle / "blobs" / ("0" * 64)).symlink_to("/etc/passwd")
    assert len(target.install(bundle)) == 4
    assert "0" * 64 not in blobs(target)
