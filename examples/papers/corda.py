"""CorDA's claims on the small model: components of the weights, taken with an eye to a context, are the ones to drop, to keep and to train
(Yang et al., 2024).

Old knowledge are sentences of the languages b and c. The new task is a rule that the corpus never follows: after `any`, in language a, the
meanings go on by 4 and by 1 in turn. Measured are the loss of held-out sentences of each; for each seed (data, start, order):

- *dropped*, without training: 56 of the 64 components of each weight (keys and values, which have 32, stay whole) are taken off, the smallest of
  CorDA's decomposition, calibrated on 300 old sentences, or of the plain one. Old loss.
- 40 steps of the task at rank 4: LoRA; CorDA ipm; CorDA kpm, calibrated on the old sentences; and, to see what the context
  adds, the plain decomposition's largest (PiSSA) and smallest. Each at its own rate; LoRA also at ipm's.

Rates (the one with the least task loss of 1, 2, 3, 5, 10, 15, 20, 30 thousandths), steps and the 56 were set on seed 100. The analysis was fixed before any
of the seeds 1 to 5 was run: four differences, paired by seed, each mean with the 95 % interval of Student's t. (1) dropped: plain less CorDA, old
loss; (2) LoRA less kpm, old loss, which counts as the claim only if kpm's mean task loss is at most 0.05 above LoRA's; (3) LoRA less ipm, task loss; (4) the
same at one rate, as in the paper. The controls are what there is to gain: what plain dropping and LoRA add to the base's old loss, and what LoRA takes off its
task loss. A claim is *seen* if its interval lies above 0, *not seen* if below or if it is narrower than a twentieth of the control and holds 0, else *not resolved*.

    python examples/papers/corda.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import tiny
import torch
from adapterhub_corda import CorDA

import adapterhub
from adapterhub import BuildContext, TrainingContext
from adapterhub.data import read
from adapterhub.data.batches import pad_token
from adapterhub.data.encoding import encode
from adapterhub.evaluation.evaluate import evaluate
from adapterhub.forms.low_rank import LowRank

SEEDS, RANK, DROPPED = (1, 2, 3, 4, 5), 4, 56
WHOLE = ("query", "attention_output", "ffn_gate", "ffn_up", "ffn_down")
PLAIN = 1e9
"""So much damping leaves nothing of the context."""
WAYS = {
    "lora": ("lora", {"lora_alpha": RANK}, 2e-2),
    "lora slow": ("lora", {"lora_alpha": RANK}, 5e-3),
    "ipm": ("corda", {"mode": "ipm"}, 5e-3),
    "kpm": ("corda", {"mode": "kpm"}, 2e-2),
    "plain largest": ("corda", {"mode": "ipm", "damp": PLAIN}, 1e-2),
    "plain smallest": ("corda", {"mode": "kpm", "damp": PLAIN}, 2e-2),
}


def old(seed: int, count: int) -> str:
    draw = random.Random(f"old {seed}")
    rows = [bed.sentence(draw, draw.choice("bc"), draw.choice(bed.TAGS[:3])) for _ in range(count)]
    return "\n".join(json.dumps({"text": row}) for row in rows)


def task(seed: int, count: int) -> str:
    draw, made = random.Random(f"task {seed}"), []
    for _ in range(count):
        first = draw.randrange(bed.MEANINGS)
        meanings = [(first + 5 * (n // 2) + 4 * (n % 2)) % bed.MEANINGS for n in range(bed.LENGTH)]
        words = [bed.word("a", meaning, draw) for meaning in meanings]
        made.append(json.dumps({"prompt": f"any {words[0]}", "completion": f" {' '.join(words[1:])}"}))
    return "\n".join(made)


def dropped(hub: adapterhub.Hub, base: Path, calibration: Path, test: Path, damp: float) -> float:
    """The loss without the smallest components of the weights."""
    model = hub.load(str(base))
    examples, _ = encode(read(calibration), model.tokenizer, 64)
    setting = TrainingContext(model, examples, pad_token(model.tokenizer), extras={"calibration": examples})
    (stage,) = CorDA().stages(CorDA.Config(r=DROPPED, mode="kpm", damp=damp, target_modules=WHOLE))
    with torch.no_grad():
        measured = stage.measurement.take(setting)
    parts = stage.build(BuildContext(model.sites, model.base, measured=measured))
    ends = {path: (part.down[:DROPPED], -part.up[:, DROPPED:]) for path, part in parts.items()}  # A0 and −B0
    model.attach_new({path: LowRank(down=a, up=b, scale=torch.tensor(1.0)) for path, (a, b) in ends.items()})
    return evaluate(None, None, None, test, model=model)["loss"]


def measure(base: Path, folder: Path, seed: int, steps: int, rows: int) -> tuple[dict[str, float], dict[str, float]]:
    """The losses of old sentences and of the task, each way."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    files = {name: folder / f"{name}{seed}.jsonl" for name in ("train", "calibration", "task", "old")}
    files["train"].write_text(task(seed, rows))
    files["calibration"].write_text(old(seed, rows))
    files["task"].write_text(task(seed + 1000, rows))
    files["old"].write_text(old(seed + 1000, rows))
    for way, (method, options, lr) in WAYS.items():
        extras = {"calibration": files["calibration"]} if options.get("mode") == "kpm" else None
        given = {"steps": steps, "lr": lr, "batch_size": 16, "seed": seed, "extras": extras}
        hub.train(str(base), method, files["train"], way.replace(" ", "-"), options={"r": RANK} | options, **given)
    names = {"base": None} | {way: way.replace(" ", "-") for way in WAYS}
    found = [
        {way: hub.evaluate(name, str(base), files[kind], metrics=["loss"])["loss"] for way, name in names.items()}
        for kind in ("old", "task")
    ]
    for way, damp in (("dropped", CorDA.Config().damp), ("plain dropped", PLAIN)):
        found[0][way] = dropped(hub, base, files["calibration"], files["old"], damp)
    for kind, losses in zip(("old", "task"), found, strict=True):
        print(f"seed {seed}: {kind}: {tiny.shown(losses)}", flush=True)
    return found[0], found[1]


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2, 20), full=(40, 300))
    if not found:
        return
    sides = {kind: [pair[n] for pair in found] for n, kind in enumerate(("old", "task"))}
    for kind, losses in sides.items():
        print(f"loss of {kind}, mean (standard deviation) over seeds:")
        for way in losses[0]:
            print(f"  {way:14} {tiny.spread([each[way] for each in losses])}")

    def verdict(kind: str, more: str, less: str, worse: str, better: str) -> None:
        scale = sum(each[worse] - each[better] for each in sides[kind]) / len(SEEDS)
        print(tiny.verdict(f"{kind}: {more} - {less}", [each[more] - each[less] for each in sides[kind]], scale))

    verdict("old", "plain dropped", "dropped", "plain dropped", "base")
    verdict("old", "lora", "kpm", "lora", "base")
    verdict("task", "lora", "ipm", "base", "lora")
    verdict("task", "lora slow", "ipm", "base", "lora slow")


if __name__ == "__main__":
    main()
