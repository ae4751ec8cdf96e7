"""Reinforced fine-tuning: answers are sampled, a verifier says which are right, and PPO learns from that (Luong et al.,
"ReFT: Reasoning with Reinforced Fine-Tuning", ACL 2024). One objective, `rft_ppo`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub import Objective, StepContext, TrainingContext, Verdict, plugins, token_losses
from adapterhub.data.batches import IGNORE, pad_left
from adapterhub.errors import UsageError
from adapterhub.kinds.contracts import make
from adapterhub.runtime.model import Model

GAMMA, LAMBDA, CLIP, VALUE = 1.0, 0.95, 0.2, 5 * 0.5
"""The paper's discount, GAE's lambda, the clip of ratio and value, and the value loss's weight."""


# --- PPO's arithmetic: all (rows, tokens), a row's real tokens first -------------------------------------------------


def gae(rewards: Tensor, values: Tensor, real: Tensor, gamma: float = GAMMA, lam: float = LAMBDA) -> Tensor:
    """Generalised advantages (Schulman et al., 2016): Σₖ (γλ)ᵏ δₜ₊ₖ with δₜ = rₜ + γVₜ₊₁ - Vₜ; 0 where no token is real.

    values: V before each token; after the last it is 0, whether the answer ended or was cut."""
    advantages, ahead, following = torch.zeros_like(rewards), rewards.new_zeros(len(rewards)), rewards.new_zeros(())
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        ahead = advantages[:, t] = real[:, t] * (delta + gamma * lam * ahead)
        following = real[:, t] * values[:, t]
    return advantages


def whitened(advantages: Tensor, real: Tensor) -> Tensor:
    """With mean 0 and variance 1 over the real tokens of the batch; 0 elsewhere."""
    chosen = advantages[real]
    return (advantages - chosen.mean()) * (chosen.var(correction=0) + 1e-8).rsqrt() * real


def per_answer(losses: Tensor, real: Tensor) -> Tensor:
    """(rows,) the mean over each answer's real tokens."""
    return (losses * real).sum(1) / real.sum(1)


def ppo_loss(
    new: Tensor, old: Tensor, values: Tensor, old_values: Tensor, advantages: Tensor, returns: Tensor, real: Tensor
) -> Tensor:
    """() the clipped policy loss and 2.5 times the clipped squared error of the values (Schulman et al., 2017), averaged over
    each answer's tokens, then over answers. new, old: the tokens' log-probabilities under the policy now and at the rollout."""
    ratio = (new - old).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    near = old_values + (values - old_values).clamp(-CLIP, CLIP)
    value = torch.maximum((values - returns).square(), (near - returns).square())
    return per_answer(policy + VALUE * value, real).mean()


# --- answers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sampled(
    model: Model, prompts: Sequence[Sequence[int]], pad: int, end: int, count: int, draw: torch.Generator
) -> Tensor:
    """One answer to each prompt from the model's own probabilities (temperature 1, all tokens): (rows, at most `count`)
    int64 on the model's device, the end token included and IGNORE after it. draw: on the CPU."""
    ids, mask = (tensor.to(model.device) for tensor in pad_left(prompts, pad))
    takes = "logits_to_keep" in inspect.signature(model.base.forward).parameters
    out = model(input_ids=ids, attention_mask=mask, use_cache=True, **({"logits_to_keep": 1} if takes else {}))
    answer: list[Tensor] = []
    going = torch.ones(len(prompts), 1, dtype=torch.bool, device=model.device)
    while True:
        chances = out.logits[:, -1].float().softmax(-1).cpu()
        token = torch.multinomial(chances, 1, generator=draw).to(model.device)
        answer.append(token.where(going, IGNORE))
        going = going & (token != end)
        if len(answer) == count or not going.any():
            return torch.cat(answer, 1)
        mask = torch.cat([mask, torch.ones_like(token)], 1)  # what an ended row goes on with is not looked at
        out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """No dropout inside, so that the policy that learns is the one that answered."""
    before = model.base.training
    model.training_mode(False)
    try:
        yield
    finally:
        model.training_mode(before)


@dataclass(frozen=True)
class Rollout:
    """A batch of sampled answers and what PPO keeps of the moment they were sampled in."""

    batch: Mapping[str, Tensor]
    """Prompts padded on the left, answers after them, as `token_losses` reads it."""
    right: Tensor
    """(rows,) bool: the verifier's reward is 1."""
    old: Tensor
    """Log-probabilities (rows, tokens); so are the rest."""
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def real(self) -> Tensor:
        return self.batch["labels"] != IGNORE


class RFTPPO(Objective):
    """PPO on answers sampled to the data's prompts. The reward, at an answer's last token, is the verifier's; each token pays
    kl_coef (log pi - log pi_ref). pi_ref is what lies beneath the adapter: with `--on me/warmup`, the warm-up."""

    kinds = ("prompt", "messages")
    samples = True
    example = {"max_new_tokens": 8}  # noqa: RUF012

    @dataclass(frozen=True)
    class Config:
        max_new_tokens: int = 64
        """An answer that has not ended by then is cut there, and judged as it is."""
        kl_coef: float = 0.05
        """The price of leaving the reference (the paper: 0.05 for reasoning in words, 0.01 in programs)."""
        ppo_epochs: int = 2
        """Steps on each batch of sampled answers."""
        verifier: str = "answer_match"
        """Who judges the answers: an installed verifier."""
        verifier_options: dict[str, Any] = field(default_factory=dict)
        """Its options: --set 'rft_ppo.verifier_options={"tolerance": 0.01}'."""
        update: str = "ppo"
        """ppo; or to compare with, self_training: half the likelihood of the right answers alone, half of the data's own."""

        def __post_init__(self) -> None:
            if self.max_new_tokens < 1 or self.ppo_epochs < 1 or not 0 <= self.kl_coef < math.inf:
                raise UsageError(
                    "rft_ppo needs max_new_tokens and ppo_epochs of at least 1, and a kl_coef of at least 0",
                    "for example --set rft_ppo.max_new_tokens=64 --set rft_ppo.kl_coef=0.05",
                )
            if self.update not in ("ppo", "self_training"):
                raise UsageError(f"unknown rft_ppo.update {self.update!r}", "one of: ppo, self_training")

    @property
    def period(self) -> int:
        return self.config.ppo_epochs

    def prepare(self, setting: TrainingContext) -> None:
        """Raises UsageError without a tokenizer, for prompts that are empty or leave an answer no room, and where the verifier
        calls none of the data's own completions right; PluginError for a verifier that is not installed."""
        super().prepare(setting)
        model, tokenizer, config = setting.model, setting.model.tokenizer, self.config
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise UsageError(
                "rft_ppo reads the answers that it samples, and this base has no tokenizer with an end token",
                "give a base folder that holds one",
            )
        self.end = tokenizer.eos_token_id
        room = getattr(model.base.config, "max_position_embeddings", math.inf) - config.max_new_tokens
        for example in setting.examples:
            if example.start < 1:
                raise UsageError(
                    f"line {example.line}: the prompt is empty", "give at least one token, or leave it out"
                )
            if example.start > room:
                raise UsageError(
                    f"line {example.line}: after a prompt of {example.start} tokens the base has no room for "
                    f"{config.max_new_tokens} more",
                    "set rft_ppo.max_new_tokens or --max-length lower, or leave the row out",
                )
        verifier = plugins.load("verifiers", config.verifier)
        self.verifier = make(verifier, plugins.options(verifier.Config, dict(config.verifier_options), parse=False))
        own = ((e.prompt, e.completion, e.completion) for e in setting.examples)
        if not any(self.verdict(*texts).right for texts in own):
            first = setting.examples[0]
            raise UsageError(
                f"{config.verifier} calls none of the data's own completions right; of line {first.line} it says: "
                f"{self.verdict(first.prompt, first.completion, first.completion).message}",
                "check the completions, or rft_ppo.verifier_options",
            )
        # From zero: where nothing is rewarded there is then no gradient at all.
        width = model.base.get_output_embeddings().weight.shape[1]
        self.direction = nn.Parameter(torch.zeros(width, device=model.device))
        self.offset = nn.Parameter(torch.zeros((), device=model.device))

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The value head."""
        return {"value.direction": self.direction, "value.offset": self.offset}

    def loss(self, batch: Mapping[str, Tensor], moment: StepContext) -> Tensor:
        with evaluating(self.setting.model):
            if moment.step % self.config.ppo_epochs == 0:
                self.rollout = self.roll(batch, moment.draw)
            rollout = self.rollout
            new, values = self.seen(rollout.batch)
            if self.config.update == "ppo":
                return ppo_loss(
                    new, rollout.old, values, rollout.values, rollout.advantages, rollout.returns, rollout.real
                )
            right = (-per_answer(new, rollout.real) * rollout.right).sum() / rollout.right.sum().clamp(min=1)
            return (right + per_answer(token_losses(self.setting.model, batch), batch["labels"] != IGNORE).mean()) / 2

    def roll(self, batch: Mapping[str, Tensor], draw: torch.Generator) -> Rollout:
        """Answers to the batch's prompts, judged. draw: on the CPU."""
        model, pad = self.setting.model, self.setting.pad
        prompts, references = [], []
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            references.append(labels[labels != IGNORE].tolist())
            prompts.append(ids[mask.bool()].tolist()[: -len(references[-1])])
        labels = sampled(model, prompts, pad, self.end, self.config.max_new_tokens, draw)
        real = labels != IGNORE
        ids, mask = (tensor.to(model.device) for tensor in pad_left(prompts, pad))
        answered = {
            "input_ids": torch.cat([ids, labels.where(real, pad)], 1),
            "attention_mask": torch.cat([mask, real.to(mask.dtype)], 1),
            "labels": labels,
        }
        answers = [row[row != IGNORE].tolist() for row in labels]
        verdicts = [self.verdict(*texts) for texts in zip(prompts, references, answers, strict=True)]
        judged = torch.tensor([verdict.reward for verdict in verdicts], device=model.device)
        right = torch.tensor([verdict.right for verdict in verdicts], device=model.device)
        with torch.no_grad():
            old, values = self.seen(answered)
        with model.without_new():
            rewards = -self.config.kl_coef * (old + token_losses(model, answered))
        rewards[torch.arange(len(rewards)), real.sum(1) - 1] += judged
        advantages = gae(rewards, values, real)
        return Rollout(answered, right, old, values, whitened(advantages, real), advantages + values)

    def verdict(self, prompt: Sequence[int], reference: Sequence[int], answer: Sequence[int]) -> Verdict:
        """Of token ids, the end token left off."""
        text = self.setting.model.tokenizer.decode
        ended = [ids[:-1] if ids[-1:] == [self.end] else ids for ids in map(list, (reference, answer))]
        return self.verifier.verify(*(text(ids, skip_special_tokens=True) for ids in (list(prompt), *ended)))

    def seen(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The log-probability of each token of the answers, and the value of the state before it; each (rows, tokens)."""
        states: list[Tensor] = []
        head = self.setting.model.base.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: states.append(given[0]))
        try:
            losses = token_losses(self.setting.model, batch)
        finally:
            hook.remove()
        return -losses, states[0][:, -losses.shape[1] - 1 : -1].float() @ self.direction + self.offset
