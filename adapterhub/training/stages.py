"""The stages of a method, trained in order. A finished one is kept: a run that is killed goes on after it, and another
run that shares all that decides it takes it as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterhub.adapters.adapter import modifications_of
from adapterhub.adapters.names import named_tensors
from adapterhub.errors import UsageError
from adapterhub.files import durable
from adapterhub.kinds.method import BuildContext, Measurement, Parts, Stage, require_plain
from adapterhub.kinds.training import TrainingContext
from adapterhub.runtime.model import Model
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.tensors.file import dump, load
from adapterhub.training.module import StageModule
from adapterhub.training.parts import TrainingParts
from adapterhub.training.trainer import Schedule, fit


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

    stages: as `staged` gives them; whole: the run's steps and highest rate; warmup: steps of each stage, None for a tenth of
    it; options: of the method, which decide a stage that says nothing else; shared: what else decides the result, as JSON has it. Raises UsageError where a stage would get no step."""
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


def given(model: Model, before: Parts, measured: Mapping[str, Tensor] | None = None) -> BuildContext:
    """What a stage builds from on this model."""
    return BuildContext(model.sites, model.base, before, measured or {})


def attach(
    model: Model,
    stage: Stage,
    start: BuildContext,
    seed: int,
    begin: Callable[[Parts, BuildContext], Parts] | None = None,
) -> None:
    """Put what the stage trains on the model, in the order of its sites. begin: what a parameter schedule makes of it."""
    torch.manual_seed(seed)
    built = stage.build(start)
    parts = begin(built, start) if begin else built
    model.attach_new({**{site.path: parts[site.path] for site in model.sites if site.path in parts}, **parts})
    through = {path for path, here in model.new_modifications().items() if any(part.folds for part in here)}
    require_plain([site for site in start.sites if site.path in through], f"the stage {stage.name!r}")
    if not model.trainable_parameters():
        raise UsageError(f"there is nothing to train: the stage {stage.name!r} made no tensors", "check its options")


def check(
    model: Model, stages: Sequence[Stage], seed: int, begin: Callable[[Parts, BuildContext], Parts] | None = None
) -> None:
    """Refuse before anything is written: what a stage's `check` refuses, and what the first cannot build, unless it builds
    from a measurement. The rest as of `attach`."""
    start = given(model, {})
    for stage in stages:
        if stage.check is not None:
            stage.check(start)
    if stages[0].measurement is None:
        attach(model, stages[0], start, seed, begin)


def run(
    plan: Sequence[Planned],
    setting: TrainingContext,
    made_of: TrainingParts,
    folder: Path,
    kept: Path,
    save_every: int | None,
    title: str,
    stored: Collection[str] | None = None,
    starts_at_base: bool = True,
    shared: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train the stages in order; the last one's modifications stay on the model. Returns the loss curve, each entry with
    its stage's name where there are several, and what was found: {stage: its note, and the sha256 of what was kept}.

    folder: of the checkpoints, by stage; kept: of finished stages, by key. save_every: as in `train`. stored: where
    the adapter that goes on has tensors; None of a new one. starts_at_base: a site where nothing trained is left out of what is stored. shared: what decides a measurement besides its data and its options."""
    curve, found, before, model = [], {}, {}, setting.model
    for part in plan:
        stage, last = part.stage, part is plan[-1]
        finished = None if last else _finished(kept / part.key)
        told = {} if len(plan) == 1 else {"stage": stage.name}
        note: dict[str, Any] = {}
        if finished is None:
            measured, digest = measure(stage.measurement, setting, kept.parent / "measured", shared or {})
            if digest:
                note["measured"] = digest
            start = given(model, before, measured)
            learner = StageModule(replace(setting, steps=part.schedule.steps), made_of, stage)
            attach(model, stage, start, part.schedule.seed, partial(learner.start, stored=stored))
            log = fit(
                learner,
                part.schedule,
                folder / stage.name,
                save_every or min(-(-part.schedule.steps // 10), 100),
                f"{title}: {stage.name}" if told else title,
            )
            note |= learner.found()
            if stage.note is not None:
                with torch.no_grad():
                    note |= stage.note(single(model))
            if last:
                _finish(model, stage, start, learner, starts_at_base)
            else:
                _keep(kept / part.key, model, log, note)
                shutil.rmtree(folder / stage.name, ignore_errors=True)
                finished = _finished(kept / part.key)
        if finished is not None:
            before, log, note = finished
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


def single(model: Model) -> Parts:
    """What trains on the model, one modification a site."""
    return {path: part for path, [part] in model.new_modifications().items()}


@torch.no_grad()
def _finish(model: Model, stage: Stage, start: BuildContext, learner: StageModule, leaves_out: bool) -> None:
    """What is stored: without what never trained, and as the stage says. It takes the place of what trained."""
    untouched = learner.untouched if leaves_out else set()
    if stage.finish is None and not untouched:
        return
    parts = {path: part for path, part in single(model).items() if path not in untouched}
    if stage.finish is not None:
        stored = _parts(
            {name: t.detach().cpu() for name, t in named_tensors({p: [m] for p, m in parts.items()}).items()}
        )
        parts = stage.finish(stored, start)
    model.attach_new(parts)


def measure(
    measurement: Measurement | None, setting: TrainingContext, folder: Path, shared: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], str]:
    """What a measurement finds, from the folder if it was taken before, and its sha256; of none: ({}, "").

    shared: what decides it besides its options: {"base": ..., "data": digests by name, ...}."""
    if measurement is None:
        return {}, ""
    data = shared.get("data", {})
    decides = {"name": measurement.name, "options": dict(measurement.options or {}), **shared}
    decides["data"] = data.get(measurement.extra or "", "")
    path = folder / digest_of(canonical(decides)).removeprefix("sha256:")
    if (known := _kept_tensors(path)) is None:
        if measurement.extra is not None:
            setting.extra(measurement.extra, f"{measurement.name} is measured on it")
        torch.manual_seed(0)  # alike for every run that shares it
        with setting.model.without_new():
            tensors = dump({name: tensor.detach().cpu() for name, tensor in measurement.take(setting).items()})
        durable.make_folder(folder)
        durable.write_bytes(path.with_suffix(".safetensors"), tensors)
        durable.write_bytes(_mark(path), canonical({"tensors": digest_of(tensors)}))
        known = load(tensors), {"tensors": digest_of(tensors)}
    return known[0], known[1]["tensors"]


# --- finished stages: <key>.safetensors and, written last, <key>.json with its sha256 and the loss curve ------------


def _mark(path: Path) -> Path:
    return path.with_suffix(".json")


def _keep(path: Path, model: Model, log: list[dict[str, float]], note: Mapping[str, Any]) -> None:
    tensors = dump(named_tensors(model.new_modifications()))
    durable.write_bytes(path.with_suffix(".safetensors"), tensors)
    durable.write_bytes(_mark(path), canonical({"tensors": digest_of(tensors), "log": log, "note": note}))


def _finished(path: Path) -> tuple[Parts, list[dict[str, float]], dict[str, Any]] | None:
    """The modifications of a finished stage, its loss curve and what was found, the digest of its tensors too; None unless
    it is whole."""
    kept = _kept_tensors(path)
    return kept and (_parts(kept[0]), kept[1]["log"], kept[1]["note"] | {"tensors": kept[1]["tensors"]})


def _kept_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and what was written beside them; None unless they are whole."""
    try:
        mark, tensors = json.loads(_mark(path).read_bytes()), path.with_suffix(".safetensors").read_bytes()
        return (load(tensors), mark) if mark["tensors"] == digest_of(tensors) else None
    except (OSError, ValueError):
        return None
