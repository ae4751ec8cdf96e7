"""The boundary to the code of plugins: whatever it raises, or returns that it must not, becomes one PluginError that names
the package, the part, the hook, the site and the author's line. Our own parts cross the same boundary.

What each hook must return is said in `adapterhub.kinds.contracts`; this module imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from traceback import walk_tb
from types import CodeType, TracebackType
from typing import Any

from adapterhub.errors import REFUSALS, Fault, HubError, PluginError

_names: dict[type, str] = {}


def introduce(part: type, name: str) -> None:
    """Remember what errors call a part: "adapterhub-acme 0.1: method acme"."""
    _names[part] = name


def name_of(part: object) -> str:
    """Return what errors call a part (a class or one of its objects): by its entry point, else by its module and class."""
    kind = _kind(part)
    known = {cls: name for cls, name in _names.items() if _package(cls) == _package(kind)}
    for cls in kind.__mro__:
        if cls in known:
            return known[cls]
    package = next((name.partition(":")[0] for name in known.values()), kind.__module__)
    return f"{package}: {kind.__qualname__}"


class Wrong(Exception):
    """A value that is not what a hook must return. Checks raise it inside of a guard, which makes it a PluginError."""

    def __init__(self, what: str, site: str = ""):
        super().__init__(what)
        self.site = site


class guard:
    """Run plugin code inside: `with guard(part, "build", "model.layers.0.mlp"): ...`.

    What it raises becomes a PluginError from the original. A HubError passes, for it speaks to the user already; so do
    what no code can help (interrupts, memory, a full disk) and warnings that the user has made errors.
    function: what is called, for the author's line of a wrong value; left out, the part's own hook."""

    __slots__ = ("function", "hook", "part", "site")

    def __init__(self, part: object, hook: str, site: str = "", function: Callable | None = None):
        self.part, self.hook, self.site, self.function = part, hook, site, function

    def __enter__(self) -> guard:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            return False
        if isinstance(error, PluginError) and error.fault and self.site and not error.fault.site:
            raise replace(error.fault, site=self.site).error() from error.__cause__
        if _passes(error):
            return False
        what, site = f"{type(error).__name__}: {error}".rstrip(": "), self.site
        if isinstance(error, Wrong):
            what, site = str(error), error.site or site
        line = author_line(self.part, error, self.function or getattr(_kind(self.part), self.hook, None))
        fault = Fault(name_of(self.part), self.hook, site, " ".join(what.split()), line)
        raise fault.error() from (None if isinstance(error, Wrong) else error)


def guarded(part: object, hook: str, function: Callable, check: Callable[..., Any] | None = None) -> Callable:
    """Return the function behind the boundary. check(what it returned, *what it was given) -> what the caller gets."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with guard(part, hook, function=function):
            result = function(*args, **kwargs)
            return result if check is None else check(result, *args)

    return call


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has no memory left (torch's own error has a class for devices only)."""
    named = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def author_line(part: object, error: BaseException | None = None, function: Callable | None = None) -> str:
    """Return the line of the part's own package where an error passed last, else where the function or the class begins."""
    fault = getattr(error, "fault", None)
    if fault is not None and fault.line:
        return fault.line
    package = _package(_kind(part))
    own = [
        _place(frame.f_globals["__name__"], frame.f_code, line)
        for frame, line in walk_tb(error.__traceback__ if error is not None else None)
        if frame.f_globals.get("__name__", "").partition(".")[0] == package
    ]
    if own and not isinstance(error, Wrong):
        return own[-1]
    for known in (function, getattr(function, "__wrapped__", None)):
        code = getattr(known, "__code__", None)
        if code is not None and known.__module__.partition(".")[0] == package:
            return _place(known.__module__, code, code.co_firstlineno)
    return _class_line(_kind(part))


def _class_line(kind: type) -> str:
    """Where the first of a class's own functions begins, or of the nearest class of its package: a class remembers no line."""
    for cls in (cls for cls in kind.__mro__ if _package(cls) == _package(kind)):
        functions = [getattr(value, "__func__", value) for value in vars(cls).values()]
        own = [f for f in functions if hasattr(f, "__code__") and f.__module__ == cls.__module__]
        if own:
            first = min(own, key=lambda function: function.__code__.co_firstlineno).__code__
            return _place(cls.__module__, first, first.co_firstlineno)
    return ""


def _place(module: str, code: CodeType, line: int) -> str:
    """ "adapterhub_acme/forms.py:31": the file from its package on."""
    depth = module.count(".") + (code.co_filename.endswith("__init__.py"))
    return "/".join(code.co_filename.replace("\\", "/").split("/")[-1 - depth :]) + f":{line}"


def _passes(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, HubError | Warning) or out_of_memory(error):
        return True
    refused = isinstance(error, OSError) and error.errno in REFUSALS
    return refused or type(error).__module__ == "torch.utils.checkpoint"  # how a recomputation in backward ends early


def _kind(part: object) -> type:
    return part if isinstance(part, type) else type(part)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
