"""A hub of 100,000 adapters in 300,000 versions: what looking takes.

    python benchmarks/scale.py            # builds the hub in a temporary folder (a minute), measures, prints a table

`show`, `search` and a name that is not there are timed inside the process; the first page of `list` as a whole process,
by its processor time."""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adapterhub_registry import rows
from adapterhub_registry.tables import adapters, blobs, manifests, releases
from sqlalchemy import insert

import adapterhub
from adapterhub.errors import NotFound
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Release

WORDS = [
    "sql",
    "tone",
    "legal",
    "sentiment",
    "finance",
    "code",
    "summary",
    "chat",
    "table",
    "route",
    "price",
    "label",
    "rank",
    "plan",
    "note",
    "chart",
]
BATCH = 2000


def build(root: Path, count: int, versions: int) -> adapterhub.Hub:
    """Rows as `Database.add` would make them, many in one statement."""
    hub = adapterhub.open(root, create=True)
    sketches = [File(digest=digest_of(b"%d" % i), size=2_500_000) for i in range(50)]
    dice, key = random.Random(0), 0
    with hub.index._engine.write() as connection:
        for start in range(0, count, BATCH):
            batch = {table: [] for table in (releases, manifests, blobs, adapters)}
            for n in range(start, min(start + BATCH, count)):
                name = f"user{n % 977}/{dice.choice(WORDS)}-{dice.choice(WORDS)}-{n}"
                sketch = dice.choice(sketches)
                base = Base(
                    name=f"base-{sketch.digest[7:11]}", architecture="llama", structure=sketch.digest, sketch=sketch
                )
                for v in range(versions):
                    key += 1
                    tensors = File(digest=digest_of(b"%d" % key), size=4_000_000)
                    manifest = Manifest(
                        name=name, version=f"0.{v + 1}.0", base=base, method=Made(name="lora", options={"r": 8}),
                        forms={f"model.layers.{i}.self_attn.q_proj": ["low_rank"] for i in range(8)}, files={"tensors": tensors},
                    )  # fmt: skip
                    release = Release(manifest, digest_of(manifest.encode()))
                    batch[releases].append({"id": key, "created": "2026-01-01T00:00:00Z", **rows.columns(release)})
                    batch[manifests].append({"release": key, "data": manifest.encode()})
                    for row in rows.related(manifest)[blobs]:
                        batch[blobs].append({"release": key, **row})
                batch[adapters].append({"name": name, "newest": key, "words": f"{name} lora {base.name} "})
            for table, values in batch.items():
                connection.execute(insert(table), values)
    return hub


def percentiles(work, items) -> tuple[float, float]:
    """Median and 99th percentile, milliseconds."""
    times = []
    for item in items:
        begin = time.perf_counter()
        work(item)
        times.append((time.perf_counter() - begin) * 1e3)
    times.sort()
    return times[len(times) // 2], times[int(len(times) * 0.99)]


def cpu_of(*arguments, cwd) -> float:
    """Processor seconds of a whole command, the median of five."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "adapterhub", *arguments],
            cwd=cwd,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return sorted(found)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--versions", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        hub = build(Path(folder), asked.adapters, asked.versions)
        made = time.perf_counter() - begin
        dice = random.Random(1)
        names = [row.name for row in hub.index.search([], limit=None)]
        chosen = dice.sample(names, 1000)
        print(
            f"{asked.adapters} adapters, {asked.versions * asked.adapters} releases, hub.db {os.path.getsize(Path(folder) / 'hub.db') / 1e6:.0f} MB, built in {made:.0f} s"
        )
        lines = {
            "show a random adapter": percentiles(hub.resolve, chosen),
            "search two words": percentiles(
                lambda _: hub.index.search([dice.choice(WORDS), dice.choice(WORDS)], limit=50), range(100)
            ),
            "search what is not there": percentiles(
                lambda _: hub.index.search(["nothing-of-this"], limit=50), range(100)
            ),
            "search for a base": percentiles(
                lambda i: hub.index.search([], digest_of(b"%d" % (i % 50)), limit=50), range(100)
            ),
            "the first page": percentiles(lambda _: hub.index.releases(limit=200), range(50)),
            "a page in the middle": percentiles(
                lambda name: hub.index.releases(after=(name, "0.1.0"), limit=200), chosen[:50]
            ),
            "a name that is not there": percentiles(
                lambda name: _missing(hub, name), [name + "x" for name in chosen[:50]]
            ),
        }
        print("| in the process | median, ms | 99th percentile, ms |\n|---|---|---|")
        for what, (median, worst) in lines.items():
            print(f"| {what} | {median:.1f} | {worst:.1f} |")
        print("\n| whole process | processor seconds |\n|---|---|")
        print(f"| `list`, first page | {cpu_of('list', cwd=folder):.2f} |")
        print(f"| `show` | {cpu_of('show', names[7], cwd=folder):.2f} |")
        print(json.dumps({what: figures for what, figures in lines.items()}), file=sys.stderr)


def _missing(hub, name) -> None:
    try:
        hub.resolve(name)
        raise AssertionError("it is there")
    except NotFound:
        pass


if __name__ == "__main__":
    main()
