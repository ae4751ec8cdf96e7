"""Where and in what precision a model computes, and what to say when memory runs out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adapterhub.errors import HubError, UsageError
from adapterhub.plugins.boundary import out_of_memory


def default_device(text: str | torch.device = "auto") -> torch.device:
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:n`. Raises UsageError for a device that is not there."""
    text = str(text)
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UsageError(f"unknown device {text!r}", "use auto, cpu, cuda or cuda:0")
    device = torch.device(text)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"there is no device {text}: this machine has {count} CUDA devices", "use --device auto or cpu"
        )
    return device


def precision(dtype: str, device: str) -> str:
    """`auto` is bfloat16 on a CUDA device that has it, where it is faster and half the size; else float32: on CPUs
    bfloat16 trains no faster (docs/evidence/performance.md). Any other dtype is itself."""
    if dtype != "auto":
        return dtype
    fast = default_device(device).type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if fast else "float32"


@contextmanager
def memory_told(hint: str) -> Iterator[None]:
    """A device out of memory, in the user's words."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise HubError(f"out of memory: {str(error).splitlines()[0]}", f"try {hint}") from None
        raise
