"""An adapter as PEFT's files, of the type that says the same exactly: (IA)3 for gains, BEFT for shifts, SHiRA for sparse changes, prefix
tuning for prefixes, LoRA for all else that adds up. What none of them says is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterhub import bases
from adapterhub.adapter import Modifications, check_fit
from adapterhub.errors import HubError, IncompatibleBase, NotFound, UsageError
from adapterhub.formats import peft_write_lora
from adapterhub.formats.peft_base import BaseModel
from adapterhub.formats.peft_lora import PREFIX
from adapterhub.formats.peft_prompt import NAME, attentions
from adapterhub.formats.peft_rotary import turned
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.forms.dora import DoRA
from adapterhub.forms.prefix import Prefix
from adapterhub.forms.sparse import Sparse
from adapterhub.manifest import Release
from adapterhub.modification import Modification
from adapterhub.sites import named_role

Files = tuple[dict[str, Any], dict[str, Tensor]]
"""adapter_config.json and adapter_model.safetensors."""
NO_MATRIX = ("attention", "block", "ffn", "norm")
CONV1D = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""transformers' models whose layers are its Conv1D, which PEFT's SHiRA and BEFT do not take."""


def written(release: Release, parts: Modifications, base: str | Path | None) -> Files:
    """What PEFT loads with the same logits. Raises UsageError listing what has no counterpart; NotFound when a prefix is
    to be laid out and there is no base."""
    kind = release.manifest.base.architecture
    roles = {path: named_role(kind, path) for path in parts}
    faults = [
        f"{path}: {'columns of a fused projection' if role is None else f'no weight, but the whole of a module ({role})'}"
        for path, role in roles.items()
        if role is None or (role in NO_MATRIX and not all(isinstance(part, Prefix) for part in parts[path]))
    ]
    embeddings = {path for path, role in roles.items() if role == "embedding"}
    if kind.startswith("gemma"):
        faults += [f"{path}: PEFT scales the LoRA of this family's embedding" for path in sorted(embeddings)]
    every = [part for here in parts.values() for part in here]
    single = all(len(here) == 1 for here in parts.values())
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if not every:
        faults.append("it holds no tensors")
    elif single and all(isinstance(part, Prefix) for part in every):
        config, tensors = _prefix(release, parts, base)
    elif single and not embeddings and all(isinstance(p, Affine) and "shift" not in p.tensors for p in every):
        config, tensors = _ia3(parts)
    elif single and not embeddings and kind not in CONV1D and all(isinstance(p, Affine) and p.additive for p in every):
        config, tensors = _beft(parts)
    else:
        biased = any(isinstance(p, Affine) or (isinstance(p, Dense) and "bias" in p.tensors) for p in every)
        mixed = len({isinstance(part, DoRA) for part in every}) > 1
        for path, here in sorted(parts.items()):
            faults += peft_write_lora.faults(path, here, embeddings, mixed, biased)
        if not faults:
            rank = _shira_rank(parts) if single and not embeddings and kind not in CONV1D else None
            config, tensors = _shira(parts, rank) if rank else peft_write_lora.lora(release, parts, embeddings)
    if faults:
        raise UsageError(
            f"{release} cannot be written for PEFT:\n  " + "\n  ".join(dict.fromkeys(faults)),
            f"for another hub: adapterhub export {release} --format bundle OUT",
        )
    always = {"base_model_name_or_path": release.manifest.base.name, "inference_mode": True, "task_type": _task(kind)}
    return always | config, tensors


def _task(kind: str) -> str | None:
    """PEFT's own wrapper for what only generates; the plain one for all others."""
    from transformers.models.auto import modeling_auto as names

    others = (names.MODEL_FOR_MASKED_LM_MAPPING_NAMES, names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    only = kind in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not any(kind in other for other in others)
    return "CAUSAL_LM" if only else None


def _ia3(parts: Mapping[str, Sequence[Modification]]) -> Files:
    tensors, inputs = {}, []
    for path, (part,) in sorted(parts.items()):
        scaling = part.gain + 1
        tensors[f"{PREFIX}{path}.ia3_l"] = scaling[None] if part.into else scaling[:, None]
        inputs += [path] if part.into else []
    return {"peft_type": "IA3", "target_modules": sorted(parts), "feedforward_modules": inputs}, tensors


def _beft(parts: Mapping[str, Sequence[Modification]]) -> Files:
    tensors = {f"{PREFIX}{path}.beft_bias": part.shift[None] for path, (part,) in sorted(parts.items())}
    return {"peft_type": "BEFT", "target_modules": sorted(parts)}, tensors


def _shira_rank(parts: Mapping[str, Sequence[Modification]]) -> int | None:
    """The r for which r * (inputs + outputs) places hold every module's; None where there is none, or another form."""
    rank = 1
    for (part,) in parts.values():
        if not isinstance(part, Sparse):
            return None
        rank = max(rank, math.ceil(len(part.values) / sum(part.size)))
    fits = all(rank * sum(part.size) <= math.prod(part.size) for (part,) in parts.values())
    return rank if fits else None


def _shira(parts: Mapping[str, Sequence[Modification]], rank: int) -> Files:
    """The places that the form has, filled up with zeros at others: PEFT asks for as many as the rank says."""
    tensors = {}
    for path, (part,) in sorted(parts.items()):
        used = part.index.long()
        spare = torch.ones(math.prod(part.size), dtype=torch.bool).index_fill_(0, used, False).nonzero()[:, 0]
        more = spare[: rank * sum(part.size) - len(used)]
        places = torch.cat([used, more])
        tensors[f"{PREFIX}{path}.shira_weight"] = torch.cat([part.values, part.values.new_zeros(len(more))])
        indices = torch.stack([places // part.size[1], places % part.size[1]])
        tensors[f"{PREFIX}{path}.shira_indices"] = indices.to(torch.int32)
    return {"peft_type": "SHIRA", "r": rank, "mask_type": "random", "target_modules": sorted(parts)}, tensors


def _prefix(release: Release, parts: Modifications, base: str | Path | None) -> Files:
    try:
        model = BaseModel(bases.resolve(base or release.manifest.base.name))
    except HubError as error:
        raise NotFound(f"a prefix is laid out for its base model: {error}", "give it: --base PATH") from None
    check_fit(parts, model.sites, str(release))
    places = attentions(str(release), model)
    missing = [site.path for site in places if site.path not in parts]
    counts = {parts[site.path][0].keys.shape[1] for site in places if site.path in parts}
    if missing or len(counts) != 1:
        raise UsageError(
            f"{release} cannot be written for PEFT: {missing[0] + ' has no prefix' if missing else 'its prefixes are unlike long'}",
            f"for another hub: adapterhub export {release} --format bundle OUT",
        )
    (count,) = counts
    pieces = []
    for site in places:
        (part,) = parts[site.path]
        keys = part.keys if part.advance == count else None
        if part.advance == 0:  # PEFT gives the text the positions after the prefix
            keys = turned(part.keys, count, model.skeleton)
        if keys is None:
            raise IncompatibleBase(
                f"{release} cannot be written for PEFT: its tokens move up {part.advance} positions, PEFT's {count}",
                f"for another hub: adapterhub export {release} --format bundle OUT",
            )
        pieces += [keys, part.values]
    heads, _, width = pieces[0].shape
    prompt = torch.stack([piece.float() for piece in pieces]).permute(2, 0, 1, 3).reshape(count, -1).contiguous()
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": count,
        "num_layers": len(places),
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": heads * width,
    }
    return config, {NAME: prompt}
