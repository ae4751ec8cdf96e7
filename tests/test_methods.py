"""The built-in methods against peft, torch's own fine-tuning and transformers' own cache; trained from the command line."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import DynamicCache

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.cli.app import execute
from adapterhub.errors import UsageError
from adapterhub.runtime.model import Model
from adapterhub.sites import sites
from adapterhub.testing.bed import distance, tiny_llama
from adapterhub.testing.families import tiny

IDS = torch.arange(3, 27).reshape(2, 12)
CLOSE = 1e-5
"""Of the largest number, in float32."""


def tiny_gpt2():
    """Its biases are random, and nothing is dropped where peft trains it."""
    return tiny("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def built(name, base, **options):
    method = plugins.load("methods", name)
    return method().build(sites(base), plugins.options(method.Config, options))


def attached(name, base, random=True, **options):
    """A model with a new adapter of the method on it, every trained tensor random unless the method's start is asked for."""
    torch.manual_seed(1)
    model = Model(base.requires_grad_(False))
    model.attach_new(built(name, base, **options))
    for parameter in model.trainable_parameters() if random else ():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize(
    ("family", "targets", "feedforward"),
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    ],
)
def test_ia3_is_pefts(family, targets, feedforward):
    model = attached("ia3", BASES[family]())
    peft = get_peft_model(
        BASES[family](),
        IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=family == "gpt2"),
    ).eval()
    inside = {"query": slice(0, 32), "key": slice(32, 64), "value": slice(64, 96)}
    ours = model.new_modifications()
    assert len(ours) == 6
    for path, (part,) in ours.items():
        module, _, role = path.rpartition(".")
        there = peft.base_model.model.get_submodule(module if role in inside else path).ia3_l["default"].data
        there.view(-1)[inside.get(role, slice(None))] += part.gain.detach()
    with torch.no_grad():
        assert distance(model(input_ids=IDS).logits, peft(IDS).logits) <= CLOSE
        assert distance(model(input_ids=IDS).logits, BASES[family]()(IDS).logits) > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_starts_trains_and_runs_as_pefts(family):
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}[family]
    options = {"r": 3, "lora_alpha": 5, "target_modules": targets, "use_dora": True}
    model = attached("lora", BASES[family](), random=False, **options)
    peft = get_peft_model(BASES[family](), LoraConfig(**options, fan_in_fan_out=family == "gpt2")).train()
    ours = model.new_modifications()
    assert len(ours) == 4
    pairs = []
    for path, (part,) in ours.items():
        layer = peft.base_model.model.get_submodule(path)
        theirs = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        theirs.append(layer.lora_magnitude_vector["default"].weight)
        assert distance(part.magnitude, theirs[2]) <= CLOSE, "the start is not the rows' lengths"
        pairs += [(getattr(part, name), other) for name, other in zip(("down", "up", "magnitude"), theirs, strict=True)]
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.normal_(std=0.3).add_(1.0 if mine.ndim == 1 else 0.0))
    assert distance(model(input_ids=IDS).logits, peft(IDS).logits) <= CLOSE
    loss_of(model).backward()
    peft(input_ids=IDS, labels=IDS).loss.backward()
    for mine, other in pairs:
        assert distance(mine.grad, other.grad) <= 10 * CLOSE


def test_a_fresh_dora_has_its_magnitude_from_the_base_only():
    attention = tiny_llama().requires_grad_(False).model.layers[0].self_attn
    part = next(iter(built("lora", tiny_llama(), use_dora=True).values()))
    assert "magnitude" not in part.tensors
    part.bind(attention.q_proj.weight)
    assert torch.equal(part.magnitude, attention.q_proj.weight.norm(dim=1))
    part.tensors["magnitude"] = torch.ones(32)
    part.bind(attention.o_proj.weight)
    assert torch.equal(part.magnitude, torch.ones(32)), "what it learned is not put back"


def with_biases(base):
    """The base where every linear layer but the head has a bias, zero if it had none."""
    for path, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is None and path != "lm_head":
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    return base


@pytest.mark.parametrize(("family", "count"), [("llama", 14), ("gpt2", 8 + 5)])
def test_bitfit_trains_biases(family, count):
    """Run and trained as the base's own biases are: those of its norms too, where they have one."""
    model = attached("bitfit", BASES[family]())
    own = with_biases(BASES[family]())
    ours = {path: part.shift for path, (part,) in model.new_modifications().items()}
    assert len(ours) == count
    biases = {path: own.get_submodule(path).bias for path in ours}
    with torch.no_grad():
        for path, shift in ours.items():
            biases[path] += shift
    loss_of(model).backward()
    own(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        assert distance(model(input_ids=IDS).logits, own(IDS).logits) <= CLOSE
    for path, shift in ours.items():  # a key's bias has no gradient but rounding
        assert torch.allclose(shift.grad, biases[path].grad, rtol=1e-3, atol=1e-6), path


def test_bitfit_where_the_base_has_biases_of_its_own():
    assert len(built("bitfit", tiny_gpt2(), own_biases=True)) == 13
    assert len(built("bitfit", tiny_gpt2(), own_biases=True, norms=False)) == 8
    qwen_like = with_biases(tiny_llama())
    qwen_like.model.layers[0].self_attn.o_proj.bias = None
    assert len(built("bitfit", qwen_like, own_biases=True)) == 13
    with pytest.raises(UsageError, match="no biases") as caught:
        built("bitfit", tiny_llama(), own_biases=True)
    assert "own_biases" in caught.value.hint


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_is_fine_tuning(family):
    """Three steps of gradient descent on the changes are three on the weights and biases themselves."""
    model = attached("full", BASES[family](), random=False)
    own = BASES[family]().requires_grad_(False)
    ours = model.new_modifications()
    changed = {path: own.get_submodule(path).requires_grad_(True) for path in ours}
    optimizers = [torch.optim.SGD(p, lr=0.2) for p in (model.trainable_parameters(), [*_parameters(changed.values())])]
    for _ in range(3):
        for optimizer, loss in zip(optimizers, (loss_of(model), own(input_ids=IDS, labels=IDS).loss), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    before = BASES[family]()
    for path, (part,) in ours.items():
        module, was = changed[path], before.get_submodule(path)
        moved = module.weight - was.weight
        moved = moved if isinstance(module, torch.nn.Linear) else moved.mT
        assert distance(part.weight, moved) <= 1e-4 and moved.any(), path
        assert ("bias" in part.tensors) == (was.bias is not None)
        if was.bias is not None:
            assert torch.allclose(part.bias, module.bias - was.bias, atol=1e-6), path


def _parameters(modules):
    return [parameter for module in modules for parameter in module.parameters()]


def test_full_with_norms():
    llama, gpt2 = built("full", tiny_llama(), norms=True), built("full", tiny_gpt2(), norms=True)
    assert sum(part.form == "affine" for part in llama.values()) == 5
    assert all("shift" in part.tensors for part in gpt2.values() if part.form == "affine")
    assert not any("shift" in part.tensors for part in llama.values())
    model, own = attached("full", tiny_gpt2(), norms=True), tiny_gpt2()
    with torch.no_grad():
        for path, (part,) in model.new_modifications().items():
            module = own.get_submodule(path)
            if part.form == "affine":  # w' = w + g·w, b' = b + g·b + s
                module.weight += part.gain * module.weight
                module.bias += part.gain * module.bias + part.shift
            else:
                module.weight += part.weight.mT
                module.bias += part.bias
        assert distance(model(input_ids=IDS).logits, own(IDS).logits) <= CLOSE


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_is_what_a_cache_begins_with(family):
    """transformers' own cache, filled with the same keys and values; positions count from 0 all the same."""
    base = BASES[family]()
    model = attached("prefix", base, num_virtual_tokens=5)
    own, cache = BASES[family](), DynamicCache()
    for layer, (part,) in enumerate(model.new_modifications().values()):
        held = (t.detach()[None].expand(len(IDS), -1, -1, -1) for t in (part.keys, part.values))
        cache.update(*held, layer)
    with torch.no_grad():
        theirs = own(IDS, past_key_values=cache, position_ids=torch.arange(IDS.shape[1])[None]).logits
        assert distance(model(input_ids=IDS).logits, theirs) <= CLOSE
        assert distance(model(input_ids=IDS).logits, own(IDS).logits) > 0.01


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("ia3", {"target_modules": "key", "feedforward_modules": "ffn_down"}, "no site"),
        ("ia3", {"target_modules": "key", "feedforward_modules": "key"}, "not its own"),
        ("prefix", {"num_virtual_tokens": 0}, "learns nothing"),
        ("prefix", {"init_std": 0.0}, "learns nothing"),
        ("prefix", {"target_modules": "ffn_down"}, "is none"),
        ("bitfit", {"target_modules": "w_proj"}, "no site"),
        ("full", {"target_modules": "attention"}, "whole weights"),
        ("lora", {"use_dora": True, "target_modules": "embedding"}, "linear"),
    ],
)
def test_wrong_options_are_named(method, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        built(method, tiny_gpt2(), **options)
    assert caught.value.hint


def test_cross_attention_gets_a_prefix_only_when_asked():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert len(built("prefix", base)) == 4 and cross not in built("prefix", base)
    assert len(built("prefix", base, cross_attention=True)) == 6
    assert set(built("prefix", base, target_modules="cross.attention", cross_attention=True)) == {
        cross,
        cross.replace("block.0", "block.1"),
    }
    with pytest.raises(UsageError, match="cross attention only"):
        built("prefix", base, target_modules="cross.attention")


@pytest.mark.parametrize(
    ("method", "options"),
    [("ia3", []), ("prefix", ["num_virtual_tokens=4"]), ("bitfit", []), ("full", []), ("lora", ["use_dora=true"])],
)
def test_from_the_command_line(method, options, tiny_folder, tmp_path, capsys, monkeypatch):
    """Trained, stored, run, and gone on with: two steps more move what was stored."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}? ", "completion": "yes"}) for i in range(8)))
    hub = adapterhub.open(tmp_path / "hub", create=True)
    monkeypatch.chdir(hub.root)
    common = ["train", "--data", data, "--base", tiny_folder, "--steps", "2", "--lr", "0.01"]

    def train(*more):
        assert execute([*map(str, common), *more]) == 0, capsys.readouterr().err

    train("--method", method, "--name", "me/a", *(word for option in options for word in ("--set", option)))
    train("--continue", "me/a")
    releases = [hub.resolve(f"me/a@{version}") for version in ("0.1.0", "0.2.0")]
    assert releases[0].manifest.method.name == method
    before, after = (Adapter.load(hub, release).tensors for release in releases)
    learned = {name for name, tensor in before.items() if tensor.is_floating_point() and not name.endswith("scale")}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == learned
    model = hub.load(str(tiny_folder), "me/a@0.1.0")
    with torch.no_grad():
        assert distance(model(input_ids=IDS).logits, tiny_llama()(IDS).logits) > 1e-5
