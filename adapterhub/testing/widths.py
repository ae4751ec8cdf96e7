"""The law of forms that tries their `check` with tensors of other widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from adapterhub.adapters.fit import bind, random_states
from adapterhub.errors import IncompatibleBase, PluginError
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.modification import Modification, Step
from adapterhub.sites import Site, sites
from adapterhub.testing.bed import reads, tiny_for


def widths(form: type[Modification], device: str) -> None:
    """`check` refuses tensors of other widths than the site's, its inputs and outputs exchanged too; what it accepts of tensors
    that are larger by one in one dimension runs there all the same."""
    model = tiny_for(form)
    for site in sites(model):
        made = _random(form, site)
        if made is None or not reads(made, model):
            continue
        for other in _other_widths(site):
            try:
                unlike = not _alike(made, _random(form, other))
            except Exception:  # there is no site of such widths
                continue
            words = f"of a site of {site.inputs} to {site.outputs} at one of {other.inputs} to {other.outputs}"
            assert not unlike or _refuses(made, other), f"{site.path}: check accepts the tensors {words}"
        for name, larger in _larger(made):
            shapes = f"{name} {tuple(made.tensors[name].shape)} grown to {tuple(larger.tensors[name].shape)}"
            assert _refuses(larger, site) or _runs(larger, site, model), (
                f"{site.path}: check accepts {shapes} at a site of {site.inputs} to {site.outputs}, and it does not run"
            )


def _random(form: type[Modification], site: Site) -> Modification | None:
    torch.manual_seed(0)
    return call(form, "random", site, site=site.path)


def _other_widths(site: Site) -> list[Site]:
    changed = [(site.inputs + d, site.outputs + e) for d, e in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    changed += [(site.outputs, site.inputs)] if site.inputs != site.outputs else []
    return [replace(site, inputs=inputs, outputs=outputs) for inputs, outputs in changed]


def _alike(one: Modification, other: Modification | None) -> bool:
    """Whether tensors are of equal shapes, and equal where they are integers: then nothing tells the sites apart."""
    return other is not None and all(
        t.shape == other.tensors[name].shape and (t.is_floating_point() or torch.equal(t, other.tensors[name]))
        for name, t in one.tensors.items()
    )


def _larger(made: Modification) -> Iterator[tuple[str, Modification]]:
    for name, tensor in made.tensors.items():
        for dim in range(tensor.ndim):
            grown = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
            try:
                yield name, type(made)(**{**made.tensors, name: grown})
            except Exception:  # refused before it is made
                continue


def _refuses(made: Modification, site: Site) -> bool:
    try:
        call(made, "check", site, site=site.path)
    except IncompatibleBase:
        return True
    return False


def _runs(made: Modification, site: Site, model: torch.nn.Module) -> bool:
    x = torch.randint(site.inputs, (2, 3)) if site.embedding else torch.randn(2, 3, site.inputs)
    step = Step(tapped=lambda tap: random_states(tap, sites(model), (2, 3)))
    try:
        bind(made, site, model)
        call(made, "delta_in", x, step)
        call(made, "delta_out", x, torch.randn(2, 3, site.outputs), step)
    except PluginError:
        return False
    return True
