"""No test sees or touches what is the user's: tried with a small suite in a clone of its own, where a demo has been."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import adapterhub
from adapterhub.bases import resolution
from adapterhub.config import user as settings

ROOT = Path(__file__).resolve().parent.parent
SUITE = '''
import json, os, subprocess, sys
from pathlib import Path
import pytest

PROBE = """
import json, os
import adapterhub
from adapterhub.bases import resolution
from adapterhub.config import project, user
print(json.dumps([str(adapterhub.open().root), str(user.config_folder()), str(resolution.cache_folder()), str(project.nearest()),
    os.path.expanduser("~"), os.environ.get("NO_COLOR"), os.environ.get("HF_TOKEN"), os.environ.get("ADAPTERHUB_TOKEN")]))
"""

@pytest.fixture(scope="module")
def early():
    return subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True).stdout

@pytest.mark.parametrize("n", range(2))
def test_looks(n, early):
    here = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True).stdout
    Path(LOOKED, f"{n}.json").write_text(json.dumps([json.loads(early), json.loads(here)]))

def test_writes():
    for path in DAMAGE:
        Path(path).write_bytes(b"a test was here")
'''


@pytest.fixture
def clone(tmp_path):
    """(a clone with this conftest, a hub and a project, and a user with a hub and settings; what runs its suite)."""
    there, user = tmp_path / "clone", tmp_path / "user"
    (there / "tests").mkdir(parents=True)
    (tmp_path / "looked").mkdir()
    shutil.copy(ROOT / "conftest.py", there)
    shutil.copytree(ROOT / "tests/support", there / "tests/support")
    (there / "tests/support/torch.py").write_text(
        "def set_num_threads(number): pass\n"
    )  # the real one takes seconds to load
    (there / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\ntestpaths = ["tests"]\npythonpath = ["tests/support"]\nmarkers = ["slow: x"]\n'
    )
    adapterhub.open(there, create=True)
    (there / "adapterhub.toml").write_text("[adapters]\n")
    (user / "config").mkdir(parents=True)
    (user / "config/config.toml").write_text("[plugins]\nenabled = []\n")
    secrets = dict.fromkeys(("NO_COLOR", "HF_TOKEN", "ADAPTERHUB_TOKEN"), "1")
    own = {"HOME": user, "ADAPTERHUB_HOME": user / "hub", "ADAPTERHUB_CONFIG": user / "config"}
    adapterhub.open(user / "hub", create=True)

    def run(*options, damage=()):
        head = f"LOOKED, DAMAGE = {str(tmp_path / 'looked')!r}, {list(map(str, damage))!r}\n"
        (there / "tests/test_small.py").write_text(head + SUITE)
        environment = {**os.environ, **secrets, **{name: str(path) for name, path in own.items()}}
        command = [sys.executable, "-m", "pytest", "-q", *options]
        return subprocess.run(command, cwd=there, env=environment, capture_output=True, text=True)

    return there, run


def test_a_suite_beside_a_demos_hub_sees_none_of_it(clone, tmp_path):
    _, run = clone
    done = run("-n", "2")
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
    looks = [json.loads(path.read_text()) for path in (tmp_path / "looked").iterdir()]
    assert len(looks) == 2
    for root, config, cache, project, home, *secrets in (one for pair in looks for one in pair):
        assert not any(Path(path).is_relative_to(tmp_path) for path in (root, config, cache, home))
        assert project == "None" and secrets == [None] * 3
    assert len({here[0] for _, here in looks}) == 2  # each test has a hub of its own


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_test_that_writes_into_what_is_the_users_fails_the_run(clone, tmp_path, processes):
    _, run = clone
    damage = [
        tmp_path / place for place in ("clone/README.md", "clone/hub.db", "user/config/config.toml", "user/hub/hub.db")
    ]
    done = run("-k", "writes", "-n", processes, damage=damage)
    assert done.returncode == 1 and "1 passed" in done.stdout, done.stdout + done.stderr
    listed = done.stdout.partition("changed outside of the tests' own folders")[2]
    assert [line for line in listed.splitlines() if line.startswith("/")] == list(map(str, damage))


def test_a_hub_that_every_test_would_find_is_refused(clone, tmp_path):
    there, run = clone
    done = run("--basetemp", str(there / "below"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and f"{there / 'hub.db'}" in done.stderr
    assert not (there / "below").exists()


def test_here_too():
    assert all(not Path(path).is_relative_to(ROOT) for path in (os.getcwd(), adapterhub.open().root))
    assert settings.config_folder().parent == adapterhub.open().root.parent == Path.cwd().parent
    assert not resolution.cache_folder().is_relative_to(ROOT) and "NO_COLOR" not in os.environ
