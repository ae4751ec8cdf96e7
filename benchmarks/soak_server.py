"""A registry in a process of its own, for the long runs, and how its answers are timed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

import httpx  # noqa: E402

TOKEN = "the-token-of-the-soak"
WRITE = {"authorization": f"Bearer {TOKEN}"}
MB = 1 << 20


@dataclass
class Served:
    """A registry in a process of its own."""

    url: str
    process: subprocess.Popen

    def status(self, field: str) -> int:
        """Bytes, of /proc: VmRSS, VmHWM (the most that it ever was)."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) << 10

    def files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def served(root: Path, *options: str) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "adapterhub", "registry", "serve"]
    command = [*serve, "--hub", str(root), "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, "ADAPTERHUB_REGISTRY_TOKEN": TOKEN}, stderr=log)
        try:
            one = Served(f"http://127.0.0.1:{port}", process)
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{one.url}/v1/").status_code == 200:
                        break
                time.sleep(0.1)
            else:
                log.seek(0)
                raise AssertionError(log.read().decode())
            yield one
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError("the server does not end") from None


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """A folder, and a token to push with; short pauses between tries."""
    with (
        patch.dict(os.environ, {"ADAPTERHUB_TOKEN": TOKEN}),
        tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder,
    ):
        yield Path(folder)


def milliseconds(times: list[float]) -> str:
    times = sorted(times)
    return f"p50 {times[len(times) // 2] * 1e3:.1f} ms, p99 {times[int(len(times) * 0.99)] * 1e3:.1f} ms"


def timed(work, items) -> list[float]:
    found = []
    for item in items:
        begin = time.perf_counter()
        work(item)
        found.append(time.perf_counter() - begin)
    return found
