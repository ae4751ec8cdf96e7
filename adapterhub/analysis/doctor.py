"""What an installation brings and what the adapters of a hub lack, from metadata and manifests alone. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from adapterhub import plugins
from adapterhub.errors import HubError, PluginError
from adapterhub.spec.manifest import Release
from adapterhub.store.releases import Releases


def brought() -> dict[str, dict[str, list[str]]]:
    """{group: {distribution: the parts it brings}}; a group whose parts two packages claim is left out (`plugins.load`
    says so)."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in plugins.GROUPS:
        try:
            for name in plugins.names(group):
                found.setdefault(group, {}).setdefault(plugins.distribution(group, name), []).append(name)
        except PluginError:
            continue
    return found


def unmet() -> Iterator[str]:
    """What adapterhub's own requirements say and the installation does not keep, one line each."""
    for text in requires("adapterhub") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield f"{wanted.name} is not installed: install adapterhub again"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} {found} is not {wanted.specifier}, which adapterhub needs: install adapterhub again"


def needs(release: Release) -> dict[tuple[str, str], str]:
    """(group, name) of each form, composer and codec that running a release takes -> the distribution it was made with,
    or ""."""
    manifest = release.manifest
    method = manifest.method.distribution if manifest.method else ""
    composers = plugins.names("composers")
    forms = {form for here in manifest.forms.values() for form in here}
    parts = {("composers" if form in composers else "forms", form): method for form in sorted(forms)}
    return parts | {("codecs", codec.name): codec.distribution for codec in manifest.codecs}


def uninstalled(hub: Releases) -> Iterator[str]:
    """A line for each form or codec that adapters of the hub need and nothing brings: which, whose, and from where."""
    lacking: dict[tuple[str, str], list[tuple[str, str]]] = {}
    known = {group: set(plugins.names(group)) for group in ("forms", "composers", "codecs")}
    for row in hub.releases():
        try:
            release = hub.index.get(row.name, row.version)
        except HubError:  # a damaged manifest is told by `verify`
            continue
        for (group, name), maker in (needs(release) if release else {}).items():
            if name not in known[group]:
                lacking.setdefault((group, name), []).append((str(row), maker))
    for (group, name), users in sorted(lacking.items()):
        makers = sorted({maker for _, maker in users if plugins.is_known(maker.partition(" ")[0])})
        come = f"install {' or '.join(makers)}" if makers else plugins.origin("")
        yield f"{', '.join(user for user, _ in users)} needs the {group[:-1]} {name!r}, which is not installed: {come}"
