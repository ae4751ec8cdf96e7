"""Every tuner of the installed PEFT as a method: PEFT makes its layers, they train here, and what is a change of a weight is
lowered to adapterhub's own forms. One method and one form, both `peft`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from adapterhub_peft_layer import TRAINED, PeftLayer, some
from adapterhub_peft_make import TYPES, check_options, layer_state, layers, plain
from peft import __version__
from torch import nn

from adapterhub import Given, Method, Modification, Site, Stage, Step
from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.formats.peft_config import MEASURED
from adapterhub.formats.peft_lower import lowered
from adapterhub.formats.peft_targets import patterned
from adapterhub.formats.peft_types import CACHES, PROMPTS
from adapterhub.formats.peft_types import REFUSED as NO_FORM
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.sites import select

VIRTUAL = "it puts virtual tokens before the text, which are no layer at a site; the built-in method prefix trains such"
REFUSED = dict.fromkeys({*CACHES, *PROMPTS, "MULTITASK_PROMPT_TUNING"}, VIRTUAL) | {
    "ADALORA": "it moves ranks between layers by averages over the steps, which no checkpoint holds; LORA trains without",
    "ADAMSS": "its layers hold one dtype, and what clusters the base's weights for them (scikit-learn) is not here",
    **{kind: NO_FORM[kind] for kind in ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")},
}
"""Types that do not train here, and why. Of the others PEFT, or how their layers behave, may still say no."""
TARGETS = {"LN_TUNING": "norm", "TRAINABLE_TOKENS": "embedding"}
"""Where the types sit that do not change every linear layer."""
STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that need no data and leave the base as it is."""
FACTORS = {
    "lora_A.default.weight": "down", "lora_B.default.weight": "up", "lora_magnitude_vector.default.weight": "magnitude",
    "lora_embedding_A.default": "down", "lora_embedding_B.default": "up",
}  # fmt: skip
"""LoRA's tensors as those of the forms low_rank and dora."""


class Peft(Method):
    """PEFT makes its layers of any type at the sites; they train here, and are then lowered to forms that need neither."""

    @dataclass(frozen=True)
    class Config:
        type: str = "LORA"
        """PEFT's name of it: LORA, VERA, OFT, ..."""
        config: dict[str, Any] = field(default_factory=dict)
        """That type's own options, by the names that PEFT's config class has for them."""
        target_modules: str | tuple[str, ...] | None = None
        """Roles ("query"), module names ("q_proj") or "all-linear"; None: norms for LN_TUNING, the embedding for
        TRAINABLE_TOKENS, else all-linear."""
        lower: str = "auto"
        """auto: what is a change of a weight is stored as one. never: PEFT's layer is, and runs only where this package is."""

        def __post_init__(self) -> None:
            object.__setattr__(self, "type", self.type.upper())
            if self.type not in TYPES:
                near = get_close_matches(self.type, TYPES, 1) or sorted(TYPES.keys() - REFUSED.keys())
                raise UsageError(f"PEFT {__version__} has no type {self.type!r}", f"one of: {', '.join(near)}")
            if self.type in REFUSED:
                raise UsageError(f"{self.type} does not train here: {REFUSED[self.type]}", "use another type or method")
            if self.lower not in ("auto", "never"):
                raise UsageError(f"unknown lower {self.lower!r}", "one of: auto, never")
            options = dict(self.config)
            if (start := options.pop("init_lora_weights", True)) not in STARTS:
                raise UsageError(f"init_lora_weights {start!r} changes the base or needs data", "leave it out")
            check_options(self.type, options, 1 << 31)

    def stages(self, config: Config) -> Sequence[Stage]:
        made: dict[str, PeftLayer] = {}

        def build(given: Given) -> Mapping[str, Modification]:
            made.clear()
            if given.before and not any(isinstance(part, PeftLayer) for part in given.before.values()):
                return _go_on(given.before, config)
            made.update(_build(given, config))
            return dict(made)

        def finish(parts: Mapping[str, Modification], given: Given) -> dict[str, Any]:
            if not made:
                return dict(parts)
            for path, part in made.items():
                part.tensors, part.here[0] = parts[path].tensors if path in parts else part.tensors, part
            for path, tensors in {path: part.whole() for path, part in made.items()}.items():
                made[path].tensors, made[path].lent = tensors, {}
            done = {}
            for site in given.sites:
                if (part := made.get(site.path)) is None:
                    continue
                part.bind(given.weight(site) if _matrix(site) else None)
                if site.path in parts or part.delta_out(some(site), some(site), Step()).any():
                    done[site.path] = (
                        _lowered(part, site, given) if config.lower == "auto" else [PeftLayer(**part.tensors)]
                    )
            return {path: here for path, here in done.items() if here}

        return [Stage("train", build, finish=finish)]


def _go_on(before: Mapping[str, Modification], config: Peft.Config) -> Mapping[str, Modification]:
    """An adapter that was lowered: LoRA trains on as it is."""
    if config.type != "LORA" or not all(isinstance(part, LowRank | DoRA) for part in before.values()):
        raise UsageError(
            f"this adapter of type {config.type} was lowered, and PEFT's tensors are not in it any more",
            "train with --set lower=never what shall go on later; or train a new one over it: --on",
        )
    for part in before.values():
        part.dropout = config.config.get("lora_dropout", 0.0)
    return before


def _build(given: Given, config: Peft.Config) -> dict[str, PeftLayer]:
    chosen = select(given.sites, config.target_modules or TARGETS.get(config.type, "all-linear"))
    options, paths = dict(config.config), [site.path for site in chosen]
    for key in [key for key in options if key.endswith("_pattern")]:
        options[key] = {path: n for path, n in patterned(options[key], None, paths).items() if n is not None}
    if config.type == "IA3":
        inner = options.get("feedforward_modules")
        inner = [site for site in chosen if site.role == "ffn_down"] if inner is None else select(chosen, inner)
        options["feedforward_modules"] = [site.path for site in inner]
    made = layers(config.type, options, {site.path: _alone(site, given) for site in chosen})
    parts: dict[str, PeftLayer] = {}
    owners: dict[int, tuple[list[PeftLayer], str]] = {}
    for site in chosen:
        state = layer_state(made[site.path])
        part = parts[site.path] = PeftLayer.of(config.type, _at(site.path, options), made[site.path])
        if len(parts) == 1 or config.lower == "never":  # found out now, not after hours
            _try(part, site, given.weight(site) if _matrix(site) else None, config.lower)
        for key in part.tensors.keys() & set(TRAINED):
            owner = owners.setdefault(id(state[part.names[key]]), (part.here, key))
            if owner[0] is not part.here:  # VB-LoRA's vector bank, for example: one tensor for all sites
                part.lent[key] = owner
                del part.tensors[key]
    return parts


def _matrix(site: Site) -> bool:
    return site.linear or site.embedding


def _alone(site: Site, given: Given) -> nn.Module:
    """A copy of the base's module, without what runs there."""
    own = given.base.get_submodule(site.module)
    if _matrix(site):
        bias = getattr(own, "bias", None)
        bias = bias[site.columns.index()] if site.columns and bias is not None else bias
        return plain(given.weight(site), bias, site.embedding)
    made = copy.deepcopy(own).float().cpu()
    made._forward_hooks.clear()
    made._forward_pre_hooks.clear()
    return made


def _at(path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they are for one site, which is then named "site"."""
    here = {key: value for key, value in options.items() if key != "init_lora_weights"}
    for key, value in here.items():
        if key.endswith("_pattern"):
            here[key] = {"site": value[path]} if path in value else {}
        elif key == "feedforward_modules":
            here[key] = ["site"] if path in value else []
    return here


@torch.no_grad()
def _try(part: PeftLayer, site: Site, weight: torch.Tensor | None, lower: str) -> None:
    """Raise HubError unless a token's change is its own, and what shall be stored can be: a change of a weight, or a layer that
    PEFT makes again from its tensors. With tensors that are moved, since many layers begin with no change."""
    moved = part.over({key: t + 0.1 * torch.randn_like(t) if key in TRAINED else t for key, t in part.tensors.items()})
    moved.bind(weight)
    wanted = moved.delta_out(some(site), some(site), Step())
    tight = {"rtol": 1e-4, "atol": 1e-5 * wanted.abs().max().item()}
    alone = [moved.delta_out(x, x, Step()) for x in some(site).split(1, dim=1)]
    if not torch.allclose(torch.cat(alone, dim=1), wanted, **tight):
        raise UsageError(
            f"{part.type} does not train here: what it does to a token depends on the batch's others, later ones and padding too",
            "use another type",
        )
    if lower == "auto" and weight is not None:
        moved.delta_weight(weight, None)
    if lower == "never":
        again = PeftLayer(**moved.tensors)
        try:
            again.check(site)
            again.bind(weight)
            same = torch.allclose(again.delta_out(some(site), some(site), Step()), wanted, **tight)
        except IncompatibleBase:
            same = False
        if not same:
            raise UsageError(
                f"a layer of type {part.type} is more than its weight and its tensors", "leave out lower=never"
            )


def _lowered(part: PeftLayer, site: Site, given: Given) -> list[Modification]:
    """What the part does, in built-in forms; none: it does nothing."""
    factors = {FACTORS.get(name): part.tensors[key] for key, name in part.names.items()}
    plainly = part.type == "LORA" and None not in factors and not any(part.options.get(key) for key in MEASURED)
    if plainly and not ("magnitude" in factors and site.embedding):
        scale = torch.tensor(float(part.layer.scaling["default"]))
        return [(DoRA if "magnitude" in factors else LowRank)(**factors, scale=scale)]
    state = layer_state(part.layer)
    for key, name in part.names.items():
        state[name].data = part.tensors[key]
    part.layer.base_layer = _alone(site, given)
    return lowered(_alone(site, given), part.layer.eval(), gains=part.type == "IA3")
