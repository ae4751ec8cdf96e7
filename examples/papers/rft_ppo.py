"""Reinforced fine-tuning's claim on the small model: after a warm-up, PPO on the same prompts against a verifier does more than
going on with plain fine-tuning (Luong et al., 2024).

The task: `a31 low half high is` is a word and three moves through the meanings (low +1, high +3, half -1); the answer says the
meaning after each move, in any word of the languages a to c, and then the last one once more, as `c60`. The verifier reads the last word alone. 100
prompts, each with one answer in words drawn at random. For each seed (prompts, order, answers): a LoRA of rank 8 is warmed up on them, and
from it, with a fresh LoRA over it and the same prompts in all: (a) more fine-tuning; (b) online self-training, which samples an answer to each prompt,
and learns from the right ones and from the data's own, half each; (c) PPO. Equal compute, counted in passes of a batch, a forward pass 1 and
a backward one 2: a step of (a) is 3, of (b) 6.5 (half of a sampling, two passes both ways), of (c) 4.5 (half of a sampling and of two passes
forward, one both ways). And (d): PPO, as in (c), from a warm-up of 10 steps, which is right
next to never. (First it was to start from the bare base. That ends every answer at once, so nothing is ever rewarded, no gradient arises
and the adapter is refused as one without effect: the first attempt stopped there, in its first seed, before any figure was printed.)

What is measured is the share of right answers to 300 fresh prompts, decoded greedily. The positive control is the same fine-tuning as (a) on ten times
as many prompts with their answers, less the warm-up.

The analysis was fixed before any figure of the seeds was seen: the differences (c) - (a), (c) - (b) and (d) - its warm-up, paired by seed, their means and the
95 % intervals of Student's t. The first two claims are *seen* if the interval lies above 0, *not seen* if below or if it is narrower than a
twentieth of what the control gains and holds 0, else *not resolved*; the third is expected not to be seen.

    python examples/papers/rft_ppo.py [--quick]
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import bed
import tiny
from adapterhub_answer_match import AnswerMatch

import adapterhub

SEEDS, PROMPTS, MOVES = (1, 2, 3, 4, 5), 100, {"low": 1, "high": 3, "half": -1}
TARGETS = ("query", "key", "value", "attention_output", "ffn_up", "ffn_gate", "ffn_down", "head")
"""The head too: the base has never told a meaning's four words apart, and the last word must be one of them."""
COST = {"more": 3.0, "self-training": 6.5, "ppo": 4.5}
"""Of a step, in forward passes of the batch."""


def rows(seed: int, count: int) -> list[dict[str, str]]:
    draw, made = random.Random(seed), []
    for _ in range(count):
        meaning, moves, words = draw.randrange(bed.MEANINGS), draw.choices(list(MOVES), k=3), []
        prompt = " ".join([bed.word("a", meaning, draw), *moves, "is"])
        for move in moves:
            meaning = (meaning + MOVES[move]) % bed.MEANINGS
            words.append(bed.word(draw.choice("abc"), meaning, draw))
        made.append({"prompt": prompt, "completion": " " + " ".join([*words, f"c{meaning}0"])})
    return made


def right(model: adapterhub.Model, name: str | None, test: Sequence[dict[str, str]]) -> float:
    """The share of right answers."""
    judge = AnswerMatch(AnswerMatch.Config())
    answers = model.complete([row["prompt"] for row in test], adapters=name, max_new_tokens=8)
    verdicts = [
        judge.verify(row["prompt"], row["completion"], answer) for row, answer in zip(test, answers, strict=True)
    ]
    return sum(verdict.reward == 1 for verdict in verdicts) / len(test)


def measure(base: Path, folder: Path, seed: int, warmup: int, steps: int) -> dict[str, float]:
    """The share of right answers, each way. steps: of PPO."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    few, many = folder / f"few{seed}.jsonl", folder / f"many{seed}.jsonl"
    for path, count in ((few, PROMPTS), (many, 10 * PROMPTS)):
        path.write_text("\n".join(map(json.dumps, rows(seed, count))))
    test = rows(seed + 1000, 300)

    def train(name: str, data: Path, way: str = "more", **settings) -> None:
        options = {"r": 8, "target_modules": TARGETS}
        if way != "more":
            options |= {"rft_ppo.max_new_tokens": 6, "rft_ppo.update": way.replace("-", "_")}
            settings["objective"] = "rft_ppo"
        given = {"seed": seed, "batch_size": 64, "lr": 5e-3, "steps": round(steps * COST["ppo"] / COST[way])}
        hub.train(str(base), "lora", data, name, options=options, **given | settings)

    train("warm", few, steps=warmup, batch_size=32)
    for way in COST:
        train(way, few, way, on=["warm"])
    train("cold", few, steps=max(1, warmup // 20), batch_size=32)
    train("cold-ppo", few, "ppo", on=["cold"])
    train("control", many, on=["warm"])
    model = hub.load(str(base))
    ways = {
        "base": None,
        "cold": "cold",
        "cold ppo": "cold + cold-ppo",
        "warm-up": "warm",
        **{way: f"warm + {way}" for way in (*COST, "control")},
    }
    found = {way: right(model, name, test) for way, name in ways.items()}
    print(f"seed {seed}: {tiny.shown(found)}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(4, 4), full=(200, 180))
    if not found:
        return
    print("right answers to fresh prompts, mean (standard deviation) over seeds:")
    for way in found[0]:
        print(f"  {way:14} {tiny.spread([each[way] for each in found])}")
    scale = sum(each["control"] - each["warm-up"] for each in found) / len(found)
    for more, less in (("ppo", "more"), ("ppo", "self-training"), ("cold ppo", "cold")):
        print(tiny.verdict(f"{more} - {less}", [each[more] - each[less] for each in found], scale))


if __name__ == "__main__":
    main()
