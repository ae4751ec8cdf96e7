"""The laws of objectives, recipes, parameter schedules and verifiers. Each takes a part's class and raises AssertionError
with the reason.

They run with the part's example options on the tiny Llama: a LoRA, unless a law says otherwise."""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from adapterhub import plugins
from adapterhub.adapters.names import named_tensors
from adapterhub.data import Data, Row
from adapterhub.data.encoding import Example, grouped
from adapterhub.data.seeds import seeded
from adapterhub.errors import HubError
from adapterhub.kinds.contracts import make
from adapterhub.kinds.method import Method
from adapterhub.kinds.objective import Objective
from adapterhub.kinds.recipe import Recipe
from adapterhub.kinds.schedule import ParameterSchedule
from adapterhub.kinds.training import TrainingContext
from adapterhub.kinds.verifier import Verifier
from adapterhub.methods.bottleneck import BottleneckAdapter
from adapterhub.methods.full import Full
from adapterhub.methods.lora import LoRA
from adapterhub.runtime.model import Model
from adapterhub.testing.bed import tiny_llama, tiny_tokenizer
from adapterhub.testing.generators import untouched
from adapterhub.training.module import StageModule
from adapterhub.training.parts import ChosenPart, TrainingParts
from adapterhub.training.request import OBJECTIVE
from adapterhub.training.stages import attach, given, planned, run
from adapterhub.training.trainer import Schedule

STEPS = 12


@dataclass(frozen=True)
class _Tried(ChosenPart):
    """A part by its class, as the laws get it."""

    part: type | None = None

    def make(self) -> Any:
        return make(self.part, self.config)


def _made_of(part: type) -> TrainingParts:
    config = plugins.options(part.Config, dict(part.example))
    group = next(g for g, kind in KINDS.items() if issubclass(part, kind))
    tried = _Tried(group, part.__name__, config, part)
    plain = ChosenPart("objectives", OBJECTIVE, plugins.load("objectives", OBJECTIVE).Config())
    return TrainingParts(
        tried if group == "objectives" else plain,
        (tried,) if group == "recipes" else (),
        tried if group == "schedules" else None,
    )


def _examples(together: bool = False) -> list[Example]:
    """Eight prompts of two answers each, one better than the other; together: as rows of several answers."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for row in range(8):
        prompt = torch.randint(3, 96, (3 + row % 4,), generator=draw).tolist()
        for reward in (1.0, -1.0):
            answer = torch.randint(3, 96, (3,), generator=draw).tolist()
            group = row if together else len(made)
            made.append(Example(row + 1, (*prompt, *answer), len(prompt), reward, group))
    return made


def _setting(part: type, device: str) -> TrainingContext:
    model = Model(tiny_llama().to(device).requires_grad_(False), tiny_tokenizer())
    examples = _examples()
    if issubclass(part, Objective) and "scored" in part.kinds:
        examples = grouped(_examples(together=True))
    setting = TrainingContext(
        model, examples, 0, batch_size=4, steps=STEPS, extras=defaultdict(_examples, other=_examples())
    )
    if issubclass(part, Recipe):
        setting = replace(setting, examples=_made_of(part).recipes()[0].examples(examples, setting))
    return setting


def _trained(
    part: type, folder: Path, device: str, method: Method | None = None, stop: bool = False
) -> tuple[dict[str, Tensor], TrainingContext]:
    """The tensors of a trained adapter by name, and where it was trained. stop: as a kill at two thirds leaves it."""
    method = method or LoRA()
    setting, made_of = _setting(part, device), _made_of(part)
    whole = Schedule(STEPS, 4, 1e-2, 0, 0, False)
    plan = planned(method.stages(method.Config()), whole, 0, {}, {})
    run(plan, setting, made_of, folder, folder / "stages", STEPS // 3, "law")
    if stop:
        shutil.rmtree(folder / "train" / f"checkpoint-{STEPS}")
    return {n: t.detach().clone() for n, t in named_tensors(setting.model.new_modifications()).items()}, setting


def resume(part: type, device: str) -> None:
    """Stopped and started again is never stopped, bit by bit."""
    with TemporaryDirectory() as folder:
        whole, _ = _trained(part, Path(folder), device)
    with TemporaryDirectory() as folder:
        _trained(part, Path(folder), device, stop=True)
        again, _ = _trained(part, Path(folder), device)
    unlike = [name for name in whole.keys() | again.keys() if not torch.equal(whole[name], again[name])]
    assert not unlike, f"other values after a resumed run: {unlike[:3]}"


def base(part: type, device: str) -> None:
    """The base is left as it was, bit by bit."""
    before = tiny_llama().state_dict()
    with TemporaryDirectory() as folder:
        _, setting = _trained(part, Path(folder), device)
    after = setting.model.base.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name].cpu())]
    assert not changed, f"training changed the base: {changed[:3]}"


def moves(part: type, device: str) -> None:
    """Training under it moves the adapter from where it started."""
    with TemporaryDirectory() as folder:
        made, setting = _trained(part, Path(folder), device)
    torch.manual_seed(0)
    fresh = named_tensors({path: [one] for path, one in LoRA().build(setting.model.sites, LoRA.Config()).items()})
    assert any(not torch.equal(made[name].cpu(), fresh[name]) for name in made), "nothing moved"


def _learner(part: type, device: str) -> StageModule:
    """Prepared, a LoRA on the model."""
    setting = _setting(part, device)
    stage = LoRA().stages(LoRA.Config())[0]
    learner = StageModule(setting, _made_of(part), stage)
    attach(setting.model, stage, given(setting.model, {}), 0)
    learner.prepare()
    return learner


def loss(part: type, device: str) -> None:
    """The loss is one finite number, the same again for the same step, and its gradient reaches the adapter."""
    learner = _learner(part, device)
    batch = learner.setting.batch(learner.setting.examples[:4])
    values = []
    for _ in range(2):
        learner.begin(0)
        value = learner(**batch)["loss"]
        assert value.ndim == 0 and value.isfinite(), f"the loss is {value}"
        values.append(value.item())
        learner.objective, learner.recipes = learner.made_of.objective(), learner.made_of.recipes()
        for one in (learner.objective, *learner.recipes):
            one.prepare(learner.setting)
    assert values[0] == values[1], f"{values[0]}, and {values[1]} the second time"
    value.backward()
    trained = learner.setting.model.trainable_parameters()
    assert any(t.grad is not None and t.grad.any() for t in trained), "no gradient reaches the adapter"


def rates(part: type[ParameterSchedule], device: str) -> None:
    """Every tensor gets a rate of at least 0 in each round, the same again for the same seed; what is frozen in all rounds
    stays, what is not moves; with any method."""
    for method in (LoRA(), BottleneckAdapter(), Full()):
        with TemporaryDirectory() as folder:
            made, setting = _trained(part, Path(folder), device, method)
        torch.manual_seed(0)
        built = method.build(setting.model.sites, method.Config())
        fresh = named_tensors({path: [one] for path, one in built.items()})
        sites = {site.path: site for site in setting.model.sites}
        constant = {f"{path}.{one.form}.0.{key}" for path, one in built.items() for key in one.constants}
        names = {name: sites[name.rsplit(".", 3)[0]] for name in fresh if name not in constant}
        drawn = []
        for number in range(_made_of(part).schedule().rounds):
            draws = (random.Random(seeded(0, "round", number)) for _ in range(2))
            first, second = (dict(_made_of(part).schedule().rates(names, number, draw)) for draw in draws)
            assert first == second, "two draws of one seed differ"
            assert first.keys() == names.keys(), f"round {number} gives no rate to {min(names.keys() ^ first.keys())}"
            wrong = [f"{name}: {rate}" for name, rate in first.items() if not 0 <= rate < float("inf")]
            assert not wrong, f"round {number} gives rates that are none: {wrong[0]}"
            drawn.append(first)
        for name in names:
            stays = name not in made or torch.equal(made[name].cpu(), fresh[name])
            frozen = not any(rates[name] for rates in drawn)
            assert stays == frozen, f"{name} is frozen and has moved" if frozen else f"{name} trains and has not moved"


def verdicts(part: type[Verifier], device: str) -> None:
    """The reference itself is right, nonsense is worth less, an empty answer no error."""
    verifier = make(part, plugins.options(part.Config, dict(part.example)))
    for reference in REFERENCES:
        right, wrong, empty = (verifier.verify("p", reference, answer) for answer in (reference, "\x00~", ""))
        assert right.right, f"{reference!r} against itself: {right}"
        assert not wrong.right and not empty.right, f"{reference!r}: {wrong}, {empty}"
        assert "\n" not in right.message + wrong.message + empty.message, "a message of several lines"


REFERENCES = ("42", "a=1; ans=8", "the answer is 3.5", "yes", "ärger = 7")


def twice(part: type[Verifier], device: str) -> None:
    """Asked again, in another order or of another object, it gives the same verdict."""
    config = plugins.options(part.Config, dict(part.example))
    asked = [(reference, answer) for reference in REFERENCES for answer in (reference, "\x00~", "", "yes", "42")]
    one, other = make(part, config), make(part, config)
    first = {texts: one.verify("p", *texts) for texts in asked}
    for texts in reversed(asked):
        for again in (one.verify("p", *texts), other.verify("p", *texts)):
            assert again == first[texts], f"{texts[1]!r} for {texts[0]!r} was {first[texts]}, and asked again {again}"


def rows(part: type[Recipe], device: str) -> None:
    """Two of its objects make the same of a file's rows and of examples, something, and leave what they get as it was."""
    config = plugins.options(part.Config, dict(part.example))
    for data in _files():
        before = deepcopy(data)
        try:
            first, again = part(config).rows(data), part(config).rows(data)
        except HubError:  # it does not read such rows
            continue
        assert first.rows, f"of {len(data.rows)} {data.kind!r} rows it leaves none"
        assert first.rows == again.rows, f"two of its objects make unlike rows of the same {data.kind!r} rows"
        assert data == before, f"it changed the {data.kind!r} rows in place"
    setting = _setting(LoRA, device)
    before = deepcopy(setting.examples)
    first, again = (list(part(config).examples(setting.examples, setting)) for _ in range(2))
    assert first, f"of {len(before)} examples it leaves none"
    assert first == again, "two of its objects make unlike examples of the same ones"
    assert list(setting.examples) == list(before), "it changed the examples in place"


def _files() -> list[Data]:
    """Eight rows of each kind."""
    texts = [(f"{n} + {n} =", f" {2 * n}") for n in range(8)]
    made = {
        "prompt": [Row(n, prompt=p, completion=c) for n, (p, c) in enumerate(texts, 1)],
        "text": [Row(n, completion=p + c) for n, (p, c) in enumerate(texts, 1)],
        "messages": [
            Row(n, messages=({"role": "user", "content": p}, {"role": "assistant", "content": c}))
            for n, (p, c) in enumerate(texts, 1)
        ],
        "scored": [Row(n, prompt=p, completions=(c, " 0"), rewards=(1.0, -1.0)) for n, (p, c) in enumerate(texts, 1)],
    }
    return [Data(Path("rows.jsonl"), "sha256:" + 64 * "0", kind, tuple(rows)) for kind, rows in made.items()]


def generators(part: type, device: str) -> None:
    """It leaves the global generators of python, numpy and torch alone; what a schedule starts from may draw from torch's."""
    if issubclass(part, Verifier):
        with untouched("verify"):
            make(part, plugins.options(part.Config, dict(part.example))).verify("p", "42", "41")
        return
    learner = _learner(part, device)
    setting, batch = learner.setting, learner.setting.batch(learner.setting.examples[:4])
    for one in (learner.objective, *learner.recipes):
        with untouched("prepare"):
            one.prepare(setting)
    for one in learner.recipes:
        with untouched("rows"):
            one.rows(_files()[0])
        with untouched("examples"):
            one.examples(_examples(), setting)
    with untouched("a step"):
        learner(**batch)
    names = {
        name: site for name, site in zip(learner.setting.model.trainable_tensors(), setting.model.sites, strict=False)
    }
    with untouched("rates"):
        learner.schedule.rates(names, 0, random.Random(0))
    with untouched("start", "torch"):
        learner.schedule.start(learner.parts(), given(setting.model, {}))


KINDS: Mapping[str, type] = {
    "objectives": Objective, "recipes": Recipe, "schedules": ParameterSchedule, "verifiers": Verifier
}  # fmt: skip
LAWS: Mapping[str, tuple[Callable, ...]] = {
    "objectives": (loss, moves, resume, base, generators),
    "recipes": (rows, loss, moves, resume, base, generators),
    "schedules": (rates, moves, resume, base, generators),
    "verifiers": (verdicts, twice, generators),
}
