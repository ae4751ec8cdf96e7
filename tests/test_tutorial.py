"""docs/guide/tutorial.md, run as it stands: every console line in one shell, then its Python."""

import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from crashed import publish
from served import serving

import adapterhub
from adapterhub.cli.app import execute
from adapterhub.sources import tokens
from adapterhub.spec.address import address

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/guide/tutorial.md").read_text()


def script(team, port, base):
    """The page's console blocks as a shell script; other folders, another port, and a base of the caller's."""
    lines = []
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        lines += [line.removeprefix("$ ") for line in block.splitlines()]
    text = "set -euo pipefail\n" + "\n".join(lines)
    text = text.replace("/tmp/team", str(team)).replace("8642", str(port)).replace("BASE=smollm2", f"BASE={base}")
    serving = re.compile(r"^(adapterhub registry serve .*) &$", re.MULTILINE)
    wait = f"for i in $(seq 200); do (echo > /dev/tcp/127.0.0.1/{port}) 2>/dev/null && break; sleep 0.1; done"
    assert serving.search(text)
    return serving.sub(rf"\1 &\n{wait}", text) + "\n" + python()


def python():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return f"python - <<'END'\n{code}END\n"


def run(tmp_path, base):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clone = tmp_path / "clone"  # what the page uses of one, without the hub that a demo leaves there
    clone.mkdir()
    (clone / "examples").symlink_to(ROOT / "examples")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ADAPTERHUB_CONFIG": str(tmp_path / "config"),
    }
    shell = subprocess.Popen(
        ["bash", "-c", script(tmp_path / "team", port, base)],
        cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        # The server keeps the shell's pipes: wait for the shell alone, and end the server before reading them.
        code = shell.wait(timeout=1500)
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
    out, err = shell.communicate()
    assert code == 0, err[-3000:]
    return out, err


def check(tmp_path, out):
    assert "acme/helpdesk@0.1.0" in out and "Apache-2.0" in out and 'source = "team"' in out
    ada, bob = (adapterhub.open(tmp_path / "team" / name) for name in ("ada", "bob"))
    assert {row.digest for row in bob.releases()} == {row.digest for row in ada.releases()}
    assert bob.verify() == [] and len(bob.releases()) == 3


def test_the_tutorial_on_a_tiny_base_and_what_its_last_table_promises(tmp_path, tiny_folder, monkeypatch, capsys):
    out, _ = run(tmp_path, tiny_folder)
    check(tmp_path, out)
    Table(tmp_path / "team", monkeypatch, capsys).check()


class Table:
    """What happens, row by row, after the page has run."""

    def __init__(self, team, monkeypatch, capsys):
        self.team, self.move, self.capsys = team, monkeypatch.chdir, capsys
        monkeypatch.setenv("ADAPTERHUB_CONFIG", str(team.parent / "config"))
        self.ada, self.bob, self.registry = (adapterhub.open(team / name) for name in ("ada", "bob", "registry"))

    def check(self):
        rows = {
            "Ada publishes 0.2.0": self.publishes,
            "Ada yanks 0.1.0": self.yanks,
            "somebody replaces bytes": self.replaces,
            "Bob edits": self.edits,
            "two parts were made for different bases": self.differ,
        }
        table = PAGE.partition("## When something changes")[2]
        told = re.findall(r"^\| (?!what happens)([^|]+) \| ", table, re.MULTILINE)
        assert len(told) == len(rows) and all(row.startswith(begin) for row, begin in zip(told, rows, strict=True))
        assert {row.tags for row in self.registry.releases("acme/helpdesk")} == {("stable",)}  # a push carries it
        with serving(self.registry, token="for-this-tutorial") as self.url:
            tokens.keep(address(self.url), "for-this-tutorial")
            project = self.team / "bob" / "adapterhub.toml"
            project.write_text(re.sub(r'url = ".*"', f'url = "{self.url}"', project.read_text()))
            for row in rows.values():
                row()

    def does(self, who, *command):
        self.capsys.readouterr()
        self.move(self.team / who)
        code = execute(list(command))
        told = self.capsys.readouterr()
        return code, told.out + told.err

    def version(self):
        lock = tomllib.loads((self.team / "bob" / "adapterhub.lock").read_text())
        return next(one["version"] for one in lock["adapter"] if one["name"] == "acme/helpdesk")

    def publishes(self):
        parts = "acme/sentiment + 0.25*acme/department"
        assert self.does("ada", "compose", parts, "--name", "acme/helpdesk")[0] == 0
        assert self.does("ada", "sign", "acme/helpdesk")[0] == 0
        assert self.does("ada", "push", "acme/helpdesk", self.url)[0] == 0
        assert self.does("bob", "sync")[0] == 0 and self.version() == "0.1.0"
        assert "0.2.0" in self.does("bob", "outdated")[1]
        before = (self.team / "bob" / "adapterhub.lock").read_bytes()
        assert self.does("bob", "update")[0] == 0 and self.version() == "0.2.0"
        (self.team / "bob" / "adapterhub.lock").write_bytes(before)  # the rows below are about 0.1.0

    def yanks(self):
        words = ("yank", "acme/helpdesk@0.1.0", "--reason", "it was unkind", "--at", self.url)
        assert self.does("ada", *words)[0] == 0
        self.bob.remove("acme/helpdesk@0.1.0")
        code, told = self.does("bob", "sync", "--locked")
        assert code == 0 and "warning" in told and "it was unkind" in told
        assert [row.version for row in self.bob.releases("acme/helpdesk")] == ["0.2.0", "0.1.0"]

    def replaces(self):
        blob = max(self.bob.store.folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.unlink()
        blob.write_bytes(data)
        code, told = self.does("bob", "verify")
        assert code == 4 and str(blob) in told
        assert self.does("bob", "repair")[0] == 0 and self.bob.verify() == []

    def edits(self):
        project = self.team / "bob" / "adapterhub.toml"
        before = project.read_text()
        project.write_text(before.replace("[stacks]", '[stacks]\nalone = "acme/sentiment"'))
        code, told = self.does("bob", "sync", "--locked")
        assert code == 1 and "acme/sentiment" in told and "new" in told
        project.write_text(before)
        assert self.does("bob", "sync", "--locked")[0] == 0

    def differ(self):
        publish(self.ada, "acme/other")
        assert self.does("ada", "sign", "acme/other")[0] == 0
        assert self.does("ada", "push", "acme/other", self.url)[0] == 0
        project = self.team / "bob" / "adapterhub.toml"
        project.write_text(project.read_text().replace("[stacks]", '[stacks]\nodd = "acme/helpdesk + acme/other"'))
        before = (self.team / "bob" / "adapterhub.lock").read_bytes()
        code, told = self.does("bob", "lock")
        assert code == 1 and "acme/other" in told and "acme/helpdesk" in told and "base" in told
        assert (self.team / "bob" / "adapterhub.lock").read_bytes() == before


@pytest.mark.slow
def test_the_tutorial_as_it_stands(tmp_path):
    out, _ = run(tmp_path, "smollm2")
    check(tmp_path, out)
