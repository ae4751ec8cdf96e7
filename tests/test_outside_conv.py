"""A package made by `plugins new` and filled in with a form with state: installed, listed, checked, trained and run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapterhub
from adapterhub import Step
from adapterhub.errors import PluginError

FILLED_IN = Path(__file__).parent / "outside" / "causal_conv"


def run(*command, path, cwd):
    """The standard output of a command that sees the packages installed in `path`."""
    uv = ["uv"] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    command = [*uv, *command[1:]] if command[0] == "uv" else [sys.executable, *command]
    environment = {
        **os.environ,
        "PYTHONPATH": str(path),
        "OMP_NUM_THREADS": "1",
    }  # threads only slow tensors this small
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that the package is installed in."""
    work = tmp_path_factory.mktemp("conv")
    site = work / "site"
    run("-m", "adapterhub", "plugins", "new", "causal-conv", path=site, cwd=work)
    package = work / "adapterhub-causal-conv"
    shutil.copy(FILLED_IN / "adapterhub_causal_conv.py", package)
    options = ("--offline", "--no-deps", "--no-build-isolation", "--python", sys.executable, "--target", site)
    run("uv", "pip", "install", *options, package, path=site, cwd=work)
    return site


def test_it_is_listed_and_keeps_the_laws(site, tmp_path):
    listed = json.loads(run("-m", "adapterhub", "plugins", "list", "--json", path=site, cwd=tmp_path))["plugins"]
    ours = {(part["group"], part["distribution"]) for part in listed if part["name"] == "causal_conv"}
    assert ours == {(group, "adapterhub-causal-conv 0.1.0") for group in ("forms", "methods")}
    checked = json.loads(run("-m", "adapterhub", "plugins", "check", "causal_conv", "--json", path=site, cwd=tmp_path))[
        "results"
    ]
    verdicts = {(result["group"], result["law"]): result["verdict"] for result in checked}
    assert verdicts.pop(("forms", "fold")) == "declined"
    assert set(verdicts.values()) == {"passed"}, checked
    assert {("forms", "rows"), ("forms", "decode"), ("methods", "start")} <= set(verdicts)


def test_it_trains_saves_stacks_routes_and_decodes(site, tiny_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": p, "completion": p[::-1]}) + "\n" for p in ("ab", "bc", "cd", "de") * 3)
    )
    run(FILLED_IN / "journey.py", tiny_folder, data, tmp_path / "hub", path=site, cwd=tmp_path)
    # Where the package is missing, the error says so, and names no package that only the manifest knows.
    with pytest.raises(PluginError, match="needs the form 'causal_conv'") as caught:
        adapterhub.open(tmp_path / "hub").load(tiny_folder, "me/conv")
    assert (
        "adapterhub-causal-conv" not in caught.value.hint and "install the package that brings it" in caught.value.hint
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunks", [(9,), (4, 5), (1,) * 9])
def test_a_window_holds_the_last_real_tokens(size, chunks):
    """Against lists: whatever is padded and however the sequence is cut, padding is never in a real token's window."""
    random = torch.Generator().manual_seed(0)
    x, mask = torch.randn(5, 9, 2, generator=random), torch.rand(5, 9, generator=random) < 0.6
    mask[0], mask[1, :4], mask[2, 5:] = True, False, False  # none, left and right padding; the others anywhere
    for given in (mask, None):
        state, got = {}, []
        for part, real in zip(x.split(chunks, 1), mask.split(chunks, 1), strict=True):
            got.append(Step(None if given is None else real, state).window(part, size))
        got = torch.cat(got, 1)
        for row in range(5):
            seen = [torch.zeros(2)] * size
            for token in range(9):
                if given is None or mask[row, token]:
                    seen.append(x[row, token])
                    assert torch.equal(got[row, token], torch.stack(seen[-size:])), (row, token)
