"""What a manifest must agree with: its expressions with its parents, and what follows from them."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from adapterhub.errors import ExpressionError, ManifestError, ParentsWarning
from adapterhub.spec.expression import references
from adapterhub.spec.manifest import Manifest, Parent, Release
from adapterhub.spec.parser import parse


def weighed(manifest: Manifest) -> list[Parent]:
    """What a trained gate weighs, in order; nothing for any other adapter."""
    return [parent for parent in manifest.parents if parent.relation == "gate"]


def check_expressions(manifest: Manifest) -> None:
    """Hold what runs by its text to the parents, which are known by their digests: a composition names exactly them,
    each at its version, and brings nothing else (so nothing is made of itself); what a training puts beneath is among
    them. Raises ManifestError."""
    who = manifest.label
    hint = "make it again, or get it from another source"
    parents = {
        relation: {p.label for p in manifest.parents if p.relation == relation} for relation in ("compose", "on")
    }
    if manifest.compose is not None:
        if differ := _named(manifest.compose, who) ^ parents["compose"]:
            differ = ", ".join(sorted(differ))
            raise ManifestError(f"the composition {who} does not name its parents at their versions: {differ}", hint)
        if manifest.files or manifest.forms or manifest.codecs:
            raise ManifestError(f"the composition {who} holds tensors of its own", hint)
    beneath = manifest.recipe.get("beneath")
    if beneath is not None and (others := _named(beneath, who) - parents["on"]):
        raise ManifestError(f"beneath {who} are others than its parents: {', '.join(sorted(others))}", hint)


def _named(text: object, who: str) -> set[str]:
    try:
        return {str(reference) for reference in references(parse(text if isinstance(text, str) else ""))}
    except (ExpressionError, RecursionError) as error:
        problem = str(error).splitlines()[0]
        raise ManifestError(f"an expression of {who} does not parse: {problem}", "make it again") from None


def warn_missing_parents(releases: Collection[Release]) -> None:
    """A ParentsWarning for each that was trained over others which are not with it."""
    there = {release.digest for release in releases}
    for release in releases:
        missing = [p for p in release.manifest.parents if p.relation == "on" and p.digest not in there]
        if missing:
            names = " + ".join(parent.label for parent in missing)
            warnings.warn(
                f"{release} was trained over {names} and does its work only with that beneath: '{names} + {release}'",
                ParentsWarning,
                stacklevel=3,
            )


def joined_licences(releases: list[Release]) -> str | None:
    """The licences of all parents, joined as SPDX does; None if no parent states one."""
    known = sorted({r.manifest.licence for r in releases if r.manifest.licence})
    return " AND ".join(known) or None
