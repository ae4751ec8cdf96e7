"""The central abstraction: a modification is what one adapter does to the hidden states at one site.

Every modification returns changes, which are added to what goes into the site, to what comes out, or to its weight
(He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022). So scaling, mixing and stacking
are exact for every form, and nothing needs to know which form it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from adapterhub.errors import BatchError, NotFoldable
from adapterhub.kinds.lanes import BARE, Lane
from adapterhub.kinds.weight_change import NOTHING, Change, Entry, added
from adapterhub.sites import Site, Tap


@dataclass
class Step:
    """One forward pass as a modification sees it.

    mask      (rows, tokens) bool, True where a real token stands, or None when nothing is padded
    state     private to this modification at this site for these rows; what is left here comes back with the next
              chunk of the same key-value cache. Empty at the start of a sequence. Tensors in it have rows first.
    training  True while a method trains (dropout)
    kept      what delta_in leaves for delta_out of the same forward pass
    tapped    the hidden states of the sites that modifications of this pass read, all rows; use `tap`
    rows      (n,) int64, which rows of the pass these are, or None: all of them
    """

    mask: Tensor | None = None
    state: dict = field(default_factory=dict)
    training: bool = False
    kept: dict = field(default_factory=dict)
    tapped: Callable[[Tap], Tensor] | None = None
    rows: Tensor | None = None

    def child(self, key: object, rows: Tensor | None = None) -> Step:
        """The part of this step that belongs to one member of a composition (and, in a Route, to some of the rows)."""
        mask = self.mask if rows is None or self.mask is None else self.mask[rows]
        among = self.rows if rows is None else rows if self.rows is None else self.rows[rows]
        state, kept = self.state.setdefault(key, {}), self.kept.setdefault(key, {})
        return Step(mask, state, self.training, kept, self.tapped, among)

    def tap(self, tap: Tap) -> Tensor:
        """What one of the modification's `taps` reads, (rows, tokens, width), of the tokens of this pass. Raises BatchError
        where that site has not run."""
        if self.tapped is None:
            raise BatchError(f"the states at {tap.role} are not known here", "run the whole model")
        states = self.tapped(tap)
        return states if self.rows is None else states[self.rows.to(states.device)]

    def window(self, x: Tensor, size: int) -> Tensor:
        """The last `size` real tokens at each token, itself the last: x (rows, tokens, width) -> (rows, tokens, size, width).

        For causal convolutions and the like: padding on either side is left out, zeros stand before the sequence begins,
        and the last size - 1 tokens stay in `state` for the next chunk. One window a step; another: step.child("other")."""
        before = self.state.get("window")
        before = x.new_zeros(len(x), size - 1, x.shape[2]) if before is None else before
        x = torch.cat([before, x], dim=1)
        if self.mask is None:
            self.state["window"] = x[:, x.shape[1] - size + 1 :]
            return x.unfold(1, size, 1).mT
        real = torch.cat([self.mask.new_ones(before.shape[:2]), self.mask], dim=1)
        rows = torch.arange(len(x), device=x.device)[:, None]
        x = x[rows, (~real).int().argsort(dim=1, stable=True)]  # the real tokens first, in their order
        ends = real.cumsum(1)[:, size - 1 :, None]  # how many of them stand up to each token
        places = ends + torch.arange(-size, 0, device=x.device)
        self.state["window"] = x[rows, places[:, -1, 1:]]
        return x[rows[:, :, None], places.clamp(min=0)]


class Modification:
    """What one adapter does to the hidden states at one site. Every default changes nothing.

    Light on purpose: named tensors that live elsewhere (a file, a pool, the trainer), not an nn.Module, so that
    loading the thousandth adapter costs what the first did. `self.up` reads the tensor `up`.
    Tensors arrive in the dtype and on the device of the hidden states; scalar constants are never narrowed (use `times`).
    """

    form: ClassVar[str]
    """The name of the form; tensors are stored as `<site path>.<form>.<n>.<tensor>`."""
    additive: bool = False
    """It only reads the site's input: then stacking, mixing and any order are the same sum."""
    stateful: bool = False
    """It leaves something in Step.state for the next chunk of a sequence."""
    stores: ClassVar[tuple[str, ...]] = ()
    """The names of its tensors; an adapter that lacks one, or brings another, is refused."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Those of them that may be left out."""
    constants: ClassVar[frozenset[str]] = frozenset()
    """Tensors that describe rather than learn (a scale); no method trains them."""
    folds: bool = False
    """It trains through the weight it changes (`delta_weight`), which is cheaper for it than a change of the output."""
    bidirectional: bool = False
    """It reads later tokens too, and refuses causal sites. Of a form that always does, the laws are tried on an encoder."""
    taps: tuple[Tap, ...] = ()
    """Other sites whose hidden states it reads, by `step.tap`."""
    advance: int = 0
    """How many positions the tokens of its rows move up (a prefix that was trained as tokens)."""

    def __init__(self, **tensors: Tensor):
        self.tensors: dict[str, Tensor] = tensors

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no tensor {name!r}") from None

    # --- what a form overrides ---------------------------------------------------------------------------------

    def check(self, site: Site) -> None:
        """Raise IncompatibleBase unless the tensors fit a site of these widths; warn (`warnings`) of waste."""

    def bind(self, weight: Tensor | None) -> None:
        """Meet the base's weight at the site, (outputs, inputs), once, before the first forward; never change it.
        None where the site is no matrix. A fresh modification may take its start from it (DoRA's magnitude)."""

    def delta_in(self, x: Tensor, step: Step) -> Tensor | None:
        """Δx, added to what goes into the site; x (rows, tokens, inputs). None: nothing."""
        return None

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor | None:
        """Δy, added to what comes out; y (rows, tokens, outputs). Read x to be parallel, y to be sequential."""
        return None

    def lanes(self) -> tuple[Lane, ...]:
        """What the attention at this site becomes: the sum of these lanes, whose weights add up to 1."""
        return BARE

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> Change:
        """(ΔW, Δb) that do the same to a linear site: weight (outputs, inputs), bias (outputs,).

        Differentiable. Raises NotFoldable when there is none."""
        raise NotFoldable(
            f"the form {self.form!r} is not a change of a weight",
            "run it attached, or compose instead of folding: adapterhub run 'a + b'",
        )

    def weight_in(self, weight: Tensor) -> Change:
        """What `delta_in` does to a matrix (n, inputs) that reads the site's input: weight (x + Δx) is
        (weight + ΔW) x + Δb. Raises NotFoldable."""
        if not self.changes_input:
            return NOTHING
        self._require_one_end()
        return self.delta_weight(weight, None)

    def weight_out(self, enter: Entry | None, weight: Tensor, bias: Tensor | None) -> Change:
        """What `delta_out` adds to a linear site that puts out weight x + bias so far. enter: what reading its own input
        means for x (None: it reads x itself). Raises NotFoldable."""
        if not self.changes_output:
            return NOTHING
        self._require_one_end()
        change = self.delta_weight(weight, bias)
        if enter is None:
            return change
        reads = change[0]  # what of it reads the input; the rest reads the output, which `weight` tells as it is
        if not self.additive:
            reads, _ = self.delta_weight(torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias))
        return change if reads is None else added(change, enter(reads))

    def _require_one_end(self) -> None:
        if self.changes_input and self.changes_output:
            raise NotFoldable(
                f"the form {self.form!r} changes its site's input and output at once: weighed, they are not known apart",
                "stack it at full weight: 'a + b', or run it attached",
            )

    def scaled(self, weight: float) -> Modification | None:
        """Return the same modification with its change multiplied by weight, or None: then its answers are multiplied."""
        return None

    @classmethod
    def join(cls, parts: Sequence[Modification]) -> Modification | None:
        """One modification of this form that does what these do one after another, or None if there is no such."""
        return None

    @classmethod
    def rows(cls, parts: Sequence[Modification | None]) -> Modification | None:
        """Return one modification for a batch whose row i gets parts[i] (None: unchanged), or None: then the distinct ones
        run one after another."""
        return None

    @classmethod
    def random(cls, site: Site) -> Modification | None:
        """One with random tensors that moves the hidden states visibly, or None if the form does not suit the site.

        The laws (`adapterhub plugins check`) are tried on these; random numbers from torch's global generator."""
        raise NotImplementedError(f"the form {cls.form!r} gives no random example for the laws")

    # --- what every form has -----------------------------------------------------------------------------------

    @property
    def changes_input(self) -> bool:
        """Whether delta_in can be anything but None."""
        return type(self).delta_in is not Modification.delta_in

    @property
    def changes_output(self) -> bool:
        """Whether delta_out can be anything but None."""
        return type(self).delta_out is not Modification.delta_out

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Modification:
        """A copy whose floating tensors have this dtype and device (scalar constants are never narrowed: see `times`);
        gradients flow through. Itself if nothing changes."""
        moved = {name: t.to(device, self._dtype(name, dtype)) for name, t in self.tensors.items()}
        if all(moved[name] is self.tensors[name] for name in moved):
            return self
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, tensors=moved)
        return copy

    def _dtype(self, name: str, wanted: torch.dtype | None) -> torch.dtype:
        own = self.tensors[name].dtype
        if wanted is None or not own.is_floating_point:
            return own
        scalar = name in self.constants and not self.tensors[name].ndim
        return torch.promote_types(own, wanted) if scalar else wanted


def times(scale: Tensor, values: Tensor) -> Tensor:
    """scale () times values in the wider of their dtypes, rounded once to the dtype of values: a scale held in float32
    does not become another one on a bfloat16 base."""
    return (scale.reshape(1) * values).to(values.dtype)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight (outputs, inputs) times x (..., inputs), plus bias. Token ids, as an embedding gets them, stand for one-hot
    rows: each picks its column of the weight."""
    if x.is_floating_point():
        return linear(x, weight, bias)
    picked = embedding(x, weight.mT)
    return picked if bias is None else picked + bias


Modifications = dict[str, list[Modification]]
"""{site path: what happens there, in order}."""
