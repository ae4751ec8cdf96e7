"""ComPEFT: signs of the largest entries and one size for them (Yadav et al., "ComPEFT", 2023), as Rice codes.

By default a tensor has a threshold and a size of its own: one threshold over raw LoRA factors keeps A's random start and
wipes out B, and the mean of the kept magnitudes is the size with the least squared error. The paper has one of each for
the whole adapter: `scope=global`, `size=deviation`, and an alpha that is chosen on held-out data. What stays outside of its
vector here: tensors of fewer than 64 entries, and DoRA's magnitudes; they are kept exactly. And the bytes are
really written: the official code has no encoder.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from adapterhub.errors import AGAIN, CodecError, UsageError
from adapterhub.kinds.codec import SMALL, Codec, Shapes, absolute
from adapterhub.tensors import rice

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
MOST_TENSORS = 65_536
"""As many as a file may hold that is not packed."""
LARGEST_INDEX = 1 << 24
"""Bytes of the index when unpacked: names and shapes of so many tensors."""


class Index(msgspec.Struct, forbid_unknown_fields=True):
    """One entry per tensor in each column; stored as JSON, deflated."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    counts: list[int]
    """Kept entries; -1 for a tensor kept exactly."""
    rice: list[int]
    """Rice parameter of the gaps."""
    sizes: list[int]
    """Bytes in the stream."""


class ComPEFT(Codec):
    """Sparse ternary tensors: about 1.5 bits an entry at density 0.5, 0.94 at 0.2. Two tensors hold everything:
    `compeft.index`, and `compeft.stream` with, per tensor, float32 magnitude, Rice coded gaps and signs."""

    @dataclass(frozen=True)
    class Config:
        density: float = 0.5
        """The share of entries that stay, 0.001 to 1 (all signs). Ties at the threshold all stay."""
        scope: Literal["tensor", "group", "global"] = "tensor"
        """One threshold for each tensor, for all of one kind (all `down`, all `up`), or for the whole adapter."""
        size: Literal["mean", "deviation"] = "mean"
        """What the entries that stay are set to: in each tensor the mean of their magnitudes, or in the whole adapter the
        standard deviation of all its entries, those that are dropped included (the paper's)."""
        alpha: float = 1.0
        """Factor on the size."""

    tolerance = 0.5

    def encode(self, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
        if not 0.001 <= config.density <= 1 or not 0 < config.alpha < float("inf"):
            raise UsageError("compeft needs 0.001 <= density <= 1 and alpha > 0", "for example --set density=0.3")
        index, stream = Index([], [], [], [], [], []), []
        coded = {name: tensor for name, tensor in tensors.items() if _coded(name, tensor)}
        thresholds = _thresholds(coded, config)
        deviation = _deviation(coded.values()) if coded and config.size == "deviation" else None
        for name, tensor in sorted(tensors.items()):
            count, parameter, data = -1, 0, b""
            if name in coded:
                count, parameter, data = _pack(tensor, thresholds[name], config.alpha, deviation)
            elif _dtype(tensor) not in DTYPES:
                raise CodecError(f"compeft cannot carry {name}: {tensor.dtype}", "use another codec")
            else:
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            index.names.append(name)
            index.dtypes.append(_dtype(tensor))
            index.shapes.append(list(tensor.shape))
            index.counts.append(count)
            index.rice.append(parameter)
            index.sizes.append(len(data))
            stream.append(data)
        packed = zlib.compress(msgspec.json.encode(index), 9)
        entries, held = sum(t.numel() for t in tensors.values()), sum(map(len, stream)) + len(packed)
        if entries > rice.most_entries(held):
            raise CodecError(
                f"compeft would pack {entries} entries, almost all zero, into {held} bytes, more than a reader trusts",
                "leave out the tensors that are zero, or use another codec",
            )
        return {"compeft.index": _bytes_tensor(packed), "compeft.stream": _bytes_tensor(b"".join(stream))}

    def gives(self, tensors: Mapping[str, Tensor]) -> Shapes:
        with _refused():
            index, _ = _read(tensors)
            columns = zip(index.names, index.dtypes, index.shapes, strict=True)
            return {name: (DTYPES[dtype], tuple(shape)) for name, dtype, shape in columns}

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with _refused():
            return _decode(*_read(tensors))


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, OverflowError, zlib.error, msgspec.MsgspecError) as error:
        raise CodecError(f"these are not tensors of compeft: {error}", AGAIN) from None


def _read(tensors: Mapping[str, Tensor]) -> tuple[Index, bytes]:
    """The index, checked against itself and against how many entries so many bytes may stand for; and the stream."""
    packed = _tensor_bytes(tensors["compeft.index"])
    stream = _tensor_bytes(tensors["compeft.stream"])
    inflate = zlib.decompressobj()
    told = inflate.decompress(packed, LARGEST_INDEX)
    if len(tensors) != 2 or not inflate.eof or inflate.unused_data:
        raise ValueError("the index is too large or cut off, or other tensors stand beside it")
    if told.count(b",") + told.count(b"[") > 16 * MOST_TENSORS:  # before JSON makes objects of it
        raise ValueError(f"the index names more than {MOST_TENSORS} tensors")
    index = msgspec.json.decode(told, type=Index)
    shapes = index.shapes
    if any(len(shape) > 8 or min(shape, default=0) < 0 for shape in shapes):
        raise ValueError("a shape is none")
    if len(set(index.names)) != len(index.names):
        raise ValueError("a name stands twice")
    if len({*map(len, (index.names, index.dtypes, shapes, index.counts, index.rice, index.sizes))}) != 1:
        raise ValueError("its columns are not of one length")
    entries = sum(math.prod(shape) for shape in shapes)
    if entries > rice.most_entries(len(packed) + len(stream)):
        raise ValueError(f"{len(packed) + len(stream)} bytes claim to be {entries} entries")
    return index, stream


def _decode(index: Index, stream: bytes) -> dict[str, Tensor]:
    decoded, start = {}, 0
    for name, dtype, shape, count, parameter, size in zip(
        index.names, index.dtypes, index.shapes, index.counts, index.rice, index.sizes, strict=True
    ):
        data, number = stream[start : start + max(size, 0)], math.prod(shape)
        start += len(data)
        if len(data) != size:
            raise ValueError("the stream ends early")
        kind = DTYPES[dtype]
        flat = _exact(data, kind, number) if count < 0 else _unpack(data, kind, parameter, count, number)
        if flat.is_floating_point() and not flat.isfinite().all():
            raise ValueError(f"{name} is not finite")
        decoded[name] = flat.reshape(shape)
    if start != len(stream):
        raise ValueError("bytes are left over")
    return decoded


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _coded(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() >= SMALL and not absolute(name)


def _thresholds(tensors: Mapping[str, Tensor], config: ComPEFT.Config) -> dict[str, float]:
    """The smallest magnitude that stays, by name."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        group = {"tensor": name, "group": name.rpartition(".")[2], "global": ""}[config.scope]
        groups.setdefault(group, []).append(name)
    thresholds = {}
    for names in groups.values():
        magnitudes = np.concatenate([np.abs(_values(tensors[name])) for name in names])
        place = len(magnitudes) - max(1, round(config.density * len(magnitudes)))
        thresholds.update(dict.fromkeys(names, np.partition(magnitudes, place)[place]))
    return thresholds


def _deviation(tensors: Iterable[Tensor]) -> float:
    """The standard deviation of all entries, as the official code takes it: divided by one less than their number."""
    values = [_values(tensor) for tensor in tensors]
    count = sum(map(len, values))
    middle = sum(part.sum(dtype=np.float64) for part in values) / count
    return math.sqrt(sum(np.square(part - middle, dtype=np.float64).sum() for part in values) / (count - 1))


def _pack(tensor: Tensor, threshold: float, alpha: float, size: float | None) -> tuple[int, int, bytes]:
    """(count, Rice parameter, bytes); size None: the mean of the kept magnitudes, which has the least squared error."""
    values = _values(tensor)
    positions = np.flatnonzero((np.abs(values) >= threshold) & (values != 0))
    if not len(positions):
        return 0, 0, b""
    kept = values[positions]
    parameter, data = rice.encode(positions, kept < 0)
    magnitude = np.float32(alpha * (np.abs(kept).mean(dtype=np.float64) if size is None else size))
    return len(positions), parameter, magnitude.astype("<f4").tobytes() + data


def _unpack(data: bytes, dtype: torch.dtype, parameter: int, count: int, entries: int) -> Tensor:
    values = np.zeros(entries, dtype=np.float32)
    if count:
        positions, negative = rice.decode(data[4:], parameter, count, entries)
        magnitude = np.frombuffer(data[:4], dtype="<f4")[0]
        values[positions] = np.where(negative, -magnitude, magnitude)
    elif data:
        raise ValueError("bytes for a tensor of zeros")
    return torch.from_numpy(values).to(dtype)


def _exact(data: bytes, dtype: torch.dtype, entries: int) -> Tensor:
    if len(data) != entries * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {entries} entries of {dtype}")
    return _bytes_tensor(data).view(dtype)


def _values(tensor: Tensor) -> np.ndarray:
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide.detach().cpu().reshape(-1).numpy()


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _tensor_bytes(tensor: Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ValueError("the index and the stream are bytes")
    return tensor.contiguous().numpy().tobytes()
