"""A module that PEFT has changed, as a modification of the base's: measured, not derived, so that one way serves all types.

The changed module and the base's own are run in float64 on the unit vectors. That gives W' and b' if the module is
linear, and other inputs show whether it is. The change is kept in the form that takes the fewest bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from adapterhub.errors import HubError, NotFoldable
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.sparse import Sparse
from adapterhub.kinds.modification import Modification

CHUNK = 1024
"""Unit vectors at a time."""
LINEAR = 1e-6
"""How far a module may be from its W' and b', of its largest output. Some of PEFT's compute in float32."""
NOISE = 1e-12
"""What float64 leaves of a zero, of the largest number."""


def changes(base: nn.Module, peft: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, the base's module, PEFT's) of all that are not alike, the same tree below `path` on both sides."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(peft, ModulesToSaveWrapper):
        peft = peft.modules_to_save["default"]
    own, new = dict(base.named_parameters(recurse=False)), dict(peft.named_parameters(recurse=False))
    if type(base) is not type(peft) or own.keys() != new.keys() or not all(torch.equal(own[k], new[k]) for k in own):
        yield path, base, peft
        return
    for name, child in base.named_children():
        yield from changes(child, peft.get_submodule(name), f"{path}.{name}".lstrip("."))


@torch.no_grad()
def lowered(base: nn.Module, peft: nn.Module, gains: bool = False) -> list[Modification]:
    """What turns the base's module into PEFT's. Both are float64 afterwards.

    gains: keep a scaling of the rows or columns as such ((IA)3), which is then no longer additive. Raises HubError for a
    module whose change is no change of a weight, a bias or a norm's gain."""
    from transformers.pytorch_utils import Conv1D

    base, peft = base.double(), peft.double()
    if isinstance(base, nn.Linear | Conv1D | nn.Embedding):
        width = (
            base.num_embeddings if isinstance(base, nn.Embedding) else base.weight.shape[isinstance(base, nn.Linear)]
        )
        return _matrix(base, peft, width, gains)
    weight = getattr(base, "weight", None)
    if next(base.children(), None) is None and isinstance(weight, Tensor) and weight.ndim == 1:
        return [_norm(base, peft, len(weight))]
    raise HubError(f"a change of a {type(base).__name__} has no form here", "merge it into the base, or leave it out")


def _matrix(base: nn.Module, peft: nn.Module, width: int, gains: bool) -> list[Modification]:
    tokens = isinstance(base, nn.Embedding)
    weight, bias = measured(base, width, tokens)
    now, shift = measured(peft, width, tokens)
    # Of an embedding that multiplies what it looks up (Gemma's), the change is that of the look-up.
    delta = _clean(now - weight, now) / getattr(base, "embed_scale", 1)
    shift = _clean(shift - bias, torch.stack([shift, bias]))
    if gains and delta.any() and (scaling := _scaling(weight, bias, delta, shift)):
        return [scaling]
    parts: list[Modification] = [cheapest(delta)] if delta.any() else []
    if not shift.any():
        return parts
    if parts and isinstance(parts[0], Dense):
        return [Dense(weight=parts[0].weight, bias=shift.float())]
    return [*parts, Affine.of(shift=shift.float())]


def measured(module: Callable[[Tensor], Tensor], width: int, tokens: bool) -> tuple[Tensor, Tensor]:
    """W (outputs, width) and b (outputs,) of a linear module, or of an embedding of `width` tokens (then b is 0), float64.

    Raises NotFoldable for what is not linear."""
    if tokens:
        columns = torch.cat([module(ids[None])[0].double() for ids in torch.arange(width).split(CHUNK)])
        return columns.mT, columns.new_zeros(columns.shape[1])

    def run(x: Tensor) -> Tensor:
        return module(x[None])[0].double()

    bias = run(torch.zeros(1, width, dtype=torch.float64))[0]
    units = (nn.functional.one_hot(places, width).double() for places in torch.arange(width).split(CHUNK))
    weight = torch.cat([run(part) - bias for part in units]).mT
    x = torch.randn(7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = run(x)
    if not (y - (x @ weight.mT + bias)).abs().max() <= LINEAR * y.abs().max():
        why = "its change is not linear in the input (or not the same twice)"
        raise NotFoldable(why, "keep PEFT's own layer: train it with the method peft and --set lower=never")
    return weight, bias


def _clean(change: Tensor, scale: Tensor) -> Tensor:
    """Without what rounding left where there is no change."""
    return change.masked_fill(change.abs() <= NOISE * scale.abs().max(), 0)


def _scaling(weight: Tensor, bias: Tensor, delta: Tensor, shift: Tensor) -> Affine | None:
    """The rows (with the bias) or the columns of the weight times something, if the change is that."""
    out = (delta * weight).sum(1) / weight.square().sum(1).clamp(min=1e-300)
    tight = 1e-9 * delta.abs().max()
    if (delta - out[:, None] * weight).abs().max() <= tight and (shift - out * bias).abs().max() <= tight:
        return Affine.of(gain=out.float())
    into = (delta * weight).sum(0) / weight.square().sum(0).clamp(min=1e-300)
    if (delta - weight * into).abs().max() <= tight and not shift.any():
        return Affine.of(gain=into.float(), into=True)
    return None


def cheapest(delta: Tensor) -> Modification:
    """ΔW (outputs, inputs) in float64, not zero, as the form of float32 that takes the fewest bytes."""
    outputs, inputs = delta.shape
    places = delta.flatten().nonzero()[:, 0]
    sizes = {"dense": delta.numel(), "sparse": 2 * len(places)}
    rank = None
    if sizes["sparse"] > outputs + inputs:  # else nothing of low rank is smaller
        rank = _factors(delta, min(sizes.values()))
    if rank is not None:
        down, up = rank
        return LowRank(down=down.float(), up=up.float(), scale=torch.tensor(1.0))
    if sizes["sparse"] < sizes["dense"]:
        return Sparse.at(places, delta.flatten()[places].float(), delta.shape)
    return Dense(weight=delta.float())


def _factors(delta: Tensor, numbers: int) -> tuple[Tensor, Tensor] | None:
    """A (r, inputs) and B (outputs, r) with BA = ΔW to rounding and fewer than `numbers` numbers; None if it has no such.

    A basis of its columns by random products, ever more of them (Halko, Martinsson and Tropp, 2011), then checked."""
    outputs, inputs = delta.shape
    most = min((numbers - 1) // (outputs + inputs), min(outputs, inputs) - 1)
    random = torch.Generator().manual_seed(0)
    count = 0
    while count < most + 4:
        count = min(max(16, 4 * count), most + 4, min(outputs, inputs))
        sketch = delta @ torch.randn(inputs, count, dtype=delta.dtype, generator=random)
        basis = torch.linalg.qr(sketch)[0]
        down = basis.mT @ delta
        if (delta - basis @ down).abs().max() > NOISE * 100 * delta.abs().max():
            if count == min(outputs, inputs):
                return None
            continue
        left, values, right = torch.linalg.svd(down, full_matrices=False)
        rank = int((values > NOISE * 100 * values[0]).sum())
        if not 0 < rank <= most:
            return None
        root = values[:rank].sqrt()
        return root[:, None] * right[:rank], (basis @ left[:, :rank]) * root
    return None


def _norm(base: nn.Module, peft: nn.Module, width: int) -> Affine:
    """A norm's new gain and shift, from its outputs: y' = y + g*y + s, channel by channel."""
    x = torch.randn(1, 64, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, after = base(x)[0].double(), peft(x)[0].double()
    middle = before - before.mean(0)
    ratio = (middle * after).sum(0) / middle.square().sum(0).clamp(min=1e-300)
    shift = (after - ratio * before).mean(0)
    if not (after - ratio * before - shift).abs().max() <= LINEAR * after.abs().max():
        raise HubError(
            "this norm's gain is zero or nearly so in the base, and not in the adapter: no gain on top of it does that",
            "merge the norm into the base, and give that base",
        )
    gain = _clean(ratio - 1, ratio)
    return Affine.of(gain=gain.float(), shift=shift.float() if _clean(shift, after).any() else None)
