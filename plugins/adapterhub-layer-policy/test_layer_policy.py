"""Layer policies: the laws, the rates by hand and in what moves, frozen layers, fresh layers, and what is refused."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from adapterhub_layer_policy import LayerPolicy
from transformers import AutoModelForCausalLM

import adapterhub
from adapterhub import BuildContext, plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.errors import UsageError
from adapterhub.methods.full import Full
from adapterhub.methods.lora import LoRA
from adapterhub.sites import select, sites
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama
from adapterhub.training.module import StageModule

EVERYWHERE = ["query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down", "embedding", "head"]


def policy(**options):
    return LayerPolicy(plugins.options(LayerPolicy.Config, options))


def rates(part, here):
    found = part.rates({f"{site.path}.dense.0.weight": site for site in here}, 0, random.Random(0))
    return {name.removesuffix(".dense.0.weight"): rate for name, rate in found.items()}


def built(base, method=Full, **options):
    given = BuildContext(sites(base), base)
    return given, method().build(given.sites, plugins.options(method.Config, options))


@pytest.fixture
def train(tmp_path, tiny_folder):
    """train(method, **settings) -> (release, tensors), on the tiny Llama of two layers."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))

    def run(method=None, name="me/a", **settings):
        given = {"schedule": "layer_policy", "steps": 2, "lr": 1e-2, "warmup": 0} | settings
        release = run.hub.train(str(tiny_folder), method, file, name, **given)
        return release, Adapter.load(run.hub, release).tensors

    run.hub = adapterhub.open(tmp_path / "hub", create=True)
    return run


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    assert [f"{r.law}: {r.detail}" for r in check("layer_policy") if r.verdict == "failed"] == []


# --- rates ---------------------------------------------------------------------------------------------------------


def test_rates_fall_from_layer_to_layer_and_what_is_above_the_layers_has_the_full_rate():
    here = select(sites(tiny_llama(num_hidden_layers=3)), [*EVERYWHERE, "norm", "block"])
    by_hand = {None: 1.0, 2: 1.0, 1: 0.5, 0: 0.25, "embedding": 0.125}
    for path, rate in rates(policy(lr_decay=0.5), here).items():
        parts = path.split(".")
        key = "embedding" if "embed_tokens" in parts else int(parts[2]) if "layers" in parts else None
        assert rate == by_hand[key]
    frozen = rates(policy(lr_decay=0.5, freeze_below=2), here)
    assert {path for path, rate in frozen.items() if rate == 0.0} == {
        path for path in frozen if any(word in path for word in ("embed_tokens", "layers.0", "layers.1"))
    }
    assert {rate for rate in frozen.values()} == {0.0, 1.0}
    assert set(rates(policy(), here).values()) == {1.0}
    assert {path for path, rate in rates(policy(freeze_below=3), here).items() if rate} == {"lm_head", "model.norm"}


def test_the_norm_of_an_encoders_embeddings_belongs_to_them():
    from transformers import BertConfig, BertForMaskedLM

    base = BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )
    found = rates(policy(lr_decay=0.5), sites(base))
    assert found["bert.embeddings.LayerNorm"] == found["bert.embeddings.word_embeddings"] == 0.25
    assert found["bert.encoder.layer.0.attention.self.query"] == 0.5


def test_the_first_step_of_adam_moves_each_weight_by_its_layers_rate(train):
    """Adam's first step is lr times the gradient's sign, wherever the gradient is far above its epsilon of 1e-8."""
    release, change = train("full", steps=1, options={"target_modules": EVERYWHERE, "layer_policy.lr_decay": 0.3})
    wanted = {"embed_tokens": 0.09e-2, "layers.0": 0.3e-2, "layers.1": 1e-2, "lm_head": 1e-2}
    seen = set()
    for name, tensor in change.items():
        [key] = [key for key in wanted if key in name]
        moved = tensor[tensor != 0].abs()
        assert moved.max().item() == pytest.approx(wanted[key], rel=1e-4)
        assert moved.median().item() == pytest.approx(wanted[key], rel=1e-3)
        seen.add(key)
    assert seen == wanted.keys()
    told = release.manifest.recipe["found"]["train"]["rates"][0]
    assert sorted(map(float, told)) == [0.09, 0.3, 1.0]
    [entry] = json.loads(train.hub.store.read(release.manifest.files["log"]))
    assert entry["learning_rate"] == 1e-2  # the run's, whichever tensor comes first


@pytest.mark.parametrize(("method", "targets"), [("full", EVERYWHERE), ("lora", EVERYWHERE[:-2]), ("loreft", "block")])
def test_frozen_layers_are_left_exactly_and_are_not_stored(method, targets, train):
    options = {"target_modules": targets, "layer_policy.freeze_below": 1}
    _, change = train(method, options=options)
    assert change and all("layers.1." in name or "lm_head" in name for name in change)


# --- fresh layers --------------------------------------------------------------------------------------------------


def test_fresh_layers_are_drawn_by_the_seed_and_take_the_place_of_the_bases(train, tiny_folder):
    options = {"layer_policy.reinit_top": 1}
    release, change = train("full", options=options, steps=1, lr=1e-9, seed=7)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    by_hand = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    torch.manual_seed(7)
    drawn = {}
    for site in select(sites(base), "all-linear"):
        weight = base.get_submodule(site.path).weight.detach()
        if ".layers.1." in site.path:
            drawn[site.path] = 0.2 * torch.randn(weight.shape)  # the tiny Llama's initializer_range
            now = weight + change[f"{site.path}.dense.0.weight"]
            torch.testing.assert_close(now, drawn[site.path], atol=1e-6, rtol=0)
            by_hand.get_submodule(site.path).weight.data = drawn[site.path]
        else:
            assert change[f"{site.path}.dense.0.weight"].abs().max() <= 1.01e-9
    everything = torch.cat([weight.flatten() for weight in drawn.values()])
    assert len(drawn) == 7 and abs(everything.std().item() / 0.2 - 1) < 5 / (2 * len(everything)) ** 0.5
    assert release.manifest.recipe["seed"] == 7 and release.manifest.recipe["schedule"]["options"]["reinit_top"] == 1
    ids = torch.arange(3, 20)[None]
    ours = train.hub.load(str(tiny_folder), "me/a")(input_ids=ids).logits
    torch.testing.assert_close(ours, by_hand(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    _, again = train("full", "me/b", options=options, steps=1, lr=1e-9, seed=7)
    _, other = train("full", "me/c", options=options, steps=1, lr=1e-9, seed=8)
    assert all(torch.equal(again[name], change[name]) for name in change)
    assert not any(torch.equal(other[name], change[name]) for name in change if ".layers.1." in name)


def test_a_fresh_bias_is_zero_and_norms_keep_the_bases_values():
    base = tiny_llama(attention_bias=True)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    given, parts = built(base, norms=True)
    started = policy(reinit_top=2).start(parts, given)
    assert started.keys() == parts.keys()
    for site in select(given.sites, "all-linear"):
        module, now = base.get_submodule(site.path), started[site.path].tensors
        assert not torch.equal(module.weight + now["weight"], module.weight)
        if site.bias:
            assert module.bias.any() and torch.equal(module.bias + now["bias"], torch.zeros_like(module.bias))
    assert all(started[site.path] is parts[site.path] for site in select(given.sites, "norm"))


def test_a_run_killed_in_fresh_layers_ends_with_the_same_bytes(train, tmp_path, monkeypatch):
    options = {"layer_policy.reinit_top": 1, "layer_policy.lr_decay": 0.5}
    made, calls, forward = train("full", options=options, steps=6, save_every=2)[0], [], StageModule.forward

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    train.hub = adapterhub.open(tmp_path / "again", create=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageModule, "forward", killed)
        train("full", options=options, steps=6, save_every=2)
    assert list((train.hub.root / "training").glob("*/train/checkpoint-2"))
    assert train("full", options=options, steps=6, save_every=2)[0].digest == made.digest


# --- any method, and what is refused -------------------------------------------------------------------------------


def test_over_another_adapter_and_further_with_another_policy(train):
    train("lora", "me/under")
    _, before = train("bottleneck", "me/over", on=["me/under"], options={"layer_policy.freeze_below": 1})
    assert all(".layers.1." in name for name in before)
    _, after = train(name="me/over", continue_from="me/over", options={"layer_policy.lr_decay": 0.5})
    assert {name.split(".")[2] for name in after} == {"0", "1"}
    assert any(not torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(UsageError, match="goes on"):
        train(name="me/over", continue_from="me/over", options={"layer_policy.reinit_top": 1})


@pytest.mark.parametrize(
    "options", [{"freeze_below": -1}, {"lr_decay": 0.0}, {"lr_decay": 1.1}, {"reinit_top": -1}, {"gamma": 0.5}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        policy(**options)
    assert caught.value.hint


def test_a_policy_that_leaves_nothing_to_train_is_refused(train):
    with pytest.raises(UsageError, match="trains nothing"):
        train("lora", options={"layer_policy.freeze_below": 2})


@pytest.mark.parametrize(
    ("options", "method", "method_options", "said"),
    [
        ({"reinit_top": 3}, Full, {}, "of 2 layers"),
        ({"reinit_top": 1, "freeze_below": 2}, Full, {}, "of 2 layers"),
        ({"reinit_top": 1}, LoRA, {}, "low_rank"),
        ({"reinit_top": 1}, Full, {"target_modules": ["0.self_attn.q_proj"]}, "no weight in the 1 highest"),
    ],
)
def test_fresh_layers_of_which_the_method_has_no_whole_weights_are_refused(options, method, method_options, said):
    given, parts = built(tiny_llama(), method, **method_options)
    with pytest.raises(UsageError, match=said) as caught:
        policy(**options).start(parts, given)
    assert caught.value.hint


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(64, 32, dtype=torch.int8), torch.zeros(64, 32).to(torch.float8_e4m3fn), torch.zeros(2048), None],
)
def test_fresh_layers_over_weights_that_are_quantised_or_not_there_are_refused(weight):
    base = tiny_llama()
    given, parts = built(base)
    base.model.layers[1].mlp.up_proj.weight = None if weight is None else torch.nn.Parameter(weight, False)
    with pytest.raises(UsageError, match="quantised"):
        policy(reinit_top=1).start(parts, given)


def test_fresh_layers_of_a_base_that_does_not_say_how_it_began_are_refused():
    base = tiny_llama()
    given, parts = built(base)
    base.config = SimpleNamespace(get_text_config=object)
    with pytest.raises(UsageError, match="initializer_range"):
        policy(reinit_top=1).start(parts, given)


def test_a_base_of_two_stacks_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    base = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UsageError, match="one stack"):
        rates(policy(lr_decay=0.5), sites(base))
