"""What the experiments share beside their bed: the command line, the loop over seeds, and the analysis."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import TypeVar

import bed
import torch

from adapterhub import plugins

os.environ.setdefault("ADAPTERHUB_PLUGINS", ",".join(sorted(plugins.ours())))  # the scripts try our own packages

Found = TypeVar("Found")

T5 = 2.776
"""The 97.5 % point of Student's t for five differences."""


def each_seed(
    doc: str, measure: Callable[..., Found], seeds: Sequence[int], quick: Sequence[int], full: Sequence[int]
) -> list[Found]:
    """What `measure(base, folder, seed, *full)` finds for each seed; of a script's command line --quick measures one seed on a
    hardly trained model with `quick`, and --seed N that one alone: then nothing is left to analyse, []."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of one seed on a hardly trained model: that it runs"
    )
    parser.add_argument("--seed", type=int, help="one seed alone, to set rates and steps with")
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = bed.base(20 if given.quick else bed.STEPS)
    with TemporaryDirectory() as folder:
        if given.quick or given.seed:
            measure(trained, Path(folder), given.seed or seeds[0], *(quick if given.quick else full))
            return []
        return [measure(trained, Path(folder), seed, *full) for seed in seeds]


# --- the analysis --------------------------------------------------------------------------------------------------


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({stdev(values):.3f})"


def verdict(what: str, differences: list[float], scale: float) -> str:
    """The mean of five paired differences, its 95 % interval (Student's t), and what that says of the claim that it is above 0.

    *seen*: the interval lies above 0; *not seen*: below, or it holds 0 and is narrower than a twentieth of `scale`, the
    positive control's effect; else, and where the control itself shows nothing (scale of 0 or less), *not resolved*."""
    half = T5 * stdev(differences) / 5**0.5
    low, high = mean(differences) - half, mean(differences) + half
    null = high < 0 or high - low < scale / 20
    said = "not resolved" if scale <= 0 or (low <= 0 and not null) else "seen" if low > 0 else "not seen"
    return f"{what}: {mean(differences):+.3f}, 95 % interval {low:+.3f} to {high:+.3f} (control {scale:+.3f}): {said}"
