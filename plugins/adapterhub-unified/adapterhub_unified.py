"""The unified view of adapters: a functional form, what it reads, which representation it changes and how the change is
composed (He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022), and the MAM adapter.

Method `unified`: the axes are its options. Its adapters are of the built-in forms bottleneck, low_rank and prefix, but for the
multi-head parallel adapter, form `head_bottleneck`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from adapterhub import Method, Modification, Site, Step, Tap, times
from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.forms.bottleneck import ACTIVATIONS, Bottleneck
from adapterhub.forms.low_rank import LowRank
from adapterhub.methods.prefix import PrefixTuning
from adapterhub.sites import select

READS = ("x", "query")
PARTS = ("", "encoder", "decoder", "cross")
LINEAR = {"attention": ("query", "value"), "ffn": ("ffn_gate", "ffn_up", "ffn_down")}
"""Which weights a linear change is of, as the paper has LoRA at each site."""


class HeadBottleneck(Modification):
    """What each head of an attention gives, changed by s·U_i f(D_i q_i), at the projection after it: q_i is the attention's
    input, or the head's query (before any rotation), which is that input through the frozen projection.

    down (heads, r, width of what is read), up (heads, head width, r), scale (), activation () its place in ACTIVATIONS, and
    reads (3,) integers: place in READS, layer, place in PARTS."""

    form = "head_bottleneck"
    stores = ("down", "up", "scale", "activation", "reads")
    constants = frozenset({"scale", "activation", "reads"})

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self._activation = list(ACTIVATIONS.values())[int(self.activation)]
        source, self._layer, part = self.reads.tolist()
        self._input, self._part = READS[source], PARTS[part]
        where = {"layer": self._layer, "part": self._part}
        self.taps = (Tap("query", **where) if self._input == "query" else Tap("attention", into=True, **where),)

    @classmethod
    def at(cls, site: Site, input: str, down: Tensor, up: Tensor, scale: float, activation: str) -> HeadBottleneck:
        """One that reads what belongs to this site."""
        return cls(
            down=down,
            up=up,
            scale=torch.tensor(scale),
            activation=torch.tensor(list(ACTIVATIONS).index(activation), dtype=torch.uint8),
            reads=torch.tensor([READS.index(input), site.layer, PARTS.index(site.part)], dtype=torch.int32),
        )

    @classmethod
    def random(cls, site: Site) -> HeadBottleneck | None:
        if not _after_heads(site):
            return None
        input = READS[int(torch.rand(()) < 0.5)]
        heads, width, read = site.heads.queries, site.heads.width, _read_width(site, input)
        down, up = torch.randn(heads, 4, read) * read**-0.5, 0.3 * torch.randn(heads, width, 4)
        return cls.at(site, input, down, up, 0.7, "gelu")

    def check(self, site: Site) -> None:
        hint = "use the base that the adapter was made for"
        if not _after_heads(site):
            raise IncompatibleBase(
                "a multi-head adapter sits at the projection after an attention of known heads", hint
            )
        if (self._layer, self._part) != (site.layer, site.part):
            raise IncompatibleBase(
                f"it reads {self._part or 'the'} layer {self._layer} and sits at {site.part} layer {site.layer}", hint
            )
        heads, rank, read = site.heads, self.down.shape[1], _read_width(site, self._input)
        wanted = (heads.queries, rank, read), (heads.queries, heads.width, rank), (), ()
        shapes = tuple(tuple(tensor.shape) for tensor in (self.down, self.up, self.scale, self.activation))
        if shapes != wanted:
            raise IncompatibleBase(
                f"tensors of shapes {shapes} do not fit {heads.queries} heads of {heads.width}: {wanted}", hint
            )

    def delta_in(self, x: Tensor, step: Step) -> Tensor:
        read = step.tap(self.taps[0])
        read = read.unflatten(-1, (len(self.down), -1)) if self._input == "query" else read[..., None, :]
        hidden = self._activation(torch.einsum("...hd,hrd->...hr", read, self.down))
        return times(self.scale, torch.einsum("...hr,hwr->...hw", hidden, self.up).flatten(-2))


def _after_heads(site: Site) -> bool:
    """Whether what goes in are the results of an attention's heads side by side."""
    heads, inside = site.heads, site.role == "attention_output" and site.layer is not None
    return inside and heads is not None and heads.queries * heads.width == site.inputs


def _read_width(site: Site, input: str) -> int:
    """Of what a head reads. The projection after an attention puts out what is as wide as the attention's input."""
    return site.heads.width if input == "query" else site.outputs


@dataclass(frozen=True)
class Axes:
    """One adapter along the paper's dimensions."""

    form: str
    """bottleneck (nonlinear), low_rank (linear) or prefix (softmax)."""
    input: str
    """x, the input of what is changed (parallel); h, its output (sequential); query: x through the frozen query projection."""
    site: str | tuple[str, ...]
    """ffn, attention, head (what each head gives), or roles or names."""
    combine: str
    """add: h + Δh; scaled: h + s·Δh; gated: (1-λ)h + λΔh, λ the share of the attention that falls on the prefix."""
    r: int
    """Width of the bottleneck, rank, or number of prefix vectors."""
    scale: float | None = None
    """s where it is scaled; None: 4, the paper's."""

    @property
    def s(self) -> float:
        default = 4.0 if self.combine == "scaled" else 1.0
        return default if self.scale is None else self.scale

    @property
    def foldable(self) -> bool:
        """Whether it is a change of weights: linear in the input of a linear layer (low_rank sits at no other), and no gate."""
        return self.form == "low_rank" and self.input == "x" and self.combine != "gated"

    def require(self) -> None:
        """Raise UsageError, with the reason, unless there is such an adapter."""
        for name, known in AXES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}", f"one of: {', '.join(known)}")
        form, head, given = self.form, self.site == "head", self.scale is not None
        gated, prefix, low_rank = self.combine == "gated", form == "prefix", form == "low_rank"
        reads = f"a {form} does not read input={self.input}"
        for wrong, problem, hint in (
            (self.r < 1, f"r is {self.r}", "give 1 or more, for example --set r=64"),
            (given and not math.isfinite(self.scale), f"scale is {self.scale}", "give a number: --set scale=4"),
            (given and self.combine != "scaled", f"combine={self.combine} has no scale", "--set combine=scaled"),
            (prefix and not gated, "a prefix is gated, by its share of the attention", "--set combine=gated"),
            (gated and not prefix, f"a {form} has no softmax, whose mass is the gate", "--set combine=add, or scaled"),
            (not (head or low_rank or prefix) and self.input == "query", reads, "--set site=head, or input=x"),
            ((low_rank or prefix) and self.input != "x", reads, "--set input=x: both are parallel"),
            (head and self.input == "h", "the multi-head adapter is parallel", "--set input=query, or x"),
            (head and low_rank, "what a head gives is no linear layer's output", "--set form=bottleneck"),
        ):
            if wrong:
                raise UsageError(problem, hint)


AXES = {
    "form": ("bottleneck", "low_rank", "prefix"),
    "input": ("x", "h", "query"),
    "combine": ("add", "scaled", "gated"),
}
PRESETS = {
    "sequential": Axes("bottleneck", "h", "ffn", "add", 200),
    "parallel": Axes("bottleneck", "x", "ffn", "add", 512),
    "scaled-parallel": Axes("bottleneck", "x", "ffn", "scaled", 512),
    "mh-parallel": Axes("bottleneck", "query", "head", "add", 30),
    "lora": Axes("low_rank", "x", "ffn", "scaled", 102),
    "prefix": Axes("prefix", "x", "head", "gated", 200),
}
"""The rows of the paper's Table 1, with the r of its experiments with BART-large. Beside them: "mam"."""


class Unified(Method):
    """An adapter by its axes. `preset` sets all of them, and the axes given besides replace the preset's."""

    starts_at_base: ClassVar[bool] = False  # whatever a prefix holds, it takes its share of the attention

    @dataclass(frozen=True)
    class Config:
        preset: str = "mam"
        """sequential, parallel, scaled-parallel, mh-parallel, lora or prefix; mam: a prefix at every attention and a scaled
        parallel bottleneck at every feed-forward."""
        form: str | None = None
        """bottleneck (nonlinear), low_rank (linear) or prefix."""
        input: str | None = None
        """x: parallel; h: sequential; query: x through the frozen query projection, for site=head."""
        site: str | tuple[str, ...] | None = None
        """ffn, attention, head, or roles or module names."""
        combine: str | None = None
        """add, scaled or gated."""
        r: int | None = None
        """Width of the bottleneck, rank, or number of prefix vectors (of mam: the bottleneck's width)."""
        scale: float | None = None
        """s of combine=scaled; none: 4."""
        length: int | None = None
        """Prefix vectors of mam; none: 30."""
        activation: str | None = None
        """Of a bottleneck; none: relu."""
        init: str | None = None
        """Of all but prefixes. lora: down Kaiming-uniform, up zero; bert: both from N(0, 0.02). none: lora."""

        def __post_init__(self) -> None:
            if self.preset not in (*PRESETS, "mam"):
                raise UsageError(f"unknown preset {self.preset!r}", f"one of: {', '.join(PRESETS)}, mam")
            for name, known in (("activation", ACTIVATIONS), ("init", ("lora", "bert"))):
                if getattr(self, name) not in (None, *known):
                    raise UsageError(f"unknown {name} {getattr(self, name)!r}", f"one of: {', '.join(known)}")
            parts = self.parts
            for part in parts:
                part.require()
            forms = {part.form for part in parts}
            if self.activation and "bottleneck" not in forms:
                raise UsageError(f"a {parts[0].form} has no activation", "leave it out, or --set form=bottleneck")
            if self.init and forms == {"prefix"}:
                raise UsageError("a prefix starts from N(0, 0.02)", "leave init out")
            if self.length is not None and self.preset != "mam":
                raise UsageError("length is an option of mam", "--set r=30 for the vectors of a prefix")

        @property
        def parts(self) -> tuple[Axes, ...]:
            """The adapters it is made of, as asked for."""
            names = ("form", "input", "site", "combine", "r", "scale")
            given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
            if self.preset != "mam":
                return (replace(PRESETS[self.preset], **given),)
            if fixed := [name for name in given if name not in ("r", "scale")]:
                raise UsageError(
                    f"mam is two adapters, whose {fixed[0]} is given", "name the one to change: --set preset=parallel"
                )
            length = 30 if self.length is None else self.length
            return replace(PRESETS["prefix"], r=length), replace(PRESETS["scaled-parallel"], **given)

        @property
        def foldable(self) -> bool:
            """Whether it folds into the base's weights."""
            return all(part.foldable for part in self.parts)

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Modification]:
        return {site.path: _fresh(site, axes, config) for axes in config.parts for site in _sites(sites, axes)}


def _sites(sites: Sequence[Site], axes: Axes) -> list[Site]:
    """Where an adapter sits. Raises UsageError where it cannot."""
    if axes.form == "prefix":
        chosen = select(sites, "attention" if axes.site == "head" else axes.site)
        _refuse(chosen, lambda site: site.role == "attention" and site.heads, "no attention, where a prefix sits")
    elif axes.site == "head":
        chosen = select(sites, "attention_output")
        _refuse(chosen, _after_heads, "no projection after heads that are known")
        if axes.input == "query" and any(site.role == "query" and site.columns for site in sites):
            raise UsageError("this base makes queries, keys and values in one projection", "--set input=x")
    elif axes.form == "low_rank":
        roles = LINEAR.get(axes.site, ()) if isinstance(axes.site, str) else ()
        chosen = select(sites, [role for role in roles if any(site.role == role for site in sites)] or axes.site)
        _refuse(chosen, lambda site: site.linear, "no linear layer, which a low_rank changes")
    else:
        chosen = select(sites, axes.site)
        _refuse(chosen, lambda site: not site.embedding, "no place for a bottleneck")
        if axes.input == "x" and axes.site == "ffn" and chosen[0].role != "ffn":
            raise UsageError(
                "this base has no module around its feed-forward, whose input would be read",
                "--set input=h, or name a site",
            )
    return chosen


def _refuse(chosen: Sequence[Site], fits, what: str) -> None:
    if wrong := next((site.path for site in chosen if not fits(site)), None):
        raise UsageError(f"{wrong} is {what}", "choose another site: a role or a module's name")


def _fresh(site: Site, axes: Axes, config: Unified.Config) -> Modification:
    if axes.form == "prefix":
        return PrefixTuning().fresh(site, PrefixTuning.Config(num_virtual_tokens=axes.r))
    activation, heads = config.activation or "relu", 1
    if axes.site == "head":
        heads, inputs, outputs = site.heads.queries, _read_width(site, axes.input), site.heads.width
    else:
        inputs, outputs = site.outputs if axes.input == "h" else site.inputs, site.outputs
    down, up = torch.empty(heads * axes.r, inputs), torch.zeros(heads * outputs, axes.r)
    if config.init == "bert":
        down, up = down.normal_(0, 0.02), up.normal_(0, 0.02)
    else:
        torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    if axes.site == "head":
        down, up = down.view(heads, axes.r, inputs), up.view(heads, outputs, axes.r)
        return HeadBottleneck.at(site, axes.input, down, up, axes.s, activation)
    if axes.form == "low_rank":
        return LowRank(down=down, up=up, scale=torch.tensor(axes.s))
    return Bottleneck(
        down=down,
        down_bias=torch.zeros(axes.r),
        up=up,
        up_bias=torch.zeros(outputs),
        scale=torch.tensor(axes.s),
        **Bottleneck.switches(axes.input == "x", activation),
    )
