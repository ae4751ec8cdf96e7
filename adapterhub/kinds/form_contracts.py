"""What the hooks of a form must return. Whoever runs one calls it through `call`, so that what it does wrong is told with
package, form, hook and site.

While nothing goes wrong that costs about a microsecond, and waits for no device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapterhub.kinds.modification import Lane, Modification
from adapterhub.plugins.boundary import Wrong, guard


def call(part: Any, hook: str, *given: Any, site: str = "") -> Any:
    """Call a hook of a form (or of its class, for `join`, `rows` and `random`) and return what it gives, checked:
    `call(part, "delta_out", x, y, step, site=path)` is `part.delta_out(x, y, step)`.

    Raises PluginError for what it raises or returns wrongly, and every HubError as it is."""
    try:
        return CHECKS[hook](getattr(part, hook)(*given), *given)
    except Exception:
        with guard(part, hook, site):
            raise


def _delta_in(result: Any, x: Tensor, step: Any) -> Tensor | None:
    return None if result is None else _change(result, x)


def _delta_out(result: Any, x: Tensor, y: Tensor, step: Any) -> Tensor | None:
    return None if result is None else _change(result, y)


def _change(result: Any, like: Tensor) -> Tensor:
    """Floating point, on the device and in the shape of what it is added to; a smaller one that spreads over it is spread."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise Wrong(f"a Tensor of floating-point numbers, or None, was expected, this is {_shown(result)}")
    if result.shape != like.shape:
        result = _spread(result, like)
    if result.get_device() != like.get_device():  # a number: quicker than the devices themselves
        raise Wrong(f"the change is on {result.device}, the hidden states on {like.device}")
    return result


def _spread(result: Tensor, like: Tensor) -> Tensor:
    try:
        return result.expand(like.shape)
    except RuntimeError:
        wanted = f"a change of shape {tuple(like.shape)} was expected, this one is {tuple(result.shape)}"
        raise Wrong(wanted) from None


def _delta_weight(result: Any, weight: Any, bias: Any) -> tuple[Tensor | None, Tensor | None]:
    """(ΔW, Δb). Where the base's weight is not given, any shape is right."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise Wrong(f"a pair (ΔW, Δb) was expected, this is {_shown(result)}")
    for change in result:
        if change is not None and not (isinstance(change, Tensor) and change.is_floating_point()):
            raise Wrong(
                f"a Tensor of floating-point numbers, or None, was expected in (ΔW, Δb), this is {_shown(change)}"
            )
    of_weight, of_bias = result
    if isinstance(weight, Tensor):
        of_weight = None if of_weight is None else _spread(of_weight, weight)
        of_bias = None if of_bias is None else _spread(of_bias, weight[:, 0])
    return of_weight, of_bias


def _weight_in(result: Any, weight: Any) -> tuple[Tensor | None, Tensor | None]:
    return _delta_weight(result, weight, None)


def _weight_out(result: Any, enter: Any, weight: Any, bias: Any) -> tuple[Tensor | None, Tensor | None]:
    return _delta_weight(result, weight, bias)


def _modification_or_none(result: Any, *given: Any) -> Any:
    if result is not None and not isinstance(result, Modification):
        raise Wrong(f"a Modification, or None, was expected, this is {_shown(result)}")
    return result


def _lanes(result: Any) -> Any:
    if not isinstance(result, tuple) or not all(isinstance(lane, Lane) for lane in result):
        raise Wrong(f"a tuple of Lanes was expected, this is {_shown(result)}")
    return result


def _nothing(result: Any, *given: Any) -> None:
    return None


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a Tensor of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
    return repr(value) if value is None or isinstance(value, torch.Size) else f"of the type {type(value).__name__}"


CHECKS: dict[str, Callable[..., Any]] = {
    "check": _nothing,
    "bind": _nothing,
    "delta_in": _delta_in,
    "delta_out": _delta_out,
    "lanes": _lanes,
    "delta_weight": _delta_weight,
    "weight_in": _weight_in,
    "weight_out": _weight_out,
    "scaled": _modification_or_none,
    "join": _modification_or_none,
    "rows": _modification_or_none,
    "random": _modification_or_none,
}
"""Hook -> the check of what it returns, given what the hook was given."""
