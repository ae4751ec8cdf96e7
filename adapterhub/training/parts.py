"""What a training is made of besides its method and data: the objective, recipes and a parameter schedule."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from adapterhub import plugins
from adapterhub.errors import UsageError
from adapterhub.kinds.contracts import make, number
from adapterhub.kinds.objective import Objective
from adapterhub.kinds.recipe import Recipe
from adapterhub.kinds.schedule import ParameterSchedule
from adapterhub.spec.manifest import Release
from adapterhub.training.request import OBJECTIVE


class LeftOut(UserWarning):
    """An adapter goes on without something that it was trained with."""


@dataclass(frozen=True)
class ChosenPart:
    """An installed part and its options."""

    group: str
    name: str
    config: Any

    def make(self) -> Any:
        """A fresh one: each stage of a training has its own."""
        return make(plugins.load(self.group, self.name), self.config)

    @property
    def told(self) -> dict[str, Any]:
        """What the manifest says of it."""
        options = msgspec.to_builtins(asdict(self.config))
        told = {"name": self.name, "options": options, "distribution": plugins.distribution(self.group, self.name)}
        if verifier := options.get("verifier"):
            told["verifier"] = plugins.distribution("verifiers", verifier)
        return told


@dataclass(frozen=True)
class TrainingParts:
    """Chosen, with their options read."""

    chosen_objective: ChosenPart
    chosen_recipes: tuple[ChosenPart, ...] = ()
    chosen_schedule: ChosenPart | None = None

    def objective(self) -> Objective:
        return self.chosen_objective.make()

    def recipes(self) -> list[Recipe]:
        return [recipe.make() for recipe in self.chosen_recipes]

    def schedule(self) -> ParameterSchedule:
        return (
            ParameterSchedule(ParameterSchedule.Config())
            if self.chosen_schedule is None
            else self.chosen_schedule.make()
        )

    @property
    def rounds(self) -> int:
        """Into how many parts the schedule cuts the steps of a stage."""
        return number(self.schedule(), "rounds")

    @property
    def told(self) -> dict[str, Any]:
        """What the recipe of a manifest says of them; nothing of the defaults."""
        told: dict[str, Any] = {}
        if self.chosen_objective.name != OBJECTIVE:
            told["objective"] = self.chosen_objective.told
        if self.chosen_recipes:
            told["recipes"] = [recipe.told for recipe in self.chosen_recipes]
        if self.chosen_schedule is not None:
            told["schedule"] = self.chosen_schedule.told
        return told

    def check(self, kind: str, extras: Collection[str], gradient_checkpointing: bool) -> None:
        """Raise UsageError for data that the objective does not read, extra data that a part lacks, and what would do nothing."""
        parts = [plugins.load(one.group, one.name) for one in (self.chosen_objective, *self.chosen_recipes)]
        if kind not in parts[0].kinds:
            raise UsageError(
                f"the objective {self.chosen_objective.name!r} reads {' or '.join(parts[0].kinds)} rows, and these are {kind!r} rows",
                "adapterhub plugins list shows the objectives",
            )
        if parts[0].samples:
            idle = [p.__name__ for p in parts[1:] if p.batch is not Recipe.batch or p.around is not Recipe.around]
            if idle or gradient_checkpointing:
                raise UsageError(
                    f"{idle[0] if idle else 'gradient checkpointing'} would do nothing: {self.chosen_objective.name!r} learns from "
                    "answers that the model writes, as it is when it is used",
                    "leave it out",
                )
        for part in parts:
            if missing := [name for name in part.extras if name not in extras]:
                raise UsageError(
                    f"{part.__name__} needs extra data named {missing[0]!r}", f"give a file: --extra {missing[0]}=FILE"
                )

    def check_goes_on(self, who: Release | None, objective: str | None) -> None:
        """An adapter goes on under what this call names, not under what made it: raise UsageError where its objective was
        another than the default and none is named, warn of a recipe or a schedule that is left out."""
        before = who.manifest.recipe if who is not None else {}
        made_under = before.get("objective", {}).get("name")
        if made_under and objective is None:
            raise UsageError(
                f"{who} was trained under the objective {made_under!r}, and this run names none",
                f"name it again (--objective {made_under}), or --objective {OBJECTIVE}",
            )
        then = {one["name"] for one in [*before.get("recipes", ()), *filter(None, [before.get("schedule")])]}
        now = {one.name for one in [*self.chosen_recipes, *filter(None, [self.chosen_schedule])]}
        if left := sorted(then - now):
            warnings.warn(f"{who} was trained with {', '.join(left)}, and goes on without", LeftOut, stacklevel=3)

    def check_read(self, extras: Collection[str], asked: Collection[str]) -> None:
        """Raise UsageError for extra data that no part of the training reads. asked: what parts have asked for so far."""
        parts = [plugins.load(one.group, one.name) for one in (self.chosen_objective, *self.chosen_recipes)]
        read = {name for part in parts for name in part.extras} | set(asked)
        if unread := next((name for name in extras if name not in read), None):
            raise UsageError(
                f"no part of this training reads the extra data {unread!r}",
                "leave it out, or see what the parts ask for",
            )


def training_parts(
    objective: str | None, recipes: Sequence[str], schedule: str | None, options: Mapping[str, Any]
) -> tuple[TrainingParts, dict[str, Any]]:
    """The parts with their options, and the options that are left for the method: those whose names have no dot.

    Raises PluginError for a part that is not installed, UsageError for an option of none of them."""
    named: dict[str, dict[str, Any]] = {}
    left: dict[str, Any] = {}
    for key, value in options.items():
        part, dot, name = key.partition(".")
        if dot:
            named.setdefault(part, {})[name] = value
        else:
            left[key] = value

    if twice := next((name for name in recipes if list(recipes).count(name) > 1), None):
        raise UsageError(f"the recipe {twice!r} is given twice", "give it once")

    def read(group: str, name: str) -> ChosenPart:
        return ChosenPart(group, name, plugins.options(plugins.load(group, name).Config, named.pop(name, {})))

    chosen = TrainingParts(
        read("objectives", objective or OBJECTIVE),
        tuple(read("recipes", name) for name in recipes),
        None if schedule is None else read("schedules", schedule),
    )
    if named:
        part = next(iter(named))
        raise UsageError(
            f"{part}.{next(iter(named[part]))} is an option of {part!r}, which is no part of this training",
            "name the part (--objective, --recipe, --schedule), or leave the option out",
        )
    return chosen, left
