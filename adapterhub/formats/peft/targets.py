"""Which modules a PEFT config means: its lists, expressions and patterns, matched as PEFT matches them but under a limit.

(`peft.tuners.tuners_utils.check_target_module_exists`, `peft.utils.other.get_pattern_key`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub.formats.peft import bounded_re
from adapterhub.formats.peft.config import Config
from adapterhub.sites import Site, select


def targeted(config: Config, names: Sequence[str], sites: Sequence[Site]) -> set[str]:
    """Those of the names that PEFT would put this adapter on. Raises bounded_re.BadExpression."""
    if all_linear(config.target_modules):
        chosen = {site.path for site in select(sites, "all-linear")} & set(names)
    else:
        chosen = named(config.target_modules or [], names)
    if config.exclude_modules:
        chosen -= named(config.exclude_modules, names)
    layers = config.layers_to_transform
    if layers is None or layers == [] or isinstance(config.target_modules, str):
        return chosen
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # Without a pattern the first numbered part counts. PEFT's own expressions, its first pattern that matches.
    expressions = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns or []] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    layer: dict[str, str] = {}
    for found in reversed(bounded_re.match(expressions, names)):
        layer |= found
    return {path for path in chosen if layer.get(path, "") != "" and int(layer[path]) in wanted}


def all_linear(targets: str | list[str] | None) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def named(targets: str | Sequence[str], names: Sequence[str]) -> set[str]:
    """A text is an expression for whole paths; of a list each is a path or the end of one."""
    if isinstance(targets, str):
        return set(bounded_re.match([targets], names, whole=True)[0])
    ends = tuple(f".{target}" for target in targets)
    return {name for name in names if name in targets or name.endswith(ends)}


def patterned(patterns: Mapping[str, Any], default: Any, names: Sequence[str]) -> dict[str, Any]:
    """{path: value}: that of the first pattern that matches."""
    found = bounded_re.match([rf"(.*\.)?({key})$" for key in patterns], names)
    values = dict.fromkeys(names, default)
    for hits, value in reversed(list(zip(found, patterns.values(), strict=True))):
        values.update(dict.fromkeys(hits, value))
    return values


def anchored(path: str) -> str:
    """An expression for this path and no other (PEFT lets anything with a dot stand before an expression)."""
    return "^" + path.replace(".", r"\.")
