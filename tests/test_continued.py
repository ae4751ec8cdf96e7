"""What goes on from a release goes on exactly: with `--continue`, over others and in loops of one's own, with every form,
however often it is killed, and whatever order a file or a hash gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import continued
import pytest
import torch
from continued import FORMS

PROGRAM = Path(continued.__file__)
POINTS = "1,3,mark,5,publish"
"""Of seven steps with a checkpoint after every second: before the first one, between two, while one is written, between
the next two, and after the last step."""


def call(what, folder, labels, *more, seed="0"):
    command = [sys.executable, PROGRAM, what, folder, ",".join(labels), *more]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def one_thread():
    """Equal bits need equal threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path, tiny_folder):
    """folder(labels) -> a folder with an adapter of each of these forms, trained for a few steps."""

    def folder(labels):
        made = tmp_path / "made"
        shutil.copytree(tiny_folder, made / "base")
        rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(18)]
        (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for label in dict.fromkeys(["lora", "dora", *labels] if "gate" in labels else labels):
            continued.train(made, label, "first")
        return made

    return folder


def copied(made, name):
    return shutil.copytree(made, made.parent / name)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("label", ["dora", "bottleneck", "lt_sft"])
def test_a_continued_training_stopped_and_started_again_is_never_stopped(folder, monkeypatch, label):
    made = folder([label])
    whole = continued.train(copied(made, "whole"), label, "continue")
    steps = []

    def on_step_end(self, args, state, control, **more):
        steps.append(state.global_step)
        if steps == [1, 2, 3]:
            raise Stopped

    monkeypatch.setattr(continued._Watch, "on_step_end", on_step_end)
    with pytest.raises(Stopped):
        continued.train(made, label, "continue")
    assert continued.train(made, label, "continue") == whole
    assert steps == [1, 2, 3, 3, 4, 5, 6, 7]


def test_two_loads_give_one_order(folder):
    """Of names, of modifications and of parameters; in another process, with other hashes, too."""
    labels = ["dora", "bottleneck", "lofit"]
    made = folder(labels)
    here = {label: continued.order(made, label) for label in labels}
    assert here == {label: continued.order(made, label) for label in labels}
    assert call("order", made, labels, seed="7") == here
    for names, _, parameters in here.values():
        assert names == sorted(names) and parameters == [name for name in names if name in parameters]


@pytest.mark.parametrize(
    ("how", "points"),
    [
        pytest.param("continue", POINTS, marks=pytest.mark.slow),
        pytest.param("on", "3,mark", marks=pytest.mark.long),
        pytest.param("further", "3,mark", marks=pytest.mark.long),
    ],
)
def test_sigkill_at_five_points_of_every_form(folder, how, points):
    labels = list(FORMS)
    made = folder(labels)
    if how == "further":
        call("train", made, labels, "on")
    whole = call("train", copied(made, "whole"), labels, how)
    ends = call("killed", made, labels, how, points, seed="7")
    assert ends == {label: [9] * len(points.split(",")) for label in labels}
    assert call("train", made, labels, how, seed="11") == whole


@pytest.mark.slow
def test_a_loop_of_ones_own_goes_on_in_another_process(folder):
    """CorDA's is as near as its README says: A0 is read off what is stored."""
    labels = [label for label in FORMS if label != "corda"]
    made = folder(labels)
    whole = copied(made, "whole")
    want = {label: continued.loop(whole, label, "0.1.0", range(6)) for label in labels}
    call("begin loop", made, labels, seed="7")
    assert call("end loop", made, labels, seed="11") == want


@pytest.mark.slow
def test_every_form_is_loaded_in_one_order(folder):
    labels = list(FORMS)
    made = folder(labels)
    assert call("order", made, labels, seed="7") == call("order", made, labels, seed="11")
