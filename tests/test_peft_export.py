"""What goes out as PEFT files, and what is refused; that the logits are PEFT's: tests/test_peft_table.py."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import adapterhub
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases import loading, resolution
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import IncompatibleBase, NotFound, UsageError
from adapterhub.formats.peft.config import CONFIG
from adapterhub.formats.peft.lora import PREFIX
from adapterhub.formats.peft.read import TENSORS
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.prefix import Prefix
from adapterhub.forms.sparse import Sparse
from adapterhub.sites import sites
from adapterhub.testing.families import tiny

IDS = torch.arange(3, 27).reshape(2, 12)
Q, K, DOWN = (f"model.layers.0.{tail}" for tail in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def gpt2(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def publish(hub, base, parts, name="me/x"):
    record, sketch = fingerprint(base)
    return publish_tensors(hub, parts, name=name, base=record, sketch=sketch)


def random(form, path, base, seed=0):
    """One of the form for the site."""
    torch.manual_seed(seed)
    site = next(site for site in sites(loading.load_model(resolution.resolve(base))) if site.path == path)
    return form.random(site)


def same(hub, base, folder, reference="me/x"):
    """Whether PEFT gives with the exported files what we give; their type."""
    hub.export(reference, folder, base=base)
    theirs = PeftModel.from_pretrained(loading.load_model(resolution.resolve(base)), folder).eval()
    with torch.no_grad():
        ours, wanted = hub.load(base, reference, device="cpu")(input_ids=IDS).logits, theirs(IDS).logits
        plain = loading.load_model(resolution.resolve(base))(IDS).logits
    largest = wanted.abs().max()
    assert (ours - plain).abs().max() > 1e-3 * largest and (ours - wanted).abs().max() < 1e-5 * largest
    return json.loads((folder / CONFIG).read_text())


def test_several_forms_in_one_lora(tmp_path, hub, tiny_folder):
    """Low rank, sparse, dense and a shift at one module are one pair of factors and a bias; what needs no base, asks none."""
    forms = [random(form, Q, tiny_folder, n) for n, form in enumerate((LowRank, Sparse, Dense))]
    parts = {Q: [*forms, Affine.of(shift=torch.randn(32))], K: [random(Dense, K, tiny_folder)]}
    publish(hub, tiny_folder, parts)
    config = same(hub, tiny_folder, tmp_path / "out")
    assert config["peft_type"] == "LORA" and config["lora_bias"] and not config["modules_to_save"]
    hub.export("me/x", tmp_path / "again")


def test_sparse_keeps_its_size(tmp_path, hub, tiny_folder):
    parts = {path: [random(Sparse, path, tiny_folder)] for path in (Q, DOWN)}
    parts[DOWN][0] = Sparse.at(torch.tensor([5, 7, 300]), torch.randn(3), (32, 64))
    publish(hub, tiny_folder, parts)
    config = same(hub, tiny_folder, tmp_path / "out")
    stored = load_file(tmp_path / "out" / TENSORS)
    assert (config["peft_type"], config["r"]) == ("SHIRA", 2)  # 128 values at q_proj: twice its 64 inputs and outputs
    assert stored[f"{PREFIX}{DOWN}.shira_weight"].count_nonzero() == 3


def test_what_one_type_does_not_say_goes_along_whole(tmp_path, hub, tiny_folder, gpt2, tiny_model, tiny_saved):
    gains = {K: [Affine.of(gain=torch.randn(16))], DOWN: [Affine.of(gain=torch.randn(64), into=True)]}
    publish(hub, tiny_folder, gains | {"lm_head": [random(Dense, "lm_head", tiny_folder)]}, "me/a")
    config = same(hub, tiny_folder, tmp_path / "a", "me/a")
    assert config["peft_type"] == "IA3" and config["modules_to_save"] == ["lm_head"]
    assert config["feedforward_modules"] == [DOWN]
    with pytest.raises(NotFound, match="base model is not at hand") as caught:
        hub.export("me/a", tmp_path / "b")
    assert "--base" in caught.value.hint and not (tmp_path / "b").exists()

    other = tiny_saved(tmp_path / "other", tiny_model(seed=7))
    with pytest.raises(IncompatibleBase, match="another model"):
        hub.export("me/a", tmp_path / "b", base=other)

    dora = random(DoRA, Q, tiny_folder)
    publish(hub, tiny_folder, {Q: [dora], K: [random(LowRank, K, tiny_folder)]}, "me/c")
    config = same(hub, tiny_folder, tmp_path / "c", "me/c")
    assert config["use_dora"] and config["modules_to_save"] == [K]

    norm, shift = "transformer.h.0.ln_1", "transformer.h.0.mlp.c_fc"
    parts = {norm: [Affine.of(gain=torch.randn(32), shift=torch.randn(32))], shift: [Affine.of(shift=torch.randn(128))]}
    publish(hub, gpt2, parts, "me/d")
    assert same(hub, gpt2, tmp_path / "d", "me/d")["peft_type"] == "LN_TUNING"


def test_prefixes_that_move_no_positions(tmp_path, hub, tiny_folder, gpt2):
    """As our own method trains them. Turned keys say the same where positions are turns, and nothing does elsewhere."""
    for base, names in ((gpt2, "transformer.h.{}.attn"), (tiny_folder, "model.layers.{}.self_attn")):
        first = random(Prefix, names.format(0), base)
        parts = {names.format(n): [Prefix(**first.tensors)] for n in (0, 1)}
        publish(hub, base, parts, f"me/{base.name}")
    assert same(hub, tiny_folder, tmp_path / "a", f"me/{tiny_folder.name}")["peft_type"] == "PREFIX_TUNING"
    with pytest.raises(UsageError, match="move up 0 positions"):
        hub.export("me/gpt2", tmp_path / "b", base=gpt2)

    publish(hub, tiny_folder, {"model.layers.0.self_attn": [first]}, "me/one")
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn has no prefix"):
        hub.export("me/one", tmp_path / "b", base=tiny_folder)
    longer = Prefix(keys=torch.ones(2, 9, 8), values=torch.ones(2, 9, 8), shift=torch.tensor(0))
    publish(hub, tiny_folder, {"model.layers.0.self_attn": [first], "model.layers.1.self_attn": [longer]}, "me/two")
    with pytest.raises(UsageError, match="unlike long"):
        hub.export("me/two", tmp_path / "b", base=tiny_folder)


@pytest.mark.parametrize(
    ("path", "part", "words"),
    [
        ("transformer.h.0.attn.c_attn.query", Affine.of(shift=torch.ones(32)), "columns of a fused projection"),
        ("transformer.h.0.attn.c_attn", Affine.of(shift=torch.ones(96)), "a shift, which PEFT's types do not add"),
        ("transformer.ln_f", Affine.of(shift=torch.ones(32), into=True), "do not hold|no other gain"),
    ],
)
def test_what_is_refused_by_name(path, part, words, tmp_path, hub, gpt2):
    publish(hub, gpt2, {path: [part]})
    with pytest.raises(UsageError, match=f"(?s){path}.*({words})") as caught:
        hub.export("me/x", tmp_path / "out", base=gpt2)
    assert "bundle" in caught.value.hint and not (tmp_path / "out").exists()


def test_a_composition_that_does_not_add_up_is_refused(tmp_path, hub, tiny_folder):
    publish(hub, tiny_folder, {K: [Affine.of(gain=torch.randn(16))]}, "me/a")
    hub.compose("0.5*me/a", name="me/half")
    with pytest.raises(UsageError, match=f"{K}: .*is no change of a weight"):
        hub.export("me/half", tmp_path / "out", base=tiny_folder)


def test_an_ensemble_is_refused(tmp_path, hub, tiny_folder):
    publish(hub, tiny_folder, {K: [Affine.of(gain=torch.randn(16))]}, "me/a")
    hub.compose("logits(base + me/a)", name="me/both")
    with pytest.raises(UsageError, match="weighs whole models"):
        hub.export("me/both", tmp_path / "out", base=tiny_folder)
    assert not (tmp_path / "out").exists()
