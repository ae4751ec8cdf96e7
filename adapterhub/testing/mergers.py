"""The laws of mergers. Each takes a merger's class and raises AssertionError, or Declined, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

import torch
from torch import Tensor

from adapterhub import plugins
from adapterhub.errors import NotFoldable
from adapterhub.forms.composers import Stack
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.merger import Merger
from adapterhub.kinds.modification import Modification
from adapterhub.sites import Site
from adapterhub.testing.forms import Declined
from adapterhub.testing.generators import untouched
from adapterhub.transform.merge import merge_modifications

SITE = Site("model.layers.0.self_attn.q_proj", "query", 24, 40, True)
ROUNDING = 1e-5
"""Of the largest entry, in float32."""


def _deltas(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(SITE.outputs, 3) @ torch.randn(3, SITE.inputs) for _ in range(3)]


def _combine(merger: type[Merger], deltas: list[Tensor], weights: list[float]) -> Tensor:
    return merger().combine(deltas, weights, merger.Config())


def _same(got: Tensor, wanted: Tensor, what: str) -> None:
    error = float((got.double() - wanted.double()).abs().max() / wanted.abs().max())
    assert got.shape == wanted.shape and error <= ROUNDING, f"{what}: off by {error:.2g} of the largest entry"


def _adapters(seed: int) -> list[Modification]:
    """One of every built-in form that suits the site, random, bound to the base's weight; two scaled as LoRA (alpha / r) and as rsLoRA
    (alpha / sqrt r) scale."""
    torch.manual_seed(seed)
    down, up = torch.randn(8, SITE.inputs), torch.randn(SITE.outputs, 8)
    found: list[Modification] = [
        LowRank(down=down, up=up, scale=torch.tensor(scale)) for scale in (16 / 8, 16 / 8**0.5)
    ]
    ours = [name for name in plugins.names("forms") if plugins.distribution("forms", name).startswith("adapterhub ")]
    found += [m for form in ours if (m := plugins.load("forms", form).random(SITE)) is not None]
    for modification in found:
        modification.bind(_base(SITE.path)[0])
    return found


def _base(path: str) -> tuple[Tensor, Tensor]:
    """The base's weight and bias at the site."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(SITE.outputs, SITE.inputs, generator=generator)
    return weight, torch.randn(SITE.outputs, generator=generator)


def _changes(parts: Sequence[Modification]) -> tuple[Tensor, Tensor] | None:
    """(ΔW, Δb) in float64 by folding one after the other, zeros where there is none; None for what does not fold."""
    weight, bias = (tensor.double() for tensor in _base(SITE.path))
    try:
        changes = Stack([part.to(dtype=torch.float64) for part in parts]).delta_weight(weight, bias)
    except NotFoldable:
        return None
    like = zip(changes, (weight, bias), strict=True)
    return tuple(torch.zeros_like(base) if change is None else change for change, base in like)


def itself(merger: type[Merger], device: str) -> None:
    """One adapter at weight 1 comes out as itself: its dense change, and adapters of every form, bit for bit."""
    for delta in (*_deltas(), torch.randn(SITE.outputs)):
        _same(_combine(merger, [delta], [1.0]), delta, "one change at weight 1 is not itself")
    for modification in _adapters(1):
        if (change := _changes([modification])) is not None:
            delta = change[0].float()
            _same(_combine(merger, [delta], [1.0]), delta, f"one {modification.form} at weight 1 is not itself")
        merged = merge_modifications([{SITE.path: [modification]}], [1.0], merger(), merger.Config())
        ((part,),) = merged.modifications.values()
        same = part.form == modification.form and part.tensors.keys() == modification.tensors.keys()
        assert same and all(torch.equal(t, modification.tensors[k]) for k, t in part.tensors.items()), (
            f"one {modification.form} at weight 1 is not itself, bit for bit"
        )


def inputs_kept(merger: type[Merger], device: str) -> None:
    """The changes given are not altered; the result is finite, of their shape, the same each time; a missing change (zeros)
    and the change of a bias are taken too."""
    for deltas in (_deltas(), [*_deltas()[:1], torch.zeros(SITE.outputs, SITE.inputs)], [d[:, 0] for d in _deltas()]):
        before = [delta.clone() for delta in deltas]
        weights = [0.5, 1.0, 2.0][: len(deltas)]
        first, again = _combine(merger, deltas, weights), _combine(merger, deltas, weights)
        assert first.shape == deltas[0].shape, f"changes of {tuple(deltas[0].shape)} became {tuple(first.shape)}"
        assert first.isfinite().all(), "the result is not finite"
        assert torch.equal(first, again), "two merges of the same changes differ"
        assert all(map(torch.equal, deltas, before)), "combine altered what it was given"


def order(merger: type[Merger], device: str) -> None:
    """The order of the adapters does not matter, their weights going with them."""
    if not merger.symmetric:
        raise Declined("declares symmetric = False")
    deltas, weights = _deltas(), [1.0, 0.5, 0.25]
    wanted = _combine(merger, deltas, weights)
    for places in permutations(range(3)):
        got = _combine(merger, [deltas[i] for i in places], [weights[i] for i in places])
        _same(got, wanted, f"the order {places} gives another result")


def scaling(merger: type[Merger], device: str) -> None:
    """Changes c times as large merge to c times the result."""
    if not merger.homogeneous:
        raise Declined("declares homogeneous = False")
    deltas, weights = _deltas(), [1.0, 0.5, 0.25]
    wanted = _combine(merger, deltas, weights)
    for c in (4.0, 0.125):
        _same(_combine(merger, [c * delta for delta in deltas], weights), c * wanted, f"changes scaled by {c}")


def weighted_sum(merger: type[Merger], device: str) -> None:
    """A merger that declares itself linear is the weighted sum, which joining relies on: of dense changes, and of adapters of
    every two forms that fold."""
    if not merger.linear:
        raise Declined("declares linear = False")
    deltas, weights = _deltas(), [1.0, -0.5, 0.25]
    wanted = sum(weight * delta.double() for weight, delta in zip(weights, deltas, strict=True))
    _same(_combine(merger, deltas, weights), wanted, "not the weighted sum")
    folds = [[m for m in _adapters(seed) if _changes([m]) is not None] for seed in (1, 3)]
    for one, other in product(*folds):
        adapters, weights = [{SITE.path: [one]}, {SITE.path: [other]}], [1.0, -0.5]
        merged = merge_modifications(adapters, weights, merger(), merger.Config(), base=_base).modifications[SITE.path]
        for part in merged:
            part.bind(_base(SITE.path)[0])
        ones, others, got = _changes([one]), _changes([other]), _changes(merged)
        for kind, a, b, total in zip(("weight", "bias"), ones, others, got, strict=True):
            if (a - 0.5 * b).any():
                _same(total, a - 0.5 * b, f"the {kind} of {one.form} - 0.5*{other.form}")


def generators(merger: type[Merger], device: str) -> None:
    """It leaves the global generators of python, numpy and torch alone."""
    deltas = _deltas()
    with untouched("combine"):
        _combine(merger, deltas, [1.0, 0.5, 0.25])


LAWS = (itself, inputs_kept, order, scaling, weighted_sum, generators)
