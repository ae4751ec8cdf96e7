"""One stage's training as a module: the tensors that train, and the loss of a batch at a step."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from adapterhub.data.seeds import seeded
from adapterhub.errors import IntegrityError, UsageError
from adapterhub.kinds import contracts
from adapterhub.kinds.method import BuildContext, Parts, Stage
from adapterhub.kinds.training import StepContext, TrainingContext
from adapterhub.training.parts import TrainingParts


class StageModule(nn.Module):
    """The base stays outside the module tree: a checkpoint holds the adapter's tensors (and the objective's own) only, and
    they stay where their sites are."""

    accepts_loss_kwargs = False

    def __init__(self, setting: TrainingContext, made_of: TrainingParts, stage: Stage):
        super().__init__()
        self.__dict__.update(setting=setting, stage=stage, made_of=made_of, step=0)
        self.objective, self.recipes, self.schedule = made_of.objective(), made_of.recipes(), made_of.schedule()
        self.kept_as_built: set[str] = set()

    # --- before the first step ---------------------------------------------------------------------------------

    def start(self, parts: Parts, given: BuildContext, stored: Collection[str] | None = None) -> Parts:
        """What the parameter schedule makes of what the stage built. stored: the sites where an adapter that goes on has
        tensors, which it keeps as they are."""
        started = self.schedule.start(parts, given) if stored is None else parts
        self.kept_as_built = {path for path, part in started.items() if parts.get(path) is part} - set(stored or ())
        return started

    def prepare(self) -> None:
        """Find the tensors on the model, and what the parts need."""
        for part in (self.objective, *self.recipes):
            part.prepare(self.setting)
        trained = self.setting.model.trainable_tensors()
        for name, parameter in {**trained, **self.objective.parameters()}.items():
            self.register_parameter(name.replace(".", "/"), parameter)  # torch allows no dot in a parameter's name
        sites = {site.path: site for site in self.setting.model.sites}
        tensors = {name: sites[name.rsplit(".", 3)[0]] for name in trained}
        self.rates: list[Mapping[str, float]] = []
        for number in range(contracts.number(self.schedule, "rounds")):
            draw = random.Random(seeded(self.setting.seed, "round", number))
            self.rates.append(self.schedule.rates(tensors, number, draw))
            if not any(self.rates[-1].values()):
                raise UsageError(f"round {number + 1} of the schedule trains nothing", "check its options")

    def optimizer(self, lr: float, warmup: int) -> tuple[AdamW, LambdaLR]:
        """AdamW without weight decay, and rates that rise over `warmup` steps and fall linearly to 0, each tensor's times
        its own of the round."""
        steps = self.setting.steps
        groups = {(1.0,) * len(self.rates): {}}  # first, if empty: what is told as the rate is the first group's
        for name, parameter in self.named_parameters():
            name = name.replace("/", ".")
            groups.setdefault(tuple(rates.get(name, 1.0) for rates in self.rates), {})[name] = parameter
        named = [{"params": list(group.values()), "names": list(group)} for group in groups.values()]
        optimizer = AdamW(named, lr=lr, weight_decay=0.0, fused=True)
        optimizer.register_load_state_dict_pre_hook(_check_memory)
        self.__dict__["optimizing"] = optimizer

        def linear(step: int) -> float:
            return step / max(1, warmup) if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))

        def rate(factors: tuple[float, ...]):
            return lambda step: linear(step) * factors[self.round_of(min(step, steps - 1))]

        return optimizer, LambdaLR(optimizer, [rate(factors) for factors in groups])

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """Take up the tensors of a checkpoint. Raises IntegrityError unless they are this training's by name and shape,
        strict or not: transformers' Trainer would leave out what does not fit."""
        kept, own = ({name: t.shape for name, t in held.items()} for held in (state_dict, self.state_dict()))
        if unlike := sorted(name for name in kept.keys() | own.keys() if kept.get(name) != own.get(name)):
            _refuse(unlike[0].replace("/", "."))
        return super().load_state_dict(state_dict, assign=assign)

    def round_of(self, step: int) -> int:
        return step * len(self.rates) // self.setting.steps

    # --- at each step ------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Freeze and free tensors as the round says; what is frozen loses the optimiser's memory."""
        self.__dict__["step"] = step
        if self.made_of.chosen_schedule is None:
            return
        number = self.round_of(step)
        for name, parameter in self.named_parameters():
            trains = self.rates[number].get(name.replace("/", "."), 1.0) > 0
            parameter.requires_grad_(trains)
            if not trains:
                self.optimizing.state.pop(parameter, None)

    def moment(self, name: str) -> StepContext:
        draw = torch.Generator().manual_seed(seeded(self.setting.seed, self.stage.name, name, self.step))
        return StepContext(self.step, self.setting.steps, draw)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """{"loss": ()} of a batch of `collate`: the objective's, the recipes' terms, and the stage's penalty."""
        moments = [self.moment(f"recipe {n}") for n in range(len(self.recipes))]
        for recipe, moment in zip(self.recipes, moments, strict=True):
            batch = recipe.batch(batch, moment)
        with ExitStack() as around:
            for recipe, moment in zip(self.recipes, moments, strict=True):
                around.enter_context(contracts.around(recipe, moment))
            loss = self.objective.loss(batch, self.moment("objective"))
        for recipe, moment in zip(self.recipes, moments, strict=True):
            if (term := recipe.term(batch, moment)) is not None:
                loss = loss + term
        if self.stage.penalty is not None:
            loss = loss + self.stage.penalty(self.parts())
        return {"loss": loss}

    def after_step(self) -> None:
        if self.stage.after_step is not None:
            self.stage.after_step(self.parts())

    def parts(self) -> Parts:
        """What trains, one modification a site."""
        return {path: part for path, [part] in self.setting.model.new_modifications().items()}

    # --- after the last ----------------------------------------------------------------------------------------

    @property
    def untouched(self) -> set[str]:
        """The sites where nothing has ever trained and the schedule changed nothing."""
        trained = {name.rsplit(".", 3)[0] for rates in self.rates for name, rate in rates.items() if rate}
        return self.kept_as_built - trained

    def found(self) -> dict[str, Any]:
        """What the recipe of the manifest shall say."""
        found: dict[str, Any] = {}
        if told := dict(self.objective.found()):
            found["objective"] = told
        if self.made_of.chosen_schedule is not None:
            found["rates"] = [_by_rate(rates) for rates in self.rates]
        return found

    def train(self, mode: bool = True) -> StageModule:
        self.setting.model.training_mode(mode)
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> StageModule:
        return self


def _check_memory(optimizer: AdamW, state: Mapping[str, Any]) -> None:
    """Before an optimiser loads a checkpoint, which torch does by position: raise IntegrityError unless the same tensors,
    by name and shape, stand there."""
    for own, kept in zip_longest(optimizer.param_groups, state["param_groups"], fillvalue={}):
        for name, other in zip_longest(own.get("names", ()), kept.get("names", ())):
            if name != other:
                _refuse(name or other)
    named = [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
    for number, (name, parameter) in enumerate(named):
        memory = state["state"].get(number, {}).values()
        if any(tensor.ndim and tensor.shape != parameter.shape for tensor in memory):
            _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise IntegrityError(
        f"the checkpoint does not fit this training: {name} differs in name, shape or place",
        "begin anew: --no-resume",
    )


def _by_rate(rates: Mapping[str, float]) -> dict[str, list[str]]:
    """{rate: the sites whose tensors have it}, of those that train."""
    told: dict[str, list[str]] = {}
    for name, rate in rates.items():
        if rate and (site := name.rsplit(".", 3)[0]) not in (here := told.setdefault(f"{rate:.6g}", [])):
            here.append(site)
    return told
