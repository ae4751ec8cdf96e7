"""How much may come: what was announced, what the disk has room for, what the user allows. And junk beside a release."""

import base64
import json
import re
import shutil
from collections import namedtuple

import httpx
import pytest
from crashed import LARGE, TENSORS, large, publish
from fault_server import Faults, faulty
from served import serving

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.cli.project import bytes_of
from adapterhub.errors import HubError, IntegrityError, UsageError
from adapterhub.share.registry import push
from adapterhub.sources import room
from adapterhub.sources.opening import named
from adapterhub.sources.registry import Registry
from adapterhub.spec.digest import canonical
from adapterhub.trust.envelopes import LARGEST, MOST, listed, worth
from adapterhub.trust.keys import new_key
from adapterhub.trust.policy import trust_key
from adapterhub.trust.signature import RELEASE, sign, statement

TOKEN = "a-token"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def ada(tmp_path):
    return adapterhub.open(tmp_path / "ada", create=True)


@pytest.fixture
def bob(tmp_path, monkeypatch):
    bob = adapterhub.open(tmp_path / "bob", create=True)
    monkeypatch.chdir(bob.root)
    return bob


@pytest.fixture
def faults(bob, tmp_path, monkeypatch):
    """A registry behind a proxy that counts."""
    faults = Faults()
    monkeypatch.setenv("ADAPTERHUB_TOKEN", TOKEN)
    faults.hub = adapterhub.open(tmp_path / "there", create=True)
    with serving(faults.hub, token=TOKEN) as faults.origin, faulty(faults.origin, faults) as url:
        faults.url = url
        monkeypatch.setenv("ADAPTERHUB_REGISTRY", url)
        yield faults


def blobs(hub):
    return [path for folder in ("blobs", "incoming") for path in (hub.root / folder).rglob("*") if path.is_file()]


def announced(release):
    """Bytes, counted here by hand."""
    return sum(file.size for file in {file.digest: file for file in release.manifest.needs}.values())


# --- the user's cap ---------------------------------------------------------------------------------------------------


def test_more_than_the_user_allows_is_not_begun(faults, ada, bob, capsys):
    parent = publish(ada, "me/parent", large(1))
    child = publish(ada, "me/x", large(2), [parent])
    push(ada, "me/x", faults.url)
    rows = child.manifest.base.sketch.size
    both = announced(parent) + announced(child) - rows  # the sketch of their base is one file
    assert execute(["install", "me/x", "--max-bytes", str(both - 1)]) == 1
    told = capsys.readouterr().err
    assert "--max-bytes" in told and blobs(bob) == [] and bob.releases() == []
    assert execute(["install", "me/x", "--max-bytes", str(both)]) == 0 and bob.verify() == []


def test_a_lock_of_several_is_counted_in_all(faults, ada, bob, capsys):
    made = [publish(ada, name, tensors) for name, tensors in (("me/x", large(1)), ("me/y", LARGE))]
    for release in made:
        push(ada, str(release), faults.url)
    both = sum(map(announced, made)) - made[0].manifest.base.sketch.size
    (bob.root / "adapterhub.toml").write_text(
        f'[adapters]\n"me/x" = "*"\n"me/y" = "*"\n[sources.t]\nurl = "{faults.url}"\n'
    )
    assert execute(["sync", "--max-bytes", str(both - 1)]) == 1
    assert blobs(bob) == [] and bob.releases() == []
    assert execute(["sync", "--max-bytes", str(both)]) == 0 and len(bob.releases()) == 2
    assert execute(["sync", "--max-bytes", "1"]) == 0  # all of it is here


def test_what_is_named_by_its_place_is_counted_too(ada, bob, tmp_path):
    release = publish(ada, "me/x", large(1))
    ada.export_bundle("me/x", tmp_path / "bundle")
    for place in (str(tmp_path / "bundle"), f"{ada.root}:me/x"):
        assert execute(["install", place, "--max-bytes", str(announced(release) - 1)]) == 1
        assert bob.releases() == []
        assert execute(["install", place, "--max-bytes", str(announced(release))]) == 0
        bob.remove("me/x")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500_000_000),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 << 29),
        ("10 kb", 10_000),
        ("7", 7),
        ("3b", 3),
        ("1TB", 10**12),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1PB", "1e9", "0x10", "1 0", "9" * 400, "1..5GB", "nan", "１GB KB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError):
        bytes_of(text)


# --- the disk -------------------------------------------------------------------------------------------------------


def test_the_disk_is_asked_before_the_first_byte(faults, ada, bob, monkeypatch, capsys):
    release = publish(ada, "me/x", LARGE)
    push(ada, "me/x", faults.url)
    lists = [path for path in [ada.store.path(release.manifest.files["tensors"].digest)]]
    needed = announced(release) + sum(path.stat().st_size for path in lists)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - 100_000))
    faults.bytes = 0
    assert execute(["install", "me/x"]) == 1
    told = capsys.readouterr().err
    assert re.search(r"\d+\.\d kB are needed in .*, and \d+\.\d kB are free", told) and str(bob.root) in told
    assert faults.bytes < 20_000 and bob.releases() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    assert execute(["install", "me/x"]) == 0


def test_what_is_here_already_needs_no_room(faults, ada, bob, monkeypatch):
    publish(ada, "me/x", large(1))
    push(ada, "me/x", faults.url)
    assert execute(["install", "me/x"]) == 0
    publish(ada, "me/x", large(2))  # shares the tensor of 70,000 bytes
    push(ada, "me/x", faults.url)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 5000))
    assert execute(["install", "me/x"]) == 0


def test_the_file_system_is_the_one_that_is_written_to(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(0, 0, 9))
    room.check_disk(tmp_path / "not" / "yet", 9)
    with pytest.raises(HubError, match=r"10 bytes are needed in .*yet, and 9 bytes are free"):
        room.check_disk(tmp_path / "not" / "yet", 10)
    assert asked == [tmp_path, tmp_path]


def test_a_bundle_asks_too(ada, bob, tmp_path, monkeypatch):
    publish(ada, "me/x", LARGE)
    ada.export_bundle("me/x", tmp_path / "bundle")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    with pytest.raises(HubError, match="are free"):
        bob.install(tmp_path / "bundle")
    assert bob.releases() == [] and blobs(bob) == []


# --- what was announced ---------------------------------------------------------------------------------------------


def test_no_more_comes_than_was_announced(faults, ada, bob, monkeypatch):
    """The server sends the blob and then goes on."""
    release = publish(ada, "me/x", TENSORS)
    push(ada, "me/x", faults.url)
    source, taken = Registry(faults.url), []
    stream = source.http.stream

    class Longer:
        def __init__(self, answer):
            self.status_code, self.answer = answer.status_code, answer

        def iter_raw(self):
            yield from self.answer.iter_raw()
            for _ in range(1000):
                taken.append(1 << 20)
                yield bytes(1 << 20)

    class Longest:
        def __init__(self, *arguments):
            self.inner = stream(*arguments)

        def __enter__(self):
            return Longer(self.inner.__enter__())

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    monkeypatch.setattr(source.http, "stream", Longest)
    with pytest.raises(IntegrityError, match="more than"):
        bob.bring(source, [source.release("me/x", "0.1.0", release.digest)])
    assert len(taken) < 20 and [path for path in blobs(bob) if path.suffix != ".lock"] == []


# --- junk beside a release ------------------------------------------------------------------------------------------


def envelope(payload, signatures, **more):
    body = base64.b64encode(canonical(payload)).decode()
    return canonical({"payloadType": RELEASE, "payload": body, "signatures": signatures, **more})


def test_only_what_can_be_a_signature_of_the_release_is_kept(ada):
    release, other = publish(ada, "me/x", TENSORS), publish(ada, "me/y", TENSORS)
    signature = [{"sig": base64.b64encode(bytes(64)).decode()}]
    good = sign(statement(release), RELEASE, new_key())
    bad = [
        envelope(statement(release), []),
        envelope(statement(other), signature),
        envelope(statement(release), [{"sig": "AAAA"}]),
        envelope(statement(release), [{"sig": 7}, "x"]),
        envelope(statement(release), signature, junk="x" * LARGEST),
        envelope([], signature),
        b"[]",
        b"{}",
        b'{"payloadType": 1}',
    ]
    assert worth(release, [*bad, good, *bad, good]) == [good]
    many = [
        envelope(statement(release), [{"sig": base64.b64encode(bytes([i]) * 64).decode()}]) for i in range(2 * MOST)
    ]
    assert worth(release, many) == many[:MOST]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"[]", []),
        (b' [ {"b": 1, "a": 2} , 7, {"c": 3} ] ', [b'{"a":2,"b":1}', b'{"c":3}']),
        (b'[{"a": 1}, {"b": "xxxx', [b'{"a":1}']),
        (b'[{"a": 1}, ' + b"[" * 100_000, [b'{"a":1}']),
        (b'[{"a": "\\ud800"}, {"a": NaN}, {"a": 1}]', [b'{"a":1}']),
        (b'[{"a": 1}, \xff, {"a": 2}]', [b'{"a":1}']),
    ],
)
def test_a_list_is_read_as_far_as_it_goes(data, found):
    assert list(listed(data)) == found
    with pytest.raises(ValueError):
        list(listed(b"{" + data))


def test_a_release_with_any_number_of_junk_envelopes_installs(faults, ada, bob, monkeypatch):
    """The junk comes from a registry that keeps it: written past the server into its index. Its answer is longer than any
    that we take whole."""
    monkeypatch.setattr("adapterhub.sources.registry.LARGEST", 2 << 20)
    key = new_key()
    release = publish(ada, "me/x", TENSORS)
    ada.sign(release.digest, sign(statement(release), RELEASE, key))
    push(ada, "me/x", faults.url)
    for n in range(5):
        faults.hub.index.sign(release.digest, envelope(statement(release), [], junk="x" * 700_000, n=n))
    answer = httpx.get(f"{faults.origin}/v1/signatures/{release.digest}")
    assert len(answer.content) > 3 << 20 and len(answer.json()) == 6
    trust_key("me", key.public.text, require=True)
    assert execute(["install", "me/x"]) == 0  # its own signature is shorter, so it comes before the junk
    assert len(bob.index.signatures(release.digest)) == 1


def test_junk_alone_is_no_signature_where_one_is_required(faults, ada, bob):
    release = publish(ada, "me/x", TENSORS)
    push(ada, "me/x", faults.url)
    faults.hub.index.sign(release.digest, envelope(statement(release), []))
    assert [json.loads(one)["signatures"] for one in named(faults.url).signatures(release.digest)] == [[]]
    trust_key("me", new_key().public.text, require=True)
    assert execute(["install", "me/x"]) == 5 and bob.releases() == []
