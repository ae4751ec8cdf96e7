"""CorDA: a low-rank adapter that begins with the components of each weight that a context uses least, or most (Yang et al.,
"CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024). One method, `corda`; its adapters are `low_rank`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adapterhub import (
    BuildContext,
    Example,
    Measurement,
    Method,
    Modification,
    Site,
    Stage,
    Step,
    TrainingContext,
    token_losses,
)
from adapterhub.errors import UsageError
from adapterhub.forms.low_rank import LowRank
from adapterhub.sites import select


class Anchored(LowRank):
    """W + E·A + B0·D, which is W + B·A − B0·A0 with B = B0 + E and A = A0 + D, and subtracts nothing large: small changes
    survive bfloat16. up (outputs, 2r) is E beside B0, down (2r, inputs) is A over D.

    E and A train, and A's gradient is B's: D moves with it. B0 and D get a gradient of zero; D is written after each step."""

    def __init__(self, **tensors: Tensor):
        super().__init__(**tensors)
        self.anchor = _anchor(self.down)
        """A0 (r, inputs)."""

    def _moving(self) -> LowRank:
        r = len(self.down) // 2
        a, d = self.down[:r], self.down[r:].detach()
        down = torch.cat([a, d + (a - a.detach())])  # D's own value, exactly: the bracket is 0
        up = torch.cat([self.up[:, :r], self.up[:, r:].detach()], dim=1)
        return LowRank(down=down, up=up, scale=self.scale)

    def delta_out(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        return self._moving().delta_out(x, y, step)

    def delta_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        return self._moving().delta_weight(weight, bias)


def _anchor(down: Tensor) -> Tensor:
    a, d = down.detach().chunk(2)
    return a - d


def _halved(part: Modification) -> bool:
    """Whether it can be A over D; compressed it may be of another form, or of odd rank."""
    return isinstance(part, LowRank) and len(part.down) % 2 == 0


class CorDA(Method):
    """W + B·A − B0·A0 with B0·A0 the r components of W that come last (kpm) or first (ipm) in the singular value
    decomposition of W·C, C the covariance of what goes in; A and B begin as A0 and B0."""

    @dataclass(frozen=True)
    class Config:
        r: int = 8
        """How many components of each weight train. The adapter is stored with rank 2r."""
        mode: str = "ipm"
        """ipm (instruction-previewed): the r largest components, C of the training data. kpm (knowledge-preserved): the r
        smallest, C of the extra data `calibration`, a sample of what shall be kept."""
        damp: float = 0.01
        """Times the mean of C's diagonal, added to its diagonal. Very large (1e9): the plain decomposition of W, as PiSSA's."""
        target_modules: str | tuple[str, ...] = "all-linear"
        """Roles ("query"), module names ("q_proj") or "all-linear"; never the head."""

        def __post_init__(self) -> None:
            if self.mode not in ("kpm", "ipm"):
                raise UsageError(f"unknown mode {self.mode!r}", "one of: ipm, kpm")
            if self.r < 1 or not 0 < self.damp < math.inf:
                raise UsageError(
                    f"CorDA needs r >= 1 and damp above 0, not r {self.r}, damp {self.damp}",
                    "for example --set r=8 --set damp=0.01",
                )

    def stages(self, config: Config) -> Sequence[Stage]:
        def build(given: BuildContext) -> dict[str, LowRank]:
            if given.before:  # an adapter that goes on: A − D is what it began with
                return {p: (Anchored if _halved(m) else LowRank)(**m.tensors) for p, m in given.before.items()}
            chosen = _chosen(given.sites, config)
            return {site.path: _begun(given.weight(site), given.measured[site.module], config) for site in chosen}

        def fits(given: BuildContext) -> None:
            most = min(min(site.inputs, site.outputs) for site in _chosen(given.sites, config))
            if config.r > most:
                raise UsageError(
                    f"r is {config.r}, and the smallest of the chosen weights has {most} components", "give a smaller r"
                )

        def take(setting: TrainingContext) -> dict[str, Tensor]:
            chosen = _chosen(setting.model.sites, config)
            if config.mode == "ipm":
                return covariances(setting, setting.examples, chosen)
            return covariances(setting, setting.extra("calibration", "CorDA's mode kpm keeps what it holds"), chosen)

        extra = "calibration" if config.mode == "kpm" else None
        options = ("target_modules", "mode")  # another rank or damping shares it
        measurement = Measurement("covariance", take, extra, options)
        return [Stage("train", build, after_step=self.after_step, measurement=measurement, check=fits)]

    def take_up(self, modifications: Mapping[str, Modification]) -> None:
        def together(gradient: Tensor) -> Tensor:
            a, d = gradient.chunk(2)
            return torch.cat([a + d, torch.zeros_like(d)])

        def first(gradient: Tensor) -> Tensor:
            e, b = gradient.chunk(2, dim=1)
            return torch.cat([e, torch.zeros_like(b)], dim=1)

        for part in filter(_halved, modifications.values()):
            part.anchor = _anchor(part.down)
            part.down.register_hook(together)
            part.up.register_hook(first)

    def after_step(self, modifications: Mapping[str, Modification]) -> None:
        for part in modifications.values():
            if (anchor := getattr(part, "anchor", None)) is not None:
                part.anchor = anchor = anchor.to(part.down.device)
                part.down[len(anchor) :] = part.down[: len(anchor)] - anchor


def _chosen(sites: Sequence[Site], config: CorDA.Config) -> list[Site]:
    chosen = select(sites, config.target_modules)
    if wrong := next((site.path for site in chosen if not site.linear or site.role == "head"), None):
        raise UsageError(
            f"CorDA changes linear layers but not the head, and target_modules selects {wrong}",
            "use all-linear or names such as q_proj",
        )
    return chosen


def covariances(setting: TrainingContext, examples: Sequence[Example], sites: Sequence[Site]) -> dict[str, Tensor]:
    """{path of a module: Σ x·xᵀ over the tokens x of the examples that go into it, (inputs, inputs) float32}, one for all
    the sites inside of it. A factor decides nothing, so there is none.

    A row is divided by its largest magnitude first, as the official code does with its batches of one row: rows weigh
    alike however far their activations reach, and the batch size decides nothing. Raises UsageError for a module that
    sees nothing but zeros."""
    sums: dict[str, Tensor] = {}

    def add(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].float()
        width = x.shape[-1]
        if x.numel() == mask.numel() * width:  # else it sees other things than tokens: a pooler's vectors
            x = x.reshape(*mask.shape, width).masked_fill(~mask[..., None], 0.0)
        x = x.reshape(len(x), -1, width)
        x = (x / x.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)).flatten(0, 1)
        sums[path] = sums.get(path, 0.0) + x.mT @ x

    paths = dict.fromkeys(site.module for site in sites)
    # After the module, so that what adapters beneath change of its input is there.
    hooks = [setting.model.base.get_submodule(path).register_forward_hook(partial(add, path)) for path in paths]
    try:
        for batch in setting.batches(examples):
            mask = batch["attention_mask"].bool()
            token_losses(setting.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if empty := next((path for path in paths if path not in sums or not sums[path].any()), None):
        raise UsageError(
            f"no token of the calibration reaches {empty}",
            "give more calibration data, or leave it out of target_modules",
        )
    return sums


def decompose(weight: Tensor, covariance: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """(U (outputs, k), S (k,) falling, V̂ᵀ (k, inputs)), float64, with W = U·diag(S)·V̂ᵀ and k the lesser width.

    weight: W (outputs, inputs); covariance: C (inputs, inputs), any positive multiple of it the same. With
    C' = C + damp·mean(diag C)·1, divided by the mean of its own diagonal: U·S·Vᵀ = svd(W·C') and V̂ᵀ = Vᵀ·C'⁻¹. That
    division decides nothing of W = U·diag(S)·V̂ᵀ's terms, but how they are shared out between S and V̂."""
    weight, covariance = weight.double(), covariance.double()
    damped = covariance / covariance.diagonal().mean()
    damped = (damped + damp * torch.eye(len(damped), dtype=damped.dtype)) / (1 + damp)
    u, s, vt = torch.linalg.svd(weight @ damped, full_matrices=False)
    return u, s, torch.linalg.solve(damped, vt, left=False)


def _begun(weight: Tensor, covariance: Tensor, config: CorDA.Config) -> Anchored:
    u, s, vt = decompose(weight, covariance, config.damp)
    taken = slice(config.r) if config.mode == "ipm" else slice(len(s) - config.r, None)
    root = s[taken].sqrt()
    up, down = (u[:, taken] * root).float(), (root[:, None] * vt[taken]).float()
    down, up = torch.cat([down, torch.zeros_like(down)]), torch.cat([torch.zeros_like(up), up], dim=1)
    return Anchored(down=down, up=up, scale=torch.tensor(1.0))
