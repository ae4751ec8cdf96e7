"""Eight rows of one batch, each with its own adapter, while decoding: what it costs.

    uv run python benchmarks/mixed_batch.py [--base smollm2] [--rank 16] [--rounds 9] [--steps 8]
    uv run python benchmarks/mixed_batch.py --against COMMIT

The first compares eight LoRAs with PEFT's `adapter_names` and with the bare base; before that, our logits must be PEFT's. The
second runs this tree and another commit side by side, each in a process of its own. Either way every case runs in every
round, in alternating order, and processor time on one thread is what counts, which other work on the machine disturbs
least; quoted are medians over rounds of the ratio within a round. The tables are kept in docs/evidence/performance.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from pathlib import Path

import torch
from rows_worker import CASES, ROWS, decode, load, publish

ROOT = Path(__file__).resolve().parent.parent


# --- against PEFT ----------------------------------------------------------------------------------------------------


def with_peft(model, rank: int):
    """PEFT's model with ROWS random LoRAs, over a copy of the base; the same are published as me/0 and on."""
    from peft import LoraConfig, get_peft_model

    from adapterhub.forms.low_rank import LowRank

    config = LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(model.base), config, adapter_name="0")
    for i in range(1, ROWS):
        theirs.add_adapter(str(i), config)
    for i in range(ROWS):
        parts = {}
        for path, module in theirs.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A[str(i)].weight, module.lora_B[str(i)].weight
                up.data *= 0.05  # PEFT's random B moves the logits far more than a trained one
                factors = {"down": down.data.clone(), "up": up.data.clone()}
                parts[path] = [LowRank(**factors, scale=torch.tensor(module.scaling[str(i)]))]
        publish(model, f"me/{i}", parts)
    return theirs.eval()


def compare_with_peft(args) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = load(args.base, Path(folder), args.device)
        peft = with_peft(model, args.rank)
        ids = torch.randint(3, 90, (ROWS, 8 + args.steps), device=model.device)

        def alone():
            rows = [
                decode(model, ids[i : i + 1], args.steps, adapters=[name]) for i, name in enumerate(CASES["8 LoRAs"])
            ]
            return torch.cat(rows)

        ours = {name: rows for name, rows in CASES.items() if name != "unlike kinds"}
        cases = {name: lambda rows=rows: decode(model, ids, args.steps, adapters=rows) for name, rows in ours.items()}
        cases["8 LoRAs, a call for each"] = alone
        names = [str(i) for i in range(ROWS)]
        cases["8 LoRAs, PEFT `adapter_names`"] = lambda: decode(peft, ids, args.steps, adapter_names=names)
        want = cases["8 LoRAs, PEFT `adapter_names`"]()
        for name in ("8 LoRAs", "8 LoRAs, a call for each"):
            apart = distance(cases[name](), want)
            assert apart < 1e-4, f"{name} is not PEFT's result: {apart:.1e}"
        times: dict[str, list[float]] = {name: [] for name in cases}
        for round_ in range(args.rounds):
            for name in list(cases) if round_ % 2 else reversed(cases):
                start = time.process_time()
                cases[name]()
                times[name].append(time.process_time() - start)
    print(
        f"| {args.steps} decode steps, {ROWS} rows, rank {args.rank} | median ms a step | ratio to the base |\n|---|---|---|"
    )
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(measured, times["base rows"], strict=True))
        print(f"| {name} | {statistics.median(measured) * 1000 / (args.steps + 1):.1f} | {ratio:.2f} |")


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, over the largest entry."""
    return float((one - other).abs().max() / other.abs().max())


# --- against another commit ------------------------------------------------------------------------------------------


def check_out(commit: str, folder: Path) -> None:
    """The tree of a commit, with the metadata by which its own parts are found and not those of this tree."""
    with (folder / "tree.tar").open("wb") as file:
        subprocess.run(["git", "-C", ROOT, "archive", commit], stdout=file, check=True)
    with tarfile.open(folder / "tree.tar") as tree:
        tree.extractall(folder, filter="data")
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    metadata = folder / f"adapterhub-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: adapterhub\nVersion: {project['version']}\n")
    points = [
        line
        for group, parts in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {place}" for name, place in parts.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(points))


class Worker:
    """rows_worker.py over one tree."""

    def __init__(self, tree: Path, folder: Path, args):
        self.folder = folder
        folder.mkdir()
        path = os.pathsep.join([str(tree), str(tree / "registry"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        options = ["--base", args.base, "--rank", str(args.rank), "--steps", str(args.steps)]
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "rows_worker.py"), str(tree), str(folder), *options],
            env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self._process.stdout.readline() != "ready\n":
            sys.exit(f"the worker over {tree} did not start")

    def seconds(self, case: str) -> float:
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def logits(self, case: str) -> torch.Tensor:
        return torch.load(self.folder / f"{case}.pt")

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare_with_commit(args) -> None:
    """In a round each case runs ours, theirs, theirs, ours, or the other way round, so that a drift cancels."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        tree.mkdir()
        check_out(args.against, tree)
        workers = Worker(ROOT, Path(folder, "ours"), args), Worker(tree, Path(folder, "theirs"), args)
        for name in CASES:  # warm up; each plans its batches once
            for worker in workers:
                worker.seconds(name)
        ratios: dict[str, list[float]] = {name: [] for name in CASES}
        for round_ in range(args.rounds):
            for name in CASES:
                spent = [0.0, 0.0]
                for i in (0, 1, 1, 0) if round_ % 2 else (1, 0, 0, 1):
                    spent[i] += workers[i].seconds(name)
                ratios[name].append(spent[0] / spent[1])
        apart = {name: distance(*(worker.logits(name) for worker in workers)) for name in CASES}
        for worker in workers:
            worker.end()
    print(f"| {args.rounds} rounds against {args.against} | ratio | from | to | logits apart |\n|---|---|---|---|---|")
    for name, found in ratios.items():
        print(f"| {name} | {statistics.median(found):.3f} | {min(found):.3f} | {max(found):.3f} | {apart[name]:.0e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="auto", help="of the comparison with PEFT")
    parser.add_argument("--against", metavar="COMMIT", help="compare this tree with another commit instead, on the CPU")
    args = parser.parse_args()
    compare_with_commit(args) if args.against else compare_with_peft(args)


if __name__ == "__main__":
    main()
