"""The manifest: canonical bytes, and everything that is none."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import HubError, ManifestError, UsageError
from adapterhub.spec.digest import check_digest, digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Parent
from adapterhub.spec.names import Reference, check_name, check_version

printable = st.text(st.characters(categories=("L", "N", "P")), max_size=12)
names = st.from_regex(r"([a-z][a-z0-9_-]{0,6}/)?x[a-z0-9_-]{0,6}", fullmatch=True)
versions = st.tuples(*[st.integers(0, 99)] * 3).map(lambda v: ".".join(map(str, v)))
digests = st.binary(max_size=8).map(digest_of)
files = st.builds(File, digest=digests, size=st.integers(0, 2**60))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
tables = st.dictionaries(st.text(max_size=6), values, max_size=4)
made = st.builds(Made, name=printable, options=tables, distribution=printable)
manifests = st.builds(
    Manifest,
    name=names,
    version=versions,
    base=st.builds(Base, name=printable, architecture=printable, structure=digests, sketch=files, note=printable),
    method=st.none() | made,
    forms=st.dictionaries(printable, st.lists(printable, max_size=2), max_size=3),
    compose=st.none() | st.text(max_size=9),
    parents=st.lists(
        st.builds(Parent, name=names, version=versions, digest=digests, relation=st.sampled_from(["on", "merge"])),
        max_size=2,
    ),
    codecs=st.lists(made, max_size=2),
    recipe=tables,
    metrics=tables,
    licence=st.none() | printable,
    files=st.dictionaries(printable, files, max_size=2),
)

PLAIN = {
    "name": "me/x",
    "version": "0.1.0",
    "base": {
        "name": "tiny",
        "architecture": "llama",
        "structure": digest_of(b"shapes"),
        "sketch": {"digest": digest_of(b"rows"), "size": 4},
    },
}


def canonical(**changes):
    return json.dumps(PLAIN | changes, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@given(manifests)
def test_canonical_round_trip(manifest):
    data = manifest.encode()
    assert Manifest.decode(data) == manifest
    assert Manifest.decode(data).encode() == data
    # An independent reader and writer of JSON gives the same bytes.
    assert json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() == data


@given(manifests, tables)
def test_the_order_of_keys_does_not_matter(manifest, table):
    import msgspec

    turned = dict(reversed(table.items()))
    one, two = (msgspec.structs.replace(manifest, recipe=recipe) for recipe in (table, turned))
    assert one.encode() == two.encode()


def test_digest_is_the_sha256_of_the_bytes():
    assert digest_of(canonical()) == "sha256:" + hashlib.sha256(canonical()).hexdigest()
    assert Manifest.decode(canonical()).encode() == canonical()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a manifest"),
        (b"[]", "not a manifest"),
        (b"\xff\xfe", "not a manifest"),
        (b"[" * 100_000, "not a manifest"),
        (canonical()[:-1], "not a manifest"),
        (canonical(surprise=1), "surprise"),
        (canonical(files={"tensors": {"digest": digest_of(b""), "size": "4"}}), "size"),
        (canonical(files={"tensors": {"digest": digest_of(b""), "size": -1}}), "negative"),
        (canonical(files={"tensors": {"digest": "md5:" + "0" * 64, "size": 1}}), "not a digest"),
        (canonical(files={"tensors": {"digest": digest_of(b"").upper(), "size": 1}}), "not a digest"),
        (canonical(files={"tensors": {"digest": "sha256:../../../etc/passwd", "size": 1}}), "not a digest"),
        (canonical(name="../x"), "not a name"),
        (canonical(version="1.0"), "not a version"),
        (canonical(metrics={"loss": float("nan")}), "not a manifest"),
        (canonical(metrics={"loss": 1}).replace(b":1}", b":1e999}"), "not a manifest"),
        (canonical().replace(b'{"base"', b'{"name":"me/y","base"'), "twice"),
        (canonical().replace(b",", b", "), "canonically"),
        (canonical(format=1), "canonically"),
        (canonical(licence="\x1b[2J"), "control characters"),
        (canonical(forms={"a": ["low\nrank"]}), "control characters"),
        (
            canonical(parents=[{"name": "me/p", "version": "1.0.0", "digest": "sha256:0", "relation": "on"}]),
            "not a digest",
        ),
    ],
)
def test_what_is_no_manifest(data, says):
    with pytest.raises(HubError, match=says) as caught:
        Manifest.decode(data)
    assert caught.value.hint


def test_a_newer_format_says_update_before_it_says_unknown():
    with pytest.raises(ManifestError, match="newer") as caught:
        Manifest.decode(canonical(format=2, surprise=1))
    assert "update" in caught.value.hint


@pytest.mark.parametrize("format", ["1", "2", 2.5, 0, -1, True, None, [2]])
def test_a_format_that_is_none_is_not_newer(format):
    with pytest.raises(ManifestError, match="not a manifest"):
        Manifest.decode(canonical(format=format))


@pytest.mark.parametrize("name", ["x", "me/x", "a.b/c-d_e", "0x"])
def test_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "/x", "x/", "Me/x", "a/b/c", "../x", "a..b", ".x", "-x", "x y", "base", "mix", "x" * 97, "x\n", "é"]
)
def test_no_names(name):
    with pytest.raises(UsageError):
        check_name(name)


@pytest.mark.parametrize("version", ["0.1.0", "10.20.30"])
def test_versions(version):
    assert check_version(version) == version


@pytest.mark.parametrize(
    "version", ["", "1", "1.0", "1.0.0.0", "v1.0.0", "1.0.0rc1", "01.0.0", "1.0.0+x", "1!1.0.0", "1.0.٣", "1.0.0\n"]
)
def test_no_versions(version):
    with pytest.raises(UsageError):
        check_version(version)


def test_references():
    assert Reference.parse("me/x@0.1.0") == Reference("me/x", "0.1.0")
    assert Reference.parse("me/x@stable") == Reference("me/x", "stable")
    assert str(Reference.parse("me/x")) == "me/x"
    for text in ("me/x@", "me/x@1.0", "@0.1.0", "me/x@0.1.0@0.1.0"):
        with pytest.raises(UsageError):
            Reference.parse(text)


@pytest.mark.parametrize("digest", ["sha256:" + "0" * 63, "sha256:" + "A" * 64, "0" * 64, "md5:" + "0" * 32])
def test_no_digests(digest):
    with pytest.raises(ManifestError):
        check_digest(digest)
