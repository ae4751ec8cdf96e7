"""Whether modifications fit a base, and what binds them to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from adapterhub.errors import IncompatibleBase, NoEffect, UnsafeFile
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.lanes import remembers
from adapterhub.kinds.modification import Modification, Modifications, Step
from adapterhub.plugins.boundary import author_line
from adapterhub.sites import Site, Tap, tapped
from adapterhub.sites.weights import compute_device, matrix, values


def check_fit(modifications: Mapping[str, Sequence[Modification]], sites: Sequence[Site], name: str) -> None:
    """Raise IncompatibleBase unless every modification has its site and the right widths; all faults in one error."""
    by_path = {site.path: site for site in sites}
    faults = []
    for path, parts in modifications.items():
        if path not in by_path:
            faults.append(f"{path}: no such site in this base")
            continue
        for modification in parts:
            if by_path[path].columns and modification.changes_input:
                faults.append(f"{path}: it changes the input, which these columns share with the others")
                continue
            try:
                modification.check(by_path[path])
                for tap in modification.taps:
                    tapped(sites, tap)
            except IncompatibleBase as error:
                faults.append(f"{path}: {error}")
            except Exception as error:  # tensors of a shape that the form's check did not think of
                line = author_line(modification, error)
                faults.append(f"{path}: its tensors make no {modification.form}: {error} ({line})")
    if faults:
        raise IncompatibleBase(
            f"{name} does not fit this base ({len(faults)} of {len(modifications)} sites):\n  " + "\n  ".join(faults),
            "use the base it was made for",
        )


def check_range(parts: Modifications, name: str, dtype: torch.dtype) -> None:
    """Raise UnsafeFile if a tensor is no longer finite: too large for the dtype it was cast to, or scaled too far."""
    for path, here in parts.items():
        for modification in here:
            for key, tensor in modification.tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise UnsafeFile(
                        f"{name} is too large for {str(dtype).removeprefix('torch.')}: {key} at {path} overflows",
                        "load the base in float32 or bfloat16, or give a smaller weight",
                    )


def require_effect(modifications: Modifications, sites: Sequence[Site], model: torch.nn.Module, name: str) -> None:
    """Raise NoEffect if every modification leaves random hidden states exactly as they are, UnsafeFile if one overflows."""
    random = torch.Generator().manual_seed(0)
    by_path = {site.path: site for site in sites}
    effect = False
    for path, parts in modifications.items():
        site = by_path[path]
        x = torch.randn(1, 4, 0 if site.embedding else site.inputs, generator=random)
        if site.embedding:
            x = torch.arange(site.inputs)[None]  # every token, since a change may be of a few rows only
        y = torch.randn(*x.shape[:2], site.outputs, generator=random)
        for modification in parts:
            bind(modification, site, model)
            local = modification.to("cpu", torch.float32)
            step = Step(tapped=lambda tap: random_states(tap, sites, (1, 4), random))
            changes = [
                c
                for c in (call(local, "delta_in", x, step, site=path), call(local, "delta_out", x, y, step, site=path))
                if c is not None
            ]
            if not all(change.isfinite().all() for change in changes):
                raise UnsafeFile(f"{name} is too large: at {path} it overflows float32", "train or scale it again")
            effect |= remembers(call(local, "lanes", site=path)) or any(change.count_nonzero() for change in changes)
    if effect:
        return
    raise NoEffect(
        f"{name} changes nothing: its modifications are zero at every site",
        "check that it was trained and saved whole (a LoRA whose B is zero has never learned)",
    )


def random_states(
    tap: Tap, sites: Sequence[Site], shape: tuple[int, int], random: torch.Generator | None = None
) -> Tensor:
    """Hidden states (rows, tokens, width) as a tap of these sites reads them; of an embedding's input: token ids (rows, tokens)."""
    site = tapped(sites, tap)
    if site.embedding and tap.into:
        return torch.randint(site.inputs, shape, generator=random)
    return torch.randn(*shape, site.inputs if tap.into else site.outputs, generator=random)


def bind(modification: Modification, site: Site, model: nn.Module) -> None:
    """Let it meet the base's weight at its site. A form that reads a weight which is quantised or offloaded gets a copy of its
    numbers, as large as the layer once was. Raises IncompatibleBase where they are not known."""
    module = model.get_submodule(site.module)
    weight = matrix(module)
    away = weight is not None and weight.is_meta and compute_device(model) is not None  # a skeleton's are all meta
    if (away or site.packed) and type(modification).bind is not Modification.bind:
        try:
            weight = values(module)
        except IncompatibleBase as error:
            needs = f"the form {modification.form!r} reads the base's own weight at {site.path}"
            raise IncompatibleBase(f"{needs}, but {error}", error.hint) from None
    if weight is not None and site.columns is not None:
        weight = weight[torch.tensor(site.columns.index(), device=weight.device)]
    call(modification, "bind", weight, site=site.path)


def as_parameters(parts: Modifications, device_at: Callable[[str], torch.device]) -> Modifications:
    """The same modifications over float32 parameters on their site's device; constants and integers stay tensors."""

    def parameters(part: Modification, path: str) -> Modification:
        copy = part.to(device_at(path), torch.float32)
        if copy is part:
            copy = object.__new__(type(part))
            copy.__dict__.update(part.__dict__)
        copy.tensors = {
            name: nn.Parameter(t.detach().clone()) if t.is_floating_point() and name not in part.constants else t
            for name, t in copy.tensors.items()
        }
        return copy

    return {path: [parameters(part, path) for part in here] for path, here in parts.items()}
