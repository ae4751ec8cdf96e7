"""What a release says of the training that made it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version as installed
from typing import Any

from adapterhub.data import Data
from adapterhub.evaluation.evaluate import evaluate
from adapterhub.runtime.model import Model
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.training.starting_point import Start
from adapterhub.training.trainer import Schedule

LIBRARIES = ("torch", "transformers", "accelerate", "peft")


def recipe_of(data: Data, schedule: Schedule, max_length: int, model: Model) -> dict[str, Any]:
    return {
        "data": told(data),
        **vars(schedule),
        "max_length": max_length,
        "optimizer": "adamw",
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": model.device.type,
        "libraries": {name: installed(name) for name in LIBRARIES},
    }


def told(data: Data) -> dict[str, Any]:
    return {"digest": data.digest, "rows": len(data.rows), "kind": data.kind}


def measured_on(model: Model, begin: Start, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a measurement besides its own options: base, data, and how the data are read."""
    base = model.fingerprint.base
    extras = {key: told["digest"] for key, told in recipe.get("extras", {}).items()}
    read = recipe["data"]["digest"]
    if "recipes" in recipe:  # what is trained on is what they made of it
        read = digest_of(canonical([read, recipe["recipes"], extras, recipe["seed"]]))
    files = {"": read, **extras}
    decides = {"base": [base.structure, base.sketch.digest, base.tokenizer], "data": files}
    decides["beneath"] = [begin.beneath, *(parent.digest for parent in begin.parents if parent.relation != "continue")]
    kept = ("max_length", "dtype", "device", "libraries", "batch_size")
    plugin = begin.made.distribution if begin.made else ""
    return decides | {key: recipe[key] for key in kept} | {"plugin": plugin}


def metrics_of(
    model: Model, log: list[dict[str, float]], held_out: Data | None, batch_size: int, max_length: int
) -> dict[str, Any]:
    """train_loss: the mean over the last tenth of the (last stage's) steps; eval: what `evaluate` says of the held-out data."""
    log = [entry for entry in log if entry.get("stage") == log[-1].get("stage")]
    last = [entry["loss"] for entry in log[-max(1, len(log) // 10) :]]
    metrics: dict[str, Any] = {"train_loss": sum(last) / len(last)}
    if held_out is not None:
        path = held_out.path
        measured = evaluate(None, None, None, path, model=model, batch_size=batch_size, max_length=max_length)
        metrics["eval"] = {key: value for key, value in measured.items() if key != "rows"}
    return metrics
