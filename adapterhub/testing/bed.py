"""The bed the laws are tried on: a tiny random Llama with grouped queries, padded batches, and cached decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterhub.adapter import Modifications, bind
from adapterhub.attach import Attachment, Plan
from adapterhub.modification import Modification
from adapterhub.plan import build, placed
from adapterhub.sites import sites


def tiny_llama(seed: int = 0, vocabulary: int = 96, **changes):
    """A random Llama of 2 layers, width 32, 4 heads over 2 key-value heads; float32, eval."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def random_adapter(form: type[Modification], model: torch.nn.Module, seed: int) -> Modifications:
    """One of the form at every site that suits it (the head left alone), in the model's dtype and on its device."""
    torch.manual_seed(seed)
    at = {site.path: site for site in sites(model)}
    made = {path: form.random(site) for path, site in at.items() if site.role != "head"}
    adapter = {path: [m.to(model.device, model.dtype)] for path, m in made.items() if m is not None}
    for path, (modification,) in adapter.items():
        bind(modification, at[path], model)
    return adapter


def plan(attachment: Attachment, rows: Sequence[Modifications], count: int | None = None, trains: bool = False) -> Plan:
    """What a batch of these rows runs (count None: one program for any batch)."""
    distinct = {id(row): placed(row, sites(attachment.base)) for row in rows}
    return build([distinct[id(row)] for row in rows], count, object(), trains)


def padded(sequences: Sequence[Tensor], side: str, width: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of ids as (ids, mask), both (rows, tokens), padded on the "left" or "right"."""
    width = max(width, *map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long, device=sequences[0].device)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask


@torch.no_grad()
def logits(
    attachment: Attachment, rows: Sequence[Modifications], sequences: Sequence[Tensor], side: str
) -> list[Tensor]:
    """One padded batch, row i running rows[i]: the logits of each row's real tokens, (tokens, vocabulary)."""
    ids, mask = padded(sequences, side)
    with attachment.running(plan(attachment, rows, len(rows))):
        out = attachment.base(input_ids=ids, attention_mask=mask).logits
    return [out[row][mask[row].bool()] for row in range(len(rows))]


@torch.no_grad()
def alone(attachment: Attachment, adapter: Modifications, sequence: Tensor) -> Tensor:
    """The reference: one sequence, unpadded, without a mask. (tokens, vocabulary)"""
    with attachment.running(plan(attachment, [adapter])):
        return attachment.base(input_ids=sequence[None]).logits[0]


@torch.no_grad()
def decoded(
    attachment: Attachment, rows: Sequence[Modifications], sequences: Sequence[Tensor], side: str, steps: int
) -> list[Tensor]:
    """The same logits, by a padded prefill of all but the last `steps` tokens and then one cached step for each."""
    ids, mask = padded([s[:-steps] for s in sequences], side)
    last = torch.stack([s[-steps:] for s in sequences])
    with attachment.running(plan(attachment, rows, len(rows))):
        out = attachment.base(input_ids=ids, attention_mask=mask, use_cache=True)
        pieces = [[out.logits[row][mask[row].bool()]] for row in range(len(rows))]
        for k in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            out = attachment.base(
                input_ids=last[:, k : k + 1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
            )
            for row, piece in enumerate(pieces):
                piece.append(out.logits[row])
    return [torch.cat(piece) for piece in pieces]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest of b."""
    return ((a - b).abs().max() / b.abs().max()).item()
