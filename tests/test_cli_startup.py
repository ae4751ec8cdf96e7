"""What the light commands import: never torch, and only what they need of the rest."""

import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "accelerate", "alembic", "huggingface_hub", "httpx", "numpy"}
WATCHED = HEAVY | {"sqlalchemy", "rich", "pydantic"}
PROBE = f"""
import sys
from adapterhub.cli.app import execute
status = execute(sys.argv[1:])
print(*sorted({WATCHED} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


def loaded(command: str, cwd) -> tuple[int, set[str]]:
    """(exit status, which of the watched modules the command left imported) in a fresh interpreter."""
    run = [sys.executable, "-c", PROBE, *command.split()]
    environment = {**os.environ, "ADAPTERHUB_HOME": str(cwd)}
    result = subprocess.run(run, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return result.returncode, set(result.stderr.splitlines()[-1].split())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub made before, so that alembic has done its work."""
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, "-m", "adapterhub", "init"], cwd=folder, check=True, capture_output=True)
    return folder


LIGHT = {
    "--help": 0,
    "--version": 0,
    "train --help": 0,
    "list": 0,
    "plugins list": 0,
    "verify": 0,
    "show me/none": 3,
    "show me/none --sites": 3,
    "explain me/none": 1,
    "rm me/none": 3,
    "tag me/none stable": 3,
    "install no/folder": 3,
}


@pytest.mark.parametrize("command", LIGHT)
def test_light_commands_import_nothing_heavy(command, hub):
    status, modules = loaded(command, hub)
    assert status == LIGHT[command]
    assert not modules & HEAVY


def test_list_imports_neither_rich_nor_pydantic(hub):
    assert loaded("list", hub)[1] == {"sqlalchemy"}


def test_help_needs_no_database(hub):
    assert "sqlalchemy" not in loaded("--help", hub)[1]


def test_the_probe_sees_what_a_command_imports(hub):
    assert "torch" in loaded("plugins show bottleneck", hub)[1]
