"""The import verb: a PEFT folder as a release, its base, its licence, and what is refused on the way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.bases import fingerprint as fingerprints
from adapterhub.bases import loading
from adapterhub.errors import (
    HubError,
    IncompatibleBase,
    IntegrityError,
    NameInUse,
    NoEffect,
    NotFound,
    UnsafeFile,
    UsageError,
)
from adapterhub.formats import importing

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_folder):
    """A trained LoRA whose config names the base's folder."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    edit(tmp_path / "lora", base_model_name_or_path=str(tiny_folder))
    return tmp_path / "lora"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder, change):
    save_file({name: change(tensor) for name, tensor in load_file(folder / TENSORS).items()}, folder / TENSORS)


def test_a_release_that_says_where_it_came_from(hub, folder, tiny_folder):
    release = hub.import_adapter(folder, name="me/x", version="1.2.3", licence="MIT")
    manifest = hub.resolve("me/x@1.2.3").manifest
    assert manifest == release.manifest and manifest.licence == "MIT"
    assert manifest.method.name == "lora" and manifest.method.distribution.startswith("adapterhub ")
    assert manifest.method.options == {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": manifest.method.options["target_modules"],
    }
    assert sorted(manifest.method.options["target_modules"]) == ["q_proj", "up_proj"]
    assert manifest.recipe["imported"] == "peft" and manifest.recipe["peft_version"]
    assert set(manifest.recipe["files"]) == {"adapter_config.json", TENSORS}
    assert set(manifest.forms) == {
        f"model.layers.{n}.{m}" for n in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")
    } and set(map(tuple, manifest.forms.values())) == {("low_rank",)}
    assert manifest.base.name == tiny_folder.name and manifest.base.architecture == "llama"
    # A second opinion on the record: that of the loaded model.
    model = hub.load(str(tiny_folder), device="cpu").base
    assert fingerprints.fingerprint(model).base.structure == manifest.base.structure
    stored = load_file(folder / TENSORS)
    for name, tensor in Adapter.load(hub, release).tensors.items():
        path, _, _, key = name.rsplit(".", 3)
        if key == "scale":
            assert tensor.item() == 1.5
        else:
            assert torch.equal(tensor, stored[f"base_model.model.{path}.lora_{'A' if key == 'down' else 'B'}.weight"])


def test_the_same_again_is_no_new_release(hub, folder):
    first = hub.import_adapter(folder, name="me/x")
    assert hub.import_adapter(folder, name="me/x") == first and len(hub.releases("me/x")) == 1
    assert hub.import_adapter(folder, name="me/x", version="0.1.0") == first
    change(folder, lambda t: t * 2)
    with pytest.raises(NameInUse):
        hub.import_adapter(folder, name="me/x", version="0.1.0")
    assert hub.import_adapter(folder, name="me/x").version == "0.2.0"


def test_half_precision_is_kept(hub, folder):
    change(folder, lambda t: t.bfloat16())
    tensors = Adapter.load(hub, hub.import_adapter(folder, name="me/x")).tensors
    assert {t.dtype for name, t in tensors.items() if not name.endswith("scale")} == {torch.bfloat16}


def test_the_sites_need_no_weights_of_the_base(hub, folder, monkeypatch):
    """They come from the config alone: every parameter of the skeleton is on the meta device."""
    seen = []
    real = loading.skeleton
    monkeypatch.setattr(loading, "skeleton", lambda resolved: seen.append(real(resolved)) or seen[-1])
    monkeypatch.setattr(loading, "load_model", None)
    hub.import_adapter(folder, name="me/x")
    assert {p.device.type for p in seen[0].parameters()} == {"meta"}


@pytest.mark.parametrize(
    "named", [None, "nobody/has-this-one", "/no/such/folder", "~nobody-here/x", "a" * 5000, "a\0b", ""]
)
def test_a_base_that_cannot_be_had(named, hub, folder):
    edit(folder, base_model_name_or_path=named)
    with pytest.raises(NotFound) as caught:
        hub.import_adapter(folder, name="me/x")
    assert "--base" in caught.value.hint and len(str(caught.value)) < 600
    assert hub.releases() == []


def test_the_base_given_must_be_the_one_named_if_that_is_here(hub, folder, tmp_path, tiny_model, tiny_saved):
    other = tiny_saved(tmp_path / "other", tiny_model(seed=7))
    with pytest.raises(IncompatibleBase):
        hub.import_adapter(folder, name="me/x", base=other)
    with pytest.warns(UserWarning, match="other"):
        assert hub.import_adapter(folder, name="me/x", base=other, force=True).manifest.base.name == "other"
    edit(folder, base_model_name_or_path=str(tmp_path))  # a folder, but no checkpoint: nothing to compare with
    hub.import_adapter(folder, name="me/y", base=other)


def test_D9_another_shape_is_refused(hub, folder, tmp_path, tiny_model, tiny_saved):
    wide = tiny_saved(tmp_path / "wide", tiny_model(intermediate_size=48))
    with pytest.raises(IncompatibleBase) as caught:
        hub.import_adapter(folder, name="me/x", base=wide)
    told = str(caught.value)
    assert "layers.0.mlp.up_proj" in told and "layers.1.mlp.up_proj" in told and "q_proj" not in told
    assert hub.releases() == []


def test_an_adapter_that_changes_nothing_is_refused(hub, folder):
    stored = load_file(folder / TENSORS)
    save_file({n: t * 0 if "lora_B" in n else t for n, t in stored.items()}, folder / TENSORS)
    with pytest.raises(NoEffect):
        hub.import_adapter(folder, name="me/x")
    save_file(stored, folder / TENSORS)
    edit(folder, lora_alpha=0)
    with pytest.raises(NoEffect):
        hub.import_adapter(folder, name="me/x")
    assert hub.releases() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_D8_values_that_are_not_finite_are_refused(value, hub, folder):
    def poison(tensor):
        tensor = tensor.clone()
        tensor[0, 0] = value
        return tensor

    change(folder, poison)
    with pytest.raises(UnsafeFile, match=r"lora_A"):
        hub.import_adapter(folder, name="me/x")
    assert hub.releases() == []


def test_truncated_tensors_are_refused(hub, folder):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-7])
    with pytest.raises(IntegrityError):
        hub.import_adapter(folder, name="me/x")


def test_D9_a_rank_above_the_widths_is_told(hub, folder):
    pairs = {n: t.repeat(9, 1) if "lora_A" in n else t.repeat(1, 9) for n, t in load_file(folder / TENSORS).items()}
    save_file(pairs, folder / TENSORS)
    edit(folder, r=36)
    with pytest.warns(UserWarning, match="rank 36 .*rank 32 holds the same"):
        hub.import_adapter(folder, name="me/x")


def test_the_wrong_folder(hub, tmp_path):
    with pytest.raises(NotFound, match="no folder"):
        hub.import_adapter(tmp_path / "none", name="me/x")
    with pytest.raises(NotFound, match=r"adapter_config\.json"):
        hub.import_adapter(tmp_path, name="me/x")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="bundle") as caught:
        hub.import_adapter(tmp_path, name="me/x")
    assert "install" in caught.value.hint


def test_names_and_versions_are_looked_at_first(hub, tmp_path):
    with pytest.raises(UsageError, match="name"):
        hub.import_adapter(tmp_path, name="Me/X")
    with pytest.raises(UsageError, match="version"):
        hub.import_adapter(tmp_path, name="me/x", version="1")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nbase_model: x\nlicense: apache-2.0\ntags:\n- lora\n---\n# Hello", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\nlicense: other\x1b[31m\n---\n", None),
        ("# Hello\n---\nlicense: mit\n---\n", None),
        ("---\ntags: []\n---\nlicense: mit\n---\n", None),
        ("", None),
    ],
)
def test_licence_of_the_card(card, licence, hub, folder):
    (folder / "README.md").write_bytes(card.encode())
    assert importing._card_licence(folder) == licence


def test_licence_given_wins_over_the_card(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert hub.import_adapter(folder, name="me/x").manifest.licence == "mit"
    assert hub.import_adapter(folder, name="me/y", licence="Apache-2.0").manifest.licence == "Apache-2.0"


def test_a_base_of_no_known_architecture(hub, folder, tiny_folder, tmp_path):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text()) | {"model_type": "nothing_known"}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match="odd") as caught:
        hub.import_adapter(folder, name="me/x", base=tmp_path / "odd")
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [None, {"hidden_size": "x"}, {"hidden_size": -1}, {"num_attention_heads": 0}, {"rope_scaling": "x"},
     {"pad_token_id": 10**9}, {"dtype": "nosuch"}, {"num_hidden_layers": -5}],
    ids=str,
)  # fmt: skip
def test_a_base_whose_config_transformers_rejects(changes, hub, folder, tiny_folder, tmp_path):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "mine"))
    config = base / "config.json"
    config.write_text(json.dumps(changes and json.loads(config.read_text()) | changes))
    with pytest.raises(HubError):
        hub.import_adapter(folder, name="me/x", base=base)
    assert not hub.releases()


# --- a base that is loaded already -----------------------------------------------------------------------------------

IDS = torch.arange(3, 27).reshape(2, 12)
ANY = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules=["v_proj"], use_dora=True, task_type="CAUSAL_LM", init_lora_weights=False),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "whole": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}  # fmt: skip
"""From the config alone, by the weights, by PEFT's own modules, by a forward pass of the base, a whole module."""


@pytest.fixture(params=ANY)
def made_by_peft(request, tmp_path, tiny_model):
    """(a folder that names no base, PEFT's logits)."""
    torch.manual_seed(5)
    model = get_peft_model(tiny_model(), ANY[request.param]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", base_model_name_or_path=None)
    return tmp_path / "theirs", model.eval()(IDS).logits[:, -12:].detach()


def test_a_loaded_base_is_read_and_left_as_it_is(hub, made_by_peft, tiny_model):
    folder, want = made_by_peft
    base = tiny_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    hub.import_adapter(folder, name="me/x", base=base)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    got = hub.load(base, "me/x")(IDS).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_a_loaded_base_gives_what_its_folder_gives_also_while_it_runs_adapters(hub, made_by_peft, tiny_folder):
    folder, _ = made_by_peft
    release = hub.import_adapter(folder, name="me/x", base=tiny_folder)
    model = hub.load(tiny_folder, "me/x", device="cpu")
    assert hub.import_adapter(folder, name="me/x", base=model.base) == release  # the same again is no new release


def test_a_loaded_base_of_half_precision_is_widened_as_its_folder_is(hub, made_by_peft, tiny_model, tmp_path):
    folder, _ = made_by_peft
    tiny_model().bfloat16().save_pretrained(tmp_path / "half")
    base = hub.load(tmp_path / "half", dtype="stored", device="cpu").base
    assert base.dtype == torch.bfloat16
    releases = [hub.import_adapter(folder, name="me/x", base=given) for given in (base, tmp_path / "half")]
    assert releases[0] == releases[1] and base.dtype == torch.bfloat16


def test_a_loaded_model_that_is_not_plain_is_refused(hub, tmp_path, tiny_model):
    torch.manual_seed(5)
    wrapped = get_peft_model(tiny_model(), ANY["dora"]())
    wrapped.save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", base_model_name_or_path=None)
    with pytest.raises(UsageError, match="PeftModelForCausalLM is not a plain transformers model"):
        hub.import_adapter(tmp_path / "theirs", name="me/x", base=wrapped)
    with pytest.raises(IncompatibleBase, match=r"not as its class LlamaForCausalLM makes it: .*v_proj\.base_layer"):
        hub.import_adapter(tmp_path / "theirs", name="me/x", base=wrapped.base_model.model)
    assert hub.releases() == []
