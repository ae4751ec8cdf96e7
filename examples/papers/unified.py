"""The unified view's claims on the small model: parallel adapters do better than sequential ones, feed-forward ones better than
attention ones, scaled ones no worse than plain ones (He et al., 2022).

Two tasks: `text`, raw sentences in language d, of which the base has seen little; and `rule`, a walk that it has never seen: after `low`
and a word, always three meanings on, in languages a and b by turns, and each word the same of its four synonyms as the first. For each
seed (data, start, order) and task, adapters of equal size (1536 to 1612 numbers a layer), equal steps: a bottleneck of 12, sequential and
parallel at the feed-forward, parallel at the attention, parallel and scaled by 4 at the feed-forward; a prefix of 25; MAM (a prefix of
10, a scaled bottleneck of 7); and LoRA of rank 2 at the feed-forward. What is measured is the loss on 200 rows drawn anew (of
`rule` there are 64 in all), the mean over the two tasks. The positive control is training itself: LoRA at a third of the steps less LoRA at all of them.

Each way has its own rate, the best of 3e-3, 1e-2 and 3e-2 for that mean on a seed of its own (100), since a scale of 4 is a greater rate
besides. The analysis was fixed before any of the seeds was run: three differences of the loss, (1) sequential - parallel, (2) parallel at the
attention - at the feed-forward, (3) parallel - scaled; paired by seed, each mean with the 95 % interval of Student's t. A claim is
*seen* if its interval lies above 0, *not seen* if below or if it is narrower than a twentieth of the control and holds 0, else *not resolved*.

    python examples/papers/unified.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny

import adapterhub

SEEDS, STEPS = (1, 2, 3, 4, 5), 150
WAYS = {
    "sequential": ({"preset": "sequential", "r": 12}, 3e-2),
    "parallel": ({"preset": "parallel", "r": 12}, 3e-2),
    "attention": ({"preset": "parallel", "site": "attention", "r": 12}, 3e-2),
    "scaled": ({"preset": "scaled-parallel", "r": 12}, 3e-2),
    "prefix": ({"preset": "prefix", "r": 25}, 3e-2),
    "mam": ({"preset": "mam", "r": 7, "length": 10}, 3e-2),
    "lora": ({"preset": "lora", "r": 2}, 3e-3),
    "early": ({"preset": "lora", "r": 2}, 3e-3),
}
"""The options and the rate of each."""


def text(seed: int, count: int) -> str:
    draw = random.Random(f"text {seed}")
    tags = [draw.choice(bed.TAGS[:3]) for _ in range(count)]
    return "\n".join(json.dumps({"text": bed.sentence(draw, "d", tag)}) for tag in tags)


def rule(seed: int, count: int) -> str:
    draw, made = random.Random(f"rule {seed}"), []
    for _ in range(count):
        language, meaning, synonym = draw.choice("ab"), draw.randrange(bed.MEANINGS), draw.randrange(bed.SYNONYMS)
        words = []
        for _ in range(bed.LENGTH):
            words.append(f"{language}{meaning}{synonym}")
            language, meaning = "b" if language == "a" else "a", (meaning + 3) % bed.MEANINGS
        made.append(json.dumps({"prompt": f"low {words[0]}", "completion": f" {' '.join(words[1:])}"}))
    return "\n".join(made)


TASKS = {"text": text, "rule": rule}


def measure(base: Path, folder: Path, seed: int, steps: int, rows: int, ways=WAYS) -> dict[str, dict[str, float]]:
    """The loss of each way and of the base on rows drawn anew: {task: {way: nats a token}}."""
    found: dict[str, dict[str, float]] = {}
    for task, made in TASKS.items():
        hub = adapterhub.open(folder / f"hub-{task}-{seed}", create=True)
        train, test = folder / f"{task}-{seed}.jsonl", folder / f"{task}-{seed}-test.jsonl"
        train.write_text(made(seed, rows))
        test.write_text(made(seed + 1000, 200))
        settings = {"data": train, "seed": seed, "batch_size": 16}
        for way, (options, rate) in ways.items():
            taken = -(-steps // 3) if way == "early" else steps
            hub.train(str(base), "unified", name=way, options=options, lr=rate, steps=taken, **settings)
        model = hub.load(str(base))
        expressions = {way: way for way in ways} | {"base": None}
        found[task] = {
            way: hub.evaluate(expression, str(base), test, metrics=["loss"], model=model)["loss"]
            for way, expression in expressions.items()
        }
        print(f"seed {seed}, {task}: {tiny.shown(found[task])}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2, 40), full=(STEPS, 1000))
    if not found:
        return
    both = [
        {way: sum(losses[way] for losses in each.values()) / len(TASKS) for way in (*WAYS, "base")} for each in found
    ]
    print("loss on rows drawn anew, nats a token, mean (standard deviation) over seeds: both tasks;", " ".join(TASKS))
    for way in both[0]:
        tasks = ", ".join(tiny.spread([each[task][way] for each in found]) for task in TASKS)
        print(f"  {way:12} {tiny.spread([each[way] for each in both])}; {tasks}")
    scale = sum(each["early"] - each["lora"] for each in both) / len(both)
    for more, less in (("sequential", "parallel"), ("attention", "parallel"), ("parallel", "scaled")):
        print(tiny.verdict(f"{more} - {less}", [each[more] - each[less] for each in both], scale))


if __name__ == "__main__":
    main()
