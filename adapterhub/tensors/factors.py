"""Linear algebra on the factors of a low-rank matrix, never on the matrix itself. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (outputs, k), S (k,), Vh (k, inputs) of up @ down, k = min(outputs, r, inputs), in float64.

    up (outputs, r), down (r, inputs). Two thin QR decompositions and the SVD of an r x r core: exact to rounding, and
    far cheaper than the SVD of the product."""
    left, core_left = torch.linalg.qr(up.double())
    right, core_right = torch.linalg.qr(down.double().mT)
    u, s, vh = torch.linalg.svd(core_left @ core_right.mT, full_matrices=False)
    return left @ u, s, vh @ right.mT


def product_norm(up: Tensor, down: Tensor) -> float:
    """The Frobenius norm of up @ down, accurate also when its terms cancel."""
    core_left = torch.linalg.qr(up.double(), mode="r").R
    core_right = torch.linalg.qr(down.double().mT, mode="r").R
    return float(torch.linalg.matrix_norm(core_left @ core_right.mT))


def numerical_rank(s: Tensor, outputs: int, inputs: int) -> int:
    """How many singular values (descending) stand above float32 rounding: s > s[0] · max(outputs, inputs) · 2^-23."""
    return int((s > s[0] * max(outputs, inputs) * torch.finfo(torch.float32).eps).sum()) if s.numel() else 0


def balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up, down) of the leading `rank` parts, each singular value shared evenly by both factors."""
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
