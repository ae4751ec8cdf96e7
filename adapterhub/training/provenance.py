"""What a release says of the training that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed
from typing import Any

import msgspec

from adapterhub.data import Data
from adapterhub.errors import NameInUse
from adapterhub.evaluation.evaluate import evaluate
from adapterhub.kinds.recipe import Recipe
from adapterhub.runtime.model import Model
from adapterhub.spec import claims
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import Reference
from adapterhub.store.releases import Releases
from adapterhub.training.parts import TrainingParts
from adapterhub.training.starting_point import StartingPoint
from adapterhub.training.trainer import Schedule

LIBRARIES = ("torch", "transformers", "accelerate", "peft")


def recipe_of(
    data: Data,
    schedule: Schedule,
    max_length: int,
    model: Model,
    ingredients: TrainingParts,
    recipes: Sequence[Recipe],
    extras: Mapping[str, Data],
    beneath: str | None,
) -> dict[str, Any]:
    """How the release was made. recipes: those of the ingredients, as they have read the data."""
    recipe = {
        "data": told(data),
        **vars(schedule),
        "max_length": max_length,
        "optimizer": "adamw",
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": model.device.type,
        "libraries": {name: installed(name) for name in LIBRARIES},
        **ingredients.told,
    }
    if extras:
        recipe["extras"] = {key: told(one) for key, one in extras.items()}
    named = zip(ingredients.chosen_recipes, recipes, strict=True)
    if mixed := {chosen.name: dict(found) for chosen, one in named if (found := one.found())}:
        recipe["mixed"] = mixed
    if beneath is not None:
        recipe["beneath"] = beneath
    return recipe


def already_published(hub: Releases, version: str | None, decides: Mapping[str, Any]) -> Release | None:
    """The release that was made before by all that decides this one. Raises NameInUse for a version that was made otherwise."""
    for row in hub.releases(decides["name"]):
        if version not in (None, row.version):
            continue
        release = hub.resolve(Reference(row.name, row.version))
        found = msgspec.structs.asdict(release.manifest)
        found["recipe"] = {key: value for key, value in found["recipe"].items() if key != "found"}  # it follows
        found["eval"] = claims.figures(release.manifest.metrics).get("eval", {}).get("data")
        if as_json({key: found[key] for key in decides}) == as_json(decides):
            return release
        if version is not None:
            raise NameInUse(
                f"{release} exists, and was made in another way", "give another version, or none for the next"
            )
    return None


def as_json(decides: Mapping[str, Any]) -> bytes:
    """All that decides a run, as bytes to compare and to digest."""
    return canonical(msgspec.to_builtins(decides))


def told(data: Data) -> dict[str, Any]:
    return {"digest": data.digest, "rows": len(data.rows), "kind": data.kind}


def measured_on(model: Model, begin: StartingPoint, recipe: Mapping[str, Any]) -> dict[str, Any]:
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
