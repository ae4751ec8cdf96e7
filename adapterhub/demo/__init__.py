"""adapterhub demo: two skills on a real model, from training to a stack that runs in another hub. Floor 6, runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapterhub.demo.report import page
from adapterhub.errors import NotFound
from adapterhub.files import durable
from adapterhub.hub import Hub
from adapterhub.hub import open as open_hub
from adapterhub.opening import nearest

CLONE = Path(__file__).resolve().parents[2]
DATA = CLONE / "examples" / "data"


def run(
    hub_root: str | Path | None = None,
    seed: int = 0,
    quick: bool = False,
    report: str | Path = "demo-report.html",
    base: str = "smollm2",
    device: str = "auto",
) -> dict[str, Any]:
    """Train, measure, compress, merge, stack, install and run; print the table, write the report, return the results
    (their shape: adapterhub.demo.report).

    hub_root: the hub's folder, made if there is none; None: the nearest hub, else one at the clone's root. A second run
    with one seed makes the same bytes, so it adds no versions; another seed adds the next version of each.
    quick: three steps and 16 rows, to try the journey and not the result.

    Raises NotFound outside a clone, where the data are."""
    from adapterhub.demo.figures import results_of
    from adapterhub.demo.journey import Journey
    from adapterhub.demo.terminal import show

    if not DATA.is_dir():
        raise NotFound(
            f"the demo's data are not here: no {DATA}", "run it in a clone of adapterhub: uv run adapterhub demo"
        )
    steps, limit = (3, 16) if quick else (None, None)
    journey = Journey(_hub(hub_root), DATA, base, device, seed, steps, limit)
    journey.run()
    results = results_of(journey)
    durable.write_bytes(Path(report), page(results).encode())
    show(results)
    print(f"\nThe same with curves and lineage, as a page: {report}")
    return results


def _hub(root: str | Path | None) -> Hub:
    """The hub in this folder; without one the nearest above the working directory, else one at the clone's root."""
    if root is None and nearest() is not None:
        return open_hub()
    return open_hub(root or CLONE, create=True)
