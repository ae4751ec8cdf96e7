"""Layer policies against the instability of fine-tuning on little data: freeze below, layer-wise rates, re-initialised top
layers (Tinn et al., "Fine-Tuning Large Neural Language Models for Biomedical Natural Language Processing", 2023). One
parameter schedule, `layer_policy`: the first two for any method, the third for `full`."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from adapterhub import BuildContext, ParameterSchedule, Site
from adapterhub.errors import UsageError
from adapterhub.forms.dense import Dense
from adapterhub.kinds.method import Parts
from adapterhub.sites.weights import matrix


class LayerPolicy(ParameterSchedule):
    """rate = 0 below `freeze_below`, else lr_decay ** (L - 1 - layer); layers L - reinit_top to L - 1 begin afresh."""

    @dataclass(frozen=True)
    class Config:
        freeze_below: int = 0
        """So many of the lowest layers are frozen, and the embedding with them."""
        lr_decay: float = 1.0
        """From the highest layer that trains downwards, each layer's rate is this times that of the one above it; the embedding
        lies below the lowest layer. What stands outside of the layers otherwise trains at the full rate."""
        reinit_top: int = 0
        """In so many of the base's highest layers the weights that train begin as random ones, not as the base's. With the
        method `full` only."""

        def __post_init__(self) -> None:
            if self.freeze_below < 0 or self.reinit_top < 0 or not 0 < self.lr_decay <= 1:
                raise UsageError(
                    f"freeze_below {self.freeze_below}, lr_decay {self.lr_decay}, reinit_top {self.reinit_top} are no policy",
                    "freeze_below and reinit_top count layers, from 0; lr_decay is above 0 and up to 1",
                )

    example: ClassVar = {"freeze_below": 1, "lr_decay": 0.5}
    started = False

    def start(self, parts: Parts, given: BuildContext) -> Parts:
        self.started, top, layers = True, self.config.reinit_top, height(given.sites)
        if not top:
            return parts
        if top > layers - self.config.freeze_below:
            raise UsageError(
                f"of {layers} layers {self.config.freeze_below} cannot be frozen and {top} begin afresh",
                "give a smaller freeze_below or reinit_top",
            )
        sites = {site.path: site for site in given.sites}
        highest = range(layers - top, layers)
        above = [path for path in parts if sites[path].layer in highest and sites[path].role != "norm"]
        if not above:
            raise UsageError(f"the method trains no weight in the {top} highest layers", "leave reinit_top out")
        if other := next((path for path in above if not isinstance(parts[path], Dense)), None):
            raise UsageError(
                f"reinit_top replaces whole weights, and {parts[other].form!r} at {other} cannot hold a whole weight's change",
                "use the method full, or leave reinit_top out",
            )
        return {path: afresh(part, sites[path], given) if path in above else part for path, part in parts.items()}

    def rates(self, tensors: Mapping[str, Site], round: int, draw: random.Random) -> Mapping[str, float]:
        if self.config.reinit_top and not self.started:
            raise UsageError("an adapter that goes on keeps its weights: nothing begins afresh", "leave reinit_top out")
        layers = height(tensors.values())
        return {name: self.rate(site, layers) for name, site in tensors.items()}

    def rate(self, site: Site, layers: int) -> float:
        layer = -1 if site.embedding or "embeddings" in site.path.split(".") else site.layer
        if layer is None:
            return 1.0
        if layer < self.config.freeze_below > 0:
            return 0.0
        return self.config.lr_decay ** (layers - 1 - layer)


def height(sites: Iterable[Site]) -> int:
    """The number of the highest layer, and one. Raises UsageError for a base whose layers lie in two stacks."""
    sites = list(sites)
    if any(site.part in ("decoder", "cross") for site in sites):
        raise UsageError(
            "layer_policy counts the layers of one stack, and this base has an encoder and a decoder", "leave it out"
        )
    return 1 + max((site.layer for site in sites if site.layer is not None), default=-1)


def afresh(part: Dense, site: Site, given: BuildContext) -> Dense:
    """The change that puts numbers of N(0, initializer_range²) in place of the base's weight, and 0 in place of its bias.

    Random numbers from torch's global generator. Raises UsageError where the weight is not there to be replaced."""
    module, config = given.base.get_submodule(site.module), given.base.config.get_text_config()
    std = getattr(config, "initializer_range", None)
    if std is None:
        raise UsageError("this base does not say how it was initialised (initializer_range)", "leave reinit_top out")
    if matrix(module) is None:
        raise UsageError(
            f"the weight at {site.path} is quantised: what it is now cannot be taken away exactly",
            "train on the base in float32, or leave reinit_top out",
        )
    tensors = {"weight": std * torch.randn(site.outputs, site.inputs) - given.weight(site)}
    if "bias" in part.tensors:
        bias = module.bias.detach().float().cpu()
        tensors["bias"] = -(bias[site.columns.index()] if site.columns else bias)
    return Dense(**tensors)
