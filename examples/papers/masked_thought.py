"""Masked thought's claim on the small model: with few examples, hiding some of the reasoning where it is read makes its
learning generalise better (Chen et al., 2024); and NEFTune beside it (Jain et al., 2024).

The task is a chain of sums modulo 8: four steps of 0 to 4, a start, and the four partial sums in order. 100 examples, so that plain
fine-tuning learns them by heart. What is measured is the share of fresh chains whose four sums are all right, greedily decoded (a sum is a
meaning: any of its four words will do).
For each seed (data, start, order, masks), a LoRA of rank 16 and the same steps: plain; masked_thought at p = 0.2 and at 0.4; LoRA dropout 0.1
(the ordinary regulariser); NEFTune at alpha 5 and 0.5; and as positive control plain with 1,000 examples.

The analysis was fixed before any of the seeds was run: masked_thought at p = 0.2 less plain, and NEFTune (0.5) less plain, paired by seed, the mean
and the 95 % interval of Student's t. *Seen* if the interval lies above 0, *not seen* if below or if it is narrower than a twentieth of what the
control gains and holds 0, else *not resolved*.

    python examples/papers/masked_thought.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny

import adapterhub

SEEDS, STEPS, FEW, MANY, TRIED = (1, 2, 3, 4, 5), 300, 100, 1000, 400


def chain(draw: random.Random) -> tuple[str, str]:
    """What is asked and its answer: words of language a are numbers, those of b steps."""
    value, steps = draw.randrange(bed.MEANINGS), [draw.randrange(5) for _ in range(4)]
    asked = " ".join(["is", *(f"b{step}0" for step in steps), f"a{value}0"])
    sums = []
    for step in steps:
        value = (value + step) % bed.MEANINGS
        sums.append(f"a{value}0")
    return asked, " " + " ".join(sums)


def rows(path: Path, seed: int, count: int) -> Path:
    draw = random.Random(seed)
    pairs = (chain(draw) for _ in range(count))
    path.write_text("\n".join(json.dumps({"prompt": asked, "completion": answer}) for asked, answer in pairs))
    return path


def right(model: adapterhub.Model, name: str | None, seed: int, count: int) -> float:
    """The share of fresh chains that are answered right."""
    draw = random.Random(10_000 + seed)
    pairs = [chain(draw) for _ in range(count)]
    said = model.complete([asked for asked, _ in pairs], name, max_new_tokens=4)
    return sum(meanings(one) == meanings(answer) for one, (_, answer) in zip(said, pairs, strict=True)) / count


def meanings(words: str) -> list[str]:
    return [word[:2] for word in words.split()]


def measure(base: Path, folder: Path, seed: int, steps: int, tried: int) -> dict[str, float]:
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    few, many = (rows(folder / f"{n}-{seed}.jsonl", seed, n) for n in (FEW, MANY))
    given = {"base": str(base), "method": "lora", "seed": seed, "batch_size": 16, "lr": 1e-2, "steps": steps}
    ways = {
        "plain": {},
        "masked 0.2": {"recipes": ["masked_thought"], "options": {"masked_thought.p": 0.2}},
        "masked 0.4": {"recipes": ["masked_thought"], "options": {"masked_thought.p": 0.4}},
        "dropout": {"options": {"lora_dropout": 0.1}},
        "neftune 5": {"recipes": ["neftune"], "options": {"neftune.alpha": 5.0}},
        "neftune 0.5": {"recipes": ["neftune"], "options": {"neftune.alpha": 0.5}},
        "control": {"data": many},
    }
    for name, way in ways.items():
        options = {"r": 16, "lora_alpha": 32, **way.pop("options", {})}
        hub.train(name=name.replace(" ", "-").replace(".", "-"), options=options, **{"data": few, **given, **way})
    model = hub.load(str(base))
    found = {name: right(model, name.replace(" ", "-").replace(".", "-"), seed, tried) for name in ways}
    print(f"seed {seed}: {tiny.shown(found)}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2, 8), full=(STEPS, TRIED))
    if not found:
        return
    print("share of fresh chains answered right, mean (standard deviation) over seeds:")
    for name in found[0]:
        print(f"  {name:12} {tiny.spread([each[name] for each in found])}")
    scale = sum(each["control"] - each["plain"] for each in found) / len(found)
    for name in ("masked 0.2", "masked 0.4", "dropout", "neftune 5", "neftune 0.5"):
        print(tiny.verdict(f"{name} - plain", [each[name] - each["plain"] for each in found], scale))


if __name__ == "__main__":
    main()
