"""CoPG's claims, on a bandit where the best policy is known and on the small model (Flet-Berliac et al., 2024).

The bandit: ten arms with rewards from a standard normal, beta 0.5, 40,000 pairs of arms logged by a policy that has nothing to do with the
reference. What is measured is KL(pi | best), best being proportional to pi_ref exp(R / beta). Four losses see the same pairs in the same batches with
the same optimiser: CoPG; the off-policy gradient of R - beta l with no baseline; the same less the logged mean reward; IPO, whose one margin is
set to the mean gap of the rewards over beta. The positive control is the distance that there is to go, KL(pi_ref | best).

The small model: a prompt is `any` and five words in mixed languages, the base has written four answers to each of 1600, and the reward of an answer is the share of its
words that are in language b. LoRAs of rank 8 are trained on it in one pass: CoPG; DPO on the same pairs, of which it sees which is better; and
plain fine-tuning on the best of each four. The betas of CoPG and DPO were set so that they end near the distance from the base at which best-of-4
ends; then they are scaled (`w*adapter`) until KL(pi | base), summed over the answer, is the same. What is measured is the mean reward of sampled answers to other
prompts. The positive control is the best policy at that KL, base samples weighed by exp(R / beta), less the base.

The analysis was fixed before any of the seeds was run: the differences on the bandit KL(other) - KL(CoPG), and on the model reward(CoPG) - reward(best of 4) and
reward(CoPG) - reward(DPO); paired by seed, their means and the 95 % intervals of Student's t. A claim is *seen* if the interval lies above 0, *not
seen* if below or if it is narrower than a twentieth of the control's effect and holds 0, else *not resolved*.

    python examples/papers/copg.py [--quick]
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
from adapterhub_copg import pair_loss
from torch import Tensor

import adapterhub

SEEDS, BETA = (1, 2, 3, 4, 5), 0.5
TOLD = 6
"""Tokens of a prompt."""
TEMPER = {"copg": 1.0, "dpo": 100.0}
"""Each objective's beta on the model."""


# --- the bandit ----------------------------------------------------------------------------------------------------


def bandit(seed: int, steps: int = 1000, batch: int = 200, pairs: int = 40_000) -> dict[str, float]:
    """KL(pi | best) of each way in the end, in nats."""
    torch.manual_seed(seed)
    rewards = torch.randn(10)
    reference, logging = torch.randn(2, 10).log_softmax(-1)
    arms = torch.multinomial(logging.exp(), 2 * pairs, replacement=True).view(pairs, 2)
    best = (reference + rewards / BETA).log_softmax(-1)
    gap = (rewards[arms[:, 0]] - rewards[arms[:, 1]]).abs().mean().item()
    group = torch.arange(batch).repeat_interleave(2)

    def gradient(baseline: float):
        return lambda reward, ratio: -((reward - baseline - BETA / 2 * ratio) * ratio).mean()

    losses = {
        "copg": lambda reward, ratio: pair_loss(reward, ratio, group, BETA),
        "no baseline": gradient(0.0),
        "mean baseline": gradient(rewards[arms].mean().item()),
        "ipo": lambda reward, ratio: pair_loss(reward, ratio, group, BETA / (2 * gap), "ipo"),
    }
    found = {}
    for way, loss in losses.items():
        policy = reference.clone().requires_grad_()
        optimizer = torch.optim.Adam([policy], lr=0.05)
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(steps):
            drawn = arms[torch.arange(step * batch, (step + 1) * batch) % pairs].flatten()
            loss(rewards[drawn], (policy.log_softmax(-1) - reference)[drawn]).backward()
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        found[way] = apart(policy.detach().log_softmax(-1), best)
    found["reference"] = apart(reference, best)
    print(f"bandit, seed {seed}: {tiny.shown(found)}", flush=True)
    return found


def apart(one: Tensor, other: Tensor) -> float:
    return (one.exp() * (one - other)).sum().item()


# --- the small model -----------------------------------------------------------------------------------------------


def prompts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(bed.sentence(draw, "abc", "any").split()[:TOLD]) for _ in range(count)]


def score(text: str) -> float:
    """The share of words in language b."""
    words = [word for word in text.split() if word[-1].isdigit()]
    return sum(word.startswith("b") for word in words) / max(1, len(words))


@torch.no_grad()
def answers(
    model: adapterhub.Model, asked: list[str], seed: int, adapters: str | None = None
) -> tuple[Tensor, list[str]]:
    """Prompts with sampled answers, (rows, tokens) ids; and the answers as text, without the end."""
    torch.manual_seed(seed)
    ids = model.tokenizer(asked, return_tensors="pt")["input_ids"]
    ids = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapters=adapters,
        do_sample=True,
        top_k=0,
        min_new_tokens=1,
        max_new_tokens=bed.LENGTH + 2 - TOLD,
    )
    texts = model.tokenizer.batch_decode(ids[:, TOLD:])
    return ids, [text.partition("</s>")[0].strip() for text in texts]


@torch.no_grad()
def tried(model: adapterhub.Model, adapters: str | None, asked: list[str], seed: int) -> tuple[float, float]:
    """The mean reward of sampled answers, and KL(pi | base) along them: summed over an answer's tokens, exact at each."""
    ids, texts = answers(model, asked, seed, adapters)
    here, there = (
        model(input_ids=ids, adapters=one).logits[:, TOLD - 1 : -1].log_softmax(-1) for one in (adapters, None)
    )
    end = (ids[:, TOLD:] == model.tokenizer.eos_token_id).long()
    unfinished = end.cumsum(1) - end == 0
    kl = ((here.exp() * (here - there)).sum(-1) * unfinished).sum(1).mean().item()
    return sum(map(score, texts)) / len(texts), kl


def best_at(rewards: Tensor, kl: float) -> float:
    """The reward of the best policy at KL(pi | base) = kl: base samples (prompts, samples) weighed by exp(R / beta)."""

    def weighed(beta: float) -> tuple[float, float]:
        share = (rewards / beta).softmax(-1)
        apart = (share * (share * rewards.shape[1]).log()).sum(-1).mean().item()
        return (share * rewards).sum(-1).mean().item(), apart

    low, high = 1e-2, 1e2
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if weighed(middle)[1] > kl else (low, middle)
    return weighed(high)[0]


def factor(model: adapterhub.Model, name: str, kl: float, asked: list[str], seed: int) -> float:
    """The factor up to 2 at which an adapter's KL is nearest to `kl`."""
    low, high = 0.0, 2.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (low, middle) if tried(model, f"{middle!r}*{name}", asked, seed)[1] > kl else (middle, high)
    return high


def measure(base: Path, folder: Path, seed: int, steps: int, rows: int = 1600, tests: int = 1000) -> dict[str, float]:
    """The mean rewards at the KL of best-of-4."""
    hub = adapterhub.open(folder / f"hub{seed}", create=True)
    model = hub.load(str(base))
    asked = prompts(seed, rows)
    _, texts = answers(model, [prompt for prompt in asked for _ in range(4)], seed)
    scored, best = folder / f"scored{seed}.jsonl", folder / f"best{seed}.jsonl"
    with scored.open("w") as all_four, best.open("w") as one:
        for n, prompt in enumerate(asked):
            four = texts[4 * n : 4 * n + 4]
            row = {"prompt": prompt, "completions": [f" {text}" for text in four], "rewards": list(map(score, four))}
            all_four.write(json.dumps(row) + "\n")
            one.write(json.dumps({"prompt": prompt, "completion": f" {max(four, key=score)}"}) + "\n")
    given = {"seed": seed, "batch_size": 16, "steps": steps, "lr": 3e-3}
    hub.train(str(base), "lora", best, "best", options={"r": 8}, **given)
    for pair, beta in TEMPER.items():
        options = {"r": 8, "copg.pair": pair, "copg.beta": beta}
        hub.train(str(base), "lora", scored, pair, options=options, objective="copg", **given)
    asked = prompts(seed + 1000, tests)
    found, told = {"base": tried(model, None, 4 * asked, seed)[0]}, {}
    found["best of 4"], kl = tried(model, "best", 4 * asked, seed)
    for name in TEMPER:
        told[f"{name} unscaled"], told[f"{name}'s KL unscaled"] = tried(model, name, asked, seed)
        told[f"{name} scaled by"] = weight = factor(model, name, kl, asked, seed)
        found[name], told[f"{name}'s KL"] = tried(model, f"{weight!r}*{name}", 4 * asked, seed)
    _, texts = answers(model, [prompt for prompt in asked[:500] for _ in range(64)], seed)
    found["optimum"] = best_at(torch.tensor([score(text) for text in texts]).view(-1, 64), kl)
    print(f"model, seed {seed}: {tiny.shown(found)}; KL {kl:.3f}; {tiny.shown(told)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of one seed on a hardly trained model: that it runs"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    base = bed.base(20 if quick else bed.STEPS)
    with TemporaryDirectory() as folder:
        if quick:
            bandit(SEEDS[0], 20)
            measure(base, Path(folder), SEEDS[0], 2, 40, 10)
            return
        bandits = [bandit(seed) for seed in SEEDS]
        models = [measure(base, Path(folder), seed, 100) for seed in SEEDS]
    for what, found in (("KL(pi | best) on the bandit", bandits), ("reward at the KL of best-of-4", models)):
        print(f"{what}, mean (standard deviation) over seeds:")
        for way in found[0]:
            print(f"  {way:14} {tiny.spread([each[way] for each in found])}")
    scale = sum(each["reference"] - each["copg"] for each in bandits) / len(bandits)
    for way in ("no baseline", "mean baseline", "ipo"):
        print(tiny.verdict(f"bandit: {way} - copg", [each[way] - each["copg"] for each in bandits], scale))
    scale = sum(each["optimum"] - each["base"] for each in models) / len(models)
    for way in ("best of 4", "dpo"):
        print(tiny.verdict(f"model: copg - {way}", [each["copg"] - each[way] for each in models], scale))


if __name__ == "__main__":
    main()
