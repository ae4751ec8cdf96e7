"""`adapterhub plugins new`: the package it makes installs as it is, is listed, keeps the laws, trains and runs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from adapterhub.errors import NameInUse, UsageError
from adapterhub.plugins.scaffold import make


def install(package, target):
    """With pip's own steps but without a network: hatchling is here already, and so is adapterhub."""
    uv = os.environ.get("UV") or shutil.which("uv")
    tool = (
        [uv, "pip", "install", "--offline", "--python", sys.executable]
        if uv
        else [sys.executable, "-m", "pip", "install"]
    )
    command = [*tool, "--no-deps", "--no-build-isolation", "--target", target, package]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


SCRIPT = """
import sys
from adapterhub.cli.app import execute
for line in sys.stdin.read().splitlines():
    print("$", line, flush=True)
    print("status", execute(line.split()), flush=True)
"""


def test_the_package_as_it_is(tmp_path, tiny_folder):
    package = make("channel-gain", tmp_path)
    assert package == tmp_path / "adapterhub-channel-gain"
    install(package, tmp_path / "site")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} is ", "completion": "odd"}) + "\n" for n in range(1, 9, 2)))
    lines = [
        "init",
        "plugins list",
        "plugins check channel_gain",
        f"train --base {tiny_folder} --method channel_gain --data {rows} --steps 3 --batch-size 4 --name me/x",
        f"run 0.5*me/x --base {tiny_folder} --prompt 1 --max-new-tokens 2",
    ]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="\n".join(lines),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.count("status 0") == len(lines), result.stdout + result.stderr
    for group in ("forms", "methods"):
        assert re.search(rf"^{group} +channel_gain +adapterhub-channel-gain 0\.1\.0", result.stdout, re.MULTILINE)
    checked = result.stdout.partition("plugins check")[2].partition("$ train")[0]
    assert checked.count("passed") >= 8 and "failed" not in checked


@pytest.mark.slow
def test_its_own_test_passes(tmp_path):
    package = make("gain", tmp_path)
    install(package, tmp_path / "site")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", package],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout


def test_every_file_is_whole(tmp_path):
    package = make("x1", tmp_path)
    assert sorted(path.name for path in package.iterdir()) == [
        "README.md",
        "adapterhub_x1.py",
        "pyproject.toml",
        "test_x1.py",
    ]
    assert not [path for path in package.iterdir() if "$" in path.read_text()]
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["name"] == "adapterhub-x1"
    assert project["entry-points"]["adapterhub.methods"] == {"x1": "adapterhub_x1:X1Method"}
    assert "adapterhub plugins check x1" in (package / "README.md").read_text()
    compile((package / "adapterhub_x1.py").read_text(), "x1", "exec")


@pytest.mark.parametrize(
    "name", ["", "X", "1x", "a_b", "a.b", "a/b", "../a", "a--b", "-a", "a-", "adapterhub-a", "a" * 41]
)
def test_a_bad_name_is_refused(name, tmp_path):
    with pytest.raises(UsageError):
        make(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "adapterhub-mine").mkdir()
    (tmp_path / "adapterhub-mine" / "work.py").write_text("mine")
    with pytest.raises(NameInUse):
        make("mine", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapterhub-mine", "work.py"]


@pytest.mark.parametrize("name", ["lora", "bottleneck", "low-rank"])
def test_the_name_of_an_installed_part_is_refused(name, tmp_path):
    with pytest.raises(NameInUse):
        make(name, tmp_path)
