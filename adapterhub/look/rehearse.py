"""The steps of `explain` that need torch: what the parts of a program are to one another, and whether it runs on a base.

The base is its skeleton on the meta device. There the program is put together, run and folded by the runtime's own code,
so what that would refuse is refused here, in its words; only numbers are not computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterhub import bases
from adapterhub.adapter import Adapter, Modifications, bind, check_fit
from adapterhub.attach import Attachment
from adapterhub.bases.fingerprint import Fingerprint, check_base, fingerprint
from adapterhub.changes import weighted_sum
from adapterhub.errors import HubError, NotFoldable
from adapterhub.expression import Ensemble, Mix, Node, Ref, Scale, Stack, references
from adapterhub.fold import fold
from adapterhub.forward import Plan
from adapterhub.gate import Gate
from adapterhub.look.explain import Program, Step, children, problem, pruned
from adapterhub.look.touched import alike, by_layer
from adapterhub.modification import Modification
from adapterhub.plan import assemble, batch
from adapterhub.sites import Site, current_path, sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENSEMBLE = "it does not fold: an ensemble weighs whole models, which is no change of one"
Loaded = dict[str, Modifications]
"""By "name@version", paths as today's transformers has them."""


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
        yield from _on_base(program, loaded, base)


def _order(program: Program, loaded: Loaded) -> Step:
    """At which sites several parts stand in a stack, and whether their order matters there."""
    commuting, ordered = 0, dict[str, int]()
    for path in sorted({path for parts in loaded.values() for path in parts}, key=by_layer):
        met, fixed = _stacked(program.node, path, loaded)
        commuting += met and not fixed
        if fixed:
            here = pruned(program.node, lambda reference, path=path: path in loaded[str(reference)])
            key = f"{alike(path)}: {here}"
            ordered[key] = ordered.get(key, 0) + 1
    commute = f"at {commuting} sites stacked parts commute" if commuting else ""
    if ordered:
        told = f"the order matters at {sum(ordered.values())} sites" + (f"; {commute}" if commute else "")
        return Step("order", "note", told, [f"{what} x{n}" for what, n in ordered.items()])
    return Step("order", "ok", commute or "no two parts are stacked at a site")


def _stacked(node: Node, path: str, loaded: Loaded) -> tuple[bool, bool]:
    """Of a site: whether parts of several adapters stand in one stack there, and whether some stack has an order."""
    inner = [_stacked(child, path, loaded) for child in children(node)]
    met, fixed = any(m for m, _ in inner), any(f for _, f in inner)
    if isinstance(node, Stack):
        here = [[part for ref in references(child) for part in loaded[str(ref)].get(path, [])] for child in node.nodes]
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


# --- on a base -----------------------------------------------------------------------------------------------------


def _on_base(program: Program, loaded: Loaded, base: object) -> Iterator[Step]:
    try:
        resolved = bases.resolve(base)
        current, model = fingerprint(resolved), bases.skeleton(resolved)
    except HubError as error:
        yield problem("base", error)
        return
    yield from (_verdict(program, name, current) for name in program.releases)
    here = sites(model)
    fits = _fit(loaded, here)
    yield fits
    if fits.state == "problem":
        return
    at = {site.path: site for site in here}

    def adapter(name: str) -> Modifications:
        """One adapter without its numbers."""
        parts = {path: [part.to("meta", model.dtype) for part in several] for path, several in loaded[name].items()}
        for path, several in parts.items():
            for part in several:
                bind(part, at[path], model)
        return parts

    def bare(node: Node | None) -> Modifications:
        """What the runtime makes of a node, by module."""
        return assemble(node, adapter, True, here)

    try:
        yield _rehearsed(model, batch([program.node], bare, None, object(), False))
        folding = Step("folding", "note", ENSEMBLE)
        if not isinstance(program.node, Ensemble):
            folding = _folded(model, bare(program.node))
        if folding.state == "ok" and (how := bases.quantised(resolved.folder)):
            told = f"it folds where layers keep plain weights, and {resolved.name} is quantised ({how})"
            folding = Step("folding", "note", told, hint="fold it into the unquantised base")
    except HubError as error:
        yield problem("rehearsal", error)
        return
    yield folding


def _verdict(program: Program, name: str, current: Fingerprint) -> Step:
    """What the base is to the one that an adapter was made for."""
    record = program.releases[name].manifest.base
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            verdict = check_base(record, program.hub.store.read(record.sketch), current)
    except HubError as error:
        return problem("base", error)
    if caught:
        return Step("base", "note", f"{name} was {caught[0].message}")
    return Step("base", "ok", f"{name}: {current.base.name} has the weights it was made for ({verdict.reason})")


def _fit(loaded: Loaded, here: list[Site]) -> Step:
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, parts in loaded.items():
            try:
                check_fit(parts, here, name)
            except HubError as error:
                return problem("fit", error)
            told.append(f"{name}: {len(parts)} of the base's {len(here)} sites")
    wasteful = list(dict.fromkeys(str(warning.message) for warning in caught))
    if wasteful:
        return Step("fit", "note", "every site exists, and the widths fit", told + wasteful)
    return Step("fit", "ok", "every site exists, and the widths fit", told)


@torch.no_grad()
def _rehearsed(model: PreTrainedModel, plan: Plan) -> Step:
    """One forward pass, in which every hook and check is the real one."""
    model.config.pad_token_id = None  # a model that knows it looks for it among the ids, which are not there
    try:
        given = _given(model)
        model(**given)
    except Exception as error:  # some models look at the numbers of their masks
        return Step("rehearsal", "note", f"this base does not run without its weights: {bases.first_line(error)}")
    attachment = Attachment.of(model)
    try:
        with attachment.running(plan):
            model(**given)
    except HubError:
        raise
    except Exception as error:  # a form, anybody's, that looks at numbers
        return Step("rehearsal", "note", f"it does not run without numbers: {bases.first_line(error)}")
    finally:
        attachment.detach()
    return Step("rehearsal", "ok", "a forward pass on the base's skeleton (shapes only) goes through")


def _given(model: PreTrainedModel) -> dict[str, Tensor]:
    """One row of what the model takes."""
    config = model.config
    shapes = {
        "pixel_values": "num_channels image_size image_size",
        "input_features": "num_mel_bins max_source_positions",
    }
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    given = {"input_ids": ids}
    if model.main_input_name in shapes:
        shape = [getattr(config, name) for name in shapes[model.main_input_name].split()]
        shape[-1] *= 2 if model.main_input_name == "input_features" else 1  # two frames of sound make a position
        given = {model.main_input_name: torch.zeros(1, *shape, device="meta")}
    return {**given, "decoder_input_ids": ids} if config.is_encoder_decoder else given


def _folded(model: PreTrainedModel, parts: Modifications) -> Step:
    """Folds into the skeleton, which is of no use after that."""
    try:
        fold(model, parts)
    except NotFoldable as error:
        return Step("folding", "note", f"it does not fold: {error}", hint=error.hint)
    except Exception as error:  # a form, anybody's, that looks at numbers
        return Step("folding", "note", f"whether it folds is not told without numbers: {bases.first_line(error)}")
    return Step("folding", "ok", "it folds: model.fold()")
