"""adapterhub: the package manager and runtime for adapters. (Not the older AdapterHub project behind `adapters`.)

Names that need torch are loaded when first touched, so that `import adapterhub` and the package commands stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from adapterhub.errors import HubError
from adapterhub.files import platforms  # noqa: F401  (first: it refuses a system that lacks what the rest needs)
from adapterhub.hub import Hub, open

if TYPE_CHECKING:
    from adapterhub.codecs import Codec
    from adapterhub.mergers import Merger
    from adapterhub.method import Given, Measurement, Method, Stage
    from adapterhub.modification import Modification, Step
    from adapterhub.objective import Objective
    from adapterhub.parameter_schedule import ParameterSchedule
    from adapterhub.recipe import Recipe
    from adapterhub.runtime import Model
    from adapterhub.setting import Moment, Setting
    from adapterhub.sites import Site, Tap
    from adapterhub.verifier import Verdict, Verifier

_LAZY = {
    "Codec": "adapterhub.codecs",
    "Given": "adapterhub.method",
    "Measurement": "adapterhub.method",
    "Merger": "adapterhub.mergers",
    "Method": "adapterhub.method",
    "Model": "adapterhub.runtime",
    "Modification": "adapterhub.modification",
    "Moment": "adapterhub.setting",
    "Objective": "adapterhub.objective",
    "ParameterSchedule": "adapterhub.parameter_schedule",
    "Recipe": "adapterhub.recipe",
    "Setting": "adapterhub.setting",
    "Site": "adapterhub.sites",
    "Stage": "adapterhub.method",
    "Step": "adapterhub.modification",
    "Tap": "adapterhub.sites",
    "Verdict": "adapterhub.verifier",
    "Verifier": "adapterhub.verifier",
}

__all__ = [
    "Codec", "Given", "Hub", "HubError", "Measurement", "Merger", "Method", "Model", "Modification", "Moment", "Objective",
    "ParameterSchedule", "Recipe", "Setting", "Site", "Stage", "Step", "Tap", "Verdict", "Verifier", "open",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'adapterhub' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
