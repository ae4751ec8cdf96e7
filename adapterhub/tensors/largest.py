"""The largest entries of a tensor. Tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor


def largest(values: Tensor, count: int) -> Tensor:
    """Places (count,) of the entries largest in magnitude, in the flattened values and in rising order.

    Of equal ones the first stay, so that equal tensors give equal places. Linear in the entries: nothing is sorted."""
    flat = values.detach().reshape(-1).abs()
    kept = flat.new_zeros(len(flat), dtype=bool)
    if count > 0:
        threshold = flat.kthvalue(max(1, len(flat) - count + 1)).values
        kept = flat > threshold
        kept[(flat == threshold).nonzero()[: count - int(kept.sum()), 0]] = True
    return kept.nonzero()[:, 0]
