"""The index in SQLite: schema, transactions, damage."""

import dataclasses
import os
import random
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
import sqlalchemy
from adapterhub_registry import migrate, tables
from adapterhub_registry.database import Database
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from adapterhub.errors import HubError, IntegrityError, NameInUse, NotFound
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Parent, Release

FILE = File(digest=digest_of(b"tensors"), size=7)
SKETCH = File(digest=digest_of(b"rows"), size=4)


def release(name="me/x", version="0.1.0", **changes):
    base = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=SKETCH)
    changes = {"files": {"tensors": FILE}, "method": Made(name="lora")} | changes
    manifest = Manifest(name=name, version=version, base=base, **changes)
    return Release(manifest, digest_of(manifest.encode()))


def parent_of(child_of, relation="on"):
    return Parent(name=child_of.name, version=child_of.version, digest=child_of.digest, relation=relation)


@pytest.fixture
def database(tmp_path):
    return Database(tmp_path / "hub.db", create=True)


def sql(database, statement, *values):
    with closing(sqlite3.connect(database.path, isolation_level=None)) as connection:
        if values:
            return connection.execute(statement, values).fetchall()
        for one in statement.split(";"):
            found = connection.execute(one).fetchall()
        return found


def test_add_and_read(database):
    old, new, other = release(version="0.9.0"), release(version="0.10.0"), release("me/a")
    database.add([old, other, new])
    assert database.names() == ["me/a", "me/x"]
    assert [str(row) for row in database.releases()] == ["me/a@0.1.0", "me/x@0.10.0", "me/x@0.9.0"]
    row = database.releases("me/a")[0]
    assert (row.digest, row.method, row.base, row.size, row.tags) == (other.digest, "lora", "tiny", 7, ())
    assert row.created.endswith("Z") and len(row.created) == 20
    assert database.get("me/x", "0.9.0") == old
    assert database.get("me/x", "0.9") is None and database.releases("me") == []


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "lora"),
        ({"codecs": [Made(name="svd"), Made(name="compeft")]}, "lora + svd + compeft"),
        ({"method": None, "compose": "me/a@0.1.0"}, "composition"),
        ({"method": None, "parents": [parent_of(release("me/a"), "merge")]}, "merge"),
        ({"method": None, "forms": {"a": ["low_rank"], "b": ["low_rank", "bottleneck"]}}, "bottleneck, low_rank"),
    ],
)
def test_how_a_release_was_made(database, changes, method):
    database.add([release(**changes)])
    assert database.releases()[0].method == method


def test_adding_again_is_fine_and_other_content_is_not(database):
    first = release()
    database.add([first])
    database.add([first])
    with pytest.raises(NameInUse) as caught:
        database.add([release("me/new"), release(licence="MIT")])
    assert "me/x@0.1.0" in str(caught.value) and caught.value.hint
    assert database.names() == ["me/x"]  # nothing of that call
    assert database.get("me/x", "0.1.0") == first


def test_tags(database):
    database.add([release(), release(version="0.2.0")])
    database.set_tag("me/x", "stable", "0.1.0")
    database.set_tag("me/x", "best", "0.1.0")
    assert [row.tags for row in database.releases()] == [(), ("best", "stable")]
    database.set_tag("me/x", "stable", "0.2.0")
    assert [row.tags for row in database.releases("me/x")] == [("stable",), ("best",)]
    with pytest.raises(NotFound):
        database.set_tag("me/x", "stable", "9.0.0")
    assert [row.tags for row in database.releases()] == [("stable",), ("best",)]


def test_remove_takes_all_that_hangs_on_a_release(database):
    base = release()
    child = release("me/child", parents=[parent_of(base), parent_of(base, "merge")])
    database.add([base, child])
    database.set_tag("me/child", "stable", "0.1.0")
    assert database.children(base.digest) == ["me/child@0.1.0"]
    mine = {File(digest=r.digest, size=len(r.manifest.encode())): [str(r)] for r in (base, child)}
    both = ["me/child@0.1.0", "me/x@0.1.0"]
    assert database.files() == {FILE: both, SKETCH: both} | mine
    database.remove([child.digest])
    assert database.children(base.digest) == [] and database.files()[FILE] == ["me/x@0.1.0"]
    for table in ("tags", "parents"):
        assert sql(database, f"SELECT * FROM {table}") == []
    assert database.check() == []


def test_the_migrations_make_the_tables(database):
    assert migrate.head() == tables.HEAD
    engine = sqlalchemy.create_engine(f"sqlite:///{database.path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
    drawn = sqlalchemy.create_engine("sqlite://")
    tables.metadata.create_all(drawn)
    for inspect in ("get_foreign_keys", "get_unique_constraints", "get_pk_constraint", "get_indexes", "get_columns"):
        for table in tables.metadata.tables:
            ours, theirs = (getattr(sqlalchemy.inspect(e), inspect)(table) for e in (engine, drawn))
            assert repr(ours) == repr(theirs), (inspect, table)


def test_an_empty_file_becomes_a_database_only_when_one_is_made(tmp_path):
    """It is what a process killed while it made a hub leaves behind, and what is left of a hub that was emptied."""
    path = tmp_path / "hub.db"
    path.touch()
    with pytest.raises(IntegrityError, match="empty") as caught:
        Database(path)
    assert str(path) in str(caught.value) and "repair --rebuild" in caught.value.hint
    assert path.read_bytes() == b""
    assert Database(path, create=True).releases() == []
    assert Database(path).releases() == []


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b"this is no database" * 100), "no sound database"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE songs (id)"), "something else"),
        (lambda path: path.mkdir(), "unable to open"),
        (lambda path: None, "unable to open"),
    ],
    ids=["text", "another database", "a folder", "nothing"],
)
def test_what_is_no_index(tmp_path, write, says):
    path = tmp_path / "hub.db"
    write(path)
    with pytest.raises(HubError, match=says) as caught:
        Database(path)
    assert str(path) in str(caught.value) and caught.value.hint


def test_a_newer_schema_is_left_alone(database):
    sql(database, "UPDATE alembic_version SET version_num = '9999'")
    before = database.path.read_bytes()
    with pytest.raises(HubError, match="newer") as caught:
        Database(database.path)
    assert "update adapterhub" in caught.value.hint
    assert database.path.read_bytes() == before


def test_a_truncated_database_is_told(database):
    database.add([release(f"me/x{i}", licence="x" * 3000) for i in range(20)])
    data = database.path.read_bytes()
    database.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(HubError) as caught:
        Database(database.path).releases()
    assert str(database.path) in str(caught.value) and caught.value.hint


def test_a_damaged_manifest_is_not_read(database):
    database.add([release(), release("me/sound")])
    sql(database, "UPDATE manifests SET data = CAST(replace(data, 'lora', 'lorb') AS BLOB) WHERE release = 1")
    with pytest.raises(IntegrityError) as caught:
        database.get("me/x", "0.1.0")
    assert "me/x@0.1.0" in str(caught.value) and caught.value.hint
    assert database.check() == ["the manifest of me/x@0.1.0 is damaged"]
    assert database.get("me/sound", "0.1.0")


def test_one_flipped_bit_in_the_database_is_told_or_harmless(database):
    """SQLite keeps no checksums: we find what matters by the manifests' digests, and nothing ever ends in a traceback."""
    base = release()
    database.add([base, release("me/child", parents=[parent_of(base)])])
    data = database.path.read_bytes()
    whole = database.releases(), database.files()
    told = 0
    for bit in random.Random(0).sample(range(len(data) * 8), 300):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        database.path.write_bytes(flipped)
        try:
            damaged = Database(database.path)
            found = damaged.check()
            rows, files = damaged.releases(), damaged.files()
            assert all(damaged.get(row.name, row.version) for row in rows) or found
        except HubError as error:
            assert str(database.path) in str(error)
            found = [str(error)]
        told += bool(found)
        assert found or (without_date(rows), files) == (without_date(whole[0]), whole[1]), bit
    assert told > 10


def without_date(rows):
    return [dataclasses.replace(row, created="") for row in rows]


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE releases SET method = 'lorb'", "its method is 'lorb'"),
        ("UPDATE releases SET base = 'other'", "its base is 'other'"),
        ("UPDATE releases SET size = 8", "its size is 8"),
        ("UPDATE releases SET name = 'me/y'", "its name is 'me/y'"),
        ("UPDATE blobs SET size = 8", "its blobs are not"),
        ("DELETE FROM blobs", "its blobs are not"),
        ("DELETE FROM parents", "its parents are not"),
        (
            "UPDATE manifests SET data = CAST('{}' AS BLOB);UPDATE releases SET digest = '" + digest_of(b"{}") + "'",
            "not a manifest",
        ),
    ],
)
def test_check_finds_what_contradicts_the_manifest(database, statement, says):
    database.add([release(parents=[parent_of(release("me/p"))])])
    assert database.check() == []
    sql(database, statement)
    assert says in "; ".join(database.check())


def test_who_will_write_takes_the_lock_at_once(database):
    """A read that turns into a write inside one transaction fails when another has written; BEGIN IMMEDIATE waits."""
    seen = []
    sqlalchemy.event.listen(database._engine._engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    database.add([release()])
    database.remove([release().digest])
    begins = [statement for statement in seen if statement.startswith("BEGIN")]
    assert begins == ["BEGIN IMMEDIATE"] * 2
    with database._engine.read() as connection:
        settings = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in SETTINGS}
    assert settings == SETTINGS


SETTINGS = {"foreign_keys": 1, "journal_mode": "delete", "synchronous": 3, "busy_timeout": 60_000}


def test_a_database_locked_by_others_is_told(database, monkeypatch):
    monkeypatch.setattr("adapterhub_registry.engine.PATIENCE", 0.1)
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert database.releases() == []  # readers are not kept out
    with pytest.raises(HubError, match="locked") as caught:
        database.add([release()])
    assert caught.value.hint
    other.rollback()
    database.add([release()])


def test_a_full_database_is_told_and_unchanged(database, monkeypatch):
    """SQLite's own "database or disk is full"."""
    import adapterhub_registry.engine as module

    connect = module._connect

    def limited(uri, path):
        connection = connect(uri, path)
        connection.execute("PRAGMA max_page_count = 1")  # SQLite keeps it at the present number of pages
        return connection

    monkeypatch.setattr(module, "_connect", limited)
    with pytest.raises(HubError, match="full") as caught:
        database.add([release(licence="x" * 100_000)])
    assert "free some space" in caught.value.hint
    assert database.releases() == [] and database.check() == []


def test_neither_orm_nor_alembic_is_imported_to_read(database):
    code = f"""
import sys
from adapterhub_registry.database import Database
Database({str(database.path)!r}).releases()
print([name for name in ("sqlalchemy.orm", "alembic", "torch", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr
