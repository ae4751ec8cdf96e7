"""The three verdicts on copies, fine-tunes and other models. The quantisers here are written from the formats' own
definitions (GGML's Q8_0, Q4_0 and Q4_1 with float16 scales; int8 with a float32 scale per row; NF4 by the table in QLoRA's
appendix E, Dettmers et al., 2023), not from our code."""

import json
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from adapterhub.bases.compare import compare_sketches, one_thread
from adapterhub.bases.fingerprint import BaseWarning, Fingerprint, check_base, compare, fingerprint
from adapterhub.bases.loading import load_model
from adapterhub.bases.resolution import ResolvedBase, resolve
from adapterhub.errors import IncompatibleBase, IntegrityError, UnsafeFile
from adapterhub.spec.digest import digest_of

bf16, fp16 = torch.bfloat16, torch.float16


# --- copies --------------------------------------------------------------------------------------------------------


def q8_0(blocks):
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / scale.clamp(min=1e-30)).round() * scale.half().float()


def q4_0(blocks):
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    codes = (blocks / torch.where(scale == 0, 1, scale) + 8.5).floor().clamp(0, 15) - 8
    return codes * scale.half().float()


def q4_1(blocks):
    low = blocks.amin(-1, keepdim=True)
    scale = (blocks.amax(-1, keepdim=True) - low) / 15
    codes = ((blocks - low) / scale.clamp(min=1e-30) + 0.5).floor().clamp(0, 15)
    return codes * scale.half().float() + low.half().float()


def int8(rows):
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / scale.clamp(min=1e-30)).round() * scale


def int4(blocks):
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return (blocks / scale.clamp(min=1e-30)).round() * scale


NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


def nf4(blocks):
    """With scales that are a little off, as those are that are kept in 8 bits themselves."""
    scale = blocks.abs().amax(-1, keepdim=True)
    return NF4[(blocks[..., None] / scale[..., None] - NF4).abs().argmin(-1)] * scale * 1.01


def quantised(format, group=None):
    def change(name, t):
        size = group or t.shape[-1]
        return format(t.reshape(-1, size)).reshape(t.shape) if t.dim() == 2 else t

    return change


def gguf(name, t):
    """What a Q4_1 file of llama.cpp has: the embedding in eight bits, the linears in four."""
    return quantised(q8_0 if "embed" in name else q4_1, 32)(name, t)


def cast(*dtypes):
    def change(name, t):
        for dtype in dtypes:
            t = t.to(dtype)
        return t

    return change


COPIES = {
    "fp32": cast(),
    "bf16": cast(bf16),
    "fp16": cast(fp16),
    "int8 rows": quantised(int8),
    "Q8_0": quantised(q8_0, 32),
    "Q4_0": quantised(q4_0, 32),
    "Q4_1": quantised(q4_1, 32),
    "int4 groups of 64": quantised(int4, 64),
    "Q4_1 file": gguf,
    "NF4": quantised(nf4, 64),
}
ROUNDED = {"fp16": "rounded"}


def changed(tensors, *changes):
    for change in changes:
        tensors = {name: change(name, t) for name, t in tensors.items()}
    return tensors


def train(model, steps, lr=1e-5):
    """Ordinary AdamW on ordinary token ids."""
    torch.manual_seed(3)
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        ids = torch.randint(3, 500, (1, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """folder(tensors) -> a checkpoint with them."""
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))

    def make(tensors, name="base"):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text('{"model_type": "llama"}')
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
        return path

    return make


@pytest.fixture(scope="module")
def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed=0, vocab=512, tied=False):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.05,
                tie_word_embeddings=tied,
            )
        )

    return make


@pytest.fixture(scope="module")
def base(make_model):
    """A float base (its values are on no grid), and the same after ten and after twenty steps."""
    model = make_model()
    states = [{n: t.clone() for n, t in model.state_dict().items()}]
    for _ in range(2):
        states.append({n: t.clone() for n, t in train(model, 10).state_dict().items()})
    return states


@pytest.mark.parametrize("record", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("copy", COPIES)
def test_copies(base, folder, copy, stored, record):
    recorded = fingerprint(folder(changed(base[0], cast(bf16) if record == "bf16" else cast())))
    there = fingerprint(folder(changed(base[0], COPIES[copy], cast(bf16) if stored == "bf16" else cast()), "other"))
    verdict = compare(recorded, there)
    if copy == "fp16" and stored == record == "bf16":
        assert verdict.kind == "another"  # rounded twice in different ways: docs/evidence/fingerprint.md, limits
    elif copy in ("fp32", "bf16"):
        assert verdict.kind == "same" and verdict.distance < 3e-3
    elif copy == "fp16" and (record, stored) == ("bf16", "fp32"):
        assert verdict.kind in ("same", "copy")
    else:
        assert verdict.kind == "copy" and ROUNDED.get(copy, "quantised") in verdict.reason
    assert compare(there, recorded).kind == verdict.kind


def test_distance_is_the_relative_rms(base, folder):
    """Against the number over all values in float64, tensor by tensor, weighted by size."""
    other = changed(base[0], COPIES["Q4_1"])
    squares, count = 0.0, 0
    for name, t in base[0].items():
        share = ((t.double() - other[name].double()).norm() / t.double().norm()) ** 2
        squares, count = squares + t.numel() * float(share), count + t.numel()
    verdict = compare(fingerprint(folder(base[0])), fingerprint(folder(other, "other")))
    assert verdict.distance == pytest.approx((squares / count) ** 0.5, rel=0.05)


@pytest.mark.parametrize("record", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("steps", [10, 20])
def test_a_light_fine_tune_is_another_model(base, folder, steps, stored, record):
    dtype = {"fp32": torch.float32, "bf16": bf16, "fp16": fp16}
    recorded = fingerprint(folder(changed(base[0], cast(dtype[record]))))
    tuned = fingerprint(folder(changed(base[steps // 10], cast(dtype[stored])), "tuned"))
    for verdict in (compare(recorded, tuned), compare(tuned, recorded)):
        assert verdict.kind == "another" and ".weight differs" in verdict.reason


@pytest.mark.parametrize("format", ["Q4_1 file", "NF4"])
def test_a_fine_tune_of_a_quantised_base_is_another_model(base, folder, format):
    """Its own change is a small part of a quantisation step: only the spread of the errors tells."""
    quantised_base = changed(base[0], COPIES[format])
    tuned = {n: t + base[1][n] - base[0][n] for n, t in quantised_base.items()}
    recorded, there = fingerprint(folder(quantised_base)), fingerprint(folder(tuned, "tuned"))
    assert compare(recorded, there).kind == compare(there, recorded).kind == "another"


@pytest.mark.parametrize("stored", [torch.float32, bf16])
def test_one_matrix_changed(base, folder, stored):
    name = "model.layers.1.self_attn.q_proj.weight"
    other = changed({**base[0], name: base[1][name]}, cast(stored))
    verdict = compare(fingerprint(folder(base[0])), fingerprint(folder(other, "other")))
    assert verdict.kind == "another" and "layers.1.self_attn.q_proj.weight" in verdict.reason


def test_other_models(base, folder, make_model):
    recorded = fingerprint(folder(base[0]))
    rolled = {n: t.roll(1, 0) if t.dim() == 2 else t for n, t in base[0].items()}
    noisy = {n: t + 0.05 * t.std() * torch.randn_like(t) if t.dim() == 2 else t for n, t in base[0].items()}
    for other in (rolled, noisy, make_model(1).state_dict()):
        assert compare(recorded, fingerprint(folder(other, "other"))).kind == "another"
    verdict = compare(recorded, fingerprint(folder(make_model(0, vocab=520).state_dict(), "resized")))
    assert verdict.kind == "another" and "(520, 128)" in verdict.reason and "(512, 128)" in verdict.reason
    less = {n: t for n, t in base[0].items() if n != "model.norm.weight"}
    assert "no norm.weight" in compare(recorded, fingerprint(folder(less, "less"))).reason
    assert "has norm.weight" in compare(fingerprint(folder(less, "less")), recorded).reason
    path = folder(base[0], "qwen")
    (path / "config.json").write_text('{"model_type": "qwen2"}')
    assert "qwen2" in compare(recorded, fingerprint(path)).reason


def test_wide_rows(folder):
    """A row's int8 scale comes from a value beyond those that are kept."""
    torch.manual_seed(0)
    wide = torch.randn(16, 6000) * 0.02
    wide[:, 5000] = 0.2
    tensors = {"a.weight": wide, "b.weight": torch.randn(16, 64)}
    recorded = fingerprint(folder(tensors))
    verdict = compare(recorded, fingerprint(folder(changed(tensors, quantised(int8)), "other")))
    assert verdict.kind == "copy"


# --- the record ----------------------------------------------------------------------------------------------------


def test_file_and_memory_agree(make_model, tmp_path, folder):
    for tied in (False, True):
        model = make_model(tied=tied)
        whole, sharded = tmp_path / f"whole{tied}", tmp_path / f"sharded{tied}"
        model.save_pretrained(whole)
        model.save_pretrained(sharded, max_shard_size="100KB")
        assert len(list(sharded.glob("*.safetensors"))) > 2
        prints = [fingerprint(whole), fingerprint(sharded), fingerprint(model), fingerprint(model.to(bf16).float())]
        assert prints[0].base.architecture == "llama"
        assert prints[0].sketch == prints[1].sketch == prints[2].sketch
        assert len({p.base.structure for p in prints}) == 1
        assert compare(prints[0], prints[3]).kind == "same"


def test_tied_weights_count_once(make_model, folder):
    """A file that holds the tied head too, and one with names without their prefix, are the same model."""
    tensors = {n: t for n, t in make_model(tied=True).state_dict().items() if n != "lm_head.weight"}
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    bare = {n.removeprefix("model."): t for n, t in tensors.items()}
    prints = [fingerprint(folder(t, name)) for t, name in ((tensors, "one"), (both, "two"), (bare, "three"))]
    assert prints[0].sketch == prints[1].sketch == prints[2].sketch
    untied = {**both, "lm_head.weight": both["lm_head.weight"] + 1e-3}
    assert compare(prints[0], fingerprint(folder(untied, "untied"))).kind == "another"


def test_the_record(base, folder):
    path = folder(base[0], "mine")
    made = fingerprint(ResolvedBase("me/base", path, "a note"))
    assert (made.base.name, made.base.note) == ("me/base", "a note")
    assert (made.base.sketch.digest, made.base.sketch.size) == (digest_of(made.sketch), len(made.sketch))
    assert fingerprint(path).base.name == "mine"
    assert fingerprint(path, "x", "y").base.note == "y"
    assert fingerprint(folder(base[0], "again")).sketch == made.sketch
    names = json.dumps(
        {n.removeprefix("model."): list(t.shape) for n, t in base[0].items()}, sort_keys=True, separators=(",", ":")
    )
    assert made.base.structure == digest_of(names.encode())


def test_computed_once_per_file(base, folder, tmp_path, monkeypatch):
    from adapterhub.bases import sketch

    path = folder(base[0])
    reads = []
    take = sketch.take
    monkeypatch.setattr(sketch, "take", lambda rows: reads.append(1) or take(rows))
    first = fingerprint(path)
    assert fingerprint(path) == first and len(reads) == 1
    (cached,) = (tmp_path / "cache" / "fingerprints").iterdir()
    cached.write_bytes(cached.read_bytes()[:-5])
    assert fingerprint(path) == first and len(reads) == 2
    folder(base[1])
    assert compare(first, fingerprint(path)).kind == "another" and len(reads) == 3


def test_an_unusable_cache_costs_time_only(base, folder, tmp_path, monkeypatch):
    path = folder(base[0])
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "file"))
    assert fingerprint(path).base.name == "base"


def test_of_many_tensors_less_is_kept(folder, monkeypatch):
    from adapterhub.bases import sketch

    monkeypatch.setattr(sketch, "BUDGET", 16 * 256)
    tensors = {f"layers.{i}.weight": torch.randn(8, 1024) for i in range(16)}
    _, rows = sketch.unpack(fingerprint(folder(tensors)).sketch)
    assert {tuple(t.shape) for t in rows.values()} == {(4, 256)}


def test_non_finite_base(base, folder):
    with pytest.raises(UnsafeFile, match="norm"):
        fingerprint(folder({**base[0], "model.norm.weight": torch.full((128,), torch.nan)}))


def test_damaged_records(base, folder):
    made, other = fingerprint(folder(base[0])), fingerprint(folder(base[1], "other"))
    for blob in (b"", made.sketch[:-1], save_bytes({"a": torch.zeros(3)})):
        with pytest.raises(IntegrityError):
            compare(Fingerprint(made.base, blob), other)
    lying = fingerprint(folder({"a.weight": torch.zeros(3, 3)}, "lying"))
    with pytest.raises(IntegrityError):
        compare(Fingerprint(made.base, lying.sketch), other)


def save_bytes(tensors):
    from safetensors.torch import save

    return save(tensors)


# --- the check -----------------------------------------------------------------------------------------------------


def test_check(base, folder):
    recorded = fingerprint(ResolvedBase("me/base", folder(base[0]), "float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_base(*recorded, folder(base[0], "again")).kind == "same"
    with pytest.warns(BaseWarning, match=r"me/base \(float32\).*quantised copy.*0\.0[0-9]+ apart"):
        assert check_base(*recorded, folder(changed(base[0], gguf), "copy")).kind == "copy"
    tuned = folder(base[1], "tuned")
    with pytest.raises(IncompatibleBase, match=r"me/base.*tuned") as caught:
        check_base(*recorded, tuned)
    assert "--force" in caught.value.hint and "me/base" in caught.value.hint
    with pytest.warns(BaseWarning, match="another model"):
        assert check_base(*recorded, fingerprint(tuned), force=True).kind == "another"


# --- smollm2 -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2():
    """smollm2 itself (its values lie on Q4_1 grids already) and a float base like it, against copies and fine-tunes.

    Formats work along rows, so copies are made of the sketched rows: a model of four rows a matrix."""
    from adapterhub.bases import sketch

    resolved = resolve("smollm2")
    recorded = fingerprint(resolved)
    start = time.perf_counter()
    assert fingerprint(resolved) == recorded
    assert time.perf_counter() - start < 1
    assert recorded.base.name == "smollm2" and "Q4_1" in recorded.base.note
    model = load_model(resolved)
    assert fingerprint(model).sketch == recorded.sketch

    def rows(model):
        return {n: (t if len(t) > 1 else t[0]).float() for n, t in sketch.unpack(sketch.of_model(model))[1].items()}

    def as_rows(tensor):
        return sketch.Rows(tuple(tensor.shape), lambda indices, width: sketch._read(lambda: tensor, indices, width))

    def kind(a, b):
        return compare_sketches(*(sketch.take({n: as_rows(t) for n, t in x.items()}) for x in (a, b))).kind

    itself = rows(model)
    torch.manual_seed(0)
    noise = {n: 0.2 * t.std(-1, keepdim=True) * torch.randn_like(t) if t.dim() == 2 else 0 for n, t in itself.items()}
    floating = {n: t + noise[n] for n, t in itself.items()}
    assert kind(itself, floating) == "another"
    with one_thread():
        for copy, change in COPIES.items():
            for stored in (cast(), cast(bf16)):
                same = ("fp32", "bf16")
                assert kind(floating, changed(floating, change, stored)) == ("same" if copy in same else "copy"), copy
                same = ("fp32", "bf16", "Q4_1 file")  # the last makes the same codes again
                assert kind(itself, changed(itself, change, stored)) == ("same" if copy in same else "copy"), copy

    tuned = rows(train(model, 10))
    for stored in (cast(), cast(bf16), cast(fp16)):
        assert kind(itself, changed(tuned, stored)) == "another"
        floating_tuned = {n: floating[n] + tuned[n] - itself[n] for n in itself}
        assert kind(floating, changed(floating_tuned, stored)) == "another"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps"),
        ({"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}, "head_dim"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope_scaling"),
    ],
)
def test_the_same_weights_used_otherwise_are_another_model(tmp_path, tiny_folder, change, named):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    recorded, other = fingerprint(Path(tiny_folder)), fingerprint(copy)
    verdict = compare(recorded, other)
    assert verdict.kind == "another" and named in verdict.reason


def test_a_folder_and_its_loaded_model_state_the_same(tiny_folder):
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert fingerprint(loaded).base.computes == fingerprint(Path(tiny_folder)).base.computes
    assert compare(fingerprint(Path(tiny_folder)), fingerprint(loaded)).kind == "same"
