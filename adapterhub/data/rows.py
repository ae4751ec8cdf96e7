"""Training and evaluation data: JSON Lines as TRL reads it. No torch.

Four kinds of rows, one kind to a file; other keys (an id, a source) are ignored:

    {"prompt": "2 + 2 =", "completion": " 4"}                                  loss on the completion
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
                                                                               loss on the last answer
    {"text": "a whole document"}                                               loss on every token
    {"prompt": "2 + 2 =", "completions": [" 4", " 5"], "rewards": [1, 0]}      several answers and how good each is, for
                                                                               objectives that learn from that

The last answer only, because it is the one place where what precedes it is exactly what the model sees when it is
asked: several chat templates write earlier turns differently once they are past. To train on all answers of a
conversation, write one row for each.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub.errors import DataError, NotFound

KINDS = {
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "scored": ("prompt", "completions", "rewards"),
}
"""The keys of each kind of row."""


@dataclass(frozen=True)
class Row:
    """One line of a file, as it says it."""

    line: int
    """From 1."""
    prompt: str = ""
    completion: str = ""
    """The answer, or the whole text."""
    messages: tuple[dict[str, Any], ...] = ()
    completions: tuple[str, ...] = ()
    rewards: tuple[float, ...] = ()

    @property
    def answer(self) -> str:
        """What is to be learned, as the file writes it."""
        return self.messages[-1]["content"] if self.messages else self.completion

    def answered(self, text: str) -> Row:
        """The same row with another answer."""
        if self.messages:
            return replace(self, messages=(*self.messages[:-1], {**self.messages[-1], "content": text}))
        return replace(self, completion=text)


@dataclass(frozen=True)
class Data:
    """A file of rows, read and checked."""

    path: Path
    digest: str
    """Of the file's bytes, "sha256:<64 hex>"."""
    kind: str
    """"prompt", "messages", "text" or "scored"."""
    rows: tuple[Row, ...]

    def first(self, limit: int | None) -> Data:
        """The same with only the first rows."""
        return self if limit is None else replace(self, rows=self.rows[:limit])

    def fault(self, line: int, problem: str, hint: str) -> DataError:
        return DataError(f"{self.path}, line {line}: {problem}", hint)


def read(path: str | Path) -> Data:
    """A file's rows. Raises NotFound, or DataError with the line of the first row that is malformed."""
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no data file at {path}", "give a JSON Lines file, one row a line")
    content = path.read_bytes()
    data = Data(path, "sha256:" + hashlib.sha256(content).hexdigest(), "", ())
    rows: list[Row] = []
    kind = ""
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        value = _object(data, line, raw)
        found = _kind(data, line, value)
        if kind and found != kind:
            raise data.fault(line, f"a {found!r} row among {kind!r} rows", "one kind of row to a file; split it")
        kind = found
        rows.append(_row(data, line, kind, value))
    if not rows:
        raise DataError(f"{path} has no rows", 'write one JSON object a line: {"prompt": "...", "completion": "..."}')
    return Data(path, data.digest, kind, tuple(rows))


def _object(data: Data, line: int, raw: bytes) -> dict:
    example = 'a line is one object: {"prompt": "...", "completion": "..."}'
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise data.fault(line, f"not UTF-8 (byte {error.start + 1})", "save the file as UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise data.fault(line, f"not JSON: {error.msg} at character {error.colno}", example) from None
    except (ValueError, RecursionError) as error:
        raise data.fault(line, f"not JSON: {error}", example) from None
    if not isinstance(value, dict):
        raise data.fault(line, "not a JSON object", example)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _kind(data: Data, line: int, value: dict) -> str:
    given = value.keys() - {"prompt"} if "completions" in value or "rewards" in value else value.keys()
    kinds = [
        kind for kind, keys in KINDS.items() if any(key in given for key in keys if kind != "scored" or key != "prompt")
    ]
    hint = "a row has prompt and completion, or messages, or text, or prompt, completions and rewards"
    if len(kinds) != 1:
        what = f"{' and '.join(kinds)} in one row" if kinds else f"no text in it, only {sorted(value)[:5]}"
        raise data.fault(line, what, hint)
    missing = [key for key in KINDS[kinds[0]] if key not in value]
    if missing:
        raise data.fault(line, f"no {missing[0]!r}", hint)
    return kinds[0]


def _row(data: Data, line: int, kind: str, value: dict) -> Row:
    if kind == "messages":
        return Row(line, messages=_messages(data, line, value["messages"]))
    if kind == "scored":
        return _scored(data, line, value)
    for key in KINDS[kind]:
        _check_text(data, line, key, value[key])
    completion = value[KINDS[kind][-1]]
    if not completion.strip():
        raise data.fault(line, f"{KINDS[kind][-1]!r} is empty", "there is nothing to learn from it; leave the row out")
    return Row(line, prompt=value.get("prompt", "") if kind == "prompt" else "", completion=completion)


def _scored(data: Data, line: int, value: dict) -> Row:
    completions, rewards = value["completions"], value["rewards"]
    if (
        not isinstance(completions, list)
        or not isinstance(rewards, list)
        or len(completions) != len(rewards)
        or not rewards
    ):
        raise data.fault(
            line, "'completions' and 'rewards' are not two lists of one length", '"completions": [" 4"], "rewards": [1]'
        )
    for key, text in (("prompt", value["prompt"]), *(("completions", text) for text in completions)):
        _check_text(data, line, key, text)
    if not all(text.strip() for text in completions):
        raise data.fault(line, "a completion is empty", "leave it out, with its reward")
    for reward in rewards:
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) < 1e30:
            raise data.fault(
                line, f"the reward {str(reward)[:40]} is no number of a sane size", "for example 1 or -0.5"
            )
    return Row(line, prompt=value["prompt"], completions=tuple(completions), rewards=tuple(map(float, rewards)))


def _messages(data: Data, line: int, messages: object) -> tuple[dict[str, Any], ...]:
    hint = 'messages are [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise data.fault(line, "'messages' is not a list of objects", hint)
    for message in messages:
        for key in ("role", "content"):
            if key not in message:
                raise data.fault(line, f"a message has no {key!r}", hint)
            _check_text(data, line, key, message[key])
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise data.fault(line, "the messages do not end with the assistant's answer to something", hint)
    if not messages[-1]["content"].strip():
        raise data.fault(line, "the last answer is empty", "there is nothing to learn from it; leave the row out")
    return tuple(messages)


def _check_text(data: Data, line: int, key: str, value: object) -> None:
    if not isinstance(value, str):
        raise data.fault(
            line, f"{key!r} is {type(value).__name__}, not text", "write text; a conversation goes into messages"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise data.fault(line, f"{key!r} holds half of a character pair (a lone surrogate)", "remove it") from None
