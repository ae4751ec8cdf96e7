"""Training: data and a method make an adapter, perhaps over frozen ones, or an adapter goes on; a release comes out."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from adapterhub import durable, plugins
from adapterhub.adapter import Adapter, Modifications, forms_of, require_effect
from adapterhub.data import Data, read
from adapterhub.device import memory_told, precision
from adapterhub.encoding import Example, check_vocabulary, encode, pad_token
from adapterhub.errors import NameInUse, UsageError
from adapterhub.evaluate import evaluate
from adapterhub.manifest import Made, Parent, Release, canonical, check_name, check_version, digest_of
from adapterhub.method import Method
from adapterhub.modification import named_tensors
from adapterhub.publish import publish_tensors
from adapterhub.runtime import Model, load
from adapterhub.tensors import check_finite
from adapterhub.trainer import Schedule, fit

if TYPE_CHECKING:
    from adapterhub.hub import Hub

LIBRARIES = ("torch", "transformers", "accelerate")


class DataWarning(UserWarning):
    """Rows that were not used whole."""


def train(
    hub: Hub,
    base: object = None,
    method: str | None = None,
    data: str | Path | None = None,
    name: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
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

    base: a known name, a folder, a repo id or a loaded transformers model; None with continue_from: the name it records
    method, options: how (`adapterhub plugins list`); left out with continue_from, which brings its own
    data, eval_data: files as in adapterhub.data; eval_data is measured at the end, into the release's metrics
    on: frozen adapters beneath the new one, in order; recorded as its parents
    continue_from: the adapter that goes on, over the parents it was made on, as a new version
    epochs (3) or steps: how long; lr rises over `warmup` steps (a tenth of all) and falls linearly to 0; AdamW without
        weight decay, gradients clipped at norm 1
    max_length: tokens of a row; longer ones are cut, with a warning
    dtype: of the base; auto is what was measured to be fastest (adapterhub.device); the adapter trains in float32
    save_every: steps between checkpoints (a tenth of all, at most 100). They lie in the hub's folder `training`, named
        by everything that decides the result: the same call again goes on from the last (unless resume is False), and
        ends with the same bytes as if it had never stopped.

    Raises UsageError, NotFound, NameInUse, DataError, PluginError and IncompatibleBase before training begins; HubError
    when it diverges or memory runs out and NoEffect if nothing was learned: then nothing is published."""
    start = _start(hub, method, options, on, continue_from)
    name = check_name(name or (start.goes_on.name if start.goes_on else ""))
    if version is not None and hub.index.get(name, check_version(version)) is not None:
        raise NameInUse(f"{name}@{version} exists", "give another version, or none for the next")
    if base is None:
        if start.goes_on is None:
            raise UsageError("no base to train on", "give a known name (smollm2), a folder or a repo id")
        base = start.goes_on.manifest.base.name
    if data is None:
        raise UsageError("no data to train on", "give a JSON Lines file")
    _check(epochs=epochs, steps=steps, lr=lr, batch_size=batch_size, warmup=warmup, save_every=save_every)
    rows, held_out = read(data), read(eval_data) if eval_data is not None else None

    model = load(hub, base, start.beneath, dtype=precision(dtype, device), device=device, force=force)
    try:
        start.attach(hub, model, seed, force)
        examples = _examples(rows, model, max_length)
        if held_out is not None:
            _examples(held_out, model, max_length)
        steps = steps or math.ceil(math.ceil(len(examples) / batch_size) * (epochs or 3))
        warmup = steps // 10 if warmup is None else warmup
        schedule = Schedule(steps, batch_size, lr, warmup, seed, gradient_checkpointing)
        recipe = _recipe(rows, schedule, max_length, model)
        print_of = {"base": model.fingerprint.base, "method": start.made, "parents": start.parents, "recipe": recipe}
        folder = hub.root / "training" / digest_of(canonical(msgspec.to_builtins(print_of))).removeprefix("sha256:")
        durable.make_folder(folder)
        with durable.lock(folder / "lock"):
            if not resume:
                for checkpoint in folder.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
            with memory_told("a smaller batch_size or max_length, or gradient_checkpointing"):
                log = fit(
                    model,
                    examples,
                    pad_token(model.tokenizer),
                    schedule,
                    folder,
                    save_every or min(math.ceil(steps / 10), 100),
                    lambda: start.after_step(model.new_modifications()),
                    f"train {name}",
                )
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
                method=start.made,
                parents=start.parents,
                recipe=recipe,
                metrics=_metrics(model, log, held_out, batch_size, max_length),
                licence=licence,
                files={"log": canonical(log)},
            )
            shutil.rmtree(folder, ignore_errors=True)
        return release
    finally:
        if not isinstance(base, str | Path):
            model.detach()


@dataclass(frozen=True)
class _Start:
    """What is trained, from where, over what."""

    made: Made | None
    method: Method | None
    config: Any
    parents: list[Parent]
    beneath: str | None
    """The frozen adapters under it, as an expression."""
    goes_on: Release | None

    def attach(self, hub: Hub, model: Model, seed: int, force: bool) -> None:
        """Put the parts to train on the model."""
        parts: Modifications = {}
        if self.method is not None:
            torch.manual_seed(seed)
            parts = {path: [part] for path, part in self.method.build(model.sites, self.config).items()}
        if self.goes_on is not None:
            from adapterhub.bases.fingerprint import check_base

            record = self.goes_on.manifest.base
            check_base(record, hub.store.read(record.sketch.digest), model.fingerprint, force=force)
            parts = self._continued(parts, Adapter.load(hub, self.goes_on).modifications())
        model.attach_new(parts)
        if not model.trainable_parameters():
            raise UsageError(f"there is nothing to train: {self._name} made no tensors", "check its options")

    def _continued(self, fresh: Modifications, stored: Modifications) -> Modifications:
        """What its method makes (with dropout and whatever else is not stored) around the stored tensors."""
        if self.method is None:
            return stored
        if forms_of(fresh) != forms_of(stored):
            raise UsageError(
                f"{self.goes_on} is not what its method {self._name} makes of this base, so it cannot go on",
                "train a new adapter over it: --on",
            )
        for path, parts in fresh.items():
            for part, source in zip(parts, stored[path], strict=True):
                part.tensors = source.tensors
        return fresh

    @property
    def _name(self) -> str:
        return repr(self.made.name) if self.made else "no method"

    def after_step(self, parts: Modifications) -> None:
        if self.method is not None:
            self.method.after_step({path: part for path, [part] in parts.items()})


def _start(
    hub: Hub,
    method: str | None,
    options: Mapping[str, Any] | None,
    on: Sequence[str] | None,
    continue_from: str | None,
) -> _Start:
    goes_on, parents, made = None, [], None
    if continue_from is not None:
        if method or options or on:
            raise UsageError(
                "an adapter goes on with its own method, options and parents",
                "leave method, options and on out, or train a new adapter on it",
            )
        goes_on = hub.resolve(continue_from)
        if goes_on.manifest.compose is not None:
            raise UsageError(f"{goes_on} is a composition: it has no tensors", "continue one of its parts")
        made = goes_on.manifest.method
        beneath = [hub.exact(parent) for parent in goes_on.manifest.parents if parent.relation == "on"]
        parents.append(_parent(goes_on, "continue"))
    else:
        if method is None:
            raise UsageError("no method to train with", f"one of: {', '.join(plugins.names('methods'))}")
        made = Made(name=method, options=dict(options or {}), distribution=plugins.distribution("methods", method))
        beneath = [hub.resolve(reference) for reference in ([on] if isinstance(on, str) else on or [])]
    instance = config = None
    if made is not None:
        cls = plugins.load("methods", made.name)
        instance, config = cls(), plugins.options(cls.Config, dict(made.options))
        distribution = plugins.distribution("methods", made.name)
        made = Made(name=made.name, options=msgspec.to_builtins(asdict(config)), distribution=distribution)
    return _Start(
        made,
        instance,
        config,
        parents + [_parent(release, "on") for release in beneath],
        " + ".join(map(str, beneath)) or None,
        goes_on,
    )


def _parent(release: Release, relation: str) -> Parent:
    return Parent(name=release.name, version=release.version, digest=release.digest, relation=relation)


def _check(*, epochs, steps, lr, batch_size, warmup, save_every) -> None:
    if epochs is not None and steps is not None:
        raise UsageError("both epochs and steps are given", "give one of them")
    for name, value in {"epochs": epochs, "steps": steps, "save_every": save_every}.items():
        if value is not None and value <= 0:
            raise UsageError(f"{name} is {value}", "give at least 1")
    if batch_size < 1 or not 0 < lr < math.inf or (warmup or 0) < 0:
        raise UsageError(
            f"batch_size {batch_size}, lr {lr} and warmup {warmup} train nothing", "for example batch_size 8, lr 1e-3"
        )


def _examples(data: Data, model: Model, max_length: int) -> list[Example]:
    examples, cut = encode(data, model.tokenizer, max_length)
    check_vocabulary(examples, model.base)
    if cut:
        warnings.warn(
            f"{data.path}: {cut} of {len(examples)} rows are longer than {max_length} tokens and are cut",
            DataWarning,
            stacklevel=3,
        )
    return examples


def _recipe(data: Data, schedule: Schedule, max_length: int, model: Model) -> dict[str, Any]:
    return {
        "data": {"digest": data.digest, "rows": len(data.rows), "kind": data.kind},
        **vars(schedule),
        "max_length": max_length,
        "optimizer": "adamw",
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": model.device.type,
        "libraries": {name: installed(name) for name in LIBRARIES},
    }


def _metrics(
    model: Model, log: list[dict[str, float]], held_out: Data | None, batch_size: int, max_length: int
) -> dict[str, Any]:
    """train_loss: the mean over the last tenth of the steps; eval: what `evaluate` says of the held-out data."""
    last = [entry["loss"] for entry in log[-max(1, len(log) // 10) :]]
    metrics: dict[str, Any] = {"train_loss": sum(last) / len(last)}
    if held_out is not None:
        path = held_out.path
        measured = evaluate(None, None, None, path, model=model, batch_size=batch_size, max_length=max_length)
        metrics["eval"] = {key: value for key, value in measured.items() if key != "rows"}
    return metrics
