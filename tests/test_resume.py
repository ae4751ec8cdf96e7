"""A run that was killed and started again ends with the bytes of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterhub
from adapterhub.errors import IntegrityError
from adapterhub.spec.digest import canonical
from adapterhub.training.trainer import COMPLETE, _digests, _Watch

STEPS, EVERY = 17, 3
SETTINGS = {
    "options": {"r": 4, "lora_dropout": 0.2},
    "steps": STEPS,
    "save_every": EVERY,
    "batch_size": 5,  # 4 batches an epoch, the last one short
    "lr": 1e-2,
}


class Stopped(BaseException):
    pass


@pytest.fixture(autouse=True)
def one_thread():
    """Equal bits need equal threads; a tiny model gains nothing from several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(18)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def run(tiny_folder, path, tmp_path):
    def run(hub="hub", **settings):
        return adapterhub.open(tmp_path / hub, create=True).train(
            str(tiny_folder), "lora", path, "me/a", **{**SETTINGS, **settings}
        )

    return run


@pytest.fixture
def stop_at(monkeypatch):
    """Make training end with an exception after a step, as if interrupted; None: no more."""

    def stop_at(step):
        def on_step_end(self, args, state, control, **kwargs):
            started.append(state.global_step)
            if state.global_step == step:
                raise Stopped

        monkeypatch.setattr(_Watch, "on_step_end", on_step_end)
        return started

    started = []
    return stop_at


def test_it_goes_on_from_the_last_checkpoint_to_the_same_bytes(run, stop_at, tmp_path):
    whole = run("whole")
    for step in (2, 8, 13):  # before the first checkpoint, between two of them, and between two epochs
        stop_at(step)
        with pytest.raises(Stopped):
            run()
    checkpoints = sorted(p.name for p in (tmp_path / "hub/training").rglob("checkpoint-*"))
    assert checkpoints == ["checkpoint-12", "checkpoint-9"]
    steps = stop_at(None)
    steps.clear()
    resumed = run()
    assert steps[0] == 13 and steps[-1] == STEPS
    assert resumed.manifest == whole.manifest  # tensors, loss curve and metrics by their sha256
    assert resumed.digest == whole.digest
    assert not list((tmp_path / "hub/training").iterdir())


def test_a_run_killed_while_it_was_published_is_published(run, stop_at, monkeypatch):
    whole = run("whole")

    def killed(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr("adapterhub.training.train.publish_tensors", killed)
        with pytest.raises(Stopped):
            run()
    steps = stop_at(None)
    assert run().digest == whole.digest
    assert not steps


@pytest.mark.parametrize("version", [None, "0.1.0"])
def test_a_run_killed_after_it_was_published_ends_well(run, stop_at, monkeypatch, tmp_path, version):
    def killed(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr("adapterhub.training.train.shutil.rmtree", killed)
        with pytest.raises(Stopped):
            run(version=version, save_every=STEPS)
    (row,) = adapterhub.open(tmp_path / "hub").releases()
    assert list((tmp_path / "hub/training").rglob("checkpoint-*"))
    steps = stop_at(None)
    assert run(version=version).digest == row.digest
    assert not steps and not list((tmp_path / "hub/training").iterdir())


@pytest.mark.parametrize("harm", ["cut", "no mark", "lost", "bit"])
def test_a_broken_checkpoint_is_none(run, stop_at, tmp_path, harm):
    whole = run("whole")
    stop_at(10)
    with pytest.raises(Stopped):
        run()
    newest = next((tmp_path / "hub/training").rglob("checkpoint-9"))
    if harm == "cut":
        os.truncate(newest / "optimizer.pt", 100)
    elif harm == "no mark":
        (newest / COMPLETE).unlink()
    elif harm == "lost":
        (newest / "rng_state.pth").unlink()
    else:
        data = bytearray((newest / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (newest / "model.safetensors").write_bytes(data)
    steps = stop_at(None)
    steps.clear()
    assert run().digest == whole.digest
    assert steps[0] == 7


@pytest.mark.parametrize("harm", ["name", "shape", "order", "memory", "unnamed"])
def test_a_checkpoint_of_other_parameters_is_refused(run, stop_at, tmp_path, harm):
    """Whole as it is: each of these would be loaded by position, or left out."""
    stop_at(4)
    with pytest.raises(Stopped):
        run()
    (checkpoint,) = (tmp_path / "hub/training").rglob("checkpoint-3")
    tensors = load_file(checkpoint / "model.safetensors")
    memory = torch.load(checkpoint / "optimizer.pt")
    (group,), first = memory["param_groups"], min(tensors)
    if harm == "name":
        tensors[first + "x"] = tensors.pop(first)
    elif harm == "shape":
        tensors[first] = tensors[first].flatten()
    elif harm == "order":
        group["names"][:2] = reversed(group["names"][:2])
    elif harm == "memory":
        memory["state"][0]["exp_avg"] = memory["state"][0]["exp_avg"].mT.contiguous()
    else:
        del group["names"]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    torch.save(memory, checkpoint / "optimizer.pt")
    (checkpoint / COMPLETE).write_bytes(canonical(_digests(checkpoint)))
    steps = stop_at(None)
    steps.clear()
    with pytest.raises(IntegrityError, match=r"layers\.0.*(down|up)x? differs in name, shape or place") as caught:
        run()
    assert "--no-resume" in caught.value.hint and not steps
    run(resume=False)
    assert steps[0] == 1


def test_a_last_checkpoint_of_other_parameters_is_refused(run, stop_at, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr("adapterhub.training.train.publish_tensors", killed)
        with pytest.raises(Stopped):
            run()
    (checkpoint,) = (tmp_path / "hub/training").rglob(f"checkpoint-{STEPS}")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    (checkpoint / COMPLETE).write_bytes(canonical(_digests(checkpoint)))
    with pytest.raises(IntegrityError, match="does not fit this training"):
        run()


def test_another_recipe_and_resume_false_start_anew(run, stop_at):
    stop_at(10)
    with pytest.raises(Stopped):
        run()
    steps = stop_at(None)
    for settings in ({"seed": 1}, {"resume": False}):
        steps.clear()
        run(**settings)
        assert steps[0] == 1
    # How often it saves decides nothing, so it goes on from there.
    stop_at(10)
    with pytest.raises(Stopped):
        run(lr=2e-2)
    steps = stop_at(None)
    steps.clear()
    run(lr=2e-2, save_every=5)
    assert steps[0] == 10


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import adapterhub
from adapterhub.training.trainer import _Watch
hub, base, data, settings, kill = sys.argv[1:]
if int(kill):
    _Watch.on_step_end = lambda self, args, state, control, **k: (
        os.kill(os.getpid(), signal.SIGKILL) if state.global_step == int(kill) else None
    )
import json
print(adapterhub.open(hub, create=True).train(base, "lora", data, "me/a", **json.loads(settings)).digest)
"""


@pytest.mark.slow
def test_sigkill_at_five_random_steps(tiny_folder, path, tmp_path):
    def run(hub: Path, kill: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", KILLED, hub, tiny_folder, path, json.dumps(SETTINGS), kill]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    whole = run(tmp_path / "whole", 0)
    between = [step for step in range(1, STEPS) if step % EVERY]
    kills = sorted(random.Random().sample(between, 5))
    for kill in kills:
        assert run(tmp_path / "hub", kill).returncode == -signal.SIGKILL, kills
    resumed = run(tmp_path / "hub", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout != "", kills


STAGED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import adapterhub
from pathlib import Path
from adapterhub.files import durable
from adapterhub.training import stages
from adapterhub.training.trainer import _Watch
import json
method, hub, base, data, settings, kill = sys.argv[1:]
stage, _, at = kill.partition(":")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def on_step_end(self, args, state, control, **k):
    if Path(args.output_dir).name == stage and state.global_step == int(at):
        die()

_Watch.on_step_end = on_step_end
if stage == "keeping":  # its tensors are written, the mark that it is whole is not
    write = durable.write_bytes
    durable.write_bytes = lambda path, data: die() if path.parent.name == "stages" and path.suffix == ".json" else write(path, data)
if stage == "kept":  # it is whole, the next has not begun
    keep = stages._keep
    stages._keep = lambda *args: (keep(*args), die())
release = adapterhub.open(hub, create=True).train(base, method, data, "me/a", **json.loads(settings))
print(release.digest, json.dumps(release.manifest.recipe["found"], sort_keys=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "first", "last"),
    [
        ("lt_sft", {"density": 0.02, "l1": 0.1}, "probe", "train"),
        ("lofit", {"k": 3, "l1": 1e-3}, "select", "offsets"),
    ],
)
def test_sigkill_in_every_stage_and_between_them(tiny_folder, path, tmp_path, method, options, first, last):
    settings = {"options": options, "steps": 20, "save_every": 3, "batch_size": 5, "lr": 1e-2}

    def run(hub: Path, kill: str = "") -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", STAGED, method, hub, tiny_folder, path, json.dumps(settings), kill]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    whole = run(tmp_path / "whole")
    for kill in (f"{first}:2", f"{first}:8", "keeping", "kept", f"{last}:1", f"{last}:7"):
        killed = run(tmp_path / "hub", kill)
        assert killed.returncode == -signal.SIGKILL, (kill, killed.stderr)
    resumed = run(tmp_path / "hub")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout != ""
