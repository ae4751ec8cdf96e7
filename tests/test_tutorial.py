"""docs/tutorial.md, run as it stands: every console line in one shell, then its Python."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/tutorial.md").read_text()


def script(team, port, base):
    """The page's console blocks as a shell script; other folders, another port, and a base of the caller's."""
    lines = []
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        lines += [line.removeprefix("$ ") for line in block.splitlines()]
    text = "set -euo pipefail\n" + "\n".join(lines)
    text = text.replace("/tmp/team", str(team)).replace("8642", str(port)).replace("BASE=smollm2", f"BASE={base}")
    serving = re.compile(r"^(adapterhub serve .*) &$", re.MULTILINE)
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
    import adapterhub

    ada, bob = (adapterhub.open(tmp_path / "team" / name) for name in ("ada", "bob"))
    assert {row.digest for row in bob.releases()} == {row.digest for row in ada.releases()}
    assert bob.verify() == [] and len(bob.releases()) == 3


def test_the_tutorial_on_a_tiny_base(tmp_path, tiny_folder):
    out, _ = run(tmp_path, tiny_folder)
    check(tmp_path, out)


@pytest.mark.slow
def test_the_tutorial_as_it_stands(tmp_path):
    out, _ = run(tmp_path, "smollm2")
    check(tmp_path, out)
