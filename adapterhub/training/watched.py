"""A method's stages, each of which may read only the options that it names: what a kept stage was made from is what it could read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, fields, replace
from typing import Any

import msgspec

from adapterhub.errors import PluginError
from adapterhub.kinds.contracts import make
from adapterhub.kinds.method import Method, Stage

WHOLE = frozenset({"__dict__", "__getstate__", "__reduce__", "__reduce_ex__"})
"""To read one of these of a config is to read all its options."""


def staged(method: Method, config: Any) -> list[Stage]:
    """The stages of a method with the values of the options that decide each, and its measurement: those that it names and
    those that `stages` itself reads, for whatever that hands on. None named: all.

    A stage that names its options, and a measurement, has a method and a config of its own, which gives no other option
    from then on: PluginError, raised wherever it is read. Raises PluginError too for a name that is no option."""
    values = msgspec.to_builtins(asdict(config))

    def alone(n: int, wanted: Collection[str], what: str) -> tuple[Stage, dict[str, Any]]:
        if unknown := sorted(set(wanted) - values.keys()):
            raise PluginError(f"{what} names the option {unknown[0]!r}, which its method does not have", HINT)
        watch = _Watch(values.keys(), what)
        stage = make(type(method)).stages(watched(config, watch.see))[n]
        return stage, {name: values[name] for name in sorted(watch.close(wanted))}

    result = []
    for n, stage in enumerate(method.stages(config)):
        what, measurement = f"{type(method).__name__}, stage {stage.name!r}", stage.measurement
        if stage.options is not None:
            stage, decides = alone(n, stage.options, what)
            stage = replace(stage, options=decides)
        if measurement is not None:
            decides = values
            if measurement.options is not None:
                again, decides = alone(n, measurement.options, f"{what}, measurement {measurement.name!r}")
                measurement = again.measurement
            stage = replace(stage, measurement=replace(measurement, options=decides))
        result.append(stage)
    return result


HINT = "that is a fault of the method: its author names in `options` all that is read there, or leaves `options` out"


class _Watch:
    """Notes the options that are read; once closed, refuses others."""

    def __init__(self, options: Collection[str], what: str):
        self.options, self.what, self.read, self.closed = set(options), what, set(), False

    def see(self, name: str) -> None:
        seen = {name} if name in self.options else self.options
        if self.closed and (others := sorted(seen - self.read)):
            raise PluginError(f"{self.what}: the option {others[0]!r} is read, which its `options` do not name", HINT)
        self.read |= seen

    def close(self, named: Collection[str]) -> set[str]:
        self.read, self.closed = self.read | set(named), True
        return self.read


def watched(config: Any, see: Callable[[str], None]) -> Any:
    """A copy of a config that calls `see` with the name of each field before it is read, or of whatever else holds them."""
    kind = type(config)
    held = {**getattr(config, "__dict__", {}), **{field.name: getattr(config, field.name) for field in fields(config)}}

    class Watched(kind):
        def __getattribute__(self, name: str) -> Any:
            if name == "__class__":  # dataclasses compare equal, and are replaced, by it
                return kind
            if name in held or name in WHOLE:
                see(name)
            return super().__getattribute__(name)

    copy = object.__new__(Watched)
    for name, value in held.items():
        object.__setattr__(copy, name, value)
    return copy
