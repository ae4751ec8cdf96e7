"""Push to the Hub and install from it, against a small Hub of our own (tests/support/hub_server.py) and the real client."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import Hub, running
from huggingface_hub import HfApi, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model

import adapterhub
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases import loading, resolution
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.cli.app import execute
from adapterhub.errors import HubError, IntegrityError, NameInUse, NotFound, UnsafeFile, UsageError
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.low_rank import LowRank
from adapterhub.share.huggingface import push
from adapterhub.sites import sites
from adapterhub.sources.huggingface_transport import Repo

IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(params=["regular", "lfs"])
def server(request, monkeypatch, tmp_path):
    """In `lfs` mode the client's Xet is off, in `regular` mode on."""
    hub = Hub(request.param)
    with running(hub) as origin:
        hub.origin = origin
        monkeypatch.setenv("HF_ENDPOINT", origin)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


@pytest.fixture
def alice(tmp_path):
    return adapterhub.open(tmp_path / "alice", create=True)


@pytest.fixture
def bob(tmp_path):
    return adapterhub.open(tmp_path / "bob", create=True)


def publish(hub, base, name, form=LowRank, seed=0, **more):
    torch.manual_seed(seed)
    record, sketch = fingerprint(base)
    there = sites(loading.load_model(resolution.resolve(base)))
    parts = {site.path: [form.random(site)] for site in there if site.role in ("query", "ffn_down")}
    return publish_tensors(hub, parts, name=name, base=record, sketch=sketch, **more)


def blobs(hub):
    return {path.name for path in hub.store.folder.rglob("*") if path.is_file()}


def test_round_trip_and_plain_peft_reads_it(server, alice, bob, tiny_folder, tmp_path):
    release = publish(alice, tiny_folder, "acme/sql", licence="MIT", metrics={"accuracy": 0.5})
    assert push(alice, "acme/sql", "acme/sql") == (release, True)
    assert push(alice, "acme/sql", "acme/sql") == (release, False)
    assert set(server.repos["acme/sql"].tags) == {"v0.1.0"}

    folder = snapshot_download("acme/sql", revision="v0.1.0", endpoint=server.origin, cache_dir=tmp_path / "theirs")
    theirs = PeftModel.from_pretrained(loading.load_model(resolution.resolve(tiny_folder)), folder).eval()
    with torch.no_grad():
        wanted = alice.load(tiny_folder, "acme/sql")(input_ids=IDS).logits
        given, plain = theirs(IDS).logits, loading.load_model(resolution.resolve(tiny_folder))(IDS).logits
    assert (wanted - given).abs().max() < 1e-5 * wanted.abs().max() and (wanted - plain).abs().max() > 1e-2

    assert bob.install("hf:acme/sql") == [release]
    assert blobs(bob) == blobs(alice) and bob.verify() == []
    assert execute_in(bob, "install", "hf:acme/sql@v0.1.0") == 0

    card = (tmp_path / "theirs").rglob("README.md")
    text = next(iter(card)).read_text()
    assert 'license: "mit"' in text and "adapterhub:method" in text and release.digest in text and "v0.1.0" in text


def execute_in(hub, *arguments):
    here = os.getcwd()
    os.chdir(hub.root)
    try:
        return execute(list(arguments))
    finally:
        os.chdir(here)


def test_bytes_that_peft_has_are_not_pushed_twice(server, alice, tiny_folder):
    publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    files = server.repos["acme/sql"].at("main")[1]
    layout = json.loads(files["adapterhub/layout.json"])
    shared = sum(n for pieces in layout.values() for path, _, n in pieces if path == "adapter_model.safetensors")
    tensors = alice.store.read(alice.resolve("acme/sql").manifest.files["tensors"])
    header = 8 + int.from_bytes(tensors[:8], "little")
    assert shared > len(tensors) - header - 64 > 4000  # but for a few numbers that PEFT keeps in its config


def test_versions_lie_side_by_side_and_the_newest_is_installed(server, alice, bob, tiny_folder):
    first = publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    second = publish(alice, tiny_folder, "acme/sql", seed=1)
    push(alice, "acme/sql", "acme/sql")
    assert bob.install("hf:acme/sql") == [second]
    assert bob.install("hf:acme/sql@v0.1.0") == [first]
    assert bob.install(f"hf:acme/sql@{server.repos['acme/sql'].tags['v0.1.0']}") == [first]
    (bob.root / "adapterhub.toml").write_text('[sources.acme]\nhf = "acme"\nnamespaces = ["acme"]\n')
    assert execute_in(bob, "add", "acme/sql<0.2") == 0
    assert execute_in(bob, "sync", "--locked") == 0
    assert 'version = "0.1.0"' in (bob.root / "adapterhub.lock").read_text()


def test_a_composition_is_pushed_with_its_parts(server, alice, bob, tiny_folder):
    publish(alice, tiny_folder, "acme/sql")
    publish(alice, tiny_folder, "acme/tone", form=Bottleneck, seed=1)
    both = alice.compose("acme/sql + 0.5*acme/tone", "acme/both")
    push(alice, "acme/both", "acme/both")
    assert "adapter_config.json" not in server.repos["acme/both"].at("main")[1]  # PEFT has no word for a bottleneck
    assert bob.install("hf:acme/both")[0] == both
    assert {row.name for row in bob.releases()} == {"acme/both", "acme/sql", "acme/tone"}
    with torch.no_grad():
        ours = alice.load(tiny_folder, "acme/both")(input_ids=IDS).logits
        theirs = bob.load(tiny_folder, "acme/both")(input_ids=IDS).logits
    assert torch.equal(ours, theirs) and bob.resolve("acme/both").digest == both.digest


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "adapterhub/rest", "adapterhub/manifest.json"])
def test_C3_a_byte_flipped_on_the_way(server, alice, bob, tiny_folder, path):
    release = publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    server.flip[path] = 1
    assert bob.install("hf:acme/sql") == [release] and bob.verify() == []  # once more, from zero


def test_C3_a_byte_that_is_flipped_every_time(server, alice, bob, tiny_folder, capsys):
    publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    server.flip["adapterhub/rest"] = 1000
    assert execute_in(bob, "install", "hf:acme/sql") == 4
    assert "sha256" in capsys.readouterr().err
    assert bob.releases() == [] and not blobs(bob)


def test_C4_a_file_that_was_damaged_in_the_cache_is_fetched_again(server, alice, bob, tiny_folder, tmp_path):
    release = publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    snapshot_download("acme/sql", revision="v0.1.0", endpoint=server.origin)
    damaged = [path for path in (tmp_path / "cache").rglob("rest")]
    assert damaged
    data = bytearray(damaged[0].resolve().read_bytes())
    data[len(data) // 2] ^= 1
    damaged[0].resolve().write_bytes(data)
    assert bob.install("hf:acme/sql") == [release] and bob.verify() == []


def test_a_missing_file_is_refused(server, alice, bob, tiny_folder):
    publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    del server.repos["acme/sql"].at("main")[1]["adapterhub/rest"]
    with pytest.raises(NotFound, match="rest"):
        bob.install("hf:acme/sql")
    assert bob.releases() == []


def test_a_moved_tag_is_refused(server, alice, bob, tiny_folder):
    publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    (bob.root / "adapterhub.toml").write_text('[sources.acme]\nhf = "acme"\nnamespaces = ["acme"]\n')
    assert execute_in(bob, "add", "acme/sql") == 0
    publish(alice, tiny_folder, "acme/sql", seed=1)
    push(alice, "acme/sql", "acme/sql")
    repo = server.repos["acme/sql"]
    repo.tags["v0.1.0"] = repo.tags["v0.2.0"]
    carol = adapterhub.open(bob.root.parent / "carol", create=True)
    for name in ("adapterhub.toml", "adapterhub.lock"):
        (carol.root / name).write_bytes((bob.root / name).read_bytes())
    assert execute_in(carol, "sync", "--locked") == 1
    assert carol.releases() == []


def test_a_push_that_breaks_makes_no_version(server, alice, bob, tiny_folder):
    release = publish(alice, tiny_folder, "acme/sql")
    for route in ("commit", "tag"):
        server.refuse = {route}
        with pytest.raises(HubError):
            push(alice, "acme/sql", "acme/sql")
        assert not server.repos["acme/sql"].tags
        assert Repo("acme/sql").versions() == {}
    server.refuse = set()
    assert push(alice, "acme/sql", "acme/sql") == (release, True)
    assert bob.install("hf:acme/sql") == [release]


def test_other_content_under_a_version_and_another_adapter_are_refused(server, alice, bob, tiny_folder):
    publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    publish(bob, tiny_folder, "acme/sql", seed=1)
    publish(bob, tiny_folder, "acme/other", seed=2, version="3.0.0")
    before = dict(server.repos["acme/sql"].branches)
    with pytest.raises(NameInUse, match="other content"):
        push(bob, "acme/sql", "acme/sql")
    with pytest.raises(NameInUse, match="holds acme/sql"):
        push(bob, "acme/other", "acme/sql")
    assert server.repos["acme/sql"].branches == before


def test_what_a_user_wrote_into_the_card_stays(server, alice, tiny_folder):
    server.put(
        "acme/sql", {"README.md": b"---\nlicense: gpl\nlanguage: en\nthumbnail:\n- x\n---\n# Mine\n\nMy words.\n"}
    )
    publish(alice, tiny_folder, "acme/sql", licence="MIT")
    push(alice, "acme/sql", "acme/sql")
    publish(alice, tiny_folder, "acme/sql", licence="MIT", seed=1)
    push(alice, "acme/sql", "acme/sql")
    text = server.repos["acme/sql"].at("main")[1]["README.md"].decode()
    assert text.count("My words.") == 1 and "language: en" in text and "- x" in text and "gpl" not in text
    assert text.count("# acme/sql 0.2.0") == 1 and "0.1.0" not in text


def test_plain_peft_repos_install_as_they_are(server, bob, tiny_folder, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        loading.load_model(resolution.resolve(tiny_folder)),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    model.save_pretrained(tmp_path / "peft")
    files = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    server.put("Acme/Plain", files)
    (release,) = bob.install("hf:Acme/Plain")
    assert release.name == "acme/plain"
    with torch.no_grad():
        ours, theirs = bob.load(tiny_folder, "acme/plain")(input_ids=IDS).logits, model.eval()(IDS).logits
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    server.put("acme/flipped", files)
    server.flip["adapter_model.safetensors"] = 1000
    with pytest.raises(IntegrityError, match="not what the Hub lists"):
        bob.install("hf:acme/flipped")
    assert not list((bob.root / "incoming").glob("hf-*"))


def test_a_pickle_and_a_repo_of_something_else(server, bob):
    server.put("acme/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x02"})
    with pytest.raises(UnsafeFile, match="pickle"):
        bob.install("hf:acme/pickle")
    server.put("acme/model", {"config.json": b"{}"})
    with pytest.raises(NotFound, match="no adapter"):
        bob.install("hf:acme/model")
    with pytest.raises(NotFound):
        bob.install("hf:acme/none")
    with pytest.raises(UsageError):
        bob.install("hf:../x")


def test_a_busy_hub_and_a_download_that_breaks_go_on(server, alice, bob, tiny_folder):
    release = publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    server.cut["adapterhub/rest"] = 1
    assert bob.install("hf:acme/sql") == [release]


def test_a_stranger_may_read_and_not_write(server, alice, bob, tiny_folder, monkeypatch):
    publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql", private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_stranger_secret")
    with pytest.raises(HubError) as caught:
        push(alice, "acme/sql", "acme/second")
    assert "secret" not in str(caught.value) + caught.value.hint
    assert bob.install("hf:acme/sql")


def test_the_server_is_one_that_the_real_client_takes_for_the_hub(server, tmp_path):
    api = HfApi(endpoint=server.origin, token="hf_writer")
    assert api.whoami()["name"] == "writer"
    api.create_repo("writer/x")
    (tmp_path / "up").mkdir()
    data = {"a.txt": b"small", "b.bin": os.urandom(50_000)}
    for name, content in data.items():
        (tmp_path / "up" / name).write_bytes(content)
    api.upload_folder(repo_id="writer/x", folder_path=tmp_path / "up")
    api.create_tag("writer/x", tag="v1.0.0")
    assert sorted(api.list_repo_files("writer/x")) == ["a.txt", "b.bin"]
    folder = snapshot_download("writer/x", revision="v1.0.0", endpoint=server.origin)
    assert {name: Path(folder, name).read_bytes() for name in data} == data
    (found,) = api.get_paths_info("writer/x", ["b.bin"])
    if server.mode == "lfs":
        assert found.lfs.sha256 == hashlib.sha256(data["b.bin"]).hexdigest()
    api.move_repo("writer/x", "writer/y")
    api.delete_repo("writer/y")
    assert not server.repos


def test_the_command_in_a_process_of_its_own(server, alice, tiny_folder):
    publish(alice, tiny_folder, "acme/sql")
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1" if server.mode == "lfs" else "0"}
    done = subprocess.run(
        [sys.executable, "-m", "adapterhub", "push", "acme/sql", "hf:acme/sql"],
        cwd=alice.root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "acme/sql@0.1.0" in done.stdout and "published" in done.stderr


def test_the_cap_and_the_disk_are_asked_before_anything_is_downloaded(
    server, alice, bob, tiny_folder, monkeypatch, tmp_path
):
    release = publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    announced = sum(file.size for file in {file.digest: file for file in release.manifest.needs}.values())
    with pytest.raises(HubError, match="are allowed"):
        bob.install("hf:acme/sql", max_bytes=announced - 1)
    large = [path for path in (tmp_path / "cache").rglob("*") if path.name in ("rest", "adapter_model.safetensors")]
    assert large == [] and bob.releases() == [] and blobs(bob) == set()
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(HubError, match=r"are needed in .*, and 10\.0 kB are free"):
            bob.install("hf:acme/sql")
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(
            HubError, match=r"are needed in .*cache, and 10 bytes are free"
        ):  # huggingface_hub's own copy
            Repo("acme/sql").file("adapterhub/rest", "main")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.name in ("rest", "adapter_model.safetensors")]
    assert bob.install("hf:acme/sql", max_bytes=announced) == [release]


def test_a_small_file_that_is_large_is_not_downloaded(server, alice, bob, tiny_folder, tmp_path, monkeypatch):
    publish(alice, tiny_folder, "acme/sql")
    push(alice, "acme/sql", "acme/sql")
    monkeypatch.setattr("adapterhub.sources.huggingface.LARGEST_MANIFEST", 100)
    with pytest.raises(IntegrityError, match="more than 100 bytes"):
        bob.install("hf:acme/sql")
    assert not [path for path in (tmp_path / "cache").rglob("manifest.json")]
