"""Editing with canonical examples: one simple example of each behaviour, general text held still, and the change of a small
model carried to a larger one (Hewitt et al., "Model Editing with Canonical Examples", 2024).

The objective `canonical`; `within`, the largest weight of an edit inside a budget of drift; `Carried`, the larger model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutput

from adapterhub import Model, Objective, StepContext, TrainingContext, token_losses
from adapterhub.data import read
from adapterhub.data.batches import IGNORE, pad_token
from adapterhub.data.encoding import encode
from adapterhub.errors import IncompatibleBase, UsageError

LOSSES = {
    "good": lambda good, bad: good,
    "bad": lambda good, bad: -bad,
    "good_vs_bad": lambda good, bad: good - bad,
    "balance": lambda good, bad: (good - bad).abs(),
}
"""Of a row's mean losses per token on its good and on its bad completions."""
HELD_OUT = 5
"""Every fifth row of the background is not trained on."""
WEIGHTS = tuple(n / 10 for n in range(10, 0, -1))


def edit_loss(losses: Tensor, group: Tensor, reward: Tensor, kind: str) -> Tensor:
    """() the mean over rows. losses (mean per token), group (which row), reward (above 0: good, below: bad): each (completions,)."""
    names, row = group.unique(return_inverse=True)

    def side(chosen: Tensor) -> Tensor:
        total, count = (
            losses.new_zeros(len(names)).index_add(0, row, value) for value in (losses * chosen, 1.0 * chosen)
        )
        return total / count.clamp(min=1)

    return LOSSES[kind](side(reward > 0), side(reward < 0)).mean()


def divergence(model: Model, batch: Mapping[str, Tensor]) -> Tensor:
    """() KL(base || model) in nats, the mean over the batch's labels; base is what lies beneath the adapter."""

    def predicted() -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return log_softmax(logits[:, -batch["labels"].shape[1] - 1 : -1].float(), -1)

    with model.without_new():
        reference = predicted()
    real = batch["labels"] != IGNORE
    return (kl_div(predicted(), reference, reduction="none", log_target=True).sum(-1) * real).sum() / real.sum()


class Canonical(Objective):
    """The loss of the examples + weight * KL(base || model) on random general text, so that little else moves."""

    kinds = ("scored", "prompt")
    extras = ("background",)

    @dataclass(frozen=True)
    class Config:
        loss: str = "good"
        """good, bad, good_vs_bad or balance (both sides equally likely). A completion is good or bad by the sign of its
        reward; those of prompt rows are good."""
        weight: float = 1.0
        """Of the divergence on general text."""
        rows: int = 8
        """Rows of general text at each step."""
        budget: float = 1e-3
        """By how much the loss on general text may grow, as a share of it. It is measured at the end and told, not forced:
        `within` finds the weight at which it holds."""

        def __post_init__(self) -> None:
            if self.loss not in LOSSES:
                raise UsageError(f"unknown canonical.loss {self.loss!r}", f"one of: {', '.join(LOSSES)}")
            if not (0 <= self.weight < math.inf and 0 <= self.budget < math.inf and self.rows >= 1):
                raise UsageError(
                    f"canonical.weight {self.weight} and canonical.budget {self.budget} must be 0 or more, canonical.rows {self.rows} 1 or more",
                    "for example --set canonical.weight=1 --set canonical.budget=0.001",
                )

    def prepare(self, setting: TrainingContext) -> None:
        """Raises UsageError for rows without the completions that the loss compares, and too little general text."""
        super().prepare(setting)
        for row in setting.examples:
            rewards = [example.reward for example in row] if isinstance(row, tuple) else [1.0]
            line = row[0].line if isinstance(row, tuple) else row.line
            if 0 in rewards:
                raise UsageError(
                    f"line {line}: a completion of reward 0 is neither good nor bad", "give 1 or -1, or leave it out"
                )
            lacks = [
                side
                for side, here in (("good", max(rewards) > 0), ("bad", min(rewards) < 0))
                if not here and self.config.loss in (side, "good_vs_bad", "balance")
            ]
            if lacks:
                raise UsageError(
                    f"line {line} has no {lacks[0]} completion, and the loss {self.config.loss!r} needs one",
                    'for example {"prompt": "...", "completions": [" yes", " no"], "rewards": [1, -1]}',
                )
        background = setting.extra("background", "it is to stay as likely as it is")
        self.held_out = background[::HELD_OUT]
        self.general = [example for n, example in enumerate(background) if n % HELD_OUT]
        if len(background) < 2:
            raise UsageError(
                f"the background has {len(background)} row, and every {HELD_OUT}th is held out",
                "give more general text",
            )

    def loss(self, batch: Mapping[str, Tensor], moment: StepContext) -> Tensor:
        model, labels = self.setting.model, batch["labels"]
        losses = token_losses(model, batch).sum(1) / (labels != IGNORE).sum(1)
        everyone = torch.arange(len(losses), device=losses.device)
        group, reward = batch.get("group", everyone), batch.get("reward", torch.ones_like(losses))
        loss = edit_loss(losses, group, reward, self.config.loss)
        if self.config.weight:
            drawn = torch.randperm(len(self.general), generator=moment.draw)[: self.config.rows].tolist()
            loss = loss + self.config.weight * divergence(model, self.setting.batch([self.general[n] for n in drawn]))
        return loss

    def found(self) -> Mapping[str, Any]:
        """The loss per token on the general text held out, before and after; the drift, after / before - 1, and whether it
        is inside the budget."""
        model, batches = self.setting.model, list(self.setting.batches(self.held_out))
        with model.without_new():
            before = general_loss(model, batches)
        with torch.no_grad():
            after = general_loss(model, batches)
        drift = after / before - 1
        return {"before": before, "after": after, "drift": drift, "inside": drift <= self.config.budget}


def general_loss(model: Model | Carried, batches: Iterable[Mapping[str, Tensor]], adapters: str | None = None) -> float:
    """The mean negative log-likelihood per label of batches of `collate`, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        total += token_losses(model, batch, adapters).double().sum().item()
        count += (batch["labels"] != IGNORE).sum().item()
    return total / count


@torch.no_grad()
def within(model: Model | Carried, background: str | Path, budget: float, expression: str | None = None) -> float:
    """The first weight of 1.0, 0.9, ... 0.1 at which the loss on a file of general text is at most (1 + budget) times what it
    is at weight 0; 0.0 if there is none.

    expression: what is weighed on a Model (`w*(expression)`); of a Carried it is its own weight."""
    if isinstance(model, Carried) == (expression is not None) or not 0 <= budget < math.inf:
        raise UsageError(
            f"a budget of {budget} for {expression!r} on a {type(model).__name__}",
            "give a budget of 0 or more; an expression for a Model, and none for a Carried, which has its own",
        )
    big = model.big if isinstance(model, Carried) else model
    examples, _ = encode(read(background), big.tokenizer, 1024)
    batches = list(TrainingContext(big, examples, pad_token(big.tokenizer)).batches(examples))

    def at(weight: float) -> float:
        if isinstance(model, Carried):
            return general_loss(replace(model, weight=weight), batches)
        return general_loss(model, batches, f"{weight!r}*({expression})")

    most = (1 + budget) * at(0.0)
    return next((weight for weight in WEIGHTS if at(weight) <= most), 0.0)


@dataclass(frozen=True)
class Carried:
    """A large model with the change of a small one on it: its logits + weight * (log softmax of the small one with its adapters
    - log softmax of the small one without). The small model is in memory once and runs both as rows of one batch.

    Raises UsageError for one model twice and for encoder-decoders, IncompatibleBase for unlike tokenizers."""

    big: Model
    """With what it runs by default."""
    small: Model
    adapters: str
    """One expression for all rows, on the small one."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.big.base is self.small.base:
            raise UsageError("both models are one", "weigh its adapters in an ensemble: logits(base + a - b)")
        if self.big.base.config.is_encoder_decoder or self.small.base.config.is_encoder_decoder:
            raise UsageError("an encoder-decoder carries nothing", "use models that go on with a text")
        _check_tokenizers(self.big, self.small)
        self.small.keeps_state(self.adapters)  # plans it: what does not fit is refused here, not at the first call

    @property
    def base(self):
        """The large model's."""
        return self.big.base

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, adapters: str | None = None, **options
    ) -> CausalLMOutput:
        """The forward pass; the logits are at `.logits`, (rows, tokens, the large model's vocabulary).

        adapters: what is carried, instead. options: use_cache and logits_to_keep, for both models; it returns no cache."""
        if unknown := sorted(options.keys() - {"use_cache", "logits_to_keep"}):
            raise UsageError(f"a carried forward pass takes no {unknown[0]}", "call generate, which keeps both caches")
        logits = self.big(input_ids=input_ids, attention_mask=attention_mask, **options).logits
        change, _ = self._change(input_ids, attention_mask, adapters or self.adapters, **options)
        return CausalLMOutput(logits=self._added(logits, change))

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, adapters: str | None = None, logits_processor=(), **options
    ) -> Tensor:
        """transformers' generate, padded on the left. Both models keep a key-value cache. Penalties act on the large
        model's own logits, before the change is added; temperature, top_k and top_p on the sum.

        adapters: what is carried, instead."""
        adds = _Adds(self, attention_mask, adapters or self.adapters)
        processors = LogitsProcessorList([adds, *logits_processor])
        return self.big.generate(
            input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors, **options
        )

    def _change(self, ids: Tensor, mask: Tensor, adapters: str, **options) -> tuple[Tensor, Any]:
        """log softmax with the adapters - log softmax without, (rows, tokens, vocabulary), and the cache."""
        ids, mask = (tensor.to(self.small.device).repeat(2, 1) for tensor in (ids, mask))
        lanes = [adapters] * (len(ids) // 2) + [None] * (len(ids) // 2)
        out = self.small(input_ids=ids, attention_mask=mask, adapters=lanes, **options)
        tuned, plain = out.logits.to(_wide(out.logits)).log_softmax(-1).chunk(2)
        return tuned - plain, getattr(out, "past_key_values", None)

    def _added(self, logits: Tensor, change: Tensor) -> Tensor:
        """In the logits' dtype. An id that the small model has not is padding of the vocabulary, and becomes impossible."""
        shared = min(logits.shape[-1], change.shape[-1])
        total = logits.to(_wide(logits), copy=True)
        total[..., :shared] += self.weight * change[..., :shared].to(total)
        total[..., shared:] = -math.inf
        return total.to(logits.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Adds(LogitsProcessor):
    """Adds the small model's change at each token of one `generate`."""

    def __init__(self, carried: Carried, mask: Tensor, adapters: str):
        self.carried, self.mask, self.adapters = carried, mask, adapters
        self.seen: Tensor | None = None
        """The ids that the cache holds."""
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = self.mask.repeat_interleave(len(input_ids) // len(self.mask), 0)  # num_return_sequences
        mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], 1)
        known = 0
        if self.seen is not None and self.seen.shape[1] < input_ids.shape[1]:
            known = self.seen.shape[1] if torch.equal(input_ids[:, : self.seen.shape[1]], self.seen) else 0
        if not known:  # the first call, or tokens were taken back, as in assisted decoding
            self.cache = None
        options = {"past_key_values": self.cache, "use_cache": True}
        change, self.cache = self.carried._change(input_ids[:, known:], mask, self.adapters, **options)
        self.seen = input_ids
        return self.carried._added(scores, change[:, -1])


def _check_tokenizers(big: Model, small: Model) -> None:
    """Raises UsageError where one has none, IncompatibleBase unless both make the same tokens of a text."""
    if big.tokenizer is None or small.tokenizer is None:
        raise UsageError("a model without its tokenizer", "load both from folders that hold one")
    one, other = big.tokenizer.get_vocab(), small.tokenizer.get_vocab()
    unlike = sorted((one.items() ^ other.items()), key=lambda entry: entry[1])
    prints = [model.fingerprint.base.tokenizer for model in (big, small) if model.fingerprint is not None]
    if unlike or len(set(filter(None, prints))) > 1:
        what = (
            f"token {unlike[0][1]} is {unlike[0][0]!r} in only one of them" if unlike else "they split text differently"
        )
        raise IncompatibleBase(
            f"the two models have unlike tokenizers: {what}, so the change of one means nothing to the other",
            "carry between models of one family, which share a tokenizer",
        )
