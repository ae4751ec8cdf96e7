"""A form with state, and the method that makes it: a causal convolution over the tokens that a module puts out.

Every channel mixes its last few values (depthwise, as in Gulati et al., "Conformer", 2020, but looking back only)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import adapterhub
from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.sites import select


class CausalConv(adapterhub.Modification):
    """Δy at token t = Σₖ kernel[k] * y at the k-th of the last `size` tokens. Tensor: kernel (size, outputs)."""

    form = "causal_conv"
    stores = ("kernel",)
    stateful = True

    def check(self, site: adapterhub.Site) -> None:
        if self.kernel.ndim != 2 or self.kernel.shape[1] != site.outputs:
            raise IncompatibleBase(
                f"a kernel of shape {tuple(self.kernel.shape)} does not fit a site with {site.outputs} outputs",
                "use the base that the adapter was made for",
            )

    def delta_out(self, x: torch.Tensor, y: torch.Tensor, step: adapterhub.Step) -> torch.Tensor:
        return torch.einsum("rtkc,kc->rtc", step.window(y, len(self.kernel)), self.kernel)

    @classmethod
    def random(cls, site: adapterhub.Site) -> "CausalConv":
        return cls(kernel=0.2 * torch.randn(4, site.outputs))


class CausalConvMethod(adapterhub.Method):
    """A convolution after attention and feed-forward; it starts at the base (a kernel of zeros)."""

    @dataclass(frozen=True)
    class Config:
        size: int = 4
        """Tokens that a channel sees, the present one among them."""
        target_modules: str | tuple[str, ...] = ("attention", "ffn")

    def build(self, sites: Sequence[adapterhub.Site], config: Config) -> Mapping[str, CausalConv]:
        if config.size < 1:
            raise UsageError(f"a kernel of size {config.size} sees no token", "for example --set size=4")
        return {
            site.path: CausalConv(kernel=torch.zeros(config.size, site.outputs))
            for site in select(sites, config.target_modules)
        }
