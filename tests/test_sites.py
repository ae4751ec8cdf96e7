import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub.errors import UsageError
from adapterhub.sites import select, sites

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IN_A_LAYER = {
    "block": ("", 32, 32, False),
    "attention": ("self_attn", 32, 32, False),
    "query": ("self_attn.q_proj", 32, 32, True),
    "key": ("self_attn.k_proj", 32, 16, True),
    "value": ("self_attn.v_proj", 32, 16, True),
    "attention_output": ("self_attn.o_proj", 32, 32, True),
    "ffn": ("mlp", 32, 32, False),
    "ffn_gate": ("mlp.gate_proj", 32, 48, True),
    "ffn_up": ("mlp.up_proj", 32, 48, True),
    "ffn_down": ("mlp.down_proj", 48, 32, True),
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_llama_like_roles(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL))
    found = {site.path: site for site in sites(model)}
    for layer in range(2):
        for role, (end, inputs, outputs, linear) in IN_A_LAYER.items():
            site = found.pop(f"model.layers.{layer}" + (f".{end}" if end else ""))
            assert (site.role, site.inputs, site.outputs, site.linear, site.layer) == (
                role,
                inputs,
                outputs,
                linear,
                layer,
            )
    assert {path: site.role for path, site in found.items()} == {"lm_head": "head"}


def test_an_unknown_architecture_has_its_linear_layers():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "opt",
                vocab_size=64,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                word_embed_proj_dim=32,
            )
        )
    found = sites(model)
    assert "model.decoder.layers.0.fc1" in {s.path for s in found} and not any(s.role for s in found)
    assert [s.path for s in select(found, "fc1")] == ["model.decoder.layers.0.fc1"]
    with pytest.raises(UsageError, match="no site of this base is named 'query'"):
        select(found, "query")


def test_select(tiny_model):
    found = sites(tiny_model())
    assert [s.path for s in select(found, ("value", "0.mlp"))] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp",
        "model.layers.1.self_attn.v_proj",
    ]
    assert len(select(found, "all-linear")) == 14
    with pytest.raises(UsageError):
        select(found, "proj")
