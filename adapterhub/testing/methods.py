"""The laws of methods. Each takes a method's class and raises AssertionError, or Declined, with the reason; what the
method itself refuses comes through.

They run with the method's default options on the tiny Llama (or BERT), which suits any method that picks its sites by role.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch

from adapterhub import plugins
from adapterhub.adapters.adapter import forms_of, modifications_of
from adapterhub.adapters.names import named_tensors
from adapterhub.data.encoding import Example
from adapterhub.errors import UsageError
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.contracts import make
from adapterhub.kinds.method import Method
from adapterhub.kinds.modification import Modifications
from adapterhub.kinds.training import TrainingContext
from adapterhub.runtime.model import Model
from adapterhub.runtime.plan import gated
from adapterhub.testing.bed import distance, random_adapter, tiny_for, tiny_llama
from adapterhub.testing.forms import Declined
from adapterhub.testing.generators import watched
from adapterhub.training.parts import training_parts
from adapterhub.training.stages import Planned, attach, given, measure, planned, run, trained
from adapterhub.training.starting_point import gating
from adapterhub.training.trainer import Schedule
from adapterhub.training.watched import staged

STEPS = 24
"""Of each stage."""
RATES = (1e-2, 1e-1, 1.0)
"""Learning rates. What starts near 1 (a gain) or shares the attention with tokens (a prefix) moves far in few steps only
at the second, and what is a few numbers (offsets of a head) at the third."""


def _plan(method: type[Method], lr: float = RATES[0], config: Any = None, steps: int = STEPS) -> list[Planned]:
    """Its stages (with default options where no config is given), of so many steps each."""
    config = method.Config() if config is None else config
    stages = staged(make(method), config)
    if method.weighs:
        stages = gating(stages, _children)
    told = msgspec.to_builtins(asdict(config))
    whole = Schedule(steps * len(stages), batch_size=4, lr=lr, warmup=0, seed=0, gradient_checkpointing=False)
    return planned([replace(stage, share=1.0) for stage in stages], whole, 0, told, {})


def _children() -> list[Modifications]:
    """Two random adapters, for a gate to weigh."""
    return [random_adapter(LowRank, tiny_llama(), seed) for seed in (1, 2)]


def _bare(method: type[Method], device: str) -> Model:
    return Model(tiny_for(method).to(device).requires_grad_(False))


def _fresh(method: type[Method], plan: Sequence[Planned], folder: Path, device: str) -> Model:
    """The tiny model with what the last stage of the plan begins with; those before are trained."""
    model = _bare(method, device)
    before = {}
    if len(plan) > 1:
        _train(plan[:-1], model, folder)
        before = trained(model)
    last = plan[-1].stage
    measured, _ = measure(last.measurement, setting_of(model), folder / "measured", {})
    attach(model, last, given(model, before, measured), 3)
    return model


def setting_of(model: Model) -> TrainingContext:
    """The twelve rows are the training data, and whatever extra data a method asks for."""
    return TrainingContext(model, _examples(), 0, batch_size=4, extras=defaultdict(_examples))


def _trained(method: type[Method], folder: Path, device: str) -> Model:
    """The tiny model with a trained adapter of the method on it."""
    model = _bare(method, device)
    _train(_plan(method), model, folder)
    return model


def _examples() -> list[Example]:
    """Twelve rows to learn by heart: a prompt of 3 to 8 tokens, an answer of 3."""
    generator = torch.Generator().manual_seed(5)
    lengths = [6 + i % 6 for i in range(12)]
    rows = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]
    return [Example(i, tuple(row), len(row) - 3) for i, row in enumerate(rows)]


def _train(plan: Sequence[Planned], model: Model, folder: Path) -> list[float]:
    """Train; the losses of the last stage's steps, the rows in shuffled batches of 4."""
    made_of, _ = training_parts(None, (), None, {})
    curve, _ = run(plan, setting_of(model), made_of, folder, folder / "stages", STEPS // 3, "law")
    return [entry["loss"] for entry in curve[-STEPS:]]


@torch.no_grad()
def _logits(model: Model) -> torch.Tensor:
    ids = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(7)).to(model.device)
    return model(input_ids=ids).logits


def start(method: type[Method], device: str) -> None:
    """A fresh adapter changes nothing."""
    if not method.starts_at_base:
        raise Declined("it says that a fresh adapter changes the base (starts_at_base)")
    with TemporaryDirectory() as folder:
        model = _fresh(method, _plan(method), Path(folder), device)
    with torch.no_grad():
        apart = distance(_logits(model), _logits(_bare(method, device)))
    assert apart <= 1e-5, f"a fresh adapter moves the logits by {apart:.1e} of the largest"


def learn(method: type[Method], device: str) -> None:
    """A few passes over twelve rows lower their loss, at one of three learning rates."""
    for lr in RATES:
        with TemporaryDirectory() as folder:
            losses = _train(_plan(method, lr), _bare(method, device), Path(folder))
        first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        if last < 0.9 * first:
            return
    raise AssertionError(f"the loss went from {first:.3f} to {last:.3f} in {STEPS} steps")


def gradients(method: type[Method], device: str) -> None:
    """Every tensor that each stage trains is reached by the loss, and the base is left as it was, bit by bit."""
    plan = _plan(method)
    for stages in range(1, len(plan) + 1):
        with TemporaryDirectory() as folder:
            model = _fresh(method, plan[:stages], Path(folder), device)
            before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
            model(input_ids=torch.tensor([[5, 6, 7, 8]], device=model.device)).logits.square().mean().backward()
            unreached = [name for name, parameter in model.trainable_tensors().items() if parameter.grad is None]
            assert not unreached, f"no gradient reaches {unreached[:3]}"
            _train(plan[:stages], model, Path(folder))
        changed = [name for name, tensor in model.base.state_dict().items() if not torch.equal(tensor, before[name])]
        assert not changed, f"training changed the base: {changed[:3]}"


def resume(method: type[Method], device: str) -> None:
    """Stopped in any of its stages and started again is never stopped, bit by bit."""
    plan = _plan(method)
    for part in plan:
        with TemporaryDirectory() as folder:
            whole = _trained(method, Path(folder), device)
        with TemporaryDirectory() as folder:
            stopped = plan[: plan.index(part) + 1]
            _train(stopped, _bare(method, device), Path(folder))
            # The checkpoint before it, at two thirds, is still there.
            shutil.rmtree(Path(folder) / part.stage.name / f"checkpoint-{STEPS}")
            again = _trained(method, Path(folder), device)
        ours, theirs = named_tensors(whole.new_modifications()), named_tensors(again.new_modifications())
        unlike = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not unlike, f"other values after a resumed run: {unlike[:3]}"


def save(method: type[Method], device: str) -> None:
    """Its tensors by their stored names make the same adapter again, without the method."""
    with TemporaryDirectory() as folder:
        model = _trained(method, Path(folder), device)
    parts = model.new_modifications()
    again = modifications_of({name: tensor.detach().cpu() for name, tensor in named_tensors(parts).items()})
    assert forms_of(again) == forms_of(parts), "its forms do not come back from the stored names"
    loaded = _bare(method, device)
    loaded.attach_new(gated(again, _children(), "the stored gate") if method.weighs else again)
    apart = distance(_logits(loaded), _logits(model))
    assert apart <= 1e-6, f"the stored adapter is {apart:.1e} of the largest logit away from the trained one"


def kept(method: type[Method], device: str) -> None:
    """A stage, or a measurement, that another run left behind is taken only by one that would make the same: each option
    varied by itself, a run beside what the default options left ends as one in a fresh hub."""
    usual = _plan(method, steps=2)
    if len(usual) == 1 and usual[0].stage.measurement is None:
        return  # it leaves nothing behind
    with TemporaryDirectory() as shared:
        _outcome(method, usual, Path(shared), device)
        for name, value in _variations(method.Config()):
            try:
                varied = _plan(method, config=plugins.options(method.Config, {name: value}), steps=2)
                with TemporaryDirectory() as folder:
                    fresh = _outcome(method, varied, Path(folder), device)
            except UsageError:  # it does not go with the others
                continue
            beside = _outcome(method, varied, Path(shared), device)
            unlike = [
                n for n in fresh.keys() | beside.keys() if n not in fresh or not torch.equal(fresh[n], beside.get(n))
            ]
            assert not unlike, (
                f"with {name}={value!r} it takes what the default options left, and {min(unlike)} is another: "
                "the options of a stage or a measurement must name all that it reads"
            )


def _outcome(method: type[Method], plan: Sequence[Planned], folder: Path, device: str) -> dict[str, torch.Tensor]:
    """What training ends with, beside what is kept in the folder."""
    model = _bare(method, device)
    made_of, _ = training_parts(None, (), None, {})
    with TemporaryDirectory() as checkpoints:
        run(plan, setting_of(model), made_of, Path(checkpoints), folder / "stages", None, "law")
    return {name: tensor.detach().cpu() for name, tensor in named_tensors(model.new_modifications()).items()}


def _variations(config: Any) -> Iterator[tuple[str, Any]]:
    """Another value of each option that is a number, a switch, one of some words, or left out."""
    for field in msgspec.inspect.type_info(type(config)).fields:
        usual = getattr(config, field.name)
        match usual:
            case bool():
                yield field.name, not usual
            case int():
                yield field.name, usual + 1
            case float():
                yield field.name, usual / 2 or 0.5
            case None:
                yield field.name, 2
            case str() if isinstance(field.type, msgspec.inspect.LiteralType):
                yield from ((field.name, other) for other in field.type.values if other != usual)


def generators(method: type[Method], device: str) -> None:
    """Its hooks leave the global generators of python and numpy alone. torch's is theirs: it is seeded before `build`."""
    plan = []
    for part in _plan(method, steps=2):
        hooks = {name: getattr(part.stage, name) for name in ("build", "penalty", "after_step", "note", "finish")}
        behind = {name: watched(name, function, "torch") for name, function in hooks.items()}
        plan.append(replace(part, stage=replace(part.stage, **behind)))
    with TemporaryDirectory() as folder:
        _train(plan, _bare(method, device), Path(folder))


LAWS = (start, learn, gradients, resume, save, kept, generators)
