"""What the demo's run comes to: the results that the table and the page show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapterhub.demo.journey import BARE, DENSITY, JOBS, SHARE, TASKS, Journey
from adapterhub.evaluation.intervals import paired
from adapterhub.spec.manifest import Release

LEAST_GAIN = 0.15
LEAST_RATIO = 8
MOST_LOSS = 0.03
"""Of label accuracy, by compressing."""
LEAST_KEPT = 0.5
"""Of each gain, by stacking."""


def results_of(journey: Journey) -> dict[str, Any]:
    """The results as `adapterhub.demo.report` describes them."""
    sentiment, department, mergeable = journey.trained.values()
    bare, compression = journey.measured[BARE], _compression(journey)
    base = sentiment.manifest.base.name
    models = [_model(journey, BARE, base, None, "")]
    for job, release in zip(JOBS, journey.trained.values(), strict=True):
        models.append(_model(journey, release, f"{job.method}, r {job.options['r']}", _bytes(release), ""))
    models += [
        _model(journey, journey.small, f"compeft, density {DENSITY}", _bytes(journey.small), f"of {sentiment}"),
        _model(journey, journey.merged, "linear merge", _bytes(journey.merged), f"{sentiment}, {mergeable}", mergeable),
        _model(
            journey,
            journey.stacked,
            f"stack, {SHARE} of the bottleneck",
            None,
            journey.stacked.manifest.compose,
            department,
        ),
    ]
    releases = [*journey.trained.values(), journey.small, journey.stacked, journey.merged]
    return {
        "base": base,
        "device": journey.ran_on,
        "seed": journey.seed,
        "seconds": journey.seconds,
        "hub": str(journey.hub.root),
        "tasks": {
            task: {"title": title, "rows": bare[task]["n"], "labels": len(bare[task]["labels"])}
            for task, title in TASKS.items()
        },
        "models": models,
        "curves": {name: _curve(journey, release) for name, release in journey.trained.items()},
        "sizes": [
            {"name": sentiment.name, "bytes": _bytes(sentiment)},
            {"name": "the same in bf16", "bytes": compression["bf16"]},
            {"name": journey.small.name, "bytes": _bytes(journey.small)},
            *({"name": release.name, "bytes": _bytes(release)} for release in (department, mergeable, journey.merged)),
        ],
        "compression": compression,
        "lineage": [
            {"name": base, "detail": "the base", "parents": []},
            *(_node(release) for release in releases),
        ],
        "prompts": journey.prompts,
        "answers": [{"adapters": a.adapters or BARE, "task": a.task, "text": a.text} for a in journey.answers],
        "checks": _checks(journey, compression, models[-1]["scores"]),
    }


def _model(
    journey: Journey,
    release: Release | str,
    kind: str,
    size: int | None,
    note: str,
    of_department: Release | None = None,
) -> dict[str, Any]:
    """A row of the table. of_department: with which adapter the second skill went in; then the share of each gain that
    is left is given."""
    alone = {"sentiment": journey.trained["demo/sentiment"], "department": of_department}
    scores = {}
    for task, result in journey.measured[str(release)].items():
        kept = None
        if of_department is not None:
            bare = journey.measured[BARE][task]["label"]
            gain = journey.measured[str(alone[task])][task]["label"] - bare
            kept = (result["label"] - bare) / gain if gain > 0 else None
        scores[task] = {"label": result["label"], "interval": list(result["label_interval"]), "kept": kept}
    return {"name": str(release), "kind": kind, "bytes": size, "note": note, "scores": scores}


def _compression(journey: Journey) -> dict[str, Any]:
    small, sentiment = journey.small, journey.trained["demo/sentiment"]
    sizes = small.manifest.metrics["compress"]
    change = paired(*(journey.measured[str(release)]["sentiment"] for release in (sentiment, small)))
    return {
        "name": small.name,
        "task": "sentiment",
        "bytes": sizes["bytes_after"],
        "bf16": sizes["bytes_bf16"],
        "ratio": sizes["bytes_bf16"] / sizes["bytes_after"],
        "difference": change["difference"],
        "interval": list(change["interval"]),
    }


def _checks(journey: Journey, compression: Mapping[str, Any], stack: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the demo promises, and whether this run kept it."""
    checks = []
    for job in JOBS[:2]:
        after, before = journey.measured[str(journey.trained[job.name])], journey.measured[BARE]
        gain = after[job.task]["label"] - before[job.task]["label"]
        what = f"{job.name} gains at least {100 * LEAST_GAIN:.0f} points over the base"
        checks.append((what, f"{100 * gain:+.1f} points", gain >= LEAST_GAIN))
    ratio, difference = compression["ratio"], compression["difference"]
    kept = {task: stack[task]["kept"] for task in TASKS}
    shares = ", ".join(f"{task} " + ("no gain" if k is None else f"{100 * k:.0f} %") for task, k in kept.items())
    alike = journey.answers == journey.answers_alone
    checks += [
        (
            f"the compressed one is at least {LEAST_RATIO} times smaller than in bf16",
            f"{ratio:.1f} times",
            ratio >= LEAST_RATIO,
        ),
        (
            f"compressing it costs at most {100 * MOST_LOSS:.0f} points",
            f"{100 * difference:+.1f} points",
            difference >= -MOST_LOSS,
        ),
        (
            "the stack keeps at least half of each gain",
            shares,
            all(k is not None and k >= LEAST_KEPT for k in kept.values()),
        ),
        ("each row of a mixed batch answers as it does alone", "all do" if alike else "some differ", alike),
    ]
    return [{"what": what, "figure": figure, "passed": passed} for what, figure, passed in checks]


def _curve(journey: Journey, release: Release) -> list[float]:
    log = json.loads(journey.hub.store.read(release.manifest.files["log"]))
    return [entry["loss"] for entry in log]


def _node(release: Release) -> dict[str, Any]:
    manifest = release.manifest
    if manifest.compose is not None:
        made = "stack"
    else:
        made = manifest.codecs[-1].name if manifest.codecs else manifest.method.name if manifest.method else "merge"
        made += f", {_bytes(release) / 1e6:.2f} MB"
    parents = [parent.name for parent in manifest.parents] or [manifest.base.name]
    return {"name": release.name, "detail": f"{release.version}, {made}", "parents": parents}


def _bytes(release: Release) -> int:
    return release.manifest.files["tensors"].size
