"""Where in a model something can happen, and the weights there. Floor 2, runtime."""

from adapterhub.sites.families import Family, current_path, family, named_role
from adapterhub.sites.find import sites, tapped
from adapterhub.sites.selection import select
from adapterhub.sites.site import Columns, Heads, Site, Tap, layer_of
from adapterhub.sites.weights import matrix

__all__ = [
    "Columns",
    "Family",
    "Heads",
    "Site",
    "Tap",
    "current_path",
    "family",
    "layer_of",
    "matrix",
    "named_role",
    "select",
    "sites",
    "tapped",
]
