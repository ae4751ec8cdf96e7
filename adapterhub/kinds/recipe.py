"""A recipe changes what a training reads, or adds a term to what it minimises; any number of them, with any method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from adapterhub.data import Data
from adapterhub.data.encoding import Example
from adapterhub.kinds.training import StepContext, TrainingContext


class Recipe:
    """Every default changes nothing. Of several, the first given is first. One object makes the data of a training (`rows`,
    `examples`, then `found`); then each stage has one of its own."""

    @dataclass(frozen=True)
    class Config:
        """The options; `--set <recipe>.name=value` on the command line."""

    extras: ClassVar[tuple[str, ...]] = ()
    """The extra data files it cannot do without (`--extra NAME=FILE`)."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Options that the laws are tried with, where the defaults will not do."""

    def __init__(self, config: Config):
        self.config = config

    def rows(self, data: Data) -> Data:
        """First of all: the rows that are read into tokens instead."""
        return data

    def examples(self, examples: Sequence[Example], setting: TrainingContext) -> Sequence[Example]:
        """Once, before the stages: what is trained on instead. Random numbers from `setting.seed` only."""
        return examples

    def prepare(self, setting: TrainingContext) -> None:
        """Called before a stage's first step, and again where a killed run goes on."""
        self.setting = setting

    def batch(self, batch: Mapping[str, Tensor], moment: StepContext) -> Mapping[str, Tensor]:
        """At each step: the batch that is trained on instead. input_ids (rows, tokens) and labels (rows, answer) are
        apart: labels are the tokens that the last `answer` positions but the very last predict."""
        return batch

    @contextmanager
    def around(self, moment: StepContext) -> Iterator[None]:
        """Around the objective's loss at each step: what shall hold in its forward passes."""
        yield

    def term(self, batch: Mapping[str, Tensor], moment: StepContext) -> Tensor | None:
        """() float, added to the loss at each step."""
        return None

    def found(self) -> Mapping[str, Any]:
        """What the manifest shall say of the data that it made (the counts of a mix); as JSON has it."""
        return {}
