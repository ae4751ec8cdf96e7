"""The stages of a method, trained in order. A finished one is kept: a run that is killed goes on after it, and another
run that shares all that decides it takes it as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterhub import durable
from adapterhub.adapter import modifications_of
from adapterhub.encoding import Example
from adapterhub.errors import UsageError
from adapterhub.manifest import canonical, digest_of
from adapterhub.method import Parts, Stage
from adapterhub.modification import named_tensors
from adapterhub.runtime import Model
from adapterhub.tensors import dump, load
from adapterhub.trainer import Schedule, fit


@dataclass(frozen=True)
class Planned:
    """A stage with its part of the run."""

    stage: Stage
    schedule: Schedule
    key: str
    """Digest of everything that decides what comes out of it."""

    @property
    def told(self) -> dict[str, Any]:
        """What the recipe says of it."""
        schedule = self.schedule
        return {"name": self.stage.name, "steps": schedule.steps, "lr": schedule.lr, "warmup": schedule.warmup}


def planned(
    stages: Sequence[Stage], whole: Schedule, warmup: int | None, options: Mapping[str, Any], shared: Mapping[str, Any]
) -> list[Planned]:
    """Each stage with its steps, its rate and its key.

    whole: the run's steps and highest rate; warmup: steps of each stage, None for a tenth of it; options: of the method;
    shared: what else decides the result, as JSON has it. Raises UsageError where a stage would get no step."""
    total, shares, plan, key = sum(stage.share for stage in stages), 0.0, [], ""
    for stage in stages:
        begin = round(whole.steps * shares / total)
        shares += stage.share
        steps = round(whole.steps * shares / total) - begin
        if steps < 1:
            raise UsageError(
                f"of {whole.steps} steps none is left for the stage {stage.name!r}", "give more steps, or another share"
            )
        rise = steps // 10 if warmup is None else warmup
        schedule = replace(whole, steps=steps, lr=whole.lr * stage.lr, warmup=rise)
        decides = options if stage.options is None else stage.options
        own = {"before": key, "stage": stage.name, "options": dict(decides), "schedule": vars(schedule)}
        key = digest_of(canonical(own | {"shared": shared})).removeprefix("sha256:")
        plan.append(Planned(stage, schedule, key))
    return plan


def attach(model: Model, stage: Stage, before: Parts, seed: int) -> None:
    """Put what the stage trains on the model."""
    torch.manual_seed(seed)
    model.attach_new(stage.build(model.sites, before))
    if not model.trainable_parameters():
        raise UsageError(f"there is nothing to train: the stage {stage.name!r} made no tensors", "check its options")


def run(
    model: Model,
    plan: Sequence[Planned],
    examples: list[Example],
    pad: int,
    folder: Path,
    kept: Path,
    save_every: int | None,
    title: str,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train the stages in order; the last one's modifications stay on the model. Returns the loss curve, each entry with
    its stage's name where there are several, and what was found: {stage: its note, and the sha256 of what was kept}.

    folder: of the checkpoints, by stage; kept: of finished stages, by key. save_every: as in `train`."""
    curve, found, before = [], {}, {}
    for part in plan:
        stage, last = part.stage, part is plan[-1]
        finished = None if last else _finished(kept / part.key)
        told = {} if len(plan) == 1 else {"stage": stage.name}
        if finished is None:
            attach(model, stage, before, part.schedule.seed)
            log = fit(
                model,
                examples,
                pad,
                part.schedule,
                folder / stage.name,
                save_every or min(-(-part.schedule.steps // 10), 100),
                lambda stage=stage: stage.after_step and stage.after_step(_single(model)),
                f"{title}: {stage.name}" if told else title,
                stage.penalty and (lambda stage=stage: stage.penalty(_single(model))),
            )
            if not last:
                _keep(kept / part.key, model, log)
                shutil.rmtree(folder / stage.name, ignore_errors=True)
                finished = _finished(kept / part.key)
        note = {}
        if finished is not None:
            before, log, note["tensors"] = finished
        if stage.note is not None:
            with torch.no_grad():
                note |= stage.note(before if finished else _single(model))
        if note:
            found[stage.name] = note
        curve += [told | entry for entry in log]
    return curve, found


def forget(plan: Sequence[Planned], folder: Path, kept: Path) -> None:
    """Remove what is left of an earlier run of these stages."""
    for part in plan:
        shutil.rmtree(folder / part.stage.name, ignore_errors=True)
        durable.remove(_mark(kept / part.key))


def trained(model: Model) -> Parts:
    """What was trained, on the CPU and without gradients, as a later stage finds it."""
    return _parts({name: tensor.detach().cpu() for name, tensor in named_tensors(model.new_modifications()).items()})


def _parts(tensors: Mapping[str, Tensor]) -> Parts:
    return {path: part for path, [part] in modifications_of(tensors).items()}


def _single(model: Model) -> Parts:
    return {path: part for path, [part] in model.new_modifications().items()}


# --- finished stages: <key>.safetensors and, written last, <key>.json with its sha256 and the loss curve ------------


def _mark(path: Path) -> Path:
    return path.with_suffix(".json")


def _keep(path: Path, model: Model, log: list[dict[str, float]]) -> None:
    tensors = dump(named_tensors(model.new_modifications()))
    durable.write_bytes(path.with_suffix(".safetensors"), tensors)
    durable.write_bytes(_mark(path), canonical({"tensors": digest_of(tensors), "log": log}))


def _finished(path: Path) -> tuple[Parts, list[dict[str, float]], str] | None:
    """The modifications of a finished stage, its loss curve and the digest of its tensors; None unless it is whole."""
    try:
        mark, tensors = json.loads(_mark(path).read_bytes()), path.with_suffix(".safetensors").read_bytes()
        if mark["tensors"] != digest_of(tensors):
            return None
    except (OSError, ValueError):
        return None
    return _parts(load(tensors)), mark["log"], mark["tensors"]
