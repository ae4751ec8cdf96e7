"""Keys, signatures, whom the user believes, and the bill of materials."""

import base64
import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.adapter import part
from adapterhub.analysis.bom import cyclonedx, materials
from adapterhub.analysis.doctor import uninstalled
from adapterhub.cli.app import execute
from adapterhub.config import user
from adapterhub.errors import (
    IntegrityError,
    ManifestError,
    NameInUse,
    NotFound,
    NotTrusted,
    PluginError,
    UnsafeFile,
    UsageError,
)
from adapterhub.spec.digest import check_digest, digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Parent, Release
from adapterhub.trust import keys, policy
from adapterhub.trust.signature import RELEASE, opened, sign, statement

BASE = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))


def publish(hub, name, parents=(), licence=None, relation="on", **more):
    parents = [Parent(name=p.name, version=p.version, digest=p.digest, relation=relation) for p in parents]
    manifest = Manifest(
        name=name, version="0.0.0", base=BASE, method=Made(name="lora"), parents=parents, licence=licence, **more
    )
    return hub.publish(manifest, {"log": name.encode()}, b"rows")[0]


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def mine():
    return keys.new_key("mine")


def trusted(*public, until=None, require=False):
    return policy.Trusted(tuple(public), until, require)


def test_a_private_key_is_read_by_its_owner_alone_and_never_overwritten(mine):
    path = user.config_folder() / "keys" / "mine.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(NameInUse):
        keys.new_key("mine")
    assert path.read_bytes() == before and keys.load_key("mine").public.text == mine.public.text
    keys.remove_key("mine")
    with pytest.raises(NotFound):
        keys.load_key("mine")


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "rsa:" + "A" * 44, "ed25519:" + "!" * 44])
def test_what_is_no_public_key(text):
    with pytest.raises(UsageError):
        keys.PublicKey(text)


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", "x" * 65])
def test_a_name_that_leaves_the_folder_of_keys(name):
    with pytest.raises(UsageError):
        keys.new_key(name)


def test_the_envelope_is_dsse(hub, mine):
    """By the text of the specification, with the library's own verification: not by our reading of our own writing."""
    release = publish(hub, "acme/sql")
    found = json.loads(sign(statement(release), RELEASE, mine))
    body = base64.b64decode(found["payload"])
    assert json.loads(body) == {"digest": release.digest, "name": "acme/sql", "version": "0.1.0"}
    kind = found["payloadType"].encode()
    message = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(body)).encode(), body])
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(mine.public.text.removeprefix("ed25519:")))
    public.verify(base64.b64decode(found["signatures"][0]["sig"]), message)


@pytest.mark.parametrize("text", ["md5:" + "0" * 32, "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha512:" + "0" * 64])
def test_C6_a_digest_of_another_shape_is_refused_at_parse(text):
    with pytest.raises(ManifestError):
        check_digest(text)


def test_C8_only_a_valid_signature_passes_where_one_is_required(hub, mine):
    release, other = publish(hub, "acme/sql"), publish(hub, "acme/tone")
    stranger = keys.new_key("stranger")
    good = sign(statement(release), RELEASE, mine)
    tampered = json.loads(good)
    tampered["payload"] = base64.b64encode(json.dumps(statement(other)).encode()).decode()
    renamed = Release(release.manifest, other.digest)
    now = datetime(2026, 6, 1, tzinfo=UTC)
    cases = [
        ([good], trusted(mine.public), "valid"),
        ([sign(statement(release), RELEASE, stranger)], trusted(mine.public), "untrusted key"),
        ([good], trusted(mine.public, until=datetime(2026, 5, 31).date()), "expired"),
        ([good], trusted(mine.public, until=datetime(2026, 6, 1).date()), "valid"),
        ([sign(statement(other), RELEASE, mine)], trusted(mine.public), "another release"),
        ([json.dumps(tampered).encode()], trusted(mine.public), "another release"),
        ([sign(statement(release), "application/other", mine)], trusted(mine.public), "unsigned"),
        ([], trusted(mine.public), "unsigned"),
        ([b"{}"], trusted(mine.public), "unsigned"),
        ([b"{}", good], trusted(mine.public), "valid"),
    ]
    for envelopes, who, expected in cases:
        assert policy.verdict(release, envelopes, who, now).kind == expected
        if expected not in ("valid", "expired"):
            with pytest.raises(UnsafeFile):
                policy.check_signed(release, envelopes, {"acme": trusted(*who.keys, require=True)})
    with pytest.raises(UnsafeFile, match="has ended"):
        past = trusted(mine.public, until=datetime(2020, 1, 1).date(), require=True)
        policy.check_signed(release, [good], {"acme": past})
    assert policy.verdict(renamed, [good], trusted(mine.public), now).kind == "another release"
    policy.check_signed(release, [good], {"acme": trusted(mine.public, require=True)})
    policy.check_signed(release, [], {"acme": trusted(mine.public)})


def test_C8_installing_under_require_signed(hub, mine, tmp_path):
    base = publish(hub, "acme/base")
    child = publish(hub, "acme/sql", [base])
    policy.trust_key("acme", mine.public.text, require=True)
    team = adapterhub.open(tmp_path / "team", create=True)
    hub.index.sign(child.digest, sign(statement(child), RELEASE, mine))
    with pytest.raises(UnsafeFile, match=r"acme/base@0\.1\.0 is refused: it is not signed"):
        team.install(f"{hub.root}:acme/sql")
    assert team.releases() == [] and not any(path.is_file() for path in team.store.folder.rglob("*"))
    hub.index.sign(base.digest, sign(statement(base), RELEASE, mine))
    hub.export_bundle("acme/sql", tmp_path / "bundle")
    team.install(tmp_path / "bundle")  # signatures travel with a bundle
    assert [policy.verdict(r, team.index.signatures(r.digest), trusted(mine.public)).kind for r in (base, child)] == [
        "valid",
        "valid",
    ]
    assert policy.unsigned(team) == []


def test_a_policy_that_is_not_right_is_refused_and_nothing_is_written():
    for bad in (("acme", "no key", None), ("a b", "ed25519:" + "A" * 43 + "=", None)):
        with pytest.raises(UsageError):
            policy.trust_key(*bad)
    with pytest.raises(UsageError, match="date"):
        policy.trust_key("acme", keys.new_key("k").public.text, until="tomorrow")
    assert not user.config_file().exists()
    user.config_file().write_text("[trust.acme]\nkey = 3\n")
    with pytest.raises(UsageError, match="says 'key'"):
        policy.policy()
    user.config_file().write_text("[trustt]\n")
    with pytest.raises(UsageError):
        user.load()


def test_comments_in_the_configuration_stay(mine):
    user.config_file().parent.mkdir(exist_ok=True)
    user.config_file().write_text("# mine\n[trust.other]\nkeys = [] # none yet\n")
    policy.trust_key("acme", mine.public.text, until="2030-01-31", require=True)
    text = user.config_file().read_text()
    assert "# mine" in text and "# none yet" in text
    acme = policy.policy()["acme"]
    assert acme.require and str(acme.until) == "2030-01-31" and [k.text for k in acme.keys] == [mine.public.text]
    policy.distrust("acme")
    assert set(policy.policy()) == {"other"}


def test_the_bill_of_materials_names_everything(hub, mine):
    parent = publish(hub, "acme/base", licence="MIT", plugins={"adapterhub-loreft": "0.1.0"})
    origin = publish(hub, "acme/origin", licence="Apache-2.0")
    child = publish(hub, "acme/sql", [parent], licence="MIT")
    merged = publish(hub, "acme/merged", [origin], relation="merge")
    hub.index.sign(child.digest, sign(statement(child), RELEASE, mine))
    policy.trust_key("acme", mine.public.text)
    found = materials(hub, "acme/sql + 0.5*acme/merged")
    told = {m.label: (m.needed, m.signed) for m in found}
    assert told == {
        "acme/sql@0.1.0": (True, "valid"),
        "acme/merged@0.1.0": (True, "unsigned"),
        "acme/base@0.1.0": (True, "unsigned"),
        "acme/origin@0.1.0": (False, "unsigned"),
    }
    bill = cyclonedx(found, "x")
    refs = {component["bom-ref"] for component in bill["components"]}
    assert {r.digest for r in (parent, origin, child, merged)} <= refs and "pypi:adapterhub-loreft@0.1.0" in refs
    assert len(refs) == len(bill["components"]) == 6
    assert all(set(entry["dependsOn"]) <= refs for entry in bill["dependencies"])
    hub.remove("acme/origin", force=True)
    assert {m.label: m.signed for m in materials(hub, "acme/merged")}["acme/origin@0.1.0"] == "not here"


def test_the_commands(hub, monkeypatch, capsys):
    publish(hub, "acme/sql")
    monkeypatch.chdir(hub.root)
    assert execute(["key", "new"]) == 0
    public = capsys.readouterr().out.strip()
    assert execute(["trust", "add", "acme", public, "--require"]) == 0
    assert execute(["verify", "--signed"]) == 4
    assert "not signed" in capsys.readouterr().out
    assert execute(["sign", "acme/sql"]) == 0
    assert execute(["verify", "--signed"]) == 0
    capsys.readouterr()
    assert execute(["bom", "acme/sql", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bomFormat"] == "CycloneDX"
    assert execute(["sign", "acme/sql", "--key", "none"]) == 3


def test_D13_code_of_others_runs_only_when_it_was_enabled(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("ADAPTERHUB_PLUGINS")
    monkeypatch.chdir(tmp_path)
    plugins.load.cache_clear()
    try:
        assert execute(["plugins", "list"]) == 0
        assert "adapterhub-loreft" in capsys.readouterr().out
        with pytest.raises(PluginError, match="not enabled") as caught:
            plugins.load("methods", "loreft")
        assert "adapterhub plugins enable adapterhub-loreft" in caught.value.hint
        assert execute(["plugins", "enable", "adapterhub-loreft"]) == 0
        assert plugins.load("methods", "loreft")
        assert execute(["plugins", "disable", "adapterhub-loreft"]) == 0
        plugins.load.cache_clear()
        with pytest.raises(PluginError):
            plugins.load("methods", "loreft")
        (tmp_path / "adapterhub.toml").write_text('[plugins]\nenabled = ["adapterhub-loreft"]\n')
        with pytest.raises(NotTrusted, match=r"adapterhub\.toml enables plugins"):
            plugins.load("methods", "loreft")
        assert execute(["trust", "folder", "."]) == 0
        assert plugins.load("methods", "loreft")
        assert execute(["plugins", "enable", "requests"]) == 3
    finally:
        plugins.load.cache_clear()


def test_D13_a_manifest_cannot_make_us_recommend_a_package(hub):
    stranger = Made(name="warp", distribution="evil-package 1.0.0")
    release = hub.publish(
        Manifest(name="me/x", version="0.0.0", base=BASE, method=stranger, forms={"a": ["warp"]}),
        {"log": b"1"},
        b"rows",
    )[0]
    with pytest.raises(PluginError) as caught:
        part("forms", "warp", release.manifest, stranger)
    assert "evil" not in str(caught.value) + caught.value.hint
    assert all("evil" not in line for line in uninstalled(hub))
    assert "adapterhub-loreft" in plugins.origin("adapterhub-loreft 9.9.9")


@pytest.mark.parametrize("broken", ["raises", "twice"])
def test_D13_a_broken_plugin_does_not_break_the_rest(tmp_path, broken):
    """One that raises when it is imported, one whose name another has: told where it is used, and listed without import."""
    site = tmp_path / "site"
    for n in range(2 if broken == "twice" else 1):
        info = site / f"bad{n}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bad{n}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[adapterhub.codecs]\nbad = bad{n}:Bad\n")
        (site / f"bad{n}.py").write_text(
            f"open({str(tmp_path / 'imported')!r}, 'w')\nraise RuntimeError('bad import')\n"
        )

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(
            [sys.executable, "-m", "adapterhub", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    assert run("list").returncode == 0
    listed = run("plugins", "list")
    if broken == "twice":
        assert listed.returncode == 3 and "bad0 1.0" in listed.stderr and "bad1 1.0" in listed.stderr
    else:
        assert listed.returncode == 0 and "bad0 1.0" in listed.stdout
        shown = run("plugins", "show", "bad")
        assert shown.returncode == 3 and "bad import" in shown.stderr and "Traceback" not in shown.stderr
        (tmp_path / "imported").unlink()
    assert not (tmp_path / "imported").exists()


def test_an_envelope_that_is_none():
    for data in (b"", b"[]", b"{", b'{"payload":1}', b"x" * 100_000, b'{"a":' * 60_000):
        with pytest.raises(IntegrityError):
            opened(data, RELEASE, ())
