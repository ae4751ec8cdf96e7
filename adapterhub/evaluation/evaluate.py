"""How good a model is on data: loss, exact match and label accuracy, row by row, with 95 % intervals."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapterhub.bases.device import memory_told
from adapterhub.data import Data, Row
from adapterhub.data import read as read_rows
from adapterhub.data.batches import collate, pad_left, pad_token
from adapterhub.data.encoding import Example, check_vocabulary, encode, tokens
from adapterhub.errors import DataError, UsageError
from adapterhub.evaluation.intervals import wilson
from adapterhub.runtime.scoring import label_scores, token_losses
from adapterhub.store.releases import Releases

if TYPE_CHECKING:
    from adapterhub.runtime.model import Model

METRICS = ("loss", "exact", "label")
MOST_LABELS = 50


def evaluate(
    hub: Releases | None,
    expression: str | None,
    base: object,
    data: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 16,
    max_length: int = 1024,
    limit: int | None = None,
    force: bool = False,
    model: Model | None = None,
) -> dict[str, Any]:
    """Measure an expression (None: the bare base) on the first `limit` rows of a file.

    dtype: float32, bfloat16, float16, "stored" or "auto" (adapterhub.bases.device). force: measure adapters that were made for
    another base. model: one that is loaded already; then base, device, dtype and force are not used, and the expression
    None means what that model runs by default.

    metrics, all that the data allow unless named:

    loss    mean negative log-likelihood per completion token (the end token is one), in nats
    exact   share of rows whose greedy answer ends and equals the completion, both decoded and stripped
    label   share of rows where the completion has the highest log-probability, summed over its tokens and not
            normalised by its length, among the labels: those given, or the distinct completions of the data, if there
            are 2 to 50 and each stands on two rows on average. The end token counts only where one label begins
            another. So a base that has never seen the format is asked what it knows, not how it writes.

    Returns {"data", "n", "loss", "tokens", "exact", "exact_interval", "label", "label_interval", "labels", "truncated",
    "rows"}: the intervals are Wilson's (1927); rows hold each row's "line" and its part of each metric, for `paired`.
    Raises NotFound, DataError, UsageError, IncompatibleBase."""
    read = read_rows(data)
    if (limit is not None and limit < 1) or batch_size < 1:
        raise UsageError(f"{limit} rows in batches of {batch_size} are none", "give at least 1")
    read = read.first(limit)
    wanted, labels = _plan(read, metrics, labels)
    if model is None:
        from adapterhub.runtime.model import load

        model, expression = load(hub, base, expression, dtype=dtype, device=device, force=force), None
    examples, cut = encode(read, model.tokenizer, max_length)
    check_vocabulary(examples, model.base)
    model.context.check_rows(examples, model.advance(expression))
    result: dict[str, Any] = {"data": read.digest, "n": len(examples), "truncated": cut}
    rows: list[dict[str, Any]] = [{"line": example.line} for example in examples]
    measured = _Measured(model, expression, read, examples, batch_size, rows)
    training = model.base.training
    model.training_mode(False)
    try:
        with torch.no_grad(), memory_told("a smaller batch size"):
            for metric in METRICS:
                if metric in wanted:
                    result |= getattr(measured, metric)(*([labels] if metric == "label" else []))
    finally:
        model.training_mode(training)
    return result | {"rows": rows}


def _plan(data: Data, metrics: Sequence[str] | None, labels: Sequence[str] | None) -> tuple[set[str], list[str]]:
    """Which metrics these data allow, and the labels."""
    for name in metrics or ():
        if name not in METRICS:
            raise UsageError(f"unknown metric {name!r}", f"one of: {', '.join(METRICS)}")
    if data.kind == "scored":
        raise UsageError(f"{data.path} holds several answers to a prompt", "evaluate on rows of prompt and completion")
    if data.kind == "text":
        if labels or set(metrics or ()) - {"loss"}:
            raise UsageError(f"{data.path} holds texts, which have no answers", "only their loss can be measured")
        return {"loss"}, []
    found = sorted({row.answer for row in data.rows})
    if labels is not None:
        allowed = list(dict.fromkeys(labels))
        if len(allowed) < 2 or not all(label.strip() for label in allowed):
            raise UsageError(f"{allowed} leaves nothing to choose", "give all the labels that are allowed")
        for row in data.rows:
            if row.answer not in allowed:
                hint = "give every label as the completions write it, spaces included"
                raise data.fault(row.line, f"{row.answer!r} is none of the labels {allowed}", hint)
    else:
        allowed = found if 2 <= len(found) <= min(MOST_LABELS, len(data.rows) // 2) else []
        if not allowed and "label" in (metrics or ()):
            raise DataError(
                f"{data.path} has {len(found)} distinct answers in {len(data.rows)} rows, which are no labels",
                "give the allowed labels",
            )
    return set(metrics or METRICS) - (set() if allowed else {"label"}), allowed


@dataclass
class _Measured:
    """One evaluation; each metric fills its part of `rows` and returns its part of the result."""

    model: Model
    adapters: str | None
    data: Data
    examples: list[Example]
    size: int
    rows: list[dict[str, Any]]

    def loss(self) -> dict[str, Any]:
        pad, total, count = pad_token(self.model.tokenizer), 0.0, 0
        for places in self._batches("loss", self.size):
            examples = [self.examples[i] for i in places]
            batch = {key: value.to(self.model.device) for key, value in collate(examples, pad).items()}
            losses = token_losses(self.model, batch, self.adapters).double().sum(1).tolist()
            for place, example, loss in zip(places, examples, losses, strict=True):
                self.rows[place]["loss"] = loss / example.targets
                total, count = total + loss, count + example.targets
        return {"loss": total / count, "tokens": count}

    def exact(self) -> dict[str, Any]:
        self._need_prompts()
        tokenizer, pad = self.model.tokenizer, pad_token(self.model.tokenizer)
        ends = self.model.base.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        for places in self._within(self._batches("exact match", self.size)):
            examples = [self.examples[i] for i in places]
            ids, mask = pad_left([example.prompt for example in examples], pad)
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                adapters=self.adapters,
                max_new_tokens=max(len(example.completion) for example in examples),
                do_sample=False,
                pad_token_id=pad,
            )
            for place, example, new in zip(places, examples, out[:, ids.shape[1] :].tolist(), strict=True):
                new = new[: len(example.completion)]  # its own budget, whatever rows it shares a batch with
                length = next((i for i, token in enumerate(new) if token in ends), None)
                text, wanted = (
                    tokenizer.decode(x, skip_special_tokens=True) for x in (new[:length], example.completion)
                )
                self.rows[place] |= {"exact": length is not None and text.strip() == wanted.strip(), "output": text}
        return self._share("exact")

    def label(self, labels: list[str]) -> dict[str, Any]:
        self._need_prompts()
        choices = [self._choices(row, labels) for row in self.data.rows]
        for places in self._batches("label accuracy", max(1, min(self.size, 128 // len(labels)))):
            prompts = [self.examples[i].prompt for i in places]
            scores = label_scores(self.model, prompts, [choices[i] for i in places], self.adapters)
            for place, best in zip(places, scores.argmax(1).tolist(), strict=True):
                answer = self.data.rows[place].answer
                self.rows[place] |= {"label": labels[best] == answer, "predicted": labels[best], "answer": answer}
        return self._share("label") | {"labels": labels}

    def _choices(self, row: Row, labels: list[str]) -> list[list[int]]:
        """Each label in tokens."""
        ended = [tokens(self.data, row.answered(label), self.model.tokenizer)[1] for label in labels]
        bare = [choice[:-1] for choice in ended]
        begins = any(a == b[: len(a)] for i, a in enumerate(bare) for j, b in enumerate(bare) if i != j)
        return ended if begins else bare

    def _need_prompts(self) -> None:
        for example in self.examples:
            if not example.start:
                raise self.data.fault(
                    example.line, "the prompt is empty", "an answer needs a question; leave the row out"
                )

    def _batches(self, what: str, size: int) -> Iterator[list[int]]:
        """Places of rows of like length, the longest first: what does not fit in memory fails at once."""
        from rich.console import Console
        from rich.progress import track

        order = sorted(range(len(self.examples)), key=lambda i: -len(self.examples[i].ids))
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        yield from track(batches, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def _within(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """A batch in single rows where one row's prompt and another's answer would pass the positions that the base has."""
        for places in batches:
            both = [(len(self.examples[i].prompt), len(self.examples[i].completion)) for i in places]
            longest = sum(map(max, zip(*both, strict=True)))
            fits = longest + self.model.advance(self.adapters) <= (self.model.context.learned or math.inf)
            yield from [places] if fits else [[place] for place in places]

    def _share(self, metric: str) -> dict[str, Any]:
        right = sum(row[metric] for row in self.rows)
        return {metric: right / len(self.rows), f"{metric}_interval": wilson(right, len(self.rows))}
