"""A verifier says whether an answer is right: what an objective that learns from rewards asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one answer."""

    reward: float
    """1: right; 0: wrong; between: partly."""
    message: str = ""
    """Why, in one line."""

    @property
    def right(self) -> bool:
        """Whether the reward is 1, whatever rounding left of it: ten tenths add up to a little less."""
        return self.reward > 1 - 1e-6


class Verifier:
    """Compares an answer with the one that the data has. It reads text and runs none of it."""

    @dataclass(frozen=True)
    class Config:
        """The options; given through the objective's own option for them (`rft_ppo.verifier_options`)."""

    example: ClassVar[Mapping[str, Any]] = {}
    """Options that the laws are tried with, where the defaults will not do."""

    def __init__(self, config: Config):
        self.config = config

    def verify(self, prompt: str, reference: str, answer: str) -> Verdict:
        """reference: the row's own completion; answer: what the model wrote, without the end token."""
        raise NotImplementedError
