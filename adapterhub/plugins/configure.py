"""A part's Config from what a user writes."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import msgspec

from adapterhub.errors import UsageError
from adapterhub.plugins.boundary import guard


def options(config: type, given: dict[str, Any], parse: bool = True) -> Any:
    """A part's Config from options; text (`--set r=8`) is converted to the field's type. parse: text may be a list or a
    table (not where it was read out of one already). Raises UsageError."""
    with guard(config, "Config"):
        fields = {field.name: field for field in msgspec.inspect.type_info(config).fields}
    unknown = [name for name in given if name not in fields]
    if unknown:
        near = get_close_matches(unknown[0], fields, 1)
        raise UsageError(
            f"unknown option {unknown[0]!r}",
            f"did you mean {near[0]!r}?" if near else f"options: {', '.join(fields) or 'none'}",
        )
    values = {
        name: _parsed(value, fields[name].type) if parse and isinstance(value, str) else value
        for name, value in given.items()
    }
    with guard(config, "Config"):
        try:
            return msgspec.convert(values, config, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise UsageError(
                f"an option has a wrong value: {error}", "adapterhub plugins show NAME lists the options"
            ) from None


def _parsed(text: str, wanted: msgspec.inspect.Type) -> Any:
    """`q_proj,v_proj` and JSON become what they say, a lone value becomes a list of one where only a list fits."""
    if text[:1] in "[{":
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise UsageError(f"{text!r} is not JSON: {error}", 'write a list as [1,2] and a table as {"a":1}') from None
    kinds = wanted.types if isinstance(wanted, msgspec.inspect.UnionType) else (wanted,)
    lists = any(isinstance(kind, msgspec.inspect.VarTupleType | msgspec.inspect.ListType) for kind in kinds)
    texts = any(isinstance(kind, msgspec.inspect.StrType) for kind in kinds)
    return text.split(",") if "," in text or (lists and not texts and text) else text
