"""Where modifications can sit: each family's roles, widths, parts and fused projections, as data."""

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub.errors import UsageError
from adapterhub.sites import current_path, family, select, sites
from adapterhub.testing.families import FAMILIES, tiny, tiny_ast

LLAMA_LIKE = {
    "block": ("", 32, 32),
    "attention": ("self_attn", 32, 32),
    "query": ("self_attn.q_proj", 32, 32),
    "key": ("self_attn.k_proj", 32, 16),
    "value": ("self_attn.v_proj", 32, 16),
    "attention_output": ("self_attn.o_proj", 32, 32),
    "ffn": ("mlp", 32, 32),
    "ffn_gate": ("mlp.gate_proj", 32, 64),
    "ffn_up": ("mlp.up_proj", 32, 64),
    "ffn_down": ("mlp.down_proj", 64, 32),
}
BERT_LIKE = {
    "block": ("", 32, 32),
    "attention": ("attention.self", 32, 32),
    "query": ("attention.self.query", 32, 32),
    "key": ("attention.self.key", 32, 32),
    "value": ("attention.self.value", 32, 32),
    "attention_output": ("attention.output.dense", 32, 32),
    "ffn_up": ("intermediate.dense", 32, 64),
    "ffn_down": ("output.dense", 64, 32),
}
LAYERS = {
    **{name: ("model.layers.", LLAMA_LIKE) for name in ("llama", "mistral", "qwen2", "gemma")},
    "gpt2": (
        "transformer.h.",
        {
            "block": ("", 32, 32),
            "attention": ("attn", 32, 32),
            "query_key_value": ("attn.c_attn", 32, 96),
            "query": ("attn.c_attn.query", 32, 32),
            "key": ("attn.c_attn.key", 32, 32),
            "value": ("attn.c_attn.value", 32, 32),
            "attention_output": ("attn.c_proj", 32, 32),
            "ffn": ("mlp", 32, 32),
            "ffn_up": ("mlp.c_fc", 32, 128),
            "ffn_down": ("mlp.c_proj", 128, 32),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers.",
        {
            "block": ("", 32, 32),
            "attention": ("attention", 32, 32),
            "query_key_value": ("attention.query_key_value", 32, 96),
            "query": ("attention.query_key_value.query", 32, 32),
            "key": ("attention.query_key_value.key", 32, 32),
            "value": ("attention.query_key_value.value", 32, 32),
            "attention_output": ("attention.dense", 32, 32),
            "ffn": ("mlp", 32, 32),
            "ffn_up": ("mlp.dense_h_to_4h", 32, 64),
            "ffn_down": ("mlp.dense_4h_to_h", 64, 32),
        },
    ),
    "bert": ("bert.encoder.layer.", BERT_LIKE),
    "roberta": ("roberta.encoder.layer.", BERT_LIKE),
    "vit": (
        "vit.layers.",
        {
            "block": ("", 32, 32),
            "attention": ("attention", 32, 32),
            "query": ("attention.q_proj", 32, 32),
            "key": ("attention.k_proj", 32, 32),
            "value": ("attention.v_proj", 32, 32),
            "attention_output": ("attention.o_proj", 32, 32),
            "ffn": ("mlp", 32, 32),
            "ffn_up": ("mlp.fc1", 32, 64),
            "ffn_down": ("mlp.fc2", 64, 32),
        },
    ),
}
"""Where a family's layers are, and what stands in each: role -> (end of the path, inputs, outputs). 2 layers, width 32,
grouped queries in the Llama-like ones."""
OUTSIDE = {
    **{name: {"embedding": 1, "head": 1, "norm": 5} for name in ("llama", "mistral", "qwen2", "gemma", "gpt2")},
    "gpt_neox": {"embedding": 1, "head": 1, "norm": 5},
    "bert": {"embedding": 1, "head": 1, "norm": 5, "": 1},
    "roberta": {"embedding": 1, "head": 1, "norm": 5, "": 1},
    "vit": {"head": 1, "norm": 5},
}
"""What else there is: role -> how many. BERT and RoBERTa predict through one more layer that has no role."""


def test_roles_of_the_audio_spectrogram_transformer():
    """Layers as ViT's, and a head inside of a module."""
    model = tiny_ast()
    found = {site.path: site for site in sites(model)}
    _, layer = LAYERS["vit"]
    for n in range(2):
        for role, (end, inputs, outputs) in layer.items():
            site = found.pop(f"audio_spectrogram_transformer.layers.{n}" + (f".{end}" if end else ""))
            assert (site.role, site.inputs, site.outputs, site.layer, site.causal) == (role, inputs, outputs, n, False)
    assert Counter(site.role for site in found.values()) == {"head": 1, "norm": 6}


@pytest.mark.parametrize("name", LAYERS)
def test_roles_and_widths(name):
    start, layer = LAYERS[name]
    found = {site.path: site for site in sites(tiny(name))}
    for n in range(2):
        for role, (end, inputs, outputs) in layer.items():
            site = found.pop(f"{start}{n}" + (f".{end}" if end else ""))
            assert (site.role, site.inputs, site.outputs, site.layer) == (role, inputs, outputs, n)
            assert site.linear == (role not in ("block", "attention", "ffn"))
            assert (site.part, site.model_type) == ("", name)
    assert Counter(site.role for site in found.values()) == OUTSIDE[name]


@pytest.mark.parametrize(("name", "ffn"), [("t5", 2), ("whisper", 0)])
def test_encoder_decoder_and_cross(name, ffn):
    found = sites(tiny(name))
    count = Counter((site.part, site.role) for site in found)
    for role in ("attention", "query", "key", "value", "attention_output"):
        assert [count[part, role] for part in ("encoder", "decoder", "cross", "")] == [2, 2, 2, 0]
    for role in ("block", "ffn_up", "ffn_down"):
        assert [count[part, role] for part in ("encoder", "decoder", "cross", "")] == [2, 2, 0, 0]
    assert count["encoder", "ffn"] == count["decoder", "ffn"] == ffn
    assert [count[part, "norm"] for part in ("encoder", "decoder", "")] == [5, 7, 0]
    assert count["", "head"] == 1
    assert len(select(found, "query")) == 6 and len(select(found, "cross.value")) == 2
    assert {site.part for site in select(found, ("decoder.query", "cross.query"))} == {"decoder", "cross"}


def test_every_tiny_family_is_held():
    assert set(FAMILIES) == set(LAYERS) | {"t5", "whisper"} and set(OUTSIDE) == set(LAYERS)


def split_by_transformers(model, kernel_inputs):
    """What the model's own code hands to its attention: query, key, value (heads, tokens, width) of row 0."""
    from transformers.modeling_utils import AttentionInterface

    def note(module, query, key, value, mask, **options):
        kernel_inputs.append((query[0], key[0], value[0]))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("noted", note)
    model.config._attn_implementation = "noted"
    return model


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_columns_are_what_transformers_splits_off(name):
    """Each output of the fused projection belongs to one site, and it is the one its name says."""
    model, seen, puts_out = tiny(name), [], []
    found = sites(model)
    fused = next(site for site in found if site.role == "query_key_value")
    columns = [next(s for s in found if s.path == f"{fused.path}.{role}") for role in ("query", "key", "value")]
    assert sorted(n for site in columns for n in site.columns.index()) == list(range(fused.outputs))
    assert {site.module for site in columns} == {fused.path}
    split_by_transformers(model, seen)
    model.get_submodule(fused.path).register_forward_hook(lambda module, args, output: puts_out.append(output[0]))
    ids = torch.arange(3, 10)[None]
    model(input_ids=ids, position_ids=torch.zeros_like(ids))  # at place 0 a rotation turns nothing
    for site, given in zip(columns, seen[0], strict=True):
        assert torch.equal(puts_out[0][:, site.columns.index()], given.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_others_named_alike(name):
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = AutoConfig.for_model(name, num_attention_heads=4, num_key_value_heads=2, **settings)
    with torch.device("meta"):
        found = {site.path: site for site in sites(AutoModelForCausalLM.from_config(config))}
    for role, (end, inputs, outputs) in LLAMA_LIKE.items():
        site = found["model.layers.1" + (f".{end}" if end else "")]
        assert (site.role, site.inputs, site.outputs) == (role, inputs, outputs)


def test_older_names():
    model = tiny("vit")
    paths = {site.path for site in sites(model)}
    for older, now in {
        "vit.encoder.layer.1.attention.attention.query": "vit.layers.1.attention.q_proj",
        "vit.encoder.layer.0.attention.attention.value": "vit.layers.0.attention.v_proj",
        "vit.encoder.layer.0.attention.output.dense": "vit.layers.0.attention.o_proj",
        "vit.encoder.layer.1.intermediate.dense": "vit.layers.1.mlp.fc1",
        "vit.encoder.layer.1.output.dense": "vit.layers.1.mlp.fc2",
        "vit.encoder.layer.0.layernorm_before": "vit.layers.0.layernorm_before",
        "vit.encoder.layer.1": "vit.layers.1",
    }.items():
        assert current_path("vit", older) == now and now in paths
        assert current_path("vit", now) == now
        assert current_path("llama", older) == older


def test_an_unknown_architecture_has_its_linear_layers():
    config = AutoConfig.for_model("opt", vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1)
    config.num_attention_heads, config.word_embed_proj_dim = 4, 32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = sites(model)
    assert "model.decoder.layers.0.fc1" in {s.path for s in found} and not any(s.role for s in found)
    assert [s.path for s in select(found, "fc1")] == ["model.decoder.layers.0.fc1"]
    assert family("opt").roles == ()
    with pytest.raises(UsageError) as refusal:
        select(found, "query")
    assert "no site of this base is named 'query': the roles of the architecture 'opt' are not known" in str(refusal)
    fix = refusal.value.hint
    assert "q_proj" in fix and "adapterhub/sites/architectures.toml" in fix and "model_types = ['opt']" in fix


def test_select(tiny_model):
    found = sites(tiny_model())
    assert [s.path for s in select(found, ("value", "0.mlp"))] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp",
        "model.layers.1.self_attn.v_proj",
    ]
    assert len(select(found, "all-linear")) == 14
    assert len(select(sites(tiny("gpt2")), "all-linear")) == 8  # a fused projection whole
    with pytest.raises(UsageError, match="'proj'"):
        select(found, "proj")
