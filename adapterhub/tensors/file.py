"""Tensors from and to safetensors bytes, safely: header checked first, finite values only, the same bytes each time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as _load_bytes
from safetensors.torch import load_file as _load_file
from safetensors.torch import save as _save
from torch import Tensor

from adapterhub.errors import UnsafeFile
from adapterhub.files.safetensors_header import read_header


def load(source: str | Path | bytes, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file, or of its bytes, names sorted.

    Raises what `read_header` raises, and UnsafeFile if a value is NaN or infinite (naming the tensors)."""
    read_header(source)
    if isinstance(source, bytes):
        found = {name: tensor.to(device) for name, tensor in _load_bytes(source).items()}
    else:
        found = _load_file(source, device=str(device))
    check_finite(found)
    # The library gives them in another order at each call, and an optimiser counts parameters by their order.
    return dict(sorted(found.items()))


def dump(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as a safetensors file. Equal names, dtypes and bits give equal bytes, whatever the order, the memory
    layout or the device. Raises UnsafeFile for NaN, infinities and names that `load` would refuse."""
    check_finite(tensors)
    # A copy each, contiguous: the library refuses tensors that share memory (views of one buffer, tied weights).
    own = {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}
    data = _save(own)
    read_header(data)
    return data


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises UnsafeFile if a floating tensor holds NaN or an infinity, naming all such tensors."""
    # float8 has no isfinite of its own; every floating type widens to float32 or is wider.
    bad = [
        name
        for name, tensor in sorted(tensors.items())
        if tensor.is_floating_point() and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()
    ]
    if bad:
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise UnsafeFile(
            f"NaN or infinite values in {names}", "train it again (a lower learning rate) or get a sound copy"
        )
