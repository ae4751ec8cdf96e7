"""Cold install of an 84 MB adapter from a hub on the same disk, against reading its files and hashing them.

    python benchmarks/cold_install.py [--rounds 7] [--folder DIR]

Each round drops the files from the page cache (posix_fadvise) before the reading and before the install, and installs into
a hub that is empty. Reading and hashing are the floor: whoever installs must do both at least once."""

import argparse
import hashlib
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import adapterhub
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest

TENSORS, EACH = 420, 200_000


def tensor_file() -> bytes:
    """420 tensors of 200,000 bytes, as the format's definition says."""
    header = {
        f"model.layers.{i // 14}.m{i % 14}.low_rank.0.down": {
            "dtype": "U8", "shape": [EACH], "data_offsets": [i * EACH, (i + 1) * EACH],
        }
        for i in range(TENSORS)
    }  # fmt: skip
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + random.Random(0).randbytes(TENSORS * EACH)


def drop(paths: list[Path]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default=None, help="Where; it must lie on the disk that is meant.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        root = Path(folder)
        source = adapterhub.open(root / "source", create=True)
        base = Base(name="b", architecture="llama", structure=digest_of(b"s"), sketch=File(digest="", size=0))
        draft = Manifest(name="me/large", version="0.0.0", base=base, method=Made(name="lora"))
        release = source.publish(draft, {"tensors": tensor_file()}, b"rows")[0]
        source.export_bundle("me/large", root / "bundle")
        blobs = [source.store.path(b.digest) for file in release.manifest.needs for b in source.store.blobs(file)]
        bundled = [path for path in (root / "bundle").rglob("*") if path.is_file()]
        figures: dict[str, list[float]] = {
            "read": [],
            "hash": [],
            "install": [],
            "bundle": [],
            "ratio": [],
            "bundle ratio": [],
        }
        os.sync()
        for turn in range(asked.rounds):
            drop(blobs)
            data: list[bytes] = []
            read = timed(lambda data=data: data.extend(path.read_bytes() for path in blobs))
            hashing = timed(lambda data=data: [hashlib.sha256(one).digest() for one in data])
            data.clear()
            hubs = [adapterhub.open(root / f"{kind}{turn}", create=True) for kind in ("hub", "other")]
            drop(blobs)
            install = timed(lambda hubs=hubs: hubs[0].install(f"{source.root}:me/large"))
            drop(bundled)
            bundle = timed(lambda hubs=hubs: hubs[1].install(root / "bundle"))
            floor = max(read, hashing)
            for name, value in zip(
                figures, (read, hashing, install, bundle, install / floor, bundle / floor), strict=True
            ):
                figures[name].append(value)
        middle = {name: statistics.median(values) for name, values in figures.items()}
        print(f"84 MB in {TENSORS} tensors, medians of {asked.rounds} rounds")
        print("| | seconds | over the larger of reading and hashing |\n|---|---|---|")
        print(f"| reading its files, one after the other | {middle['read']:.3f} | |")
        print(f"| hashing them (sha256, one thread) | {middle['hash']:.3f} | |")
        print(f"| install from a hub on the same disk | {middle['install']:.3f} | {middle['ratio']:.2f} |")
        print(f"| install from a bundle (copied and synced) | {middle['bundle']:.3f} | {middle['bundle ratio']:.2f} |")


if __name__ == "__main__":
    main()
