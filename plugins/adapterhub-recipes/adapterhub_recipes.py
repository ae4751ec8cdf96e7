"""Recipes: masked thought, response-only, cocktail, semantic-preserve and NEFTune. Each changes what a training reads, or adds
a term to its loss, with any method; each one's paper stands at its class."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from adapterhub import Recipe, StepContext, TrainingContext
from adapterhub.data import Data
from adapterhub.data.batches import IGNORE, pad_left
from adapterhub.data.encoding import Example, opened
from adapterhub.errors import UsageError


class MaskedThought(Recipe):
    """Some of the completion's tokens are replaced where the model reads them, and all are still to be predicted (Chen et
    al., "Masked Thought", 2024). The prompt and the padding stay."""

    @dataclass(frozen=True)
    class Config:
        p: float = 0.2
        """The probability that a token is replaced, once it has risen (the paper's 0.4 for GSM8K, 0.2 for MetaMath)."""
        rise: float = 2 / 3
        """The share of the steps over which it rises linearly from 0."""
        mask: str = ""
        """The token of the vocabulary that takes the place; "": a random one, each time another."""

        def __post_init__(self) -> None:
            if not 0 < self.p < 1 or not 0 <= self.rise <= 1:
                raise UsageError(
                    f"masked_thought needs 0 < p < 1 and 0 <= rise <= 1, not p {self.p}, rise {self.rise}",
                    "for example --set masked_thought.p=0.4",
                )

    def prepare(self, setting: TrainingContext) -> None:
        super().prepare(setting)
        self.token = None
        if self.config.mask:
            known = setting.model.tokenizer.get_vocab()
            if self.config.mask not in known:
                raise UsageError(
                    f"{self.config.mask!r} is no token of this base",
                    "name one that is, or leave mask out: random tokens",
                )
            self.token = known[self.config.mask]

    def batch(self, batch: Mapping[str, Tensor], moment: StepContext) -> Mapping[str, Tensor]:
        rise = self.config.rise
        p = self.config.p * (min(1.0, moment.progress / rise) if rise else 1.0)
        ids, labels = batch["input_ids"], batch["labels"]
        size = self.setting.model.base.get_input_embeddings().num_embeddings
        chosen = torch.rand(labels.shape, generator=moment.draw) < p
        instead = torch.randint(size, labels.shape, generator=moment.draw) if self.token is None else self.token
        tail = ids[:, ids.shape[1] - labels.shape[1] :]
        replaced = torch.where(chosen.to(ids.device) & (labels != IGNORE), torch.as_tensor(instead).to(tail), tail)
        return {**batch, "input_ids": torch.cat([ids[:, : ids.shape[1] - labels.shape[1]], replaced], 1)}


class ResponseOnly(Recipe):
    """The answers without what they answer: an empty prompt, or user messages without content in the chat template (Hewitt
    et al., "Instruction Following without Instruction Tuning", 2024)."""

    def rows(self, data: Data) -> Data:
        if data.kind not in ("prompt", "messages"):
            raise UsageError(
                f"response_only takes prompts away, and {data.kind!r} rows have none to spare", "leave it out"
            )
        blank = [
            replace(
                row,
                prompt="",
                messages=tuple({**m, "content": ""} if m["role"] == "user" else m for m in row.messages),
            )
            for row in data.rows
        ]
        return replace(data, rows=tuple(blank))


class Cocktail(Recipe):
    """The training data mixed with the run's extra data (Brief et al., "Mixing It Up: The Cocktail Effect of Multi-Task
    Fine-Tuning", 2024). A source that is asked for more rows than it has is gone through again, shuffled anew."""

    @dataclass(frozen=True)
    class Config:
        sources: tuple[str, ...] = ()
        """Names of extra data (`--extra NAME=FILE`); none: all there are."""
        temperature: float = 1.0
        """A source's share is proportional to its rows to the power of 1/temperature: 1 as they are, large: equal."""
        weights: dict[str, float] = field(default_factory=dict)
        """Shares by source instead ("data" is the training data), for all of them."""
        cap: int | None = None
        """A source counts as no larger than this."""
        rows: int | None = None
        """How many rows the mix has; None: as many as the sources together (each up to cap)."""

        def __post_init__(self) -> None:
            counts = all(n is None or n >= 1 for n in (self.cap, self.rows))
            if (
                not counts
                or not 0.01 <= self.temperature < math.inf
                or any(not 0 <= w < 1e9 for w in self.weights.values())
            ):
                raise UsageError(
                    "cocktail needs cap and rows of at least 1, a temperature of at least 0.01 and weights from 0 to below 1e9",
                    "for example --set cocktail.temperature=2",
                )

    def rows(self, data: Data) -> Data:
        if data.kind == "scored":
            raise UsageError("cocktail mixes rows of one answer, and these have several", "mix the files beforehand")
        return data

    def examples(self, examples: Sequence[Example], setting: TrainingContext) -> Sequence[Example]:
        config = self.config
        names = config.sources or tuple(setting.extras)
        if "data" in names:
            raise UsageError(
                "'data' is the training data's own name in a mix", "give the file another: --extra more=FILE"
            )
        sources = {"data": examples} | {name: setting.extra(name, "cocktail mixes it in") for name in names}
        for name, found in sources.items():
            if len({example.group for example in found}) < len(found):
                raise UsageError(
                    f"{name!r} has several answers to a prompt, and cocktail mixes rows of one", "leave it out"
                )
        if len(sources) < 2:
            raise UsageError("cocktail has nothing to mix in", "give other data: --extra general=FILE")
        if config.weights and config.weights.keys() != sources.keys():
            raise UsageError(
                f"cocktail.weights names {', '.join(config.weights)}, the sources are {', '.join(sources)}",
                "weigh each",
            )
        sizes = {name: min(len(found), config.cap or len(found)) for name, found in sources.items()}
        shares = config.weights or {name: size ** (1 / config.temperature) for name, size in sizes.items()}
        self.counts = apportioned(config.rows or sum(sizes.values()), shares)
        draw, mixed = random.Random(setting.seed), []
        for name, found in sources.items():
            left = self.counts[name]
            while left > 0:
                mixed += draw.sample(list(found), min(left, len(found)))
                left -= len(found)
        return mixed

    def found(self) -> Mapping[str, Any]:
        return {"rows": self.counts}


def apportioned(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` in whole parts as near to the shares as can be (largest remainders; among equals the earlier)."""
    whole = sum(shares.values())
    if not whole > 0:
        raise UsageError("all of cocktail's weights are 0", "give one above 0")
    exact = {name: total * share / whole for name, share in shares.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


class SemanticPreserve(Recipe):
    """Adds weight times the mean of 1 - cos(h, h'), h the last hidden state of a phrase with the taught word, h' that of the
    phrase without it in the base as it was (Huang et al., "ClassDiffusion", 2024)."""

    example = {"phrases": {"a zog": "a dog"}}  # noqa: RUF012

    @dataclass(frozen=True)
    class Config:
        phrases: dict[str, str] = field(default_factory=dict)
        """Phrase with the taught word -> phrase that it must not drift from: {"a zog dog": "a dog"}."""
        weight: float = 1.0

        def __post_init__(self) -> None:
            if not self.phrases or not 0 < self.weight < math.inf:
                raise UsageError(
                    "semantic_preserve needs phrases and a weight above 0",
                    """for example --set 'semantic_preserve.phrases={"a zog dog": "a dog"}'""",
                )

    def prepare(self, setting: TrainingContext) -> None:
        super().prepare(setting)
        tokenizer = setting.model.tokenizer
        taught, plain = (
            [opened(tokenizer, text) for text in texts] for texts in zip(*self.config.phrases.items(), strict=True)
        )
        if not all([*taught, *plain]):
            raise UsageError("a phrase of semantic_preserve is empty", "write both in words")
        self.taught = pad_left(taught, setting.pad)
        with setting.model.without_new():
            self.anchor = self._last(*pad_left(plain, setting.pad)).detach()

    def _last(self, ids: Tensor, mask: Tensor) -> Tensor:
        model = self.setting.model
        out = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            output_hidden_states=True,
            use_cache=False,
        )
        return out.hidden_states[-1][:, -1]  # padded on the left: the last token of each is there

    def term(self, batch: Mapping[str, Tensor], moment: StepContext) -> Tensor:
        near = cosine_similarity(self._last(*self.taught).float(), self.anchor.float(), dim=-1)
        return self.config.weight * (1 - near).mean()


class NEFTune(Recipe):
    """Uniform noise on what the embedding puts out while training, alpha/sqrt(L d) at most in each number, L the row's tokens
    and d the width (Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2024)."""

    @dataclass(frozen=True)
    class Config:
        alpha: float = 5.0

        def __post_init__(self) -> None:
            if not 0 < self.alpha < math.inf:
                raise UsageError(f"neftune.alpha is {self.alpha}", "for example --set neftune.alpha=5")

    @contextmanager
    def around(self, moment: StepContext) -> Iterator[None]:
        base, lengths = self.setting.model.base, []

        def counted(module, args, kwargs) -> None:
            mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
            lengths[:] = [ids.new_full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1)]

        def noisy(module, args, output: Tensor) -> Tensor | None:
            if not module.training:  # the reference, a rollout: nothing trains there
                return None
            noise = 2 * torch.rand(output.shape, generator=moment.draw).to(output) - 1
            size = self.config.alpha / (lengths[0] * output.shape[-1]).to(output.dtype).sqrt()
            return output + size.view(-1, 1, 1) * noise

        handles = [
            base.register_forward_pre_hook(counted, with_kwargs=True),
            base.get_input_embeddings().register_forward_hook(noisy),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
