"""What a part sees of the training that it takes part in: the model, the data, and which step it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from adapterhub.data.batches import collate
from adapterhub.data.encoding import Example
from adapterhub.errors import UsageError
from adapterhub.kinds.modification import Modifications
from adapterhub.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TrainedModel(Protocol):
    """The model as objectives, recipes and methods see it while an adapter trains."""

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model; what runs attached to it is in force inside of `running`."""

    @property
    def sites(self) -> Sequence[Site]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass with what is frozen and what trains; `.logits` is (rows, tokens, vocabulary)."""

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Continue prompts, as transformers' generate does."""

    def running(self, adapters: Any = None, rows: int | None = None) -> AbstractContextManager[Any]:
        """Let calls of `base` inside run these adapters."""

    def without_new(self) -> AbstractContextManager[None]:
        """Let calls inside run what is frozen alone, without gradients: the reference on the same resident base."""

    def training_mode(self, on: bool) -> None:
        """Turn dropout on or off, in the adapters and in the base."""

    def new_modifications(self) -> Modifications:
        """Return what trains: {site path: modifications in order}."""

    def trainable_tensors(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters that train, by stored name."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that train."""


@dataclass(frozen=True)
class TrainingContext:
    """One training: on which model, with what."""

    model: TrainedModel
    """With what lies beneath, and what trains; `with model.without_new()` runs what lies beneath alone: the reference
    policy on the same resident base."""
    examples: Sequence[Example]
    """The training data, in tokens."""
    pad: int
    """The token that fills up short rows."""
    batch_size: int = 8
    seed: int = 0
    steps: int = 1
    extras: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    """The run's other data files by name (`--extra NAME=FILE`), in tokens."""
    asked: set[str] = field(default_factory=set)
    """Which of them a part has asked for."""

    def extra(self, name: str, why: str) -> Sequence[Example]:
        """One of them. Raises UsageError if the run has none of that name; why: "CorDA calibrates on it"."""
        self.asked.add(name)
        try:
            return self.extras[name]
        except KeyError:
            hint = f"give a file: --extra {name}=FILE"
            raise UsageError(f"no extra data named {name!r} is given: {why}", hint) from None

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch as `data.batches.collate` makes it, on the model's device."""
        return {key: tensor.to(self.model.device) for key, tensor in collate(examples, self.pad).items()}

    def batches(self, examples: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        """All of them, in their order."""
        for start in range(0, len(examples), self.batch_size):
            yield self.batch(examples[start : start + self.batch_size])


@dataclass(frozen=True)
class StepContext:
    """One step of a training. What is drawn from `draw` is the same again when a killed run goes on."""

    step: int
    """From 0."""
    steps: int
    draw: torch.Generator
    """On the CPU, seeded by the run's seed, the step and the part's name."""

    @property
    def progress(self) -> float:
        """The share of the steps that are done, from 0 to below 1."""
        return self.step / self.steps
