"""What a model thinks of tokens: their loss, and the log-probability of each of several answers to a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from adapterhub.data.batches import IGNORE, collate, pad_left, pad_token
from adapterhub.data.encoding import Example

if TYPE_CHECKING:
    from adapterhub.runtime.model import Model


def token_losses(model: Model, batch: Mapping[str, Tensor], adapters: str | None = None) -> Tensor:
    """Negative log-likelihood of each label of a batch of `collate`, (rows, answer) float32, 0 where there is none.

    The head is computed at the answers only, where the base can (`logits_to_keep`)."""
    labels = batch["labels"]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        adapters=adapters,
        use_cache=False,
        **_only_last(model, labels.shape[1] + 1),
    ).logits
    return _likelihoods(logits[:, -labels.shape[1] - 1 : -1], labels)


def label_scores(
    model: Model, prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]], adapters: str | None = None
) -> Tensor:
    """Summed log-probability of each row's choices after its prompt, (rows, choices) float64 on the CPU.

    The prompts are computed once and the choices continue their key-value cache; adapters that keep streaming state,
    and bases with another kind of cache, run prompt and choice together instead."""
    rows, count, pad = len(prompts), len(choices[0]), pad_token(model.tokenizer)
    flat = [choice for row in choices for choice in row]
    if not model.keeps_state(adapters):
        ids, mask = (tensor.to(model.device) for tensor in pad_left(prompts, pad))
        last = _only_last(model, 1)
        out = model(input_ids=ids, attention_mask=mask, adapters=adapters, use_cache=True, **last)
        cache = out.past_key_values
        if all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", [None])):
            begins = torch.tensor([[choice[0] for choice in row] for row in choices], device=mask.device)
            first = log_softmax(out.logits[:, -1].float(), -1).gather(1, begins).double()
            cache.batch_repeat_interleave(count)
            later = _continued(model, cache, mask.repeat_interleave(count, 0), flat, pad, adapters)
            return (first - later.view(rows, count)).cpu()
    examples = [Example(0, (*prompts[i // count], *choice), len(prompts[i // count])) for i, choice in enumerate(flat)]
    batch = {key: value.to(model.device) for key, value in collate(examples, pad).items()}
    return -token_losses(model, batch, adapters).double().sum(1).cpu().view(rows, count)


def _continued(model: Model, cache, mask: Tensor, flat: list[list[int]], pad: int, adapters: str | None) -> Tensor:
    """Summed negative log-likelihood of each choice after its first token, (choices,) float64; padded on the right."""
    longest = max(map(len, flat)) - 1
    if not longest:
        return torch.zeros(len(flat), dtype=torch.float64, device=mask.device)
    ids = torch.tensor([(choice[:-1] + [pad] * longest)[:longest] for choice in flat], device=mask.device)
    labels = torch.tensor([(choice[1:] + [IGNORE] * longest)[:longest] for choice in flat], device=mask.device)
    mask = torch.cat([mask, (labels != IGNORE).to(mask.dtype)], 1)
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, adapters=adapters, use_cache=True).logits
    return _likelihoods(logits, labels).double().sum(1)


def _likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihoods, (rows, tokens) float32, 0 where the label is IGNORE."""
    flat = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(labels.shape)


def _only_last(model: Model, count: int) -> dict[str, int]:
    takes = "logits_to_keep" in inspect.signature(model.base.forward).parameters
    return {"logits_to_keep": count} if takes else {}
