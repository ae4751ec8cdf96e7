"""PEFT's prompts and prefixes as keys and values at every attention.

A prefix is stored as those (Li and Liang, 2021). A soft prompt (Lester et al., 2021) is embeddings of virtual tokens before
the text: in a model that only looks back, what later tokens see of it are its keys and values, so the base is run on it once.
PEFT counts virtual tokens as positions: keys of rotary models are turned back by as many, others bring a shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapterhub.errors import AGAIN, HubError, IncompatibleBase, IntegrityError
from adapterhub.formats.peft.base import BaseModel
from adapterhub.formats.peft.config import CONFIG, Config
from adapterhub.formats.peft.rotary import turned
from adapterhub.formats.peft.types import CACHES
from adapterhub.forms.prefix import Prefix
from adapterhub.kinds.modification import Modifications
from adapterhub.sites import Site

NAME = "prompt_embeddings"


def read_prompt(label: str, config: Config, stored: Mapping[str, Tensor], base: BaseModel) -> Modifications:
    """A Prefix at each attention. Raises IntegrityError for tensors of another shape than the base's, IncompatibleBase for a
    base where that is not the same."""
    if why := _refusal(config):
        raise IncompatibleBase(
            f"{label} cannot be represented exactly as prefixes: {why}", "what loads is in docs/evidence/peft.md"
        )
    places = attentions(label, base)
    if stored.keys() != {NAME} or stored[NAME].ndim != 2 or not stored[NAME].is_floating_point():
        names = ", ".join(f"{name} {tuple(t.shape)}" for name, t in stored.items())[:300]
        raise IntegrityError(f"{label} should hold {NAME} alone, and holds {names or 'nothing'}", AGAIN)
    prompt = stored[NAME]
    count, width = prompt.shape
    if count < 1 or config.raw.get("num_virtual_tokens", count) != count:
        raise IntegrityError(f"{label}: {count} virtual tokens, where {CONFIG} says otherwise", AGAIN)
    heads = places[0].heads
    assert heads is not None  # `attentions` asks for it
    wanted = len(places) * 2 * heads.keys * heads.width
    if config.peft_type not in CACHES:
        wanted = base.skeleton.get_input_embeddings().weight.shape[1]
    if width != wanted:
        raise IntegrityError(
            f"{label}: {width} numbers a virtual token, where this base needs {wanted}",
            "give the base that it was made for: --base",
        )
    if config.peft_type in CACHES:
        pairs = prompt.view(count, 2 * len(places), heads.keys, heads.width).permute(1, 2, 0, 3)
        memories = [(pairs[2 * n], pairs[2 * n + 1]) for n in range(len(places))]
    else:
        memories = _cached(base, prompt)
    parts: Modifications = {}
    for site, (keys, values) in zip(places, memories, strict=True):
        # PEFT gives the text the positions after the prompt. Where positions are turns, the keys go back instead.
        back = turned(keys, -count, base.skeleton)
        shift = torch.tensor(count if back is None else 0)
        keys = keys if back is None else back
        parts[site.path] = [Prefix(keys=keys.contiguous(), values=values.contiguous(), shift=shift)]
    return parts


def _refusal(config: Config) -> str | None:
    """What a config says that the prompt alone does not hold."""
    if config.modules_to_save:
        return "it brings modules besides the prompt"
    if config.raw.get("num_transformer_submodules", 1) not in (1, None):
        return "it has a prompt for an encoder and one for a decoder"
    if config.task_type not in (None, "CAUSAL_LM"):
        return f"its task is {ascii(config.task_type)[:30]}, and PEFT reads the answer elsewhere then"
    return None


def attentions(label: str, base: BaseModel) -> list[Site]:
    """The decoder's attentions in order; IncompatibleBase unless PEFT's prefixes and ours are the same there."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as OTHER_LAYOUTS

    model = base.skeleton
    settings = model.config.get_text_config()
    found = [site for site in base.sites if site.role == "attention"]
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    back = all(getattr(model.get_submodule(site.path), "is_causal", False) for site in found)
    why = None
    if not model.can_generate() or settings.is_encoder_decoder or any(site.part for site in found):
        why = "the base is no decoder alone"
    elif not found or any(site.heads is None for site in found):
        why = "adapterhub knows no attention of this base"
    elif not back:
        why = "the base's attention looks both ways, so a prompt is not the same for every text"
    elif kinds != {"full_attention"} or _window(settings):
        why = "the base's attention forgets what lies further back, a prompt too"
    elif settings.model_type in OTHER_LAYOUTS:
        why = f"{settings.model_type} has a cache of another layout"
    if why:
        raise IncompatibleBase(
            f"{label} and PEFT's prefixes are not the same on this base: {why}",
            "what loads is in docs/evidence/peft.md",
        )
    return found


def _window(settings: Any) -> bool:
    """Whether a model without `layer_types` looks back no further than so many tokens."""
    return getattr(settings, "sliding_window", None) is not None and getattr(settings, "use_sliding_window", True)


@torch.no_grad()
def _cached(base: BaseModel, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, (key-value heads, n, width), of every layer over these embeddings."""
    model = base.load()
    try:
        cache: Any = model(inputs_embeds=prompt.to(torch.float32)[None], use_cache=True).past_key_values
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    except (RuntimeError, IndexError) as error:  # more virtual tokens than the base has positions
        raise HubError(f"the base does not run on {len(prompt)} virtual tokens: {error}"[:300], AGAIN) from None
