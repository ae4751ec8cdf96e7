"""An adapter in memory: a manifest and tensors, and what the tensors' names say of the modifications they are."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adapterhub import plugins
from adapterhub.errors import IncompatibleBase, IntegrityError, PluginError
from adapterhub.kinds.contracts import make
from adapterhub.kinds.modification import Modification, Modifications
from adapterhub.sites import Site, current_path
from adapterhub.spec.manifest import Made, Manifest, Release
from adapterhub.store.releases import Releases


@dataclass(frozen=True)
class Adapter:
    manifest: Manifest
    tensors: dict[str, Tensor]
    """Decoded, by their stored names, on the CPU."""

    @classmethod
    def load(cls, hub: Releases, release: Release, sites: Sequence[Site] | None = None) -> Adapter:
        """From the hub's blobs: hash and header checked, codecs undone within bounds (`adapterhub.adapters.decoding`). sites: those of the
        base that it is for, where there is one. Not for compositions, which have no tensors."""
        manifest = release.manifest
        if "tensors" not in manifest.files:
            raise IntegrityError(f"{release} holds no tensors", "get it again from its source")
        from adapterhub.adapters import decoding
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


def current(parts: Modifications, architecture: str, name: str, known: Container[str] = ()) -> Modifications:
    """The same under the paths that their modules have by now; those in `known` are right as they are.

    Raises IncompatibleBase if two paths are one module's, the older and the newer: their order is not known."""
    renamed: Modifications = {}
    for path, here in parts.items():
        new = path if path in known else current_path(architecture, path)
        if new in renamed:
            raise IncompatibleBase(
                f"{name} names the module {new} twice, by its older path and its newer",
                "make it again with one path for each module",
            )
        renamed[new] = here
    return renamed
