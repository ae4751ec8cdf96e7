"""An index that is lost, damaged or gone is said, and made again from the blobs; nothing in them is believed unchecked."""

import random
import shutil
import sqlite3

import pytest
from crashed import TENSORS, large, publish
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flips import noticed, unnoticed

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.errors import NameInUse, NameWarning, UsageError
from adapterhub.recovery import repair
from adapterhub.recovery.rebuild import rebuild
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest
from adapterhub.store import gc, records
from adapterhub.store.history import yank
from adapterhub.trust.keys import PrivateKey
from adapterhub.trust.signature import RELEASE, sign, statement


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows in every table: parents, parts, tags that moved, a yank, a removed version, a signature, a lease."""
    hub = adapterhub.open(tmp_path_factory.mktemp("made") / "hub", create=True)
    parent = publish(hub, "me/parent", large(1))
    child = publish(hub, "me/child", large(2), [parent])
    publish(hub, "me/child", large(3), [parent])
    publish(hub, "me/gone")
    hub.remove("me/gone")
    hub.tag("me/child@0.1.0", "stable")
    hub.tag("me/child@0.2.0", "stable")
    yank(hub, "me/child@0.2.0", "wrong labels")
    hub.sign(child.digest, sign(statement(child), RELEASE, PrivateKey("k", Ed25519PrivateKey.generate())))
    hub.index.lease([digest_of(b"coming")], 4e9)
    assert hub.verify() == []
    return hub.root


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path / "hub"))
    return adapterhub.open(shutil.copytree(made, tmp_path / "hub"))


def seen(hub):
    """What a rebuilt index must say again."""
    found = {str(row): row.digest for row in hub.releases()}
    signed = {label: hub.index.signatures(digest) for label, digest in found.items()}
    return found, signed, hub.index.files(), hub.index.missing_parents()


def test_a_lost_index_is_said_by_every_command_and_init_refuses(hub, monkeypatch, capsys):
    (hub.root / "hub.db").unlink()
    monkeypatch.chdir(hub.root)
    for command in (
        ["list"],
        ["verify"],
        ["show", "me/child"],
        ["gc"],
        ["repair"],
        ["init"],
        ["install", str(hub.root)],
    ):
        assert execute(command) == 4, command
        told = capsys.readouterr().err
        assert "hub.db is lost" in told and "repair --rebuild" in told, command
    assert execute(["doctor", "--json"]) == 1 and "hub.db is lost" in capsys.readouterr().out
    assert not (hub.root / "hub.db").exists()


def test_blobs_alone_bring_releases_parents_and_signatures_back(hub, monkeypatch, capsys):
    before = seen(hub)
    serial = hub.index.serial()
    (hub.root / "hub.db").unlink()
    monkeypatch.chdir(hub.root)
    assert execute(["repair", "--rebuild"]) == 0
    told = capsys.readouterr()
    assert "3 releases and 1 signatures" in told.err and "tags" in told.err and "yanks" in told.err
    again = adapterhub.open(hub.root)
    assert seen(again) == before and again.verify() == [] and gc.gc(again) == []
    assert again.index.serial() > serial and again.releases("me/child")[0].tags == ()
    with pytest.raises(UsageError, match="is sound"):
        rebuild(hub.root)


@pytest.mark.parametrize("damage", ["torn", "empty", "another", "journal"])
def test_a_damaged_index_is_kept_beside_the_new_one(hub, damage):
    before, path = seen(hub), hub.root / "hub.db"
    data = path.read_bytes()
    path.write_bytes({"torn": data[:5000], "empty": b"", "another": b"x" * 9000, "journal": data[:5000]}[damage])
    damaged = path.read_bytes()
    if damage == "journal":  # beside the new index SQLite would take it for the new one's
        (hub.root / "hub.db-journal").write_bytes(bytes.fromhex("d9d505f920a163d7") + bytes(600))
    assert noticed(hub.root) is not None
    done = rebuild(hub.root)
    assert done.damaged == hub.root / "hub.db.damaged" and done.damaged.read_bytes() == damaged
    assert not (hub.root / "hub.db-journal").exists()
    assert seen(adapterhub.open(hub.root)) == before


def test_a_release_whose_files_are_not_all_here_does_not_come_back(hub):
    child = hub.resolve("me/child@0.1.0")
    hub.store.path(child.manifest.files["tensors"].digest).unlink()
    (hub.root / "hub.db").unlink()
    done = rebuild(hub.root)
    assert [str(release) for release in done.releases] == ["me/child@0.2.0", "me/parent@0.1.0"]
    (left,) = done.left
    assert left.releases == ("me/child@0.1.0",) and "is missing" in left.reason


def draft(name, version, **files):
    base = Base(
        name="tiny", architecture="llama", structure=digest_of(b"s"), sketch=File(digest=digest_of(b"rows"), size=4)
    )
    return Manifest(name=name, version=version, base=base, method=Made(name="lora"), files=files)


def test_a_manifest_that_is_a_file_of_a_release_is_not_believed(hub):
    """A stranger's adapter may have the manifest of another as its log; and one that claims a true one as its own file."""
    forged = draft("acme/sql", "9.0.0", tensors=hub.store.put(TENSORS)).encode()
    true = hub.resolve("me/parent")
    claims = draft("acme/claims", "9.0.0", log=File(digest=true.digest, size=len(true.manifest.encode()))).encode()
    for name, log in (("me/a", forged), ("me/b", claims)):
        hub.publish(draft(name, "0.0.0"), {"tensors": TENSORS, "log": log}, b"rows")
    before = seen(hub)
    (hub.root / "hub.db").unlink()
    done = rebuild(hub.root)
    assert seen(adapterhub.open(hub.root)) == before
    assert {problem.path.name for problem in done.left} == {digest_of(d)[7:] for d in (forged, claims)}


def test_blobs_that_look_like_manifests_and_are_none(hub):
    before = seen(hub)
    one = draft("me/two", "1.0.0").encode()
    for data in (b"{", b"{}" * 9, b"{" * 100_000, one[:-1], one + b" ", b'{"payloadType":1}', b'{"a":' * 50_000):
        hub.store.put(data)
    false = hub.store.path(digest_of(b"something else"))
    false.write_bytes(one)  # not under its own digest
    for log in (b"1", b"2"):  # two that claim one version
        hub.store.put(draft("me/two", "1.0.0", log=hub.store.put(log)).encode())
    (hub.root / "hub.db").unlink()
    done = rebuild(hub.root)
    assert seen(adapterhub.open(hub.root)) == before and [p.releases for p in done.left] == [("me/two@1.0.0",)] * 2


def test_a_hub_of_before_manifests_were_blobs_is_sound_and_gets_them(hub):
    """Its index does not say that it keeps them: verify asks for none, and the next release brings all."""
    digests = [row.digest for row in hub.releases()]
    with sqlite3.connect(hub.root / "hub.db") as database:
        database.execute("DELETE FROM state WHERE key != 'serial'")
    database.close()
    for digest in digests:
        hub.store.path(digest).unlink()
    assert hub.verify() == []
    publish(hub, "me/next")
    assert all(hub.store.path(digest).exists() for digest in digests) and hub.verify() == []
    hub.store.path(digests[0]).unlink()
    assert [problem.path for problem in hub.verify()] == [hub.store.path(digests[0])]  # now it is a loss
    assert repair.repair(hub, []).left == [] and hub.verify() == []
    assert hub.index.remembered(records.KEPT) == 1


def test_removing_a_release_takes_its_manifest_and_signatures(hub):
    child = hub.resolve("me/child@0.1.0")
    mine = [child.digest, *map(digest_of, hub.index.signatures(child.digest))]
    assert len(mine) == 2 and all(hub.store.path(digest).exists() for digest in mine)
    hub.remove("me/child@0.1.0")
    assert not any(hub.store.path(digest).exists() for digest in mine) and gc.gc(hub) == []


# --- rows that change by themselves ---------------------------------------------------------------------------------

CHANGES = [
    "UPDATE tags SET version = '0.1.0'",
    "UPDATE tags SET tag = 'stabld'",
    "DELETE FROM tags",
    "INSERT INTO tags VALUES ('me/parent', 'stable', '0.1.0')",
    "UPDATE releases SET yanked = NULL",
    "UPDATE releases SET yanked = 'wrong labelz' WHERE yanked IS NOT NULL",
    "UPDATE releases SET created = '2020-01-01T00:00:00Z' WHERE version = '0.2.0'",
    "DELETE FROM gone",
    "UPDATE gone SET version = '0.1.1'",
    "UPDATE tag_moves SET version = '0.1.0'",
    "DELETE FROM tag_moves WHERE id = 1",
    "DELETE FROM signatures",
    "UPDATE signatures SET envelope = x'7b7d'",
    "UPDATE adapters SET words = 'nothing'",
    "UPDATE adapters SET newest = 3 WHERE name = 'me/child'",
    "UPDATE state SET value = value - 1 WHERE key = 'serial'",
    "DELETE FROM state WHERE key = 'serial'",
    "DELETE FROM state WHERE key IN (SELECT key FROM state WHERE key LIKE 'seal %' LIMIT 1)",
    "UPDATE blobs SET size = size + 1 WHERE release = 1",
    "DELETE FROM parents",
    "DELETE FROM manifests WHERE release = 1",
]


@pytest.mark.parametrize("change", CHANGES)
def test_C1_a_row_that_nobody_changed_through_us_is_noticed(hub, change):
    database = sqlite3.connect(hub.root / "hub.db")
    assert database.execute(change).rowcount > 0
    database.commit()
    database.close()
    assert noticed(hub.root) is not None


def test_every_change_of_ours_leaves_the_seals_whole(hub):
    for change in (
        lambda: publish(hub, "me/new"),
        lambda: hub.tag("me/new", "beta"),
        lambda: hub.index.set_tag("me/new", "beta", None),
        lambda: yank(hub, "me/new@0.1.0", "bad"),
        lambda: yank(hub, "me/new@0.1.0", None),
        lambda: hub.remove("me/new"),
        lambda: hub.index.remember("a number", 7),
        lambda: hub.index.lease([digest_of(b"more")], 5e9),
    ):
        change()
        assert hub.index.check() == []


@pytest.mark.parametrize(
    ("count", "seed"), [(300, 0), pytest.param(3000, 1, marks=pytest.mark.slow)], ids=["300 flips", "3000 flips"]
)
def test_C1_a_flipped_bit_anywhere_in_hub_db_is_noticed_or_changes_no_row(hub, count, seed):
    found, missed = unnoticed(hub.root, count, seed)
    assert missed == [] and found > count // 10
    assert hub.verify() == []


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_new_name_that_looks_like_another_is_refused(hub, tmp_path):
    publish(hub, "me/sql-v1.2")
    for name in ("me/sql_v1.2", "me/sql.v1-2", "me/sql--v1.2", "me/sql-v1.2-"):
        with pytest.raises(NameInUse, match="differs from me/sql-v1"):
            publish(hub, name)
    for name in ("me/sql-v12", "you/sql_v1.2", "sql_v1.2", "me/sql-v1", "me/sql"):
        publish(hub, name)
    publish(hub, "me/sql-v1.2", TENSORS[:-1] + b"\7")
    assert len(hub.releases("me/sql-v1.2")) == 2


def test_a_hub_that_has_both_goes_on_and_an_install_warns(hub, tmp_path):
    publish(hub, "me/a-b")
    other = adapterhub.open(tmp_path / "other", create=True)
    publish(other, "me/a_b")
    with pytest.warns(NameWarning, match="me/a_b differs from me/a-b"):
        hub.install(f"{other.root}:me/a_b")
    for name in ("me/a-b", "me/a_b"):
        publish(hub, name, TENSORS[:-1] + bytes([random.Random(name).randrange(9)]))
        assert hub.resolve(name).version == "0.2.0"


def test_a_training_is_refused_before_it_begins(hub, tmp_path):
    publish(hub, "me/a-b")
    with pytest.raises(NameInUse, match="differs from me/a-b"):
        hub.train("smollm2", "lora", tmp_path / "no data", name="me/a_b")
