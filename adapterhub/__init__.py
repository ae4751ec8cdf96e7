"""adapterhub: the package manager and runtime for adapters. (Not the older AdapterHub project behind `adapters`.)

Names that need torch are loaded when first touched, so that `import adapterhub` and the package commands stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from adapterhub.errors import HubError
from adapterhub.hub import Hub, open

if TYPE_CHECKING:
    from adapterhub.method import Method, Stage
    from adapterhub.modification import Modification, Step
    from adapterhub.runtime import Model
    from adapterhub.sites import Site

_LAZY = {
    "Codec": "adapterhub.codecs",
    "Merger": "adapterhub.mergers",
    "Method": "adapterhub.method",
    "Model": "adapterhub.runtime",
    "Modification": "adapterhub.modification",
    "Site": "adapterhub.sites",
    "Stage": "adapterhub.method",
    "Step": "adapterhub.modification",
}

__all__ = ["Codec", "Hub", "HubError", "Merger", "Method", "Model", "Modification", "Site", "Stage", "Step", "open"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'adapterhub' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
