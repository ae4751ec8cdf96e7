"""Whose code may run, and which packages may be named to a user. Anybody can write anything into a manifest."""

from __future__ import annotations

import os
import re
from importlib.metadata import requires
from pathlib import Path

from adapterhub.errors import HubError
from adapterhub.plugins.metadata import installed


def is_enabled(distribution: str) -> bool:
    """Return whether code of an outside distribution may run: the user has enabled it, for themselves (config.toml), for a
    project that is theirs (adapterhub.toml, `folders`) or for this process (ADAPTERHUB_PLUGINS: names with commas, * for all).
    That it is installed is not enough: another package may have brought it along."""
    from adapterhub.config import folders, user

    here = os.environ.get("ADAPTERHUB_PLUGINS", "").replace(" ", "").split(",")
    if "*" in here or distribution in here or distribution in user.enabled(user.load().plugins):
        return True
    folder = asking_project(distribution)
    return folder is not None and folders.is_own("projects", folder)


def asking_project(distribution: str) -> Path | None:
    """The folder of the nearest project, if its file enables a distribution."""
    from adapterhub.config import project, user

    folder = project.nearest()
    asks = folder is not None and distribution in user.enabled(project.read(folder).plugins)
    return folder if asks else None


def runs(installed: str, made_with: str) -> bool:
    """Whether a plugin's installed version runs what was made with another: not older, and of the same major version."""
    from packaging.version import InvalidVersion, Version

    try:
        here, then = Version(installed), Version(made_with)
    except InvalidVersion:
        return installed == made_with
    return here >= then and here.major == then.major


def origin(made_with: str) -> str:
    """How to come by a part that is missing, when its manifest says that "adapterhub-loreft 0.1.0" brings it: only packages
    that we know are named."""
    name = made_with.partition(" ")[0]
    if is_known(name):
        return f"it was made with {made_with}: install that package"
    return "install the package that brings it, if you trust whoever made it"


def is_known(distribution: str) -> bool:
    """Whether we may name it to a user as something to install: it is here, of our own tree, or in the project's lock.
    Anybody can write anything into a manifest."""
    return installed(distribution) is not None or distribution in ours() or distribution in _locked()


def ours() -> set[str]:
    """Our own packages that bring parts: what adapterhub's own metadata offers as its extra `plugins`."""
    extra = (line.partition(";") for line in requires("adapterhub") or ())
    return {
        re.split(r"[^a-z0-9-]", name.strip())[0]
        for name, _, marker in extra
        if 'extra == "plugins"' in marker.replace("'", '"')
    }


def _locked() -> set[str]:
    """The packages that the project's lock names."""
    from adapterhub.config import lock, project

    folder = project.nearest()
    try:
        return set() if folder is None else {plugin.name for plugin in lock.read(folder).plugin}
    except HubError:  # none, or a broken one: another command says so
        return set()
