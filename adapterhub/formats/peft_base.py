"""The base that an adapter is read for: its modules without weights at once, with them when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from adapterhub import bases
from adapterhub.sites import Site, sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BaseModel:
    resolved: bases.ResolvedBase

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """On the meta device: widths and names, no weights."""
        return bases.skeleton(self.resolved)

    @cached_property
    def sites(self) -> Sequence[Site]:
        return sites(self.skeleton)

    def load(self) -> PreTrainedModel:
        """Anew, in float32 on the CPU."""
        return bases.load_model(self.resolved)
