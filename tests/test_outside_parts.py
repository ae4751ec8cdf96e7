"""A merger and a codec of another distribution, installed as any user would: found, lawful, used, and missed when gone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import PluginError
from adapterhub.forms.low_rank import LowRank

PACKAGE = Path(__file__).parent / "outside" / "merger_and_codec"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """run(code) -> what it prints, with the package installed beside adapterhub."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for file in PACKAGE.iterdir():  # a build must leave nothing in the tree
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which installs the package, is not on the PATH")
    install = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--python", sys.executable, "--target", target, source], check=True, timeout=120)

    def run(code):
        path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:-1]

    return run


@pytest.fixture
def hub(tmp_path, tiny_model):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    base, sketch = fingerprint(tiny_model(), name="tiny")
    for seed, name in enumerate(("me/a", "me/b")):
        torch.manual_seed(seed)
        part = LowRank(down=torch.randn(3, 32), up=torch.randn(32, 3), scale=torch.tensor(2.0))
        publish_tensors(hub, {Q: [part]}, name=name, base=base, sketch=sketch)
    return hub


def test_both_hold_their_laws(outside):
    lines = outside(
        "from adapterhub.testing import check\n"
        "for name in ('strongest', 'bf16'):\n"
        "    for r in check(name):\n"
        "        print(r.group, r.part, r.law, r.verdict, r.detail)\n"
    )
    declined = [line for line in lines if " declined " in line]
    assert len(lines) == 6 + 9 and declined == ["mergers strongest weighted_sum declined declares linear = False"]
    assert all(" passed " in line for line in lines if line not in declined), lines


def test_a_merge_and_a_compression_by_them(outside, hub):
    outside(
        "import adapterhub\n"
        f"hub = adapterhub.open({str(hub.root)!r})\n"
        "hub.merge(['me/a', 'me/b'], merger='strongest', weights=[1, -0.5], name='me/c')\n"
        "hub.compress('me/a', codec='bf16', name='me/d')\n"
    )

    def change(name):
        ((part,),) = Adapter.load(hub, hub.resolve(name)).modifications().values()
        return part.delta_weight(None, None)[0]

    a, b, merged = change("me/a"), -0.5 * change("me/b"), change("me/c")
    assert (merged - torch.where(a.abs() >= b.abs(), a, b)).abs().max() < 1e-5 * merged.abs().max()
    recipe = hub.resolve("me/c").manifest.recipe
    assert recipe["merger"] == "strongest" and recipe["distribution"] == "outside-merger-and-codec 0.1.0"
    before, after = (hub.resolve(name).manifest.files["tensors"].size for name in ("me/a", "me/d"))
    assert after < 0.7 * before
    with pytest.raises(PluginError, match="'bf16'"):  # this process does not have the package
        Adapter.load(hub, hub.resolve("me/d"))
