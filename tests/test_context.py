"""Learned positions are never passed: rows, prompts and generations beyond them are refused in words before anything runs."""

import json

import pytest
import torch
import transformers

from adapterhub.data.context import Context
from adapterhub.data.encoding import Example
from adapterhub.errors import BatchError, ContextWarning, HubError, UsageError
from adapterhub.forms.prefix import Prefix
from adapterhub.runtime.model import Model
from adapterhub.sites import sites

WIDE = {"vocab_size": 99}
BERT = {**WIDE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT = {**WIDE, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
OPT = {
    **WIDE, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16,
}  # fmt: skip
BART = {
    **WIDE, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip
LEARNED = {
    "GPT2LMHeadModel": GPT, "GPTBigCodeForCausalLM": GPT, "OpenAIGPTLMHeadModel": GPT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4}, "CTRLLMHeadModel": {**GPT, "dff": 16},
    "OPTForCausalLM": {**OPT, "max_position_embeddings": 32},
    "BertForMaskedLM": {**BERT, "max_position_embeddings": 32},
    "RobertaForMaskedLM": {**BERT, "max_position_embeddings": 34},
    "MptForCausalLM": {**WIDE, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32},
    "BartModel": {**BART, "max_position_embeddings": 32},
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**LEARNED[name])).eval()


@pytest.mark.parametrize("name", LEARNED)
def test_as_many_tokens_as_the_model_itself_takes_and_not_one_more(name):
    """The reference is the model: 32 tokens it takes, with 33 it fails in some way of its own."""
    base = made(name)
    ids = torch.randint(5, 99, (1, 33))
    base(input_ids=ids[:, :32])
    with pytest.raises((IndexError, RuntimeError)):
        base(input_ids=ids)
    model = Model(base)
    assert model.context.learned == 32
    model(input_ids=ids[:, :32], attention_mask=torch.ones(1, 32))
    for mask in ({}, {"attention_mask": torch.ones(1, 33)}):
        with pytest.raises(BatchError, match="33 tokens passes the 32 positions"):
            model(input_ids=ids, **mask)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_padding_takes_no_position_of_a_model_that_is_given_positions(name):
    ids, mask = torch.randint(5, 99, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[:, :8] = 0
    model = Model(made(name))
    assert model(input_ids=ids, attention_mask=mask).logits.isfinite().all()
    mask[1] = 1
    with pytest.raises(BatchError, match="40 tokens"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(("prompt", "new", "fits"), [(10, 23, True), (10, 24, False), (32, 1, True), (33, 1, False)])
def test_a_generation_that_would_pass_them_is_refused_before_the_first_token(prompt, new, fits, monkeypatch):
    """The last token is not read again."""
    base = made("GPT2LMHeadModel")
    ids, model = torch.randint(5, 99, (1, prompt)), Model(base)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if fits:
        assert model.generate(input_ids=ids, **options).shape[1] == prompt + new
        return
    monkeypatch.setattr(base, "forward", None)
    with pytest.raises(BatchError, match="positions that this base has learned") as caught:
        model.generate(input_ids=ids, **options)
    assert caught.value.hint
    with pytest.raises(BatchError):
        model.generate(ids, max_length=prompt + new, pad_token_id=0)


@pytest.mark.parametrize("shift", [0, 4])
def test_a_prefix_takes_the_positions_that_it_says(shift):
    base = made("GPT2LMHeadModel")
    site = next(site for site in sites(base) if site.role == "attention")
    memory = torch.randn(site.heads.keys, 4, site.heads.width)
    model = Model(base)
    model.attach_new({site.path: Prefix(keys=memory, values=memory, shift=torch.tensor(shift))})
    ids = torch.randint(5, 99, (1, 33))
    assert model.advance() == shift
    model(input_ids=ids[:, : 32 - shift])
    with pytest.raises(BatchError, match="positions"):
        model(input_ids=ids[:, : 33 - shift])
    with pytest.raises(BatchError):
        model.generate(input_ids=ids[:, :10], max_new_tokens=24 - shift, pad_token_id=0)
    rows = [Example(1, tuple(range(33 - shift)), 4)]
    with pytest.raises(UsageError, match="learned 32 positions"):
        model.context.check_rows(rows, model.advance())


def test_rotary_positions_do_not_end_and_a_warning_says_what_the_base_was_trained_for():
    config = transformers.LlamaConfig(**BERT, max_position_embeddings=16, num_key_value_heads=2)
    model = Model(transformers.LlamaForCausalLM(config).eval())
    assert model.context == Context(False, None, None, 16)
    ids = torch.randint(5, 99, (1, 12))
    with pytest.warns(ContextWarning, match="trained for"):
        assert model.generate(input_ids=ids, max_new_tokens=8, min_new_tokens=8, pad_token_id=0).shape[1] == 20
    with pytest.warns(ContextWarning, match="20 tokens"):
        model.context.check_rows([Example(3, tuple(range(20)), 4)])
    model.context.check_rows([Example(3, tuple(range(16)), 4)])


@pytest.fixture
def short(tmp_path, tiny_folder):
    """A GPT-2 of 32 positions with the tiny base's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    size = {**GPT, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("verb", ["train", "eval", "run", "loaded"])
def test_every_verb_refuses_in_words(verb, short, tmp_path, monkeypatch, capsys):
    import adapterhub
    from adapterhub.cli.app import execute

    hub = adapterhub.open(tmp_path / "hub", create=True)
    monkeypatch.chdir(hub.root)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a b c d e f g " * 20, "completion": " a"}))
    base = ["--base", str(short)]
    commands = {
        "train": ["train", *base, "--method", "lora", "--data", str(rows), "--name", "me/x", "--steps", "1"],
        "eval": ["eval", *base, "--data", str(rows)],
        "run": ["run", *base, "--prompt", "a", "--max-new-tokens", "60"],
    }
    if verb == "loaded":
        with pytest.raises(HubError, match="positions"):
            hub.load(short).complete(["a b"], max_new_tokens=99)
        return
    assert execute(commands[verb]) in (1, 2)
    told = capsys.readouterr().err
    assert "positions" in told and "hint:" in told and "Traceback" not in told
    assert hub.releases() == []
