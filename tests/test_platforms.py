"""Operating systems: what POSIX gives is asked for in one module, and a system without it is refused at start."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub.files import durable, platforms

ROOT = Path(__file__).parent.parent
WINDOWS = "import os, pathlib, sys; os.name = 'nt'; sys.argv = {argv!r}; "


def started(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("argv", [["adapterhub", "list"], ["adapterhub.exe"], ["-m", "list"]])
def test_windows_is_refused_in_one_line(argv):
    code, out, err = started(WINDOWS.format(argv=argv) + "import adapterhub.cli.app")
    assert (
        code == 1
        and not out
        and err == "error: adapterhub runs on Linux and macOS, not on Windows: use it inside WSL\n"
    )


def test_a_program_on_windows_gets_an_import_error():
    code, _, err = started(WINDOWS.format(argv=["mine.py"]) + "import adapterhub")
    assert code == 1 and err.splitlines()[-1].startswith("ImportError: adapterhub runs on Linux and macOS")


def test_only_one_module_asks_for_what_windows_lacks():
    """Modules, and names of `os` and `signal`, that Python has on POSIX systems only."""
    lacking = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
    names = {
        "O_NOFOLLOW",
        "O_NONBLOCK",
        "O_CLOEXEC",
        "geteuid",
        "getuid",
        "fork",
        "mkfifo",
        "killpg",
        "setsid",
        "SIGKILL",
        "SIGALRM",
    }
    for package in (ROOT / "adapterhub", ROOT / "registry" / "adapterhub_registry"):
        for path in package.rglob("*.py"):
            if path.name == "platforms.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                found = {name.name for name in node.names} if isinstance(node, ast.Import) else set()
                found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
                found |= {node.attr} if isinstance(node, ast.Attribute) else set()
                assert not found & (lacking | names), f"{path}: {found & (lacking | names)}"


def test_on_macos_a_file_is_flushed_out_of_the_drive_too(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(platforms.sys, "platform", "darwin")
    monkeypatch.setattr(platforms.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(platforms.fcntl, "fcntl", lambda handle, command: asked.append(command))
    durable.write_bytes(tmp_path / "x", b"1")
    assert asked == [51, 51]  # the file, and the folder that names it

    def unknown(handle, command):
        raise OSError(errno.ENOTTY, "no")

    synced = []
    monkeypatch.setattr(platforms.fcntl, "fcntl", unknown)
    monkeypatch.setattr(platforms.os, "fsync", synced.append)
    durable.write_bytes(tmp_path / "y", b"1")
    assert len(synced) == 2


def test_where_the_system_does_not_say_who_holds_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert platforms.lock_holders(tmp_path) == []
    assert platforms.command_line(2**22 + 5) == []


def test_a_limit_on_memory_and_on_computing_holds():
    code, _, err = started("from adapterhub import platforms as p; p.limit_memory(64 << 20); x = bytes(256 << 20)")
    assert code == 1 and "MemoryError" in err
    code, _, _ = started("from adapterhub import platforms as p; p.limit_computing(1)\nwhile True: pass")
    assert code < 0 and -code in (9, 24)  # SIGKILL, SIGXCPU


def test_readme_and_pyproject_name_the_systems():
    assert "Linux" in (text := (ROOT / "README.md").read_text()) and "macOS" in text and "Windows" in text
    assert "Operating System :: POSIX :: Linux" in (ROOT / "pyproject.toml").read_text()
    assert os.name == "posix"
