"""The laws of methods. Each takes a method's class and raises AssertionError, or Declined, with the reason.

They run with the method's default options on the tiny Llama, which suits any method that picks its sites by role.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from adapterhub.adapter import forms_of, modifications_of
from adapterhub.encoding import Example
from adapterhub.method import Method
from adapterhub.modification import named_tensors
from adapterhub.runtime import Model
from adapterhub.testing.bed import distance, tiny_llama
from adapterhub.testing.forms import Declined
from adapterhub.trainer import Schedule, fit

STEPS = 24
RATES = (1e-2, 1e-1)
"""Learning rates. What starts near 1 (a gain) or shares the attention with tokens (a prefix) moves far in few steps only
at the second."""


def _fresh(method: type[Method], device: str) -> Model:
    """The tiny Llama with a new adapter of the method on it."""
    base = tiny_llama().to(device).requires_grad_(False)
    model = Model(base)
    torch.manual_seed(3)
    model.attach_new(method().build(model.sites, method.Config()))
    return model


def _examples() -> list[Example]:
    """Twelve rows to learn by heart: a prompt of 3 to 8 tokens, an answer of 3."""
    generator = torch.Generator().manual_seed(5)
    lengths = [6 + i % 6 for i in range(12)]
    rows = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]
    return [Example(i, tuple(row), len(row) - 3) for i, row in enumerate(rows)]


def _train(method: type[Method], model: Model, folder: str, lr: float = RATES[0]) -> list[float]:
    """The losses of each step, the rows in shuffled batches of 4."""

    def after_step() -> None:
        method().after_step({path: part for path, [part] in model.new_modifications().items()})

    schedule = Schedule(STEPS, batch_size=4, lr=lr, warmup=0, seed=0, gradient_checkpointing=False)
    log = fit(model, _examples(), 0, schedule, Path(folder), STEPS // 3, after_step, method.__name__)
    return [entry["loss"] for entry in log]


@torch.no_grad()
def _logits(model: Model) -> torch.Tensor:
    ids = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(7)).to(model.device)
    return model(input_ids=ids).logits


def start(method: type[Method], device: str) -> None:
    """A fresh adapter changes nothing."""
    if not method.starts_at_base:
        raise Declined("it says that a fresh adapter changes the base (starts_at_base)")
    model = _fresh(method, device)
    with torch.no_grad():
        apart = distance(_logits(model), _logits(Model(tiny_llama().to(device))))
    assert apart <= 1e-5, f"a fresh adapter moves the logits by {apart:.1e} of the largest"


def learn(method: type[Method], device: str) -> None:
    """A few passes over twelve rows lower their loss, at one of two learning rates."""
    for lr in RATES:
        with TemporaryDirectory() as folder:
            losses = _train(method, _fresh(method, device), folder, lr)
        first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        if last < 0.9 * first:
            return
    raise AssertionError(f"the loss went from {first:.3f} to {last:.3f} in {STEPS} steps")


def gradients(method: type[Method], device: str) -> None:
    """Every tensor it trains is reached by the loss, and the base is left as it was, bit by bit."""
    model = _fresh(method, device)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    parameters = model.trainable_tensors()
    assert parameters, "it made nothing to train"
    model(input_ids=torch.tensor([[5, 6, 7, 8]], device=model.device)).logits.square().mean().backward()
    unreached = [name for name, parameter in parameters.items() if parameter.grad is None]
    assert not unreached, f"no gradient reaches {unreached[:3]}"
    with TemporaryDirectory() as folder:
        _train(method, model, folder)
    changed = [name for name, tensor in model.base.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed, f"training changed the base: {changed[:3]}"


def resume(method: type[Method], device: str) -> None:
    """Stopped and started again is never stopped, bit by bit."""
    whole = _fresh(method, device)
    with TemporaryDirectory() as folder:
        _train(method, whole, folder)
        shutil.rmtree(Path(folder) / f"checkpoint-{STEPS}")  # the one before it, at two thirds, is still there
        again = _fresh(method, device)
        _train(method, again, folder)
    ours, theirs = named_tensors(whole.new_modifications()), named_tensors(again.new_modifications())
    unlike = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not unlike, f"other values after a resumed run: {unlike[:3]}"


def save(method: type[Method], device: str) -> None:
    """Its tensors by their stored names make the same adapter again, without the method."""
    model = _fresh(method, device)
    with TemporaryDirectory() as folder:
        _train(method, model, folder)
    parts = model.new_modifications()
    again = modifications_of({name: tensor.detach().cpu() for name, tensor in named_tensors(parts).items()})
    assert forms_of(again) == forms_of(parts), "its forms do not come back from the stored names"
    loaded = Model(tiny_llama().to(device).requires_grad_(False))
    loaded.attach_new(again)
    apart = distance(_logits(loaded), _logits(model))
    assert apart <= 1e-6, f"the stored adapter is {apart:.1e} of the largest logit away from the trained one"


LAWS = (start, learn, gradients, resume, save)
