"""Ensembles: whole models side by side, each a lane of one batch, and the weighted sum of what they put out.

`logits(base + expert - anti)` is DExperts (Liu et al., 2021); any weights will do. The base is in memory once, the
key-value cache holds the lanes, and what calls the model sees its own rows: sampling needs to know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterhub.errors import BatchError


@dataclass(frozen=True)
class Lanes:
    """A batch of `count` rows run as len(rows) lanes."""

    count: int
    rows: tuple[int, ...]
    """The row that each lane belongs to, in order."""
    weights: tuple[float, ...]

    def spread(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments with every row repeated for each of its lanes. What has as many rows as there are
        lanes already (an encoder's output) stays."""
        if kwargs.get("labels") is not None:
            raise BatchError("the model's own loss knows no ensemble", "compute the loss from the logits")
        if kwargs.get("return_dict") is False:
            raise BatchError("an ensemble does not return tuples", "leave return_dict out")
        index = torch.tensor(self.rows)

        def wider(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == self.count:
                return value[index.to(value.device)]
            return value

        return tuple(map(wider, args)), {name: wider(value) for name, value in kwargs.items()}

    def combine(self, logits: Tensor) -> Tensor:
        """(lanes, ...) -> (rows, ...): each row the weighted sum of its lanes, in float32 at least."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = torch.tensor(self.weights, dtype=wide, device=logits.device).view(-1, *[1] * (logits.ndim - 1))
        total = logits.new_zeros(self.count, *logits.shape[1:], dtype=wide)
        index = torch.tensor(self.rows, device=logits.device)
        return total.index_add(0, index, weights * logits.to(wide)).to(logits.dtype)


def repeated(args: tuple, kwargs: dict, times: int) -> tuple[tuple, dict]:
    """What `generate` is called with, as for each row given `times` times: it need not repeat them any more."""
    if kwargs.get("encoder_outputs") is not None:  # these it does repeat
        return args, kwargs
    rows = {name for name in kwargs if name == "inputs" or name.startswith(("input_", "inputs_", "decoder_"))}
    rows |= {name for name in kwargs if name.endswith("attention_mask")}
    kwargs = {
        name: value.repeat_interleave(times, 0) if name in rows and isinstance(value, Tensor) else value
        for name, value in kwargs.items()
    }
    if args and isinstance(args[0], Tensor):
        args = (args[0].repeat_interleave(times, 0), *args[1:])
    return args, {**kwargs, "num_return_sequences": 1}
