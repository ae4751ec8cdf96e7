"""Trainings of every form that go on from a release: python continued.py WHAT FOLDER LABEL,LABEL... [HOW [POINTS]]

The folder holds a base, rows.jsonl and a hub. Prints {label: what came out} as JSON."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import adapterhub
import adapterhub.training.train
from adapterhub.adapters.adapter import Adapter
from adapterhub.training.trainer import _Watch

VBLORA = {"num_vectors": 16, "vector_length": 8, "topk": 2, "r": 2}
FORMS = {
    "lora": ("lora", {"r": 4, "lora_dropout": 0.1}),
    "dora": ("lora", {"r": 4, "use_dora": True, "target_modules": ["query", "ffn_down"]}),
    "bottleneck": ("bottleneck", {"r": 4, "dropout": 0.1}),
    "ia3": ("ia3", {}),
    "bitfit": ("bitfit", {}),
    "full": ("full", {"norms": True, "target_modules": ["value"]}),
    "prefix": ("prefix", {"num_virtual_tokens": 3}),
    "loreft": ("loreft", {}),
    "lt_sft": ("lt_sft", {"density": 0.02, "l1": 0.1}),
    "lofit": ("lofit", {"k": 3}),
    "corda": ("corda", {"r": 4}),
    "conv_adapter": ("conv_adapter", {"dropout": 0.1}),
    "unified": ("unified", {"preset": "mam", "r": 4, "length": 3}),
    "heads": ("unified", {"preset": "mh-parallel", "r": 4}),
    "levi": ("levi", {"width": 8, "r": 4, "average": "learned"}),
    "peft": ("peft", {"config": {"r": 4, "lora_dropout": 0.1}, "target_modules": "query"}),
    "vblora": ("peft", {"type": "vblora", "config": VBLORA, "target_modules": ["query", "value"], "lower": "never"}),
    "gate": ("gate", {}),
}
"""{label: method and options}: every installed form that trains on a decoder."""
RUN = {"lr": 1e-2, "batch_size": 5, "device": "cpu", "steps": 7, "save_every": 2}


def train(folder: Path, label: str, how: str, **more) -> str:
    """first: me/LABEL, anew; continue: that, further; on: another of the kind over it; further: that one, further."""
    method, options = FORMS[label]
    weighs = {"on": ["me/lora", "me/dora"]} if method == "gate" else {}
    anew = {"method": method, "options": options, **weighs}
    given = {
        "first": {"name": f"me/{label}", **anew, "steps": 3},
        "continue": {"continue_from": f"me/{label}@0.1.0", "version": "0.2.0"},
        "on": {"name": f"me/{label}-on", **anew, "on": weighs.get("on") or [f"me/{label}@0.1.0"]},
        "further": {"continue_from": f"me/{label}-on@0.1.0", "version": "0.2.0"},
    }[how]
    hub = adapterhub.open(folder / "hub", create=True)
    return hub.train(str(folder / "base"), data=folder / "rows.jsonl", **{**RUN, **given, **more}).digest


def loop(folder: Path, label: str, version: str, steps: range) -> str:
    """A loop of one's own: AdamW over what trains of ME/LABEL at this version, its state beside the hub. Saves the next
    version; returns the digest of its tensors."""
    hub, kept = adapterhub.open(folder / "hub"), folder / f"{label}.pt"
    name = f"me/{label}"
    expression = f"gate({name}@{version}, me/lora@0.1.0, me/dora@0.1.0)" if label == "gate" else f"{name}@{version}"
    model = hub.load(str(folder / "base"), expression, trainable=[f"{name}@{version}"], device="cpu")
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    if steps.start:
        optimizer.load_state_dict(torch.load(kept))
    for step in steps:
        ids = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.after_step()
    torch.save(optimizer.state_dict(), kept)
    return model.save(name).manifest.files["tensors"].digest


def order(folder: Path, label: str) -> list[list[str]]:
    """The order of the tensors, of the modifications and of the parameters, as a process finds them."""
    hub = adapterhub.open(folder / "hub")
    adapter = Adapter.load(hub, hub.resolve(f"me/{label}"))
    expression = f"gate(me/{label}, me/lora, me/dora)" if label == "gate" else f"me/{label}"
    model = hub.load(str(folder / "base"), expression, trainable=[f"me/{label}"], device="cpu")
    parts = [f"{path} {list(part.tensors)}" for path, here in adapter.modifications().items() for part in here]
    return [list(adapter.tensors), parts, list(model.trainable_tensors())]


def kill_at(when: str) -> None:
    """End this process by SIGKILL: at a step ("3"), when a checkpoint is written but not marked as whole ("mark"), or when
    the release is about to be published ("publish")."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **more):
        if str(state.global_step) == when:
            die()

    _Watch.on_step_end = on_step_end
    if when == "mark":
        _Watch.on_save = die
    if when == "publish":
        adapterhub.training.train.publish_tensors = die


def killed(folder: Path, label: str, how: str, points: str) -> list[int]:
    """The training, killed at each of these points in turn, each time in a process of its own: the signals that ended them."""
    ends = []
    for when in points.split(","):
        if (child := os.fork()) == 0:
            kill_at(when)
            train(folder, label, how)
            os._exit(0)
        ends.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
    return ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, labels, *more = sys.argv[1:]
    do = {
        "train": train,
        "killed": killed,
        "order": order,
        "begin loop": lambda *of: loop(*of, "0.1.0", range(3)),
        "end loop": lambda *of: loop(*of, "0.2.0", range(3, 6)),
    }[what]
    print(json.dumps({label: do(Path(folder), label, *more) for label in labels.split(",")}))
