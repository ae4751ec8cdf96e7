"""PEFT files of other types than LoRA: what is refused, by which words, and what a hostile file meets."""

import json
import time
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertModel

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.bases import loading, resolution
from adapterhub.errors import HubError, IncompatibleBase, IntegrityError, ManifestError
from adapterhub.formats.peft.lora import PREFIX
from adapterhub.formats.peft.lower import cheapest, lowered
from adapterhub.formats.peft.read import TENSORS
from adapterhub.formats.peft.rotary import turned
from adapterhub.testing.families import inputs, tiny

IDS = torch.arange(3, 27).reshape(2, 12)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


def saved(folder, model, config, **options):
    """Saved by PEFT with random values in all that it trains; its logits."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(model, config).eval()
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.15)
        with torch.no_grad():
            wanted = theirs(**inputs(model, list(IDS))).logits
        theirs.save_pretrained(folder, **options)
    return wanted


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS)


def logits(hub, base, reference):
    model = hub.load(base, reference, device="cpu")
    with torch.no_grad():
        return model(**inputs(model.base, list(IDS))).logits


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def vera(tmp_path, tiny_model):
    saved(tmp_path / "vera", tiny_model(), peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    return tmp_path / "vera"


@pytest.fixture
def prompt(tmp_path, tiny_model):
    saved(tmp_path / "prompt", tiny_model(), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    return tmp_path / "prompt"


# --- every tensor is accounted for -----------------------------------------------------------------------------------


def test_all_faults_of_the_tensors_in_one_error(vera, hub, tiny_folder):
    def spoil(stored):
        stored.pop(f"{PREFIX}{Q}.vera_lambda_b")
        stored[f"{PREFIX}{Q}.vera_lambda_d"] = torch.ones(5)
        return stored | {"stray": torch.ones(1), f"{PREFIX}model.layers.9.x.weight": torch.ones(1)}

    rewrite(vera, spoil)
    with pytest.raises(IntegrityError) as caught:
        hub.import_adapter(vera, name="me/x", base=tiny_folder)
    told = str(caught.value)
    assert told.startswith("4 faults")
    for words in (
        "vera_lambda_b is missing",
        "(5,), where (4,) belongs",
        "stray: no tensor",
        "layers.9.x.weight: no tensor",
    ):
        assert words in told, words
    assert not hub.releases()


def test_weights_of_the_base_in_the_file(tmp_path, hub, tiny_model, tiny_folder):
    """Equal to the base's they are nothing; others are what the adapter changes; a longer vocabulary is refused."""
    config = LoraConfig(r=3, target_modules=["q_proj", "lm_head", "embed_tokens"])
    wanted = saved(tmp_path / "x", tiny_model(), config, save_embedding_layers=True)
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / "x" / TENSORS)
    release = hub.import_adapter(tmp_path / "x", name="me/x", base=tiny_folder)
    assert {form for here in release.manifest.forms.values() for form in here} == {"low_rank"}
    assert apart(logits(hub, tiny_folder, "me/x"), wanted) < 1e-5

    name = f"{PREFIX}lm_head.base_layer.weight"
    rewrite(tmp_path / "x", lambda stored: stored | {name: stored[name] * 1.5})
    release = hub.import_adapter(tmp_path / "x", name="me/y", base=tiny_folder)
    assert sorted(release.manifest.forms["lm_head"]) == ["dense", "low_rank"]
    with torch.no_grad():
        bare = tiny_model()
        bare.lm_head.weight *= 1.5
        theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "x")(IDS).logits
    assert apart(logits(hub, tiny_folder, "me/y"), theirs) < 1e-5

    rewrite(tmp_path / "x", lambda stored: stored | {name: torch.ones(97, 32)})
    with pytest.raises(IntegrityError, match=r"\(97, 32\), where \(96, 32\) belongs"):
        hub.import_adapter(tmp_path / "x", name="me/z", base=tiny_folder)


@pytest.mark.parametrize("extra", [{"lora_bias": True}, {"use_dora": True}, {"modules_to_save": ["lm_head", "norm"]}])
def test_half_precision_in_the_file(extra, tmp_path, hub, tiny_model, tiny_folder):
    """PEFT computes with the stored numbers in float32, and so do we: nothing is rounded once more."""
    saved(tmp_path / "x", tiny_model(), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **extra))
    rewrite(tmp_path / "x", lambda stored: {name: tensor.bfloat16() for name, tensor in stored.items()})
    hub.import_adapter(tmp_path / "x", name="me/x", base=tiny_folder)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "x").eval()(IDS).logits
    assert apart(logits(hub, tiny_folder, "me/x"), theirs) < 1e-5


def test_dora_over_another_weight_of_the_base_is_refused(tmp_path, hub, tiny_model, tiny_folder):
    saved(tmp_path / "x", tiny_model(), LoraConfig(r=3, target_modules=["q_proj"], use_dora=True))
    rewrite(tmp_path / "x", lambda stored: stored | {f"{PREFIX}{Q}.base_layer.weight": torch.ones(32, 32)})
    with pytest.raises(HubError, match=f"{Q}: another weight of the base under DoRA"):
        hub.import_adapter(tmp_path / "x", name="me/x", base=tiny_folder)


def test_biases_as_older_versions_name_them(tmp_path, hub, tiny_saved):
    base = tiny_saved(tmp_path / "gpt2", tiny("gpt2"))
    config = LoraConfig(r=3, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    wanted = saved(tmp_path / "x", tiny("gpt2"), config)
    rewrite(tmp_path / "x", lambda stored: {name.replace("base_layer.bias", "bias"): t for name, t in stored.items()})
    hub.import_adapter(tmp_path / "x", name="me/x", base=base)
    assert apart(logits(hub, base, "me/x"), wanted) < 1e-5


def test_module_names_of_older_transformers(tmp_path, hub):
    """A ViT's adapter from before transformers 5: names in the file and in the config, lists, expressions and patterns."""
    tiny("vit").save_pretrained(tmp_path / "vit")
    new = [f"vit.layers.{n}.{tail}" for n in (0, 1) for tail in ("attention.q_proj", "mlp.fc2")]
    config = LoraConfig(r=3, target_modules=new, rank_pattern={"0.attention.q_proj": 5}, modules_to_save=["classifier"])
    wanted = saved(tmp_path / "x", tiny("vit"), config)
    names = {
        "vit.layers.": "vit.encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "mlp.fc2": "output.dense",
    }

    def old(text):
        for now, then in names.items():
            text = text.replace(now, then)
        return text

    rewrite(tmp_path / "x", lambda stored: {old(name): tensor for name, tensor in stored.items()})
    targets = r"vit\.encoder\.layer\.\d\.(attention\.attention\.query|output\.dense)"
    for n, (chosen, ranks) in enumerate(
        [(["query", "output.dense"], "0.attention.attention.query"), (targets, "layer.0.*query")]
    ):
        edit(tmp_path / "x", target_modules=chosen, rank_pattern={ranks: 5}, exclude_modules="nothing")
        release = hub.import_adapter(tmp_path / "x", name=f"me/x{n}", base=tmp_path / "vit")
        assert set(release.manifest.forms) == {*new, "classifier"}
        assert apart(logits(hub, tmp_path / "vit", f"me/x{n}"), wanted) < 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_load_once_converted(start, tmp_path, hub, tiny_model, tiny_folder):
    """PEFT writes the difference from the start as a LoRA of twice the rank, which belongs to the plain base."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=start)
        theirs = get_peft_model(tiny_model(), config).eval()
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = start
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        with torch.no_grad():
            wanted = theirs(IDS).logits
        theirs.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["r"] == 6
    hub.import_adapter(tmp_path / "x", name="me/x", base=tiny_folder)
    assert apart(logits(hub, tiny_folder, "me/x"), wanted) < 1e-5


def test_projections_that_are_not_in_the_file(tmp_path, hub, tiny_model, tiny_folder):
    """VeRA's may be left out: PEFT makes them of the config's key again, and so they are read."""
    config = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    wanted = saved(tmp_path / "x", tiny_model(), config)
    assert not any("vera_A" in name for name in load_file(tmp_path / "x" / TENSORS))
    hub.import_adapter(tmp_path / "x", name="me/x", base=tiny_folder)
    assert apart(logits(hub, tiny_folder, "me/x"), wanted) < 1e-5


def test_gains_by_older_names(tmp_path, hub):
    """(IA)3's feed-forward modules are named twice in the config."""
    tiny("vit").save_pretrained(tmp_path / "vit")
    config = peft.IA3Config(target_modules=["k_proj", "mlp.fc2"], feedforward_modules=["mlp.fc2"])
    wanted = saved(tmp_path / "x", tiny("vit"), config)
    old = {
        "vit.layers.": "vit.encoder.layer.",
        "attention.k_proj": "attention.attention.key",
        "mlp.fc2": "output.dense",
    }

    def rename(stored):
        for now, then in old.items():
            stored = {name.replace(now, then): tensor for name, tensor in stored.items()}
        return stored

    rewrite(tmp_path / "x", rename)
    down = r".*layer\.\d\.output\.dense"
    edit(tmp_path / "x", target_modules=rf".*\.key|{down}", feedforward_modules=down)
    hub.import_adapter(tmp_path / "x", name="me/x", base=tmp_path / "vit")
    assert apart(logits(hub, tmp_path / "vit", "me/x"), wanted) < 1e-5


def test_numbers_of_the_training_may_be_large(tmp_path, hub, tiny_model, tiny_folder):
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10**6, tfinal=10**5)
    wanted = saved(tmp_path / "x", tiny_model(), config)
    hub.import_adapter(tmp_path / "x", name="me/x", base=tiny_folder)
    assert apart(logits(hub, tiny_folder, "me/x"), wanted) < 1e-5


# --- bases -----------------------------------------------------------------------------------------------------------


def test_a_base_without_the_head_says_what_to_do(tmp_path, hub):
    model = tiny("bert", kind="BertForSequenceClassification", num_labels=3)
    saved(tmp_path / "x", model, LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    tiny("bert").save_pretrained(tmp_path / "masked")
    with pytest.raises(IntegrityError, match=r"classifier\.weight: no tensor .*a base with that head"):
        hub.import_adapter(tmp_path / "x", name="me/x", base=tmp_path / "masked")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "BertForSequenceClassification"), ("bert", "BertForTokenClassification"), ("bert", "BertModel"),
     ("bert", "BertForQuestionAnswering"), ("bert", ""), ("t5", ""), ("vit", ""), ("whisper", ""),
     ("llama", "LlamaForSequenceClassification"), ("llama", "")],
)  # fmt: skip
def test_a_base_is_of_the_class_that_its_config_names(name, kind, tmp_path):
    model = tiny(name, kind=kind)
    model.save_pretrained(tmp_path)
    resolved = resolution.resolve(tmp_path)
    loaded, bare = loading.load_model(resolved), loading.skeleton(resolved)
    assert type(loaded) is type(bare) is type(model)
    with torch.no_grad():
        given = inputs(model, list(IDS))
        assert torch.equal(loaded(**given)[0], model(**given)[0])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["Evil"]}))
    if isinstance(model, BertModel):  # without a name we know it is the causal language model, which this is not
        with pytest.raises(IntegrityError, match="lacks weights"):
            loading.load_model(resolved)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_virtual_tokens": 5}, "virtual tokens"),
        ({"num_transformer_submodules": 2}, "encoder"),
        ({"task_type": "SEQ_CLS"}, "task is 'SEQ_CLS'"),
        ({"modules_to_save": ["lm_head"]}, "modules besides"),
    ],
)
def test_prompts_that_are_more_than_a_prefix(changes, words, prompt, hub, tiny_folder):
    edit(prompt, **changes)
    with pytest.raises(HubError, match=words):
        hub.import_adapter(prompt, name="me/x", base=tiny_folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "nothing"),
        ({"prompt_embeddings": torch.ones(4, 31)}, "31 numbers"),
        ({"prompt_embeddings": torch.ones(4)}, "alone"),
        ({"prompt_embeddings": torch.ones(0, 32)}, "0 virtual tokens"),
        ({"prompt_embeddings": torch.ones(4, 32, dtype=torch.int64)}, "alone"),
        ({"prompt_embeddings": torch.ones(4, 32), "more": torch.ones(1)}, "more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_prompts(tensors, words, prompt, hub, tiny_folder):
    save_file(tensors, prompt / TENSORS)
    with pytest.raises(IntegrityError, match=words):
        hub.import_adapter(prompt, name="me/x", base=tiny_folder)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [("mistral", "", "further back"), ("t5", "", "no decoder alone"), ("bert", "", "no decoder alone"),
     ("bert", "BertLMHeadModel", "looks both ways")],
)  # fmt: skip
def test_bases_that_do_not_see_a_prompt_as_a_prefix(name, kind, words, prompt, hub, tmp_path):
    tiny(name, kind=kind).save_pretrained(tmp_path / name)
    with pytest.raises(IncompatibleBase, match=words):
        hub.import_adapter(prompt, name="me/x", base=tmp_path / name)


def test_a_prompt_longer_than_the_positions(prompt, hub, tmp_path):
    tiny("gpt2", n_positions=8).save_pretrained(tmp_path / "gpt2")
    save_file({"prompt_embeddings": torch.ones(9, 32)}, prompt / TENSORS)
    edit(prompt, num_virtual_tokens=9)
    with pytest.raises(HubError, match="9 virtual tokens"):
        hub.import_adapter(prompt, name="me/x", base=tmp_path / "gpt2")


def test_keys_turn_with_the_positions(tiny_model):
    """The keys that the model itself makes of the same states, some positions further on."""
    model, states = tiny_model(), torch.randn(1, 5, 32)
    seen = []
    for start in (0, 7):
        with torch.no_grad():
            out = model(inputs_embeds=states, position_ids=torch.arange(start, start + 5)[None], use_cache=True)
        seen.append(out.past_key_values.layers[0].keys[0])
    assert torch.allclose(turned(seen[0], 7, model), seen[1], atol=1e-6)
    assert torch.allclose(turned(seen[1], -7, model), seen[0], atol=1e-6)
    assert turned(seen[0], 7, tiny("gpt2")) is None
    dynamic = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert turned(seen[0], 7, dynamic) is None


# --- hostile configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"r": 1 << 40}, ManifestError),
        ({"r": 10**6}, ManifestError),
        ({"r": -4}, HubError),
        ({"r": "4"}, HubError),
        ({"r": [[[4]]]}, ManifestError),
        ({"r": {"a": {"b": {"c": 1}}}}, ManifestError),
        ({"bias": "x" * 1000}, ManifestError),
        ({"bias": "some"}, HubError),
        ({"target_modules": r"((\w|\.)+)+!"}, HubError),
        ({"target_modules": 5}, ManifestError),
        ({"target_modules": ["nothing"]}, HubError),
        ({"target_modules": ["mlp"]}, HubError),
        ({"target_modules": None}, HubError),
        ({"layers_pattern": ["("], "layers_to_transform": [0]}, ManifestError),
        ({"modules_to_save": ["q_proj"]}, HubError),
        ({"modules_to_save": "lm_head"}, ManifestError),
        ({"projection_prng_key": 1 << 65}, HubError),
        ({"peft_type": "BOFT", "boft_block_size": 7}, HubError),
        ({"peft_type": "UNILORA", "theta_d_length": 10**8}, ManifestError),
        ({"peft_type": "XLORA"}, HubError),
    ],
    ids=str,
)  # fmt: skip
def test_D5_hostile_configs_end_in_one_line(changes, error, vera, hub, tiny_folder):
    edit(vera, **changes)
    start = time.process_time()
    with pytest.raises(error) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub.import_adapter(vera, name="me/x", base=tiny_folder)
    assert caught.value.hint and len(str(caught.value)) < 4000 and time.process_time() - start < 10
    assert not hub.releases()


def test_peft_gets_no_names_of_files_or_classes(prompt, vera, hub, tiny_folder, monkeypatch):
    """What a config may name is dropped before PEFT sees it: no tokenizer, module, repository or file is looked for."""
    odd = {"auto_mapping": {"base_model_class": "E", "parent_library": "evil"}, "revision": "evil", "tokenizer_kwargs": {
        "trust_remote_code": True}, "tokenizer_name_or_path": "/evil", "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x", "prompt_tuning_init_state_dict_path": "/evil", "base_model_name_or_path": "evil/x"}  # fmt: skip
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.setattr("torch.load", None)
    for folder in (prompt, vera):
        edit(folder, **odd)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hub.import_adapter(folder, name=f"me/{folder.name}", base=tiny_folder)


def test_unknown_keys_are_told(vera, hub, tiny_folder):
    edit(vera, use_quantum=True)
    with pytest.warns(UserWarning, match="unknown keys .*use_quantum"):
        hub.import_adapter(vera, name="me/x", base=tiny_folder)


# --- lowering --------------------------------------------------------------------------------------------------------


def test_the_cheapest_form_that_is_exact():
    torch.manual_seed(0)
    full = torch.randn(40, 30, dtype=torch.float64)
    thin = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 30, dtype=torch.float64)
    few = torch.zeros(40, 30, dtype=torch.float64)
    few.view(-1)[torch.randperm(1200)[:100]] = torch.randn(100, dtype=torch.float64)
    one = torch.zeros(40, 30, dtype=torch.float64)
    one[3, 4] = 2
    for delta, form in ((full, "dense"), (thin, "low_rank"), (few, "sparse"), (one, "sparse")):
        part = cheapest(delta)
        assert part.form == form
        change = part.delta_weight(torch.zeros(40, 30), None)[0]
        assert apart(change.double(), delta) < 1e-6
    assert cheapest(thin).down.shape == (3, 30)
    slow = torch.linalg.svd(full)  # a spectrum that falls to nothing, but never to zero
    falling = slow.U[:, :30] @ torch.diag(10.0 ** (-torch.arange(30, dtype=torch.float64) / 10)) @ slow.Vh
    assert cheapest(falling).form == "dense"


def test_what_is_not_linear_is_refused():
    class Bent(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    class Noisy(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn((*x.shape[:-1], 4))

    for kind in (Bent, Noisy):
        with pytest.raises(HubError, match="not linear"):
            lowered(torch.nn.Linear(6, 4), kind(6, 4))
    with pytest.raises(HubError, match="Conv2d"):
        lowered(torch.nn.Conv2d(2, 2, 1), torch.nn.Conv2d(2, 2, 1))


def test_a_norm_whose_gain_was_zero(tmp_path, hub, tiny_model, tiny_saved):
    """No factor makes something of nothing; where the adapter leaves the zero alone it is no trouble."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = 0
    base = tiny_saved(tmp_path / "base", model)
    saved(tmp_path / "x", model, peft.LNTuningConfig(target_modules=["norm"]))
    with pytest.raises(HubError, match=r"model\.norm: this norm's gain is zero"):
        hub.import_adapter(tmp_path / "x", name="me/x", base=base)

    def spare(stored):
        (name,) = stored
        stored[name][3] = 0
        return stored

    rewrite(tmp_path / "x", spare)
    hub.import_adapter(tmp_path / "x", name="me/x", base=base)
    theirs = peft.PeftModel.from_pretrained(loading.load_model(resolution.resolve(base)), tmp_path / "x").eval()
    with torch.no_grad():
        assert apart(logits(hub, base, "me/x"), theirs(IDS).logits) < 1e-5


def test_ia3_is_kept_as_gains(tmp_path, hub, tiny_model, tiny_folder):
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    saved(tmp_path / "x", tiny_model(), config)
    tensors = Adapter.load(hub, hub.import_adapter(tmp_path / "x", name="me/x", base=tiny_folder)).tensors
    stored = load_file(tmp_path / "x" / TENSORS)
    for tail, side in (("self_attn.k_proj", 0), ("mlp.down_proj", 1)):
        path = f"model.layers.1.{tail}"
        assert int(tensors[f"{path}.affine.0.side"]) == side
        gain = stored[f"{PREFIX}{path}.ia3_l"].flatten() - 1
        assert torch.allclose(tensors[f"{path}.affine.0.gain"], gain, rtol=0, atol=1e-6)
