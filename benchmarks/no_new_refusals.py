"""A mend is not a refusal: how many of 400 random expressions, and of what is made of their adapters, run.

    uv run python benchmarks/no_new_refusals.py [--json FILE] [--compare BEFORE.json] [--count 400]

Over tiny bases of every family: each expression runs without gradients, with gradients, while one of its adapters trains, folds, and
is exported to PEFT as a composition; each adapter is compressed by every codec and exported, and pairs are merged by every merger. It runs
with another commit's Python too (`OTHER/.venv/bin/python benchmarks/no_new_refusals.py --json before.json`); --compare then lists each case
that ran there and does not here, with its reason. A HubError is a refusal, any other exception a crash."""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("ADAPTERHUB_PLUGINS", "*")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import torch
from transformers.utils import logging
from worlds import World

from adapterhub import plugins
from adapterhub.errors import HubError
from adapterhub.spec.expression import references
from adapterhub.spec.parser import parse
from adapterhub.testing.families import FAMILIES, inputs

Cases = Iterator[tuple[str, str, Callable[[], object]]]
"""(operation, what it is tried on, the trial)."""
OPTIONS = {"svd": {"rank": 2}}
"""Of codecs that change nothing without."""
OUTCOMES = ("runs", "refused", "crashed")


def of_expressions(world: World, count: int, folder: Path) -> Cases:
    given = inputs(world.base, [torch.arange(3, 10), torch.arange(20, 27)])
    model = world.hub.load(world.base)

    def run(text: str, gradients: bool) -> None:
        with torch.set_grad_enabled(gradients):
            model(**given, adapters=text)

    def train(text: str, name: str) -> None:
        model.use(text, trainable=[name])
        try:
            model(**given).logits.square().mean().backward()
        finally:
            model.use(None)

    def fold(text: str) -> None:
        world.hub.load(copy.deepcopy(bare), text).fold()(**given)

    def export(text: str, n: int) -> None:
        world.hub.compose(text, name=f"c/{n}")
        world.hub.export(f"c/{n}", folder / f"c{n}", base=folder / "base")

    bare = copy.deepcopy(world.base)
    for n in range(count):
        text = world.expression(anything=True)
        leaf = world.random.choice([str(ref) for ref in references(parse(text))] or [None])
        yield "run", text, lambda text=text: run(text, gradients=False)
        yield "run with gradients", text, lambda text=text: run(text, gradients=True)
        if leaf is not None:
            yield "train", f"{text} | {leaf}", lambda text=text, leaf=leaf: train(text, leaf)
        yield "fold", text, lambda text=text: fold(text)
        yield "export", text, lambda text=text, n=n: export(text, n)


def of_adapters(world: World, folder: Path) -> Cases:
    hub, names = world.hub, list(world.adapters)
    for name in names:
        last = name.rpartition("/")[2]
        yield "export", name, lambda name=name, last=last: hub.export(name, folder / last, base=folder / "base")
        for codec in plugins.names("codecs"):
            yield (
                f"compress, {codec}",
                name,
                lambda name=name, codec=codec, last=last: hub.compress(
                    name, codec, OPTIONS.get(codec), name=f"{codec}/{last}"
                ),
            )
    for merger in plugins.names("mergers"):
        for n, (one, other) in enumerate(
            zip(names + world.folding, names[1:] + names[:1] + world.folding[1:], strict=False)
        ):
            yield (
                f"merge, {merger}",
                f"{one}, {other}",
                lambda merger=merger, n=n, one=one, other=other: hub.merge(
                    [one, other], merger, [0.6, 0.5], name=f"{merger}/{n}", base=world.base
                ),
            )


def tried(trial: Callable[[], object]) -> tuple[str, str]:
    """(outcome, what the error said)."""
    try:
        with warnings.catch_warnings(action="ignore"):
            trial()
    except HubError as error:
        return "refused", _said(error)
    except Exception as error:
        return "crashed", _said(error)
    return "runs", ""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def all_cases(count: int, folder: Path) -> dict[str, tuple[str, str, str]]:
    """{case: (operation, outcome, reason)}."""
    found = {}
    for place, family in enumerate(FAMILIES):
        world = World(family, 0, folder / family)
        world.base.save_pretrained(folder / family / "base")
        each = count // len(FAMILIES) + (place < count % len(FAMILIES))
        for cases in (of_expressions(world, each, folder / family), of_adapters(world, folder / family)):
            for n, (operation, what, trial) in enumerate(cases):
                found[f"{family} {n}, {operation}: {what}"] = (operation, *tried(trial))
    return found


def table(found: dict[str, tuple[str, str, str]], before: dict[str, tuple[str, str, str]] | None) -> str:
    counts = [Counter(tuple(case[:2]) for case in (run or {}).values()) for run in (found, before)]
    lines = [f"{'':22}" + "".join(f"{outcome:>18}" for outcome in OUTCOMES)]
    for operation in dict.fromkeys(case[0] for case in found.values()):
        cells = []
        for outcome in OUTCOMES:
            now, then = (count[operation, outcome] for count in counts)
            cells.append(f"{now}" if before is None else f"{then} -> {now}")
        lines.append(f"{operation:22}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="BEFORE.json")
    parser.add_argument("--count", type=int, default=400, help="expressions")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        found = all_cases(given.count, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    before = json.loads(given.compare.read_text()) if given.compare else None
    print(table(found, before))
    crashes = Counter(f"{operation}: {why}" for operation, outcome, why in found.values() if outcome == "crashed")
    print(*(f"\n{n} crashed, {why}" for why, n in crashes.most_common()), sep="")
    lost = {case for case in found if before and before.get(case, " ")[1] == "runs" and found[case][1] != "runs"}
    print(*(f"\nran before: {case}\n  {found[case][1]}: {found[case][2]}" for case in found if case in lost), sep="")
    if before and before.keys() != found.keys():
        print(f"\n{len(before.keys() ^ found.keys())} cases stand on one side only: their drawing differs")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
