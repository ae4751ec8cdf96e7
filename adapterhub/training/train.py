"""Training: data and a method make an adapter, perhaps over frozen ones, or an adapter goes on; a release comes out."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from adapterhub import plugins
from adapterhub.adapters.fit import require_effect
from adapterhub.adapters.names import named_tensors
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.device import memory_told
from adapterhub.data import Data, read
from adapterhub.data.batches import pad_token
from adapterhub.data.encoding import Example, check_vocabulary, encode, grouped
from adapterhub.errors import UsageError
from adapterhub.files import durable
from adapterhub.kinds.method import Stage
from adapterhub.kinds.recipe import Recipe
from adapterhub.kinds.training import TrainingContext
from adapterhub.runtime.model import Model, load
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.spec.manifest import Made, Release
from adapterhub.spec.parents import joined_licences
from adapterhub.store.naming import check_new
from adapterhub.store.releases import Releases
from adapterhub.tensors.file import check_finite
from adapterhub.training.parts import TrainingParts, training_parts
from adapterhub.training.provenance import already_published, as_json, measured_on, metrics_of, recipe_of
from adapterhub.training.request import EPOCHS, TrainRequest
from adapterhub.training.stages import Planned, check, forget, planned
from adapterhub.training.stages import run as run_in_order
from adapterhub.training.starting_point import StartingPoint, starting_point
from adapterhub.training.trainer import Schedule


class DataWarning(UserWarning):
    """Rows that were not used whole."""


@dataclass(frozen=True)
class Job:
    """A request whose files are read and whose names are checked; its base is not loaded."""

    hub: Releases
    request: TrainRequest
    name: str
    base: object
    begin: StartingPoint
    ingredients: TrainingParts
    rows: Data
    held_out: Data | None
    extras: Mapping[str, Data]
    licence: str | None


@dataclass(frozen=True)
class Run:
    """A job on its loaded base: the encoded data, the stages in order, and all that decides the result."""

    setting: TrainingContext
    stages: Sequence[Planned]
    recipe: Mapping[str, Any]
    decides: dict[str, Any]
    folder: Path
    """Of its checkpoints: named by all that decides the result."""

    @property
    def kept(self) -> Path:
        """The folder of finished stages, which runs share."""
        return self.folder.parent / "stages"


def train(hub: Releases, request: TrainRequest) -> Release:
    """Train an adapter as the request asks, and publish it.

    The learning rate rises over the warm-up and falls linearly to 0; AdamW without weight decay, gradients clipped at
    norm 1. A method in stages shares the steps out among them: each has its own optimiser and schedule, and what was
    found on the way is in the recipe's "found".

    Checkpoints lie in the hub's folder `training`, named by everything that decides the result: the same request
    continues from the last one and ends with the same bytes as if it had never stopped. A run that is published under
    the name (and version, if one is given) is not trained again: its release is returned. A finished stage that is not
    the last is kept in `training/stages` for other runs that share it; remove that folder to free its room.

    Raises UsageError, NotFound, NameInUse, DataError, PluginError and IncompatibleBase before training begins; HubError
    when it diverges or memory runs out and NoEffect if nothing was learned: then nothing is published."""
    job = prepare(hub, request)
    with loaded(job) as model:
        run = plan(job, model)
        named = {"licence": job.licence, "eval": job.held_out and job.held_out.digest}
        if (release := already_published(hub, request.version, run.decides | named)) is not None:
            shutil.rmtree(run.folder, ignore_errors=True)  # it was killed after it was published
            return release
        durable.make_folder(run.folder)
        with durable.lock(run.folder / "lock"):
            log, found = run_stages(job, run, model)
            release = publish(job, run, model, log, found)
            shutil.rmtree(run.folder, ignore_errors=True)
        return release


def prepare(hub: Releases, request: TrainRequest) -> Job:
    """Read the files that the request names and check all that can be checked without the base."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "training in several processes is not supported yet (WORLD_SIZE is set)",
            "start it as one process, without torchrun",
        )
    recipes = [request.recipes] if isinstance(request.recipes, str) else request.recipes
    parts, options = training_parts(request.objective, recipes, request.schedule, request.options or {})
    begin = starting_point(hub, request.method, options, request.on, request.continue_from)
    parts.check_goes_on(begin.goes_on, request.objective)
    name = check_new(hub.index, request.name or (begin.goes_on.name if begin.goes_on else ""))
    base = _recorded_base(begin.goes_on) if request.base is None else request.base
    licence = request.licence
    if licence is None:
        licence = joined_licences([hub.exact(parent) for parent in begin.parents])
    rows, held_out = read(request.data), None if request.eval_data is None else read(request.eval_data)
    extras = {key: read(path) for key, path in sorted((request.extras or {}).items())}
    parts.check(rows.kind, extras, request.gradient_checkpointing)
    return Job(hub, request, name, base, begin, parts, rows, held_out, extras, licence)


def _recorded_base(release: Release) -> str:
    base = release.manifest.base.name
    if base not in plugins.enabled_names("bases"):  # what a manifest says is no path and no repo id to follow
        raise UsageError(
            f"no base to train on; {release} only says that it was made for {base!r}",
            "give a known name (smollm2), a folder or a repo id: --base",
        )
    return base


@contextmanager
def loaded(job: Job) -> Iterator[Model]:
    """Load the base with the frozen adapters on it; at the end they come off a model that the caller gave."""
    request, begin = job.request, job.begin
    model = load(
        job.hub,
        job.base,
        begin.beneath,
        dtype=_precision(begin, request.dtype),
        device=request.device,
        force=request.force,
    )
    try:
        yield model
    finally:
        if not isinstance(job.base, str | Path):
            model.detach()


def plan(job: Job, model: Model) -> Run:
    """Encode the data, plan the stages and write down all that decides the result; nothing is written to the hub."""
    request, begin = job.request, job.begin
    _check_precision(begin, str(model.base.dtype).removeprefix("torch."))
    stages = begin.stages(job.hub, model, request.force)
    recipes = job.ingredients.recipes()
    setting = _encoded(job, model, stages, recipes)
    pace = _pace(request, len(setting.examples))
    recipe = recipe_of(job.rows, pace, request.max_length, model, job.ingredients, recipes, job.extras, begin.beneath)
    made = {"base": model.fingerprint.base, "method": begin.made, "parents": begin.parents}
    parts = _plan(stages, pace, request.warmup, made, recipe)
    if (shortest := min(part.schedule.steps for part in parts)) < (rounds := job.ingredients.rounds):
        raise UsageError(f"{shortest} steps are fewer than the schedule's {rounds} rounds", "give more steps")
    if len(parts) > 1:
        recipe["stages"] = [part.told for part in parts]
    decides = {"name": job.name, **made, "recipe": recipe}
    folder = job.hub.root / "training" / digest_of(as_json(decides)).removeprefix("sha256:")
    return Run(setting, parts, recipe, decides, folder)


def _encoded(job: Job, model: Model, stages: Sequence[Stage], recipes: Sequence[Recipe]) -> TrainingContext:
    """The data in tokens, as the recipes make them. Raises for a stage that cannot be built and for data that is not read."""
    request, parts = job.request, job.ingredients
    examples = _examples(_through(recipes, job.rows), model, request.max_length)
    pad = pad_token(model.tokenizer)
    extras = {key: _examples(data, model, request.max_length) for key, data in job.extras.items()}
    setting = TrainingContext(model, examples, pad, request.batch_size, request.seed, extras=extras)
    check(model, stages, request.seed, parts.schedule().start if job.begin.goes_on is None else None)
    for measurement in filter(None, (stage.measurement for stage in stages)):
        if measurement.extra is not None:
            setting.extra(measurement.extra, f"the method measures its {measurement.name} on it")
    if job.held_out is not None:
        _examples(job.held_out, model, request.max_length)
    for recipe in recipes:
        examples = recipe.examples(examples, setting)
    parts.check_read(job.extras, setting.asked)
    return replace(setting, examples=grouped(examples) if job.rows.kind == "scored" else examples)


def _pace(request: TrainRequest, examples: int) -> Schedule:
    batch = request.batch_size
    steps = request.steps or math.ceil(math.ceil(examples / batch) * (request.epochs or EPOCHS))
    warmup = steps // 10 if request.warmup is None else request.warmup
    return Schedule(steps, batch, request.lr, warmup, request.seed, request.gradient_checkpointing)


def run_stages(job: Job, run: Run, model: Model) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train the stages from the last checkpoint on: the loss curve, and what was found on the way."""
    begin = job.begin
    if not job.request.resume:
        forget(run.stages, run.folder, run.kept)
    with memory_told("a smaller batch_size or max_length, or gradient_checkpointing"):
        return run_in_order(
            run.stages,
            run.setting,
            job.ingredients,
            run.folder,
            run.kept,
            job.request.save_every,
            f"train {job.name}",
            stored=begin.stored(job.hub),
            starts_at_base=begin.method is None or begin.method.starts_at_base,
            shared=measured_on(model, begin, run.recipe),
        )


def publish(job: Job, run: Run, model: Model, log: list[dict[str, Any]], found: Mapping[str, Any]) -> Release:
    """Check that something was learned and publish it. Raises NoEffect."""
    request, base = job.request, model.fingerprint
    parts = model.new_modifications()
    with torch.no_grad():
        check_finite(named_tensors(parts))
        require_effect(parts, model.sites, model.base, job.name)
    return publish_tensors(
        job.hub,
        parts,
        name=job.name,
        base=base.base,
        sketch=base.sketch,
        version=request.version,
        method=job.begin.made,
        parents=job.begin.parents,
        recipe={**run.recipe, "found": found} if found else run.recipe,
        metrics=metrics_of(model, log, job.held_out, request.batch_size, request.max_length),
        licence=job.licence,
        files={"log": canonical(log)},
    )


def _through(recipes: Sequence[Recipe], rows: Data) -> Data:
    for recipe in recipes:
        rows = recipe.rows(rows)
    return rows


def _precision(begin: StartingPoint, dtype: str) -> str:
    """The base's dtype as asked for; float32 where the method needs it and nothing is asked for."""
    if begin.method is None or not begin.method.float32_base or dtype == "stored":
        return dtype
    _check_precision(begin, "float32" if dtype == "auto" else dtype)
    return "float32"


def _check_precision(begin: StartingPoint, dtype: str) -> None:
    if begin.method is not None and begin.method.float32_base and dtype in ("bfloat16", "float16"):
        raise UsageError(
            f"the method {begin.made.name!r} trains through the base's weights, and {dtype} would round what it learns away",
            "load the base in float32: --dtype float32",
        )


def _plan(
    stages: Sequence[Stage], schedule: Schedule, warmup: int | None, made: Mapping[str, Any], recipe: Mapping[str, Any]
) -> list[Planned]:
    """The stages; what decides one is all that decides the run but its length, and of the options only the stage's own."""
    method: Made | None = made["method"]
    shared = {**made, "method": method and (method.name, method.distribution)}
    shared |= {key: value for key, value in recipe.items() if key not in ("steps", "lr", "warmup")}
    return planned(stages, schedule, warmup, method.options if method else {}, msgspec.to_builtins(shared))


def _examples(data: Data, model: Model, max_length: int) -> list[Example]:
    examples, cut = encode(data, model.tokenizer, max_length)
    check_vocabulary(examples, model.base)
    model.context.check_rows(examples, model.advance())
    if cut:
        warnings.warn(
            f"{data.path}: {cut} of {len(examples)} rows are longer than {max_length} tokens and are cut",
            DataWarning,
            stacklevel=3,
        )
    return examples
