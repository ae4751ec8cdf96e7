"""Rows in tokens, and batches of them.

Prompt and completion are tokenised apart and joined, so that the prompt's tokens are those of inference, where no
completion is known. A completion starts with its own space where it needs one. It is followed by the end token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterhub.chat_template import render
from adapterhub.data import Data, Row
from adapterhub.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE = -100
"""The label of a position without loss, as transformers has it."""


@dataclass(frozen=True)
class Example:
    """One row in tokens."""

    line: int
    ids: tuple[int, ...]
    """Prompt, completion, end token."""
    start: int
    """Where the completion begins: loss from there on."""
    reward: float = 0.0
    """Of a scored row's completion."""
    group: int = 0
    """Which row of the file it is of, where a row has several completions."""

    @property
    def targets(self) -> int:
        """How many of its tokens are predicted: the completion's, but of a text not the first."""
        return len(self.ids) - max(self.start, 1)

    @property
    def prompt(self) -> list[int]:
        return list(self.ids[: self.start])

    @property
    def completion(self) -> list[int]:
        """With the end token."""
        return list(self.ids[self.start :])


def encode(data: Data, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> tuple[list[Example], int]:
    """The rows in tokens, each at most max_length long, and how many had to be cut.

    A long row loses the beginning of its prompt, and only then the end of its completion; a text loses its end.
    A scored row gives one example for each of its completions, one after the other (`grouped` puts them together).
    Raises UsageError for a base without tokenizer or end token, DataError for a row the chat template refuses."""
    if tokenizer is None:
        raise UsageError("this base has no tokenizer, so text cannot be read", "give a base folder that holds one")
    if tokenizer.eos_token_id is None:
        raise UsageError("this base's tokenizer has no end token", "set eos_token in its tokenizer_config.json")
    if max_length < 8:
        raise UsageError(f"a maximal length of {max_length} tokens leaves no room for a row", "give at least 8")
    examples, cut = [], 0
    for group, row, reward in _answers(data):
        prompt, completion = tokens(data, row, tokenizer)
        if len(prompt) + len(completion) < 2:
            raise data.fault(row.line, "the tokenizer makes nothing of it", "leave the row out")
        if len(prompt) + len(completion) > max_length:
            cut += 1
            prompt, completion = _shortened(prompt, completion, max_length, tokenizer.bos_token_id)
        examples.append(Example(row.line, tuple(prompt + completion), len(prompt), reward, group))
    return examples, cut


def _answers(data: Data) -> Iterator[tuple[int, Row, float]]:
    """(number of the row, the row with one completion, its reward)."""
    for number, row in enumerate(data.rows):
        if data.kind != "scored":
            yield number, row, 0.0
        for completion, reward in zip(row.completions, row.rewards, strict=True):
            yield number, replace(row, completion=completion), reward


def grouped(examples: Sequence[Example]) -> list[tuple[Example, ...]]:
    """The examples of each row together, in order: what a batch draws where rows have several completions."""
    return [tuple(members) for _, members in groupby(examples, key=lambda example: example.group)]


def tokens(data: Data, row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """A row's prompt, and its completion with the end token. A text has no prompt."""
    end = [tokenizer.eos_token_id]
    if data.kind == "messages":
        prompt, completion = _rendered(data, row, tokenizer)
        return _ids(tokenizer, prompt), _ids(tokenizer, completion) + end
    if data.kind == "text":
        return [], opened(tokenizer, row.completion) + end
    return opened(tokenizer, row.prompt), _ids(tokenizer, row.completion) + end


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def opened(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With what the tokenizer puts before a text (a begin token), without what it may put after it."""
    ids = tokenizer(text)["input_ids"]
    plain = _ids(tokenizer, text)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] != plain[-1:] else ids


def _rendered(data: Data, row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The conversation through the chat template, parted where the last answer begins; the end token left off."""
    if not tokenizer.chat_template:
        raise UsageError(
            "this base's tokenizer has no chat template, so 'messages' cannot be read",
            "write prompt and completion rows",
        )
    try:
        before, whole = render(tokenizer, [(row.messages[:-1], True), (row.messages, False)])
    except DataError as error:
        raise data.fault(row.line, str(error), error.hint) from None
    if not whole.startswith(before):
        raise data.fault(
            row.line,
            "the chat template writes the conversation differently once it is answered",
            "write it as prompt and completion",
        )
    return before, whole[len(before) :].rstrip().removesuffix(tokenizer.eos_token)


def _shortened(prompt: list[int], completion: list[int], length: int, begin: int | None) -> tuple[list[int], list[int]]:
    head = prompt[:1] if begin is not None and prompt[:1] == [begin] else []
    room = length - len(completion)
    if room > len(head):
        return head + prompt[len(prompt) - room + len(head) :], completion
    kept = prompt[-1:]  # the first token of a completion is predicted from something
    return kept, completion[: length - len(kept)]


def check_vocabulary(examples: Iterable[Example], base: PreTrainedModel) -> None:
    """Raise UsageError for tokens that the base has no embedding for: the tokenizer is another model's."""
    highest, size = max(max(example.ids) for example in examples), base.get_input_embeddings().num_embeddings
    if highest >= size:
        raise UsageError(
            f"the tokenizer makes token {highest}, the base knows {size} tokens: they do not belong together",
            "give the base's own tokenizer",
        )


# --- batching ----------------------------------------------------------------------------------------------------


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


def repeated(args: tuple, kwargs: dict, times: int) -> tuple[tuple, dict]:
    """What `generate` is called with, as for each row given `times` times: it need not repeat them any more."""
    if kwargs.get("encoder_outputs") is not None:  # these it does repeat
        return args, kwargs
    rows = {name for name in kwargs if name == "inputs" or name.startswith(("input_", "inputs_", "decoder_"))}
    rows |= {name for name in kwargs if name.endswith("attention_mask")}
    kwargs = {
        name: value.repeat_interleave(times, 0) if name in rows and isinstance(value, Tensor) else value
        for name, value in kwargs.items()
    }
    if args and isinstance(args[0], Tensor):
        args = (args[0].repeat_interleave(times, 0), *args[1:])
    return args, {**kwargs, "num_return_sequences": 1}
