"""An adapter in memory: a manifest and tensors, and what the tensors' names say of the modifications they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapterhub import plugins
from adapterhub.errors import IncompatibleBase, IntegrityError, NoEffect, PluginError, UnsafeFile
from adapterhub.kinds.contracts import make
from adapterhub.kinds.form_contracts import call
from adapterhub.kinds.lanes import remembers
from adapterhub.kinds.modification import Modification, Modifications, Step
from adapterhub.plugins.boundary import author_line
from adapterhub.sites import Site, Tap, tapped
from adapterhub.sites.weights import compute_device, matrix, values
from adapterhub.spec.manifest import Made, Manifest, Release

if TYPE_CHECKING:
    from adapterhub.hub import Hub


@dataclass(frozen=True)
class Adapter:
    manifest: Manifest
    tensors: dict[str, Tensor]
    """Decoded, by their stored names, on the CPU."""

    @classmethod
    def load(cls, hub: Hub, release: Release, sites: Sequence[Site] | None = None) -> Adapter:
        """From the hub's blobs: hash and header checked, codecs undone within bounds (`adapterhub.decoding`). sites: those of the
        base that it is for, where there is one. Not for compositions, which have no tensors."""
        manifest = release.manifest
        if "tensors" not in manifest.files:
            raise IntegrityError(f"{release} holds no tensors", "get it again from its source")
        from adapterhub import decoding
        from adapterhub.tensors.file import load as load_tensors

        file = manifest.files["tensors"]
        with hub.store.shared():
            tensors = load_tensors(hub.store.read(file))
        if manifest.codecs:
            chain = [(c.name, make(part("codecs", c.name, manifest, c))) for c in reversed(manifest.codecs)]
            tensors = decoding.decode(chain, tensors, manifest, decoding.room(manifest, file.size, hub, sites))
        if sites is None:
            decoding.check_sparse(tensors, manifest, hub)
        return cls(manifest, tensors)

    def modifications(self) -> Modifications:
        """Fresh modifications over the tensors. Raises PluginError for a form that is not installed."""
        return modifications_of(self.tensors, self.manifest)


def part(group: str, name: str, manifest: Manifest | None = None, made: Made | None = None):
    """An installed part; if it is missing, the error names the package that the adapter was made with."""
    if manifest and made and made.distribution and name not in plugins.names(group):
        raise PluginError(
            f"{manifest.name} {manifest.version} needs the {group[:-1]} {name!r}, which is not installed",
            plugins.origin(made.distribution),
        )
    return plugins.load(group, name)


def modifications_of(tensors: Mapping[str, Tensor], manifest: Manifest | None = None) -> Modifications:
    """Tensors by their stored names, as modifications. All that is missing or left over is listed in one error."""
    grouped: dict[tuple[str, str, int], dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):  # a codec, anybody's, may have mixed them up
        pieces = name.rsplit(".", 3)
        if len(pieces) < 4 or not pieces[2].isdecimal():
            raise IntegrityError(
                f"the tensor {name!r} is not named <site path>.<form>.<n>.<tensor>",
                "if these are PEFT files, use: adapterhub import",
            )
        path, form, n, key = pieces
        grouped.setdefault((path, form, int(n)), {})[key] = tensor
    found: dict[str, dict[str, list[Modification]]] = {}
    faults = []
    for (path, form, n), named in sorted(grouped.items()):
        group = "composers" if form in plugins.names("composers") else "forms"
        cls = part(group, form, manifest, manifest and manifest.method)
        lacking = sorted(set(cls.stores) - cls.optional - set(named))
        foreign = sorted(set(named) - set(cls.stores))
        faults += [f"{path}.{form}.{n} has no {key!r}" for key in lacking]
        faults += [f"{path}.{form}.{n}.{key} belongs to no {form}" for key in foreign]
        wrong = [k for k in named if k not in cls.constants and not named[k].is_floating_point()]
        faults += [f"{path}.{form}.{n}.{key} is {named[key].dtype}, no floating point" for key in sorted(wrong)]
        if lacking or foreign or wrong:
            continue
        try:
            found.setdefault(path, {}).setdefault(form, []).append(cls(**named))
        except Exception as error:  # a form, anybody's, trips over what the file says: that is the file's fault
            faults.append(f"{path}.{form}.{n} makes no {form}: {error}")
    if faults:
        raise IntegrityError(
            "the adapter's tensors are not whole:\n  " + "\n  ".join(faults), "get it again from its source"
        )
    if manifest is None:
        return {path: [m for parts in forms.values() for m in parts] for path, forms in found.items()}
    return {path: _in_order(path, found.get(path, {}), manifest) for path in {**found, **manifest.forms}}


def _in_order(path: str, found: dict[str, list[Modification]], manifest: Manifest) -> list[Modification]:
    """The order at a site is the manifest's: tensor names count each form by itself."""
    order = manifest.forms.get(path, [])
    if sorted(order) != sorted(m.form for parts in found.values() for m in parts):
        raise IntegrityError(
            f"{manifest.name} {manifest.version}: the manifest names {order} at {path}, the tensors are {sorted(found)}",
            "get it again from its source",
        )
    waiting = {form: iter(parts) for form, parts in found.items()}
    return [next(waiting[form]) for form in order]


def forms_of(modifications: Mapping[str, Sequence[Modification]]) -> dict[str, list[str]]:
    """What the manifest says: site path -> the forms there, in order."""
    return {path: [m.form for m in parts] for path, parts in sorted(modifications.items())}


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
