"""Every tuner of the installed PEFT as a method: PEFT makes its layers, and what they learn is lowered to built-in forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from adapterhub_peft_layer import TRAINED, TYPES, PeftLayer, check_options, layer_state, layers, plain, some
from torch import nn

from adapterhub import BuildContext, Method, Modification, Site, Stage, Step
from adapterhub.errors import UsageError
from adapterhub.formats.peft.config import MEASURED
from adapterhub.formats.peft.lower import lowered
from adapterhub.formats.peft.types import CACHES, PROMPTS
from adapterhub.formats.peft.types import REFUSED as NO_FORM
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.sites import select

VIRTUAL = "it puts virtual tokens before the text instead of changing modules; the built-in method prefix trains those"
REFUSED = dict.fromkeys({*CACHES, *PROMPTS, "MULTITASK_PROMPT_TUNING"}, VIRTUAL) | {
    "ADALORA": "it moves ranks between layers by averages over the steps, which no checkpoint holds; LORA trains without",
    "ADAMSS": "its layers hold one dtype, and what clusters the base's weights for them (scikit-learn) is not here",
    "IA3": "the built-in method ia3 does the same",
    "LN_TUNING": "the built-in method full does the same with target_modules=[] and norms=true",
    **{kind: NO_FORM[kind] for kind in ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")},
}
"""Types that do not train here, and why. Of the others PEFT, or how their layers behave, may still say no."""
FACTORS = {
    "lora_A.default.weight": "down", "lora_B.default.weight": "up", "lora_magnitude_vector.default.weight": "magnitude",
    "lora_embedding_A.default": "down", "lora_embedding_B.default": "up",
}  # fmt: skip
"""LoRA's tensors as those of the forms low_rank and dora."""


class Peft(Method):
    """PEFT makes its layers at the sites, they train here, and each is then stored as a change of a weight, or as it is."""

    @dataclass(frozen=True)
    class Config:
        type: str = "LORA"
        """PEFT's name of it: LORA, VERA, OFT, ..."""
        config: dict[str, Any] = field(default_factory=dict)
        """That type's own options, by the names that PEFT's config class has for them."""
        target_modules: str | tuple[str, ...] | None = None
        """Roles ("query"), module names ("q_proj") or "all-linear"; None: as suits the type."""
        lower: Literal["auto", "never"] = "auto"
        """auto: what is a change of a weight is stored as one. never: PEFT's layer is, and runs only where this package is."""

        def __post_init__(self) -> None:
            object.__setattr__(self, "type", self.type.upper())
            if self.type not in TYPES:
                trains = ", ".join(sorted(TYPES.keys() - REFUSED.keys()))
                raise UsageError(f"the installed PEFT has no type {self.type!r}", f"one of: {trains}")
            if self.type in REFUSED:
                raise UsageError(f"{self.type} does not train here: {REFUSED[self.type]}", "use another type or method")
            check_options(self.type, self.config, 1 << 31)

    def stages(self, config: Config) -> Sequence[Stage]:
        made: dict[str, PeftLayer] = {}

        def build(given: BuildContext) -> Mapping[str, Modification]:
            made.clear()
            if given.before and not any(isinstance(part, PeftLayer) for part in given.before.values()):
                return _go_on(given.before, config)
            made.update(_build(given, config))
            return dict(made)

        def finish(trained: Mapping[str, Modification], given: BuildContext) -> Mapping[str, Any]:
            if not made:  # a LoRA that went on
                return trained
            done, sites = {}, {site.path: site for site in given.sites}
            for path, part in made.items():
                part.tensors = trained.get(path, part).tensors
                done[path] = _stored(part, sites[path], given, config.lower)
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


def _build(given: BuildContext, config: Peft.Config) -> dict[str, PeftLayer]:
    usual = "embedding" if config.type == "TRAINABLE_TOKENS" else "all-linear"
    chosen = select(given.sites, config.target_modules or usual)
    if wrong := next((site.path for site in chosen if not (site.linear or site.embedding)), None):
        raise UsageError(f"{wrong} is no linear layer and no embedding", "choose other target_modules")
    made = layers(config.type, config.config, {site.path: _alone(site, given) for site in chosen})
    parts: dict[str, PeftLayer] = {}
    holders: dict[int, tuple[list[PeftLayer], str]] = {}
    for site in chosen:
        state = layer_state(made[site.path])
        part = parts[site.path] = PeftLayer.of(config.type, config.config, made[site.path])
        if len(parts) == 1 or config.lower == "never":  # found out now, not after hours
            _try(part, site, given.weight(site), config.lower)
        for key in [key for key in part.tensors if key in TRAINED]:
            holder = holders.setdefault(id(state[part.names[key]]), (part.here, key))
            if holder[0] is not part.here:  # VB-LoRA's vector bank, for example: one tensor for all sites
                part.lent[key] = holder
                del part.tensors[key]
    return parts


def _alone(site: Site, given: BuildContext) -> nn.Module:
    """A copy of the base's module, or of its columns, without what runs there."""
    bias = given.base.get_submodule(site.module).bias if site.bias else None
    return plain(given.weight(site), bias[site.columns.index()] if site.bias and site.columns else bias, site.embedding)


@torch.no_grad()
def _try(part: PeftLayer, site: Site, weight: torch.Tensor, lower: str) -> None:
    """Raise HubError unless a token's change is its own, and what shall be stored can be: a change of a weight, or a layer that
    PEFT makes again from its tensors. With tensors that are moved, since many layers begin with no change."""
    moved = part.over({key: t + 0.1 * torch.randn_like(t) if key in TRAINED else t for key, t in part.tensors.items()})
    moved.bind(weight)
    x = some(site)
    wanted = moved.delta_out(x, x, Step())
    tight = {"rtol": 1e-4, "atol": 1e-5 * wanted.abs().max().item()}
    alone = torch.cat([moved.delta_out(token, token, Step()) for token in x.split(1, dim=1)], dim=1)
    if not torch.allclose(alone, wanted, **tight):
        why = "what it does to a token depends on the batch's others, later ones and padding too"
        raise UsageError(f"{part.type} does not train here: {why}", "use another type")
    if lower == "auto":
        moved.delta_weight(weight, None)
    else:
        again = PeftLayer(**moved.tensors)
        again.check(site)
        again.bind(weight)
        if not torch.allclose(again.delta_out(x, x, Step()), wanted, **tight):
            wrong = f"a layer of type {part.type} is more than its weight and its tensors"
            raise UsageError(wrong, "leave out lower=never")


def _stored(part: PeftLayer, site: Site, given: BuildContext, lower: str) -> list[Modification]:
    """What the part does, in the forms that are stored; none: it does nothing."""
    part.bind(given.weight(site))
    if not part.delta_out(some(site), some(site), Step()).any():
        return []
    whole = part.whole()
    if lower == "never":
        return [PeftLayer(**whole)]
    factors = {FACTORS.get(name): whole[key] for key, name in part.names.items()}
    plainly = part.type == "LORA" and None not in factors and not any(part.options.get(key) for key in MEASURED)
    if plainly and not ("magnitude" in factors and site.embedding):
        scale = torch.tensor(float(part.layer.scaling["default"]))
        return [(DoRA if "magnitude" in factors else LowRank)(**factors, scale=scale)]
    state = layer_state(part.layer)
    for key, name in part.names.items():
        state[name].data = whole[key]
    part.layer.base_layer = _alone(site, given)
    return lowered(_alone(site, given), part.layer.eval())
