"""Keys moved along the positions of a rotary model (Su et al., "RoFormer", 2021), by the model's own code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVEN = ("default", "linear", "llama3")
"""Kinds whose angle grows with the position alone: the same turn for every token and every length of text."""


def turned(keys: Tensor, by: int, model: PreTrainedModel) -> Tensor | None:
    """keys (..., n, head width) as they are `by` positions further on, in float32; None where the model has no rotary
    positions, or ones that a turn does not move (learned ones, angles that depend on the length)."""
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    code = sys.modules[type(model).__module__]
    settings = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rotary is None or not hasattr(code, "apply_rotary_pos_emb") or settings.get("rope_type") not in EVEN:
        return None
    angles = type(rotary)(config=model.config.get_text_config())
    wide = keys.float()
    with torch.device("cpu"):
        cosine, sine = angles(wide, torch.tensor([[abs(by)]]))
    flat = wide.reshape(1, -1, 1, wide.shape[-1])  # one position for all of them
    moved = code.apply_rotary_pos_emb(flat, flat, cosine, sine if by > 0 else -sine)[1]
    return moved.reshape(wide.shape)
