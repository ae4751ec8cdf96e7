"""What the hooks of a part must return: one table, held at the boundary to plugin code (`adapterhub.plugins.boundary`).

A check takes what a hook returned and what it was given, and returns what the caller gets: names in a plain dict, tensors
contiguous. It raises Wrong. What a hook costs once is checked whole; what runs at every step only where nothing waits for
a device."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub import plugins
from adapterhub.data import Data
from adapterhub.data.encoding import Example
from adapterhub.kinds.codec import check_shapes
from adapterhub.kinds.method import BuildContext, Measurement, Method, Stage
from adapterhub.kinds.modification import Modification
from adapterhub.kinds.verifier import Verdict
from adapterhub.plugins.boundary import Wrong, guard, guarded
from adapterhub.spec.digest import canonical


def make(cls: type, *arguments: Any) -> Any:
    """Make one of a part's class, its hooks behind the boundary (of a method, those of its stages too)."""
    with guard(cls, "__init__"):
        part = cls(*arguments)
    for group, hooks in HOOKS.items():
        for hook, check in hooks.items() if plugins.is_kind(cls, group) else ():
            object.__setattr__(part, hook, guarded(part, hook, getattr(part, hook), check))
    if isinstance(part, Method):
        object.__setattr__(part, "stages", _stages(part))
        object.__setattr__(part, "after_step", _in_place(part, "after_step", part.after_step))
    return part


def number(part: object, name: str) -> int:
    """A property of a part that counts something: 1 at least."""
    with guard(part, name):
        count = getattr(part, name)
        if type(count) is not int or count < 1:
            raise Wrong(f"a whole number from 1 on was expected, this is {count!r}")
    return count


# --- values ------------------------------------------------------------------------------------------------------


def expected(wanted: str, value: object, site: str = "") -> Wrong:
    """The error of a value of the wrong kind."""
    return Wrong(f"{wanted} was expected, this is {_shown(value)}", site)


def _shown(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name}" + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")


def instance(kind: type, result: object, *given: Any) -> Any:
    if not isinstance(result, kind):
        raise expected(f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}", result)
    return result


def tensors(result: object, *given: Any) -> dict[str, Tensor]:
    """{name: tensor}, by name, finite and contiguous."""
    return {name: tensor(value, name) for name, value in sorted(_named(result, "tensors by their names").items())}


def tensor(value: object, name: str, site: str = "") -> Tensor:
    if not isinstance(value, Tensor):
        raise expected(f"a Tensor {name!r}", value, site)
    if value.layout != torch.strided or value.is_meta:
        raise Wrong(f"the tensor {name!r} is {value.layout} on {value.device}: give a plain one with values", site)
    if value.is_floating_point() and not torch.isfinite(value.float() if value.itemsize == 1 else value).all():
        raise Wrong(f"the tensor {name!r} of shape {tuple(value.shape)} holds NaN or infinite values", site)
    return value if value.is_contiguous() else value.detach().contiguous()


def modifications(result: object, known: Sequence[str] | None = None, lists: bool = False) -> dict[str, Any]:
    """{site path: modification} (or, where `lists`, several) at known sites, each with tensors of its form."""
    found = _named(result, "modifications by site path")
    for path, here in found.items():
        if known is not None and path not in known:
            raise Wrong("this base has no such site" + _near(path, known), path)
        for part in here if lists and isinstance(here, list | tuple) else [here]:
            _modification(part, path)
    return found


def _modification(part: object, path: str) -> None:
    if not isinstance(part, Modification):
        raise expected("a Modification", part, path)
    if not isinstance(getattr(part, "tensors", None), dict):
        raise Wrong(f"{type(part).__name__}.__init__ must call super().__init__(**tensors)", path)
    for name, value in part.tensors.items():
        if name not in part.stores:
            raise Wrong(f"the form {part.form!r} stores {', '.join(part.stores) or 'nothing'}, and no {name!r}", path)
        part.tensors[name] = tensor(value, name, path)
        if name not in part.constants and not value.is_floating_point():
            raise Wrong(
                f"{name!r} is {value.dtype}: what trains is floating point, other tensors are `constants`", path
            )


def _named(result: object, what: str) -> dict[str, Any]:
    if not isinstance(result, Mapping):
        raise expected(f"a dict of {what}", result)
    for name in result:
        if not isinstance(name, str):
            raise expected(f"a dict of {what}: a name that is a text", name)
    return dict(result)


def _near(path: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(path, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def scalar(result: object, *given: Any) -> Any:
    """() float, a term of a loss; of one entry in another shape: the entry."""
    if isinstance(result, Real) and not isinstance(result, bool):
        return result
    if not isinstance(result, Tensor) or result.numel() != 1 or not result.is_floating_point():
        raise expected("a Tensor of one floating-point number", result)
    return result.reshape(())


def loss(result: object, *given: Any) -> Tensor:
    if not isinstance(result, Tensor):
        raise expected("a Tensor of one floating-point number", result)
    if torch.is_grad_enabled() and not result.requires_grad:
        raise Wrong("the loss has no gradient: it was computed without what trains, or was detached")
    return scalar(result)


def term(result: object, *given: Any) -> Any:
    return None if result is None else scalar(result)


def told(result: object, *given: Any) -> dict[str, Any]:
    """What a manifest shall say, as JSON has it."""
    try:
        return json.loads(canonical(_named(result, "facts by name")))
    except (TypeError, ValueError) as error:
        raise Wrong(f"what it found is not JSON: {error}") from None


def data(result: object, *given: Any) -> Data:
    if not instance(Data, result).rows:
        raise Wrong("it leaves no rows")
    return result


def examples(result: object, *given: Any) -> Sequence[Example]:
    if not isinstance(result, Sequence) or not result:
        raise expected("a sequence of Examples, one at least,", result)
    for one in result:
        instance(Example, one)
    return result


def batch(result: object, *given: Any) -> dict[str, Tensor]:
    found = _named(result, "tensors by their names")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise expected(f"a Tensor {name!r}", value)
    return found


def parameters(result: object, *given: Any) -> dict[str, nn.Parameter]:
    return {name: instance(nn.Parameter, value) for name, value in _named(result, "parameters by name").items()}


def rates(result: object, names: Mapping[str, Any], *given: Any) -> dict[str, float]:
    found = _named(result, "rates by the names of tensors")
    for name, rate in found.items():
        if name not in names:
            raise Wrong(f"no tensor that trains is named {name!r}" + _near(name, list(names)))
        if not isinstance(rate, Real) or not 0 <= rate < math.inf:
            raise Wrong(f"the rate of {name} is {rate!r}: a number from 0 on was expected")
    return {name: float(rate) for name, rate in found.items()}


def verdict(result: object, *given: Any) -> Verdict:
    reward = instance(Verdict, result).reward
    if not isinstance(reward, Real) or not math.isfinite(reward) or not isinstance(result.message, str):
        raise Wrong(f"a finite reward and a message in words were expected, this is {result}")
    return result


def combined(result: object, deltas: Sequence[Tensor], *given: Any) -> Tensor:
    wanted = f"a Tensor of shape {tuple(deltas[0].shape)}"
    if not isinstance(result, Tensor) or result.shape != deltas[0].shape or not result.is_floating_point():
        raise expected(wanted, result)
    return tensor(result, "the merged change")


# --- the stages of a method --------------------------------------------------------------------------------------


def _stages(method: Any) -> Callable[[Any], list[Stage]]:
    def check(result: object, config: Any) -> list[Stage]:
        if not isinstance(result, Sequence) or not result:
            raise expected("a list of Stages, one at least,", result)
        names = [instance(Stage, stage).name for stage in result]
        for name in names:
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or names.count(name) > 1:
                raise Wrong(f"{name!r} is not a name for a stage: [a-z][a-z0-9_]*, none twice")
        return [_stage(method, stage, f" of the stage {stage.name!r}" if len(names) > 1 else "") for stage in result]

    return guarded(method, "stages", method.stages, check)


def _stage(method: Any, stage: Stage, which: str) -> Stage:
    """The stage, its hooks behind the boundary."""
    hooks = {field.name: value for field in fields(stage) if callable(value := getattr(stage, field.name))}
    behind = {name: guarded(method, name + which, value, STAGE.get(name)) for name, value in hooks.items()}
    if "after_step" in hooks:
        behind["after_step"] = _in_place(method, "after_step" + which, stage.after_step)
    return replace(stage, **behind, measurement=stage.measurement and _measurement(method, stage.measurement))


def _built(result: object, given: BuildContext, lists: bool = False) -> dict[str, Modification]:
    return modifications(result, [site.path for site in given.sites], lists)


def _measurement(method: Any, measurement: Measurement) -> Measurement:
    take = guarded(method, f"measurement {measurement.name}", measurement.take, tensors)
    return replace(measurement, take=take)


def _in_place(part: Any, hook: str, function: Callable) -> Callable:
    """The function, which may change the tensors of modifications and must not put others in their place: those would never
    train."""

    def call(parts: Mapping[str, Modification]) -> None:
        before = {path: dict(one.tensors) for path, one in parts.items()}
        function(parts)
        for path, one in parts.items():
            if other := [name for name, t in before[path].items() if one.tensors.get(name) is not t]:
                raise Wrong(f"it replaced the tensor {other[0]!r}: change it in place, `{other[0]}.copy_(...)`", path)

    call.__wrapped__ = function
    return guarded(part, hook, call)


@contextmanager
def around(recipe: Any, moment: Any) -> Iterator[None]:
    """What a recipe puts around the forward passes of a step; it hides no exception of what runs inside."""
    inner = recipe.around(moment)
    with guard(recipe, "around"):
        inner.__enter__()
    try:
        yield
    except BaseException as error:
        with guard(recipe, "around"):
            inner.__exit__(type(error), error, error.__traceback__)
        raise
    with guard(recipe, "around"):
        inner.__exit__(None, None, None)


STAGE: Mapping[str, Callable[..., Any]] = {
    "build": _built, "penalty": scalar, "note": told,
    "finish": lambda result, parts, given: _built(result, given, lists=True),
}  # fmt: skip
"""Of a stage: hook -> the check of what it returns."""
HOOKS: Mapping[str, Mapping[str, Callable[..., Any] | None]] = {
    "methods": {"take_up": None},
    "objectives": {"prepare": None, "parameters": parameters, "loss": loss, "found": told},
    "recipes": {
        "rows": data, "examples": examples, "prepare": None, "batch": batch, "term": term, "found": told,
        "around": partial(instance, AbstractContextManager),
    },
    "schedules": {
        "start": lambda result, parts, given: _built(result, given), "rates": rates,
    },
    "verifiers": {"verify": verdict},
    "mergers": {"combine": combined},
    "codecs": {"encode": tensors, "gives": check_shapes, "decode": tensors},
}  # fmt: skip
"""Group -> hook -> the check of what it returns; None: whatever it returns is dropped."""
