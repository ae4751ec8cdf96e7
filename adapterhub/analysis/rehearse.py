"""The steps of `explain` that need torch: what the parts of a program are to one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.changes import weighted_sum
from adapterhub.analysis.on_base import ENSEMBLE, Loaded, on_base
from adapterhub.analysis.program import Program, Step, children, problem, pruned
from adapterhub.analysis.sites import alike, by_layer
from adapterhub.errors import HubError
from adapterhub.forms.gate import Gate
from adapterhub.kinds.modification import Modification
from adapterhub.sites import current_path, family
from adapterhub.spec.expression import Ensemble, Mix, Node, Ref, Scale, Stack, references


def rehearse(program: Program, base: object = None) -> Iterator[Step]:
    """The steps from the adapters' tensors on; with a base those on it too."""
    loaded: Loaded = {}
    for name, release in program.releases.items():
        try:
            parts = Adapter.load(program.hub, release).modifications()
        except HubError as error:
            yield problem("tensors", error)
            return
        loaded[name] = {current_path(release.manifest.base.architecture, path): here for path, here in parts.items()}
    order = _order(program, loaded)
    yield order
    yield _running(program, loaded)
    yield _merging(program, loaded, order.state == "note")
    if base is None:
        yield _folding(program, loaded)
    else:
        yield from on_base(program, loaded, base)


def _order(program: Program, loaded: Loaded) -> Step:
    """At which sites several parts stand in a stack, and whether their order matters there."""
    commuting, ordered = 0, dict[str, int]()
    known = family(next(iter(program.releases.values())).manifest.base.architecture) if program.releases else None
    for path in sorted({path for parts in loaded.values() for path in parts}, key=by_layer):
        whole = path.rpartition(".")[0]
        fused = known is not None and any(pattern.fullmatch(whole) for pattern, _ in known.fused)
        paths = (whole, path) if fused else (path,)  # what is at columns sees what is done to the whole of their module
        met, fixed = _stacked(program.node, paths, loaded)
        commuting += met and not fixed
        if fixed:
            here = pruned(program.node, lambda reference, paths=paths: any(p in loaded[str(reference)] for p in paths))
            key = f"{alike(path)}: {here}"
            ordered[key] = ordered.get(key, 0) + 1
    commute = f"at {commuting} sites stacked parts commute" if commuting else ""
    if ordered:
        told = f"the order matters at {sum(ordered.values())} sites" + (f"; {commute}" if commute else "")
        return Step("order", "note", told, [f"{what} x{n}" for what, n in ordered.items()])
    return Step("order", "ok", commute or "no two parts are stacked at a site")


def _stacked(node: Node, paths: Sequence[str], loaded: Loaded) -> tuple[bool, bool]:
    """Of sites of one module: whether parts of several adapters stand in one stack there, and whether some stack has an order."""
    inner = [_stacked(child, paths, loaded) for child in children(node)]
    met, fixed = any(m for m, _ in inner), any(f for _, f in inner)
    if isinstance(node, Stack):
        here = [
            [part for ref in references(child) for path in paths for part in loaded[str(ref)].get(path, [])]
            for child in node.nodes
        ]
        met = met or sum(map(bool, here)) > 1
        # Memories lie beside the tokens, whatever the others do to the hidden states.
        others = [rest for parts in here if (rest := [part for part in parts if not _remembered(part)])]
        fixed = fixed or (len(others) > 1 and not all(part.additive for rest in others for part in rest))
    return met, fixed


def _remembered(part: Modification) -> bool:
    """Whether all it does is to be attended to (a prefix)."""
    cls = type(part)
    return cls.lanes is not Modification.lanes and cls.delta_out is Modification.delta_out and not part.changes_input


def _running(program: Program, loaded: Loaded) -> Step:
    """What a caller must keep to."""
    details = []
    if isinstance(program.node, Ensemble):
        details.append(
            f"each row runs as {len(program.node.lanes)} lanes, and so does its cache: it cannot be cut or repeated"
        )
    for name, parts in loaded.items():
        every = [part for here in parts.values() for part in here]
        if any(type(part).lanes is not Modification.lanes for part in every):
            details.append(f"{name} is attended to: no static cache (leave cache_implementation out)")
        if moved := max((part.advance for part in every), default=0):
            details.append(
                f"{name} moves the positions of its rows up by {moved}: it can be stacked, not scaled or mixed"
            )
        if any(part.stateful for part in every):
            details.append(
                f"{name} keeps state along a sequence: its cache cannot be cut, repeated or filled by others"
            )
    if details:
        return Step("running", "note", "it runs within bounds", details)
    return Step("running", "ok", "any cache, any batch")


def _merging(program: Program, loaded: Loaded, ordered: bool) -> Step:
    terms = weighted(program.node)
    if terms is None:
        return Step("merging", "note", "it is no weighted sum of adapters, so it has no merge")
    if none := _no_weights(loaded):
        return Step("merging", "note", f"it does not merge: {none}: no change of a weight")
    if [weight for _, weight in terms] == [1.0]:
        return Step("merging", "ok", "one adapter: there is nothing to merge")
    names, weights = " ".join(name for name, _ in terms), ",".join(f"{weight:g}" for _, weight in terms)
    command = f"adapterhub merge {names} --weights {weights} --name NAME" + " --base NAME" * _takes_base(terms, loaded)
    if ordered:
        told = "it merges into the sum of the changes, which is not this stack where the order matters"
        return Step("merging", "note", f"{told}: {command}")
    return Step("merging", "ok", f"it merges: {command}")


def _takes_base(terms: list[tuple[str, float]], loaded: Loaded) -> bool:
    """Whether a merge reads the base's weights: tried at one site of each kind."""
    seen = set()
    for path in sorted({path for name, _ in terms for path in loaded[name]}, key=by_layer):
        here = [
            (weight, [part.to("cpu", torch.float32) for part in loaded[name].get(path, [])]) for name, weight in terms
        ]
        kind = alike(path), tuple(part.form for _, parts in here for part in parts)
        if kind not in seen and weighted_sum([(weight, parts) for weight, parts in here if weight and parts]) is None:
            return True
        seen.add(kind)
    return False


def weighted(node: Node) -> list[tuple[str, float]] | None:
    """The adapters of a weighted sum and their weights; None for an expression that is more than one."""
    match node:
        case Ref(reference):
            return [(str(reference), 1.0)]
        case Scale(weight, inner):
            terms = weighted(inner)
            return terms and [(name, weight * own) for name, own in terms]
        case Stack(nodes) | Mix(nodes):
            several = [weighted(inner) for inner in nodes]
            return None if None in several else [term for terms in several for term in terms]
    return None


def _no_weights(loaded: Loaded) -> str:
    """The adapters and their forms that are no change of a weight; "" if all are one."""
    none = {
        f"{name}, {part.form}": None
        for name, parts in loaded.items()
        for here in parts.values()
        for part in here
        if type(part).delta_weight is Modification.delta_weight or isinstance(part, Gate)
    }
    return "; ".join(none)


def _folding(program: Program, loaded: Loaded) -> Step:
    if isinstance(program.node, Ensemble):
        return Step("folding", "note", ENSEMBLE)
    if none := _no_weights(loaded):
        return Step("folding", "note", f"it does not fold: {none}: no change of a weight")
    return Step("folding", "ok", "each form is a change of a weight: it folds where each site is one (give --base)")
