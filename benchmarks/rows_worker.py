"""Decodes batches of eight rows when asked, by adapterhub's public interface alone: so it runs on whichever commit comes first
on PYTHONPATH. `mixed_batch.py` starts it: a line with a case's name comes in, a line with processor seconds goes out.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.publish import publish_tensors

ROWS = 8
LINEAR = ("query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down")
KINDS = ("me/0", "me/dora", "me/affine", "me/bottleneck", "me/sparse", "me/prefix", "me/1 + me/dense", None)
CASES = {
    "base rows": [None] * ROWS,
    "one LoRA for all rows": ["me/0"] * ROWS,
    "8 LoRAs": [f"me/{i}" for i in range(ROWS)],
    "unlike kinds": list(KINDS),
}
"""Case -> each row's adapters."""


@torch.no_grad()
def decode(model, ids, steps: int, **names) -> torch.Tensor:
    """Seconds are the caller's; a cached prefill of 8 tokens, then `steps` steps of one. The last step's logits."""
    out = model(input_ids=ids[:, :8], use_cache=True, **names)
    for k in range(steps):
        out = model(input_ids=ids[:, 8 + k : 9 + k], past_key_values=out.past_key_values, use_cache=True, **names)
    return out.logits


def load(base: str, hub_root: Path, device: str = "cpu"):
    """A base in float32 over an empty hub."""
    return adapterhub.open(hub_root, create=True).load(base, dtype="float32", device=device)


def publish(model, name: str, parts) -> None:
    """{site path: [modifications]} into the model's hub."""
    publish_tensors(model.hub, parts, name=name, base=model.fingerprint.base, sketch=model.fingerprint.sketch)


def publish_all(model, rank: int) -> None:
    """ROWS LoRAs of a rank at every linear module, me/0 and on, and one adapter of each other kind; the same at each call."""
    torch.manual_seed(0)
    there = {role: [site for site in model.sites if site.role == role] for role in (*LINEAR, "attention", "ffn")}
    linear = [site for role in LINEAR for site in there[role]]
    for i in range(ROWS):
        publish(model, f"me/{i}", {site.path: [_low_rank(site, rank)] for site in linear})
    publish(model, "me/dora", {site.path: [_dora(model, site, rank)] for site in linear})
    for name, roles in {
        "affine": ("key", "value", "ffn_down"),
        "bottleneck": ("attention", "ffn"),
        "sparse": ("query", "value"),
        "dense": ("query", "value"),
        "prefix": ("attention",),
    }.items():
        form = plugins.load("forms", name)
        publish(model, f"me/{name}", {site.path: [form.random(site)] for role in roles for site in there[role]})


def _factors(site, rank: int) -> dict[str, torch.Tensor]:
    """As strong as a trained one, about."""
    down, up = torch.randn(rank, site.inputs) * site.inputs**-0.5, torch.randn(site.outputs, rank) * 0.02
    return {"down": down, "up": up, "scale": torch.tensor(2.0)}


def _low_rank(site, rank: int):
    return plugins.load("forms", "low_rank")(**_factors(site, rank))


def _dora(model, site, rank: int):
    lengths = model.base.get_submodule(site.path).weight.detach().cpu().norm(dim=1)
    return plugins.load("forms", "dora")(
        **_factors(site, rank), magnitude=lengths * (1 + 0.02 * torch.randn_like(lengths))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="where adapterhub must come from")
    parser.add_argument("folder", type=Path, help="for the hub, and each case's first logits")
    parser.add_argument("--base", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    if not Path(adapterhub.__file__).is_relative_to(args.tree.resolve()):
        sys.exit(f"adapterhub comes from {adapterhub.__file__}, not from {args.tree}")
    torch.set_num_threads(1)  # processor time: a thread that waits for another spins
    model = load(args.base, args.folder / "hub")
    publish_all(model, args.rank)
    ids = torch.randint(3, 90, (ROWS, 8 + args.steps), generator=torch.Generator().manual_seed(0))
    print("ready", flush=True)
    for line in sys.stdin:
        name = line.strip()
        start = time.process_time()
        logits = decode(model, ids, args.steps, adapters=CASES[name])
        spent = time.process_time() - start
        if not (kept := args.folder / f"{name}.pt").exists():
            torch.save(logits, kept)
        print(spent, flush=True)


if __name__ == "__main__":
    main()
