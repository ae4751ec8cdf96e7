"""The steps that adapterhub.files.durable announces are those that the kernel was asked for, one by one: no write goes past it.

Of the database's own calls only the commit counts: in rollback-journal mode it is the removal of the journal.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from crashed import COMMANDS, make_wide

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "write": "write", "pwrite64": "write", "writev": "write", "fsync": "fsync", "fdatasync": "fsync",
    "rename": "rename", "renameat": "rename", "renameat2": "rename", "link": "link", "linkat": "link",
    "unlink": "unlink", "unlinkat": "unlink",
}  # fmt: skip
PROGRAM = """
import json, sys
from pathlib import Path
import crashed
from failpoints import Steps
folder, name = Path(sys.argv[1]), sys.argv[2]
with Steps() as steps:
    crashed.COMMANDS[name](folder)
print(json.dumps([step for step, *_ in steps.trace]))
"""
NAMES = [name for name in COMMANDS if name not in ("init", "rebuild", "backup")]
"""The last two move and remove whole databases: such calls cannot be told from the database's own."""


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return make_wide(tmp_path_factory.mktemp("strace") / "before")


def traced(program, folder, *arguments):
    """(announced, asked): Counters of the steps of a program that prints what was announced."""
    log = folder.parent / "strace.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/support"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        ["strace", "-f", "-y", "-qq", "-s", "200", "-e", "trace=" + ",".join(KINDS), "-o", str(log), sys.executable, "-c", program, str(folder), *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    announced = Counter(json.loads(done.stdout.splitlines()[-1]))
    asked = Counter()
    for line in log.read_text(errors="replace").splitlines():
        found = re.match(r"\d+ +(\w+)\((.*)", line)
        if not found or found[1] not in KINDS or " = -1 ENOENT" in line or "<... " in line:
            continue
        paths = re.findall(r'[<"](/[^">]*)[>"]', found[2])
        mine = [path for path in paths if path.startswith(str(folder) + "/") or path == str(folder)]
        if not mine:
            continue
        name = Path(mine[0].removesuffix(" (deleted)")).name
        if name.startswith("hub.db") and not name.endswith("backup"):
            asked["commit"] += name == "hub.db-journal" and KINDS[found[1]] == "unlink"
        elif not name.endswith(".lock"):
            asked[KINDS[found[1]]] += 1
    asked["fsync"] -= (
        2 * asked["commit"]
    )  # SQLite syncs the folder when the journal has come and when it has gone (EXTRA)
    return announced, +asked


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_A1_every_call_is_announced(before, tmp_path, name):
    folder = Path(shutil.copytree(before, tmp_path / "all"))
    announced, asked = traced(PROGRAM, folder, name)
    assert announced == asked and sum(announced.values()) >= 1


# --- nobody else writes ---------------------------------------------------------------------------------------------

WRITES = {
    "os": {
        "open",
        "rename",
        "replace",
        "link",
        "symlink",
        "unlink",
        "remove",
        "rmdir",
        "mkdir",
        "makedirs",
        "truncate",
        "write",
    },
    "shutil": {"rmtree", "move", "copy", "copy2", "copyfile", "copytree"},
    "tempfile": {"NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile", "mkdtemp", "mkstemp"},
}
METHODS = {
    "write_bytes",
    "write_text",
    "unlink",
    "touch",
    "mkdir",
    "rename",
    "replace",
    "rmdir",
    "symlink_to",
    "hardlink_to",
}
ALLOWED = {
    "adapterhub/files/durable.py": "it is the one that writes",
    "adapterhub/files/locks.py": "lock files, which are empty",
    "adapterhub/cli/app.py": "stdout to nowhere when nobody reads it",
    "adapterhub/training/train.py": "checkpoints are removed, which transformers' Trainer wrote",
    "adapterhub/training/stages.py": "the same",
    "adapterhub/training/trainer.py": "the same",
    "adapterhub/testing/ingredients.py": "laws try a part in a folder that is thrown away",
    "adapterhub/testing/methods.py": "laws try a method in a folder that is thrown away",
}


def writes(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if function.attr in WRITES.get(owner, ()):
                yield node.lineno, f"{owner}.{function.attr}"
            elif (
                function.attr in METHODS
                and owner not in ("durable", "text", "msgspec", "dataclasses")
                and not node.keywords
            ) and (function.attr != "replace" or len(node.args) == 1):
                yield node.lineno, function.attr
        mode = next((a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)), "")
        named = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if named == "open" and re.fullmatch(r"[rbt]*[wax+][rbt+]*", mode):
            yield node.lineno, f"open {mode}"


def test_A1_nobody_but_durable_writes_files():
    found = {
        f"{path.relative_to(ROOT)}:{line} {what}"
        for folder in ("adapterhub", "registry")
        for path in (ROOT / folder).rglob("*.py")
        if str(path.relative_to(ROOT)) not in ALLOWED
        for line, what in writes(path)
    }
    assert not found


def test_every_exception_is_still_one():
    assert [name for name in ALLOWED if not any(writes(ROOT / name))] == []
