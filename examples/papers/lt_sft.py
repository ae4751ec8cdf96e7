"""LT-SFT's claims on the small model: a task learned in one language works in another when the sparse change of that language is added,
and the places that moved most do better than random ones (Ansell et al., 2022).

The task: does the last word of a sentence mean 0 to 3 or 4 to 7? The answer is a word of language b, `b00` or `b40`. It is learned in language a; what is measured is
the share of right answers in language d, of which the base has seen little and the task adapter nothing. The language's
adapter is trained on raw sentences of d. For each seed (data, order, random places), both adapters by LT-SFT and both with as many random
places, the same steps of the training proper: task alone, and task + language. The positive control is the task learned in d itself, over
the language's adapter.

The analysis was fixed before any of the seeds was run: two differences, (1) task + language less task alone, both LT-SFT, (2) LT-SFT
less random places, both task + language; paired by seed, each mean with the 95 % interval of Student's t. A claim is
*seen* if its interval lies above 0, *not seen* if below or if it is narrower than a twentieth of what the control gains over task alone
and holds 0, else *not resolved*.

    python examples/papers/lt_sft.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny

import adapterhub

SEEDS, DENSITY = (1, 2, 3, 4, 5), 0.05
OPTIONS = {
    "density": DENSITY,
    "target_modules": ["embedding", "query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down"],
}


def task(language: str, seed: int, count: int) -> str:
    draw, made = random.Random(f"{language} {seed}"), []
    for _ in range(count):
        text = bed.sentence(draw, language, draw.choice(bed.TAGS[:3]), 5)
        answer = "b00" if int(text.split()[-1][1]) < bed.MEANINGS // 2 else "b40"
        made.append(json.dumps({"prompt": f"{text} is", "completion": f" {answer}"}))
    return "\n".join(made)


def raw(language: str, seed: int, count: int) -> str:
    draw = random.Random(f"{language} {seed}")
    tags = [draw.choice(bed.TAGS[:3]) for _ in range(count)]
    return "\n".join(json.dumps({"text": bed.sentence(draw, language, tag)}) for tag in tags)


def measure(base: Path, folder: Path, seed: int, steps: int, rows: int) -> dict[str, float]:
    """The share of right answers in language d, each way."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    files = {name: folder / f"{name}{seed}.jsonl" for name in ("language", "task", "there", "test")}
    files["language"].write_text(raw("d", seed, rows))
    files["task"].write_text(task("a", seed, rows))
    files["there"].write_text(task("d", seed, rows))
    files["test"].write_text(task("d", seed + 1000, rows))

    def train(name: str, data: str, mask: str, **settings) -> None:
        options = OPTIONS | {"mask": mask}
        given = {"seed": seed, "batch_size": 16, "lr": 3e-3, "steps": steps * (2 if mask == "largest" else 1)}
        hub.train(str(base), "lt_sft", files[data], name, options=options, **given | settings)

    for mask in ("largest", "random"):
        # One seed draws one set of places: two random adapters of one seed would share them all, and overlap wholly.
        train(f"{mask}-language", "language", mask, **({"seed": seed + 1000} if mask == "random" else {}))
        train(f"{mask}-task", "task", mask)
    train("control", "there", "largest", on=["largest-language"])
    ways = {
        "task": "largest-task",
        "both": "largest-task + largest-language",
        "random task": "random-task",
        "random both": "random-task + random-language",
        "control": "control + largest-language",
    }
    right = {}
    for way, expression in ways.items():
        right[way] = hub.evaluate(expression, str(base), files["test"], labels=[" b00", " b40"])["label"]
    print(f"seed {seed}: {tiny.shown(right)}", flush=True)
    return right


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2, 40), full=(200, 1000))
    if not found:
        return
    print("right answers in the other language, mean (standard deviation) over seeds:")
    for way in found[0]:
        print(f"  {way:12} {tiny.spread([each[way] for each in found])}")
    scale = sum(each["control"] - each["task"] for each in found) / len(found)
    for more, less in (("both", "task"), ("both", "random both")):
        print(tiny.verdict(f"{more} - {less}", [each[more] - each[less] for each in found], scale))


if __name__ == "__main__":
    main()
