"""The header of a safetensors file, read without the library and under limits of our own.

The library (0.8) accepts names such as `../../etc/x`, control characters, 50 MB of metadata, a million empty tensors
and duplicate keys. Everything here is refused before the library sees the file, in under a second and little memory.
Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian length, JSON, data).
"""

from __future__ import annotations

import json
import os
import re
import stat
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from adapterhub.errors import IntegrityError, NotFound, UnsafeFile

MAX_HEADER = 8 << 20
MAX_TENSORS = 65_536
MAX_METADATA = 64 << 10
MAX_NAME = 512
MAX_RANK = 8
NAME = re.compile(r"[A-Za-z0-9_.\-]+")
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per value of every dtype that we read."""
AGAIN = "get the file again from its source"
SUSPECT = "do not use this file; get the adapter from a source you trust"


class Entry(NamedTuple):
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""


def read_header(source: str | Path | bytes, size: int | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (dtype, shape)} of a safetensors file (or its bytes), names sorted.

    size: of the whole file, when only its beginning is given as bytes (`extent` tells how much of it is needed).

    Raises NotFound, IntegrityError for bytes that are not what the header says (truncated, holes, overlaps), and
    UnsafeFile for what we refuse to open: pickle, or a header beyond our limits."""
    return {name: (entry.dtype, entry.shape) for name, entry in read_layout(source, size).items()}


def extent(start: bytes) -> int:
    """How many bytes of a file its header takes, told by its first eight; at most what we read of one."""
    return 8 + min(int.from_bytes(start[:8], "little"), MAX_HEADER)


def read_layout(source: str | Path | bytes, size: int | None = None) -> dict[str, Entry]:
    """The same with each tensor's place in the file."""
    if isinstance(source, bytes):
        return _read(BytesIO(source), len(source) if size is None else size, "the tensors")
    try:
        mode = os.stat(source).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe would wait for its writer
            raise UnsafeFile(f"{source} is no plain file", SUSPECT)
        with open(source, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, Path(source).name)
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"there is no file {source}", "check the path") from None


class _Refusals(NamedTuple):
    """The two ways to refuse a file, by its name for the user."""

    label: str

    def damaged(self, problem: str) -> NoReturn:
        raise IntegrityError(f"{self.label} is not a sound safetensors file: {problem}", AGAIN)

    def unsafe(self, problem: str) -> NoReturn:
        raise UnsafeFile(f"{self.label} is refused: {problem}", SUSPECT)


def _read(file: BinaryIO, size: int, label: str) -> dict[str, Entry]:
    refuse = _Refusals(label)
    header, data_at = _header(file, size, refuse)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        refuse.damaged("its metadata are not texts")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA:
        refuse.unsafe(f"its metadata have more than {MAX_METADATA} bytes")
    if len(header) > MAX_TENSORS:
        refuse.unsafe(f"it names {len(header)} tensors (at most {MAX_TENSORS})")

    spans, entries = [], {}
    for name in sorted(header):
        dtype, shape, begin, end = _tensor(name, header[name], refuse)
        spans.append((begin, end, name))
        entries[name] = Entry(dtype, shape, data_at + begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            refuse.damaged(f"{name} begins at byte {begin} of the data instead of {position}")
        position = end
    if position != size - data_at:
        refuse.damaged(f"it has {size - data_at} bytes of data where its tensors need {position}")
    return entries


def _header(file: BinaryIO, size: int, refuse: _Refusals) -> tuple[dict[str, Any], int]:
    """The header as JSON has it, no larger than it may be, and where the data begin."""
    start = file.read(9)
    if start[8:] != b"{" and (start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")):
        refuse.unsafe("it is a pickle, which can run code when opened (only safetensors are read)")
    if len(start) < 9:
        refuse.damaged(f"it has {size} bytes")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        refuse.damaged("it ends before its header does")
    if length > MAX_HEADER:
        refuse.unsafe(f"its header has {length} bytes (at most {MAX_HEADER})")
    if start[8:] != b"{":
        refuse.damaged("its header does not begin with {")
    text = b"{" + file.read(length - 1)
    if len(text) != length:
        refuse.damaged("it ends before its header does")
    # Before JSON makes objects of it: a tensor takes at most 25 of these marks, and nothing takes memory without them.
    if sum(map(text.count, (b"{", b"[", b",", b'"'))) > 25 * MAX_TENSORS + MAX_METADATA:
        refuse.unsafe(f"it names more than {MAX_TENSORS} tensors")
    try:
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_refuse)
    except RecursionError:
        refuse.unsafe("its header is nested too deeply")
    except ValueError as error:
        refuse.damaged(f"its header is not valid: {error}")
    if type(header) is not dict:
        refuse.damaged("its header is not a table")
    return header, 8 + length


def _tensor(name: str, value: Any, refuse: _Refusals) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one tensor, which agree with each other."""
    if len(name) > MAX_NAME or not NAME.fullmatch(name) or ".." in name:
        refuse.unsafe(f"it names a tensor {name[:60]!a}")
    dtype, shape, begin, end = _entry(value) or refuse.damaged(f"the entry of {name} is malformed")
    if dtype not in DTYPES:
        refuse.unsafe(f"{name} has the unknown dtype {dtype[:20]!a}")
    if len(shape) > MAX_RANK:
        refuse.unsafe(f"{name} has {len(shape)} dimensions (at most {MAX_RANK})")
    count = DTYPES[dtype]
    for n in shape:
        count *= n
    if end - begin != count:
        refuse.damaged(f"{name} has {end - begin} bytes where its shape needs {count}")
    return dtype, shape, begin, end


def _entry(value: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    """dtype, shape, begin and end of one header entry; None if it is malformed."""
    if type(value) is not dict or value.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        return None
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in [*shape, *offsets]):
        return None
    return dtype, tuple(shape), *offsets


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not a whole number")
