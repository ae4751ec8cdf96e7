"""LEVI's claim on the small model: an ensemble of the base's layers with a small model trained from scratch leans less than a LoRA
on what only happens to go with the label, in the fine-tuning data or in the pretraining (Roh et al., 2024).

The task: does the last word of a sentence mean 0 to 3 or 4 to 7? The answer is a word of language b, `b00` or `b40`. That is A, the cause.
Before the sentence stand two tags. B is `low` or `high`: the base is first trained on for a little, on sentences where B tells the answer
in 95 of 100 cases and the last word tells nothing. C is `forward` or `backward`: it goes with the answer in the fine-tuning data
alone, always or (a condition of its own) in all but 5 of 1000 rows; B does there in 9 of 10 rows, A always. In the test in
distribution (ID) A and C always agree with the answer and B in 9 of 10 rows; out of distribution (OOD) B and C are drawn by chance.
Measured is the share of right answers.

For each seed (data, start, order) and condition, the same rows, steps and batches: a head over the frozen last layer (`levi` with that
layer and without its small model), a LoRA of rank 8, LEVI (3 layers of 4, a small model of width 64 that sees the whole sentence) and
LEVI without the small model. The positive control is a LoRA on rows where B and C are drawn by chance: what can be learned of A.

The analysis was fixed before any of the seeds was run: in each condition LEVI - LoRA, OOD, paired by seed, its mean and the 95 %
interval of Student's t. The claim is *seen* if the interval lies above 0, *not seen* if below or if it is narrower than a twentieth
of what the control has over the LoRA, OOD, and holds 0, else *not resolved*. By the same rule LEVI - LEVI without its small model,
OOD. The claim is one at equal ID, so that difference is told too.

    python examples/papers/levi.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny
import torch

import adapterhub

SEEDS, WORDS = (1, 2, 3, 4, 5), 5
PLANT = 400
"""Steps of the training that plants B."""
ALONE = {"g": False, "layers": [3]}
WAYS = {
    "head": ("levi", ALONE, 1e-2),
    "lora": ("lora", {"r": 8}, 5e-3),
    "levi": ("levi", {}, 1e-2),
    "without": ("levi", {"g": False}, 1e-2),
}
"""Name: method, options, learning rate."""
CONDITIONS = {"always": 0, "nearly": 200}
"""Every how many rows C misleads in the fine-tuning data; 0: never."""
LABELS = [" b00", " b40"]


def row(draw: random.Random, a: float, b: float, c: float) -> tuple[str, str]:
    """A sentence and its answer, with which the last word, B and C agree with these probabilities."""
    high = draw.random() < 0.5
    tags = [pair[high == (draw.random() < p)] for pair, p in ((("low", "high"), b), (("forward", "backward"), c))]
    last = high == (draw.random() < a)
    while True:
        words = bed.sentence(draw, "a", "any", WORDS).split()[1:]
        if (int(words[-1][1]) >= bed.MEANINGS // 2) == last:
            return f"{' '.join([*tags, *words])} is", LABELS[high]


def rows(name: str, seed: int, count: int) -> str:
    """Of a condition, or "id"; "free" and "ood": B and C by chance."""
    draw, made = random.Random(f"{name} {seed}"), []
    every = CONDITIONS.get(name, 0)
    for n in range(count):
        misleads = every and n % every == 0
        agree = (1, 0.5, 0.5) if name in ("free", "ood") else (1, 0.9, 0 if misleads else 1)
        prompt, answer = row(draw, *agree)
        made.append(json.dumps({"prompt": prompt, "completion": answer}))
    return "\n".join(made)


def planted(base: Path, folder: Path, steps: int) -> Path:
    """The base trained on so that it expects the answer that B names, in `folder`; as it stands there, or made now."""
    from transformers import AutoModelForCausalLM

    if folder.is_dir():
        return folder
    words, model = bed.tokenizer(), AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    draw = random.Random(0)
    for _ in range(steps):
        tasks = ["".join(row(draw, 0.5, 0.95, 0.5)) for _ in range(bed.ROWS // 2)]
        texts = [*tasks, *(bed.corpus(draw) for _ in range(bed.ROWS // 2))]
        batch = words([f"{text} </s>" for text in texts], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        model(input_ids=ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def measure(base: Path, folder: Path, seed: int, plant: int, steps: int, count: int) -> dict[str, dict[str, float]]:
    """The share of right answers, "id" and "ood", of each way in each condition ("always levi"), the control and the base."""
    base = planted(base, folder / "planted", plant)
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    files = {name: folder / f"{name}{seed}.jsonl" for name in (*CONDITIONS, "free", "id", "ood")}
    for name, path in files.items():
        path.write_text(rows(name, seed, count))

    def train(name: str, data: str, way: str) -> None:
        method, options, lr = WAYS[way]
        given = {"options": options, "lr": lr, "seed": seed, "batch_size": 16, "steps": steps}
        hub.train(str(base), method, files[data], name, **given)

    names: dict[str, str | None] = {}
    for condition in CONDITIONS:
        for way in WAYS:
            names[f"{condition} {way}"] = name = f"{condition}-{way}"
            train(name, condition, way)
    train("control", "free", "lora")
    names |= {"control": "control", "base": None}
    found = {}
    for test in ("id", "ood"):
        found[test] = {
            name: hub.evaluate(adapter, str(base), files[test], metrics=["label"], labels=LABELS)["label"]
            for name, adapter in names.items()
        }
        print(f"seed {seed}, {test}: {tiny.shown(found[test])}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(3, 2, 40), full=(PLANT, 200, 1000))
    if not found:
        return
    for test in ("id", "ood"):
        print(f"right answers, {test}, mean (standard deviation) over seeds:")
        for name in found[0][test]:
            print(f"  {name:15} {tiny.spread([each[test][name] for each in found])}")

    def more(test: str, one: str, other: str) -> list[float]:
        return [each[test][one] - each[test][other] for each in found]

    for condition in CONDITIONS:
        levi, lora, without = (f"{condition} {way}" for way in ("levi", "lora", "without"))
        scale = sum(more("ood", "control", lora)) / len(found)
        for test, other in (("ood", lora), ("ood", without), ("id", lora)):
            print(tiny.verdict(f"{test}, {levi} - {other}", more(test, levi, other), scale))


if __name__ == "__main__":
    main()
