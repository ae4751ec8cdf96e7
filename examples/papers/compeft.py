"""ComPEFT's claim on the small model: signs of a fifth of the entries and one size do what the adapter did (Yadav et al., 2023).

The task is LoFiT's: after the tag `any`, after which the corpus goes forward in four of five sentences, always go backward; what is measured is the
probability of a step back. For each seed (data, start, order, random places): a LoRA of rank 8; the same as the paper packs it (the largest
fifth of all entries, one threshold and one size for the whole adapter: alpha times the deviation of its entries); as our codec does by default (a
threshold and a size for each tensor) at the same density; and as the paper packs it, but from a random fifth of the entries. Each way has
the alpha of the paper's grid with the least loss on held-out rows. The positive control is the LoRA itself, over the base.

The analysis was fixed before any of the seeds was run: three differences, (1) the paper's less random places, (2) the paper's less the LoRA
itself, (3) the paper's less ours; paired by seed, each mean with the 95 % interval of Student's t. A claim is *seen* if its interval lies
above 0, *not seen* if below or if it is narrower than a twentieth of what the control gains and holds 0, else *not resolved*. Of (2) the
paper claims that nothing is lost, so a difference that is *not seen* because its narrow interval holds 0 is what it says.

    python examples/papers/compeft.py [--quick]
"""

from __future__ import annotations

from pathlib import Path

import lofit
import tiny
import torch

import adapterhub
from adapterhub.adapters.adapter import Adapter, modifications_of
from adapterhub.adapters.publish import publish_tensors
from adapterhub.codecs import SMALL

SEEDS, DENSITY = (1, 2, 3, 4, 5), 0.2
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
PAPER = {"scope": "global", "size": "deviation"}
WAYS = {"paper": ("lora", PAPER), "ours": ("lora", {}), "random": ("scattered", PAPER)}


def scattered(hub: adapterhub.Hub, ref: str, seed: int) -> None:
    """Publish an adapter as `scattered`, with a random share of its entries left."""
    release = hub.resolve(ref)
    adapter = Adapter.load(hub, release)
    large = [name for name, tensor in sorted(adapter.tensors.items()) if tensor.numel() >= SMALL]
    sizes = [adapter.tensors[name].numel() for name in large]
    torch.manual_seed(seed)
    stays = torch.zeros(sum(sizes))
    stays[torch.randperm(len(stays))[: round(DENSITY * len(stays))]] = 1
    left = {
        name: adapter.tensors[name] * mask.view_as(adapter.tensors[name])
        for name, mask in zip(large, stays.split(sizes), strict=True)
    }
    parts = modifications_of(adapter.tensors | left, release.manifest)
    publish_tensors(hub, parts, name="scattered", base=release.manifest.base)


def measure(base: Path, folder: Path, seed: int, steps: int, alphas: tuple[float, ...]) -> dict[str, float]:
    """How probable each way makes a first step back."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    train, held_out = folder / f"train{seed}.jsonl", folder / f"held-out{seed}.jsonl"
    train.write_text(lofit.rows(seed, 300))
    held_out.write_text(lofit.rows(seed + 1000, 100))
    given = {"seed": seed, "batch_size": 16, "lr": 5e-3, "steps": steps, "options": {"r": 8}}
    size = hub.train(str(base), "lora", train, "lora", **given).manifest.files["tensors"].size
    scattered(hub, "lora", seed)
    model = hub.load(str(base))
    found, told = {"base": lofit.backward(model, None), "lora": lofit.backward(model, "lora")}, []
    for way, (of, options) in WAYS.items():
        tried = {}
        for alpha in alphas:
            name = f"{way}-{alpha:g}"
            packed = hub.compress(of, "compeft", options | {"density": DENSITY, "alpha": alpha}, name=name)
            tried[alpha] = hub.evaluate(name, None, held_out, model=model)["loss"]
        best = min(tried, key=tried.__getitem__)
        found[way] = lofit.backward(model, f"{way}-{best:g}")
        told.append(f"{way} at {best:g}, {packed.manifest.files['tensors'].size} bytes")
    print(f"seed {seed}: {tiny.shown(found)}; lora {size} bytes, {'; '.join(told)}", flush=True)
    return found


def main() -> None:
    found = tiny.each_seed(__doc__, measure, SEEDS, quick=(60, (1.0,)), full=(120, ALPHAS))
    if not found:
        return
    print("probability of a step back, mean (standard deviation) over seeds:")
    for name in found[0]:
        print(f"  {name:8} {tiny.spread([each[name] for each in found])}")
    scale = sum(each["lora"] - each["base"] for each in found) / len(found)
    for other in ("random", "lora", "ours"):
        print(tiny.verdict(f"paper - {other}", [each["paper"] - each[other] for each in found], scale))


if __name__ == "__main__":
    main()
