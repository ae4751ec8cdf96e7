"""HFT's claim on the small model: training half of the weights forgets less than training all, and learns as much (Hui et al., 2025).

Two narrow tasks, one after the other, each a question after a sentence of language a, answered by `low` or `high`: A, is the first
word's meaning below 4 (`half low`); B, is the last word's (`is low`). Measured are losses in nats for each token, of held-out
answers of A and of B and of held-out sentences of the pretraining corpus. Forgetting of A: its loss after B, less that after A. Forgetting
of the corpus: its loss after B, less the base's. For each seed (data, order, halves): full fine-tuning; HFT (by category, embedding and head
train, another half for B); a LoRA of rank 8; full fine-tuning at half the rate, since smaller steps forget less, too; and as positive control full
fine-tuning on B with as many rows of A and the corpus among them (replay), for twice the steps.

The analysis was fixed before any of the seeds was run: two claims, full - HFT in the forgetting of A and of the corpus, and a harder one, half
rate - HFT in that of the corpus; paired by seed, each mean with the 95 % interval of Student's t. A claim is *seen* if its interval
lies above 0, *not seen* if below or if it is narrower than a twentieth of the control's full - replay and holds 0, else *not resolved*. "At about
equal loss on B" is told as HFT - full in that loss; more than a twentieth of the loss of guessing (ln 2 on one token of two: 0.347) is called
unequal. Processor milliseconds a step are told and not tested.

    python examples/papers/hft.py [--quick]
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import bed
import tiny

import adapterhub

SEEDS, STEPS = (1, 2, 3, 4, 5), 200
WEIGHTS = ["query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down", "embedding", "head"]
FULL = {"method": "full", "options": {"target_modules": WEIGHTS, "norms": True}}
WAYS = {
    "full": FULL,
    "hft": FULL | {"schedule": "hft"},
    "lora": {"method": "lora", "options": {"r": 8}, "lr": 2e-3},
    "half rate": FULL | {"lr": 5e-4},
    "replay": FULL,
}


def task(which: str, draw: random.Random, count: int) -> list[dict[str, str]]:
    made = []
    for _ in range(count):
        text = bed.sentence(draw, "a", draw.choice(bed.TAGS[:3]), 5)
        words = text.split()
        meaning = int((words[1] if which == "A" else words[-1])[1])
        answer = "low" if meaning < bed.MEANINGS // 2 else "high"
        made.append({"prompt": f"{text} {'half' if which == 'A' else 'is'}", "completion": f" {answer}"})
    return made


def old(draw: random.Random, count: int) -> list[dict[str, str]]:
    """Sentences of the corpus; the tag is given."""
    texts = [bed.corpus(draw).partition(" ") for _ in range(count)]
    return [{"prompt": tag, "completion": f" {words}"} for tag, _, words in texts]


def measure(base: Path, folder: Path, seed: int, steps: int, rows: int) -> dict[str, dict[str, float]]:
    """{way: its loss and right answers on B, what it forgot, milliseconds a step}."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    train, test = random.Random(f"train {seed}"), random.Random(f"test {seed}")
    made = {"A": task("A", train, rows), "B": task("B", train, rows)}
    made["replay"] = [*made["B"], *made["A"][: rows // 2], *old(train, rows // 2)]
    made |= {
        "test A": task("A", test, rows // 2),
        "test B": task("B", test, rows // 2),
        "test old": old(test, rows // 2),
    }
    files = {name: folder / f"{name}{seed}.jsonl" for name in made}
    for name, lines in made.items():
        files[name].write_text("\n".join(map(json.dumps, lines)))

    def tried(expression: str | None, on: str, metric: str = "loss") -> float:
        return hub.evaluate(expression, str(base), files[f"test {on}"], metrics=[metric])[metric]

    begun, found = tried(None, "old"), {}
    for way, settings in WAYS.items():
        name = way.replace(" ", "-")
        given = {"base": str(base), "name": name, "batch_size": 16, "lr": 1e-3, "steps": steps} | settings
        hub.train(data=files["A"], seed=seed, **given)
        between, began = tried(name, "A"), time.process_time()
        del given["method"], given["options"]
        if way == "replay":
            given["steps"] *= 2
        data = files["replay" if way == "replay" else "B"]
        hub.train(data=data, continue_from=name, seed=seed + 1000, **given)
        spent = time.process_time() - began
        found[way] = {
            "B": tried(name, "B"),
            "right": tried(name, "B", "label"),
            "forgot A": tried(name, "A") - between,
            "forgot corpus": tried(name, "old") - begun,
            "ms": 1000 * spent / given["steps"],
        }
        print(f"seed {seed}, {way:9}: {tiny.shown(found[way])}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2, 40), full=(STEPS, 1000))
    if not found:
        return
    print("mean (standard deviation) over seeds:")
    for way in WAYS:
        told = (f"{key} {tiny.spread([each[way][key] for each in found])}" for key in found[0][way])
        print(f"  {way:9} {', '.join(told)}")

    def less(more: str, key: str, way: str = "hft") -> list[float]:
        return [each[more][key] - each[way][key] for each in found]

    print(tiny.verdict("loss on B, hft - full", less("hft", "B", "full"), 0.347))
    for more, key in (("full", "forgot A"), ("full", "forgot corpus"), ("half rate", "forgot corpus")):
        scale = sum(less("full", key, "replay")) / len(found)
        print(tiny.verdict(f"{key}, {more} - hft", less(more, key), scale))


if __name__ == "__main__":
    main()
