"""Whether recorded bases are one model, or copies of it."""

from __future__ import annotations

from adapterhub.errors import IncompatibleBase
from adapterhub.spec.manifest import Base, Release
from adapterhub.store.releases import Releases


def common_base(hub: Releases, releases: list[Release]) -> Base:
    """The base of the first, if all were made for the same one (or for copies of it). Raises IncompatibleBase."""
    first = releases[0]
    for other in releases[1:]:
        if difference := base_difference(hub, first.manifest.base, other.manifest.base):
            raise IncompatibleBase(
                f"{first} was made for {first.manifest.base.name}, {other} for {other.manifest.base.name}: {difference}",
                "adapters of one composition or merge share one base; train one of them again on the other's base",
            )
    return first.manifest.base


def base_difference(hub: Releases, one: Base, other: Base) -> str:
    """Why two recorded bases are different models; "" if they are the same or copies of each other."""
    if one.tokenizer and other.tokenizer and one.tokenizer != other.tokenizer:
        return "they have different tokenizers"
    if (one.structure, one.sketch.digest, one.computes) == (other.structure, other.sketch.digest, other.computes):
        return ""
    from adapterhub.bases.fingerprint import Fingerprint, compare

    verdict = compare(*(Fingerprint(base, hub.store.read(base.sketch)) for base in (one, other)))
    return verdict.reason if verdict.kind == "another" else ""
