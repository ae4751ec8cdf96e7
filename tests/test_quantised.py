"""Adapters on bases whose weights are not plain: right beside them, or refused in words. What is right comes from a plain copy of
the base with the numbers that each layer multiplies with, measured on unit vectors, and the change added by hand."""

import copy
import json
import warnings

import odd_weights
import pytest
import torch
from torch import nn

import adapterhub
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import BaseWarning, compare, fingerprint
from adapterhub.errors import HubError, IncompatibleBase, IntegrityError, NotFoldable, UsageError
from adapterhub.forms.dense import Dense
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.testing.bed import tiny_llama

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
QUERY = "model.layers.1.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BaseWarning)
        yield


@pytest.fixture(scope="module")
def base():
    return tiny_llama(hidden_size=64).requires_grad_(False)


@pytest.fixture(scope="module")
def parts(base):
    torch.manual_seed(1)
    outputs, inputs = base.get_submodule(QUERY).weight.shape
    factors = {"down": torch.randn(4, inputs) / 8, "up": torch.randn(outputs, 4) / 8, "scale": torch.tensor(1.5)}
    token = {"down": torch.randn(2, 96), "up": torch.randn(64, 2) / 8, "scale": torch.tensor(0.5)}
    return {
        "me/lora": {QUERY: LowRank(**factors)},
        "me/dense": {QUERY: Dense(weight=torch.randn(outputs, inputs) / 8)},
        "me/dora": {QUERY: DoRA(**factors, magnitude=torch.rand(outputs) + 0.5)},
        "me/tokens": {EMBEDDING: LowRank(**token)},
    }


@pytest.fixture(scope="module")
def hub(base, parts, tmp_path_factory):
    hub, made = adapterhub.open(tmp_path_factory.mktemp("hub"), create=True), fingerprint(base)
    for name, part in parts.items():
        each = {path: [modification] for path, modification in part.items()}
        publish_tensors(hub, each, name=name, base=made.base, sketch=made.sketch)
    return hub


def change(part, weight):
    """ΔW (outputs, inputs) by hand."""
    if isinstance(part, Dense):
        return part.weight
    low = part.scale * part.up @ part.down
    if isinstance(part, LowRank):
        return low
    return part.magnitude[:, None] * (weight + low) / (weight + low).norm(dim=1, keepdim=True) - weight


@torch.no_grad()
def by_hand(base, odd, part):
    """The logits of a plain copy that multiplies with the odd one's numbers, the change added."""
    plain = copy.deepcopy(base)
    for path, module in plain.named_modules():
        if type(module) is nn.Linear:
            module.weight.copy_(odd.get_submodule(path)(torch.eye(module.in_features)).mT)
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(odd.get_submodule(path)(torch.arange(module.num_embeddings)))
    for path, modification in part.items():
        weight = plain.get_submodule(path).weight
        weight += change(modification, weight) if path == QUERY else change(modification, None).mT
    return plain(IDS).logits


def made(base, kind):
    return odd_weights.replaced(copy.deepcopy(base), kind)


@pytest.mark.parametrize("name", ["me/lora", "me/dense", "me/tokens"])
@pytest.mark.parametrize("kind", odd_weights.KINDS)
def test_what_needs_no_weight_runs_beside_it(hub, base, parts, kind, name):
    odd = made(base, kind)
    wanted = by_hand(base, odd, parts[name])
    model = hub.load(odd, name, force=True)
    assert (wanted - base(IDS).logits).abs().max() > 0.05
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-4)
    assert torch.allclose(
        model(IDS).logits, wanted, atol=1e-4
    )  # with gradients, where dense changes go through plain weights


@pytest.mark.parametrize("kind", odd_weights.KINDS)
def test_dora_reads_the_numbers_or_is_refused(hub, base, parts, kind):
    odd = made(base, kind)
    if kind in odd_weights.READABLE:
        with torch.no_grad():
            assert torch.allclose(
                hub.load(odd, "me/dora", force=True)(IDS).logits, by_hand(base, odd, parts["me/dora"]), atol=1e-4
            )
        return
    with pytest.raises(IncompatibleBase, match=f"'dora' reads the base's own weight at {QUERY}") as caught:
        hub.load(odd, "me/dora", force=True)
    assert "unquantised" in caught.value.hint


@pytest.mark.parametrize("kind", [*odd_weights.KINDS, odd_weights.RoundingLinear])
def test_no_fold_and_nothing_changed(hub, base, kind):
    odd = made(base, kind)
    with torch.no_grad():
        before = odd(IDS).logits
        model = hub.load(odd, "me/lora", force=True)
        with pytest.raises(NotFoldable, match=QUERY) as caught:
            model.fold()
        assert caught.value.hint
        assert torch.equal(model.detach()(IDS).logits, before)


def test_a_layer_that_kept_its_plain_weight_folds(hub, base, parts):
    odd = odd_weights.replaced(copy.deepcopy(base), "packed", keep=("lm_head", "q_proj"))
    wanted = by_hand(base, odd, parts["me/lora"])
    with torch.no_grad():
        assert torch.allclose(hub.load(odd, "me/lora", force=True).fold()(IDS).logits, wanted, atol=1e-4)


def test_a_weight_kept_as_a_buffer_folds(hub, base, parts):
    kept = copy.deepcopy(base)
    layer = kept.get_submodule(QUERY)
    weight = layer._parameters.pop("weight").detach()
    layer.register_buffer("weight", weight)
    wanted = by_hand(base, kept, parts["me/lora"])
    with torch.no_grad():
        assert torch.allclose(hub.load(kept, "me/lora").fold()(IDS).logits, wanted, atol=1e-4)


def test_an_embedding_of_integers(hub, base, parts):
    odd = copy.deepcopy(base)
    odd.model.embed_tokens = odd_weights.IntegerEmbedding(odd.model.embed_tokens)
    wanted = by_hand(base, odd, parts["me/tokens"])
    model = hub.load(odd, "me/tokens", force=True)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-4)
        with pytest.raises(NotFoldable, match="int8"):
            model.fold()


@pytest.mark.parametrize("kind", odd_weights.KINDS)
def test_the_verdict(hub, base, kind):
    odd = made(base, kind)
    if kind in odd_weights.READABLE:  # codes and a scale, or the numbers themselves
        assert compare(fingerprint(base), fingerprint(odd)).kind == ("copy" if kind == "tensor" else "same")
        return
    with pytest.raises(IncompatibleBase, match="not known") as caught:
        hub.load(odd, "me/lora")
    assert "--force" in caught.value.hint


def test_what_was_made_on_a_quantised_base_knows_it_again(base):
    mine = fingerprint(made(base, "packed"))
    other = copy.deepcopy(base)
    other.get_submodule(QUERY).weight.mul_(0.5)
    assert compare(mine, fingerprint(made(base, "packed"))).kind == "same"
    assert compare(mine, fingerprint(made(other, "packed"))).kind == "another"


def test_unknown_numbers_are_never_the_same(base):
    """Nothing tells two such bases apart, so their records say nothing."""
    mute = fingerprint(made(base, "mute"))
    assert mute.sketch == fingerprint(made(base, "mute")).sketch
    assert compare(mute, mute).kind == "another"


def test_a_base_on_the_meta_device_is_refused(hub):
    with torch.device("meta"):
        bare = tiny_llama(hidden_size=64)
    for force in (False, True):
        with pytest.raises(IncompatibleBase, match="meta device") as caught:
            hub.load(bare, "me/lora", force=force)
        assert caught.value.hint


def test_an_offloaded_base_runs_and_does_not_fold(hub, base, parts):
    from accelerate import cpu_offload

    away = cpu_offload(copy.deepcopy(base), execution_device=torch.device("cpu"))
    assert away.get_submodule(QUERY).weight.is_meta
    for name in ("me/lora", "me/dense", "me/dora"):
        model = hub.load(away, name)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                assert torch.allclose(model(IDS).logits, by_hand(base, base, parts[name]), atol=1e-4)
        with pytest.raises(NotFoldable, match="offloaded"):
            model.fold()


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(hub, tiny_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "ab", "completion": "cd"}) + "\n")

    def train(model, method, **options):
        model.config._name_or_path = str(tiny_folder)
        return hub.train(model, method, data, "me/new", options=options, steps=2, batch_size=1, resume=False)

    return train


@pytest.mark.parametrize("kind", odd_weights.KINDS)
@pytest.mark.parametrize("method", ["full", "lt_sft"])
def test_methods_that_train_the_weight_are_refused_by_name(train, base, method, kind):
    with pytest.raises(UsageError, match=rf"{method} trains through the base's own weights, and at model\.layers\.0"):
        train(made(base, kind), method)


def test_full_trains_the_layers_that_are_plain(train, base):
    made_of = odd_weights.replaced(copy.deepcopy(base), "packed", keep=("lm_head", "q_proj"))
    release = train(made_of, "full", target_modules="q_proj")
    assert release.manifest.forms.keys() == {f"model.layers.{n}.self_attn.q_proj" for n in range(2)}


def test_a_dense_change_that_goes_on_is_refused_too(hub, base, tiny_folder, tmp_path):
    """No method is recorded: what tells is that the form trains through the weight."""
    odd = made(base, "tensor")
    odd.config._name_or_path = str(tiny_folder)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "ab", "completion": "cd"}) + "\n")
    with pytest.raises(UsageError, match=f"the stage 'train' trains through the base's own weights, and at {QUERY}"):
        hub.train(odd, data=data, continue_from="me/dense", steps=2)


@pytest.mark.parametrize("kind", ["tensor", "packed", "integer"])
def test_lora_trains_beside_them(train, base, kind):
    assert train(made(base, kind), "lora").manifest.forms


# --- folders -------------------------------------------------------------------------------------------------------


def test_integers_without_a_scale_are_refused(hub, base, tiny_saved, tmp_path):
    """transformers would load the codes as numbers."""
    from safetensors.torch import load_file, save_file

    folder = tiny_saved(tmp_path / "codes", base)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{QUERY}.weight"] = odd_weights.coded(tensors[f"{QUERY}.weight"])[0]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"{QUERY}\.weight as integers"):
        hub.load(str(folder), "me/lora", force=True)


def test_a_folder_whose_quantisation_is_not_installed(hub, base, tiny_saved, tmp_path):
    folder = tiny_saved(tmp_path / "gptq", base)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError) as caught:
        hub.load(str(folder), "me/lora")
    assert "aqlm" in caught.value.hint
    folding = {step["name"]: step for step in hub.explain("me/lora", str(folder))["steps"]}["folding"]
    assert folding["state"] == "note" and "aqlm" in folding["told"]


# --- the libraries themselves --------------------------------------------------------------------------------------


def quanto(model):
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


def torchao(model):
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(model, library.Int8WeightOnlyConfig())
    return model


def bitsandbytes(bits):
    def replace(model):
        library = pytest.importorskip("bitsandbytes").nn

        def make(layer):
            if bits == 8:
                odd = library.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
            else:
                odd = library.Linear4bit(layer.in_features, layer.out_features, False, torch.float32, quant_type="nf4")
            odd.load_state_dict(layer.state_dict())
            return odd.to("cpu")

        return odd_weights.replaced(model, make)

    return replace


LIBRARIES = {"quanto": quanto, "torchao": torchao, "8 bits": bitsandbytes(8), "4 bits": bitsandbytes(4)}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries(hub, base, parts, library):
    odd = LIBRARIES[library](copy.deepcopy(base)).requires_grad_(False)
    near = {"atol": 2e-2 if library == "8 bits" else 1e-4}  # its 8 bits round what goes in, too
    for name in ("me/lora", "me/dora"):
        model, wanted = hub.load(odd, name), by_hand(base, odd, parts[name])  # a quantised copy: no force
        with torch.no_grad():
            assert torch.allclose(model(IDS).logits, wanted, **near)
        with pytest.raises(NotFoldable, match=QUERY):
            model.fold()
