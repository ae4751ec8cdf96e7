"""Commands that make an adapter: by training, or of others."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

import adapterhub
from adapterhub.cli.output import Json, releases_out
from adapterhub.cli.packages import Name, Version
from adapterhub.errors import UsageError
from adapterhub.training.request import TrainRequest, help_of

BASE, DEVICE, DTYPE = (typer.Option(help=help_of(name)) for name in ("base", "device", "dtype"))
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=help_of("options"))]


def options_of(pairs: list[str] | None) -> dict[str, Any]:
    """["r=8", "targets=q,v"] -> {"r": "8", "targets": "q,v"}; the part itself reads the values."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {pair!r} is no option", "write --set key=value, for example --set r=8")
        if key in options:
            raise UsageError(f"--set {key} is given twice", "give each option once; a list is written key=a,b")
        options[key] = value
    return options


def extras_of(pairs: list[str] | None) -> dict[str, str] | None:
    """["calibration=old.jsonl"] -> {"calibration": "old.jsonl"}"""
    named: dict[str, str] = {}
    for pair in pairs or []:
        name, equals, path = pair.partition("=")
        if not (name.isidentifier() and equals and path) or name in named:
            raise UsageError(f"--extra {pair!r} names no file, or one twice", "write --extra calibration=old.jsonl")
        named[name] = path
    return named or None


def weights_of(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(weight) for weight in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r} are not numbers", "write them with commas: --weights 1,0.5") from None


READ = {"options": options_of, "extras": extras_of, "resume": lambda anew: not anew}
"""How a value on the command line becomes the request's, where it is not the value itself."""


def train(as_json: Json = False, **asked: Any) -> None:
    """Train an adapter and store it as a new version.

    Killed or interrupted, the same command goes on from its last checkpoint.

    \b
    Example:
      adapterhub train --base smollm2 --method lora --set r=8 \\
        --data train.jsonl --name me/sentiment --steps 60
    """
    given = {name: READ.get(name, lambda value: value)(value) for name, value in asked.items() if value is not None}
    request, hub = TrainRequest(**given), adapterhub.open()  # mistakes are said before torch is imported
    from adapterhub.training.train import train

    releases_out([train(hub, request)], as_json)


def _parameters() -> list[inspect.Parameter]:
    """An option for each field of a TrainRequest. What is not given is None, so that each default stands there alone."""
    types, made = get_type_hints(TrainRequest), []
    for each in fields(TrainRequest):
        about = each.metadata
        flag = about["flag"] or "--" + each.name.replace("_", "-")
        kind, default = about["typed"] or types[each.name], inspect.Parameter.empty
        if not about["required"]:
            kind, default = kind | None, None
        option = typer.Option(flag, metavar=about["metavar"], help=help_of(each.name))
        keyword = inspect.Parameter.KEYWORD_ONLY
        made.append(inspect.Parameter(each.name, keyword, default=default, annotation=Annotated[kind, option]))
    return made


_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
train.__signature__ = inspect.Signature([*_parameters(), _json])


def merge(
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="The adapters.")],
    name: Name,
    merger: Annotated[str, typer.Option(help="How (adapterhub plugins list).")] = "linear",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="One for each adapter; without it all 1.")
    ] = None,
    set_: Set = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model, for changes that depend on its weights (DoRA): name, folder or repo id."),
    ] = None,
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Merge adapters into one of the same base.

    \b
    Example:
      adapterhub merge me/a me/b --merger linear --weights 1,0.5 --name me/c
    """
    release = adapterhub.open().merge(
        refs,
        merger=merger,
        weights=weights_of(weights),
        options=options_of(set_),
        base=base,
        name=name,
        version=version,
    )
    releases_out([release], as_json)


def compress(
    ref: Annotated[str, typer.Argument(metavar="REF", help="The adapter.")],
    codec: Annotated[str, typer.Option(help="How (adapterhub plugins list).")],
    name: Name,
    set_: Set = None,
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Store an adapter in fewer bytes, as a new one.

    \b
    Example:
      adapterhub compress me/a --codec compeft --set density=0.2 --name me/a-small
    """
    release = adapterhub.open().compress(ref, codec=codec, options=options_of(set_), name=name, version=version)
    releases_out([release], as_json)


def compose(
    expression: Annotated[str, typer.Argument(metavar="EXPR", help="For example: '0.7*me/a + me/b'.")],
    name: Name,
    version: Version = None,
    as_json: Json = False,
) -> None:
    """Save a composition as an adapter: it takes no room of its own and pins the versions of its parts.

    \b
    Example:
      adapterhub compose "0.7*me/a + me/b" --name me/stack
    """
    releases_out([adapterhub.open().compose(expression, name=name, version=version)], as_json)
