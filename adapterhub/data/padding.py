"""Padding: what a batch's mask says of positions, and where a model would count padding without being asked."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.data.context import ABSOLUTE, Context
from adapterhub.errors import BatchError
from adapterhub.sites import family

_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
"""What configs call the number of tokens that an attention reaches back."""


class Padding:
    """How one model comes to its tokens' positions."""

    def __init__(self, base: nn.Module):
        config, self.context = base.config.get_text_config(), Context.of(base)
        takes = inspect.signature(base.forward).parameters
        self._own = family(base.config.model_type).own_positions
        self._pad = getattr(config, "pad_token_id", None)
        self._both = base.config.is_encoder_decoder
        self._takes_positions = "position_ids" in takes and not self._own
        self._takes_decoder_positions = "decoder_position_ids" in takes
        self._absolute = any(ABSOLUTE.search(path) for path, _ in base.named_modules())
        self._distances = bool(getattr(config, "relative_attention", False))
        windows = [getattr(config, name, None) for name in _WINDOWS]
        self._window = min((window for window in windows if isinstance(window, int) and window > 0), default=None)
        kinds = getattr(config, "layer_types", None) or ["sliding"]
        if all(kind in ("full_attention", "linear_attention", "conv") for kind in kinds):
            self._window = None

    def accounted(
        self, mask: Tensor | None, rows: int, seen: int, tokens: int, kwargs: dict[str, Any], ids: Tensor | None
    ) -> dict[str, Any]:
        """The model's arguments with positions that leave padding out. mask (rows, seen + tokens), of an encoder-decoder
        its encoder's; seen: how many tokens the cache holds; ids: the tokens, where they are what the model was given.
        Raises BatchError where the model would count padding."""
        decoder = kwargs.get("decoder_attention_mask") if self._both else None
        if isinstance(decoder, Tensor) and decoder.ndim == 2:
            if not self._takes_decoder_positions:
                self._require_uncounted(decoder, kwargs.get("decoder_input_ids"))
            elif kwargs.get("decoder_position_ids") is None:
                kwargs["decoder_position_ids"] = _positions(decoder)[:, seen:]
        if mask is None:
            return kwargs
        if mask.shape[0] != rows:
            raise BatchError(
                f"the attention mask has {mask.shape[0]} rows, the batch has {rows}", "give one mask per row"
            )
        if self._window and mask.shape[1] > self._window and _parted(mask):
            raise BatchError(
                "padding stands between a row's tokens, and this model's sliding window counts it",
                "pad on the left, or on the right without a cache",
            )
        if self._distances and _parted(mask):
            raise BatchError(
                "padding stands between a row's tokens, and this model's distances count it", "pad on one side"
            )
        if not self._takes_positions:
            if ids is not None or kwargs.get("inputs_embeds") is not None:
                self._require_uncounted(mask, ids)
        elif kwargs.get("position_ids") is None and mask.shape[1] == seen + tokens:
            kwargs["position_ids"] = _positions(mask)[:, -tokens:]
        return kwargs

    def _require_uncounted(self, mask: Tensor, ids: Tensor | None) -> None:
        """Raise BatchError where padding stands before tokens of a model that counts it and cannot be given positions."""
        if not ((mask.long().diff(dim=1) > 0).any() if self._absolute else _parted(mask)):
            return
        if self._own and (not self._absolute or self._knows_padding(mask, ids)):
            return
        raise BatchError(
            "padding stands before a row's tokens, and this model's positions count it", "pad on the right"
        )

    def _knows_padding(self, mask: Tensor, ids: Tensor | None) -> bool:
        """Whether the tokens themselves say where padding is, to a model that computes positions from them."""
        if ids is None or self._pad is None or ids.shape != mask.shape:  # how long a cache is, they do count
            return False
        return bool((ids[~mask.bool()] == self._pad).all())

    def advanced(
        self, advances: Sequence[int], kwargs: dict[str, Any], seen: int, tokens: int, device: torch.device
    ) -> dict[str, Any]:
        """The arguments with each row's positions moved up by what the prefixes before its tokens count."""
        if not self._takes_positions:
            raise BatchError(
                "a prefix moves the positions of its rows, and this model takes no position_ids",
                "leave that adapter out",
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(seen, seen + tokens, device=device)[None]
        return {**kwargs, "position_ids": positions + torch.tensor(advances, device=positions.device)[:, None]}


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _parted(mask: Tensor) -> bool:
    """Whether padding stands between two tokens of a row."""
    steps = mask.long().diff(dim=1)
    return bool((((steps < 0).cumsum(1) > 0) & (steps > 0)).any())
