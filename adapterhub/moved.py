"""Old import paths of what plugins import: they work until 0.4 and name their heir in a DeprecationWarning."""

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
    "adapterhub.bases": ("adapterhub.bases.resolution", "adapterhub.bases.loading"),
    "adapterhub.boundary": ("adapterhub.plugins.boundary",),
    "adapterhub.changes": ("adapterhub.adapters.changes",),
    "adapterhub.composers": ("adapterhub.forms.composers", "adapterhub.forms.route"),
    "adapterhub.contracts": ("adapterhub.kinds.contracts",),
    "adapterhub.decoding": ("adapterhub.adapters.decoding",),
    "adapterhub.durable": ("adapterhub.files.durable",),
    "adapterhub.encoding": ("adapterhub.data.encoding", "adapterhub.data.batches", "adapterhub.runtime.ensemble"),
    "adapterhub.evaluate": ("adapterhub.evaluation.evaluate", "adapterhub.evaluation.intervals"),
    "adapterhub.expression": ("adapterhub.spec.expression", "adapterhub.spec.parser"),
    "adapterhub.factors": ("adapterhub.tensors.factors",),
    "adapterhub.fold": ("adapterhub.runtime.fold",),
    "adapterhub.form_contracts": ("adapterhub.kinds.form_contracts",),
    "adapterhub.formats.bounded_re": ("adapterhub.formats.peft.bounded_re",),
    "adapterhub.formats.peft_config": ("adapterhub.formats.peft.config",),
    "adapterhub.formats.peft_lower": ("adapterhub.formats.peft.lower",),
    "adapterhub.formats.peft_tuner": ("adapterhub.formats.peft.tuner",),
    "adapterhub.formats.peft_types": ("adapterhub.formats.peft.types",),
    "adapterhub.gate": ("adapterhub.forms.gate",),
    "adapterhub.lanes": ("adapterhub.kinds.lanes",),
    "adapterhub.learner": ("adapterhub.training.module", "adapterhub.data.seeds"),
    "adapterhub.magnitude": ("adapterhub.tensors.largest",),
    "adapterhub.manifest": (
        "adapterhub.spec.manifest",
        "adapterhub.spec.names",
        "adapterhub.spec.digest",
        "adapterhub.data.seeds",
    ),
    "adapterhub.method": ("adapterhub.kinds.method",),
    "adapterhub.modification": ("adapterhub.kinds.modification", "adapterhub.sites", "adapterhub.adapters.names"),
    "adapterhub.objective": ("adapterhub.kinds.objective",),
    "adapterhub.padding": ("adapterhub.data.padding",),
    "adapterhub.parameter_schedule": ("adapterhub.kinds.schedule",),
    "adapterhub.plan": ("adapterhub.runtime.plan",),
    "adapterhub.publish": ("adapterhub.adapters.publish",),
    "adapterhub.recipe": ("adapterhub.kinds.recipe",),
    "adapterhub.runtime": ("adapterhub.runtime.model",),
    "adapterhub.scoring": ("adapterhub.runtime.scoring",),
    "adapterhub.setting": ("adapterhub.kinds.training",),
    "adapterhub.stages": ("adapterhub.training.stages",),
    "adapterhub.tensors": ("adapterhub.tensors.file",),
    "adapterhub.trainer": ("adapterhub.training.trainer",),
    "adapterhub.verifier": ("adapterhub.kinds.verifier",),
    "adapterhub.weight_change": ("adapterhub.kinds.weight_change",),
    "adapterhub.weights": ("adapterhub.sites.weights",),
}
"""Old module -> the modules that have its names now, the likeliest first. Some are packages today, whose `__getattr__` asks here."""
PACKAGES = {
    "adapterhub.bases": {
        "ResolvedBase", "cache_folder", "check_folder", "load_model", "load_tokenizer", "resolve", "skeleton", "weight_files",
    },
    "adapterhub.runtime": {"Adapters", "Model", "load"},
    "adapterhub.tensors": {"check_finite", "dump", "load"},
}  # fmt: skip
"""Old module that is a package today -> what it had. Python asks a package for its modules, too: those are none of these."""
RENAMED = {
    "Given": "BuildContext",
    "Ingredient": "ChosenPart",
    "Ingredients": "TrainingParts",
    "Learner": "StageModule",
    "Moment": "StepContext",
    "Setting": "TrainingContext",
}
"""Old name -> today's."""


def heir(module: str, name: str) -> Any:
    """Return what an old module had under a name, and warn whoever asks. For a module's `__getattr__`; raises AttributeError."""
    today = RENAMED.get(name, name)
    for place in () if name.startswith("__") or name not in PACKAGES.get(module, {name}) else HEIRS[module]:
        found = import_module(place)
        if hasattr(found, today):
            _warn(
                f"{module}.{name}", f"{'adapterhub' if today in sys.modules['adapterhub'].__all__ else place}.{today}"
            )
            return getattr(found, today)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def renamed(name: str) -> str:
    """Return today's name for one of `adapterhub` itself, and warn whoever asks for the old one."""
    _warn(f"adapterhub.{name}", f"adapterhub.{RENAMED[name]}")
    return RENAMED[name]


def _warn(old: str, new: str) -> None:
    """Warn the caller of the caller's `__getattr__`."""
    warnings.warn(f"{old} is {new} now; the old name goes with 0.4", DeprecationWarning, stacklevel=4)


class Finder(MetaPathFinder, Loader):
    """Make a module for an old path, whose names come from its heirs."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in HEIRS else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        vars(module)["__getattr__"] = lambda asked: heir(name, asked)


def install() -> None:
    """Let Python find the old paths, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
