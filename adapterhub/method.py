"""A method is how an adapter is made: which sites, what to start from, what to keep true while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from adapterhub.modification import Modification
from adapterhub.sites import Site


class Method:
    """Make modifications at sites. A research method is usually one `build`."""

    @dataclass(frozen=True)
    class Config:
        """The options; `--set name=value` on the command line."""

    starts_at_base: ClassVar[bool] = True
    """A fresh adapter changes nothing (the law *start* holds it to that)."""

    weighs: ClassVar[bool] = False
    """It makes gates over other adapters (those of --on), which do not lie beneath it: `build` gets the sites where they
    act, and its option `children` says how many they are."""
    float32_base: ClassVar[bool] = False
    """It trains through the base's own weights (W + ΔW), where bfloat16 would round small changes away: it needs the
    base in float32."""

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Modification]:
        """{site path: fresh modification}, float32 on the CPU; random numbers from torch's global generator (seeded)."""
        raise NotImplementedError

    def after_step(self, modifications: Mapping[str, Modification]) -> None:
        """Called after each optimiser step, without gradients: put tensors back where they must lie, in place."""
