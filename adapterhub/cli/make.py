"""Commands that make an adapter: by training, or of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import adapterhub
from adapterhub.cli.output import Json, releases_out
from adapterhub.cli.packages import Force, Licence, Name, Version
from adapterhub.errors import UsageError

BASE = typer.Option(help="Base model: a known name (smollm2), a folder or a Hugging Face repo id.")
DEVICE = typer.Option(help="auto, cpu, cuda or cuda:N.")
DTYPE = typer.Option(
    help="Of the base: float32, bfloat16, float16, stored (as its files are) or auto (bfloat16 on a GPU that has it, "
    "else float32)."
)
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of the part (adapterhub plugins show); of an objective, recipe or schedule PART.KEY=VALUE. May be repeated.",
    ),
]


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


def train(
    data: Annotated[Path, typer.Option(help="JSONL: prompt and completion, messages, or text.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the adapter: name or owner/name; known with --continue.")
    ] = None,
    base: Annotated[str | None, BASE] = None,
    method: Annotated[str | None, typer.Option(help="How: lora, bottleneck, ... (adapterhub plugins list).")] = None,
    set_: Set = None,
    objective: Annotated[str | None, typer.Option(help="What is minimised (sft).")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="What changes the data or adds to the loss; may be repeated.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="Which tensors train when, and how fast.")] = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Other data that a part asks for (calibration); may be repeated."),
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="REF", help="Train over this frozen adapter (a gate: weigh it); may be repeated."),
    ] = None,
    continue_: Annotated[str | None, typer.Option("--continue", metavar="REF", help="Go on with this adapter.")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out JSONL, evaluated at the end.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data (3).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of --epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate (0.001).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step (8).")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps until the highest rate (a tenth of all).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; longer ones are cut (1024).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random (0).")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Begin anew, whatever checkpoints there are.")] = False,
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    version: Version = None,
    licence: Licence = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train an adapter and store it as a new version.

    Killed or interrupted, the same command goes on from its last checkpoint.

    \b
    Example:
      adapterhub train --base smollm2 --method lora --set r=8 \\
        --data train.jsonl --name me/sentiment --steps 60
    """
    if base is None and continue_ is None:
        raise UsageError("no base model to train on", "give --base, for example --base smollm2")
    given = {
        "method": method,
        "objective": objective,
        "recipes": recipe,
        "schedule": schedule,
        "extras": extras_of(extra),
        "name": name,
        "on": on,
        "continue_from": continue_,
        "eval_data": eval_data,
        "epochs": epochs,
        "steps": steps,
        "lr": lr,
        "batch_size": batch_size,
        "warmup": warmup,
        "max_length": max_length,
        "save_every": save_every,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "version": version,
        "licence": licence,
    }
    # What is not given is left to the Hub, so that each default stands in one place.
    given = {key: value for key, value in given.items() if value is not None}
    release = adapterhub.open().train(
        base,
        data=data,
        options=options_of(set_),
        gradient_checkpointing=gradient_checkpointing,
        resume=not no_resume,
        force=force,
        **given,
    )
    releases_out([release], as_json)


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
