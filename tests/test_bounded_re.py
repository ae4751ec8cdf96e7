"""Expressions of strangers: what `re` says, within limits. The patterns are those of PEFT's documentation and tests, and of adapters as
they are shared (Unsloth, LLaMA-Factory, diffusers' recipes)."""

import re

import pytest
import torch
import transformers

from adapterhub.formats.peft.bounded_re import BadExpression, match

P = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PATTERNS = [
    r".*decoder.*(q|v)_proj$", r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", r".*\.(q|v)_proj", "q_proj",
    r"model\.layers\.[0-9]+\.self_attn\.q_proj", r".*self_attn.*", r".*language_model\..*\.(q_proj|v_proj)", "foo",
    r"(?!.*\.vision).*\.q_proj", r".*attn.*c_attn", r"transformer\.h\.\d+\.attn\.c_attn", r".*(query|value)$",
    r"(.*\.)?(q_proj)$", r"(.*\.)?(model.layers.0.self_attn.q_proj)$", r"(.*\.)?(layers\.[01]\.self_attn\.k_proj)$",
    r".*layers\.\d+$", r"[^.]+\.base_layer\.", r"\.\d+(\.|$)", r"\d+", r".*\.[^.]*\.(?P<idx>\d+)\.",
    r".*?\.[^.]*\.(?P<idx>\d+)\.", r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.", r"(?:^|.*?\.)h\.(?P<idx>\d+)\.",
    rf"(?:model\.)?layers\.\d+\.(?:self_attn|mlp)\.{P}", rf".*\.{P}$", rf"^(?!.*(visual|vision)).*\.{P}$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    r".*\.([0-9]|1[0-1])\..*_proj", r"model.layers.(0|1).mlp.(up|down)_proj", r"^model\.layers\.(?:1[0-9]|[0-9])\..*$",
    r".*(?<!lm_)head", r".*(?<=self_attn\.)q_proj", r".*(?=_proj)", r"(?i).*Q_PROJ", r"(?s:.*)(?:_proj)", r"(?x) .* q_proj",
    r"(?P<first>[a-z]+)\..*(?P=first)?", r"([a-z]+)\.\1", r"\Amodel.*proj\Z", r"\bmodel\b.*\bmlp\b.*", r"\w+(?:\.\w+)*",
    r"[\w.]+q_proj", r"[^\d]*\d[^\d]*", r".*\.(?:q|k|v){1}_proj", r".*q_pro{1,3}j", r".*\.{1}q_proj", r"(a|b|c)*.*mlp.*",
    r"encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.(q|k|v|o)", r"decoder\.block\.1\..*EncDecAttention.*",
    r".*DenseReluDense\.(wi|wo)(_\d)?", r"bert\.encoder\.layer\.\d+\.attention\.self\.(query|key)",
    r".*(intermediate|output)\.dense", r".*(?:fc1|fc2|out_proj)$", r"model\.decoder\.layers\.(?P<idx>\d+)\.fc[12]",
    r"(?:(?:model|transformer)\.)?(?:embed_tokens|wte)", r".*[Ee]mbed.*", r"lm_head|.*\.score", r"", r".", r".*", r".+?\.mlp",
    r"(?:.*\.)?[qv]_proj(?!.)", r"(?:.*\.)?(?:attn|attention)(?:\..*)?\.(?:c_proj|dense)", r"(?>model)\..*", r"model\.\w++\..*",
]  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "vocab_size": 9}


@pytest.fixture(scope="module")
def names():
    """Every module of five architectures."""
    configs = [
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
        transformers.BertConfig(**SMALL),
        transformers.GPT2Config(vocab_size=9, n_embd=16, n_layer=2, n_head=2),
        transformers.OPTConfig(vocab_size=9, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2),
        transformers.T5Config(vocab_size=9, d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2),
    ]
    with torch.device("meta"):
        models = [transformers.AutoModel.from_config(config) for config in configs]
    found = [name for model in models for name, _ in model.named_modules()]
    return [*found, *(f"model.{name}" for name in found), "x\ny", "model.visual.q_proj", "lm_head", "ſ.K_proj", "١"]


def test_there_are_sixty_of_them():
    assert len(set(PATTERNS)) >= 60


@pytest.mark.parametrize("pattern", PATTERNS)
def test_they_mean_what_re_says(pattern, names):
    for whole, method in ((False, "match"), (True, "fullmatch")):
        hits = {name: getattr(re.compile(pattern), method)(name) for name in names}
        wanted = {name: hit.groupdict().get("idx") or "" for name, hit in hits.items() if hit}
        assert match([pattern], names, whole) == [wanted], method


@pytest.mark.parametrize(
    "pattern",
    [r"(a|aa)+$", r"(x+x+)+y|(a|ab|b)*c!", r"((a|aa)+(b|bb)+)+!", r"^(([a-z])+.)+[A-Z]([a-z])+$"],
)
def test_a_match_that_takes_too_long_is_ended(pattern):
    with pytest.raises(BadExpression, match="takes more than"):
        match([pattern], ["a" * 5000 + "b", "ab" * 3000, "ab" * 60])


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("a{4000000000}", "repeated"),
        ("(?:" * 20 + "a" + "{1000})" * 20, "repeated"),
        ("(" * 10 + "a?" + "){200}" * 10, "repeated"),
        ("(?:(?:x?){30000}){30000}y", "repeated"),
        ("x" * 200_001, "characters"),
        ("(" * 500 + "a" + ")" * 500, "Recursion"),
        ("x{99999999999999999999}", "Overflow"),
        ("(?:abc){e<=1}", "escape it"),
        ("[[:alpha:]]+", "escape it"),
        ("a)|(b", "error"),
        (r"\p{L}", "error"),
        (r"(?|a|b)", "error"),
        (r"(?R)", "error"),
        (r"\L<names>", "error"),
    ],
)
def test_what_is_too_large_or_no_expression_of_pythons_is_refused_before_it_is_compiled(pattern, says):
    with pytest.raises(BadExpression, match=says):
        match([pattern], ["a"])


def test_many_patterns_of_a_large_model_are_matched(names):
    """As AdaLoRA writes a rank for every module."""
    keys = [re.escape(name) for name in names if name][:200]
    found = match([rf"(.*\.)?({key})$" for key in keys], names)
    assert all(name in hits for name, hits in zip([name for name in names if name][:200], found, strict=True))
