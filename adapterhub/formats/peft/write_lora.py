"""Changes of weights as PEFT's LoRA: what has factors keeps them, and any other change gets exact ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterhub.formats.peft.lora import PREFIX
from adapterhub.formats.peft.targets import anchored
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.sparse import Sparse
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.spec.manifest import Release

Factors = LowRank | DoRA


def lora(
    release: Release, parts: Mapping[str, Sequence[Modification]], embeddings: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of what is `suited`."""
    factors, shifts = {}, {}
    for path, here in sorted(parts.items()):
        factors[path], shifts[path] = _one(here)
    biased = any(shift is not None for shift in shifts.values())
    tensors: dict[str, Tensor] = {}
    for path, part in factors.items():
        scale = part.scale
        if shifts[path] is not None and not scale:  # B's bias is scaled as B is, so the scale must not be zero
            factors[path] = part = LowRank(down=part.down, up=part.up * 0, scale=scale + 1)
        keys = ("lora_embedding_A", "lora_embedding_B") if path in embeddings else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{path}.{key}": t for key, t in zip(keys, (part.down, part.up), strict=True)}
        if isinstance(part, DoRA):
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = part.magnitude
        if biased:
            shift = shifts[path]
            tensors[f"{PREFIX}{path}.lora_B.bias"] = part.up[:, 0] * 0 if shift is None else shift / part.scale
    return _config(release, factors, biased), tensors


def suited(parts: Modifications, embeddings: Collection[str]) -> Modifications:
    """Those that one LoRA holds: what adds up and is more than a shift. PEFT's use_dora and lora_bias are for all modules of an
    adapter: DoRA stands alone, and beside a shift there is no embedding."""
    doras = {path: here for path, here in parts.items() if any(isinstance(part, DoRA) for part in here)}
    if doras:
        return {path: here for path, here in doras.items() if len(here) == 1}
    pairs = {
        path: here
        for path, here in parts.items()
        if all(part.additive for part in here) and not all(isinstance(part, Affine) for part in here)
    }
    biased = any(isinstance(p, Affine) or "bias" in p.tensors for path in pairs for p in pairs[path])
    return {path: here for path, here in pairs.items() if not (biased and path in embeddings)}


def _one(here: Sequence[Modification]) -> tuple[Factors, Tensor | None]:
    """The one pair of factors, and the shift, of what adds up at a module."""
    shifts = [part.shift for part in here if isinstance(part, Affine)]
    shifts += [part.bias for part in here if isinstance(part, Dense) and "bias" in part.tensors]
    parts = [_factored(part) for part in here if not isinstance(part, Affine)]
    return parts[0] if len(parts) == 1 else LowRank.join(parts), sum(shifts) if shifts else None


def _factored(part: Modification) -> Factors:
    """Itself; of a dense or sparse change the columns (or rows) that are not zero, and which they are: that is exact."""
    if not isinstance(part, Dense | Sparse):
        return part
    delta = part.weight if isinstance(part, Dense) else part.dense()
    rows, columns = delta.any(1).nonzero()[:, 0], delta.any(0).nonzero()[:, 0]
    if len(columns) <= len(rows):
        up, down = delta[:, columns], torch.eye(delta.shape[1], dtype=delta.dtype)[columns]
    else:
        up, down = torch.eye(delta.shape[0], dtype=delta.dtype)[:, rows], delta[rows]
    if not up.shape[1]:
        up, down = delta[:, :1], delta[:1]  # nothing changes, and PEFT has no rank 0
    return LowRank(down=down.contiguous(), up=up.contiguous(), scale=torch.tensor(1.0))


def _config(release: Release, parts: Mapping[str, LowRank | DoRA], biased: bool) -> dict[str, Any]:
    """PEFT's config with the exact scale of every site: alpha / r (or its root) gives it back, so that A and B are
    written as they are. Names are whole paths, and patterns anchored: neither matches any other module."""
    ranks = {path: part.down.shape[0] for path, part in parts.items()}
    scales = {path: float(part.scale) for path, part in parts.items()}
    plain = {path: _alpha(scales[path], ranks[path]) for path in parts}
    rooted = {path: _alpha(scales[path], math.sqrt(ranks[path])) for path in parts}
    # rsLoRA where only that gives whole numbers, as it was trained; the scale is the same either way.
    use_rslora = not _whole(plain) and _whole(rooted)
    alphas = rooted if use_rslora else plain
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    method = release.manifest.method
    options = method.options if method and method.name == "lora" else {}
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": options.get("lora_dropout", 0.0),
        "use_rslora": use_rslora,
        "use_dora": any(isinstance(part, DoRA) for part in parts.values()),
        "lora_bias": biased,
        "target_modules": list(parts),
        "rank_pattern": {anchored(path): n for path, n in ranks.items() if n != r},
        "alpha_pattern": {anchored(path): a for path, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _alpha(scale: float, divisor: float) -> float | int:
    """alpha with alpha / divisor = scale: a whole number if it gives the same float32, else the exact product (a float32
    times a rank has no rounding in float64)."""
    near = round(scale * divisor)
    same = torch.tensor(near / divisor, dtype=torch.float32) == torch.tensor(scale, dtype=torch.float32)
    return near if same else scale * divisor


def _whole(alphas: Mapping[str, float | int]) -> bool:
    return all(isinstance(alpha, int) for alpha in alphas.values())
