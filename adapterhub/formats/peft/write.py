"""An adapter as PEFT's files, of the type that says the same exactly: (IA)3 for gains, BEFT for shifts, SHiRA for sparse changes, prefix
tuning for prefixes, LoRA for all else that adds up. What none of them says is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterhub.adapters.fit import check_fit
from adapterhub.errors import UsageError
from adapterhub.formats.peft import write_lora
from adapterhub.formats.peft.base import BaseModel
from adapterhub.formats.peft.lora import PREFIX
from adapterhub.formats.peft.prompt import NAME, attentions
from adapterhub.formats.peft.rotary import turned
from adapterhub.formats.peft.write_whole import wholes
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.prefix import Prefix
from adapterhub.forms.sparse import Sparse
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.sites import named_role
from adapterhub.spec.manifest import Release

Files = tuple[dict[str, Any], dict[str, Tensor]]
"""adapter_config.json and adapter_model.safetensors."""
FindBase = Callable[[str], BaseModel]
"""The base of the release, held against its record; the text is what it is needed for."""
CONV1D = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""transformers' models whose layers are its Conv1D, which PEFT's SHiRA and BEFT do not take."""


def written(release: Release, parts: Modifications, base: FindBase) -> Files:
    """What PEFT loads with the same logits; the base is asked for only for a prefix, and for modules that PEFT replaces
    whole. Raises UsageError listing what has no counterpart."""
    kind = release.manifest.base.architecture
    if parts and all(isinstance(part, Prefix) for here in parts.values() for part in here):
        config, tensors = _prefix(release, parts, base)
    else:
        config, tensors = _changes(release, parts, base)
    always = {"base_model_name_or_path": release.manifest.base.name, "inference_mode": True, "task_type": _task(kind)}
    return always | config, tensors


def _changes(release: Release, parts: Modifications, base: FindBase) -> Files:
    """Gains, shifts and changes of weights: as the type that suits them, and what it does not say as whole modules."""
    kind = release.manifest.base.architecture
    roles = {path: named_role(kind, path) for path in parts}
    faults = [f"{path}: columns of a fused projection" for path, role in roles.items() if role is None]
    for path, here in parts.items():
        odd = [part for part in here if not isinstance(part, Affine | Dense | DoRA | LowRank | Sparse)]
        faults += [f"{path}: {getattr(part, 'form', 'a composition')} is no change of a weight" for part in odd]
    norms = {path for path, role in roles.items() if role == "norm"}
    plain = {path: here for path, here in parts.items() if path not in norms}
    embeddings = {path for path, role in roles.items() if role == "embedding"}
    linear = {path: here for path, here in plain.items() if path not in embeddings and len(here) == 1}
    gains = {p: here for p, here in linear.items() if isinstance(here[0], Affine) and "shift" not in here[0].tensors}
    own = kind not in CONV1D and len(linear) == len(plain)
    if faults or not parts:
        raise _refused(release, faults or ["it holds no tensors"])
    if gains:
        chosen, (config, tensors) = set(gains), _ia3(gains)
    elif own and plain and all(isinstance(here[0], Affine) and here[0].additive for here in plain.values()):
        chosen, (config, tensors) = set(plain), _beft(plain)
    elif own and plain and (rank := _shira_rank(plain)):
        chosen, (config, tensors) = set(plain), _shira(plain, rank)
    elif pairs := write_lora.suited(plain, embeddings):
        chosen, (config, tensors) = set(pairs), write_lora.lora(release, pairs, embeddings)
    else:
        chosen, config, tensors = set(), {"peft_type": "LN_TUNING", "target_modules": sorted(norms)}, {}
        if not norms:
            raise _refused(release, [f"{path}: a shift, which PEFT's types do not add to it" for path in plain])
    if rest := {path: here for path, here in parts.items() if path not in chosen}:
        inner = norms if config["peft_type"] == "LN_TUNING" else set()
        tensors |= wholes(release, rest, base("PEFT has whole modules only for some of it"), inner)
        config["modules_to_save"] = sorted(rest.keys() - inner) or None
    return config, tensors


def _refused(release: Release, faults: Iterable[str]) -> UsageError:
    return UsageError(
        f"{release} cannot be written for PEFT:\n  " + "\n  ".join(faults),
        f"for another hub: adapterhub export {release} --format bundle OUT",
    )


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


def _prefix(release: Release, parts: Modifications, base: FindBase) -> Files:
    model = base("a prefix is laid out for its base model")
    check_fit(parts, model.sites, str(release))
    places = attentions(str(release), model)
    missing = [site.path for site in places if site.path not in parts]
    counts = {parts[site.path][0].keys.shape[1] for site in places if site.path in parts}
    if missing or len(counts) != 1:
        raise _refused(release, [f"{path} has no prefix" for path in missing] or ["its prefixes are unlike long"])
    (count,) = counts
    pieces = []
    for site in places:
        (part,) = parts[site.path]
        keys = part.keys if part.advance == count else None
        if part.advance == 0:  # PEFT gives the text the positions after the prefix
            keys = turned(part.keys, count, model.skeleton)
        if keys is None:
            raise _refused(release, [f"its tokens move up {part.advance} positions, and PEFT's {count}"])
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
