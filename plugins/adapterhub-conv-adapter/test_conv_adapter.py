"""Convolution adapters and soft mixtures: the laws, torch's own convolution, NumPy, padding, streaming, encoders."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapterhub_conv_adapter import ConvAdapter, ConvBottleneck, SoftMixture, SoftMoA
from torch.nn import functional as F

import adapterhub
from adapterhub import Model, Site, Step, plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.errors import BatchError, IncompatibleBase, UsageError
from adapterhub.runtime.attachment import Attachment
from adapterhub.sites import select, sites
from adapterhub.testing import check
from adapterhub.testing.bed import alone, decoded, distance, logits, plan, random_adapter, tiny_llama
from adapterhub.testing.families import padded, tiny, tiny_ast

METHODS = {"conv_adapter": ConvAdapter, "soft_moa": SoftMoA}
FORMS = {"conv_adapter": ConvBottleneck, "soft_moa": SoftMixture}
FFN = Site("layers.0.mlp", "ffn", 12, 12, False)
SEQUENCES = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 17, 14)]


def built(method, base, **options):
    torch.manual_seed(0)
    made = METHODS[method]()
    return made.build(base if isinstance(base, list) else sites(base), plugins.options(made.Config, options))


def moved(part):
    """float64, every tensor that trains random, so that nothing of the formula is hidden by a zero."""
    part = part.to(dtype=torch.float64)
    for name, tensor in part.tensors.items():
        if name not in part.constants:
            torch.nn.init.normal_(tensor, std=0.5)
    return part


@pytest.mark.parametrize("name", ["conv_bottleneck", "conv_adapter", "soft_mixture", "soft_moa"])
@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws(name):
    results = {r.law: r for r in check(name)}
    assert [f"{r.law}: {r.detail}" for r in results.values() if r.verdict == "failed"] == []
    declined = {law for law, r in results.items() if r.verdict == "declined"}
    assert declined == {"conv_bottleneck": {"fold"}, "soft_mixture": {"fold", "decode", "chunks"}}.get(name, set())


# --- the formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_convolution_adapter_is_torchs_own_layers(causal, parallel):
    """The paper's module written with torch's Conv1d functions, channels first; a causal one is padded on the left."""
    site = Site("layers.0.mlp", "ffn", 10, 12, False, causal=causal)
    part = moved(built("conv_adapter", [site], reduction=2, kernel=5, parallel=parallel, scale=0.25)[site.path])
    t, (x, y) = part.tensors, (torch.randn(2, 9, width, dtype=torch.float64) for width in (10, 12))
    h = x if parallel else y
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = (h * t["norm"] + t["norm_bias"]).mT
    h = F.glu(F.conv1d(h, t["down"][:, :, None], t["down_bias"]), dim=1)
    r = h.shape[1]
    h = F.conv1d(F.pad(h, (4, 0) if causal else (2, 2)), t["kernel"][:, None], t["kernel_bias"], groups=r)
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = F.silu(h * t["inner"][:, None] + t["inner_bias"][:, None])
    want = 0.25 * F.conv1d(h, t["up"][:, :, None], t["up_bias"]).mT
    torch.testing.assert_close(part.delta_out(x, y, Step()), want, rtol=0, atol=1e-12)
    assert (part.stateful, part.additive) == (causal, parallel)


def test_soft_mixture_is_the_papers_formula():
    """Token by token and slot by slot in NumPy."""
    part = moved(built("soft_moa", [FFN], reduction=2, experts=3, slots=2, scale=0.5)[FFN.path])
    t = {name: tensor.numpy() for name, tensor in part.tensors.items()}
    x = np.random.default_rng(0).standard_normal((7, 12))
    erf = np.vectorize(math.erf)
    scores = np.array([[[x[m] @ t["slots"][n, p] for p in range(2)] for n in range(3)] for m in range(7)])
    want = np.zeros((7, 12))
    for n in range(3):
        for p in range(2):
            dispatch = np.exp(scores[:, n, p]) / np.exp(scores[:, n, p]).sum()
            a = t["down"][n] @ (dispatch @ x) + t["down_bias"][n]
            out = t["up"][n] @ (a * (1 + erf(a / 2**0.5)) / 2) + t["up_bias"][n]
            combine = np.exp(scores[:, n, p]) / np.exp(scores).sum((1, 2))
            want += 0.5 * combine[:, None] * out
    got = part.delta_out(torch.tensor(x)[None], torch.zeros(1, 7, 12), Step())[0].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_the_papers_count_of_parameters():
    """12 layers of width 768 at a reduction of 96: 252 288 numbers, the paper's 0.29 % of 87 million. A LayerNorm has as
    many as the BatchNorm that it replaces, and nothing else is kept."""
    here = [Site(f"layers.{n}.mlp", "ffn", 768, 768, False) for n in range(12)]
    parts = built("conv_adapter", here, reduction=96, kernel=31).values()
    assert sum(t.numel() for part in parts for t in part.tensors.values() if t.ndim) == 252_288
    assert {name for part in parts for name, t in part.tensors.items() if not t.ndim} == {"scale", "parallel", "causal"}


# --- where it may sit -----------------------------------------------------------------------------------------------


def test_what_looks_ahead_is_refused_at_a_causal_site():
    causal = Site("model.layers.0.mlp", "ffn", 12, 12, False, causal=True)
    for method in ("conv_adapter", "soft_moa"):
        part = built(method, [FFN])[FFN.path]
        part.check(FFN)
        with pytest.raises(IncompatibleBase, match="later tokens"):
            part.check(causal)
    with pytest.raises(UsageError, match="later tokens") as caught:
        built("soft_moa", tiny_llama())
    assert "--method gate" in caught.value.hint
    built("conv_adapter", [causal])[causal.path].check(causal)


def test_in_an_encoder_decoder_the_encoder_alone():
    base = tiny("t5")
    with pytest.raises(UsageError) as caught:
        built("conv_adapter", base)
    assert "encoder.ffn" in caught.value.hint
    made = built("conv_adapter", base, target_modules="encoder.ffn")
    assert made and not any(part.stateful for part in made.values())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("conv_adapter", {"reduction": 0.5}),
        ("conv_adapter", {"kernel": 0}),
        ("conv_adapter", {"kernel": 4}),  # no middle, in an encoder
        ("conv_adapter", {"dropout": 1.0}),
        ("conv_adapter", {"scale": float("inf")}),
        ("conv_adapter", {"target_modules": "embedding"}),
        ("soft_moa", {"experts": 0}),
        ("soft_moa", {"slots": 0}),
    ],
)
def test_wrong_options_are_refused(method, options):
    with pytest.raises(UsageError) as caught:
        built(method, tiny("bert"), **options)
    assert caught.value.hint


@pytest.mark.parametrize("method", METHODS)
def test_a_head_is_refused(method):
    """Of a causal model and of an encoder: generating, the former's sees the last token of a prompt alone."""
    for base in (tiny_llama(), tiny("bert", kind="BertForMaskedLM")):
        (site,) = select(sites(base), "head")
        with pytest.raises(UsageError, match=r"mixes the tokens|later tokens") as caught:
            built(method, base, target_modules=["head"])
        assert site.path in str(caught.value) and caught.value.hint
    beside = replace(site, path="layers.0.mlp", role="ffn")
    part = built(method, [beside])[beside.path]
    part.check(beside)
    with pytest.raises(IncompatibleBase, match="a head may see the last ones only"):
        part.check(site)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_constants_that_are_no_scalars_are_refused(method, shape):
    part = built(method, [FFN])[FFN.path]
    for name in sorted(part.constants):
        other = part.to(dtype=torch.float64)
        other.tensors[name] = other.tensors[name].expand(shape)
        with pytest.raises(IncompatibleBase, match=name):
            other.check(FFN)


def test_other_widths_and_one_vector_a_row_are_refused():
    for method in METHODS:
        part = built(method, [FFN])[FFN.path]
        with pytest.raises(IncompatibleBase):
            part.check(Site("layers.0.mlp", "ffn", 13, 12, False))
        with pytest.raises(BatchError) as caught:
            part.delta_out(torch.randn(2, 12), torch.randn(2, 12), Step())
        assert caught.value.hint


# --- batches, caches ------------------------------------------------------------------------------------------------


def attached(method, base, **options):
    """The base in float64 and, at each of the method's sites, its modification with random numbers."""
    base = base.double()
    return Attachment.of(base), {path: [moved(part)] for path, part in built(method, base, **options).items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", [1, 4, 31])
def test_causal_streaming_is_one_full_forward(side, kernel):
    """A kernel shorter and one longer than the text, padded, and decoded one token at a time."""
    bed, adapter = attached("conv_adapter", tiny_llama(), kernel=kernel, target_modules=["attention", "ffn"])
    rows = [adapter, {}, adapter]
    want = [alone(bed, row, sequence) for row, sequence in zip(rows, SEQUENCES, strict=True)]
    assert distance(want[0], alone(bed, {}, SEQUENCES[0])) > 1e-2
    for got in (logits(bed, rows, SEQUENCES, side), decoded(bed, rows, SEQUENCES, side, steps=8)):
        assert all(distance(mine, own) <= 1e-9 for mine, own in zip(got, want, strict=True))


def test_a_causal_adapter_hides_later_tokens_and_a_bidirectional_one_does_not():
    for base, sees in ((tiny_llama(), False), (tiny("bert"), True)):
        bed, adapter = attached("conv_adapter", base, kernel=5)
        changed = SEQUENCES[1].clone()
        changed[10] = 3 + (changed[10] - 2) % 90
        before, after = (alone(bed, adapter, sequence)[:10] for sequence in (SEQUENCES[1], changed))
        assert (distance(after, before) > 1e-6) is sees


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("parallel", [True, False])
def test_in_a_padded_batch_of_an_encoder_each_row_is_as_alone(method, side, parallel):
    bed, adapter = attached(method, tiny("bert"), target_modules=["attention", "ffn", "block"], parallel=parallel)
    rows = [adapter, adapter, {}]
    for mine, row, sequence in zip(logits(bed, rows, SEQUENCES, side), rows, SEQUENCES, strict=True):
        own = alone(bed, row, sequence)
        assert distance(mine, own) <= 1e-9
        assert not row or distance(own, alone(bed, {}, sequence)) > 1e-2


def test_padding_gets_nothing_out_of_the_soft_mixture():
    """Whatever stands at padded places, the slots are those of the real tokens."""
    part, x = moved(built("soft_moa", [FFN])[FFN.path]), torch.randn(2, 6, 12, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    junk = x.masked_fill(~mask[..., None], float("nan"))
    for row, real in enumerate(mask):
        want = part.delta_out(x[row : row + 1, real], x, Step())
        got = part.delta_out(junk, x, Step(mask=mask))[row, real]
        torch.testing.assert_close(got[None], want, rtol=0, atol=1e-12)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_vision_transformer_learns_in_a_plain_loop(method):
    model = Model(tiny("vit").requires_grad_(False))
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 5
    with torch.no_grad():
        bare = model(pixel_values=images).logits
    model.attach_new(built(method, model.sites))
    fresh = model(pixel_values=images).logits
    assert torch.equal(fresh, bare)  # the last projection is zero
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(pixel_values=images).logits, labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert model.base.state_dict().keys() == before.keys()  # no buffers of a BatchNorm
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_on_the_papers_own_kind_of_model(method):
    """An Audio Spectrogram Transformer, called as transformers calls it: the change that is hand-placed at a layer is ours."""
    model, sounds = Model(tiny_ast().requires_grad_(False)), torch.randn(2, 32, 16)
    bare = model(input_values=sounds).logits
    parts = {path: moved(part).to(dtype=torch.float32) for path, part in built(method, model.sites).items()}
    assert sorted(parts) == [f"audio_spectrogram_transformer.layers.{n}.mlp" for n in range(2)]
    model.attach_new(parts)
    got = model(input_values=sounds).logits
    assert distance(got, bare) > 0.01
    model.detach()
    for path, part in parts.items():
        mlp = model.base.get_submodule(path)
        mlp.register_forward_hook(lambda module, args, y, part=part: y + part.delta_out(args[0], y, Step()))
    assert distance(model.base(input_values=sounds).logits, got) < 1e-5


def test_a_mask_of_four_dimensions_is_refused():
    bert = tiny("bert")
    adapter = random_adapter(ConvBottleneck, bert, 0)
    attachment = Attachment.of(bert)
    mask = torch.zeros(1, 1, 5, 5)
    with attachment.running(plan(attachment, [adapter])), pytest.raises(BatchError, match="two dimensions"):
        bert(input_ids=torch.arange(5, 10)[None], attention_mask=mask)


def test_trained_continued_and_on_another(tiny_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)))
    hub = adapterhub.open(tmp_path / "hub", create=True)
    settings = {"steps": 6, "lr": 1e-2, "device": "cpu"}
    options = {"kernel": 4, "dropout": 0.1}
    first = hub.train(str(tiny_folder), "conv_adapter", path, "me/conv", options=options, **settings)
    assert set(first.manifest.forms) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    after = hub.train(str(tiny_folder), data=path, continue_from="me/conv", **settings)
    before, now = (Adapter.load(hub, release).tensors for release in (first, after))
    assert before.keys() == now.keys() and any(not torch.equal(before[name], now[name]) for name in before)
    assert all(
        torch.equal(before[name], now[name]) for name in before if name.endswith(("causal", "parallel", "scale"))
    )
    top = hub.train(str(tiny_folder), "conv_adapter", path, "me/top", on=["me/conv"], **settings)
    assert [parent.relation for parent in top.manifest.parents] == ["on"]
    with pytest.raises(UsageError, match="later tokens"):
        hub.train(str(tiny_folder), "soft_moa", path, "me/soft", **settings)

    model = hub.load(str(tiny_folder), "me/conv + me/top", device="cpu")
    ids, mask = padded([s[:8] for s in SEQUENCES], "left")
    texts = [
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)


def test_dropout_only_while_training():
    for method in METHODS:
        part, x = moved(built(method, [FFN], dropout=0.5)[FFN.path]), torch.randn(1, 6, 12).double()
        still = part.delta_out(x, x, Step())
        assert torch.equal(still, part.delta_out(x, x, Step()))
        assert not torch.equal(still, part.delta_out(x, x, Step(training=True)))


def test_random_ones_for_the_laws_suit_their_site():
    for base in (tiny_llama(), tiny("bert"), tiny("t5"), tiny("vit"), tiny("whisper")):
        at = {site.path: site for site in sites(base)}
        for form in FORMS.values():
            for path, (part,) in random_adapter(form, base, 0).items():
                part.check(at[path])
                assert not (base.config.is_encoder_decoder and part.stateful)
