"""Layer policies' claim on the small model: on little data, freezing the lower half of the layers or letting the rate fall from layer to
layer makes fine-tuning steadier, and no worse (Tinn et al., 2023).

The task: does the last word of a sentence of language a mean 0 to 3 or 4 to 7? The answer is `b00` or `b40`, and there are 64 sentences to
learn it from. Measured is the share of right answers to 500 others, the same ones for every run. A seed draws the 64 sentences and their order.
For each of 20 seeds: full fine-tuning; the lower half (two layers and the embedding) frozen; a rate that falls by 0.9 from layer to layer;
by 0.5, since four layers of 0.9 are few; the highest layer begun afresh; and as positive control full fine-tuning on 640 sentences, for the same steps.

The analysis was fixed before any of the seeds was run. Two claims on spread: the standard deviation over seeds of full fine-tuning, divided by
that of frozen and by that of rate 0.9, is above 1. The interval of 95 % for a ratio of the standard deviations of paired normal variables is
Pitman's and Morgan's (1939): R(K ± (K² - 1)^½) around the ratio of variances R, K = 1 + 2t²(1 - r²)/(n - 2), r the correlation
over seeds, t Student's for n - 2. *Seen*: it lies above 1; *not seen*: below; else, and where the control's ratio does not lie above 1, *not resolved*. Two
claims on the mean: frozen and rate 0.9 are right more often than full, paired by seed, Student's interval, as in the other scripts; not seen, too, if it
is narrower than a twentieth of what the control gains and holds 0. The other two policies are told and not tested.

    python examples/papers/layer_policy.py [--quick]
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import correlation, mean, stdev, variance

import bed
import tiny

import adapterhub

SEEDS, STEPS = range(1, 21), 80
T19, T18 = 2.093, 2.101
"""The 97.5 % points of Student's t for 20 seeds."""
WEIGHTS = ["query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down", "embedding", "head"]
WAYS = {
    "full": {},
    "frozen": {"layer_policy.freeze_below": 2},
    "rate 0.9": {"layer_policy.lr_decay": 0.9},
    "rate 0.5": {"layer_policy.lr_decay": 0.5},
    "fresh top": {"layer_policy.reinit_top": 1},
    "more data": {},
}


def rows(draw: random.Random, count: int) -> str:
    made = []
    for _ in range(count):
        text = bed.sentence(draw, "a", draw.choice(bed.TAGS[:3]), 5)
        answer = "b00" if int(text.split()[-1][1]) < bed.MEANINGS // 2 else "b40"
        made.append(json.dumps({"prompt": f"{text} is", "completion": f" {answer}"}))
    return "\n".join(made)


def measure(base: Path, folder: Path, seed: int, steps: int, count: int) -> dict[str, float]:
    """The share of right answers, each way."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    few, many, test = (folder / f"{name}{seed}.jsonl" for name in ("few", "many", "test"))
    few.write_text(rows(random.Random(seed), count))
    many.write_text(rows(random.Random(seed), 10 * count))
    test.write_text(rows(random.Random("test"), 500))
    right = {}
    for way, options in WAYS.items():
        name = way.replace(" ", "-")
        hub.train(
            str(base), "full", many if way == "more data" else few, name, steps=steps, batch_size=16, lr=1e-3, seed=seed,
            schedule="layer_policy", options={"target_modules": WEIGHTS, "norms": True, **options},
        )  # fmt: skip
        right[way] = hub.evaluate(name, str(base), test, metrics=["label"], labels=[" b00", " b40"])["label"]
    print(f"seed {seed}: {tiny.shown(right)}", flush=True)
    return right


def ratio(more: list[float], less: list[float]) -> tuple[float, float, float]:
    """The ratio of two standard deviations, paired, and its 95 % interval (Pitman, Morgan); without end over equal values."""
    if not variance(less):
        return (math.inf,) * 3
    n, found = len(more), variance(more) / variance(less)
    k = 1 + 2 * T18**2 * (1 - correlation(more, less) ** 2) / (n - 2)
    return tuple((found * each) ** 0.5 for each in (1, k - (k * k - 1) ** 0.5, k + (k * k - 1) ** 0.5))


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2, 8), full=(STEPS, 64))
    if not found:
        return
    right = {way: [each[way] for each in found] for way in WAYS}
    print("right answers, mean (standard deviation) over seeds:")
    for way, values in right.items():
        print(f"  {way:9} {tiny.spread(values)}")
    _, control, _ = ratio(right["full"], right["more data"])
    for way in ("more data", "frozen", "rate 0.9"):
        middle, low, high = ratio(right["full"], right[way])
        said = "not resolved" if control <= 1 or low <= 1 <= high else "seen" if low > 1 else "not seen"
        print(f"spread of full / {way}: {middle:.2f}, 95 % interval {low:.2f} to {high:.2f}: {said}")
    scale = mean(right["more data"]) - mean(right["full"])
    for way in ("frozen", "rate 0.9"):
        apart = [one - other for one, other in zip(right[way], right["full"], strict=True)]
        half = T19 * stdev(apart) / len(apart) ** 0.5
        low, high = mean(apart) - half, mean(apart) + half
        null = high < 0 or (low <= 0 and high - low < scale / 20)
        said = "seen" if low > 0 else "not seen" if null else "not resolved"
        print(
            f"{way} - full: {mean(apart):+.3f}, 95 % interval {low:+.3f} to {high:+.3f} (control {scale:+.3f}): {said}"
        )


if __name__ == "__main__":
    main()
