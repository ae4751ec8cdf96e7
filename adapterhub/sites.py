"""Sites: the modules of a base model where a modification can sit, and their roles by architecture."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.weights import embeds, unlike, widths
from adapterhub.weights import matrix as matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapterhub.modification import Tap


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


@dataclass(frozen=True)
class Family:
    """What architectures.toml says of one family of models."""

    roles: tuple[tuple[re.Pattern, str], ...]
    parts: tuple[tuple[re.Pattern, str], ...]
    fused: tuple[tuple[re.Pattern, Mapping[str, Any]], ...]
    aliases: tuple[tuple[re.Pattern, str], ...]
    own_positions: bool
    """It computes positions from its ids itself: they must not be given."""


@cache
def family(model_type: str) -> Family:
    """The family of transformers' `model_type`; one that says nothing for an unknown type."""
    tables = tomllib.loads(files("adapterhub").joinpath("architectures.toml").read_text()).values()
    table = next((table for table in tables if model_type in table["model_types"]), {})

    def read(key: str) -> tuple:
        return tuple((_pattern(pattern), value) for pattern, value in table.get(key, {}).items())

    return Family(read("roles"), read("parts"), read("fused"), read("aliases"), table.get("own_positions", False))


def _pattern(text: str) -> re.Pattern:
    """`*` is a number, `**` anything; what stands before is whatever wraps the layers ("model.", "transformer.", nothing)."""
    escaped = re.escape(text).replace(r"\*\*", ".*").replace(r"\*", r"(\d+)")
    return re.compile(r"(?P<before>.*\.)?" + escaped)


def _first(table: tuple[tuple[re.Pattern, Any], ...], path: str, default: Any = "") -> Any:
    return next((value for pattern, value in table if pattern.fullmatch(path)), default)


def sites(model: PreTrainedModel) -> list[Site]:
    """The sites of a loaded model in its own order: every module with a role, every column range of a fused projection,
    and every other linear layer without a role. Modules of several names are listed once, under the first."""
    known = family(model.config.model_type)
    config = model.config.get_text_config()
    width, heads = config.hidden_size, _heads(config)
    found = []
    for path, module in model.named_modules():
        role, part = _first(known.roles, path), _first(known.parts, path)
        here = heads if role in ("attention", "attention_output") else None
        own = widths(module)
        if own is not None and (role or not embeds(module)):
            linear = not embeds(module)
            found.append(Site(path, role, own[1], own[0], linear, part, heads=here, packed=unlike(module)))
            found += _fused(_first(known.fused, path, None), found[-1], heads) if linear else []
        elif own is None and role:
            found.append(Site(path, role, width, width, False, part, heads=here))
    biased = {
        path.rpartition(".")[0] for path, _ in model.named_parameters(remove_duplicate=False) if path.endswith(".bias")
    }
    causal = _causal(model)
    return [
        replace(
            site,
            bias=site.module in biased,
            model_type=model.config.model_type,
            causal=site.part != "encoder" if model.config.is_encoder_decoder else causal,
        )
        for site in found
    ]


def _causal(model: PreTrainedModel) -> bool:
    """Whether the attention of a model without encoder is causal; of one that says nothing: whether it generates."""
    said = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return any(said) if said else model.can_generate()


def tapped(sites: Sequence[Site], tap: Tap) -> Site:
    """The site that a tap reads. Raises IncompatibleBase if this base has no such site, or several."""
    found = [s for s in sites if (s.role, s.layer, s.part) == (tap.role, tap.layer, tap.part)]
    if len(found) != 1:
        where = f" of layer {tap.layer}" if tap.layer is not None else ""
        raise IncompatibleBase(
            f"this base has {len(found) or 'no'} sites {tap.role!r}{where}, where an adapter reads one",
            "use the base that the adapter was made for",
        )
    return found[0]


def _heads(config: Any) -> Heads | None:
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int):
        return None
    return Heads(
        queries,
        getattr(config, "num_key_value_heads", None) or queries,
        getattr(config, "head_dim", None) or config.hidden_size // queries,
    )


def _fused(table: Mapping[str, Any] | None, site: Site, heads: Heads | None) -> list[Site]:
    """The sites inside a fused projection: what stands there in which order, head by head or one block after another."""
    if table is None or heads is None:
        return []
    count = {"query": heads.queries, "key": heads.keys, "value": heads.keys}
    made, start = [], 0
    for role in table["order"]:
        if table["per_head"]:
            columns = Columns(start, heads.width, len(table["order"]) * heads.width, heads.queries)
            start += heads.width
        else:
            columns = Columns(start, heads.width * count[role], 0, 1)
            start += columns.length
        outputs = columns.length * columns.count
        path = f"{site.path}.{role}"
        made.append(Site(path, role, site.inputs, outputs, True, site.part, columns, packed=site.packed))
    return made


def named_role(model_type: str, path: str) -> str | None:
    """The role of the module with this path, from its name alone; None for columns of a fused projection."""
    known = family(model_type)
    module, _, last = path.rpartition(".")
    fused = _first(known.fused, module, None)
    return None if fused and last in fused["order"] else _first(known.roles, path)


def current_path(model_type: str, path: str) -> str:
    """The path that a module is known by now, of one that an older transformers may have named otherwise."""
    for pattern, new in family(model_type).aliases:
        if hit := pattern.fullmatch(path):
            for number in hit.groups()[1:]:
                new = new.replace("*", number, 1)
            return (hit["before"] or "") + new
    return path


def select(sites: Sequence[Site], targets: str | Sequence[str]) -> list[Site]:
    """Sites by role ("query", "decoder.query", "cross.value"), by the end of their path ("q_proj", "0.mlp") or
    "all-linear": every linear layer but the head, a fused projection whole.

    Raises UsageError if a target selects nothing."""
    if targets == "all-linear":
        heads = ("lm_head", "classifier", "score")
        return [
            site
            for site in sites
            if site.linear and not site.columns and site.role != "head" and site.path.rpartition(".")[2] not in heads
        ]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen = []
    for target in wanted:
        hits = [
            s
            for s in sites
            if target in (s.role, f"{s.part}.{s.role}") or s.path == target or s.path.endswith(f".{target}")
        ]
        if not hits and target == "ffn":  # a family without a module around its two layers: what the second puts out
            hits = [s for s in sites if s.role == "ffn_down"]
        if not hits:
            raise _nothing(sites, target)
        chosen += hits
    return [site for site in sites if site in set(chosen)]


def _nothing(sites: Sequence[Site], target: str) -> UsageError:
    roles = sorted({site.role for site in sites if site.role})
    if roles or not sites:
        return UsageError(
            f"no site of this base is named {target!r}",
            f"use all-linear, a module's name, or one of: {', '.join(roles)}",
        )
    kind, names = sites[0].model_type, sorted({site.path.rpartition(".")[2] for site in sites})
    return UsageError(
        f"no site of this base is named {target!r}: the roles of the architecture {kind!r} are not known",
        f"use all-linear or a module's name ({', '.join(names)}); or name its modules' roles in "
        f"adapterhub/architectures.toml: model_types = [{kind!r}] and a line for each, as the families there have it",
    )
