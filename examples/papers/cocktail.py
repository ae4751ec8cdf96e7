"""The cocktail effect on the small model: for one task with little data, training on related tasks too does better than training on
that task alone, and than merging adapters of the single tasks (Brief et al., 2024).

Four tasks on four words of language a, each with a tag of its own: copy, reverse, sort by meaning, and every meaning one further. The target is
to reverse, with 150 examples; of each other task there are 400. What is measured is the share of fresh rows reversed right, greedily
decoded (any word of the meaning will do), and how much the loss on the base's own corpus rises. For each seed (data, start, order), LoRAs of
rank 16: single (the target's examples alone); mix (the same examples and the others', as many rows of the target in the steps as single
has: four times the steps); mix of the same number of steps as single; merged (the sum of the single tasks' adapters, and their mean); mix with a
fifth of general text; and as positive control the target with 1,000 examples.

The analysis was fixed before any of the seeds was run: mix less single at equal target rows, mix less single at equal steps, and mix less
the better of the two merges, paired by seed, the mean and the 95 % interval of Student's t. *Seen* if the interval lies above 0, *not seen* if
below or if it is narrower than a twentieth of what the control gains over single and holds 0, else *not resolved*.

    python examples/papers/cocktail.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny

import adapterhub

SEEDS, STEPS, FEW, MANY, CONTROL, TRIED = (1, 2, 3, 4, 5), 150, 150, 400, 1000, 300
TASKS = {
    "reverse": ("half", lambda meanings: meanings[::-1]),
    "copy": ("is", lambda meanings: meanings),
    "sort": ("low", sorted),
    "further": ("high", lambda meanings: [(meaning + 1) % bed.MEANINGS for meaning in meanings]),
}
TARGET = "reverse"


def row(draw: random.Random, task: str) -> tuple[str, str]:
    tag, answer = TASKS[task]
    meanings = [draw.randrange(bed.MEANINGS) for _ in range(4)]
    return " ".join([*(f"a{m}0" for m in meanings), tag]), " " + " ".join(f"a{m}0" for m in answer(meanings))


def write(path: Path, seed: int, task: str, count: int) -> Path:
    draw = random.Random(f"{task} {seed}")
    pairs = (row(draw, task) for _ in range(count))
    path.write_text("\n".join(json.dumps({"prompt": asked, "completion": answer}) for asked, answer in pairs))
    return path


def general(path: Path, seed: int, count: int, kind: str) -> Path:
    """Sentences of the base's corpus, whole or begun by their first two words."""
    draw, made = random.Random(f"general {seed}"), []
    for _ in range(count):
        words = bed.corpus(draw).split()
        begun = {"prompt": " ".join(words[:2]), "completion": " " + " ".join(words[2:])}
        made.append(json.dumps(begun if kind == "prompt" else {"text": " ".join(words)}))
    path.write_text("\n".join(made))
    return path


def right(model: adapterhub.Model, expression: str | None, seed: int, count: int) -> float:
    draw = random.Random(f"test {seed}")
    pairs = [row(draw, TARGET) for _ in range(count)]
    said = model.complete([asked for asked, _ in pairs], expression, max_new_tokens=4)
    told = [
        [word[:2] for word in one.split()] == [word[:2] for word in want.split()]
        for one, (_, want) in zip(said, pairs, strict=True)
    ]
    return sum(told) / count


def measure(base: Path, folder: Path, seed: int, steps: int, tried: int) -> tuple[dict[str, float], dict[str, float]]:
    """What is right, and the loss on the base's corpus."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    files = {task: write(folder / f"{task}{seed}.jsonl", seed, task, FEW if task == TARGET else MANY) for task in TASKS}
    others = {task: path for task, path in files.items() if task != TARGET}
    given = {"base": str(base), "method": "lora", "seed": seed, "batch_size": 16, "lr": 5e-3, "options": {"r": 16}}
    mixed = {"data": files[TARGET], "recipes": ["cocktail"]}
    equal = given["options"] | {"cocktail.temperature": 1e9}
    hub.train(name="single", data=files[TARGET], steps=steps, **given)
    hub.train(name="mixed", extras=others, steps=4 * steps, **mixed, **given | {"options": equal})
    hub.train(name="mixed-short", extras=others, steps=steps, **mixed, **given | {"options": equal})
    text = general(folder / f"general{seed}.jsonl", seed, MANY, "prompt")
    hub.train(
        name="mixed-general", extras=others | {"general": text}, steps=5 * steps, **mixed, **given | {"options": equal}
    )
    control = write(folder / f"control{seed}.jsonl", seed + 50, TARGET, CONTROL)
    hub.train(name="control", data=control, steps=4 * steps, **given)
    for task, path in others.items():
        hub.train(name=task, data=path, steps=steps, **given)
    names = ["single", *others]
    hub.merge(names, name="summed")
    hub.merge(names, weights=[1 / len(names)] * len(names), name="mean")
    model = hub.load(str(base))
    ways = ("single", "mixed", "mixed-short", "mixed-general", "summed", "mean", "control")
    found = {way: right(model, way, seed, tried) for way in ways}
    corpus = general(folder / f"corpus{seed}.jsonl", seed + 1000, 200, "text")
    losses = {way: hub.evaluate(way, str(base), corpus)["loss"] for way in ("single", "mixed", "mixed-general")}
    losses["base"] = hub.evaluate(None, str(base), corpus)["loss"]
    print(f"seed {seed}: {tiny.shown(found)}; loss on the corpus: {tiny.shown(losses)}", flush=True)
    return found, losses


def main() -> None:
    both = tiny.each_seed(__doc__, measure, SEEDS, quick=(2, 8), full=(STEPS, TRIED))
    if not both:
        return
    for what, found in zip(("share reversed right", "loss on the corpus"), zip(*both, strict=True), strict=True):
        print(f"{what}, mean (standard deviation) over seeds:")
        for name in found[0]:
            print(f"  {name:12} {tiny.spread([each[name] for each in found])}")
    found = [each for each, _ in both]
    scale = sum(each["control"] - each["single"] for each in found) / len(found)
    for more, less in (("mixed", "single"), ("mixed-short", "single")):
        print(tiny.verdict(f"{more} - {less}", [each[more] - each[less] for each in found], scale))
    merged = [each["mixed"] - max(each["summed"], each["mean"]) for each in found]
    print(tiny.verdict("mixed - the better merge", merged, scale))


if __name__ == "__main__":
    main()
