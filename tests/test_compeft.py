"""ComPEFT as the paper has it: one threshold and one size for the whole adapter, in the same file (Yadav et al., 2023)."""

import math
import struct
import zlib

import pytest
import torch

from adapterhub.codecs.compeft import ComPEFT

SITE = "model.layers.0.self_attn.q_proj.low_rank.0"
SIGNS = torch.tensor([1.0, -1.0]).repeat(32)
DOWN, UP = 0.5 * SIGNS, SIGNS * torch.tensor([1.0, 1.0, 3.0, 3.0]).repeat(16)
DEVIATION = math.sqrt(336 / 127)
"""By hand: 128 entries, 64 of ±0.5, 32 of ±1, 32 of ±3; their mean is 0 and their squares add up to 16 + 32 + 288."""


def there_and_back(tensors, **options):
    return ComPEFT().decode(ComPEFT().encode(tensors, ComPEFT.Config(**options)))


def lora():
    return {f"{SITE}.down": DOWN.reshape(4, 16), f"{SITE}.up": UP.reshape(16, 4), f"{SITE}.scale": torch.tensor(2.0)}


def test_alpha_times_the_deviation_of_all_entries_on_the_signs_of_the_largest():
    decoded = there_and_back(lora(), density=0.25, scope="global", size="deviation", alpha=4.0)
    assert decoded[f"{SITE}.down"].count_nonzero() == 0  # the largest quarter are the ±3
    wanted = torch.where(UP.abs() == 3, UP.sign(), 0.0).double() * 4 * DEVIATION
    torch.testing.assert_close(decoded[f"{SITE}.up"].reshape(-1), wanted.float(), rtol=1e-7, atol=0)
    assert decoded[f"{SITE}.scale"] == 2.0  # a number beside the change, no part of it


def test_the_size_is_the_whole_adapters_where_each_tensor_has_a_threshold_of_its_own():
    decoded = there_and_back(lora(), density=0.5, size="deviation")
    for name, kept in (("down", DOWN), ("up", torch.where(UP.abs() == 3, UP, 0.0))):
        wanted = (kept.sign().double() * DEVIATION).float()
        torch.testing.assert_close(decoded[f"{SITE}.{name}"].reshape(-1), wanted, rtol=1e-7, atol=0)


def test_the_mean_of_the_entries_is_taken_off():
    """As torch.std does over one vector of all tensors; in bfloat16, where a sum of squares in float32 would not do."""
    torch.manual_seed(0)
    tensors = {f"{SITE}.{name}": (100 + torch.randn(30, 30)).to(torch.bfloat16) for name in ("down", "up")}
    decoded = there_and_back(tensors, density=1.0, size="deviation")
    wanted = torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()]).std().to(torch.bfloat16)
    assert all(tensor.eq(wanted).all() for tensor in decoded.values())


@pytest.mark.parametrize("tensors", [{}, {f"{SITE}.scale": torch.tensor(2.0)}, {f"{SITE}.down": torch.zeros(8, 16)}])
def test_nothing_to_measure(tensors):
    decoded = there_and_back(tensors, scope="global", size="deviation")
    assert decoded.keys() == tensors.keys() and all(torch.equal(decoded[name], tensors[name]) for name in tensors)


def test_a_file_of_an_earlier_version_decodes_to_what_it_did():
    """Written by hand: the index as deflated JSON; in the stream the size 0.5, then one entry, the third, negative. Two entries
    are passed over: 0 in unary is "1", 2 in two bits is "10"; then the sign, "1"."""
    index = b'{"names":["x"],"dtypes":["float32"],"shapes":[[2,32]],"counts":[1],"rice":[2],"sizes":[5]}'
    stream = struct.pack("<f", 0.5) + bytes([0b1101_0000])
    stored = {"compeft.index": zlib.compress(index), "compeft.stream": stream}
    decoded = ComPEFT().decode({k: torch.frombuffer(bytearray(v), dtype=torch.uint8) for k, v in stored.items()})
    wanted = torch.zeros(64)
    wanted[2] = -0.5
    assert torch.equal(decoded["x"], wanted.reshape(2, 32))
