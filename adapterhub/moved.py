"""Old import paths of what plugins import: they work until 0.3 and name their heir in a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEIRS = {
    "adapterhub.adapter": ("adapterhub.adapters.adapter", "adapterhub.adapters.fit", "adapterhub.kinds.modification"),
    "adapterhub.attach": ("adapterhub.runtime.attachment",),
    "adapterhub.composers": ("adapterhub.forms.composers", "adapterhub.forms.route"),
    "adapterhub.contracts": ("adapterhub.kinds.contracts",),
    "adapterhub.encoding": ("adapterhub.data.encoding", "adapterhub.data.batches"),
    "adapterhub.fold": ("adapterhub.runtime.fold",),
    "adapterhub.gate": ("adapterhub.forms.gate",),
    "adapterhub.learner": ("adapterhub.training.module", "adapterhub.data.seeds"),
    "adapterhub.magnitude": ("adapterhub.tensors.largest",),
    "adapterhub.manifest": ("adapterhub.spec.manifest", "adapterhub.spec.names", "adapterhub.spec.digest"),
    "adapterhub.method": ("adapterhub.kinds.method",),
    "adapterhub.modification": ("adapterhub.kinds.modification", "adapterhub.sites", "adapterhub.adapters.names"),
    "adapterhub.objective": ("adapterhub.kinds.objective",),
    "adapterhub.parameter_schedule": ("adapterhub.kinds.schedule",),
    "adapterhub.plan": ("adapterhub.runtime.plan",),
    "adapterhub.recipe": ("adapterhub.kinds.recipe",),
    "adapterhub.scoring": ("adapterhub.runtime.scoring",),
    "adapterhub.setting": ("adapterhub.kinds.training",),
    "adapterhub.stages": ("adapterhub.training.stages",),
    "adapterhub.trainer": ("adapterhub.training.trainer",),
    "adapterhub.verifier": ("adapterhub.kinds.verifier",),
    "adapterhub.weights": ("adapterhub.sites.weights",),
}
"""Old module -> the modules that have its names now, the likeliest first."""
RENAMED = {
    "Given": "BuildContext",
    "Ingredient": "ChosenPart",
    "Ingredients": "TrainingParts",
    "Learner": "StageModule",
    "Moment": "StepContext",
    "Setting": "TrainingContext",
}
"""Old name -> today's."""


class Finder(MetaPathFinder, Loader):
    """Make a module for an old path, whose names come from its heirs."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in HEIRS else None

    def exec_module(self, module: ModuleType) -> None:
        def moved(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            today = RENAMED.get(name, name)
            for heir in HEIRS[module.__name__]:
                found = import_module(heir)
                if hasattr(found, today):
                    home = "adapterhub" if today in sys.modules["adapterhub"].__all__ else heir
                    _warn(f"{module.__name__}.{name}", f"{home}.{today}")
                    return getattr(found, today)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = moved


def warn_of_rename(name: str) -> None:
    """Warn whoever takes an old name from `adapterhub` of today's."""
    _warn(f"adapterhub.{name}", f"adapterhub.{RENAMED[name]}")


def _warn(old: str, heir: str) -> None:
    warnings.warn(f"{old} is {heir} now; the old name goes with 0.3", DeprecationWarning, stacklevel=3)


def install() -> None:
    """Let Python find the old paths, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
