"""Low-rank pairs at a smaller rank: the best one there is (Eckart and Young, 1936), by SVD of the factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adapterhub.errors import CodecError, UsageError
from adapterhub.kinds.codec import Codec
from adapterhub.tensors.factors import balanced, numerical_rank, product_svd


class SVD(Codec):
    """Truncate every low-rank pair; all other tensors stay as they are. Decoding has nothing to do.

    Without options only what holds nothing is dropped (ranks above the numerical one): a change by rounding."""

    @dataclass(frozen=True)
    class Config:
        rank: int | None = None
        """The largest rank a pair keeps."""
        energy: float = 1.0
        """The share of the squared norm of each pair's product that must stay: 0.99 drops the weakest 1 %."""

    reshapes = True
    tolerance = 1e-5

    def encode(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        if (config.rank is not None and config.rank < 1) or not 0 < config.energy <= 1:
            raise UsageError("svd needs rank >= 1 and 0 < energy <= 1", "for example --set rank=4 or --set energy=0.99")
        encoded = dict(tensors)
        for name, up in tensors.items():
            prefix = name.removesuffix(".up")
            down = tensors.get(f"{prefix}.down")
            if down is None or not prefix.rpartition(".")[0].endswith(".low_rank"):
                continue
            u, s, vh = product_svd(up, down)
            rank = self._rank(s, up.shape[0], down.shape[1], config)
            if rank < down.shape[0]:
                new_up, new_down = balanced(u, s, vh, rank)
                encoded[name] = new_up.to(up.dtype).contiguous()
                encoded[f"{prefix}.down"] = new_down.to(down.dtype).contiguous()
        if all(encoded[name] is tensor for name, tensor in tensors.items()):
            raise CodecError(
                "svd finds no low-rank pair that would get smaller",
                "ask for a smaller rank (--set rank=4) or accept a loss (--set energy=0.99)",
            )
        return encoded

    @staticmethod
    def _rank(s: Tensor, outputs: int, inputs: int, config: Config) -> int:
        rank = numerical_rank(s, outputs, inputs)
        if config.energy < 1:
            kept = s.square().cumsum(0)
            rank = min(rank, int((kept < config.energy * kept[-1]).sum()) + 1)
        return max(1, rank if config.rank is None else min(rank, config.rank))
