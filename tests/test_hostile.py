"""What strangers send: nothing in it runs, is followed, or takes more than its share. (D1, D2, D5 to D8 and D13 stand with the
modules that read: test_tensors, test_peft, test_codecs, test_install, test_trust.)"""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
import warnings
import zipfile

import msgspec
import pytest
import torch
from crashed import TENSORS, publish
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import adapterhub
from adapterhub.adapters import scan
from adapterhub.bases import loading, resolution
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.cli.app import execute
from adapterhub.errors import HubError, ManifestError, ScanWarning, UnsafeFile
from adapterhub.forms.low_rank import LowRank
from adapterhub.share.card import card
from adapterhub.sites import sites
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.spec.manifest import Manifest, Release
from adapterhub.testing.bed import tiny_llama


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.mark.parametrize(
    "place", ["adapter_model.bin", "adapter_model.safetensors", "in a zip", "in a bundle", "optimizer.pt"]
)
def test_D4_a_pickle_never_runs(place, hub, tmp_path, monkeypatch):
    bird = tmp_path / "canary"
    data = pickle.dumps(Canary(bird))
    pickle.loads(data).close()
    assert bird.exists()  # it would
    bird.unlink()
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "smollm2"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if place == "in a zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", data)
        data, place = buffer.getvalue(), "adapter_model.safetensors"
    if place == "in a bundle":
        publish(hub, "me/x", TENSORS)
        hub.export_bundle("me/x", tmp_path / "bundle")
        (tmp_path / "bundle" / "adapter_model.bin").write_bytes(data)
    else:
        (folder / place).write_bytes(data)
    monkeypatch.chdir(hub.root)
    for command in (["import", str(folder), "--name", "me/y"], ["install", str(tmp_path / "bundle")]):
        assert execute(command) != 0
    assert not bird.exists() and all(row.name != "me/y" for row in hub.releases())


def lora(folder, tiny_folder, scale):
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(0), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    save_file({name: torch.randn_like(tensor) * scale for name, tensor in load_file(path).items()}, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tiny_folder)}))
    return folder


@pytest.mark.parametrize(("scale", "outcome"), [(0.05, "fine"), (1.0, "told"), (1000.0, "refused")])
def test_D9_changes_far_larger_than_the_base_are_told_or_refused(scale, outcome, hub, tiny_folder, tmp_path):
    folder = lora(tmp_path / "lora", tiny_folder, scale)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if outcome == "refused":
            with pytest.raises(UnsafeFile, match="times the norm of the base's weight"):
                hub.import_adapter(folder, "me/x")
            assert hub.releases() == []
            hub.import_adapter(folder, "me/x", force=True)
        else:
            hub.import_adapter(folder, "me/x")
    assert any(issubclass(w.category, ScanWarning) for w in told) == (outcome != "fine")
    report = hub.resolve("me/x").manifest.metrics["scan"]
    assert report["sites"] == report["measured"] == 2 and report["rank"] == 2


def test_D9_the_estimate_is_that_of_the_whole_weights(tiny_folder):
    """Against the norms of the loaded base, within the sampling error of four rows."""
    model = loading.load_model(resolution.resolve(tiny_folder))
    torch.manual_seed(0)
    there = [site for site in sites(model) if site.role in ("query", "ffn_down")]
    for site in there:
        part = LowRank.random(site)
        found = scan.scan({site.path: [part]}, fingerprint(tiny_folder).sketch)["relative"]
        change = part.delta_weight(None, None)[0]
        exact = float(change.norm() / model.get_submodule(site.module).weight.norm())
        assert found == pytest.approx(exact, rel=0.25)


def test_D10_an_adapter_brings_no_template(tmp_path, tiny_folder, hub):
    """What a PEFT folder says of templates is never rendered (a base's is, in bounds: test_chat_template)."""
    folder = lora(tmp_path / "lora", tiny_folder, 0.05)
    (folder / "chat_template.jinja").write_text("{{ 1/0 }}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ 1/0 }}"}')
    release = hub.import_adapter(folder, "me/x")
    assert "1/0" not in str(msgspec.to_builtins(release.manifest))


NASTY = "\x1b]52;c;ZXZpbA==\x07<script>alert(1)</script>[x](javascript:alert(1))`|\u202e[red]"


def test_D11_a_card_and_a_terminal_take_nothing_of_strangers_for_a_command(hub, monkeypatch, capsys):
    release = publish(hub, "me/x", TENSORS)
    manifest = msgspec.structs.replace(
        release.manifest, recipe={"note": NASTY}, metrics={NASTY: NASTY}, licence="<img src=x onerror=1>"
    )
    text = card(Release(manifest, release.digest), "me/x", None)
    body = text.split("---\n", 2)[2]
    assert "<script" not in body and "<img" not in body and "](javascript" not in body
    assert "\x1b" not in body and "\x07" not in body and "\u202e" not in body
    hub.index.add([Release(m := msgspec.structs.replace(manifest, name="me/y"), digest_of(m.encode()))])
    monkeypatch.chdir(hub.root)
    for command in (["show", "me/y"], ["list"], ["log", "me/y"], ["bom", "me/y"], ["lineage", "me/y"], ["search", "y"]):
        assert execute(command) == 0, command
        told = capsys.readouterr()
        assert not any(c in told.out + told.err for c in "\x1b\x07\u202e"), command


def test_D12_large_manifests_are_refused_at_once_in_little_memory(hub, tmp_path):
    publish(hub, "me/x", TENSORS)
    hub.export_bundle("me/x", tmp_path / "bundle")
    table = json.loads((tmp_path / "bundle" / "manifest.json").read_bytes())
    program = (
        "import sys, adapterhub\n"
        "from adapterhub.errors import HubError\n"
        "hub = adapterhub.open(sys.argv[1])\n"
        "try:\n"
        "    hub.install(sys.argv[2])\n"
        "except HubError as error:\n"
        "    print(type(error).__name__)\n"
    )
    for large in (
        table | {"recipe": {"note": "x" * (10 << 20)}},
        table | {"forms": {f"site.{i}": ["low_rank"] * 10 for i in range(200_000)}},
        table
        | {
            "parents": [
                {"name": f"me/p{i}", "version": "0.1.0", "digest": digest_of(b"%d" % i), "relation": "on"}
                for i in range(100_000)
            ]
        },
    ):
        (tmp_path / "bundle" / "manifest.json").write_bytes(canonical(large))
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, str(hub.root), str(tmp_path / "bundle")], capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
        )  # fmt: skip
        assert done.stdout.strip() in ("ManifestError", "NotFound"), done.stderr
        assert time.monotonic() - begin < 15
    with pytest.raises(ManifestError):
        Manifest.decode(b"[" * 1_000_000)


def test_D12_an_index_of_a_million_characters_of_description_is_searched_at_once(hub):
    release = publish(hub, "me/x", TENSORS)
    big = msgspec.structs.replace(release.manifest, name="me/big", licence="x" * 1_000_000)
    hub.index.add([Release(big, digest_of(big.encode()))])
    begin = time.monotonic()
    assert len(hub.index.search(["me"])) == 2 and time.monotonic() - begin < 1


assert HubError and os
