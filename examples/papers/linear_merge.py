"""Task arithmetic's claims on the small model: adding two changes does both tasks, and taking one off forgets (Ilharco et al., 2023).

Two tasks: after `any` and a word of language a always go backward (LoFiT's), and after `forward` and a word of language b go on in
language c; each is measured as the probability of a next word that is right, and both as their mean. Forgetting is of language b: a LoRA is trained on
raw sentences of b and taken off once (`-1*`); measured is the rise of the loss on sentences of b less that on sentences of a and c, nats a
token. For each seed (data, start, order, random changes): both LoRAs of rank 8 merged (`adapterhub merge`), with the weight for both, of 0.2, 0.4, ... 1.0,
that has the least loss on held-out rows of both tasks, as the paper chooses it; each alone; each merged likewise with a random change instead
of the other, at each site of the same size as that; and language b's taken off, against a random change of its sizes taken off. The positive
controls: one LoRA trained on both tasks' rows; one trained on b's words in random order beside sentences of a and c as they are.

The analysis was fixed before any of the seeds was run: three differences, (1) the merge less the better of the two alone, both tasks, (2) the
merge less the better of the two with a random change, both tasks, (3) the forgetting of b less that by the random change; paired by seed, each
mean with the 95 % interval of Student's t. A claim is *seen* if its interval lies above 0, *not seen* if below or if it is narrower than a
twentieth of what the control gains over the base and holds 0, else *not resolved*.

    python examples/papers/linear_merge.py [--quick]
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import bed
import lofit
import tiny
import torch

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.publish import publish_tensors
from adapterhub.forms.low_rank import LowRank

SEEDS = (1, 2, 3, 4, 5)
WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0)
WAYS = {"merged": ("back", "cross"), "back + random": ("back", "like-cross"), "cross + random": ("cross", "like-back")}


def crossing(seed: int, count: int) -> str:
    """Walks that begin in language b and go on in c."""
    draw, made = random.Random(f"crossing {seed}"), []
    for _ in range(count):
        _, first, *others = bed.sentence(draw, "c", "forward").split()
        made.append(json.dumps({"prompt": f"forward b{first[1:]}", "completion": f" {' '.join(others)}"}))
    return "\n".join(made)


def raw(languages: str, seed: int, count: int, shuffled: bool = False) -> str:
    draw, made = random.Random(f"{languages} {seed}"), []
    for _ in range(count):
        tag, *words = bed.sentence(draw, draw.choice(languages), draw.choice(bed.TAGS[:3])).split()
        made.append(json.dumps({"text": " ".join((tag, *(draw.sample(words, len(words)) if shuffled else words)))}))
    return "\n".join(made)


@torch.no_grad()
def crossed(model: adapterhub.Model, name: str | None) -> float:
    """The probability, after `forward` and a word of b, of a word of c one, two or three meanings on; the mean over all first words."""
    firsts = [(m, s) for m in range(bed.MEANINGS) for s in range(bed.SYNONYMS)]
    ids = model.tokenizer([f"forward b{m}{s}" for m, s in firsts], return_tensors="pt")["input_ids"]
    chances = model(input_ids=ids, adapters=name).logits[:, -1].softmax(-1)
    total = 0.0
    for row, (meaning, _) in enumerate(firsts):
        right = [f"c{(meaning + on) % bed.MEANINGS}{s}" for on in (1, 2, 3) for s in range(bed.SYNONYMS)]
        total += chances[row, model.tokenizer.convert_tokens_to_ids(right)].sum().item()
    return total / len(firsts)


def like(hub: adapterhub.Hub, ref: str, seed: int) -> None:
    """Publish a random change as `like-REF`: at each site of the same rank and Frobenius norm as REF's."""
    release = hub.resolve(ref)
    torch.manual_seed(seed)
    parts = {}
    for path, (part,) in sorted(Adapter.load(hub, release).modifications().items()):
        down, up = torch.randn_like(part.down), torch.randn_like(part.up)
        size = (part.scale * part.up @ part.down).norm() / (up @ down).norm()
        parts[path] = [LowRank(down=down, up=up * size, scale=torch.tensor(1.0))]
    publish_tensors(hub, parts, name=f"like-{ref}", base=release.manifest.base)


def measure(base: Path, folder: Path, seed: int, steps: int, rows: int, weights: tuple[float, ...]) -> dict[str, float]:
    """Both tasks, each way; and what is forgotten of language b."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    texts = {"back": lofit.rows(seed, rows), "cross": crossing(seed, rows), "b": raw("b", seed, rows)}
    texts |= {"both": f"{texts['back']}\n{texts['cross']}"}
    texts |= {"shuffled": f"{raw('b', seed, rows, shuffled=True)}\n{raw('ac', seed, rows)}"}
    for name, text in texts.items():
        (data := folder / f"{name}{seed}.jsonl").write_text(text)
        given = {"steps": steps, "seed": seed, "batch_size": 16, "lr": 5e-3, "options": {"r": 8}}
        hub.train(
            str(base), "lora", data, name, **given | ({"steps": 2 * steps} if name in ("both", "shuffled") else {})
        )
    for n, name in enumerate(("back", "cross", "b")):
        like(hub, name, 10 * seed + n)
    return added(hub, base, folder, seed, weights) | taken_off(hub, base, folder, seed, rows)


def added(hub: adapterhub.Hub, base: Path, folder: Path, seed: int, weights: tuple[float, ...]) -> dict[str, float]:
    held_out, model = folder / f"held-out{seed}.jsonl", hub.load(str(base))
    held_out.write_text(f"{lofit.rows(seed + 1000, 50)}\n{crossing(seed + 1000, 50)}")
    names = {"base": None, "back": "back", "cross": "cross", "control": "both"}
    told = []
    for n, (way, refs) in enumerate(WAYS.items()):
        tried = {}
        for weight in weights:
            name = f"way{n}-{weight:g}"
            hub.merge(refs, weights=[weight, weight], name=name)
            tried[name] = hub.evaluate(name, None, held_out, model=model)["loss"]
        names[way] = min(tried, key=tried.__getitem__)
        told.append(f"{way} at {names[way].partition('-')[2]}")
    tasks = {way: (lofit.backward(model, name), crossed(model, name)) for way, name in names.items()}
    told += [f"{way} {back:.3f} and {on:.3f}" for way, (back, on) in tasks.items()]
    print(f"seed {seed}: {'; '.join(told)}", flush=True)
    return {way: sum(both) / 2 for way, both in tasks.items()}


def taken_off(hub: adapterhub.Hub, base: Path, folder: Path, seed: int, rows: int) -> dict[str, float]:
    model, tests = hub.load(str(base)), {name: folder / f"test-{name}{seed}.jsonl" for name in ("b", "ac")}
    for name, path in tests.items():
        path.write_text(raw(name, seed + 1000, rows))
    ways = {"base": None, "taken off": "-1*b", "random taken off": "-1*like-b", "shuffled": "shuffled"}
    found, before = {}, {}
    for way, name in ways.items():
        loss = {test: hub.evaluate(name, None, path, model=model)["loss"] for test, path in tests.items()}
        before = before or loss
        found[f"forgotten, {way}"] = loss["b"] - before["b"] - (loss["ac"] - before["ac"])
        print(f"seed {seed}: {way}: loss {tiny.shown(loss)}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(2, 40, (1.0,)), full=(120, 300, WEIGHTS))
    if not found:
        return
    print("mean (standard deviation) over seeds:")
    for way in found[0]:
        print(f"  {way:26} {tiny.spread([each[way] for each in found])}")
    scale = sum(each["control"] - each["base"] for each in found) / len(found)
    for what, others in (("alone", ("back", "cross")), ("with a random change", ("back + random", "cross + random"))):
        apart = [each["merged"] - max(each[other] for other in others) for each in found]
        print(tiny.verdict(f"merged - the better {what}", apart, scale))
    scale = sum(each["forgotten, shuffled"] for each in found) / len(found)
    apart = [each["forgotten, taken off"] - each["forgotten, random taken off"] for each in found]
    print(tiny.verdict("taken off - random taken off", apart, scale))


if __name__ == "__main__":
    main()
