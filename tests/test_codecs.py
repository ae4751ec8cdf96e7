"""Codecs: the laws over every installed one, and numbers from outside: the Golomb formula, slow decoders, dense SVDs."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub import plugins
from adapterhub.codecs.compeft import ComPEFT
from adapterhub.codecs.int8 import Int8
from adapterhub.codecs.svd import SVD
from adapterhub.codecs.topk import TopK
from adapterhub.errors import CodecError, UsageError
from adapterhub.tensors import rice
from adapterhub.tensors.file import dump
from adapterhub.testing import check_part
from adapterhub.testing.codecs import sample

SITE = "model.layers.0.self_attn.q_proj.low_rank.0"


def compeft(tensors, **options):
    encoded = ComPEFT().encode(tensors, ComPEFT.Config(**options))
    return encoded, ComPEFT().decode(encoded)


@pytest.mark.parametrize("name", plugins.names("codecs"))
def test_laws(name):
    results = check_part("codecs", name)
    assert len(results) == 9
    assert [r for r in results if r.verdict != "passed"] == []


# --- Rice codes ----------------------------------------------------------------------------------------------------


def slowly(data, b, count):
    """The format read bit by bit, as its docstring words it."""
    bits = [byte >> k & 1 for byte in data for k in range(7, -1, -1)]
    quotients, at = [], 0
    for _ in range(count):
        zeros = bits.index(1, at) - at
        quotients.append(zeros)
        at += zeros + 1
    positions, place = [], -1
    for quotient in quotients:
        remainder = int("0" + "".join(map(str, bits[at : at + b])), 2)
        at += b
        place += (quotient << b) + remainder + 1
        positions.append(place)
    return positions, [bool(bit) for bit in bits[at : at + count]], at + count


@settings(deadline=None, max_examples=200)
@given(st.sets(st.integers(0, 3000)), st.integers(0, 2**32))
def test_rice_codes_come_back(places, seed):
    positions = np.array(sorted(places), dtype=np.int64)
    negative = np.random.default_rng(seed).random(len(positions)) < 0.5
    b, data = rice.encode(positions, negative)
    got, signs = rice.decode(data, b, len(positions), 3001)
    assert np.array_equal(got, positions) and np.array_equal(signs, negative)
    places, slow_signs, used = slowly(data, b, len(positions))
    assert places == positions.tolist() and slow_signs == negative.tolist()
    assert len(data) == math.ceil(used / 8)


def test_rice_refuses_what_no_encoder_writes():
    b, data = rice.encode(np.array([3, 90]), np.array([True, False]))
    for case in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError):
            rice.decode(case, b, 2, 100)
    with pytest.raises(ValueError, match="stands at 90 of 90"):
        rice.decode(data, b, 2, 90)
    for parameter, count in ((-1, 2), (60, 2), (b, -1), (b, 101)):
        with pytest.raises(ValueError):
            rice.decode(data, parameter, count, 100)


# --- ComPEFT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_bytes_are_those_of_the_golomb_formula(density):
    torch.manual_seed(0)
    encoded, _ = compeft({f"{SITE}.up": torch.randn(1000, 500)}, density=density)
    golden, empty = (1 + 5**0.5) / 2, 1 - density
    b = 1 + math.floor(math.log(math.log(golden - 1) / math.log(empty), 2))
    wanted = density * (b + 1 / (1 - empty ** (2**b)) + 1)  # bits an entry: remainder, quotient, sign
    bits = 8 * len(encoded["compeft.stream"]) / 500_000
    assert bits == pytest.approx(wanted, rel=0.02)
    assert len(encoded["compeft.index"]) < 200


def test_signs_of_the_largest_and_their_mean():
    torch.manual_seed(1)
    values = torch.randn(40, 25, dtype=torch.float64).to(torch.float32)
    _, decoded = compeft({f"{SITE}.up": values}, density=0.2)
    kept = values.abs().flatten().topk(200).indices
    wanted = torch.zeros(1000, dtype=torch.float64)
    wanted[kept] = values.flatten()[kept].sign().double() * values.abs().flatten()[kept].double().mean()
    assert torch.equal(decoded[f"{SITE}.up"], wanted.float().reshape(40, 25))
    # No other magnitude is nearer in the least-squares sense.
    got = decoded[f"{SITE}.up"]
    assert all((values - got).norm() < (values - factor * got).norm() for factor in (0.98, 1.02))


def test_alpha_multiplies_the_magnitude():
    tensors = {f"{SITE}.up": torch.randn(30, 30, generator=torch.Generator().manual_seed(2))}
    one, two = compeft(tensors)[1], compeft(tensors, alpha=2.0)[1]
    assert torch.equal(two[f"{SITE}.up"], 2 * one[f"{SITE}.up"])


def test_one_threshold_for_all_wipes_out_small_factors_and_the_default_does_not():
    torch.manual_seed(3)
    tensors = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn.q_proj.low_rank.0"
        tensors[f"{prefix}.down"] = torch.randn(8, 64)
        tensors[f"{prefix}.up"] = torch.randn(64, 8) * 0.01 * (1 + layer)

    def densities(scope):
        _, decoded = compeft(tensors, density=0.2, scope=scope)
        return [float((decoded[name] != 0).float().mean()) for name in sorted(tensors)]

    down0, up0, down1, up1 = densities("global")
    assert up0 == up1 == 0 and down0 + down1 == pytest.approx(0.8, abs=0.01)
    down0, up0, down1, up1 = densities("group")
    assert 0 < up0 < up1 and up0 + up1 == pytest.approx(0.4, abs=0.01)
    assert densities("tensor") == pytest.approx([0.2] * 4, abs=0.002)


def test_ties_constants_zeros_and_all_signs():
    ternary = torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0] * 40)
    tensors = {
        f"{SITE}.ternary": ternary,  # its ties at the threshold are more than the density asks for: all stay
        f"{SITE}.constant": torch.full((100,), -0.25),
        f"{SITE}.zeros": torch.zeros(500),
    }
    for density in (0.1, 0.4, 1.0):
        _, decoded = compeft(tensors, density=density)
        assert all(torch.equal(decoded[name], tensor) for name, tensor in tensors.items())
    dense = {f"{SITE}.up": torch.randn(100, 10, generator=torch.Generator().manual_seed(4))}
    encoded, decoded = compeft(dense, density=1.0)
    assert torch.equal(decoded[f"{SITE}.up"].sign(), dense[f"{SITE}.up"].sign())
    assert len(encoded["compeft.stream"]) == 4 + 2 * 1000 / 8


def test_once_more_changes_nothing():
    once = compeft(sample())[1]
    twice = compeft(once)[1]
    assert all(torch.equal(twice[name], tensor) for name, tensor in once.items())


def test_what_is_small_or_an_integer_is_kept_exactly():
    tensors = {
        f"{SITE}.scale": torch.tensor(0.1, dtype=torch.bfloat16),
        f"{SITE}.bias": torch.randn(63),
        f"{SITE}.wide": torch.randn(60, dtype=torch.float64),
        f"{SITE}.places": torch.arange(-500, 500),
        f"{SITE}.mask": torch.arange(100) % 3 == 0,
        f"{SITE}.empty": torch.zeros(0, 7),
    }
    _, decoded = compeft(tensors)
    for name, tensor in tensors.items():
        assert decoded[name].dtype == tensor.dtype and torch.equal(decoded[name], tensor)


def smollm2_lora(dtype):
    torch.manual_seed(5)
    widths = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    widths |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    tensors = {}
    for layer in range(30):
        for name, (outputs, inputs) in widths.items():
            prefix = f"model.layers.{layer}.mlp.{name}_proj.low_rank.0"
            tensors[f"{prefix}.down"] = torch.randn(8, inputs).to(dtype)
            tensors[f"{prefix}.up"] = torch.randn(outputs, 8).to(dtype)
            tensors[f"{prefix}.scale"] = torch.tensor(2.0, dtype=dtype)
    return tensors


def test_the_default_is_more_than_eight_times_smaller_than_bf16():
    tensors = smollm2_lora(torch.bfloat16)
    encoded, decoded = compeft(tensors)
    assert len(dump(tensors)) > 8 * len(dump(encoded))
    assert all(decoded[name].dtype == torch.bfloat16 for name in tensors)


def index_of(encoded, change):
    text = zlib.decompress(encoded["compeft.index"].numpy().tobytes())
    packed = zlib.compress(change(text))
    return {**encoded, "compeft.index": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace(b"[50,20]", b"[50000000,20000000]"), "claim to be"),
        (lambda text: text.replace(b"[50,20]", b"[" + b"50," * 1_048_577 + b"20]"), "more than 65536 tensors"),
        (lambda text: text.replace(b"[50,20]", b"[-50,-20]"), "shape"),
        (lambda text: text.replace(b"[50,20]", b"[5,20]"), "kept of 100 entries"),
        (lambda text: text.replace(b"[50,20]", b"[" + b"1," * 50 + b"1]"), "shape"),
        (lambda text: text.replace(b"float32", b"complex"), "complex"),
        (lambda text: text.replace(b'"counts":[500]', b'"counts":[501]'), "stands at 1000 of 1000"),
        (lambda text: text.replace(b'"counts":[500]', b'"counts":[]'), "one length"),
        (lambda text: text.replace(b'"counts":[500]', b'"counts":[-1]'), "bytes for"),
        (lambda text: b" " * (1 << 25) + text, "too large|JSON|truncated"),
        (lambda text: b"[" * 100_000, "Expected `object`"),
        (lambda text: b"{}", "names"),
    ],
)
def test_D7_a_hostile_index_is_refused(change, problem):
    encoded, _ = compeft({f"{SITE}.up": torch.randn(50, 20, generator=torch.Generator().manual_seed(6))})
    with pytest.raises(CodecError, match=problem):
        ComPEFT().decode(index_of(encoded, change))


def test_D7_hostile_streams_are_refused():
    encoded, _ = compeft({f"{SITE}.up": torch.randn(50, 20, generator=torch.Generator().manual_seed(6))})
    stream = encoded["compeft.stream"]
    nan = stream.clone()
    nan[:4] = torch.tensor([0, 0, 192, 127], dtype=torch.uint8)
    longer = torch.cat([stream, torch.zeros(1, dtype=torch.uint8)])
    for bad in (stream[:-1].clone(), longer, nan, stream.float(), stream[:0].clone(), torch.zeros_like(stream)):
        with pytest.raises(CodecError):
            ComPEFT().decode({**encoded, "compeft.stream": bad})
    with pytest.raises(CodecError):
        ComPEFT().decode({**encoded, "more": stream})
    with pytest.raises(CodecError):
        ComPEFT().decode({"compeft.stream": stream})


def test_more_zeros_than_a_reader_believes_are_refused_when_written():
    with pytest.raises(CodecError, match="almost all zero"):
        compeft({f"{SITE}.up": torch.zeros(1).expand(4096, 5000)})


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"alpha": 0.0}, {"density": float("nan")}])
def test_options_out_of_range(options):
    with pytest.raises(UsageError):
        compeft({f"{SITE}.up": torch.randn(10, 10)}, **options)


# --- SVD -----------------------------------------------------------------------------------------------------------


def pair(rank, scale=2.0):
    torch.manual_seed(7)
    return {
        f"{SITE}.down": torch.randn(rank, 48),
        f"{SITE}.up": torch.randn(32, rank),
        f"{SITE}.scale": torch.tensor(scale),
    }


def delta(tensors):
    up, down, scale = (tensors[f"{SITE}.{key}"].double() for key in ("up", "down", "scale"))
    return (scale * (up @ down)).numpy()


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_best_of_a_rank_by_dense_svd(rank):
    tensors = pair(8)
    encoded = SVD().encode(tensors, SVD.Config(rank=rank))
    u, s, vh = np.linalg.svd(delta(tensors))
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    assert encoded[f"{SITE}.up"].shape == (32, rank) and encoded[f"{SITE}.down"].shape == (rank, 48)
    assert np.abs(delta(encoded) - best).max() < 1e-5 * np.abs(best).max()
    assert encoded[f"{SITE}.scale"] is tensors[f"{SITE}.scale"]
    assert SVD().decode(encoded).keys() == tensors.keys()


def test_energy_is_the_share_of_the_squared_norm():
    tensors = pair(8)
    s2 = np.linalg.svd(delta(tensors), compute_uv=False)[:8] ** 2
    share = s2.cumsum() / s2.sum()
    for rank in range(1, 8):
        encoded = SVD().encode(tensors, SVD.Config(energy=float(share[rank - 1]) - 1e-4))
        assert encoded[f"{SITE}.up"].shape[1] == rank


def test_a_rank_that_the_weight_cannot_use_is_dropped_without_loss():
    tensors = pair(40)
    encoded = SVD().encode(tensors, SVD.Config())
    assert encoded[f"{SITE}.up"].shape == (32, 32)
    assert np.abs(delta(encoded) - delta(tensors)).max() < 1e-5 * np.abs(delta(tensors)).max()


def test_svd_leaves_other_forms_and_refuses_when_there_is_nothing_to_drop():
    tensors = sample()
    encoded = SVD().encode(tensors, SVD.Config(rank=2))
    same = [name for name in tensors if encoded[name] is tensors[name]]
    factors = {name for name in tensors if ".low_rank." in name and name.endswith((".up", ".down"))}
    assert set(same) == set(tensors) - factors
    with pytest.raises(CodecError, match="no low-rank pair"):
        SVD().encode(pair(8), SVD.Config())
    for options in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.1}):
        with pytest.raises(UsageError):
            SVD().encode(tensors, SVD.Config(**options))


# --- topk and int8 ------------------------------------------------------------------------------------------------


def test_topk_keeps_exactly_k_of_the_sum_and_the_first_of_equal_ones():
    weight = torch.full((4, 8), 0.5)
    weight[2, 3], weight[0, 0], weight[3, 7] = -9.0, 0.0, 2.0
    encoded = TopK().encode({f"{SITE.replace('low_rank', 'dense')}.weight": weight}, TopK.Config(density=5 / 32))
    site = SITE.removesuffix(".low_rank.0")
    assert encoded[f"{site}.sparse.0.shape"].tolist() == [4, 8]
    # The two largest, and the first three of those that are equal.
    assert encoded[f"{site}.sparse.0.index"].tolist() == [1, 2, 3, 2 * 8 + 3, 3 * 8 + 7]
    assert encoded[f"{site}.sparse.0.values"].tolist() == [0.5, 0.5, 0.5, -9.0, 2.0]


def test_topk_of_a_low_rank_change_is_numpys():
    tensors = pair(3)
    encoded = TopK().encode(tensors, TopK.Config(density=0.1))
    flat = delta(tensors).reshape(-1)
    wanted = np.sort(np.argsort(-np.abs(flat))[: round(0.1 * flat.size)])
    site = SITE.removesuffix(".low_rank.0")
    np.testing.assert_array_equal(encoded[f"{site}.sparse.0.index"].numpy(), wanted)
    np.testing.assert_allclose(encoded[f"{site}.sparse.0.values"].numpy(), flat[wanted], rtol=1e-5)


def test_topk_globally_goes_where_the_changes_are_large():
    small, large = torch.full((10, 10), 0.01), torch.arange(100.0).reshape(10, 10) + 1
    tensors = {"a.dense.0.weight": small, "b.dense.0.weight": large}
    kept = {
        scope: [
            TopK().encode(tensors, TopK.Config(density=0.2, scope=scope))[f"{p}.sparse.0.values"].numel() for p in "ab"
        ]
        for scope in ("weight", "global")
    }
    assert kept == {"weight": [20, 20], "global": [0, 40]}


def test_int8_is_off_by_half_a_step_of_each_row_at_most():
    torch.manual_seed(0)
    weight = torch.randn(12, 40) * torch.logspace(-6, 3, 12)[:, None]
    name = "a.dense.0.weight"
    encoded = Int8().encode({name: weight}, Int8.Config())
    assert {str(t.dtype) for t in encoded.values()} == {"torch.int8", "torch.float32"}
    back = Int8().decode(encoded)[name]
    step = weight.abs().max(1, keepdim=True).values / 127
    assert ((back - weight).abs() <= 0.5 * step * (1 + 1e-5)).all() and (back - weight).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_of_16_bits_comes_back_in_them_at_the_ends_of_their_range(dtype):
    tensors = {"a.dense.0.weight": torch.linspace(-1, 1, 200).view(5, 40).to(dtype) * torch.finfo(dtype).max}
    tensors["b.dense.0.weight"] = torch.full((4, 16), torch.finfo(dtype).smallest_normal).to(dtype)
    decoded = Int8().decode(Int8().encode(tensors, Int8.Config()))
    for name, tensor in tensors.items():
        assert decoded[name].dtype == dtype
        assert (decoded[name].double() - tensor.double()).abs().max() <= tensor.double().abs().max() / 127


def test_int8_keeps_what_is_not_worth_it_or_must_be_exact():
    tensors = {
        "a.low_rank.0.scale": torch.tensor(0.1),
        "a.bottleneck.0.up_bias": torch.randn(63),
        "a.dora.0.magnitude": torch.rand(500),
        "a.sparse.0.index": torch.arange(500),
        "a.dense.0.weight": torch.randn(20, 20, dtype=torch.float64),
    }
    with pytest.raises(CodecError, match="finds no tensor"):
        Int8().encode(tensors, Int8.Config())
    long = {"a.sparse.0.values": torch.randn(1000) * torch.logspace(-5, 0, 1000)}
    decoded = Int8().decode(Int8().encode(tensors | long, Int8.Config()))
    assert all(torch.equal(decoded[name], tensor) for name, tensor in tensors.items())
    values, got = long["a.sparse.0.values"], decoded["a.sparse.0.values"]
    for start in range(0, 1000, 64):  # every 64 numbers have their own step
        block = values[start : start + 64]
        assert (got[start : start + 64] - block).abs().max() <= block.abs().max() / 254 * (1 + 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v for k, v in t.items() if k.endswith(".int8")},
        lambda t: {k: v for k, v in t.items() if not k.endswith(".int8")},
        lambda t: {k: v.short() if k.endswith(".int8") else v for k, v in t.items()},
        lambda t: {k: v.double() if "steps" in k else v for k, v in t.items()},
        lambda t: {k: v[:-1] if "steps" in k else v for k, v in t.items()},
        lambda t: t | {"a.dense.0.weight.steps.float16": t["a.dense.0.weight.steps.float32"]},
        lambda t: t | {"a.dense.0.weight": torch.ones(2)},
        lambda t: {k.replace("float32", "complex64"): v for k, v in t.items()},
        lambda t: {k: v * 1e38 if "steps" in k else v for k, v in t.items()},
    ],
)
def test_D7_hostile_int8_is_refused(change):
    encoded = Int8().encode({"a.dense.0.weight": 300 * torch.randn(6, 40).sign()}, Int8.Config())
    with pytest.raises(CodecError):
        Int8().decode(change(encoded))


def test_compeft_keeps_magnitudes_of_rows():
    """They are lengths of the base's own rows: half of them zero would undo half of the layer."""
    tensors = {"a.dora.0.magnitude": torch.rand(500), "a.dora.0.up": torch.randn(500, 4)}
    _, decoded = compeft(tensors)
    assert torch.equal(decoded["a.dora.0.magnitude"], tensors["a.dora.0.magnitude"])


def test_topk_takes_all_of_a_site_together_and_leaves_the_rest():
    torch.manual_seed(9)
    site = "model.layers.0.q"
    pair = {"up": torch.randn(12, 2), "down": torch.randn(2, 10), "scale": torch.tensor(0.5)}
    tensors = {f"{site}.low_rank.0.{key}": tensor for key, tensor in pair.items()}
    tensors |= {f"{site}.dense.0.weight": torch.randn(12, 10), f"{site}.dense.0.bias": torch.randn(12)}
    tensors |= {f"{site}.sparse.0.index": torch.tensor([7]), f"{site}.sparse.0.values": torch.tensor([50.0])}
    tensors |= {f"{site}.sparse.0.shape": torch.tensor([12, 10])}
    tensors |= {f"{site}.affine.0.shift": torch.ones(12), f"{site}.affine.0.side": torch.tensor(0, dtype=torch.uint8)}
    encoded = TopK().encode(tensors, TopK.Config(density=0.1))
    whole = 0.5 * (pair["up"].double() @ pair["down"].double()) + tensors[f"{site}.dense.0.weight"].double()
    whole = whole.numpy().reshape(-1)
    whole[7] += 50
    places = np.sort(np.argsort(-np.abs(whole))[:12])
    assert encoded[f"{site}.sparse.0.index"].tolist() == places.tolist() and 7 in places
    np.testing.assert_allclose(encoded[f"{site}.sparse.0.values"].numpy(), whole[places], rtol=1e-6)
    assert torch.equal(encoded[f"{site}.affine.0.shift"], torch.ones(12))
    assert torch.equal(encoded[f"{site}.affine.1.shift"], tensors[f"{site}.dense.0.bias"])
    assert len(encoded) == 7
    with pytest.raises(CodecError, match="finds no"):
        TopK().encode({"a.prefix.0.keys": torch.randn(2, 3, 4)}, TopK.Config())
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError):
            TopK().encode(tensors, TopK.Config(density=density))
