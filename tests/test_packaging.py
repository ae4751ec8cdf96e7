"""The packaging files agree with one another. `python tests/test_packaging.py` rewrites constraints.txt."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adapterhub import plugins

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = ROOT / "constraints.txt"
HEADER = "# The pins of pyproject.toml for pip users: pip install -c constraints.txt .\n"


def constraints() -> str:
    return HEADER + "".join(f"{line}\n" for line in PROJECT["tool"]["uv"]["constraint-dependencies"])


def pins() -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["tool"]["uv"]["constraint-dependencies"])}


def test_constraints_file_is_the_list_of_pins():
    assert CONSTRAINTS.read_text() == constraints()


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "huggingface-hub", "sqlalchemy"])
def test_fast_moving_libraries_have_an_upper_bound(name):
    assert not pins()[name].specifier.contains("9999")


def test_every_pin_allows_what_the_package_asks_for():
    for text in PROJECT["project"]["dependencies"]:
        wanted = Requirement(text)
        exact = [s.version for s in pins()[wanted.name].specifier if s.operator == "=="]
        assert all(wanted.specifier.contains(version) for version in exact), text


def test_every_dependency_has_its_reason():
    section = (ROOT / "ARCHITECTURE.md").read_text().partition("## Dependencies")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    reasons = {name: reason for names, reason in rows for name in names.split(", ")}
    assert set(reasons) == {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert all(reasons.values())


def test_the_extra_plugins_is_the_folders():
    folders = {
        folder.name for folder in (ROOT / "plugins").glob("adapterhub-*") if (folder / "pyproject.toml").exists()
    }
    assert set(PROJECT["project"]["optional-dependencies"]["plugins"]) == folders == plugins.ours()
    assert {name for name in PROJECT["tool"]["uv"]["sources"] if name != "adapterhub"} == folders


def tracked() -> list[Path]:
    git = ["git", "-c", "safe.directory=*"]  # a clone of another user's, as a container has it
    listed = subprocess.run([*git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_registry_host_or_is_a_lock():
    hosts = [f"pypi{end}" for end in (".org", ".python")] + [f"python{'hosted'}", f"npmjs{'.'}", f"anaconda{'.'}org"]
    bad = [path for path in tracked() if any(host.encode() in path.read_bytes() for host in hosts)]
    locks = [path for path in tracked() if path.name in ("uv.lock", "poetry.lock", "Pipfile.lock")]
    assert not bad + locks


def test_no_tracked_file_is_over_five_megabytes():
    assert not [path for path in tracked() if path.stat().st_size > 5_000_000]


if __name__ == "__main__":
    CONSTRAINTS.write_text(constraints())


@pytest.mark.parametrize("refuses", [False, True])
def test_ci_gets_uv_also_where_the_system_python_refuses_packages(tmp_path, refuses):
    """PEP 668: then uv comes into an environment of its own, which is taken away again."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "mktemp", "rm", "mkdir", "cp"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "python3").write_text(
        f"""#!/usr/bin/env bash
echo "$0 $*" >> {calls}
case "$0 $*" in
    */bin/python3\\ -m\\ pip*) exit {int(refuses)} ;;
    *-m\\ venv*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""
    )
    (tools / "python3").chmod(0o755)
    environment = {"PATH": str(tools), "TMPDIR": str(tmp_path)}
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = calls.read_text().splitlines()
    python = next(line.split()[0] for line in said if " -m uv sync" in line)
    assert (python == str(tools / "python3")) != refuses
    assert f"{python} -m pip install --quiet uv" in said and f"{python} -m uv run pytest" in said
    assert sorted(tmp_path.iterdir()) == [tools, calls]
