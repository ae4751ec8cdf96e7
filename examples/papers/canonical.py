"""The claims about canonical examples on the small model and one four times as large (Hewitt et al., 2024).

The task: after a sentence that begins with `is`, a token that the corpus never has, go on in language c. The edit sees eight examples, each a single word of language a or b
and one that may follow it, said in c; it is asked after five words. What is measured is the share of such questions at which language c has at least half of the probability,
with the edit at the largest weight of 1.0, 0.9, ... 0.1 at which the loss on general text grows by at most a hundredth (`within`, on sentences that are neither trained on nor
reported; 0 if there is none). Edits are LoRAs of rank 8 on the feed-forward matrices. For each seed (examples, questions, start, order): on the small model with the
divergence on general text in the loss and without it; the first of them carried to the large model, which is not trained; an edit of the large model itself, with the
divergence. The positive control is the large model trained on questions of the longer kind, whatever it does to general text.

The analysis was fixed before any of the seeds was run: three differences, (1) carried to the large model less the large model alone, (2) carried less
the edit of the large model itself, (3) on the small model with the divergence less without; paired by seed, each mean with the 95 %
interval of Student's t. A claim is *seen* if its interval lies above 0, *not seen* if below or if it is narrower than a twentieth of what
the control gains and holds 0, else *not resolved*.

    python examples/papers/canonical.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import bed
import tiny
import torch
from adapterhub_canonical import Carried, within

import adapterhub

SEEDS, EXAMPLES, QUESTIONS, BUDGET = (1, 2, 3, 4, 5), 8, 200, 1e-2
OPTIONS = {"r": 8, "target_modules": ["ffn_gate", "ffn_up", "ffn_down"], "canonical.budget": BUDGET}


def sentences(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return "\n".join(json.dumps({"text": bed.corpus(draw)}) for _ in range(count))


def examples(seed: int) -> list[dict[str, str]]:
    """Each a word of language a or b, and what may follow it, said in c."""
    draw, made = random.Random(seed), []
    for lang, meaning in draw.sample([(lang, m) for lang in "ab" for m in range(bed.MEANINGS)], EXAMPLES):
        first, second = bed.word(lang, meaning, draw), bed.word("c", (meaning + 1) % bed.MEANINGS, draw)
        made.append({"prompt": f"is {first}", "completion": f" {second}"})
    return made


def asked(seed: int) -> list[dict[str, str]]:
    """Longer ones, of five words."""
    draw, made = random.Random(seed), []
    for _ in range(QUESTIONS):
        *words, last = bed.sentence(draw, draw.choice("ab"), "is").split()[:6]
        following = bed.word("c", (int(last[1]) + 1) % bed.MEANINGS, draw)
        made.append({"prompt": " ".join((*words, last)), "completion": f" {following}"})
    return made


@torch.no_grad()
def right(model: adapterhub.Model | Carried, rows: list[dict[str, str]], adapters: str | None = None) -> float:
    """The share of rows after which language c has at least half of the probability."""
    words = bed.tokenizer()
    ids = words([row["prompt"] for row in rows], return_tensors="pt")["input_ids"]
    chances = model(input_ids=ids, attention_mask=torch.ones_like(ids), adapters=adapters).logits[:, -1].softmax(-1)
    those = [f"c{m}{s}" for m in range(bed.MEANINGS) for s in range(bed.SYNONYMS)]
    return (chances[:, words.convert_tokens_to_ids(those)].sum(1) >= 0.5).double().mean().item()


def measure(small: Path, large: Path, folder: Path, seed: int, steps: int, texts: int) -> dict[str, float]:
    """The share of right answers inside the budget, each way."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    questions = asked(seed + 1000)
    files = {name: folder / f"{name}{seed}.jsonl" for name in ("examples", "longer", "background", "search", "test")}
    files["examples"].write_text("\n".join(map(json.dumps, examples(seed))))
    files["longer"].write_text("\n".join(map(json.dumps, asked(seed + 2000))))
    for n, name in enumerate(("background", "search", "test")):
        files[name].write_text(sentences(10 * seed + n, texts))

    def train(base: Path, name: str, **settings) -> None:
        given = {
            "data": files["examples"],
            "steps": steps,
            "batch_size": 6,
            "lr": 5e-3,
            "seed": seed,
            "options": OPTIONS,
        }
        extras = {"background": files["background"]}
        hub.train(str(base), "lora", name=name, objective="canonical", extras=extras, **given | settings)

    train(small, "edit")
    train(small, "free", options=OPTIONS | {"canonical.weight": 0.0})
    train(large, "large-edit")
    train(large, "control", data=files["longer"], options=OPTIONS | {"canonical.weight": 0.0})
    little, big = hub.load(str(small)), hub.load(str(large))
    found, told = {}, {}
    for way, model, name in (
        ("small", little, "edit"), ("small, free", little, "free"), ("large", big, "large-edit")
    ):  # fmt: skip
        weight = within(model, files["search"], BUDGET, name)
        told[f"{way} at"] = weight
        found[way] = right(model, questions, f"{weight!r}*{name}")
        drift = [hub.evaluate(f"{w!r}*{name}", None, files["test"], model=model)["loss"] for w in (weight, 1.0, 0.0)]
        told[f"{way}'s drift"], told[f"{way}'s at 1.0"] = (1000 * (loss / drift[2] - 1) for loss in drift[:2])
        told[f"{way} right at 1.0"] = right(model, questions, name)
    weight = told["carried at"] = within(Carried(big, little, "edit"), files["search"], BUDGET)
    found["carried"] = right(Carried(big, little, "edit", weight), questions)
    told["carried right at 1.0"] = right(Carried(big, little, "edit"), questions)
    found |= {"large alone": right(big, questions), "control": right(big, questions, "control")}
    print(f"seed {seed}: {tiny.shown(found)}; drifts in thousandths; {tiny.shown(told)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of one seed on hardly trained models: that it runs"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    small, large = bed.base(20 if quick else bed.STEPS), bed.larger(5 if quick else bed.LARGER_STEPS)
    with TemporaryDirectory() as folder:
        if quick:
            measure(small, large, Path(folder), SEEDS[0], 2, 20)
            return
        found = [measure(small, large, Path(folder), seed, 100, 300) for seed in SEEDS]
    print("right answers inside the budget, mean (standard deviation) over seeds:")
    for way in found[0]:
        print(f"  {way:12} {tiny.spread([each[way] for each in found])}")
    scale = sum(each["control"] - each["large alone"] for each in found) / len(found)
    for more, less in (("carried", "large alone"), ("carried", "large"), ("small", "small, free")):
        print(tiny.verdict(f"{more} - {less}", [each[more] - each[less] for each in found], scale))


if __name__ == "__main__":
    main()
