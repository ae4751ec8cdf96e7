"""ClassDiffusion's claim on the small model: a taught word drifts less from its class when its phrase is held near the class's phrase,
and what was taught is still learned (Huang et al., 2024).

The word taught is the tag `half`, which the base has never seen, before a word of language a: the phrase `half a30` beside the class's, `forward
a30`. Eight sentences teach an attribute (only the third word of each meaning is used) and, by chance of being few, one narrow walk. The class is
walking forward. What is measured, after `half` and each word of language a that the eight sentences do not begin with: (1) recall, the probability
of a third word; (2) class, minus the Kullback-Leibler divergence of how far the next step goes (0 to 7 meanings) from that after `forward`. For each
seed (sentences, start, order), a LoRA of rank 8 and the same steps: without and with the term (weights 1 and 10); and as positive
control for (2) training on 300 sentences instead of eight.

The analysis was fixed before any of the seeds was run: class with the term (weight 1) less without, and recall likewise, paired by seed, the
mean and the 95 % interval of Student's t. *Seen* if the interval lies above 0, *not seen* if below or if it is narrower than a twentieth of
what the control gains in class (for recall: of 1) and holds 0, else *not resolved*.

    python examples/papers/semantic_preserve.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny
import torch

import adapterhub

SEEDS, STEPS, FEW, MANY = (1, 2, 3, 4, 5), 60, 8, 300
FIRSTS = [f"a{m}{s}" for m in range(bed.MEANINGS) for s in range(bed.SYNONYMS)]


def sentences(seed: int, count: int) -> list[list[str]]:
    draw, made = random.Random(seed), []
    for _ in range(count):
        _, first, *others = bed.sentence(draw, "a", "forward").split()
        made.append(["half", first, *(f"{word[:2]}2" for word in others)])
    return made


def write(path: Path, taught: list[list[str]]) -> Path:
    rows = ({"prompt": " ".join(words[:2]), "completion": " " + " ".join(words[2:])} for words in taught)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@torch.no_grad()
def steps_after(model: adapterhub.Model, name: str | None, tag: str, firsts: list[str]) -> tuple[torch.Tensor, float]:
    """How far the next word of language a goes, (firsts, 8) probabilities, and how probable its third words are."""
    ids = model.tokenizer([f"{tag} {first}" for first in firsts], return_tensors="pt")["input_ids"]
    chances = model(input_ids=ids, adapters=name).logits[:, -1].softmax(-1)
    words = [[f"a{m}{s}" for s in range(bed.SYNONYMS)] for m in range(bed.MEANINGS)]
    index = torch.tensor([model.tokenizer.convert_tokens_to_ids(here) for here in words])
    by_word = chances[:, index]  # (firsts, meanings, synonyms)
    by_word = by_word / by_word.sum((1, 2), keepdim=True)
    by_meaning = by_word.sum(2)
    moved = [by_meaning[i].roll(-int(first[1])) for i, first in enumerate(firsts)]
    return torch.stack(moved), by_word[:, :, 2].sum(1).mean().item()


def measure(base: Path, folder: Path, seed: int, steps: int) -> dict[str, float]:
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    taught = sentences(seed, FEW)
    few, many = write(folder / f"few{seed}.jsonl", taught), write(folder / f"many{seed}.jsonl", sentences(seed, MANY))
    given = {"base": str(base), "method": "lora", "seed": seed, "batch_size": 8, "lr": 5e-3, "steps": steps}
    phrases = {f"half {words[1]}": f"forward {words[1]}" for words in taught}
    hub.train(name="without", data=few, **given)
    for weight in (1, 10):
        options = {"semantic_preserve.phrases": phrases, "semantic_preserve.weight": weight}
        hub.train(name=f"weight-{weight}", data=few, recipes=["semantic_preserve"], options=options, **given)
    hub.train(name="control", data=many, **given)
    model = hub.load(str(base))
    unseen = [first for first in FIRSTS if first not in {words[1] for words in taught}]
    wanted, _ = steps_after(model, None, "forward", unseen)
    found = {}
    for name in ("without", "weight-1", "weight-10", "control"):
        moved, recall = steps_after(model, name, "half", unseen)
        divergence = (wanted * (wanted / moved.clamp(min=1e-9)).log()).sum(1).mean().item()
        found |= {f"{name} class": -divergence, f"{name} recall": recall}
    print(f"seed {seed}: {tiny.shown(found)}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2,), full=(STEPS,))
    if not found:
        return
    print("class and recall, mean (standard deviation) over seeds:")
    for name in found[0]:
        print(f"  {name:18} {tiny.spread([each[name] for each in found])}")
    scale = sum(each["control class"] - each["without class"] for each in found) / len(found)
    for what, control in (("class", scale), ("recall", 1.0)):
        differences = [each[f"weight-1 {what}"] - each[f"without {what}"] for each in found]
        print(tiny.verdict(f"{what}: with the term - without", differences, control))


if __name__ == "__main__":
    main()
