"""What is particular to a family: fused, scaled, tied and windowed weights, heads, encoders that run by themselves."""

import copy

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, StaticCache

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.fit import as_parameters, bind
from adapterhub.adapters.names import named_tensors
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import BatchError
from adapterhub.forms.dense import Dense
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.prefix import Prefix
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.model import Model
from adapterhub.runtime.plan import stacked
from adapterhub.sites import select, sites
from adapterhub.testing.bed import alone, decoded, distance, plan, random_adapter
from adapterhub.testing.families import inputs, padded, tiny

IDS = torch.arange(3, 21).reshape(2, 9)
FORMS = plugins.names("forms")


def form(name):
    return plugins.load("forms", name)


@torch.no_grad()
def out(model, adapter=None, **given):
    with Attachment.of(model).running(plan(Attachment.of(model), [adapter or {}])):
        return model(**given).logits


def change(site, seed):
    torch.manual_seed(seed)
    return torch.randn(site.outputs, site.inputs, dtype=torch.float64) * 0.1


# --- fused projections ----------------------------------------------------------------------------------------------


def places(name, role):
    """The outputs of a fused projection, 4 heads of 8, as the models' papers lay them out."""
    n = ["query", "key", "value"].index(role)
    if name == "gpt2":
        return torch.arange(32 * n, 32 * n + 32)
    return torch.cat([torch.arange(24 * head + 8 * n, 24 * head + 8 * n + 8) for head in range(4)])


@pytest.mark.parametrize("role", ["query", "key", "value"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_a_column_site_is_the_rows_of_a_hand_folded_weight(name, role):
    model = tiny(name).double()
    adapter, folded = {}, copy.deepcopy(model)
    for seed, site in enumerate(select(sites(model), role)):
        delta = change(site, seed)
        adapter[site.path] = [Dense(weight=delta)]
        weight = folded.get_submodule(site.path.rpartition(".")[0]).weight.data
        (weight.mT if name == "gpt2" else weight)[places(name, role)] += delta
    want = folded(input_ids=IDS).logits
    assert distance(out(model, adapter, input_ids=IDS), want) <= 1e-12
    assert distance(model(input_ids=IDS).logits, want) > 1e-3


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_change_of_a_tied_embedding_leaves_the_head_alone(name):
    """Gemma's embedding multiplies what it looks up; the change is one of what it looks up."""
    model = tiny(name, tie_word_embeddings=True).double()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    [site] = select(sites(model), "embedding")
    delta = change(site, 1)
    folded = copy.deepcopy(model)
    folded.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    folded.model.embed_tokens.weight.data += delta.T
    want = folded(input_ids=IDS).logits
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    low_rank = LowRank(down=v, up=u * s, scale=torch.tensor(1.0, dtype=torch.float64))
    for part in (Dense(weight=delta), low_rank):
        assert distance(out(model, {site.path: [part]}, input_ids=IDS), want) <= 1e-12
    assert distance(model(input_ids=IDS).logits, want) > 1e-3


# --- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "pooled"),
    [("bert", "BertForSequenceClassification", ["classifier", "pooler.dense"]), ("vit", "", ["classifier"])],
)
def test_heads_on_one_vector_a_row(name, kind, pooled):
    """Every form that suits a classification head or a pooler, each row its own; a dense head is its folded weight."""
    model = tiny(name, kind=kind, num_labels=5).double()
    among = select(sites(model), pooled)
    rows = [random_adapter(form(name), model, seed, among) for seed, name in enumerate(FORMS)]
    rows = [row for row in rows if row]
    assert len(rows) >= 6
    rows = [*rows, stacked(rows[:3]), {}]
    sequences = [torch.arange(3 + n, 12 + n + n % 3) for n in range(len(rows))]
    with torch.no_grad(), Attachment.of(model).running(plan(Attachment.of(model), rows, len(rows))):
        got = model(**inputs(model, sequences, "right")).logits
    for row, mine, sequence in zip(rows, got, sequences, strict=True):
        want = alone(Attachment.of(model), row, sequence)
        assert distance(mine, want) <= 1e-9
        assert not row or distance(want, alone(Attachment.of(model), {}, sequence)) > 1e-3
    [head] = select(sites(model), "head")
    delta, given = change(head, 3), inputs(model, sequences[:2], "right")
    dense = Dense(weight=delta, bias=torch.ones(head.outputs, dtype=torch.float64))
    got = out(model, {head.path: [dense]}, **given)
    model.get_submodule(head.path).weight.data += delta
    model.get_submodule(head.path).bias.data += 1
    assert distance(got, model(**given).logits) <= 1e-12


# --- windows and caches ---------------------------------------------------------------------------------------------


def test_a_prefix_stays_in_sight_of_a_sliding_window():
    """Against a Llama of the same weights that holds the prefix in its cache, under a mask written out by hand."""
    windowed = tiny("mistral", attn_implementation="sdpa").double()
    plain = tiny("llama", attn_implementation="sdpa").double()
    plain.load_state_dict(windowed.state_dict())
    adapter = random_adapter(Prefix, windowed, 3)
    size = {part.keys.shape[1] for [part] in adapter.values()}
    n = min(size)
    adapter = {
        path: [Prefix(keys=p.keys[:, :n], values=p.values[:, :n], shift=p.shift)] for path, [p] in adapter.items()
    }
    cache = DynamicCache()
    for layer, [part] in enumerate(adapter.values()):
        cache.update(part.keys[None], part.values[None], layer)
    place = torch.arange(9)
    seen = (place[:, None] >= place) & (place[:, None] - place < 4)  # its window
    mask = torch.cat([torch.ones(9, n, dtype=torch.bool), seen], 1)
    mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)[None, None]
    with torch.no_grad():
        want = plain(input_ids=IDS[:1], attention_mask=mask, position_ids=place[None], past_key_values=cache).logits
    assert distance(out(windowed, adapter, input_ids=IDS[:1]), want) <= 1e-12


def test_padding_between_tokens_is_refused_where_a_window_counts_it():
    model = tiny("mistral")
    with pytest.raises(BatchError, match="sliding window"):
        decoded(Attachment.of(model), [{}, {}], [IDS[0], IDS[1, :7]], "right", steps=2)


def test_a_prefix_refuses_a_static_cache():
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(BatchError, match="static cache"):
        out(model, random_adapter(Prefix, model, 1), input_ids=IDS, past_key_values=cache)
    assert out(model, {}, input_ids=IDS, past_key_values=cache).isfinite().all()


# --- encoder-decoders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A T5 whose hub has an adapter of each form, and one of them for each row."""
    model = tiny("t5")
    hub, base = adapterhub.open(tmp_path_factory.mktemp("hub"), create=True), fingerprint(model)
    names = [name for name in FORMS if plugins.distribution("forms", name).startswith("adapterhub ")]
    for seed, name in enumerate(names):
        parts = random_adapter(form(name), model, seed)
        publish_tensors(hub, parts, name=f"me/{name.replace('_', '-')}", base=base.base, sketch=base.sketch)
    adapters = [f"me/{name.replace('_', '-')}" for name in names]
    return hub.load(model, None), [*adapters, "0.5*me/dense + me/prefix + me/bottleneck", None]


def test_t5_generates_for_each_row_what_it_does_alone(routed):
    """generate runs the encoder by itself, once; with num_return_sequences for the rows repeated."""
    model, rows = routed
    sequences = [torch.arange(3 + 5 * n, 9 + 5 * n + n % 4) for n in range(len(rows))]
    ids, mask = padded(sequences, "left")
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    want = [
        model.generate(input_ids=sequence[None], adapters=[row], **options)[0]
        for row, sequence in zip(rows, sequences, strict=True)
    ]
    assert len({tuple(w.tolist()) for w in want}) > len(rows) // 2
    got = model.generate(input_ids=ids, attention_mask=mask, adapters=rows, **options)
    assert torch.equal(got, torch.stack(want))
    options |= {"do_sample": True, "top_k": 1}  # sampling that has no choice
    twice = model.generate(input_ids=ids, attention_mask=mask, adapters=rows, num_return_sequences=2, **options)
    assert torch.equal(twice, torch.stack(want).repeat_interleave(2, 0))
    twice = model.generate(ids, attention_mask=mask, adapters=rows, num_return_sequences=2, **options)
    assert torch.equal(twice, torch.stack(want).repeat_interleave(2, 0))


def test_t5_goes_on_from_a_cache_under_other_adapters(routed):
    """Its cross-attention takes keys and values from the cache then: that they do not run is no fault."""
    model, _ = routed
    ids, start = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0]])
    with torch.no_grad():
        first = model(input_ids=ids, decoder_input_ids=start, use_cache=True)
        given = {"encoder_outputs": (first.encoder_last_hidden_state,), "past_key_values": first.past_key_values}
        then = model(decoder_input_ids=torch.tensor([[9]]), adapters=["me/low-rank"], **given).logits
    assert then.shape[:2] == (1, 1)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_complete(name, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    base = tiny(name)
    with torch.no_grad():
        whole = base.generate(input_ids=torch.tensor([tokenizer("a b")["input_ids"]]), max_new_tokens=6)[0]
    new = whole[1:] if name == "t5" else whole[3:]
    assert Model(base, tokenizer).complete(["a b", "longer"], max_new_tokens=6)[0] == tokenizer.decode(
        new, skip_special_tokens=True
    )


# --- dtypes, devices, checkpoints -----------------------------------------------------------------------------------


def _to(given, device):
    return {key: value.to(device) for key, value in given.items()}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("kind", FORMS)
def test_a_float32_adapter_on_a_bfloat16_base(name, kind, device):
    model = tiny(name).to(device)
    adapter = random_adapter(form(kind), model, 1)
    if not adapter:
        pytest.skip("the form suits no site of this family")
    given = _to(inputs(model, [IDS[0], IDS[1]]), device)
    exact, bare = out(model, adapter, **given), out(model, **given)
    narrow = tiny(name).to(device, torch.bfloat16)
    for site in sites(narrow):
        for part in adapter.get(site.path, []):
            bind(part, site, narrow)
    got = out(narrow, adapter, **given)
    assert got.dtype == torch.bfloat16 and got.device.type == device
    assert all(t.dtype == torch.float32 for t in named_tensors(adapter).values() if t.is_floating_point())
    near = 0.3 if kind == "peft" else 0.15  # PEFT's layer computes a large change of the weight
    assert distance(got.float(), exact) < near < 2 * distance(bare, exact)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("kind", FORMS)
def test_checkpointing_gives_the_same_gradients(name, kind, device):
    found = []
    for checkpointing in (False, True):
        model = tiny(name, **DROPLESS[name]).to(device, torch.float64).requires_grad_(False)
        if checkpointing:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        adapter = as_parameters(random_adapter(form(kind), model, 1), lambda path: torch.device(device))
        if not adapter:
            pytest.skip("the form suits no site of this family")
        for site in sites(model):
            for part in adapter.get(site.path, []):
                bind(part, site, model)
        bed = Attachment.of(model)
        given = _to({"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}, device)
        with bed.running(plan(bed, [adapter], trains=True)):
            model(**given, use_cache=False).loss.backward()
        found.append({n: t.grad for n, t in named_tensors(adapter).items() if isinstance(t, torch.nn.Parameter)})
    plain, checkpointed = found
    for tensor, gradient in plain.items():
        assert gradient is not None and gradient.count_nonzero(), f"{tensor} gets no gradient"
        assert torch.allclose(gradient, checkpointed[tensor], rtol=1e-6, atol=1e-9), tensor


DROPLESS = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}
