"""How installed parts are found, allowed, loaded and configured; the boundary around their code. Floor 1, manager.

Groups of entry points: adapterhub.forms, .methods and so on (GROUPS). Our own parts are registered in the same way. Listing
reads metadata only; code of other distributions runs only when the user has enabled them.
"""

from adapterhub.plugins.configure import options
from adapterhub.plugins.discovery import distribution, enabled_names, names, needed
from adapterhub.plugins.enabled import is_enabled, is_known, origin, ours, runs
from adapterhub.plugins.loading import is_kind, load
from adapterhub.plugins.metadata import GROUPS, KINDS, installed

__all__ = [
    "GROUPS",
    "KINDS",
    "distribution",
    "enabled_names",
    "installed",
    "is_enabled",
    "is_kind",
    "is_known",
    "load",
    "names",
    "needed",
    "options",
    "origin",
    "ours",
    "runs",
]
