"""A method is how an adapter is made: in which stages, at which sites, from what, under which objective, and what stays
true while it trains. Most have one stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.kinds.modification import Modification
from adapterhub.sites import Site
from adapterhub.sites.weights import values

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapterhub.kinds.modification import Modifications
    from adapterhub.kinds.training import TrainingContext

Parts = Mapping[str, Modification]
"""{site path: what is trained there}."""


@dataclass(frozen=True)
class BuildContext:
    """What a stage builds from."""

    sites: Sequence[Site]
    base: PreTrainedModel
    """To read from, never to change."""
    before: Parts = field(default_factory=dict)
    """The stage before, trained, on the CPU; {} for the first. Of an adapter that goes on (`--continue`): itself."""
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    """What the stage's measurement found."""

    def weight(self, site: Site) -> Tensor:
        """The base's weight at a linear site or an embedding, (outputs, inputs) float32 on the CPU, a copy; dequantised where
        it is not plain. Raises IncompatibleBase where its numbers are not known."""
        try:
            weight = values(self.base.get_submodule(site.module))
        except IncompatibleBase as error:
            raise IncompatibleBase(
                f"the method reads the base's weight at {site.path}, but {error}", error.hint
            ) from None
        if site.columns:
            weight = weight[site.columns.index()]
        return weight.float().cpu().clone()


@dataclass(frozen=True)
class Measurement:
    """What is found out on the base (and what lies beneath) before a stage builds. Kept in the hub's folder
    `training/measured`, by the digests of base, data and options: another run that shares them does not measure again."""

    name: str
    take: Callable[[TrainingContext], Mapping[str, Tensor]]
    """The tensors by names of one's own, on the CPU. Nothing new runs on the model; gradients and dropout are off, and torch's
    global generator is seeded with 0."""
    extra: str | None = None
    """Which of the run's extra data files it reads (`--extra NAME=FILE`); None: the training data."""
    options: Collection[str] | None = None
    """The names of the method's options that decide what comes out; None: all. It can read no others."""


@dataclass(frozen=True)
class Stage:
    """One training of a method: from fresh modifications, with an optimiser and a schedule of its own.

    What is trained are the modifications it builds; those of the stage before are no longer on the model. The
    modifications of the last stage, trained, are the adapter."""

    name: str
    """`[a-z][a-z0-9_]*`; no two stages of a method have the same."""
    build: Callable[[BuildContext], Parts]
    """Fresh modifications, float32 on the CPU; random numbers from torch's global generator (seeded).

    An adapter that goes on (`--continue`) is built by the last stage alone, with itself as `given.before`; the stored
    tensors then take the place of the fresh ones."""
    share: float = 1.0
    """Of the run's steps, relative to the other stages' shares."""
    lr: float = 1.0
    """Times the run's learning rate. In each stage it rises over the run's warmup (or a tenth of the stage) and falls
    to 0."""
    penalty: Callable[[Parts], Tensor] | None = None
    """Added to the loss at every step, () float: an L1 norm, for example."""
    after_step: Callable[[Parts], None] | None = None
    """Called after each optimiser step, without gradients: put tensors back where they must lie, in place."""
    options: Collection[str] | None = None
    """The names of the options that decide what comes out of it; None: all. Runs that share these, and all else that
    decides, share the stage: it is trained once. It can read no others, wherever it reads them; what `stages` itself reads
    decides too."""
    check: Callable[[BuildContext], object] | None = None
    """Raise UsageError for what this stage cannot do with these sites and this base. Called before the first stage trains,
    and free to read all options; not for an adapter that goes on."""
    note: Callable[[Parts], Mapping[str, Any]] | None = None
    """What the recipe shall say of it once it is trained: what was selected, for example. As JSON has it."""
    measurement: Measurement | None = None
    """Taken before it builds; not for an adapter that goes on."""
    finish: Callable[[Parts, BuildContext], Parts | Modifications] | None = None
    """(trained, on the CPU; given) -> what is stored in their place, which must do the same. Of the last stage."""


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
    bidirectional: ClassVar[bool] = False
    """What it makes reads later tokens too, so it refuses causal bases: the laws try it on an encoder."""
    float32_base: ClassVar[bool] = False
    """It trains through the base's own weights (W + ΔW), where bfloat16 would round small changes away: it needs the
    base in float32."""

    def build(self, sites: Sequence[Site], config: Config) -> Mapping[str, Modification]:
        """{site path: fresh modification}, float32 on the CPU; random numbers from torch's global generator (seeded)."""
        raise NotImplementedError

    def take_up(self, modifications: Mapping[str, Modification]) -> None:
        """Called once, before stored modifications of this method train in a loop of one's own: what `build` would have
        given them that is not stored (parameters that shall get no gradient, for example)."""

    def after_step(self, modifications: Mapping[str, Modification]) -> None:
        """Called after each optimiser step, without gradients: put tensors back where they must lie, in place."""

    def stages(self, config: Config) -> Sequence[Stage]:
        """The trainings that make an adapter, in order. Refuse here, in the first one's build or in a `check` what cannot be
        done: later stages begin after hours."""
        return [Stage("train", lambda given: self.build(given.sites, config), after_step=self.after_step)]


def require_plain(sites: Sequence[Site], name: str) -> None:
    """Raise UsageError unless every weight is plain at these sites, where the named method or form changes the weight itself."""
    if (site := next((site for site in sites if site.packed), None)) is not None:
        raise UsageError(
            f"{name} trains through the base's own weights, and at {site.path} {site.packed}",
            "load the base unquantised, or use a method that works beside the weight (lora, bottleneck, bitfit)",
        )
