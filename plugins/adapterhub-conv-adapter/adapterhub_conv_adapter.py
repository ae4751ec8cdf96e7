"""Adapters that mix tokens: the Conformer's convolution module as a bottleneck, and soft mixtures of bottlenecks.

Cappellazzo et al., "Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers" (MLSP 2024), and
Cappellazzo et al., "Efficient Fine-tuning of Audio Spectrogram Transformers via Soft Mixture of Adapters" (Interspeech
2024), after Puigcerver et al., "From Sparse to Soft Mixtures of Experts" (ICLR 2024). Methods `conv_adapter` and `soft_moa`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv1d, dropout, gelu, glu, layer_norm, linear, silu

from adapterhub import Method, Modification, Site, Step, times
from adapterhub.errors import BatchError, IncompatibleBase, UsageError
from adapterhub.sites import select

AT_HEAD = "it mixes the tokens of a sequence, and a head may see the last ones only"


class TokenMixer(Modification):
    """Reads the site's input (parallel) or its output, as a sequence. Of the tensors, parallel () is 1 or 0."""

    dropout: float = 0.0

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self.additive = bool(self.parallel)  # read once: asking a tensor on a GPU in every forward would wait for it

    def sequence(self, x: Tensor, y: Tensor) -> Tensor:
        """What it reads, (rows, tokens, width)."""
        h = x if self.additive else y
        if h.ndim != 3:
            raise BatchError(
                f"the form {self.form!r} mixes the tokens of a sequence, and one vector a row stands at one of its sites",
                "leave that site out (target_modules)",
            )
        return h

    def out(self, change: Tensor, step: Step) -> Tensor:
        if self.dropout and step.training:
            change = dropout(change, self.dropout)
        return times(self.scale, change)

    def require(self, shapes: Mapping[str, tuple[int, ...]], site: Site) -> None:
        """Raise IncompatibleBase unless the tensors have these shapes, the constants none, and a sequence stands there."""
        if site.role == "head":
            raise IncompatibleBase(AT_HEAD, "use it at the site that it was made for")
        shapes = {**shapes, **dict.fromkeys(self.constants, ())}
        wrong = {key: tuple(self.tensors[key].shape) for key in shapes if self.tensors[key].shape != shapes[key]}
        if wrong or (self.additive and site.embedding):
            raise IncompatibleBase(
                f"{self.form} tensors of shapes {wrong} do not fit a site of {site.inputs} to {site.outputs}",
                "use the base that the adapter was made for",
            )


class ConvBottleneck(TokenMixer):
    """Δy = s·(B silu(norm(k ∗ glu(A norm(h) + a) + c)) + b), k ∗ a convolution along the tokens, each channel by itself.

    norm, norm_bias (width,); down (2r, width), down_bias (2r,); kernel (r, size), kernel_bias (r,); inner, inner_bias
    (r,), the second norm's; up (outputs, r), up_bias (outputs,); scale (); and two integers (): parallel, and causal
    (1: the last tap of the kernel is the token itself; 0: the middle one is). Before and after the real tokens stand zeros."""

    form = "conv_bottleneck"
    stores = (
        "norm", "norm_bias", "down", "down_bias", "kernel", "kernel_bias", "inner", "inner_bias", "up", "up_bias",
        "scale", "parallel", "causal",
    )  # fmt: skip
    constants = frozenset({"scale", "parallel", "causal"})

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self.stateful = bool(self.causal)
        self.bidirectional = not self.stateful

    def check(self, site: Site) -> None:
        width, outputs = site.inputs if self.additive else site.outputs, site.outputs
        r, size = self.kernel.shape
        narrow = dict.fromkeys(("kernel_bias", "inner", "inner_bias"), (r,))
        shapes = {"norm": (width,), "norm_bias": (width,), "down": (2 * r, width), "down_bias": (2 * r,), **narrow}
        self.require({**shapes, "up": (outputs, r), "up_bias": (outputs,)}, site)
        if site.causal and not self.stateful:
            raise IncompatibleBase("its kernel reads later tokens, which are hidden here", "use an encoder")
        if not size or (size % 2 == 0 and not self.stateful):
            raise IncompatibleBase(f"its kernel of {size} tokens has no middle", "get it again from its source")

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        h = self.sequence(x, y)
        h = layer_norm(h, self.norm.shape, self.norm, self.norm_bias)
        h = self.along(glu(linear(h, self.down, self.down_bias)), step) + self.kernel_bias
        h = silu(layer_norm(h, self.inner.shape, self.inner, self.inner_bias))
        return self.out(linear(h, self.up, self.up_bias), step)

    def along(self, h: Tensor, step: Step) -> Tensor:
        """The convolution, h (rows, tokens, r)."""
        r, size = self.kernel.shape
        if self.stateful:
            return torch.einsum("btkr,rk->btr", step.window(h, size), self.kernel)
        if step.mask is not None:
            h = h.masked_fill(~step.mask[..., None], 0)
        return conv1d(h.mT, self.kernel[:, None], padding=size // 2, groups=r).mT

    @classmethod
    def random(cls, site: Site) -> ConvBottleneck | None:
        if not _sequential(site) or site.part in ("decoder", "cross"):  # no streaming state beside an encoder
            return None
        parallel = bool(torch.rand(()) < 0.5)
        width, r, size = site.inputs if parallel else site.outputs, 6, 5
        biases = {"norm_bias": width, "down_bias": 2 * r, "kernel_bias": r, "inner_bias": r, "up_bias": site.outputs}
        return cls(
            norm=1 + 0.1 * torch.randn(width),
            down=torch.randn(2 * r, width) * width**-0.5,
            kernel=torch.randn(r, size),
            inner=1 + 0.1 * torch.randn(r),
            up=0.1 * torch.randn(site.outputs, r),
            **{name: 0.1 * torch.randn(count) for name, count in biases.items()},
            scale=torch.tensor(0.7),
            parallel=_switch(parallel),
            causal=_switch(site.causal),
        )


class SoftMixture(TokenMixer):
    """n experts, each a bottleneck over p slots; a slot is a mean of tokens, and a token gets a mean of what came of the slots.

    L = Φh; slots D h, D = softmax of L over the row's real tokens; Δy = s·C E(D h), C = softmax of L over experts and
    slots together, E each expert's B gelu(A h + a) + b. slots Φ (n, p, width); down (n, r, width), down_bias (n, r);
    up (n, outputs, r), up_bias (n, outputs); scale (); parallel (), an integer. Every token hangs on all of its row."""

    form = "soft_mixture"
    stores = ("slots", "down", "down_bias", "up", "up_bias", "scale", "parallel")
    constants = frozenset({"scale", "parallel"})
    bidirectional = True

    def check(self, site: Site) -> None:
        if site.causal:
            raise IncompatibleBase(
                "a soft mixture reads later tokens, which a causal model must not see",
                "mix adapters token by token instead: adapterhub train --method gate --on A --on B",
            )
        width = site.inputs if self.additive else site.outputs
        n, r, _ = self.down.shape
        shapes = {"slots": (n, self.slots.shape[1], width), "down": (n, r, width), "down_bias": (n, r)}
        self.require({**shapes, "up": (n, site.outputs, r), "up_bias": (n, site.outputs)}, site)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        h = self.sequence(x, y)
        logits = torch.einsum("btw,npw->btnp", h, self.slots)
        combine = logits.flatten(2).softmax(2).view_as(logits)
        if step.mask is not None:
            logits = logits.masked_fill(~step.mask[..., None, None], torch.finfo(h.dtype).min)
            h = h.masked_fill(~step.mask[..., None], 0)
        read = torch.einsum("btnp,btw->bnpw", logits.softmax(1), h)
        inner = gelu(torch.einsum("bnpw,nrw->bnpr", read, self.down) + self.down_bias[:, None])
        made = torch.einsum("bnpr,nor->bnpo", inner, self.up) + self.up_bias[:, None]
        return self.out(torch.einsum("btnp,bnpo->bto", combine, made), step)

    @classmethod
    def random(cls, site: Site) -> SoftMixture | None:
        if not _sequential(site) or site.causal:
            return None
        parallel = bool(torch.rand(()) < 0.5)
        width, n, p, r = site.inputs if parallel else site.outputs, 3, 2, 5
        return cls(
            slots=torch.randn(n, p, width) * width**-0.5,
            down=torch.randn(n, r, width) * width**-0.5,
            down_bias=0.1 * torch.randn(n, r),
            up=0.2 * torch.randn(n, site.outputs, r),
            up_bias=0.1 * torch.randn(n, site.outputs),
            scale=torch.tensor(0.7),
            parallel=_switch(parallel),
        )


class _Adapter(Method):
    """What both methods share: where, how wide, and which of the site's states is read."""

    @dataclass(frozen=True)
    class Config:
        reduction: float = 96
        """Width of the site over that of the bottleneck, which is rounded, and 4 at least."""
        target_modules: str | tuple[str, ...] = ("ffn",)
        """Roles ("attention", "block", "encoder.ffn") or module names."""
        parallel: bool = True
        """Read the site's input; else its output."""
        scale: float = 1.0
        dropout: float = 0.0
        """Probability that a number of the change is dropped while training."""

        def __post_init__(self) -> None:
            if not 1 <= self.reduction < math.inf or not math.isfinite(self.scale) or not 0 <= self.dropout < 1:
                raise UsageError(
                    f"reduction {self.reduction}, scale {self.scale} and dropout {self.dropout} make no adapter",
                    "give reduction >= 1, a finite scale and 0 <= dropout < 1, for example --set reduction=96",
                )

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, TokenMixer]:
        made = {}
        for site in select(sites, config.target_modules):
            if site.role == "head":
                raise UsageError(f"{site.path}: {AT_HEAD}", "choose another site: --set target_modules=ffn")
            if site.embedding and config.parallel:
                raise UsageError(f"{site.path} gets token ids, no states", "read its output: --set parallel=false")
            width = site.inputs if config.parallel else site.outputs
            part = made[site.path] = self.fresh(site, width, max(4, round(width / config.reduction)), config)
            part.dropout = config.dropout
        return made


class ConvAdapter(_Adapter):
    """y + s·conv(h) at feed-forwards; zero at the start. Left of the token only where the base is causal."""

    @dataclass(frozen=True)
    class Config(_Adapter.Config):
        kernel: int = 31
        """Tokens that the convolution reads; odd where it reads both sides."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.kernel < 1:
                raise UsageError(f"the kernel reads {self.kernel} tokens", "for example --set kernel=31")

    def fresh(self, site: Site, width: int, r: int, config: Config) -> ConvBottleneck:
        if site.part in ("decoder", "cross"):
            wrong = "a decoder beside an encoder, where a convolution cannot keep its streaming state"
            raise UsageError(f"{site.path} is in {wrong}", "put it into the encoder: --set target_modules=encoder.ffn")
        if not site.causal and config.kernel % 2 == 0:
            wrong = f"a kernel of {config.kernel} has no middle, and {site.path} sees both sides of a token"
            raise UsageError(wrong, f"give an odd one: --set kernel={config.kernel + 1}")
        return ConvBottleneck(
            norm=torch.ones(width),
            norm_bias=torch.zeros(width),
            down=_uniform(2 * r, width),
            down_bias=torch.zeros(2 * r),
            kernel=_uniform(r, config.kernel),
            kernel_bias=torch.zeros(r),
            inner=torch.ones(r),
            inner_bias=torch.zeros(r),
            up=torch.zeros(site.outputs, r),
            up_bias=torch.zeros(site.outputs),
            scale=torch.tensor(config.scale),
            parallel=_switch(config.parallel),
            causal=_switch(site.causal),
        )


class SoftMoA(_Adapter):
    """y + s·a soft mixture of bottleneck adapters, at feed-forwards of encoders; zero at the start."""

    bidirectional = True

    @dataclass(frozen=True)
    class Config(_Adapter.Config):
        experts: int = 7
        slots: int = 1
        """Of each expert."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.experts < 1 or self.slots < 1:
                wrong = f"{self.experts} experts of {self.slots} slots mix nothing"
                raise UsageError(wrong, "for example --set experts=7 --set slots=1")

    def fresh(self, site: Site, width: int, r: int, config: Config) -> SoftMixture:
        if site.causal:
            raise UsageError(
                f"a soft mixture reads later tokens, and {site.path} must not see them",
                "mix adapters token by token instead: adapterhub train --method gate --on A --on B",
            )
        n = config.experts
        return SoftMixture(
            slots=torch.randn(n, config.slots, width) * width**-0.5,
            down=_uniform(n, r, width),
            down_bias=torch.zeros(n, r),
            up=torch.zeros(n, site.outputs, r),
            up_bias=torch.zeros(n, site.outputs),
            scale=torch.tensor(config.scale),
            parallel=_switch(config.parallel),
        )


def _sequential(site: Site) -> bool:
    """Whether hidden states of a whole sequence surely stand there: not at heads and poolers, and no token ids."""
    return site.role not in ("", "head", "embedding")


def _switch(on: bool) -> Tensor:
    return torch.tensor(int(on), dtype=torch.uint8)


def _uniform(*shape: int) -> Tensor:
    """As torch begins a layer whose outputs each read shape[-1] numbers."""
    return torch.empty(shape).uniform_(-1, 1) * shape[-1] ** -0.5
