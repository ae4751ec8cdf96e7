"""The steps of `explain` on a base: its skeleton on the meta device. There the program is put together, run and folded by
the runtime's own code, so what that would refuse is refused here, in its words; only numbers are not computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterhub.adapters.fit import bind, check_fit
from adapterhub.analysis.program import Program, Step, problem
from adapterhub.bases import loading, resolution
from adapterhub.bases.fingerprint import Fingerprint, check_base, fingerprint
from adapterhub.errors import HubError, NotFoldable, PluginError
from adapterhub.kinds.modification import Modifications
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.fold import fold
from adapterhub.runtime.forward import Plan
from adapterhub.runtime.plan import assemble, batch
from adapterhub.sites import Site, sites
from adapterhub.spec.expression import Ensemble, Node

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENSEMBLE = "it does not fold: an ensemble weighs whole models, which is no change of one"
Loaded = dict[str, Modifications]
"""By "name@version", paths as today's transformers has them."""


def on_base(program: Program, loaded: Loaded, base: object) -> Iterator[Step]:
    try:
        resolved = resolution.resolve(base)
        current, model = fingerprint(resolved), loading.skeleton(resolved)
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

    def bare(node: Node | None) -> Modifications:
        """What the runtime makes of a node, by module, without its numbers."""
        parts = assemble(node, loaded.__getitem__, True, here)
        parts = {path: [part.to("meta", model.dtype) for part in several] for path, several in parts.items()}
        for path, several in parts.items():
            for part in several:
                bind(part, at[path], model)
        return parts

    try:
        yield _rehearsed(model, batch([program.node], bare, None, object(), False))
        folding = Step("folding", "note", ENSEMBLE)
        if not isinstance(program.node, Ensemble):
            folding = _folded(model, bare(program.node))
            if folding.state == "ok" and (how := resolution.quantised(resolved.folder)):
                said = f"it folds where layers keep plain weights, and {resolved.name} is quantised ({how})"
                folding = Step("folding", "note", said, hint="fold it into the unquantised base")
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
        return Step("rehearsal", "note", f"this base does not run without its weights: {resolution.first_line(error)}")
    attachment = Attachment.of(model)
    try:
        with attachment.running(plan):
            model(**given)
    except Exception as error:
        if isinstance(error, HubError) and not _looked(error):
            raise
        return Step("rehearsal", "note", f"it does not run without numbers: {resolution.first_line(error)}")
    finally:
        attachment.detach()
    return Step("rehearsal", "ok", "a forward pass on the base's skeleton (shapes only) goes through")


def _looked(error: Exception) -> bool:
    """Whether a form, anybody's, looked at numbers, which are not there."""
    return isinstance(error, PluginError) and error.__cause__ is not None


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
    except Exception as error:
        if isinstance(error, HubError) and not _looked(error):
            raise
        return Step("folding", "note", f"whether it folds is not told without numbers: {resolution.first_line(error)}")
    return Step("folding", "ok", "it folds: model.fold()")
