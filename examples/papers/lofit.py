"""LoFiT's claim on the small model: offsets at heads that training selects do better than at random heads (Yin et al., 2024).

The task: after the tag `any`, after which the corpus goes forward in four of five sentences, always go backward: the rare answer,
which the model knows how to give. What is measured is the probability of a step back after `any` and one word. For each seed (data, start, order, random heads): LoFiT
at K of 32 heads; the same number of steps with offsets at K random heads; a LoRA of rank 8 as positive control; and the base.

The analysis was fixed before any of the seeds was run: the difference LoFiT - random, paired by seed, its mean and the 95 % interval of
Student's t. The claim is *seen* if the interval lies above 0, *not seen* if below or if it is narrower than a twentieth of what the
control gains and holds 0, else *not resolved*.

    python examples/papers/lofit.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny
import torch

import adapterhub

SEEDS, K = (1, 2, 3, 4, 5), 3
HEADS = [f"{layer}.{head}" for layer in range(4) for head in range(8)]


def rows(seed: int, count: int) -> str:
    draw, made = random.Random(seed), []
    for _ in range(count):
        _, first, *others = bed.sentence(draw, "a", "backward").split()
        made.append(json.dumps({"prompt": f"any {first}", "completion": f" {' '.join(others)}"}))
    return "\n".join(made)


@torch.no_grad()
def backward(model: adapterhub.Model, name: str | None) -> float:
    """The probability, after `any` and a word, of a word one, two or three meanings back; the mean over all first words."""
    firsts = [(m, s) for m in range(bed.MEANINGS) for s in range(bed.SYNONYMS)]
    ids = model.tokenizer([f"any a{m}{s}" for m, s in firsts], return_tensors="pt")["input_ids"]
    chances = model(input_ids=ids, adapters=name).logits[:, -1].softmax(-1)
    total = 0.0
    for row, (meaning, _) in enumerate(firsts):
        right = [f"a{(meaning - back) % bed.MEANINGS}{s}" for back in (1, 2, 3) for s in range(bed.SYNONYMS)]
        total += chances[row, model.tokenizer.convert_tokens_to_ids(right)].sum().item()
    return total / len(firsts)


def measure(base: Path, folder: Path, seed: int, steps: int) -> dict[str, float]:
    """How probable each way makes a first step back."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    train = folder / f"train{seed}.jsonl"
    train.write_text(rows(seed, 300))
    given = {"base": str(base), "data": train, "seed": seed, "batch_size": 16, "lr": 2e-2}
    heads = random.Random(seed).sample(HEADS, K)
    made = {
        "lofit": hub.train(method="lofit", name="lofit", options={"k": K}, steps=2 * steps, **given),
        "random": hub.train(method="lofit", name="random", options={"heads": heads}, steps=steps, **given),
        "lora": hub.train(method="lora", name="lora", options={"r": 8}, steps=steps, **given | {"lr": 5e-3}),
    }
    model = hub.load(str(base))
    found = {name: backward(model, name) for name in (*made, None)}
    found["base"] = found.pop(None)
    chosen = made["lofit"].manifest.recipe["found"]["offsets"]["heads"]
    print(f"seed {seed}: {tiny.shown(found)}; selected {' '.join(chosen)}, random {' '.join(heads)}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2,), full=(120,))
    if not found:
        return
    print("probability of a step back, mean (standard deviation) over seeds:")
    for name in found[0]:
        print(f"  {name:8} {tiny.spread([each[name] for each in found])}")
    scale = sum(each["lora"] - each["base"] for each in found) / len(found)
    print(tiny.verdict("lofit - random", [each["lofit"] - each["random"] for each in found], scale))


if __name__ == "__main__":
    main()
