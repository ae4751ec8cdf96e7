"""Commands that run adapters on a base model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import adapterhub
from adapterhub.cli.make import BASE, DEVICE, DTYPE
from adapterhub.cli.output import Json, clean, json_out, note, table
from adapterhub.cli.packages import Force
from adapterhub.data.seeds import check_seed
from adapterhub.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.runtime.model import Model

Expression = Annotated[
    str | None, typer.Argument(metavar="[EXPR]", help="For example 'me/a + 0.5*me/b'; left out: the bare base.")
]
Base = Annotated[str, BASE]
Device = Annotated[str, DEVICE]
Dtype = Annotated[str, DTYPE]
Tokens = Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="Sample at this temperature; without it greedy.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]


def run(
    base: Base,
    prompt: Annotated[str, typer.Option(help="The text to go on from; - reads it from the standard input.")],
    expression: Expression = None,
    max_new_tokens: Tokens = 40,
    temperature: Temperature = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Complete a prompt with composed adapters on a base model.

    \b
    Example:
      adapterhub run "me/sentiment + 0.5*me/topic" --base smollm2 --prompt "Review: ..."
    """
    _check_sampling(temperature, seed)
    text = _utf8(sys.stdin.read) if prompt == "-" else _utf8(lambda: prompt)
    model = adapterhub.open().load(base, expression, dtype=dtype, device=device, force=force)
    sampling = _sampling(temperature, seed)
    (completion,) = model.complete([text], max_new_tokens=max_new_tokens, **sampling)
    if as_json:
        return json_out({"base": base, "adapters": expression, "prompt": text, "completion": completion})
    print(clean(completion))  # all of it: it is what was asked for


def chat(
    base: Base,
    expression: Expression = None,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Talk with a base model and its adapters.

    /exit or the end of the input ends it, Ctrl-C cuts an answer short.

    \b
    Example:
      adapterhub chat "me/sentiment" --base smollm2
    """
    _check_sampling(temperature, seed)
    model = adapterhub.open().load(base, expression, dtype=dtype, device=device, force=force)
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        raise UsageError(f"{base} has no chat template", "use adapterhub run with a prompt of your own")
    sampling = _sampling(temperature, seed)
    messages: list[dict[str, str]] = []
    while (line := _asked()) is not None:
        if line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(model, messages, max_new_tokens, sampling)})


def _asked() -> str | None:
    """The next line of the user without its ends; None when they have finished. The prompt mark is no data."""
    print("> ", end="", file=sys.stderr, flush=True)
    line = _utf8(sys.stdin.readline)
    return None if not line or line.strip() == "/exit" else line.strip()


def _utf8(read: Callable[[], str]) -> str:
    """What is read. Raises UsageError unless it came as UTF-8 (Python passes other bytes on as surrogates)."""
    try:
        text = read()
        text.encode()
    except UnicodeError:
        raise UsageError("the prompt is not UTF-8", "convert it first, for example with iconv") from None
    return text


def _answer(model: Model, messages: list[dict[str, str]], max_new_tokens: int, sampling: dict[str, Any]) -> str:
    """The model's turn, printed as it comes."""
    from transformers import TextStreamer

    from adapterhub.data.chat_template import render

    said: list[str] = []

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            said.append(text)
            print(clean(text), end="\n" if stream_end else "", flush=True)

    [text] = render(model.tokenizer, [(messages, True)])
    inputs = model.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    max_new_tokens = min(max_new_tokens, model.context.room(inputs["input_ids"].shape[1], model.advance()))
    printer = Printer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=printer, **sampling)
    except KeyboardInterrupt:
        printer.end()
    return "".join(said)


def _check_sampling(temperature: float | None, seed: int) -> None:
    """Raises UsageError for what would end as inf or nan in float32, or is no seed of torch's."""
    if temperature and not 1e-3 <= temperature < math.inf:
        raise UsageError(f"the temperature is {temperature}", "give one from 0.001 on, or 0 for greedy")
    check_seed(seed)


def _sampling(temperature: float | None, seed: int) -> dict[str, Any]:
    """generate's options for a temperature; None and 0 are greedy."""
    if not temperature:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    import torch

    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature}


def eval_(
    base: Base,
    data: Annotated[Path, typer.Option(help="Held-out JSONL: prompt and completion, messages, or text.")],
    expression: Expression = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="loss, exact or label; may be repeated. Without it all that the data allow."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="An allowed label, as completions write it; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row; longer ones are cut.")] = 1024,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure adapters on held-out data.

    Loss, exact match, and accuracy among the labels, with 95 % intervals.

    \b
    Example:
      adapterhub eval "me/sentiment" --base smollm2 --data test.jsonl --json
    """
    result = adapterhub.open().evaluate(
        expression,
        base=base,
        data=data,
        metrics=metric,
        labels=label,
        limit=limit,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        dtype=dtype,
        force=force,
    )
    if as_json:
        return json_out({"base": base, "adapters": expression, **result})
    rows = [("loss", f"{result['loss']:.4f}", f"nats a token, {result['tokens']} tokens")] if "loss" in result else []
    for metric in ("exact", "label"):
        if metric in result:
            low, high = result[f"{metric}_interval"]
            rows.append((metric, f"{result[metric]:.1%}", f"95 % interval {low:.1%} to {high:.1%}"))
    table(("METRIC", "VALUE", f"OF {result['n']} ROWS"), rows)
    if result["truncated"]:
        note(f"warning: {result['truncated']} rows were longer than the longest allowed and were cut")


def demo(
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    report: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("demo-report.html"),
    device: Device = "auto",
) -> None:
    """Train two adapters on a real model, and compress, merge, stack, install and run them.

    \b
    Example:
      adapterhub demo --seed 0
    """
    import adapterhub.demo

    adapterhub.demo.run(seed=seed, report=report, device=device)
