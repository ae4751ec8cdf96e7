"""adapterhub: the package manager and runtime for adapters. (Not the older AdapterHub project behind `adapters`.)

Names that need torch are loaded when first touched, so that `import adapterhub` and the package commands stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from adapterhub.errors import HubError
from adapterhub.files import platforms  # noqa: F401  (first: it refuses a system that lacks what the rest needs)
from adapterhub.hub import Hub, open
from adapterhub.moved import RENAMED, renamed
from adapterhub.moved import install as _install

_install()

if TYPE_CHECKING:
    from adapterhub.data.encoding import Example
    from adapterhub.kinds.codec import Codec
    from adapterhub.kinds.merger import Merger
    from adapterhub.kinds.method import BuildContext, Measurement, Method, Stage
    from adapterhub.kinds.modification import Modification, Step, project, times
    from adapterhub.kinds.objective import Objective
    from adapterhub.kinds.recipe import Recipe
    from adapterhub.kinds.schedule import ParameterSchedule
    from adapterhub.kinds.training import StepContext, TrainedModel, TrainingContext
    from adapterhub.kinds.verifier import Verdict, Verifier
    from adapterhub.runtime.model import Model
    from adapterhub.runtime.scoring import label_scores, token_losses
    from adapterhub.sites import Site, Tap, select

_LAZY = {
    "BuildContext": "adapterhub.kinds.method",
    "Codec": "adapterhub.kinds.codec",
    "Example": "adapterhub.data.encoding",
    "Measurement": "adapterhub.kinds.method",
    "Merger": "adapterhub.kinds.merger",
    "Method": "adapterhub.kinds.method",
    "Model": "adapterhub.runtime.model",
    "Modification": "adapterhub.kinds.modification",
    "Objective": "adapterhub.kinds.objective",
    "ParameterSchedule": "adapterhub.kinds.schedule",
    "Recipe": "adapterhub.kinds.recipe",
    "Site": "adapterhub.sites",
    "Stage": "adapterhub.kinds.method",
    "Step": "adapterhub.kinds.modification",
    "StepContext": "adapterhub.kinds.training",
    "Tap": "adapterhub.sites",
    "TrainedModel": "adapterhub.kinds.training",
    "TrainingContext": "adapterhub.kinds.training",
    "Verdict": "adapterhub.kinds.verifier",
    "Verifier": "adapterhub.kinds.verifier",
    "label_scores": "adapterhub.runtime.scoring",
    "project": "adapterhub.kinds.modification",
    "select": "adapterhub.sites",
    "times": "adapterhub.kinds.modification",
    "token_losses": "adapterhub.runtime.scoring",
}

__all__ = [
    "BuildContext", "Codec", "Example", "Hub", "HubError", "Measurement", "Merger", "Method", "Model",
    "Modification", "Objective", "ParameterSchedule", "Recipe", "Site", "Stage", "Step", "StepContext", "Tap",
    "TrainedModel", "TrainingContext", "Verdict", "Verifier", "label_scores", "open", "project", "select", "times",
    "token_losses",
]  # fmt: skip


def __getattr__(name: str):
    if RENAMED.get(name) in _LAZY:
        name = renamed(name)
    if name not in _LAZY:
        raise AttributeError(f"module 'adapterhub' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
