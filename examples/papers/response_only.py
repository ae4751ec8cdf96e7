"""Response tuning's claim on the small model: trained on answers alone, without what they answer, the model follows instructions
in the trained format (Hewitt et al., "Instruction Following without Instruction Tuning", 2024).

The base knows two instructions from its corpus: after `forward` or `backward` and a word the walk goes that way, in any words. The
answers to learn are such walks in a format of their own: after a word of language a they go on in language b. What is measured is how probable it is
that the first word after an instruction and a word of language a both goes the right way and has the format, over both instructions and all
first words. For each seed (data, start, order), a LoRA of rank 8 and the same steps: instruction and answer (positive control); answer alone
(`response_only`); answers alone whose walks all go forward (one domain: what a model learns that needs no instruction at all).

The analysis was fixed before any of the seeds was run: response_only less the base, and response_only less the one-way answers, paired by
seed, the mean and the 95 % interval of Student's t. *Seen* if the interval lies above 0, *not seen* if below or if it is narrower than a
twentieth of what the control gains over the base and holds 0, else *not resolved*.

    python examples/papers/response_only.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny
import torch

import adapterhub

SEEDS, STEPS, ROWS = (1, 2, 3, 4, 5), 120, 300
WAYS = {"forward": (1, 2, 3), "backward": (-1, -2, -3)}


def rows(path: Path, seed: int, ways: tuple[str, ...]) -> Path:
    draw, made = random.Random(seed), []
    for _ in range(ROWS):
        way = draw.choice(ways)
        _, first, *others = bed.sentence(draw, "a", way).split()
        answer = " ".join(f"b{word[1:]}" for word in others)
        made.append(json.dumps({"prompt": f"{way} {first}", "completion": f" {answer}"}))
    path.write_text("\n".join(made))
    return path


@torch.no_grad()
def followed(model: adapterhub.Model, name: str | None) -> float:
    """The probability of a next word that goes the right way in the format; the mean over instructions and first words."""
    total, count = 0.0, 0
    for way, steps in WAYS.items():
        firsts = [(m, s) for m in range(bed.MEANINGS) for s in range(bed.SYNONYMS)]
        ids = model.tokenizer([f"{way} a{m}{s}" for m, s in firsts], return_tensors="pt")["input_ids"]
        chances = model(input_ids=ids, adapters=name).logits[:, -1].softmax(-1)
        for row, (meaning, _) in enumerate(firsts):
            right = [f"b{(meaning + step) % bed.MEANINGS}{s}" for step in steps for s in range(bed.SYNONYMS)]
            total += chances[row, model.tokenizer.convert_tokens_to_ids(right)].sum().item()
            count += 1
    return total / count


def measure(base: Path, folder: Path, seed: int, steps: int) -> dict[str, float]:
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    both = rows(folder / f"both{seed}.jsonl", seed, ("forward", "backward"))
    one = rows(folder / f"one{seed}.jsonl", seed, ("forward",))
    given = {"base": str(base), "method": "lora", "seed": seed, "batch_size": 16, "lr": 5e-3, "steps": steps}
    hub.train(name="instructed", data=both, **given)
    hub.train(name="response-only", data=both, recipes=["response_only"], **given)
    hub.train(name="one-way", data=one, recipes=["response_only"], **given)
    model = hub.load(str(base))
    found = {name: followed(model, name) for name in ("instructed", "response-only", "one-way", None)}
    found["base"] = found.pop(None)
    print(f"seed {seed}: {tiny.shown(found)}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2,), full=(STEPS,))
    if not found:
        return
    print("probability of a step the right way in the format, mean (standard deviation) over seeds:")
    for name in found[0]:
        print(f"  {name:14} {tiny.spread([each[name] for each in found])}")
    scale = sum(each["instructed"] - each["base"] for each in found) / len(found)
    for less in ("base", "one-way"):
        print(tiny.verdict(f"response-only - {less}", [e["response-only"] - e[less] for e in found], scale))


if __name__ == "__main__":
    main()
