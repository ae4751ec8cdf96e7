"""HFT: half of the weights train, the other half stays as it is (Hui et al., "HFT: Half Fine-Tuning for Large Language
Models", ACL 2025). One parameter schedule, `hft`, for any method."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, TypeVar

from adapterhub import ParameterSchedule, Site
from adapterhub.errors import UsageError

ENDS = ("embedding", "head")
CATEGORIES = {
    **dict.fromkeys(("query", "key", "value", "query_key_value", "attention_output"), "attention weights"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "feed-forward weights"),
}
"""What is halved together inside a layer, by role. Any other role is a category of its own."""

T = TypeVar("T", bound=Hashable)


class HFT(ParameterSchedule):
    """In each round a random half of the sites trains, each whole, and the rest is frozen."""

    @dataclass(frozen=True)
    class Config:
        rounds: int = 1
        """Parts of equal length into which the steps are cut; each draws its half anew."""
        ratio: float = 0.5
        """The share that trains."""
        granularity: str = "category"
        """What is halved: category, each kind of weight inside each layer; layer, the layers; model, all sites together."""
        io: str = "train"
        """Embedding and head: train, freeze, or half (each with the chance `ratio`, one of two where there are both)."""
        complement: bool = False
        """Train what the same seed and options freeze without it. Embedding and head: as before, but of half the other."""

        def __post_init__(self) -> None:
            if self.rounds < 1 or not 0 < self.ratio < 1:
                raise UsageError(
                    f"HFT needs rounds >= 1 and a ratio between 0 and 1, not {self.rounds} and {self.ratio}",
                    "for example --set hft.rounds=2 --set hft.ratio=0.5",
                )
            for option, known in (("granularity", ("category", "layer", "model")), ("io", ("train", "freeze", "half"))):
                if (value := getattr(self, option)) not in known:
                    raise UsageError(f"unknown {option} {value!r}", f"one of: {', '.join(known)}")

    example: ClassVar = {"rounds": 2}

    @property
    def rounds(self) -> int:
        return self.config.rounds

    def rates(self, tensors: Mapping[str, Site], round: int, draw: random.Random) -> Mapping[str, float]:
        config, sites = self.config, list(dict.fromkeys(tensors.values()))
        ends = [site for site in sites if site.role in ENDS]
        inner = [site for site in sites if site.role not in ENDS]
        if config.granularity == "layer":
            layers = grouped(inner, lambda site: (site.part == "encoder", site.layer))
            trained = {site for layer in drawn([list(layers)], config.ratio, draw) for site in layers[layer]}
        elif config.granularity == "model":
            trained = drawn([inner], config.ratio, draw)
        else:
            trained = set()
            for category in grouped(inner, _category).values():
                layers = grouped(category, lambda site: (site.part, site.layer))
                trained |= drawn(list(layers.values()), config.ratio, draw)
        if config.io == "half":
            trained |= drawn([ends], config.ratio, draw)
        if config.complement:
            trained = {site for site in sites if site not in trained and (config.io == "half" or site not in ends)}
        if config.io == "train":
            trained |= set(ends)
        return {name: float(site in trained) for name, site in tensors.items()}


def _category(site: Site) -> str:
    """A module without a known role: by its name, which is the same in each layer."""
    return CATEGORIES.get(site.role, site.role or site.path.rpartition(".")[2])


def grouped(sites: Iterable[Site], key: Callable[[Site], T]) -> dict[T, list[Site]]:
    """The sites by their key, in their order."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return groups


def drawn(groups: Sequence[Sequence[T]], ratio: float, draw: random.Random) -> set[T]:
    """`ratio` of what is in all groups, and of each as near to it as whole ones come. At random: who, which groups give
    one more, and whether a fraction that is left over at the end counts as one."""
    exact = Fraction(repr(ratio))  # as it was written: in floats 0.28 of 25 is a little more than 7
    shares = [exact * len(group) for group in groups]
    least = [math.floor(share) for share in shares]
    total = math.floor(sum(shares)) + (draw.random() < sum(shares) % 1)
    between = [place for place, share in enumerate(shares) if share % 1]
    more = draw.sample(between, total - sum(least))
    return {one for place, group in enumerate(groups) for one in draw.sample(group, least[place] + (place in more))}
