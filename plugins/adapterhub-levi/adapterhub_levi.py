"""LEVI: the base's layers and a small model trained from scratch, ensembled layer by layer (Roh et al., "LEVI: Generalizable
Fine-tuning via Layer-wise Ensemble of Different Views", ICML 2024). One form, `levi`, and one method, `levi`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, relu, rms_norm

from adapterhub import Method, Modification, Site, Step
from adapterhub.errors import BatchError, IncompatibleBase, UsageError
from adapterhub.sites import Tap, select

EPSILON = 1e-6
"""Of the norms of both views."""


class LayerEnsemble(Modification):
    """Δy = Σₗ wₗ Hₗ relu(Aₗ [fₗ; g] + aₗ), less y where it replaces the base's own prediction.

    fₗ: what layer l put out at the same token, after all adapters there, divided by its root mean square. g: a small network of
    its own over the token ids: h = E[id], then for each of its levels h + relu(Σₖ Kₖ h at the k-th of the tokens it sees + c), at
    last divided by its root mean square. It sees the last tokens, itself included; in a base that is not causal those around
    it. Where the head is given one vector a row (a pooled one), fₗ and g are means over the row's tokens.

    Tensors: layers (L,) int64; replace, causal () uint8; down A (L, r, inputs + width); bias a (L, r); head H (L, outputs, r);
    weights (L,), of which w is the softmax (without: 1/L each); and, unless it is without g: table E (vocabulary, width),
    kernel K (levels, tokens, width, width), offset c (levels, width)."""

    form = "levi"
    stores = ("layers", "replace", "causal", "down", "bias", "head", "weights", "table", "kernel", "offset")
    optional = frozenset({"weights", "table", "kernel", "offset"})
    constants = frozenset({"layers", "replace", "causal"})

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self.views = tuple(Tap("block", layer) for layer in self.layers.tolist())
        own = (Tap("embedding", into=True),) if "table" in tensors else ()
        self.taps = self.views + own
        self.replaces, self.looks_back = bool(self.replace), bool(self.causal)
        self.additive = not self.replaces
        self.stateful = bool(own) and self.looks_back

    def check(self, site: Site) -> None:
        if site.role != "head":
            raise IncompatibleBase(f"LEVI sits at a head, and this is {site.role or 'none'}", "use the base's head")
        tensors, count, rank = self.tensors, len(self.layers), self.down.shape[1]
        network = not tensors.keys().isdisjoint(("table", "kernel", "offset"))
        width = self.table.shape[1] if network else 0
        want = {"down": (count, rank, site.inputs + width), "bias": (count, rank), "head": (count, site.outputs, rank)}
        want |= {"layers": (count,), "replace": (), "causal": ()}
        if "weights" in tensors:
            want["weights"] = (count,)
        if network:
            levels, size = self.kernel.shape[:2]
            want |= {"kernel": (levels, max(size, 1), width, width), "offset": (levels, width)}
        shapes = {name: tuple(tensors[name].shape) for name in want}
        if shapes != want:
            raise IncompatibleBase(
                f"LEVI's tensors {shapes} do not fit a head of {site.inputs} inputs and {site.outputs} outputs",
                "use the base that the adapter was made for",
            )
        if site.causal and not self.looks_back:
            raise IncompatibleBase("its g reads later tokens, which are hidden here", "use an encoder")

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        views = [_at(x, rms_norm(step.tap(tap).to(x), (x.shape[-1],), eps=EPSILON), step.mask) for tap in self.views]
        if "table" in self.tensors:
            own = _at(x, self._own_view(step), step.mask)
            views = [torch.cat([view, own], -1) for view in views]
        adapted = relu(torch.einsum("...lc,lrc->...lr", torch.stack(views, -2), self.down) + self.bias)
        weights = self.weights.softmax(0) if "weights" in self.tensors else x.new_full((len(views),), 1 / len(views))
        made = torch.einsum("...lr,lor->...o", adapted * weights[:, None], self.head)
        return made - y if self.replaces else made

    def _own_view(self, step: Step) -> Tensor:
        """g, (rows, tokens, width), from the ids of this pass and, in cached decoding, the state of those before."""
        ids = step.tap(self.taps[-1]).to(self.table.device)
        if (largest := int(ids.max())) >= len(self.table):
            raise BatchError(
                f"LEVI's table has {len(self.table)} tokens, and token {largest} is not among them",
                "use the base that the adapter was made for, and its tokenizer",
            )
        h = embedding(ids, self.table)
        for level, (kernel, offset) in enumerate(zip(self.kernel, self.offset, strict=True)):
            size = len(kernel)
            seen = step.child(level).window(h, size) if self.looks_back else _around(h, step.mask, size)
            h = h + relu(torch.einsum("rtkc,kcd->rtd", seen, kernel) + offset)
        return rms_norm(h, h.shape[-1:], eps=EPSILON)

    @classmethod
    def fresh(cls, site: Site, layers: Sequence[int], vocabulary: int, config: LEVI.Config) -> LayerEnsemble:
        """One at this head, whose last projection is zero; vocabulary 0: without g."""
        count, width = len(layers), config.width if vocabulary else 0
        tensors = {
            "layers": torch.tensor(layers),
            "replace": torch.tensor(config.mode == "replace", dtype=torch.uint8),
            "causal": torch.tensor(site.causal, dtype=torch.uint8),
            "down": torch.randn(count, config.r, site.inputs + width) * (site.inputs + width) ** -0.5,
            "bias": torch.zeros(count, config.r),
            "head": torch.zeros(count, site.outputs, config.r),
        }
        if config.average == "learned":
            tensors["weights"] = torch.zeros(count)
        if vocabulary:
            shape = (config.depth, config.kernel, width, width)
            tensors["table"] = torch.randn(vocabulary, width)
            tensors["kernel"] = torch.randn(shape) * (2 / prod(shape[1:3])) ** 0.5
            tensors["offset"] = torch.zeros(config.depth, width)
        return cls(**tensors)

    @classmethod
    def random(cls, site: Site) -> LayerEnsemble | None:
        """Of a causal language model's head, whose outputs are the vocabulary."""
        if site.role != "head" or not site.causal:
            return None
        config = LEVI.Config(width=6, kernel=4, depth=2, r=5, average="learned")
        made = cls.fresh(site, (0, 1), site.outputs, config)
        for name in ("bias", "head", "weights", "offset"):
            made.tensors[name] = 0.5 * torch.randn(made.tensors[name].shape)
        return made


def _at(x: Tensor, view: Tensor, mask: Tensor | None) -> Tensor:
    """A view (rows, tokens, width) where the head computes: at the last tokens, as many as x has (`logits_to_keep`), or,
    for an x of (rows, inputs), its mean over the row's real tokens."""
    if x.ndim == 3:
        return view[:, view.shape[1] - x.shape[1] :]
    if mask is None:
        return view.mean(1)
    return view.where(mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)


def _around(h: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """The `size` tokens around each, (rows, tokens, size, width): of an even number one more before it than after it. Zeros stand
    outside of the sequence, where it is padded too."""
    if mask is not None:
        h = h.where(mask[..., None], 0)
    return pad(h, (0, 0, size // 2, (size - 1) // 2)).unfold(1, size, 1).mT


class LEVI(Method):
    """A small model trained from scratch, and heads over it and several layers of the frozen base, whose predictions are
    averaged."""

    @dataclass(frozen=True)
    class Config:
        layers: tuple[int, ...] | None = None
        """Which layers vote, counted from 0; None: three, evenly spaced, the last among them."""
        g: bool = True
        """With the small model of its own; false: the layers of the base alone, to compare with."""
        width: int = 64
        """Of the small model."""
        kernel: int = 8
        """How many tokens each of its levels sees."""
        depth: int = 1
        """How many levels it has."""
        r: int = 16
        """Rank of the adapting layers."""
        average: str = "mean"
        """mean, or learned: convex weights of the layers' predictions that train too."""
        mode: str = "residual"
        """residual: added to the base's prediction, so that a fresh one changes nothing. replace: in its place, as in the
        paper, for a head that classifies."""

        def __post_init__(self) -> None:
            if min(self.width, self.kernel, self.depth, self.r) < 1:
                raise UsageError("LEVI needs width, kernel, depth and r of 1 or more", "for example --set r=16")
            if self.average not in ("mean", "learned"):
                raise UsageError(f"unknown average {self.average!r}", "one of: mean, learned")
            if self.mode not in ("residual", "replace"):
                raise UsageError(f"unknown mode {self.mode!r}", "one of: residual, replace")

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, LayerEnsemble]:
        site, *others = select(sites, "head")
        known = [s.layer for s in sites if s.role == "block" and not s.part and s.outputs == site.inputs]
        if others or not known:
            raise UsageError(
                "LEVI needs a base of one stack of known layers, as wide as its one head, and this is another",
                "use a decoder or an encoder alone, of an architecture whose roles are known",
            )
        spread = [known[round((n + 1) * len(known) / 3) - 1] for n in range(3)]
        layers = sorted(set(spread if config.layers is None else config.layers))
        if not layers or not set(layers) <= set(known):
            raise UsageError(f"layers {layers} are not layers of this base", f"layers count from 0 to {max(known)}")
        vocabulary = next((s.inputs for s in sites if s.embedding and not s.part), 0) if config.g else 0
        if config.g and not vocabulary:
            raise UsageError("this base reads no token ids, from which g would learn", "leave it out: --set g=false")
        return {site.path: LayerEnsemble.fresh(site, layers, vocabulary, config)}
