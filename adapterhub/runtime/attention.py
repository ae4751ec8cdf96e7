"""Prefixes inside the attention kernel: keys and values beside the tokens' own, each row of a batch its own.

transformers lets a model's attention be any registered function. Ours are two, over its own `sdpa` and `eager`: where a
plan brings memories they lengthen keys, values, mask and position bias, and call the kernel that was there; elsewhere
they only pass the call on. The cache never holds a prefix. Every token sees the whole of it: a sliding window or a
sequence's length do not take it out of sight (kept in a cache, as PEFT keeps it, it would slide away).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from adapterhub.errors import BatchError
from adapterhub.forms.composers import Stack
from adapterhub.kinds.lanes import Lane, Memory, remembers
from adapterhub.kinds.modification import Modifications
from adapterhub.runtime.forward import current

OURS = {"sdpa": "adapterhub_sdpa", "eager": "adapterhub_eager"}


def memories(rows: Sequence[Modifications]) -> dict[str, Memory]:
    """By attention module, for a batch whose row i runs rows[i]. A single row counts for a batch of any size."""
    found = {}
    for path in dict.fromkeys(path for parts in rows for path in parts):
        known: dict[int, tuple[Lane, ...]] = {}
        lanes = [known.setdefault(id(p), Stack(p).lanes()) for p in (parts.get(path, ()) for parts in rows)]
        if any(map(remembers, lanes)):
            found[path] = _padded(lanes)
    return found


def advances(rows: Sequence[Modifications]) -> list[int]:
    """How many positions each row's tokens move up: as far as the attention that moves them furthest says."""
    return [max((Stack(here).advance for here in parts.values()), default=0) for parts in rows]


def _padded(rows: Sequence[tuple[Lane, ...]]) -> Memory:
    some = next(keys for lanes in rows for lane in lanes for keys, _ in lane.memories)
    heads, _, width = some.shape
    count = max(map(len, rows))
    longest = max(sum(keys.shape[1] for keys, _ in lane.memories) for lanes in rows for lane in lanes)
    weights = torch.zeros(count, len(rows), dtype=torch.float64)
    real = torch.zeros(count, len(rows), longest, dtype=torch.bool)
    keys, values = [], []
    empty = some.new_zeros(heads, 0, width)
    for row, lanes in enumerate(rows):
        for n in range(count):
            lane = lanes[n] if n < len(lanes) else Lane(0.0)
            weights[n, row] = lane.weight
            held = (
                torch.cat([empty, *(k for k, _ in lane.memories)], 1),
                torch.cat([empty, *(v for _, v in lane.memories)], 1),
            )
            size = held[0].shape[1]
            real[n, row, :size] = True
            padding = (0, 0, 0, longest - size)
            keys.append(nn.functional.pad(held[0], padding))
            values.append(nn.functional.pad(held[1], padding))

    def whole(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).view(len(rows), count, heads, longest, width).transpose(0, 1)

    return Memory(weights.to(some.device), whole(keys), whole(values), real.to(some.device))


# --- the kernels ---------------------------------------------------------------------------------------------------


def use(base: PreTrainedModel) -> None:
    """Let the base's attention go through our kernels. Raises BatchError for one that cannot be."""
    named = base.config._attn_implementation
    if named in OURS.values():
        return
    if named not in OURS:
        raise BatchError(
            f"a prefix needs an attention of sdpa or eager, this base has {named}",
            'load it with attn_implementation="sdpa"',
        )
    if named == "eager" and getattr(base.config, "reorder_and_upcast_attn", False):
        raise BatchError("this base's eager attention takes no prefix", 'load it with attn_implementation="sdpa"')
    base.set_attn_implementation(OURS[named])


def restore(base: PreTrainedModel) -> None:
    """The base's own attention again."""
    for kernel, ours in OURS.items():
        if base.config._attn_implementation == ours:
            base.set_attn_implementation(kernel)


def _kernel(kernel: str):
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
        inner = sdpa_attention_forward
        if kernel == "eager":  # each architecture's own
            inner = sys.modules[type(module).__module__].eager_attention_forward
        memory = _memory_of(module)
        if memory is None:
            return inner(module, query, key, value, attention_mask, **options)
        return _with(memory, inner, kernel, module, query, key, value, attention_mask, options)

    return attend


def _memory_of(module: nn.Module) -> Memory | None:
    """What the rows of the running forward pass attend to at this attention besides their tokens."""
    now = current()
    path = None if now is None else now.paths.get(module)
    memory = None if path is None else now.memories.get(path)
    if memory is not None:
        now.ran.add(path)
    return memory


def _with(memory: Memory, inner, kernel: str, module, query, key, value, mask, options) -> tuple[Tensor, None]:
    rows, tokens, seen = query.shape[0], query.shape[2], key.shape[2]
    n = memory.keys.shape[3]
    mask = _boolean_or_added(mask, module, options, kernel, query, seen)
    if (bias := options.get("position_bias")) is not None:
        options["position_bias"] = nn.functional.pad(bias, (n, 0))
    options["is_causal"] = False  # the mask says it
    total = None
    for weights, keys, values, real in zip(memory.weights, memory.keys, memory.values, memory.real, strict=True):
        longer = [
            torch.cat([extra.to(own).expand(rows, -1, -1, -1), own], 2) for extra, own in ((keys, key), (values, value))
        ]
        beside = real[:, None, None, :].expand(rows, mask.shape[1], tokens, n)
        if mask.dtype != torch.bool:
            beside = torch.zeros(beside.shape, dtype=mask.dtype, device=mask.device).masked_fill(
                ~beside, torch.finfo(mask.dtype).min
            )
        whole = torch.cat([beside, mask.expand(rows, -1, tokens, seen)], 3)
        out = inner(module, query, *longer, whole, **options)[0]
        if len(memory.weights) == 1:
            return out, None  # then it counts fully: the weights of a row's lanes add up to 1
        weighed = weights.to(out.dtype).view(-1, 1, 1, 1) * out
        total = weighed if total is None else total + weighed
    return total, None


def _boolean_or_added(mask: Tensor | None, module, options, kernel: str, query: Tensor, seen: int) -> Tensor:
    """The mask as this kernel takes it, made where the model gave none because `is_causal` says the same."""
    if mask is None:
        tokens = query.shape[2]
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = torch.ones(1, 1, tokens, seen, dtype=torch.bool, device=query.device)
        if causal and tokens > 1:
            mask = mask.tril(seen - tokens)
    if mask.dtype == torch.bool and kernel == "eager":  # eager adds what it gets
        return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    return mask[..., :seen]


# At the import, and not at the first prefix: a base that was pickled with a prefix on it finds them where it is read.
for _named, _ours in OURS.items():
    AttentionInterface.register(_ours, _kernel(_named))
    AttentionMaskInterface.register(_ours, sdpa_mask if _named == "sdpa" else eager_mask)
