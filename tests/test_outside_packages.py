"""Our packages beside nothing but adapterhub: installed they are usable; uninstalled their adapters run where the forms are built
in, and otherwise the error names the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINED = {
    "corda": {"method": "corda", "options": {"r": 2}},
    "mam": {"method": "unified", "options": {"preset": "mam"}},
    "heads": {"method": "unified", "options": {"preset": "mh-parallel"}},
    "conv": {"method": "conv_adapter"},
    "levi": {"method": "levi"},
    "vera": {"method": "peft", "options": {"type": "VERA", "config": {"r": 4}}},
    "lofit": {"method": "lofit"},
    "ltsft": {"method": "lt_sft"},
    "loreft": {"method": "loreft"},
    "half": {"method": "full", "schedule": "hft"},
    "decayed": {"method": "lora", "schedule": "layer_policy", "options": {"layer_policy.lr_decay": 0.5}},
    "noisy": {"method": "lora", "recipes": ["neftune", "masked_thought"]},
    "graded": {"method": "lora", "objective": "copg", "data": "scored"},
    "edited": {"method": "lora", "objective": "canonical", "extras": {"background": "text"}},
    "rewarded": {"method": "lora", "objective": "rft_ppo", "options": {"rft_ppo.max_new_tokens": 3}},
}
NEEDS = {
    "heads": "adapterhub-unified",
    "conv": "adapterhub-conv-adapter",
    "levi": "adapterhub-levi",
    "loreft": "adapterhub-loreft",
}
"""Adapters of a form that is not built in, and the package that brings it."""

TRAIN = """
import json, sys, torch, adapterhub
folder, files, trained = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
hub = adapterhub.open("hub", create=True)
for name, given in trained.items():
    given["data"] = files[given.get("data", "rows")]
    given["extras"] = {key: files[which] for key, which in given.get("extras", {}).items()}
    try:
        hub.train(folder, name=f"me/{name}", steps=4, lr=1e-2, device="cpu", **given)
        print(name, "trained")
    except adapterhub.HubError as error:
        print(name, str(error).splitlines()[0], "|", error.hint)
"""
RUN = """
import sys, adapterhub
model = adapterhub.open("hub").load(sys.argv[1])
for name in sys.argv[2].split(","):
    try:
        model.complete(["2 + 2"], f"me/{name}", max_new_tokens=2)
        print(name, "ran")
    except adapterhub.HubError as error:
        print(name, str(error).splitlines()[0], "|", error.hint)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with everything that is installed here but our packages."""
    import torch

    folder = tmp_path_factory.mktemp("bare")
    for entry in Path(torch.__file__).parents[1].iterdir():
        ours = entry.name.lower().replace("_", "-").startswith(("adapterhub-", "-editable", "--editable"))
        if not ours or entry.name.startswith("adapterhub-0"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with our packages, as pip installs them."""
    site = tmp_path_factory.mktemp("site")
    made = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    options = ["--offline", "--no-deps", "--no-build-isolation", "--python", sys.executable, "--target", site]
    uv = ["uv"] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    done = subprocess.run(
        [*uv, "pip", "install", *map(str, options), *map(str, made)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return site


def run(code, *arguments, beside, cwd):
    path = os.pathsep.join(map(str, [*beside, ROOT, ROOT / "registry"]))
    done = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.slow
def test_each_package_beside_adapterhub_alone(bare, packages, tiny_folder, tmp_path):
    rows = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(8)]
    kinds = {
        "rows": rows,
        "text": [{"text": f"{i} and {i + 1} and {i + 2}"} for i in range(12)],
        "scored": [{"prompt": f"{i}: ", "completions": ["yes", "no"], "rewards": [1, 0]} for i in range(8)],
    }
    files = {}
    for kind, made in kinds.items():
        files[kind] = str(tmp_path / f"{kind}.jsonl")
        Path(files[kind]).write_text("\n".join(map(json.dumps, made)))
    asked = (tiny_folder, json.dumps(files), json.dumps(TRAINED))
    without = run(TRAIN, *asked, beside=[bare], cwd=tmp_path)
    assert all("is installed" in said for said in without.values()), without
    made = run(TRAIN, *asked, beside=[bare, packages], cwd=tmp_path)
    assert set(made.values()) == {"trained"}, made
    names = ",".join(TRAINED)
    assert set(run(RUN, tiny_folder, names, beside=[bare, packages], cwd=tmp_path).values()) == {"ran"}
    for name, said in run(RUN, tiny_folder, names, beside=[bare], cwd=tmp_path).items():
        if name in NEEDS:
            assert f"{NEEDS[name]} 0.1.0: install that package" in said, said
        else:
            assert said == "ran", (name, said)
