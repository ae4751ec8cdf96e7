"""Rice codes of where the kept entries stand (Golomb, 1966; Rice, 1979), whole tensors at a time. numpy only."""

from __future__ import annotations

import numpy as np

LARGEST_PARAMETER = 24


def most_entries(size: int) -> int:
    """How many entries we believe that this many bytes stand for: what a hostile file may make a reader allocate."""
    return 1024 * size + (1 << 24)


def encode(positions: np.ndarray, negative: np.ndarray) -> tuple[int, bytes]:
    """(parameter b, bytes) of rising positions and their signs: all quotients of the gaps by 2^b in unary (zeros, then
    a one), then all remainders in b bits, then a bit for each sign. The b with the fewest bits is taken."""
    if not len(positions):
        return 0, b""
    gaps = np.diff(positions, prepend=-1) - 1
    b = min(range(LARGEST_PARAMETER + 1), key=lambda b: int((gaps >> b).sum()) + len(gaps) * b)
    ends = np.cumsum((gaps >> b) + 1)
    unary = np.zeros(ends[-1], dtype=np.uint8)
    unary[ends - 1] = 1
    remainders = (gaps[:, None] >> np.arange(b)[::-1] & 1).astype(np.uint8)
    return b, np.packbits(np.concatenate([unary, remainders.reshape(-1), negative.astype(np.uint8)])).tobytes()


def decode(data: bytes, b: int, count: int, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, negative) of `count` entries among `entries`. Raises ValueError for bytes that no encoder writes."""
    if not 0 <= b <= LARGEST_PARAMETER or not 0 <= count <= entries:
        raise ValueError(f"{count} kept of {entries} entries with parameter {b}")
    unary = count + (entries >> b)
    """Bits of the quotients at most: the gaps add up to less than the entries."""
    if len(data) > unary + count * (b + 1) + 7 >> 3:  # before a byte of it becomes eight
        raise ValueError(f"the stream holds {len(data)} bytes for {count} entries")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    ends = np.flatnonzero(bits[:unary])[:count]
    if len(ends) < count:
        raise ValueError("the stream ends early")
    start = int(ends[-1]) + 1 if count else 0
    signs = start + count * b
    if len(data) != -(-(signs + count) // 8) or bits[signs + count :].any():
        raise ValueError(f"the stream holds {len(data)} bytes for {count} entries")
    remainders = np.zeros(count, dtype=np.int64)
    for place in range(b):
        remainders = (remainders << 1) | bits[start + place : signs : b]
    positions = np.cumsum((np.diff(ends, prepend=-1) - 1 << b) + remainders + 1) - 1
    if count and positions[-1] >= entries:
        raise ValueError(f"an entry stands at {positions[-1]} of {entries}")
    return positions, bits[signs : signs + count].astype(bool)
