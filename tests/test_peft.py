"""PEFT files: logits against peft itself, both ways; what cannot be represented is refused by name."""

import copy
import importlib
import json
import math
import sys
import time
import warnings
from dataclasses import fields
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import adapterhub
from adapterhub.adapters.names import named_tensors
from adapterhub.adapters.publish import publish_tensors
from adapterhub.errors import (
    HubError,
    IncompatibleBase,
    IntegrityError,
    ManifestError,
    NotFound,
    UnsafeFile,
    UsageError,
)
from adapterhub.formats.peft import bounded_re
from adapterhub.formats.peft import config as peft_config
from adapterhub.formats.peft import read as peft
from adapterhub.formats.peft.config import CONFIG, MEASURED, NEUTRAL, REFUSED, read_config
from adapterhub.formats.peft.lora import PREFIX
from adapterhub.formats.peft.targets import patterned
from adapterhub.formats.peft.types import REFUSED as REFUSED_TYPES
from adapterhub.forms.low_rank import LowRank
from adapterhub.sites import sites

IDS = torch.arange(3, 27).reshape(2, 12)
LAYER = "model.layers.{}.self_attn.{}_proj"
EXACT = 1e-5
"""Of the largest logit."""

VARIANTS = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "uneven scale": {"r": 3, "lora_alpha": 16, "target_modules": ["o_proj"]},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "all-linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "expression": {"r": 4, "target_modules": r".*layers\.[01]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "whole path": {"r": 4, "target_modules": [LAYER.format(1, "k")]},
    "rank pattern": {"r": 4, "target_modules": ["q_proj", "k_proj", "up_proj"],
                     "rank_pattern": {"k_proj": 2, r"layers\.1\..*q_proj": 6, "q_proj": 3}},
    "alpha pattern": {"r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"],
                      "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "v_proj": 1}},
    "rank and alpha pattern, rslora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "gate_proj"],
                                       "rank_pattern": {"q_proj": 7}, "alpha_pattern": {r"0\.mlp\.gate_proj": 2}},
    "layers": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "layers pattern": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "excluded": {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
}  # fmt: skip


def saved(folder, config, seed=1, model=None, **changes):
    """A LoRA saved by peft with random values in every tensor; its logits by peft."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **config) if isinstance(config, dict) else config
    wrapped = get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    with torch.no_grad():
        logits = wrapped(IDS).logits
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    if changes:
        edit(folder, **changes)
    return logits


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def plain(tmp_path, tiny_model):
    """A folder with an ordinary LoRA of the tiny Llama."""
    saved(tmp_path / "plain", VARIANTS["lora"], model=tiny_model())
    return tmp_path / "plain"


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


class BuildContext:
    """A base that is in memory, as `peft.read` asks for it."""

    def __init__(self, model):
        self.skeleton, self.sites, self.load = model, sites(model), lambda: copy.deepcopy(model)


def read(folder, model):
    return peft.read(folder, read_config(folder), BuildContext(model))


def ours(hub, reference, base):
    with torch.no_grad():
        return hub.load(base, reference, device="cpu")(input_ids=IDS).logits


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", VARIANTS)
def test_same_logits_as_peft_both_ways(name, tmp_path, hub, tiny_model, tiny_folder):
    theirs = saved(tmp_path / "theirs", VARIANTS[name], model=tiny_model())
    with torch.no_grad():
        bare = tiny_model()(IDS).logits
    assert apart(theirs, bare) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hub.import_adapter(tmp_path / "theirs", name="me/x", base=tiny_folder)
    assert apart(ours(hub, "me/x", tiny_folder), theirs) < EXACT

    hub.export("me/x", tmp_path / "back")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing and of unexpected keys
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "back").eval()
    with torch.no_grad():
        assert apart(again(IDS).logits, theirs) < EXACT
    written = json.loads((tmp_path / "back" / CONFIG).read_text())
    assert written["use_rslora"] == VARIANTS[name].get("use_rslora", False)
    assert all(isinstance(alpha, int) for alpha in [written["lora_alpha"], *written["alpha_pattern"].values()])
    before, after = load_file(tmp_path / "theirs" / peft.TENSORS), load_file(tmp_path / "back" / peft.TENSORS)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    scales = again.base_model.get_submodule
    for path, module in get_peft_model(tiny_model(), LoraConfig(**VARIANTS[name])).base_model.named_modules():
        if hasattr(module, "lora_A"):  # to the rounding of a float32
            assert scales(path).scaling["default"] == pytest.approx(module.scaling["default"], rel=1e-7)


def test_options_are_the_methods_own_and_make_the_same_sites(tmp_path, hub, tiny_model, tiny_folder):
    from adapterhub import plugins

    method = plugins.load("methods", "lora")()
    for index, config in enumerate(VARIANTS.values()):
        saved(tmp_path / str(index), config, model=tiny_model())
        adapter = read(tmp_path / str(index), tiny_model())
        fresh = method.build(sites(tiny_model()), plugins.options(method.Config, adapter.method.options))
        shapes = {f"{path}.low_rank.0.{key}": t.shape for path, m in fresh.items() for key, t in m.tensors.items()}
        assert shapes == {name: tensor.shape for name, tensor in named_tensors(adapter.parts).items()}
        for path, modification in fresh.items():
            assert torch.equal(adapter.parts[path][0].scale, modification.scale)


def test_patterns_as_peft_matches_them():
    paths = [
        f"{start}model.layers.{n}.{tail}" for start in ("", "vision.") for n in (1, 11) for tail in ("q_proj", "mlp.up")
    ]
    patterns = {"1.q_proj": 1, "^model.layers.1.mlp.up": 2, "11.+_proj": 3, "layers.1.+": 4, "mlp.up": 5}
    wanted = {path: patterns.get(get_pattern_key(patterns, path), 0) for path in paths}
    assert patterned(patterns, 0, paths) == wanted
    assert len(set(wanted.values())) > 3


def test_every_field_of_pefts_config_is_known():
    """A new peft brings new switches: each must be read, refused or known to mean nothing."""
    read_fields = set(peft_config.LoraConfig.__struct_fields__)
    assert {field.name for field in fields(LoraConfig)} <= {*read_fields, *REFUSED, *MEASURED, *NEUTRAL}
    assert not set(REFUSED) & NEUTRAL and not set(REFUSED) & read_fields


@pytest.mark.parametrize("kind", [*REFUSED_TYPES, "NEWER", "", None, 7])
def test_refused_and_unknown_types_are_named(kind, plain):
    edit(plain, peft_type=kind)
    with pytest.raises(HubError, match=f"peft_type is .?{kind}") as caught:
        read_config(plain)
    assert REFUSED_TYPES.get(kind, "no type that we know") in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, [1]) for key in sorted(REFUSED)]
    + [
        ("init_lora_weights", start)
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", 1)
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(key, value, plain):
    edit(plain, **{key: value})
    with pytest.raises(HubError, match=key) as caught:
        read_config(plain)
    assert caught.value.hint


def test_pissa_would_be_wrong_and_is_refused(tmp_path, tiny_model):
    """Saved unconverted it belongs to changed base weights: on the plain base the logits are far off."""
    theirs = saved(tmp_path / "pissa", VARIANTS["lora"] | {"init_lora_weights": "pissa"}, model=tiny_model())
    with pytest.raises(HubError, match="pissa"):
        read_config(tmp_path / "pissa")
    edit(tmp_path / "pissa", init_lora_weights=True)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "pissa").eval()(IDS).logits
    assert apart(plain, theirs) > 0.05


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone_load(start, plain, tiny_model):
    edit(plain, init_lora_weights=start)
    assert read(plain, tiny_model()).parts


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("model.embed_tokens.lora_embedding_A", "no such|not among"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "nothing of DoRA"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "nothing of DoRA or a bias"),
        ("lm_head.base_layer.weight", "no tensor of this adapter"),
        ("lm_head.modules_to_save.weight", "no tensor of this adapter"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", r"\(2,\), where \(32, 32\) belongs"),
        ("model.norm.weight", r"\(2,\), where \(32,\) belongs"),
    ],
)
def test_tensors_left_over_are_named(extra, reason, plain, tiny_model):
    tensors = load_file(plain / peft.TENSORS)
    save_file(tensors | {PREFIX + extra: torch.ones(2)}, plain / peft.TENSORS)
    with pytest.raises(IntegrityError, match=f"{extra.partition('.lora')[0]}.*({reason})"):
        read(plain, tiny_model())


def test_all_faults_in_one_error(plain, tiny_model):
    tensors = load_file(plain / peft.TENSORS)
    q, v, down = LAYER.format(0, "q"), LAYER.format(1, "v"), "model.layers.0.mlp.down_proj"
    del tensors[f"{PREFIX}{q}.lora_A.weight"]
    tensors[f"{PREFIX}{v}.lora_A.weight"] = torch.ones(3, 32)
    tensors[f"{PREFIX}{down}.lora_B.weight"] = torch.ones(32, 4, dtype=torch.int32)
    tensors[f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
    tensors[f"{PREFIX}{LAYER.format(0, 'k')}.lora_A.weight"] = torch.ones(4, 32)
    tensors["stray"] = torch.ones(1)
    save_file(tensors, plain / peft.TENSORS)
    with pytest.raises(IntegrityError) as caught:
        read(plain, tiny_model())
    told = str(caught.value)
    assert told.startswith("6 faults")
    for place, reason in [(q, "lora_A is missing"), (v, "rank"), (down, "int32"), ("layers.7", "no such"), ("stray", "no LoRA"),
                          (LAYER.format(0, "k"), "not among target_modules")]:  # fmt: skip
        assert any(place in line and reason in line for line in told.splitlines()), place


def test_rank_of_the_config_must_be_the_tensors(plain, tiny_model):
    edit(plain, rank_pattern={LAYER.format(1, "q"): 5})
    with pytest.raises(IntegrityError, match=r"layers\.1\.self_attn\.q_proj: rank 4.*says 5") as caught:
        read(plain, tiny_model())
    assert "layers.0" not in str(caught.value)


def test_no_site_at_all(plain, tiny_model):
    shallow = tiny_model(num_hidden_layers=1)
    with pytest.raises(IncompatibleBase, match="3 faults") as caught:
        read(plain, shallow)
    assert str(caught.value).count("layers.1.") == 3 and "--base" in caught.value.hint


def test_D4_pickles_are_not_opened(plain, tiny_model):
    (plain / peft.TENSORS).unlink()
    with pytest.raises(NotFound):
        read(plain, tiny_model())
    (plain / "adapter_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(UnsafeFile, match=r"adapter_model\.bin") as caught:
        read(plain, tiny_model())
    assert "safetensors" in caught.value.hint


def test_modules_without_tensors_and_unknown_keys_are_told(plain, tiny_model):
    tensors = load_file(plain / peft.TENSORS)
    save_file({key: t for key, t in tensors.items() if "layers.1.self_attn.v" not in key}, plain / peft.TENSORS)
    with pytest.warns(UserWarning, match=r"no tensors for 1 .*layers\.1\.self_attn\.v_proj"):
        read(plain, tiny_model())
    edit(plain, use_quantum=True, auto_map={"x": "y"}, tokenizer_kwargs={}, megatron_core="evil")
    with pytest.warns(UserWarning, match="unknown keys .*auto_map, use_quantum"):
        read_config(plain)


# --- hostile configs (the catalogue's D5) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": "LORA", "r": 1e309}',
        '{"peft_type": "LORA", "lora_alpha": 1e309}',
        '{"peft_type": "LORA", "lora_alpha": NaN}',
        '{"peft_type": "LORA", "lora_alpha": 1' + "0" * 400 + "}",
        '{"peft_type": "LORA", "lora_alpha": 1' + "0" * 5000 + "}",
        '{"peft_type": "LORA", "r": -1}',
        '{"peft_type": "LORA", "r": 0}',
        '{"peft_type": "LORA", "r": true}',
        '{"peft_type": "LORA", "r": 2147483648}',
        '{"peft_type": "LORA", "rank_pattern": {"q": -1}}',
        '{"peft_type": "LORA", "r": 8, "r": 4}',
        '{"peft_type": "LORA", "target_modules": 5}',
        '{"peft_type": "LORA"}',
        '{"peft_type": "LORA"',
        "[1]",
        "\xff",
        "[" * 100_000 + "]" * 100_000,
        '{"peft_type": "LORA", "auto_mapping": ' + "[" * 500_000 + "]" * 500_000 + "}",
        '{"peft_type": "LORA", "note": "' + "x" * (1 << 20) + '"}',
        '{"peft_type": ["LORA"]}',
        '{"peft_type": "' + "A" * 10_000 + '"}',
    ],
    ids=range(21),
)
def test_D5_hostile_configs_are_refused_at_once(text, tmp_path):
    (tmp_path / CONFIG).write_bytes(text.encode("latin-1"))
    start = time.perf_counter()
    with pytest.raises(HubError) as caught:
        read_config(tmp_path)
    assert time.perf_counter() - start < 2 and len(str(caught.value)) < 300 and caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(([a-z._0-9])+.)+[A-Z]([a-z])+|([a-z._0-9]|[a-z._0-9]{2})+[A-Z]?!?[^a-z]"},
        {"rank_pattern": {r"([a-z._0-9]|[a-z._0-9]{2})+[A-Z]?!?[^a-z]": 4}},
        {"alpha_pattern": {"(": 4}},
        {"exclude_modules": "("},
        {"layers_to_transform": [0], "layers_pattern": ["("]},
        {"target_modules": "a)|(b"},
        {"target_modules": "x{99999999999999999999}"},
    ],
)
def test_expressions_that_explode_are_stopped(changes, plain, tiny_model):
    edit(plain, **changes)
    model = tiny_model()
    start = time.process_time()
    with pytest.raises(ManifestError, match="pattern"):
        read(plain, model)
    assert time.process_time() - start < 4


def test_matching_is_res():
    texts = ["ab", "b", "abc", "x.7.y"]
    assert bounded_re.match(["a?b", "c"], texts) == [{"ab": "", "b": "", "abc": ""}, {}]
    assert bounded_re.match(["a?b"], texts, whole=True) == [{"ab": "", "b": ""}]
    assert bounded_re.match([r"x\.(?P<idx>\d)"], texts) == [{"x.7.y": "7"}]


def test_D5_reading_imports_nothing_that_the_config_names(plain, monkeypatch):
    edit(plain, auto_mapping={"base_model_class": "Evil", "parent_library": "evil_one"}, megatron_core="evil_two",
         auto_map={"AutoConfig": "evil_three.Config"}, tokenizer_kwargs={"x": "evil_four"})  # fmt: skip

    class Witness:
        seen: ClassVar[list[str]] = []

        def find_spec(self, name, path=None, target=None):
            self.seen.append(name)

    monkeypatch.setattr(sys, "meta_path", [Witness(), *sys.meta_path])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_config(plain)
    assert not [name for name in Witness.seen if "evil" in name]
    with pytest.raises(ImportError):
        importlib.import_module("evil_five")
    assert "evil_five" in Witness.seen


# --- export ----------------------------------------------------------------------------------------------------------


def test_a_composition_of_low_rank_adapters_is_exported_as_one(tmp_path, hub, tiny_model, tiny_folder):
    for name in ("lora", "rslora"):
        saved(tmp_path / name, VARIANTS[name], model=tiny_model(), seed=len(name))
        hub.import_adapter(tmp_path / name, name=f"me/{name}", base=tiny_folder)
    hub.compose("0.7*me/lora - 0.3*me/rslora", name="me/both")
    hub.export("me/both", tmp_path / "out")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "out").eval()
    with torch.no_grad():
        assert apart(theirs(IDS).logits, ours(hub, "me/both", tiny_folder)) < EXACT


def test_awkward_scales_are_exact(tmp_path, hub, tiny_model, tiny_folder):
    """Scales that no whole alpha gives, a negative one and none: peft computes the very same float32."""
    from adapterhub.bases.fingerprint import fingerprint

    scales = {"q": 0.1234567, "k": -2.5, "v": 0.0, "o": 16 / math.sqrt(3)}
    parts = {LAYER.format(0, key): [LowRank(down=torch.randn(3, 32), up=torch.randn(16 if key in "kv" else 32, 3),
                                            scale=torch.tensor(scale))] for key, scale in scales.items()}  # fmt: skip
    base, sketch = fingerprint(tiny_folder)
    publish_tensors(hub, parts, name="me/x", base=base, sketch=sketch)
    hub.export("me/x", tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
    for path, (part,) in parts.items():
        module = model.base_model.model.get_submodule(path)
        assert torch.tensor(module.scaling["default"], dtype=torch.float32) == part.scale
        assert torch.equal(module.lora_B["default"].weight, part.up)


def test_what_peft_has_no_type_for_is_not_exported(tmp_path, hub, tiny_folder, tiny_model):
    from adapterhub.bases.fingerprint import fingerprint
    from adapterhub.forms.bottleneck import Bottleneck

    torch.manual_seed(0)
    block = next(site for site in sites(tiny_model()) if site.role == "ffn")
    base, sketch = fingerprint(tiny_folder)
    publish_tensors(hub, {block.path: [Bottleneck.random(block)]}, name="me/x", base=base, sketch=sketch)
    with pytest.raises(UsageError, match=r"(?s)me/x@0\.1\.0 .*bottleneck is no change") as caught:
        hub.export("me/x", tmp_path / "out")
    assert "bundle" in caught.value.hint
    with pytest.raises(UsageError, match="gguf") as caught:
        hub.export("me/x", tmp_path / "out", format="gguf")
    assert "peft" in caught.value.hint and not (tmp_path / "out").exists()


def test_export_is_whole_or_not_there(tmp_path, hub, plain, tiny_folder, monkeypatch):
    hub.import_adapter(plain, name="me/x", base=tiny_folder)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    with pytest.raises(HubError, match="there already"):
        hub.export("me/x", full)
    assert [path.name for path in full.iterdir()] == ["mine"]
    monkeypatch.setattr("adapterhub.formats.exporting._card", lambda release, kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.export("me/x", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_the_card_is_plain_yaml(tmp_path, hub, plain, tiny_folder):
    import yaml

    hub.import_adapter(plain, name="me/x", base=tiny_folder, licence='MIT": [evil')
    hub.export("me/x", tmp_path / "out")
    front = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front) == {
        "base_model": tiny_folder.name, "library_name": "peft", "license": 'MIT": [evil'
    }  # fmt: skip
