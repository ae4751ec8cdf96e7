"""What a training can be asked for: each option once, with its type, its default, its check and its help text.

The options of `adapterhub train`, the arguments of `Hub.train` and its docstring are made from these fields."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from adapterhub.data.seeds import check_seed
from adapterhub.errors import UsageError
from adapterhub.spec.names import check_version

EPOCHS = 3
OBJECTIVE = "sft"


def option(
    default: Any,
    help: str,
    more: str = "",
    *,
    means: str = "",
    check: Callable[[str, Any], object] | None = None,
    flag: str = "",
    metavar: str | None = None,
    typed: Any = None,
    required: bool = False,
) -> Any:
    """Make a field of the request.

    help: one sentence, for the command line and the docstring; more: what only a Python caller needs to know
    means: what the default stands for, where it is not a number
    check: is given the field's name and its value where that is not None, and raises UsageError
    flag, metavar, typed: the command line's name, value and type, where they are not the field's own
    required: a command must give it"""
    about = {"help": help, "more": more, "means": means, "check": check}
    return field(
        default=default, metadata=about | {"flag": flag, "metavar": metavar, "typed": typed, "required": required}
    )


def _above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{name} is {value}", "give a number above 0")


def _from_zero(name: str, value: int) -> None:
    if value < 0:
        raise UsageError(f"{name} is {value}", "give 0 or more")


def _printable(name: str, text: str) -> None:
    if not text.isprintable():  # as Manifest.decode, but before anything is trained
        raise UsageError(f"the {name} {text!r} holds control characters", f"for example {name} Apache-2.0")


@dataclass(frozen=True)
class TrainRequest:
    """A training as it is asked for. Raises UsageError for a value that could train nothing."""

    base: object = option(
        None,
        "Base model: a known name (smollm2), a folder or a Hugging Face repo id.",
        "Or a loaded transformers model. Left out with continue_from: the known name that the release records.",
        typed=str,
    )
    method: str | None = option(
        None,
        "How: lora, bottleneck, ... (adapterhub plugins list).",
        "Left out with continue_from, which brings its own.",
    )
    data: str | Path | None = option(  # noqa: RUF009 (it makes a field)
        None,
        "JSONL: prompt and completion, messages, or text.",
        "See adapterhub.data.",
        typed=Path,
        required=True,
    )
    name: str | None = option(None, "Name of the adapter: name or owner/name; known with --continue.")
    options: Mapping[str, Any] | None = option(
        None,
        "An option of the part (adapterhub plugins show); of an objective, recipe or schedule PART.KEY=VALUE. "
        "May be repeated.",
        'A mapping: {"r": 8, "neftune.alpha": 5}.',
        flag="--set",
        metavar="KEY=VALUE",
        typed=list[str],
    )
    version: str | None = option(
        None,
        "Its version; without it the next minor one.",
        metavar="X.Y.Z",
        check=lambda name, value: check_version(value),
    )
    on: Sequence[str] | None = option(
        None,
        "Train over this frozen adapter (a gate: weigh it); may be repeated.",
        "The first one is innermost, and a composition counts as its parts. They are recorded as parents, and as an "
        'expression in the recipe\'s "beneath".',
        metavar="REF",
        typed=list[str],
    )
    continue_from: str | None = option(
        None,
        "Go on with this adapter.",
        "It trains over what its recipe says it was trained over, and becomes a new version.",
        flag="--continue",
        metavar="REF",
    )
    _: KW_ONLY
    objective: str | None = option(None, "What is minimised.", means=OBJECTIVE)
    recipes: Sequence[str] = option(
        (),
        "What changes the data or adds to the loss; may be repeated.",
        "They act in this order.",
        flag="--recipe",
        typed=list[str],
    )
    schedule: str | None = option(None, "Which tensors train when, and how fast.")
    extras: Mapping[str, str | Path] | None = option(
        None,
        "Other data that a part asks for (calibration); may be repeated.",
        "A mapping from names to files.",
        flag="--extra",
        metavar="NAME=FILE",
        typed=list[str],
    )
    eval_data: str | Path | None = option(  # noqa: RUF009
        None, "Held-out JSONL, evaluated at the end.", "What it measures is in the release's metrics.", typed=Path
    )
    epochs: float | None = option(None, "Passes over the data.", means=str(EPOCHS), check=_above_zero)
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.", check=_above_zero)
    lr: float = option(1e-3, "Highest learning rate.", check=_above_zero)
    batch_size: int = option(8, "Examples in a step.", check=_above_zero)
    warmup: int | None = option(None, "Steps until the highest rate.", means="a tenth of all", check=_from_zero)
    max_length: int = option(1024, "Tokens of a row; longer ones are cut.", "A warning counts them.")
    seed: int = option(0, "Of everything random.", check=lambda name, value: check_seed(value))
    gradient_checkpointing: bool = option(False, "Less memory for more time.")
    save_every: int | None = option(
        None, "Steps between checkpoints.", means="a tenth of all, at most 100", check=_above_zero
    )
    resume: bool = option(
        True, "Begin anew, whatever checkpoints there are.", "That is what False does.", flag="--no-resume"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = option(
        "auto",
        "Of the base: float32, bfloat16, float16, stored (as its files are) or auto (bfloat16 on a GPU that has it, "
        "else float32).",
        "Float32 for a method that trains through the base's weights. The adapter trains in float32.",
    )
    licence: str | None = option(
        None,
        "Licence of the adapter, e.g. Apache-2.0.",
        "Left out: those of its parents, joined.",
        check=_printable,
    )
    force: bool = option(False, "Do it although the base is another model.")

    def __post_init__(self) -> None:
        if self.base is None and self.continue_from is None:
            raise UsageError("no base model to train on", "give a known name (--base smollm2), a folder or a repo id")
        if self.data is None:
            raise UsageError("no data to train on", "give a JSON Lines file")
        if self.epochs is not None and self.steps is not None:
            raise UsageError("both epochs and steps are given", "give one of them")
        for each in fields(self):
            check, value = each.metadata["check"], getattr(self, each.name)
            if check is not None and value is not None:
                check(each.name, value)


def help_of(name: str) -> str:
    """Return the help text of an option, with its default."""
    [asked] = [each for each in fields(TrainRequest) if each.name == name]
    number = type(asked.default) in (int, float)
    means = asked.metadata["means"] or (str(asked.default) if number else "")
    text = asked.metadata["help"]
    return f"{text.removesuffix('.')} ({means})." if means else text


A = ParamSpec("A")
Result = TypeVar("Result")


def takes(
    request: Callable[A, TrainRequest],
) -> Callable[[Callable[[Any, TrainRequest], Result]], Callable[Concatenate[Any, A], Result]]:
    """Make a method that takes a request take the request's options as its arguments; its docstring lists them."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    options = inspect.signature(request).parameters.values()
    listed = [f"{each.name}: {help_of(each.name)} {each.metadata['more']}".rstrip() for each in fields(TrainRequest)]

    def taking(method: Callable[[Any, TrainRequest], Result]) -> Callable[Concatenate[Any, A], Result]:
        signature = inspect.Signature([own, *options], return_annotation=inspect.signature(method).return_annotation)

        @functools.wraps(method)
        def with_options(self: Any, *given: A.args, **named: A.kwargs) -> Result:
            try:
                signature.bind(self, *given, **named)
            except TypeError as error:
                raise TypeError(f"{method.__name__}() {error}") from None
            return method(self, request(*given, **named))

        with_options.__signature__ = signature
        with_options.__doc__ = "\n".join([inspect.cleandoc(method.__doc__ or ""), "", *listed])
        return with_options

    return taking
