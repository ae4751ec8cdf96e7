"""Whose hub and whose project it is: what a stranger's folder may do to whoever works in it or installs from it."""

import hashlib
import os
import pty
import shutil
import sqlite3
import struct
import subprocess
import sys

import pytest
from adapterhub_registry import foreign

import adapterhub
from adapterhub import plugins
from adapterhub.cli.app import execute
from adapterhub.config import folders, user
from adapterhub.errors import NotFound, NotTrusted, PluginError, UnsafeFile, UsageError
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Manifest

BASE = Base(name="tiny", architecture="llama", structure=digest_of(b"shapes"), sketch=File(digest="", size=0))


def publish(hub, name="me/x"):
    return hub.publish(Manifest(name=name, version="0.0.0", base=BASE), {"log": name.encode()}, b"rows")[0]


@pytest.fixture
def stranger(tmp_path):
    """A hub that came with somebody's clone: whoever works here did not make it."""
    hub = adapterhub.open(tmp_path / "theirs", create=True)
    publish(hub)
    clone = tmp_path / "clone"
    shutil.copytree(tmp_path / "theirs", clone)
    return clone


def snapshot(folder):
    return {
        path.relative_to(folder): (path.read_bytes() if path.is_file() else None, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def crafted_journal(folder, victim):
    """A hot journal, as SQLite writes it for a transaction over several files, that names a file of the user's."""
    data = (folder / "hub.db").read_bytes()
    page = struct.unpack(">H", data[16:18])[0]
    magic, name = bytes.fromhex("d9d505f920a163d7"), str(victim).encode()
    head = magic + struct.pack(">IIIII", 0, 1, len(data) // page, 512, page)
    tail = struct.pack(">I", 0x40000000 // page + 1) + name + struct.pack(">II", len(name), sum(name)) + magic
    (folder / "hub.db-journal").write_bytes(head.ljust(512, b"\0") + tail)


# --- working in a stranger's folder --------------------------------------------------------------------------------


def test_a_hub_above_the_working_directory_that_is_not_ones_own_is_not_opened(stranger, monkeypatch, capsys):
    (stranger / "below").mkdir()
    monkeypatch.chdir(stranger / "below")
    before = snapshot(stranger)
    for command in ("list", "verify", "show me/x", "gc", "tag me/x stable", "dirs"):
        assert execute(command.split()) == 5, command
        told = capsys.readouterr().err
        assert str(stranger) in told and f"adapterhub trust folder {stranger}" in told
    with pytest.raises(NotTrusted):
        adapterhub.open()
    assert snapshot(stranger) == before


@pytest.mark.parametrize("how", ["listed", "ADAPTERHUB_HOME", "given"])
def test_the_users_word_makes_it_theirs(how, stranger, monkeypatch, capsys):
    monkeypatch.chdir(stranger)
    if how == "listed":
        assert execute(["trust", "folder", "."]) == 0
        assert (
            capsys.readouterr().out.split() == ["hub", str(stranger)] or str(stranger) in user.config_file().read_text()
        )
        hub = adapterhub.open()
    elif how == "ADAPTERHUB_HOME":
        monkeypatch.setenv("ADAPTERHUB_HOME", str(stranger))
        hub = adapterhub.open()
    else:
        hub = adapterhub.open(stranger)
    hub.tag("me/x", "stable")
    assert hub.resolve("me/x@stable").version == "0.1.0"
    assert (str(stranger) in folders.listed("hubs")) == (how == "listed")  # the other two count for one call


def test_what_one_makes_is_ones_own_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert execute(["init", "mine"]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    assert adapterhub.open().root == tmp_path / "mine"
    assert user.config_file().stat().st_mode & 0o077 in (0, 0o044)


def test_the_list_keeps_comments_and_forgets_folders_that_are_gone(tmp_path, stranger, capsys):
    user.config_file().parent.mkdir(parents=True, exist_ok=True)
    text = user.config_file().read_text() if user.config_file().exists() else ""
    user.config_file().write_text(text + "\n# mine\n")
    adapterhub.open(tmp_path / "short", create=True)
    shutil.rmtree(tmp_path / "short")
    folders.add("hubs", stranger)
    assert "# mine" in user.config_file().read_text()
    assert str(tmp_path / "short") not in folders.listed("hubs") and str(stranger) in folders.listed("hubs")
    assert execute(["trust", "folder", str(stranger), "--remove"]) == 0
    assert str(stranger) not in folders.listed("hubs")
    with pytest.raises(NotFound):
        folders.remove(stranger)
    assert execute(["trust", "folder", str(tmp_path)]) == 3  # holds neither
    user.config_file().write_text('[folders]\nhubs = "all"\n')
    with pytest.raises(UsageError, match=r"\[folders\]"):
        folders.is_own("hubs", stranger)


def test_a_configuration_that_cannot_be_written_still_makes_a_hub(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTERHUB_CONFIG", str(tmp_path / "file" / "config"))
    with pytest.warns(UserWarning, match="cannot be noted as yours"):
        hub = adapterhub.open(tmp_path / "hub", create=True)
    assert hub.releases() == []


def test_a_link_to_ones_own_hub_is_ones_own(tmp_path, monkeypatch):
    adapterhub.open(tmp_path / "hub", create=True)
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    monkeypatch.chdir(tmp_path / "link")
    assert adapterhub.open().releases() == []


def test_a_person_is_asked_once(stranger):
    """On a terminal: no leaves everything, yes is remembered, and the command that asked goes through."""

    def typed(answer):
        main, side = pty.openpty()
        running = subprocess.Popen(
            [sys.executable, "-m", "adapterhub", "list"], cwd=stranger, stdin=side, stdout=subprocess.PIPE, stderr=side
        )
        os.close(side)
        os.write(main, answer)
        out = running.communicate(timeout=60)[0].decode()
        shown = b""
        try:
            while chunk := os.read(main, 4096):
                shown += chunk
        except OSError:  # the other side is closed
            pass
        os.close(main)
        return running.returncode, out, shown.decode()

    code, out, shown = typed(b"n\n")
    assert code == 5 and not out and "not one that you made" in shown and folders.listed("hubs") != [str(stranger)]
    code, out, shown = typed(b"y\n")
    assert code == 0 and "me/x" in out and str(stranger) in folders.listed("hubs")
    code, out, shown = typed(b"")
    assert code == 0 and "me/x" in out and not shown


# --- installing from one -------------------------------------------------------------------------------------------


def test_installing_from_a_hub_changes_nothing_in_its_folder(stranger, tmp_path):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    before = snapshot(stranger)
    assert hub.install(f"{stranger}:me/x")[0].name == "me/x"
    after = snapshot(stranger)
    assert {path for path in after if after[path][0] != before.get(path, (b"",))[0]} == set()
    assert after.keys() == before.keys() and hub.verify() == []


@pytest.mark.parametrize("own", [False, True])
def test_a_crafted_journal_deletes_nothing(stranger, tmp_path, own, monkeypatch, capsys):
    victim = tmp_path / "precious.txt"
    victim.write_text("the user's own file")
    crafted_journal(stranger, victim)
    hub = adapterhub.open(tmp_path / "hub", create=True)
    if own:  # a folder that was trusted once, and pulled again
        folders.add("hubs", stranger)
    with pytest.raises(UnsafeFile):
        hub.install(f"{stranger}:me/x")
    monkeypatch.chdir(stranger)
    assert execute(["list"]) == 5
    with pytest.raises(UnsafeFile):
        adapterhub.open(stranger)
    assert victim.read_text() == "the user's own file" and (stranger / "hub.db-journal").exists()


def test_the_journal_of_a_killed_process_of_ones_own_is_rolled_back(tmp_path):
    """What `check_journal` refuses is not what SQLite itself leaves."""
    hub = adapterhub.open(tmp_path / "hub", create=True)
    publish(hub)
    path = tmp_path / "hub" / "hub.db"
    program = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN IMMEDIATE'); c.execute(\"UPDATE releases SET name = 'x/y'\")\n"
        "c.execute('CREATE TABLE t (x)'); c.executemany('INSERT INTO t VALUES (?)', [('x' * 5000,)] * 200)\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 9
    assert path.with_name("hub.db-journal").stat().st_size > 512
    other = adapterhub.open(tmp_path / "other", create=True)
    with pytest.raises(UnsafeFile, match="in the middle of a change"):  # only its owner may roll it back
        other.install(f"{tmp_path / 'hub'}:me/x")
    assert adapterhub.open(tmp_path / "hub").resolve("me/x").name == "me/x"
    assert other.install(f"{tmp_path / 'hub'}:me/x")


def _view(connection):
    connection.execute("ALTER TABLE releases RENAME TO r0")
    columns = [row[1] for row in connection.execute("PRAGMA table_info(r0)")]
    connection.execute(
        "CREATE VIEW releases AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "
        + ", ".join(f"r0.{column}" for column in columns)
        + " FROM r0, n WHERE n.i < 0"
    )


def _trigger(connection):
    connection.execute("CREATE TRIGGER t AFTER UPDATE ON releases BEGIN DELETE FROM releases; END")


def _virtual(connection):
    connection.execute("CREATE VIRTUAL TABLE v USING fts5(x)")


def _wal(connection):
    connection.execute("PRAGMA journal_mode = WAL")


def _large(connection):
    connection.execute("UPDATE releases SET base = ?", ["x" * (foreign.LARGEST_VALUE + 1)])


def _many(connection):
    columns = [row[1] for row in connection.execute("PRAGMA table_info(releases)") if row[1] not in ("id", "version")]
    listed = ", ".join(columns)
    connection.execute(
        f"INSERT INTO releases (version, {listed}) WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 3000)"
        f" SELECT '9.0.' || i, {listed.replace('base', repr('x' * 40_000))} FROM releases, n"
    )


@pytest.mark.parametrize("make", [_view, _trigger, _virtual, _wal, _large, _many])
def test_what_no_hub_holds_is_refused(make, stranger, tmp_path):
    connection = sqlite3.connect(stranger / "hub.db", isolation_level=None)
    make(connection)
    connection.close()
    hub = adapterhub.open(tmp_path / "hub", create=True)
    with pytest.raises(UnsafeFile, match=str(stranger)) as caught:
        hub.install(f"{stranger}:me/x")
    assert caught.value.hint and hub.releases() == [] and hub.verify() == []


def test_a_query_that_does_not_end_is_ended(stranger, tmp_path, monkeypatch):
    """A column that is computed: no view, and slow all the same."""
    monkeypatch.setattr(foreign, "SECONDS", 0.2)
    connection = sqlite3.connect(stranger / "hub.db", isolation_level=None)
    slow = "replace(hex(zeroblob(4000000)), '0', 'ab')"
    connection.execute(f"ALTER TABLE tags ADD COLUMN slow TEXT AS (length({' || '.join([slow] * 2)})) VIRTUAL")
    connection.execute("INSERT INTO tags (name, version, tag) SELECT name, version, 't' FROM releases")
    connection.close()
    look = foreign.connect(stranger / "hub.db", 1)
    with pytest.raises(sqlite3.OperationalError, match=r"interrupted|too big"):
        look.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n, tags WHERE slow"
        ).fetchall()
    look.close()


@pytest.mark.parametrize("what", ["pipe", "link to a device", "endless"])
def test_a_blob_that_is_not_a_plain_file_is_refused(what, stranger, tmp_path):
    digest = hashlib.sha256(b"me/x").hexdigest()
    blob = stranger / "blobs" / "sha256" / digest[:2] / digest
    blob.unlink()
    if what == "pipe":
        os.mkfifo(blob)
    elif what == "link to a device":
        blob.symlink_to("/dev/zero")
    else:
        with blob.open("wb") as file:
            file.truncate(1 << 40)
    hub = adapterhub.open(tmp_path / "hub", create=True)
    with pytest.raises(adapterhub.errors.HubError):
        hub.install(f"{stranger}:me/x")
    assert hub.releases() == [] and hub.verify() == []


@pytest.mark.parametrize("name", ["hub.db", "hub.db-journal", "hub.db-wal", "hub.db-shm"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link"])
def test_an_index_that_is_not_a_plain_file_is_refused(name, what, stranger, tmp_path):
    path = stranger / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    hub = adapterhub.open(tmp_path / "hub", create=True)
    with pytest.raises(adapterhub.errors.HubError) as caught:
        hub.install(f"{stranger}:me/x")
    assert caught.value.hint and hub.releases() == []


@pytest.mark.parametrize("what", ["pipe", "endless"])
@pytest.mark.parametrize("name", ["adapterhub.lock", "adapterhub.toml"])
def test_a_projects_file_that_is_not_a_plain_file_is_refused(name, what, tmp_path, monkeypatch, capsys):
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    (tmp_path / "project" / "adapterhub.toml").write_text("[adapters]\n")
    path = tmp_path / "project" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if what == "pipe" else path.symlink_to("/dev/zero")
    for command in (["tree"], ["sync"]):
        assert execute(command) in (0, 1, 2, 3), command  # a project file that is no file is no project
        assert "Traceback" not in capsys.readouterr().err


def test_a_lock_that_is_a_link_is_not_followed(stranger, tmp_path):
    (stranger / "hub.lock").unlink(missing_ok=True)
    (stranger / "hub.lock").symlink_to(tmp_path / "made")
    adapterhub.open(tmp_path / "hub", create=True).install(f"{stranger}:me/x")
    with pytest.raises(adapterhub.errors.HubError):
        publish(adapterhub.open(stranger), "me/y")
    assert not (tmp_path / "made").exists()


# --- plugins -------------------------------------------------------------------------------------------------------


def package(site, name, group="codecs", part="bad"):
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[adapterhub.{group}]\n{part} = {name}:Bad\n")
    (site / f"{name}.py").write_text("raise RuntimeError('imported')\n")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages that bring a codec `bad`, one that calls its codec `svd` as ours is, and one that calls a base as a folder."""
    site = tmp_path / "site"
    for name in ("one", "two"):
        package(site, name)
    package(site, "shadow", part="svd")
    package(site, "ground", "bases", "smollm2")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("ADAPTERHUB_PLUGINS", "")
    plugins.metadata.entry_points_of.cache_clear()
    plugins.load.cache_clear()
    yield monkeypatch
    plugins.metadata.entry_points_of.cache_clear()
    plugins.load.cache_clear()


def test_only_enabled_packages_take_part(packages, capsys):
    assert plugins.load("codecs", "svd").__module__ == "adapterhub.codecs.svd"
    assert plugins.distribution("bases", "smollm2").startswith("adapterhub ")
    assert execute(["plugins", "list"]) == 0 and "bad" in capsys.readouterr().out
    with pytest.raises(PluginError, match="not enabled"):
        plugins.load("codecs", "bad")
    assert "bad" not in plugins.enabled_names("codecs")
    assert execute(["doctor"]) == 0, capsys.readouterr().out
    assert "one 1.0 (not enabled)" in capsys.readouterr().out


def test_two_enabled_packages_may_not_bring_one_name(packages):
    packages.setenv("ADAPTERHUB_PLUGINS", "one,shadow")
    assert plugins.distribution("codecs", "bad") == "one 1.0"
    assert plugins.load("codecs", "svd").__module__ == "adapterhub.codecs.svd"
    packages.setenv("ADAPTERHUB_PLUGINS", "one,two")
    with pytest.raises(PluginError, match=r"two packages bring codecs named 'bad': one 1\.0 and two 1\.0") as caught:
        plugins.names("codecs")
    assert "plugins disable two" in caught.value.hint


def test_a_project_of_a_stranger_enables_nothing(packages, tmp_path, capsys):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "adapterhub.toml").write_text('[plugins]\nenabled = ["one"]\n')
    packages.chdir(tmp_path / "project")
    assert execute(["plugins", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert next(line for line in listed if "one 1.0" in line).endswith("not enabled")
    assert execute(["plugins", "show", "bad"]) == 5
    told = capsys.readouterr().err
    assert f"adapterhub trust folder {tmp_path / 'project'}" in told and "imported" not in told
    assert execute(["trust", "folder", "."]) == 0
    assert execute(["plugins", "show", "bad"]) == 3 and "imported" in capsys.readouterr().err  # now it runs, and fails
    adapterhub.open(tmp_path / "project2", create=True)  # making a hub allows no code
    (tmp_path / "project2" / "adapterhub.toml").write_text('[plugins]\nenabled = ["two"]\n')
    packages.chdir(tmp_path / "project2")
    assert not plugins.is_enabled("two")
