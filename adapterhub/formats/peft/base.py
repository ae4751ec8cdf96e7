"""The base that an adapter is read for: its modules without weights at once, with them when they are needed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapterhub.bases import loading, resolution
from adapterhub.errors import IncompatibleBase
from adapterhub.runtime.attention import OURS
from adapterhub.sites import Site, sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BaseModel:
    source: resolution.ResolvedBase | PreTrainedModel
    """A loaded model stays as it is: what is changed is a copy."""

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """On the meta device: widths and names, no weights."""
        if isinstance(self.source, resolution.ResolvedBase):
            return loading.skeleton(self.source)
        config = copy.deepcopy(self.source.config)
        named = {
            ours: kernel for kernel, ours in OURS.items()
        }  # the loaded model may run adapters; the copy never does
        config._attn_implementation = named.get(config._attn_implementation, config._attn_implementation)
        with torch.device("meta"):
            return type(self.source)(config).eval()

    @cached_property
    def sites(self) -> Sequence[Site]:
        return sites(self.skeleton)

    def load(self) -> PreTrainedModel:
        """Anew, in float32 on the CPU. Raises IncompatibleBase for a loaded model that holds other tensors than its class."""
        if isinstance(self.source, resolution.ResolvedBase):
            return loading.load_model(self.source)
        made = copy.deepcopy(self.skeleton).to_empty(device="cpu")
        new, given = _tensors(made), _tensors(self.source)
        if unlike := sorted(k for k in new.keys() | given.keys() if _shape(new.get(k)) != _shape(given.get(k))):
            raise IncompatibleBase(
                f"the loaded model is not as its class {type(made).__name__} makes it: {', '.join(unlike[:3])}",
                "give its folder, or a model that is neither quantised nor holds another library's adapters",
            )
        with torch.no_grad():
            for name, tensor in new.items():
                tensor.copy_(given[name])
        made.tie_weights()
        return made.requires_grad_(False)


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers, also those that no checkpoint holds; one that is shared under each of its names."""
    return dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
