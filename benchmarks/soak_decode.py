"""Fault D3 of the catalogue: damaged headers, manifests and codec containers, in a child process that may take 2 GB.

    python benchmarks/soak_decode.py [--seconds 3600] [--flips 5000] [--seed 0]

Each case is one sound file with one bit flipped or one number replaced. It is refused with a HubError, or it is another value, whose
digest is another; a crash, five seconds of computing or memory beyond the limit end the child, which fails the run."""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator

LIMIT = 2 << 30
"""Bytes of heap and private memory."""
HANG = 5
"""Seconds of computing that one case may take."""
NUMBERS = (b"-1", b"0", b"65536", b"2147483648", b"9223372036854775807", b"18446744073709551616", b"1e400", b"[]")


def d3(seconds: float = 3600, flips: int | None = None, seed: int = 0) -> dict[str, dict[str, int]]:
    """{what: {"refused": cases, "another": cases}} of one child; raises RuntimeError where a case broke it.

    seconds: how long it goes on; flips: end after so many cases of each kind instead."""
    command = [sys.executable, __file__, "--child", "--seconds", str(seconds), "--seed", str(seed)]
    command += [] if flips is None else ["--flips", str(flips)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.splitlines() or ["no words"])[-1]
        raise RuntimeError(f"the child ended with {done.returncode}: {last}; {done.stdout[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


SOAK = {"D3": d3}


def _kinds() -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """{what: (a sound file, how it is read)}."""
    from adapterhub import plugins
    from adapterhub.adapters.adapter import modifications_of
    from adapterhub.adapters.decoding import SPARE, decode
    from adapterhub.errors import CodecError
    from adapterhub.files.safetensors_header import read_header
    from adapterhub.kinds.contracts import make
    from adapterhub.spec.digest import digest_of
    from adapterhub.spec.manifest import Base, File, Made, Manifest
    from adapterhub.tensors.file import dump, load
    from adapterhub.testing.codecs import sample

    base = Base(
        name="tiny", architecture="llama", structure=digest_of(b"s"), sketch=File(digest=digest_of(b""), size=0)
    )
    tensors = sample()

    def manifest(decoded: dict) -> Manifest:
        forms: dict[str, list[str]] = {}
        for path, form, *_ in sorted({tuple(name.rsplit(".", 3)[:3]) for name in decoded}):
            forms.setdefault(path, []).append(form)
        return Manifest(
            name="me/x", version="0.1.0", base=base, forms=forms, method=Made(name="lora", options={"rank": 8}),
            recipe={"data": {"digest": digest_of(b"d"), "rows": 9}, "steps": 10}, metrics={"train_loss": 0.25},
        )  # fmt: skip

    kinds: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
        "header": (dump(tensors), read_header),
        "manifest": (manifest(tensors).encode(), Manifest.decode),
    }
    for name in plugins.names("codecs"):
        cls = plugins.load("codecs", name)
        try:
            encoded = make(cls).encode(tensors, cls.Config())
        except CodecError:
            continue
        record = manifest(make(cls).decode(encoded))

        def read(data: bytes, cls: type = cls, name: str = name, record: Manifest = record) -> object:
            decoded = decode([(name, make(cls))], load(data), record, SPARE)
            return modifications_of(decoded, record)

        kinds[f"codec {name}"] = dump(encoded), read
        if name == "compeft":  # a bit of a deflated index is mostly its checksum: what is inside is changed too
            index = zlib.decompress(encoded["compeft.index"].numpy().tobytes())

            def packed(data: bytes, stream: object = encoded["compeft.stream"], read: Callable = read) -> object:
                import torch

                body = torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8)
                return read(dump({"compeft.index": body, "compeft.stream": stream}))

            kinds["codec compeft, index"] = index, packed
    return kinds


def damaged(data: bytes, dice: random.Random) -> bytes:
    """One bit flipped, or, one time in four, a number in its text replaced."""
    numbers = list(re.finditer(rb"(?<=[:,\[])\d+", data[: 1 << 16])) if dice.random() < 0.25 else []
    if numbers:
        hit = dice.choice(numbers)
        return data[: hit.start()] + dice.choice(NUMBERS) + data[hit.end() :]
    flipped = bytearray(data)
    bit = dice.randrange(8 * len(data))
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def _cases(seconds: float, flips: int | None) -> Iterator[int]:
    end, number = time.monotonic() + seconds, 0
    while number < flips if flips is not None else time.monotonic() < end:
        yield number
        number += 1


def _child(seconds: float, flips: int | None, seed: int) -> None:
    import warnings

    from adapterhub.errors import HubError

    warnings.simplefilter("ignore")
    kinds, dice, found = _kinds(), random.Random(seed), {}
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    for what, (data, read) in kinds.items():
        read(data)
        found[what] = {"refused": 0, "another": 0}
    for _ in _cases(seconds, flips):
        for what, (data, read) in kinds.items():
            case = damaged(data, dice)
            signal.setitimer(signal.ITIMER_VIRTUAL, HANG)  # its signal ends the process
            try:
                read(case)
            except HubError:
                found[what]["refused"] += 1
            except BaseException:
                print(f"broken by a case of {what}, seed {seed}: {case[:400]!r}", flush=True)
                raise
            else:
                found[what]["another"] += case != data
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--flips", type=int, default=None, help="So many cases of each kind instead.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return _child(asked.seconds, asked.flips, asked.seed)
    for what, counts in d3(asked.seconds, asked.flips, asked.seed).items():
        print(f"{what:<24}{counts['refused']:>10} refused {counts['another']:>10} another value")


if __name__ == "__main__":
    main()
