"""Rows of tokens as one batch: padded, with labels and weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterhub.data.encoding import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a position without loss, as transformers has it."""


def pad_left(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(rows, longest) int64 ids with the padding before them, and the mask, 1 where a token stands."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask


def collate(examples: Iterable[Example | Sequence[Example]], pad: int) -> dict[str, Tensor]:
    """A batch padded on the left, so that the answers lie at the end and the head is needed only there.

    input_ids, attention_mask (rows, tokens); labels (rows, answer): the tokens that the last `answer` positions
    but the very last predict, IGNORE where there is no loss; answer is the longest completion's length. Of groups of
    examples also reward (rows,) float32 and group (rows,) int64."""
    examples = list(examples)
    if examples and not isinstance(examples[0], Example):
        flat = [example for group in examples for example in group]
        told = {
            "reward": torch.tensor([example.reward for example in flat]),
            "group": torch.tensor([example.group for example in flat]),
        }
        return collate(flat, pad) | told
    ids, mask = pad_left([example.ids for example in examples], pad)
    counts = [example.targets for example in examples]
    labels = ids[:, ids.shape[1] - max(counts) :].clone()
    for row, count in enumerate(counts):
        labels[row, : labels.shape[1] - count] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token does, since padding is masked."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
