"""Files in parts: a tensor file is stored as its header, its large tensors and what lies between, each a blob.

So a tensor that several adapters share is stored, sent and hashed once, whatever else their files hold, and parts
travel side by side. The list of parts is a blob too, and its digest names the file: one digest vouches for all bytes.
"""

from __future__ import annotations

from itertools import pairwise

from adapterhub.errors import AGAIN, IntegrityError
from adapterhub.files.bounded import read_json
from adapterhub.files.safetensors_header import MAX_TENSORS, read_layout
from adapterhub.spec.digest import canonical, check_digest
from adapterhub.spec.manifest import File

LARGE = 64 << 10
"""Bytes from which on a tensor is a part of its own."""
LARGEST_LIST = 16 << 20
"""Bytes of a list of parts, at most."""


def cuts(content: bytes) -> list[tuple[int, int]]:
    """(start, end) of each part of a safetensors file: the header, every large tensor, the runs of small ones between.

    One part, the whole, when no tensor is large. Raises what `read_layout` raises."""
    size = len(content)
    if size <= LARGE:
        return [(0, size)]
    starts = [*sorted({entry.offset for entry in read_layout(content).values()}), size]
    marks = {0, size}
    for start, end in pairwise(starts):
        if end - start >= LARGE:
            marks |= {starts[0], start, end}
    edges = sorted(marks)
    return list(pairwise(edges))


def encode(parts: list[File]) -> bytes:
    """The list as a blob."""
    return canonical([[part.digest, part.size] for part in parts])


def decode(data: bytes, file: File) -> list[File]:
    """The parts of `file`, whose list this is. Raises IntegrityError for what is no list of its parts."""
    try:
        found = read_json(data, LARGEST_LIST)
        if type(found) is not list or not 1 < len(found) <= 2 * MAX_TENSORS:
            raise ValueError("it has no parts, or too many")
        parts = [File(digest=check_digest(digest), size=size) for digest, size in found]
        if any(type(part.size) is not int or part.size <= 0 for part in parts):
            raise ValueError("a size is no number")
        if sum(part.size for part in parts) != file.size:
            raise ValueError("the sizes do not add up")
        if encode(parts) != data:
            raise ValueError("it is not written canonically")
    except Exception as error:
        raise IntegrityError(
            f"{file.digest} is no list of the parts of a file of {file.size} bytes: {error}",
            AGAIN,
        ) from None
    return parts
