"""Long runs of a registry and a hub under load, by their ids in the fault catalogue (docs/evidence/soak.md).

    python benchmarks/soak.py B8                  # at full length; prints a row of the table in docs/evidence/soak.md
    python benchmarks/soak.py B8 clients=8 seconds=10

What must hold is asserted. Times are printed, never asserted: they are this machine's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

import soak_decode  # noqa: E402
import soak_hub  # noqa: E402
from soak_load import g1, g2, g5, g6  # noqa: E402
from soak_registry import a11, b8  # noqa: E402

# --- those that are tests at full length already --------------------------------------------------------------------


def tests(*selected: str, **environment: str):
    """A run of these tests."""

    def run() -> dict[str, object]:
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "slow or not slow", *selected]
        begin = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **environment})
        return {"tests": " ".join(selected), "took": f"{time.perf_counter() - begin:.0f} s"}

    return run


def fuzz(seconds: float = 3600, flips: int | None = None, seed: int = 0) -> dict[str, object]:
    """Cases of headers, manifests and codecs' containers with bits flipped: refused, or another value."""
    counts = soak_decode.d3(seconds, flips, seed)
    return {what: f"{found['refused']} refused, {found['another']} others" for what, found in counts.items()}


RUNS = {
    "A11": a11,
    "B8": b8,
    "B12": soak_hub.no_locks,
    "D3": fuzz,
    "F4": tests("tests/test_registry_access.py", "-k", "f4"),
    "F5": tests("tests/test_registry_clients.py", "-k", "f5", ADAPTERHUB_F5_EXAMPLES="20000"),
    "F11": tests("tests/test_registry_access.py", "-k", "f11"),
    "G1": g1,
    "G2": g2,
    "G4": tests("tests/test_registry_clients.py", "-k", "g4"),
    "G5": g5,
    "G6": g6,
    "G8": soak_hub.million_blobs,
    "KILLS": soak_hub.kills,
}
"""Id in the catalogue -> a function whose defaults are the full length; it returns what a row shows, and raises when something
does not hold."""


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in RUNS:
        sys.exit(f"{__doc__}\nids: {', '.join(RUNS)}")
    run, begin = RUNS[arguments[0]], time.perf_counter()
    given = dict(each.split("=", 1) for each in arguments[1:])
    figures = run(**{name: float(value) if "." in value else int(value) for name, value in given.items()})
    shown = ", ".join(f"{name} {value}" for name, value in figures.items())
    print(f"| {arguments[0]} | {shown} | {time.perf_counter() - begin:.0f} s |")


if __name__ == "__main__":
    main(sys.argv[1:])
