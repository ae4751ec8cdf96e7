"""What the demo does, stage by stage. Nothing here but calls that anyone can make, and a line on stderr before each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from adapterhub.hub import Hub
from adapterhub.hub import open as open_hub
from adapterhub.runtime.model import Model
from adapterhub.spec.manifest import Release

TASKS = {"sentiment": "Sentiment of reviews", "department": "Department of a diagnosis"}
"""Each has NAME-train.jsonl and NAME-test.jsonl; examples/data/NOTICE.md says what they are."""
BARE = "bare base"


class Job(NamedTuple):
    """One adapter to train."""

    name: str
    task: str
    method: str
    options: Mapping[str, Any]
    steps: int


JOBS = (
    Job("demo/sentiment", "sentiment", "lora", {"r": 8}, 60),
    Job("demo/department", "department", "bottleneck", {"r": 64}, 90),
    # A bottleneck is no change of a weight, so nothing merges with it: this one is there to be merged.
    Job("demo/department-lora", "department", "lora", {"r": 8}, 60),
)
SHARE = 0.5
"""Of the bottleneck in the stack. It changes every token's hidden states by much more than the LoRA does: at its full
weight the LoRA's skill is lost. How it was chosen: docs/evidence/demo.md."""
DENSITY = 0.5
"""ComPEFT keeps this share of the entries: 1.5 bits for each of all."""


class Answer(NamedTuple):
    adapters: str | None
    """None: the bare base."""
    task: str
    text: str


@dataclass
class Journey:
    """One run. Every release is named with its version, so older runs in the hub do not matter."""

    hub: Hub
    data: Path
    base: str
    device: str
    seed: int
    steps: int | None = None
    """Of every training; None: what its job says."""
    limit: int | None = None
    """Held-out rows; None: all."""

    trained: dict[str, Release] = field(default_factory=dict)
    """By job name."""
    measured: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Release or BARE -> task -> what `evaluate` says."""
    prompts: dict[str, str] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    answers_alone: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    def run(self) -> None:
        self._started, self._stage = time.monotonic(), 0
        self._say(f"load {self.base} (made ready once per machine) and measure what it knows of both tasks")
        model = self._load(self.hub)
        for task in TASKS:
            self._measure(self.hub, model, None, task)
        for job in JOBS:
            self._say(f"train {job.name} with {job.method}, {self.steps or job.steps} steps of 8 rows; measure it")
            self.trained[job.name] = self._train(job)
            self._measure(self.hub, model, self.trained[job.name], job.task)
        sentiment, department, mergeable = self.trained.values()

        self._say(f"compress {sentiment} with compeft and measure it again")
        self.small = self.hub.compress(str(sentiment), "compeft", {"density": DENSITY}, name="demo/sentiment-small")
        self._measure(self.hub, model, self.small, "sentiment")
        del model

        self._say("merge the two loras, stack lora and bottleneck, install both into a second hub")
        self.merged = self.hub.merge([str(sentiment), str(mergeable)], merger="linear", name="demo/both-merged")
        self.stacked = self.hub.compose(f"{sentiment} + {SHARE}*{department}", name="demo/both-stacked")
        second = self._install(self.merged, self.stacked)

        self._say("measure the merge and the stack on both tasks, in the second hub")
        model = self._load(second)
        for release in (self.merged, self.stacked):
            for task in TASKS:
                self._measure(second, model, release, task)

        self._say("answer a batch there, each row with its own adapters, then each row alone")
        self._answer(model, sentiment, department)
        self.seconds = time.monotonic() - self._started

    def _train(self, job: Job) -> Release:
        return self.hub.train(
            self.base,
            job.method,
            self.data / f"{job.task}-train.jsonl",
            job.name,
            options=job.options,
            steps=self.steps or job.steps,
            seed=self.seed,
            device=self.device,
        )

    def _install(self, *releases: Release) -> Hub:
        """A hub of their own in the first one's folder: named by what it gets, so that a second run finds it as it is."""
        name = "-".join(["second", *(release.digest.removeprefix("sha256:")[:8] for release in releases)])
        second = open_hub(self.hub.root / "demo" / name, create=True)
        for release in releases:
            second.install(f"{self.hub.root}:{release}")
        return second

    def _load(self, hub: Hub) -> Model:
        model = hub.load(self.base, device=self.device)
        self.ran_on = str(model.device)
        return model

    def _measure(self, hub: Hub, model: Model, release: Release | None, task: str) -> None:
        result = hub.evaluate(
            release and str(release),
            self.base,
            self.data / f"{task}-test.jsonl",
            model=model,
            metrics=["label"],
            limit=self.limit,
        )
        self.measured.setdefault(str(release or BARE), {})[task] = result
        low, high = result["label_interval"]
        print(
            f"        {task}: {result['label']:.1%} [{low:.1%}, {high:.1%}]  {release or BARE}",
            file=sys.stderr,
            flush=True,
        )

    def _answer(self, model: Model, sentiment: Release, department: Release) -> None:
        for task in TASKS:
            lines = (self.data / f"{task}-test.jsonl").read_text(encoding="utf-8").splitlines()
            self.prompts[task] = json.loads(lines[self.seed % len(lines)])["prompt"]
        rows = [(None, task) for task in TASKS]
        rows += [(str(sentiment), "sentiment"), (str(department), "department")]
        rows += [(str(release), task) for release in (self.merged, self.stacked) for task in TASKS]
        texts, adapters = [self.prompts[task] for _, task in rows], [which for which, _ in rows]
        together = model.complete(texts, adapters=adapters, max_new_tokens=5)
        alone = [
            model.complete([text], adapters=[which], max_new_tokens=5)[0]
            for text, which in zip(texts, adapters, strict=True)
        ]
        self.answers = [Answer(*row, text) for row, text in zip(rows, together, strict=True)]
        self.answers_alone = [Answer(*row, text) for row, text in zip(rows, alone, strict=True)]

    def _say(self, what: str) -> None:
        self._stage += 1
        seconds = time.monotonic() - self._started
        print(f"[{self._stage}/{len(JOBS) + 5}] {seconds:4.0f} s  {what}", file=sys.stderr, flush=True)
