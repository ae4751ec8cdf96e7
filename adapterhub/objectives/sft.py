"""Supervised fine-tuning: the mean negative log-likelihood of the batch's completion tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapterhub.data.batches import IGNORE
from adapterhub.kinds.objective import Objective
from adapterhub.kinds.training import StepContext
from adapterhub.runtime.scoring import token_losses


class SFT(Objective):
    """-log p(completion | prompt), the mean over the batch's completion tokens."""

    def loss(self, batch: Mapping[str, Tensor], moment: StepContext) -> Tensor:
        return token_losses(self.setting.model, batch).sum() / (batch["labels"] != IGNORE).sum()
