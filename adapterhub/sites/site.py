"""Where a modification can sit: a module of the base, or the columns of a fused projection."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """The outputs of a fused projection that are one site: `count` runs of `length`, `stride` apart, from `start` on."""

    start: int
    length: int
    stride: int
    count: int

    def index(self) -> list[int]:
        """Their places among the module's outputs, in order."""
        return [self.start + n * self.stride + k for n in range(self.count) for k in range(self.length)]


@dataclass(frozen=True)
class Heads:
    """The heads of an attention: how many queries share `keys` heads of keys and values, `width` numbers each."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True)
class Tap:
    """Hidden states of another site that a modification reads: what went into the site, or came out of it with all that
    adapters changed there. The site must run before the one that reads."""

    role: str
    layer: int | None = None
    """None: the one outside of the layers (the embedding)."""
    into: bool = False
    """What went in (of an embedding: the token ids), instead of what came out."""
    part: str = ""
    """As Site.part: "encoder" or "decoder" where there are both."""


@dataclass(frozen=True)
class Site:
    """A module of the base model, or some columns of one, where a modification can sit."""

    path: str
    """Where, in this model: "model.layers.3.self_attn.q_proj"; of a fused projection "...attn.c_attn.query"."""
    role: str
    """What, in any model: "query", "ffn_down", "block", ...; "" for a module without a known role."""
    inputs: int
    """Width of what goes in; of an embedding the size of the vocabulary."""
    outputs: int
    """Width of what comes out."""
    linear: bool
    """Whether the module is one weight (and perhaps a bias) that multiplies hidden states, however it keeps the weight."""
    part: str = ""
    """"encoder", "decoder" or "cross" in a model that has both halves."""
    columns: Columns | None = None
    """Which of its module's outputs it is; None: all."""
    heads: Heads | None = None
    """Of an attention, and of the projection after it."""
    model_type: str = ""
    """transformers' name of the model's architecture."""
    bias: bool = False
    """Whether the module adds a bias of its own to what comes out."""
    causal: bool = False
    """Whether a token sees only itself and those before it here, so that what looks ahead would be wrong."""
    packed: str = ""
    """Of a linear layer or embedding whose weight is not plain (`weights.unlike`): how it is kept. It cannot be changed."""

    @property
    def module(self) -> str:
        """The path of the module where it sits."""
        return self.path.rpartition(".")[0] if self.columns else self.path

    @property
    def embedding(self) -> bool:
        """What goes in are token ids: each stands for a row of zeros with a single one (one-hot)."""
        return self.role == "embedding"

    @property
    def layer(self) -> int | None:
        """The number of its layer, from its path; None outside the layers."""
        return layer_of(self.path)


def layer_of(path: str) -> int | None:
    """The number of the layer that a module lies in, from its path; None outside the layers."""
    number = re.search(r"\.(\d+)(\.|$)", f".{path}")
    return int(number[1]) if number else None
