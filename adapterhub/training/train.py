"""Training: data and a method make an adapter, perhaps over frozen ones, or an adapter goes on; a release comes out."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from adapterhub.data.seeds import check_seed
from adapterhub.errors import NameInUse, UsageError
from adapterhub.files import durable
from adapterhub.kinds.method import Stage
from adapterhub.kinds.recipe import Recipe
from adapterhub.kinds.training import Setting
from adapterhub.runtime.model import Model, load
from adapterhub.spec import claims
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.spec.manifest import Made, Release
from adapterhub.spec.names import Reference, check_version
from adapterhub.spec.parents import joined_licences
from adapterhub.store.naming import check_new
from adapterhub.tensors.file import check_finite
from adapterhub.training.parts import ingredients
from adapterhub.training.provenance import measured_on, metrics_of, recipe_of, told
from adapterhub.training.stages import Planned, check, forget, planned
from adapterhub.training.stages import run as run_stages
from adapterhub.training.starting_point import Start, start
from adapterhub.training.trainer import Schedule

if TYPE_CHECKING:
    from adapterhub.store.releases import Releases


class DataWarning(UserWarning):
    """Rows that were not used whole."""


def train(
    hub: Releases,
    base: object = None,
    method: str | None = None,
    data: str | Path | None = None,
    name: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    objective: str | None = None,
    recipes: Sequence[str] = (),
    schedule: str | None = None,
    extras: Mapping[str, str | Path] | None = None,
    version: str | None = None,
    on: Sequence[str] | None = None,
    continue_from: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    lr: float = 1e-3,
    batch_size: int = 8,
    warmup: int | None = None,
    seed: int = 0,
    max_length: int = 1024,
    eval_data: str | Path | None = None,
    licence: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    gradient_checkpointing: bool = False,
    save_every: int | None = None,
    resume: bool = True,
    force: bool = False,
) -> Release:
    """Train an adapter and publish it.

    base: a known name, a folder, a repo id or a loaded transformers model; None with continue_from: the known name it records
    method, options: how (`adapterhub plugins list`); left out with continue_from, which brings its own
    objective: what is minimised (sft); recipes: what changes the data or adds a term to the loss, in order; schedule: which
        tensors train when, and how fast. Their options are in `options` too, as "<part>.<option>"
    extras: other data files by name, for the parts that ask for one (calibration, background)
    data, eval_data: files as in adapterhub.data; eval_data is measured at the end, into the release's metrics
    on: frozen adapters beneath the new one, in order (a composition: what it is made of), or what a gate weighs; recorded as its parents, and
        as an expression in the recipe's "beneath"
    continue_from: the adapter that goes on, over what its recipe says was beneath it, as a new version
    epochs (3) or steps: how long; lr rises over `warmup` steps (a tenth of all) and falls linearly to 0; AdamW without
        weight decay, gradients clipped at norm 1. A method in stages shares the steps out among them: each has its own
        optimiser and schedule, and what was found on the way is in the recipe's "found"
    max_length: tokens of a row; longer ones are cut, with a warning
    dtype: of the base: float32, bfloat16, float16, "stored", or "auto", what was measured to be fastest
        (adapterhub.bases.device), or float32 for a method that trains through the base's weights, which needs it; the adapter
        trains in float32
    save_every: steps between checkpoints (a tenth of all, at most 100). They lie in the hub's folder `training`, named
        by everything that decides the result: the same call again goes on from the last (unless resume is False), and
        ends with the same bytes as if it had never stopped. A run that is published under the name (and version, if one
        is given) is not trained again: its bytes are known, and its release is returned. A finished stage that is not
        the last is kept in `training/stages` for other runs that share it; remove that folder to free its room.

    Raises UsageError, NotFound, NameInUse, DataError, PluginError and IncompatibleBase before training begins; HubError
    when it diverges or memory runs out and NoEffect if nothing was learned: then nothing is published."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "training in several processes is not supported yet (WORLD_SIZE is set)",
            "start it as one process, without torchrun",
        )
    recipes = [recipes] if isinstance(recipes, str) else recipes
    made_of, options = ingredients(objective, recipes, schedule, options or {})
    begin = start(hub, method, options, on, continue_from)
    made_of.check_goes_on(begin.goes_on, objective)
    name = check_new(hub.index, name or (begin.goes_on.name if begin.goes_on else ""))
    if version is not None:
        check_version(version)
    if base is None:
        base = begin.goes_on.manifest.base.name if begin.goes_on else ""
        if base not in plugins.enabled_names("bases"):  # what a manifest says is no path and no repo id to follow
            known = f"; {begin.goes_on} only says that it was made for {base!r}" if base else ""
            raise UsageError(
                "no base to train on" + known, "give a known name (smollm2), a folder or a repo id: --base"
            )
    if data is None:
        raise UsageError("no data to train on", "give a JSON Lines file")
    _check(epochs=epochs, steps=steps, lr=lr, batch_size=batch_size, warmup=warmup, save_every=save_every)
    check_seed(seed)
    if not (licence or "").isprintable():  # as Manifest.decode, but before anything is trained
        raise UsageError(f"the licence {licence!r} holds control characters", "for example licence Apache-2.0")
    if licence is None:
        licence = joined_licences([hub.exact(parent) for parent in begin.parents])
    rows, held_out = read(data), read(eval_data) if eval_data is not None else None
    others = {key: read(path) for key, path in sorted((extras or {}).items())}
    made_of.check(rows.kind, others, gradient_checkpointing)

    model = load(hub, base, begin.beneath, dtype=_precision(begin, dtype), device=device, force=force)
    try:
        _check_precision(begin, str(model.base.dtype).removeprefix("torch."))
        stages = begin.stages(hub, model, force)
        changed = made_of.recipes()
        examples = _examples(_through(changed, rows), model, max_length)
        pad = pad_token(model.tokenizer)
        read_others = {key: _examples(one, model, max_length) for key, one in others.items()}
        setting = Setting(model, examples, pad, batch_size, seed, extras=read_others)
        begins = made_of.schedule().start if begin.goes_on is None else None
        check(model, stages, seed, begins)
        for one in filter(None, (stage.measurement for stage in stages)):
            if one.extra is not None:
                setting.extra(one.extra, f"the method measures its {one.name} on it")
        if held_out is not None:
            _examples(held_out, model, max_length)
        for one in changed:
            examples = one.examples(examples, setting)
        made_of.check_read(others, setting.asked)
        setting = replace(setting, examples=grouped(examples) if rows.kind == "scored" else examples)
        steps = steps or math.ceil(math.ceil(len(setting.examples) / batch_size) * (epochs or 3))
        pace = Schedule(steps, batch_size, lr, steps // 10 if warmup is None else warmup, seed, gradient_checkpointing)
        recipe = recipe_of(rows, pace, max_length, model) | made_of.told
        if others:
            recipe["extras"] = {key: told(one) for key, one in others.items()}
        if mixed := {
            r.name: dict(f) for r, one in zip(made_of.chosen_recipes, changed, strict=True) if (f := one.found())
        }:
            recipe["mixed"] = mixed
        if begin.beneath is not None:
            recipe["beneath"] = begin.beneath
        made = {"base": model.fingerprint.base, "method": begin.made, "parents": begin.parents}
        plan = _plan(stages, pace, warmup, made, recipe)
        if (shortest := min(part.schedule.steps for part in plan)) < (rounds := made_of.rounds):
            raise UsageError(f"{shortest} steps are fewer than the schedule's {rounds} rounds", "give more steps")
        if len(plan) > 1:
            recipe["stages"] = [part.told for part in plan]
        run = {"name": name, **made, "recipe": recipe}
        training = hub.root / "training"
        folder, kept = training / digest_of(_bytes(run)).removeprefix("sha256:"), training / "stages"
        asked = {"licence": licence, "eval": held_out and held_out.digest}
        if (release := _published(hub, version, run | asked)) is not None:
            shutil.rmtree(folder, ignore_errors=True)  # it was killed after it was published
            return release
        durable.make_folder(folder)
        with durable.lock(folder / "lock"):
            if not resume:
                forget(plan, folder, kept)
            with memory_told("a smaller batch_size or max_length, or gradient_checkpointing"):
                log, found = run_stages(
                    plan,
                    setting,
                    made_of,
                    folder,
                    kept,
                    save_every,
                    f"train {name}",
                    stored=begin.stored(hub),
                    starts_at_base=begin.method is None or begin.method.starts_at_base,
                    shared=measured_on(model, begin, recipe),
                )
            if found:
                recipe["found"] = found
            parts = model.new_modifications()
            with torch.no_grad():
                check_finite(named_tensors(parts))
                require_effect(parts, model.sites, model.base, name)
            release = publish_tensors(
                hub,
                parts,
                name=name,
                base=model.fingerprint.base,
                sketch=model.fingerprint.sketch,
                version=version,
                method=begin.made,
                parents=begin.parents,
                recipe=recipe,
                metrics=metrics_of(model, log, held_out, batch_size, max_length),
                licence=licence,
                files={"log": canonical(log)},
            )
            shutil.rmtree(folder, ignore_errors=True)
        return release
    finally:
        if not isinstance(base, str | Path):
            model.detach()


def _through(recipes: Sequence[Recipe], rows: Data) -> Data:
    for recipe in recipes:
        rows = recipe.rows(rows)
    return rows


def _precision(begin: Start, dtype: str) -> str:
    """The base's dtype as asked for; float32 where the method needs it and nothing is asked for."""
    if begin.method is None or not begin.method.float32_base or dtype == "stored":
        return dtype
    _check_precision(begin, "float32" if dtype == "auto" else dtype)
    return "float32"


def _check_precision(begin: Start, dtype: str) -> None:
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


def _published(hub: Releases, version: str | None, run: Mapping[str, Any]) -> Release | None:
    """The release that this very run made already. Raises NameInUse for a version that another one made."""
    for row in hub.releases(run["name"]):
        if version not in (None, row.version):
            continue
        release = hub.resolve(Reference(row.name, row.version))
        found = msgspec.structs.asdict(release.manifest)
        found["recipe"] = {key: value for key, value in found["recipe"].items() if key != "found"}  # it follows
        found["eval"] = claims.figures(release.manifest.metrics).get("eval", {}).get("data")
        if _bytes({key: found[key] for key in run}) == _bytes(run):
            return release
        if version is not None:
            raise NameInUse(
                f"{release} exists, and was made in another way", "give another version, or none for the next"
            )
    return None


def _bytes(run: Mapping[str, Any]) -> bytes:
    return canonical(msgspec.to_builtins(run))


def _check(*, epochs, steps, lr, batch_size, warmup, save_every) -> None:
    if epochs is not None and steps is not None:
        raise UsageError("both epochs and steps are given", "give one of them")
    for name, value in {"epochs": epochs, "steps": steps, "save_every": save_every}.items():
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} is {value}", "give at least 1")
    if batch_size < 1 or not 0 < lr < math.inf or (warmup or 0) < 0:
        raise UsageError(
            f"batch_size {batch_size}, lr {lr} and warmup {warmup} train nothing", "for example batch_size 8, lr 1e-3"
        )


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
