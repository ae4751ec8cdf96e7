"""The sketch of a model: the shape of every tensor, and a few whole rows of each.

Rows are read by header and pread, so the cost does not grow with the model. A sketch is a safetensors blob: the rows
of each tensor under its name, in the narrowest of bfloat16, float16 and float32 that holds them exactly (that is the
tensor's precision; no rows at all where the numbers are not known), and `__structure__`, the JSON of {name: shape} as bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adapterhub.bases.resolution import cache_folder, weight_files
from adapterhub.errors import AGAIN, HubError, IncompatibleBase, IntegrityError, UnsafeFile
from adapterhub.files import durable
from adapterhub.files.bounded import read_json
from adapterhub.files.safetensors_header import DTYPES, read_layout
from adapterhub.sites import weights
from adapterhub.spec.digest import canonical
from adapterhub.tensors import file as tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

RECIPE = 1
"""Counts the ways a sketch has been taken; part of the cache's key."""
ROWS = 4
WIDTH = 4096
"""Values of a row at most."""
BUDGET = 1 << 21
"""Of a model with many tensors less of each row is kept: about this many values times ROWS in all."""
STRUCTURE = "__structure__"
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")
"""What old checkpoints hold and transformers now computes."""
TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


class Rows(NamedTuple):
    """A tensor seen as rows (all dimensions but the first flattened; one dimension is one row)."""

    shape: tuple[int, ...]
    read: Callable[[list[int], int], Tensor]
    """Indices, values of each -> (indices, values) float32."""


def of_model(model: PreTrainedModel, numbers: bool = False) -> bytes:
    """The sketch of a loaded model: of the tensors as it keeps them. numbers: where a layer's weight is not plain and its numbers are
    known, those in place of all that it keeps, as if it had never been quantised.

    Raises IncompatibleBase for a model on the meta device."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    rows = {name: _rows_of(model, name, tensor) for name, tensor in state.items()}
    for path, module in weights.odd(model).items() if numbers else ():
        with suppress(IncompatibleBase):
            shape = tuple(_numbers(module).shape)
            kept = {name: rows[name] for name in rows if not name.startswith(f"{path}.") or name == f"{path}.bias"}
            rows = {**kept, f"{path}.weight": Rows(shape, partial(_read, partial(_numbers, module)))}
    return take(rows)


def of_folder(folder: Path) -> bytes:
    """The sketch of a checkpoint, from the cache if its files are those that were read before."""
    files = weight_files(folder)
    stats = [(str(file.resolve()), file.stat()) for file in files]
    key = canonical([RECIPE, *([path, s.st_size, s.st_mtime_ns, s.st_ino] for path, s in stats)])
    cached = cache_folder() / "fingerprints" / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
    if cached.is_file():
        sketch = cached.read_bytes()
        with suppress(IntegrityError, UnsafeFile):  # a damaged cache is taken anew
            unpack(sketch)
            return sketch
    with _opened(files) as rows:
        sketch = take(rows)
    with suppress(HubError):  # a cache that cannot be written costs time only
        durable.write_bytes(cached, sketch)
    return sketch


def take(rows: Mapping[str, Rows]) -> bytes:
    """The sketch of named tensors. Names lose what stands before the layers ("model." in one file, nothing in another),
    and matrices that are tied count once."""
    kept = _untied({name: tensor for name, tensor in rows.items() if not BUFFERS.fullmatch(name)})
    if not kept:
        raise IntegrityError("a model without tensors has no fingerprint", "give the folder of a transformers model")
    prefix = _prefix(kept)
    named = {name.removeprefix(prefix): tensor for name, tensor in kept.items()}
    width = max(128, min(WIDTH, BUDGET // len(named) // 128 * 128))
    sketch = {
        name: _narrowest(tensor.read(_pick(name, tensor.shape), ROWS * width if len(tensor.shape) < 2 else width))
        for name, tensor in named.items()
    }
    structure = canonical({name: list(tensor.shape) for name, tensor in named.items()})
    return tensors.dump({**sketch, STRUCTURE: torch.frombuffer(bytearray(structure), dtype=torch.uint8)})


def unpack(sketch: bytes) -> tuple[bytes, dict[str, Tensor]]:
    """The canonical JSON of {name: shape}, and {name: rows}. Raises IntegrityError for what is no sketch."""
    rows = tensors.load(sketch)
    try:
        structure = rows.pop(STRUCTURE).numpy().tobytes()
        shapes = read_json(structure)
    except (KeyError, ValueError, TypeError):
        shapes = None
    if not isinstance(shapes, dict) or shapes.keys() != rows.keys() or not all(t.dim() == 2 for t in rows.values()):
        raise IntegrityError("the record of the base model is damaged", AGAIN)
    return structure, rows


def shapes(sketch: bytes) -> dict[str, list[int]]:
    """{tensor: shape} as a sketch says; what it says is checked only by comparing it with a base. Raises IntegrityError."""
    return read_json(unpack(sketch)[0])


def _pick(name: str, shape: tuple[int, ...]) -> list[int]:
    """ROWS rows of a tensor, one from each quarter, chosen by the sha256 of its name; all where there are fewer."""
    count = shape[0] if len(shape) > 1 else 1
    if count <= ROWS:
        return list(range(count))
    bounds = [count * i // ROWS for i in range(ROWS + 1)]
    digest = hashlib.sha256(name.encode()).digest()
    numbers = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(ROWS)]
    return [low + n % (high - low) for n, low, high in zip(numbers, bounds, bounds[1:], strict=False)]


def _prefix(names: Iterable[str]) -> str:
    """What stands before the layers' own folder in all their names: "model." of "model.layers.0.mlp.up_proj.weight"."""
    layers = {match[1] for name in names if (match := re.match(r"((?:[^.]*\.)*?)[^.]*\.\d+\.", name))}
    return layers.pop() if len(layers) == 1 else ""


def _untied(rows: dict[str, Rows]) -> dict[str, Rows]:
    """Without the copies of tied matrices, which one file holds twice and another once.

    Looked for outside the layers only (embedding and head). The last name stays: the embedding's, not `lm_head`."""
    dropped, seen = set(), {}
    for name in sorted(rows, reverse=True):
        shape = rows[name].shape
        if len(shape) != 2 or any(part.isdigit() for part in name.split(".")):
            continue
        probe = rows[name].read(_pick("", shape), 256)
        if (
            probe.numel()
            and probe.min() < probe.max()
            and seen.setdefault((shape, probe.numpy().tobytes()), name) != name
        ):
            dropped.add(name)
    return {name: tensor for name, tensor in rows.items() if name not in dropped}


def _narrowest(rows: Tensor) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(rows.to(dtype).float(), rows):
            return rows.to(dtype)
    return rows


def _rows_of(model: PreTrainedModel, name: str, tensor: Tensor) -> Rows:
    """Rows of one of a model's tensors; none of one of a kind of its own, whose numbers are not known."""

    def read(indices: list[int], width: int) -> Tensor:
        if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta:
            return _read(tensor.detach, indices, width)
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if tensor.is_meta:
            return _read(partial(_fetched, module, key, name), indices, width)
        try:
            return _read(partial(_numbers, module), indices, width)
        except IncompatibleBase:
            return torch.zeros(0, 0)

    return Rows(tuple(tensor.shape), read)


def _read(tensor: Callable[[], Tensor], indices: list[int], width: int) -> Tensor:
    whole = tensor()
    rows = whole.reshape(whole.shape[0] if whole.dim() > 1 else 1, -1)
    return rows[indices, :width].cpu().float()


def _numbers(module: nn.Module) -> Tensor:
    """What a layer multiplies with, as it would be stored."""
    if weights.widths(module) is None:
        raise IncompatibleBase(f"the numbers of a {type(module).__name__} are not known", "load the base unquantised")
    found = weights.values(module)
    return found.mT if weights.transposed(module) else found


def _fetched(module: nn.Module, key: str, name: str) -> Tensor:
    with weights.fetched(module):
        found = getattr(module, key).detach()
    if found.is_meta:
        raise IncompatibleBase(
            f"the base has no numbers: its {name} is on the meta device",
            "load the base with its weights (from_pretrained)",
        )
    return found


@contextmanager
def _opened(files: list[Path]) -> Iterator[dict[str, Rows]]:
    """The tensors of safetensors files, to be read row by row."""
    with ExitStack() as stack:
        rows = {}
        for path in files:
            handle = stack.enter_context(open(path, "rb")).fileno()
            for name, (dtype, shape, offset) in read_layout(path).items():
                rows[name] = Rows(shape, _reader(handle, dtype, shape, offset))
        yield rows


def _reader(handle: int, dtype: str, shape: tuple[int, ...], offset: int) -> Callable[[list[int], int], Tensor]:
    total = 1
    for n in shape:
        total *= n
    length = total // shape[0] if len(shape) > 1 and shape[0] else total

    def read(indices: list[int], width: int) -> Tensor:
        size, stride = min(width, length) * DTYPES[dtype], length * DTYPES[dtype]
        data = b"".join(os.pread(handle, size, offset + i * stride) for i in indices)
        return torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).reshape(len(indices), -1).float()

    return read
