"""The project file, the lock, and what a lock brings on another machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from crashed import TENSORS, large, publish

import adapterhub
from adapterhub.bases import resolution
from adapterhub.cli.app import execute
from adapterhub.config import lock as locks
from adapterhub.config import project as projects
from adapterhub.config.lock import StaleLock
from adapterhub.errors import HubError, IntegrityError, NotFound, UsageError
from adapterhub.install.stacks import read as read_expression
from adapterhub.store.history import yank


@pytest.fixture
def source(tmp_path):
    """A hub with acme/base, acme/sql 0.1.0 and 0.2.0 (over it), acme/tone."""
    hub = adapterhub.open(tmp_path / "source", create=True)
    base = publish(hub, "acme/base", large(1))
    publish(hub, "acme/sql", large(2), [base])
    publish(hub, "acme/sql", large(3), [base])
    publish(hub, "acme/tone", TENSORS)
    return hub


@pytest.fixture
def here(tmp_path, source, monkeypatch):
    """A project's folder, with a hub in it, as the working directory."""
    folder = tmp_path / "project"
    adapterhub.open(folder, create=True)
    (folder / "adapterhub.toml").write_text(
        "# what we need\n"
        '[sources.team]\npath = "../source"\nnamespaces = ["acme"]\n'
        '[stacks]\nhelpdesk = "acme/sql + 0.5*acme/tone"\n'
    )
    monkeypatch.chdir(folder)
    return folder


def run(*arguments):
    return execute(list(arguments))


def test_add_lock_sync_and_a_stack(here, capsys):
    assert run("add", "acme/sql>=0.1") == 0
    text = (here / "adapterhub.toml").read_text()
    assert text.startswith("# what we need") and '"acme/sql" = ">=0.1"' in text
    hub = adapterhub.open(here)
    assert {str(row) for row in hub.releases()} == {"acme/base@0.1.0", "acme/sql@0.2.0", "acme/tone@0.1.0"}
    assert hub.verify() == []
    assert str(read_expression(hub, "stack:helpdesk")) == "acme/sql@0.2.0 + 0.5*acme/tone@0.1.0"
    before = (here / "adapterhub.lock").read_bytes()
    assert run("lock", "--locked") == 0 and run("sync", "--locked") == 0 and run("sync", "--frozen") == 0
    assert (here / "adapterhub.lock").read_bytes() == before
    capsys.readouterr()
    assert run("why", "acme/base", "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["needed_by"] == ["acme/sql@0.2.0"]
    assert run("why", "acme/tone") == 0 and "the stack helpdesk" in capsys.readouterr().out
    assert run("tree") == 0 and "    acme/base@0.1.0" in capsys.readouterr().out
    assert run("remove", "acme/sql") == 1  # the stack is made of it
    assert run("why", "acme/none") == 3


def test_install_by_range_tag_digest_source_and_place(here, source):
    source.tag("acme/sql@0.1.0", "stable")
    digest = source.resolve("acme/sql@0.1.0").digest
    for text, version in (
        ("acme/sql>=0.2", "0.2.0"),
        ("acme/sql@stable", "0.1.0"),
        (f"acme/sql@{digest}", "0.1.0"),
        ("team:acme/sql<0.2", "0.1.0"),
        (f"{source.root}:acme/sql@0.2.0", "0.2.0"),
    ):
        fresh_hub(here)
        assert run("install", text) == 0, text
        assert [row.version for row in adapterhub.open(here).releases("acme/sql")] == [version]
    assert run("install", "acme/sql>=9") == 3 and run("install", "acme/sql>>9") == 2


def test_what_is_locked_stays_until_it_is_updated(here, source, capsys):
    assert run("add", "acme/sql") == 0
    publish(source, "acme/sql", large(4))
    assert run("lock") == 0 and run("sync") == 0
    assert locks.read(here).chosen("acme/sql").version == "0.2.0"
    assert run("add", "acme/tone") == 0  # another line: the lock is made anew, and keeps what still fits
    assert locks.read(here).chosen("acme/sql").version == "0.2.0"
    capsys.readouterr()
    assert run("outdated", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outdated"] == [
        {"name": "acme/sql", "locked": "0.2.0", "allowed": "0.3.0", "newest": "0.3.0"}
    ]
    assert run("update", "acme/tone") == 0 and locks.read(here).chosen("acme/sql").version == "0.2.0"
    assert run("update", "acme/sql") == 0 and locks.read(here).chosen("acme/sql").version == "0.3.0"
    assert run("update", "acme/none") == 3


def test_what_does_not_fit_changes_nothing(here):
    assert run("add", "acme/sql") == 0
    before = {path: path.read_bytes() for path in (here / "adapterhub.toml", here / "adapterhub.lock")}
    assert run("add", "acme/sql>=9") == 3 and run("add", "acme/none") == 3 and run("add", "nonsense>>1") == 2
    assert {path: path.read_bytes() for path in before} == before


def test_a_local_release_is_found_in_the_hub_itself_and_said_so(here, tmp_path, monkeypatch, capsys):
    publish(adapterhub.open(here), "me/own", TENSORS)
    assert run("add", "me/own") == 0 and locks.read(here).chosen("me/own").source == "hub"
    other = tmp_path / "other"
    adapterhub.open(other, create=True)
    for name in ("adapterhub.toml", "adapterhub.lock"):
        shutil.copy(here / name, other)
    monkeypatch.chdir(other)
    assert run("sync", "--locked") == 3
    assert "me/own@0.1.0 (sha256:" in capsys.readouterr().err


# --- E --------------------------------------------------------------------------------------------------------------


def edited(here, old, new):
    path = here / "adapterhub.lock"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def fresh_hub(here):
    """The same project with an empty hub."""
    for path in (here / "hub.db", here / "hub.lock"):
        path.unlink(missing_ok=True)
    shutil.rmtree(here / "blobs", ignore_errors=True)
    adapterhub.open(here, create=True)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ("hash", "sha256:0000000"),
        ("hash of another", ", not sha256:"),
        ("source", "nowhere"),
        ("both", "nowhere"),
        ("another source", "was locked, and is not in this one"),
        ("unknown field", "surprise"),
        ("newer", "of version 2, which this adapterhub does not know"),
        ("twice", "stands in it twice"),
        ("size", "does not say of acme/sql"),
        ("endless size", "is no lock"),
        ("not toml", "is no lock"),
    ],
)
def test_E1_a_lock_that_was_edited_is_refused(here, source, edit, says, capsys):
    """Each for the reason that it was edited, so that none hides behind another."""
    assert run("add", "acme/sql") == 0
    locked = locks.read(here).chosen("acme/sql")
    other = "sha256:" + "0" * 64
    if edit in ("hash", "both"):
        edited(here, locked.digest, other)
    if edit == "hash of another":
        edited(here, locked.digest, source.resolve("acme/sql@0.1.0").digest)
    if edit in ("source", "both"):
        edited(here, 'source = "team"', 'source = "nowhere"')
    if edit == "another source":
        edited(here, 'source = "team"', 'source = "hub"')
    if edit == "unknown field":
        edited(here, "asked = true", "asked = true\nsurprise = 1")
    if edit == "newer":
        edited(here, "version = 1\n", "version = 2\n")
    if edit == "twice":
        path = here / "adapterhub.lock"
        block = next(b for b in path.read_text().split("\n\n") if "acme/sql" in b and "[[adapter]]" in b)
        path.write_text(path.read_text() + "\n" + block)
    if edit == "size":
        edited(here, f"size = {locked.size}", f"size = {locked.size + 1}")
    if edit == "endless size":
        edited(here, f"size = {locked.size}", "size = 99999999999999999999999")
    if edit == "not toml":
        (here / "adapterhub.lock").write_text("version = [")
    fresh_hub(here)
    assert run("sync", "--frozen") in (1, 3, 4)
    told = capsys.readouterr().err
    assert "error:" in told and "hint:" in told and "Traceback" not in told
    assert says in told.partition("hint:")[0]
    assert adapterhub.open(here).releases() == []


def test_E3_yanked_after_locking_installs_with_a_warning_and_removed_is_named(here, source, capsys):
    assert run("add", "acme/sql") == 0
    fresh_hub(here)
    yank(source, "acme/sql@0.2.0", "labels were swapped")
    assert run("sync", "--locked") == 0
    assert "labels were swapped" in capsys.readouterr().err
    digest = locks.read(here).chosen("acme/sql").digest
    fresh_hub(here)
    source.remove("acme/sql@0.2.0")
    assert run("sync", "--locked") == 3
    assert digest in capsys.readouterr().err
    assert all(row.name != "acme/sql" for row in adapterhub.open(here).releases())  # and nothing takes its place


def test_E7_locked_frozen_and_offline(here, capsys, monkeypatch):
    assert run("lock", "--locked") == 0 or True  # without a lock it is made
    assert run("add", "acme/sql") == 0
    before = (here / "adapterhub.lock").read_bytes()
    with (here / "adapterhub.toml").open("a") as file:
        file.write('[adapters."acme/tone"]\nversion = "==0.1.0"\n')
    for command in (["lock", "--locked"], ["sync", "--locked"]):
        assert run(*command) == 1
        assert "stale" in capsys.readouterr().err
    assert run("sync", "--frozen") == 0
    assert (here / "adapterhub.lock").read_bytes() == before
    assert run("sync", "--locked", "--frozen") == 2
    with pytest.raises(StaleLock):
        read_expression(adapterhub.open(here), "stack:helpdesk")


def test_E7_offline_with_nothing_at_hand_opens_no_socket(tmp_path, monkeypatch):
    """In a process of its own, under an audit hook that sees every connection."""
    adapterhub.open(tmp_path, create=True)
    (tmp_path / "adapterhub.toml").write_text(
        '[adapters]\n"acme/sql" = "*"\n[sources.team]\nurl = "http://127.0.0.1:9"\nnamespaces = ["acme"]\n'
    )
    program = (
        "import sys\n"
        "def hook(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'):\n"
        "        print('SOCKET', event, arguments, flush=True)\n"
        "sys.addaudithook(hook)\n"
        "from adapterhub.cli.app import execute\n"
        "sys.exit(execute(sys.argv[1:]))\n"
    )
    for arguments in (
        ["sync", "--offline"],
        ["install", "acme/sql", "--offline"],
        ["install", "hf:acme/sql", "--offline"],
    ):
        done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 3 and "SOCKET" not in done.stdout, done.stdout + done.stderr
    online = subprocess.run([sys.executable, "-c", program, "sync"], cwd=tmp_path, capture_output=True, text=True)
    assert "SOCKET" in online.stdout  # the hook does see them


def test_E7_offline_with_everything_at_hand(here, source, monkeypatch):
    assert run("add", "acme/sql") == 0

    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run("sync", "--offline") == 0 and run("lock", "--offline") == 0


def test_E8_the_line_ends_of_another_system_read_the_same(here):
    assert run("add", "acme/sql") == 0
    path = here / "adapterhub.lock"
    before = locks.read(here)
    assert b"\r" not in path.read_bytes() and path.read_bytes().endswith(b"\n")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (here / "adapterhub.toml").write_bytes((here / "adapterhub.toml").read_bytes().replace(b"\n", b"\r\n"))
    assert locks.read(here) == before and run("sync", "--locked") == 0


def test_the_lock_is_the_same_wherever_it_is_made_and_reads_back(here, tmp_path):
    assert run("add", "acme/sql") == 0
    lock = locks.read(here)
    assert lock.encode() == (here / "adapterhub.lock").read_bytes()
    assert [one.name for one in lock.adapter] == sorted(one.name for one in lock.adapter)
    assert "source" in lock.encode().decode() and str(tmp_path) not in lock.encode().decode()


def other_user(read, own):
    """What makes a process run as another user, who may read some folders and owns others; nothing where that cannot be."""
    if os.getuid() != 0:
        return {}
    user = {"user": 65534, "group": 65534}
    try:
        subprocess.run(
            [sys.executable, "-c", "import adapterhub.install.project"], check=True, capture_output=True, **user
        )
    except (OSError, subprocess.CalledProcessError):
        return {}  # this installation lies where others may not look
    for folder in own:
        for path in (folder, *folder.iterdir()):
            os.chown(path, 65534, 65534)
    for folder in read:
        for path in (*folder.parents, *([folder, *folder.rglob("*")] if folder.is_dir() else [folder])):
            if path.is_relative_to("/tmp") and path != Path("/tmp"):
                os.chmod(path, 0o777 if path.is_dir() else 0o666)
    return user


def test_a_lock_in_a_second_home_gives_the_same_bytes_or_names_what_it_lacks(here, source, tmp_path):
    """Another user, umask, locale, time zone and clock; the first store is gone."""
    assert run("add", "acme/sql") == 0
    first = {p.name: p.read_bytes() for p in (here / "blobs").rglob("*") if p.is_file()}
    second = tmp_path / "second"
    second.mkdir()
    for name in ("adapterhub.toml", "adapterhub.lock"):
        shutil.copy(here / name, second)
    shutil.rmtree(here / "blobs")
    (here / "hub.db").unlink()
    program = (
        "import os, sys, time\n"
        "os.umask(0o077)\n"
        "time.time = lambda real=time.time: real() + 10 * 365 * 86400\n"
        "from adapterhub.cli.app import execute\n"
        "sys.exit(execute(['init']) or execute(['sync', '--locked']))\n"
    )
    user = other_user([tmp_path, source.root], [second])
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(second), "LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati",
        "PYTHONDONTWRITEBYTECODE": "1", "ADAPTERHUB_CONFIG": str(second / "config"),
    }  # fmt: skip

    def sync():
        return subprocess.run(
            [sys.executable, "-c", program], cwd=second, env=environment, capture_output=True, text=True, **user
        )

    done = sync()
    assert done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in (second / "blobs").rglob("*") if p.is_file()} == first
    victim = next(p for p in (source.root / "blobs").rglob("*") if p.is_file() and p.stat().st_size == 70000)
    victim.write_bytes(b"\1" * 70000)
    for path in (second / "hub.db", second / "hub.lock"):
        path.unlink()
    shutil.rmtree(second / "blobs")
    broken = sync()
    assert broken.returncode == 4 and victim.name in broken.stderr


# --- the project file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[adapter]\n", r"did you mean \[adapters\]|adapter"),
        ('[adapters]\n"acme/sql" = "1.2"\n', "no range"),
        ('[adapters]\n"acme/sql" = { versions = ">=1" }\n', "unknown key"),
        ('[adapters]\n"ACME" = "*"\n', "not a name"),
        ('[adapters]\n"acme/sql" = { version = "*", source = "team" }\n', "not there"),
        ('[stacks]\nhelp = "acme/sql +"\n', "expected|ends|nothing"),
        ('[stacks]\nhelp = "acme/sql@0.1.0"\n', "stand alone"),
        ('[stacks]\n"a b" = "acme/sql"\n', "no name for a stack"),
        ('[sources.team]\nurl = "http://x"\npath = "y"\n', "needs one"),
        ('[sources.hub]\npath = "y"\n', "no name for a source"),
        (
            '[sources.a]\npath = "y"\nnamespaces = ["n"]\n[sources.b]\npath = "z"\nnamespaces = ["n"]\n',
            "bound to a and to b",
        ),
        ("[sources", "not TOML"),
        ('[sources.x]\npath = "a\\u0000b"\n', "control characters"),
        ('[adapters]\n"acme/sql" = ">=' + "9" * 6000 + '"\n', "characters"),
        (".".join("a" * 20_000) + " = 1", "nested deeper"),
    ],
)
def test_a_project_file_that_is_not_right_says_where(tmp_path, text, says):
    (tmp_path / "adapterhub.toml").write_text(text)
    with pytest.raises(HubError, match=says) as caught:
        projects.read(tmp_path)
    assert caught.value.code == 2 and caught.value.hint


def test_no_project_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("lock", "sync", "tree", "update"):
        assert run(command) == 3


def test_bases_have_the_names_that_the_project_gives_them(tmp_path, tiny_folder, monkeypatch):

    (tmp_path / "adapterhub.toml").write_text(f'[bases]\nbase = "{tiny_folder}"\n')
    monkeypatch.chdir(tmp_path)
    assert resolution.resolve("base").folder == tiny_folder.resolve()


def test_a_stack_runs_as_its_pinned_expression(tmp_path, tiny_folder, monkeypatch):
    import torch

    from adapterhub.adapters.publish import publish_tensors
    from adapterhub.bases.fingerprint import fingerprint
    from adapterhub.forms.low_rank import LowRank
    from adapterhub.sites import sites
    from adapterhub.testing.bed import tiny_llama

    hub = adapterhub.open(tmp_path, create=True)
    record, sketch = fingerprint(tiny_folder)
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        parts = {s.path: [LowRank.random(s)] for s in sites(tiny_llama(0)) if s.role == "query"}
        publish_tensors(hub, parts, name=f"me/{name}", base=record, sketch=sketch)
    (tmp_path / "adapterhub.toml").write_text(f'[stacks]\nboth = "me/a + 0.5*me/b"\n[bases]\nbase = "{tiny_folder}"\n')
    monkeypatch.chdir(tmp_path)
    assert run("sync") == 0
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        ours = hub.load("base", "stack:both")(input_ids=ids).logits
        wanted = hub.load(tiny_folder, "me/a + 0.5*me/b")(input_ids=ids).logits
    assert torch.equal(ours, wanted)
    hub.remove("me/b")
    with pytest.raises(NotFound, match=r"me/b@0\.1\.0 is locked"):
        hub.load("base", "stack:both")


assert IntegrityError and UsageError
