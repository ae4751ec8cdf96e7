"""The adapters in memory on one base: found in the hub, checked against the base, cast and bound to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter, current
from adapterhub.adapters.fit import as_parameters, bind, check_fit, check_range
from adapterhub.errors import UsageError
from adapterhub.kinds.contracts import make
from adapterhub.kinds.modification import Modifications
from adapterhub.sites import Site
from adapterhub.sites.weights import compute_device, compute_dtype
from adapterhub.spec.expression import Node, references
from adapterhub.spec.parents import warn_missing_parents
from adapterhub.store.expand import expand
from adapterhub.store.releases import Releases

if TYPE_CHECKING:
    from adapterhub.bases.fingerprint import Fingerprint
    from adapterhub.kinds.method import Method


class Residents:
    """Adapters by "name@version", and expressions resolved once: a model is a snapshot until `forget`."""

    def __init__(
        self, base: nn.Module, sites: Sequence[Site], hub: Releases | None, fingerprint: Fingerprint | None, force: bool
    ):
        self.base, self.sites, self.hub = base, sites, hub
        self.fingerprint, self.force = fingerprint, force
        self._at = {site.path: site for site in sites}
        self._nodes: dict[str, Node] = {}
        self._by_release: dict[str, Modifications] = {}

    def forget(self) -> None:
        """Look names up again; adapters stay, since a release never changes."""
        self._nodes.clear()

    def node(self, expression: str | None) -> Node | None:
        """The expression with names exact and saved compositions expanded. Warns (ParentsWarning) of an adapter that
        was trained over another one which is not there."""
        if expression is None:
            return None
        if expression not in self._nodes:
            if self.hub is None:
                raise UsageError("this model has no hub to find adapters in", "load it with hub.load(...)")
            node = expand(self.hub, self.hub.read(expression))
            warn_missing_parents([self.hub.resolve(reference) for reference in dict.fromkeys(references(node))])
            self._nodes[expression] = node
        return self._nodes[expression]

    def get(self, key: str) -> Modifications:
        """One adapter in the base's dtype."""
        if key not in self._by_release:
            parts, dtype = self.load(key), compute_dtype(self.base) or torch.float32
            self._by_release[key] = {
                path: [part.to(self.device_at(path), dtype) for part in here] for path, here in parts.items()
            }
            check_range(self._by_release[key], key, dtype)
            self.bind(self._by_release[key])
        return self._by_release[key]

    def load(self, key: str) -> Modifications:
        """One adapter as it is stored, checked against the base. Raises IncompatibleBase."""
        from adapterhub.bases.fingerprint import check_base

        release = self.hub.resolve(key)
        record = release.manifest.base
        check_base(record, self.hub.store.read(record.sketch), self.fingerprint, force=self.force)
        parts = Adapter.load(self.hub, release, self.sites).modifications()
        parts = current(parts, self.base.config.model_type, key, self._at)
        check_fit(parts, self.sites, key)
        return parts

    def parameters(self, parts: Modifications) -> Modifications:
        """The same as float32 parameters, bound to the base."""
        parts = as_parameters(parts, self.device_at)
        self.bind(parts)
        return parts

    def trainable(self, key: str) -> Modifications:
        """One adapter as parameters, as its method trains it."""
        parts = self.parameters(self.load(key))
        if (method := self.method(key)) is not None:
            method.take_up({path: part for path, [part] in parts.items()})
        return parts

    def method(self, key: str) -> Method | None:
        """The method that made an adapter, if it is installed."""
        made = self.hub.resolve(key).manifest.method
        installed = made is not None and made.name in plugins.names("methods")
        return make(plugins.load("methods", made.name)) if installed else None

    def bind(self, parts: Modifications) -> None:
        for path, here in parts.items():
            for part in here:
                bind(part, self._at[path], self.base)

    def device_at(self, path: str) -> torch.device:
        """Where the module computes; of one whose tensors are all offloaded, where the rest of the base is."""
        here = compute_device(self.base.get_submodule(self._at[path].module))
        return here or compute_device(self.base) or torch.device("cpu")
