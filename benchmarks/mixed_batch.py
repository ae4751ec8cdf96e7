"""Eight rows, eight LoRAs: decoding in one mixed batch, against PEFT's `adapter_names` and against the bare base.

    uv run python benchmarks/mixed_batch.py [--base smollm2] [--rank 16] [--rounds 7] [--steps 8]

Every case runs once per round, in alternating order; quoted are medians over rounds of the ratio to the base in the
same round. Gate: our logits equal PEFT's. The table is kept in docs/performance.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model

from adapterhub import bases
from adapterhub.attach import Attachment, Plan
from adapterhub.composers import Route
from adapterhub.forms.low_rank import LowRank
from adapterhub.plan import build

ROWS = 8


def with_peft(base, rank: int):
    """(PEFT's model with ROWS random LoRAs, the same as ours: [{site path: [LowRank]}])."""
    config = LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="0")
    for i in range(1, ROWS):
        model.add_adapter(str(i), config)
    ours = []
    for i in range(ROWS):
        adapter = {}
        for path, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A[str(i)].weight, module.lora_B[str(i)].weight
                up.data *= 0.05  # PEFT's random B moves the logits far more than a trained one
                scale = torch.tensor(module.scaling[str(i)])
                adapter[path] = [LowRank(down=down.data.clone(), up=up.data.clone(), scale=scale)]
        ours.append(adapter)
    return model.eval(), ours


@torch.no_grad()
def decode(model, ids, steps: int, **names) -> torch.Tensor:
    """Seconds are the caller's; a cached prefill of 8 tokens, then `steps` steps of one. The last step's logits."""
    out = model(input_ids=ids[:, :8], use_cache=True, **names)
    for k in range(steps):
        out = model(input_ids=ids[:, 8 + k : 9 + k], past_key_values=out.past_key_values, use_cache=True, **names)
    return out.logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    base = bases.load_model(bases.resolve(args.base), "float32", args.device)
    peft, ours = with_peft(base, args.rank)
    ids = torch.randint(3, 1000, (ROWS, 8 + args.steps), device=base.device)
    attachment = Attachment.of(base)
    gathered = build(ours, ROWS, "gathered")
    looped = Plan({path: Route([adapter[path][0] for adapter in ours]) for path in ours[0]}, ROWS)
    shared = build([ours[0]] * ROWS, ROWS, "shared")

    def with_plan(plan):
        def run():
            with torch.no_grad(), attachment.running(plan):
                return decode(base, ids, args.steps)

        return run

    cases = {
        "base": with_plan(Plan()),
        "one LoRA for all rows": with_plan(shared),
        "8 LoRAs, gathered": with_plan(gathered),
        "8 LoRAs, a loop over adapters": with_plan(looped),
        "8 LoRAs, PEFT adapter_names": lambda: decode(
            peft, ids, args.steps, adapter_names=[str(i) for i in range(ROWS)]
        ),
    }
    want = cases["8 LoRAs, PEFT adapter_names"]()
    for name in ("8 LoRAs, gathered", "8 LoRAs, a loop over adapters"):
        apart = (cases[name]() - want).abs().max() / want.abs().max()
        assert apart < 1e-4, f"{name} is not PEFT's result: {apart:.1e}"
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(args.rounds + 1):
        for name in list(cases) if round_ % 2 else reversed(cases):
            start = time.perf_counter()
            cases[name]()
            if round_:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    print(
        f"| {args.steps} decode steps, {ROWS} rows, rank {args.rank} | median ms a step | ratio to the base |\n|---|---|---|"
    )
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(measured, times["base"], strict=True))
        print(f"| {name} | {statistics.median(measured) * 1000 / (args.steps + 1):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
