"""An objective is what training minimises. The default, `sft`, is the likelihood of the completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from adapterhub.kinds.training import StepContext, TrainingContext


class Objective:
    """One object for one training (of each stage): `prepare` once, then `loss` at every step."""

    @dataclass(frozen=True)
    class Config:
        """The options; `--set <objective>.name=value` on the command line."""

    kinds: ClassVar[tuple[str, ...]] = ("prompt", "messages", "text")
    """The kinds of rows it reads (adapterhub.data). Of "scored" ones a batch holds each row's completions one after the
    other, with `group` (rows,) int64, which row of the file, and `reward` (rows,) float32."""
    extras: ClassVar[tuple[str, ...]] = ()
    """The extra data files it cannot do without (`--extra NAME=FILE`)."""
    samples: ClassVar[bool] = False
    """It learns from answers that the model writes itself, in eval mode: recipes that change a batch or its forward passes
    would do nothing, and are refused. A verifier that it asks is named by its option `verifier`."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Options that the laws are tried with, where the defaults will not do."""

    def __init__(self, config: Config):
        self.config = config

    @property
    def period(self) -> int:
        """Checkpoints lie only between that many steps: for what is drawn in the first of them and used in all."""
        return 1

    def prepare(self, setting: TrainingContext) -> None:
        """Called before the first step, and again where a killed run goes on: it must find the same again."""
        self.setting = setting

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What it trains besides the adapter (a value head), after `prepare`; in the checkpoints, not in the release."""
        return {}

    def loss(self, batch: Mapping[str, Tensor], moment: StepContext) -> Tensor:
        """() float, of a batch of `data.batches.collate`, differentiable in what trains."""
        raise NotImplementedError

    def found(self) -> Mapping[str, Any]:
        """What the recipe shall say of it once it is trained; as JSON has it."""
        return {}
