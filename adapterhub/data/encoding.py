"""Rows in tokens.

Prompt and completion are tokenised apart and joined, so that the prompt's tokens are those of inference, where no
completion is known. A completion starts with its own space where it needs one. It is followed by the end token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from adapterhub.data.chat_template import render
from adapterhub.data.rows import Data, Row
from adapterhub.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
