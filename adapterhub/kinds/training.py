"""What a part sees of the training that it takes part in: the model, the data, and which step it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapterhub.data.batches import collate
from adapterhub.data.encoding import Example
from adapterhub.errors import UsageError
from adapterhub.runtime.model import Model


@dataclass(frozen=True)
class Setting:
    """One training: on which model, with what."""

    model: Model
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
        """A batch as `encoding.collate` makes it, on the model's device."""
        return {key: tensor.to(self.model.device) for key, tensor in collate(examples, self.pad).items()}

    def batches(self, examples: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        """All of them, in their order."""
        for start in range(0, len(examples), self.batch_size):
            yield self.batch(examples[start : start + self.batch_size])


@dataclass(frozen=True)
class Moment:
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
