"""Changes of one weight: what a site's modifications amount to, their weighted sums, and the cheapest exact form of each.

**The rule**, wherever a merge stores something: of the ways to store a change exactly (to float32: within EXACT of it) the
one of fewest bytes.

1. What can stand side by side stays: each form's terms are joined (low rank at the least rank that holds the sum; sparse at the
   places that either changes; gains and shifts added), and the joined forms share the site.
2. Low rank and sparse that together take more bytes than the whole weight become one dense change, and so does everything
   beside a dense one; a shift joins its bias.
3. Where neither is exact (half of a DoRA, a gain after a low-rank change) the change is computed from the base's weight, and like
   any whole change (a merger's that is not linear) stored as low rank, sparse or dense, with its bias change.

A gain is never made dense when it can stay a gain: it would hold for this base's very weights only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterhub.errors import NotFoldable
from adapterhub.forms.affine import Affine
from adapterhub.forms.composers import Stack, scaled
from adapterhub.forms.dense import Dense
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.sparse import Sparse
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.modification import Modification
from adapterhub.tensors.factors import balanced, product_norm, product_svd

EXACT = 1e-6
"""A form whose change is this near (relative, Frobenius norm) holds it to float32: sums of float32 numbers round as much."""
CANCELLED = 1e-6
"""A sum smaller than this part of its terms is rounding."""
Terms = Sequence[tuple[float, Sequence[Modification]]]
"""Of each adapter at one site: its weight, and its modifications there in order."""
Result = tuple[list[Modification], float]
"""What a site gets, in order (nothing: the changes cancel), and the largest relative error of one of its forms."""
WHOLE = (LowRank, Sparse, Dense)
"""The forms that tell the change of a weight without the base's."""


def _refuse(*arguments: Any, **options: Any) -> Any:
    raise NotFoldable("its change depends on the base's own weight")


class _Unknown:
    """Stands where a form asks for the base's weight and there is none: whatever it does with it is refused."""

    def __getattr__(self, name: str) -> Any:
        _refuse()

    __torch_function__ = classmethod(_refuse)
    __hash__ = None


_OPERATORS = """add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg pos abs eq ne lt le gt ge
getitem len iter bool float int index array"""
for _operator in _OPERATORS.split():
    setattr(_Unknown, f"__{_operator}__", _refuse)


def change_of(
    parts: Sequence[Modification], base: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(ΔW (outputs, inputs), Δb (outputs,)) of one adapter's modifications at a site, one after the other.

    base: weight and bias there; without it NotFoldable is raised for a form whose change depends on them."""
    weight, bias = (_Unknown(), _Unknown()) if base is None else base
    if all(part.additive for part in parts):  # none sees what the others did, so none needs the weight for that
        changes = [call(part, "delta_weight", weight, bias) for part in parts]
        return _plus([w for w, _ in changes]), _plus([b for _, b in changes])
    return Stack(parts).delta_weight(weight, bias)


def side_by_side(parts: Sequence[Modification]) -> bool:
    """Whether each reads only what the bare base has there: then their stack is the sum of their changes."""
    for k, part in enumerate(parts):
        if any(outer.changes_input for outer in parts[k + 1 :]):
            return False
        if not (part.additive or part.changes_input) and (k or parts[0].changes_input):
            return False
    return True


def weighted_sum(terms: Terms) -> Result | None:
    """Σ w·Δ by rules 1 and 2, for float32 modifications on the CPU; None if that takes the base's weight."""
    if not all(side_by_side(parts) for _, parts in terms):
        return None
    kinds: dict[tuple, list[tuple[float, Modification]]] = {}
    for weight, part in ((w, m) for w, parts in terms for m in parts):
        if type(_times(part, weight)) is not type(part):  # half of it is not of its form
            return None
        kinds.setdefault((type(part), part.changes_input), []).append((weight, part))
    made, error = [], 0.0
    for (form, _), group in kinds.items():
        result = _low_rank_sum(group) if form is LowRank else _affine_sum(group) if form is Affine else _sum(group)
        if result is None:
            return None
        made, error = made + result[0], max(error, result[1])
    made.sort(key=lambda m: (not m.changes_input, m.additive, m.form))
    if not side_by_side(made):
        return None
    whole = [m for m in made if type(m) in WHOLE]
    shifts = [m for m in made if type(m) is Affine and m.additive]
    joins = bool(shifts) and any(type(m) is Dense for m in whole)
    if not whole or not (joins or _bytes(whole) > _dense_bytes(whole)):
        return made, error
    group = [(w, m) for kind in kinds.values() for w, m in kind if type(m) in WHOLE] + [(1.0, m) for m in shifts]
    dense, distance = _dense_sum(group)
    return [m for m in made if m not in whole and m not in shifts] + dense, max(error, distance)


def cheapest(weight: Tensor | None, bias: Tensor | None = None) -> list[Modification]:
    """ΔW (outputs, inputs) and Δb (outputs,), float32, by rule 3."""
    bias = bias if bias is not None and bias.any() else None
    shift = [] if bias is None else [Affine.of(shift=bias.contiguous())]
    if weight is None or not weight.any():
        return shift
    best: Modification = Dense(weight=weight.contiguous())
    places = weight.reshape(-1).nonzero()[:, 0]
    if 8 * len(places) < _bytes([best]):
        sparse = Sparse.at(places, weight.reshape(-1)[places], weight.shape)
        best = min(best, sparse, key=lambda part: _bytes([part]))
    pair = _factored(weight, (_bytes([best]) - 5) // (4 * sum(weight.shape)))
    if pair is not None:
        return [pair, *shift]
    return [best, *shift] if isinstance(best, Sparse) or bias is None else [Dense(weight=best.weight, bias=bias)]


def _times(part: Modification, weight: float) -> Modification:
    return part if weight == 1 else scaled(part, weight)


def _plus(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return sum(there[1:], there[0]) if there else None


def _bytes(parts: Sequence[Modification]) -> int:
    return sum(tensor.nbytes for part in parts for tensor in part.tensors.values())


def _dense_bytes(parts: Sequence[Modification]) -> int:
    """What one dense change in their place takes, in float32."""
    part = parts[0]
    shape = (len(part.up), part.down.shape[1]) if type(part) is LowRank else getattr(part, "size", None)
    outputs, inputs = shape or part.weight.shape
    return 4 * outputs * (inputs + any("bias" in part.tensors for part in parts))


def _sum(group: Sequence[tuple[float, Modification]]) -> Result | None:
    """The terms of one form joined in float64, rounded once; as they are where the form joins nothing."""
    form = type(group[0][1])
    if len(group) == 1 and group[0][0] == 1:
        return [group[0][1]], 0.0
    if not all(m.additive for _, m in group):
        return None
    terms = [_times(m.to(dtype=torch.float64), w) for w, m in group]
    exact = terms[0] if len(terms) == 1 else form.join(terms)
    if exact is None:
        return [_times(m, w) for w, m in group], 0.0
    made = exact.to(dtype=torch.float32)
    size, left = _learned(exact).norm(), _learned(made).norm()
    if not left or size <= CANCELLED * sum(_learned(term).norm() for term in terms):
        return [], 0.0
    error = float((_learned(made) - _learned(exact)).norm() / size)
    if isinstance(made, Sparse) and not made.values.all():
        stays = made.values != 0
        made = Sparse.at(made.index[stays], made.values[stays], made.size)
    return [made], error


def _learned(part: Modification) -> Tensor:
    return torch.cat([t.double().reshape(-1) for k, t in sorted(part.tensors.items()) if k not in part.constants])


def _affine_sum(group: Sequence[tuple[float, Affine]]) -> Result:
    """Σ w(g·h + s) of one h: gains and shifts added, the ones that cancel left out."""
    left, errors = {}, [0.0]
    for key in ("gain", "shift"):
        terms = [w * m.tensors[key].double() for w, m in group if key in m.tensors]
        exact = _plus(terms)
        if exact is None or exact.norm() <= CANCELLED * sum(term.norm() for term in terms) or not exact.float().any():
            continue
        left[key] = exact.float()
        errors.append(float((left[key] - exact).norm() / exact.norm()))
    return ([Affine.of(**left, into=group[0][1].into)] if left else []), max(errors)


def _low_rank_sum(group: Sequence[tuple[float, LowRank]]) -> Result:
    """The factors side by side, made fewer if fewer hold the sum, measured against the float64 sum."""
    ups = [w * m.scale.double() * m.up.double() for w, m in group]
    downs = [m.down.double() for _, m in group]
    size = product_norm(torch.cat(ups, 1), torch.cat(downs))
    if size <= CANCELLED * sum(map(product_norm, ups, downs)):
        return [], 0.0
    scaled = [_times(m, w) for w, m in group]
    made = scaled[0] if len(scaled) == 1 else LowRank.join(scaled)
    rank = len(made.down)
    if len(group) > 1 or rank > min(len(made.up), made.down.shape[1]):
        u, s, vh = product_svd(torch.cat(ups, 1), torch.cat(downs))
        if (least := _rank(s)) < rank:
            made = _pair(u, s, vh, least)
    stored = made.scale.double() * made.up.double()
    if not product_norm(stored, made.down.double()):  # its weights are too small for float32
        return [], 0.0
    distance = product_norm(torch.cat([stored, *(-up for up in ups)], 1), torch.cat([made.down.double(), *downs]))
    return [made], distance / size


def _dense_sum(group: Sequence[tuple[float, Modification]]) -> Result:
    """One dense change of all, shifts in its bias."""
    changes = [(w, call(m.to(dtype=torch.float64), "delta_weight", _Unknown(), _Unknown())) for w, m in group]
    exact = _plus([w * weight for w, (weight, _) in changes if weight is not None])
    bias = _plus([w * shift for w, (_, shift) in changes if shift is not None])
    terms = sum(abs(w) * _norm(*change) for w, change in changes)
    if _norm(exact, bias) <= CANCELLED * terms:
        return [], 0.0
    made = Dense(weight=exact.float(), **({} if bias is None else {"bias": bias.float()}))
    error = _norm(made.weight - exact, None if bias is None else made.bias - bias)
    return [made], error / _norm(exact, bias)


def _norm(weight: Tensor | None, bias: Tensor | None) -> float:
    return sum(float(t.double().norm()) ** 2 for t in (weight, bias) if t is not None) ** 0.5


def _factored(weight: Tensor, largest: int) -> LowRank | None:
    """The least factors whose product is the weight's change, if their rank is at most `largest`.

    Ranks are tried from 16 on by doubling, each by a random projection (Halko et al., 2011): a change of full rank is
    told without its SVD, which takes minutes for a large weight."""
    exact, size = weight.double(), weight.double().norm()
    generator = torch.Generator().manual_seed(0)
    rank = min(16, largest)
    while rank > 0:
        probes = torch.randn(weight.shape[1], min(rank + 8, *weight.shape), generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(exact @ probes).Q
        core = q.mT @ exact
        if (exact - q @ core).norm() <= EXACT / 2 * size:
            u, s, vh = product_svd(q, core)
            return _pair(u, s, vh, _rank(s)) if _rank(s) <= largest else None
        if rank == largest:
            return None
        rank = min(2 * rank, largest)
    return None


def _rank(s: Tensor) -> int:
    """How many singular values (descending) hold the product within half of EXACT; rounding takes the rest."""
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
    return max(1, int((tails > EXACT / 2 * tails[0]).sum()))


def _pair(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> LowRank:
    up, down = balanced(u, s, vh, rank)
    return LowRank(down=down.float().contiguous(), up=up.float().contiguous(), scale=torch.tensor(1.0))
