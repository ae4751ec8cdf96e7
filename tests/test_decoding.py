"""What a small file may ask for: codecs, sparse changes and ranks are bounded by the base's sites before memory is taken."""

import importlib.util
import json
import subprocess
import sys
import zlib
from pathlib import Path

import msgspec
import pytest
import torch
from msgspec import structs

import adapterhub
from adapterhub.adapters import decoding, scan
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.fit import check_fit
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.codecs import Codec
from adapterhub.codecs.compeft import ComPEFT, Index
from adapterhub.codecs.int8 import Int8
from adapterhub.errors import CodecError, HubError, IncompatibleBase, IntegrityError, PluginError
from adapterhub.forms.low_rank import LowRank
from adapterhub.sites import sites
from adapterhub.spec.manifest import Made, Manifest
from adapterhub.tensors.file import dump
from adapterhub.testing.bed import tiny_llama

ROOT = Path(__file__).parent.parent
SITE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def record(tiny_folder):
    return fingerprint(tiny_folder)


def publish(hub, record, tensors, codecs=(), forms=None):
    manifest = Manifest(
        name="me/x", version="0.0.0", base=record.base, forms=forms or {SITE: ["low_rank"]}, method=Made(name="lora"),
        codecs=[Made(name=name) for name in codecs],
    )  # fmt: skip
    return hub.publish(manifest, {"tensors": dump(tensors)}, record.sketch)[0]


def bomb(size, dtype="float32", name=f"{SITE}.low_rank.0.up"):
    """A compeft file of `size` bytes that says it is 1024 zeros a byte."""
    entries = 1024 * size
    index = Index(["filler", name], ["uint8", dtype], [[size], [entries, 1]], [-1, 0], [0, 0], [size, 0])
    packed = zlib.compress(msgspec.json.encode(index), 9)
    tensors = {"compeft.index": packed, "compeft.stream": bytes(size)}
    return {key: torch.frombuffer(bytearray(data), dtype=torch.uint8) for key, data in tensors.items()}


@pytest.fixture
def decoded(monkeypatch):
    """What was decoded, codec by codec: nothing, where it was refused before."""
    seen = []
    for cls in (ComPEFT, Int8):
        own = cls.decode
        monkeypatch.setattr(cls, "decode", lambda self, tensors, own=own: (seen.append(self), own(self, tensors))[1])
    return seen


@pytest.mark.parametrize("size", [50_000, 400_000])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int64", "bool"])
def test_D7_a_small_file_that_says_it_is_large_is_refused_before_it_is_decoded(hub, record, decoded, size, dtype):
    """The base's sites account for 64 MiB and a little; by number of entries the file would be believed."""
    release = publish(hub, record, bomb(size, dtype), ["compeft"])
    here = sites(tiny_llama())
    for given in (None, here):
        with pytest.raises(CodecError, match=r"would take|says nothing") as caught:
            Adapter.load(hub, release, given)
        assert caught.value.hint
    assert not decoded


def test_D7_no_codec_of_a_chain_gives_more_than_the_sites_account_for(hub, record, decoded):
    """What the inner one gives is only a step, and counts all the same."""
    release = publish(hub, record, bomb(100_000, "float32", "x.int8"), ["int8", "compeft"])
    with pytest.raises(CodecError, match="decoded by compeft it would take 409"):
        Adapter.load(hub, release)
    assert not decoded


def test_a_codec_gives_only_what_the_manifest_tells_of(hub, record, decoded):
    up = {f"{SITE}.low_rank.0.up": torch.randn(64, 64)}
    for forms in ({SITE: ["dense"]}, {"model.layers.1.mlp": ["low_rank"]}):
        release = publish(hub, record, ComPEFT().encode(up, ComPEFT.Config()), ["compeft"], forms)
        with pytest.raises(CodecError, match="says nothing"):
            Adapter.load(hub, release)
    twice = {f"{SITE}.low_rank.1.up": torch.randn(64, 64)}
    with pytest.raises(CodecError, match="says nothing"):
        Adapter.load(hub, publish(hub, record, ComPEFT().encode(twice, ComPEFT.Config()), ["compeft"]))
    assert not decoded


def test_what_a_sketch_lets_through_is_capped_for_its_author_is_the_files(hub, record, monkeypatch):
    """On a base its own sites count, whatever a record says."""
    release = publish(hub, record, bomb(400_000), ["compeft"])
    monkeypatch.setattr(decoding, "recorded", lambda manifest, hub: {SITE: 1 << 60})
    monkeypatch.setattr(decoding, "CAP", 1 << 20)
    assert decoding.room(release.manifest, 400_000, hub) == decoding.SPARE + 400_000 * decoding.RATIO
    assert decoding.room(release.manifest, 100, hub) == decoding.SPARE + (1 << 20)
    base = tiny_llama()
    at = next(site for site in sites(base) if site.path == SITE)
    assert decoding.room(release.manifest, 100, hub, sites(base)) == decoding.SPARE + 16 * at.inputs * at.outputs


def test_the_record_knows_a_module_by_any_prefix_and_the_columns_of_a_fused_one(hub, record):
    release = publish(hub, record, {f"{SITE}.low_rank.0.up": torch.ones(2, 2)})
    found = decoding.recorded(release.manifest, hub)
    weight = dict(tiny_llama().named_parameters())[f"{SITE}.weight"].numel()
    for path in (SITE, f"base.{SITE}", f"{SITE}.query", SITE.removeprefix("model.")):
        assert found[decoding._module(path, found)] == weight
    assert decoding._module("nowhere.at.all", found) == ""


class Unlike(Codec):
    """It gives other shapes than it tells."""

    def encode(self, tensors, config):
        return dict(tensors)

    def decode(self, tensors):
        return {name: tensor.float().repeat(2, 1) for name, tensor in tensors.items()}

    def gives(self, tensors):
        return {name: (torch.float32, tuple(t.shape)) for name, t in tensors.items()}


class Silent(Unlike):
    gives = Codec.gives


class Odd(Unlike):
    def gives(self, tensors):
        return {name: 5 for name in tensors}


@pytest.mark.parametrize(
    ("codec", "error", "says"), [(Unlike, CodecError, "otherwise than it said"), (Odd, PluginError, "was expected for")]
)
def test_a_codec_is_held_to_what_it_tells(hub, record, codec, error, says):
    from adapterhub.kinds.contracts import make

    tensors = {f"{SITE}.low_rank.0.up": torch.ones(4, 4)}
    manifest = publish(hub, record, tensors).manifest
    with pytest.raises(error, match=says):
        decoding.decode([("odd", make(codec))], tensors, manifest, 1 << 20)


def test_an_older_codec_that_tells_nothing_is_looked_at_when_it_has_decoded(hub, record):
    tensors = {f"{SITE}.low_rank.0.up": torch.ones(4, 4)}
    manifest = publish(hub, record, tensors).manifest
    assert decoding.decode([("old", Silent())], tensors, manifest, 128)[f"{SITE}.low_rank.0.up"].shape == (8, 4)
    with pytest.raises(CodecError, match="128 bytes"):
        decoding.decode([("old", Silent())], tensors, manifest, 127)


def sparse(outputs, inputs, kept=4):
    prefix = f"{SITE}.sparse.0"
    tensors = {"index": torch.arange(kept), "values": torch.ones(kept), "shape": torch.tensor([outputs, inputs])}
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("size", [(1 << 20, 1 << 20), (1 << 40, 1 << 40), (-1, -5), (1 << 14, (1 << 12) + 1)])
def test_a_sparse_change_of_a_weight_that_no_base_has_is_refused_before_it_is_made_whole(hub, record, size):
    release = publish(hub, record, sparse(*size), forms={SITE: ["sparse"]})
    with pytest.raises(IntegrityError, match="says that the weight there is"):
        hub.inspect("me/x")
    with pytest.raises(IntegrityError, match="says that the weight there is"):
        scan.scan(Adapter.load(hub, release).modifications(), record.sketch)
    with pytest.raises(HubError):
        hub.merge(["me/x", "me/x"], name="me/y")


def test_a_sparse_change_as_bases_have_them_is_read(hub, record):
    outputs, inputs = dict(tiny_llama().named_parameters())[f"{SITE}.weight"].shape
    for shape in ((outputs, inputs), (8192, 8192)):
        release = publish(hub, record, sparse(*shape), forms={SITE: ["sparse"]})
        assert Adapter.load(hub, release).modifications()[SITE][0].size == shape


def test_ranks_end_at_a_few_times_what_a_weight_can_use():
    site = next(site for site in sites(tiny_llama()) if site.path == SITE)

    def fits(rank, inputs=site.inputs, outputs=site.outputs):
        at = (
            structs.replace(site)
            if isinstance(site, msgspec.Struct)
            else site.__class__(**{**vars(site), "inputs": inputs, "outputs": outputs})
        )
        pair = LowRank(down=torch.zeros(rank, inputs), up=torch.zeros(outputs, rank), scale=torch.tensor(1.0))
        check_fit({SITE: [pair]}, [at], "it")

    with pytest.warns(UserWarning, match="more than a weight"):
        fits(512)
        fits(4 * 200, 200, 300)
    for rank, widths in ((513, (32, 32)), (801, (200, 300))):
        with pytest.raises(IncompatibleBase, match=f"rank {rank} at a weight"):
            fits(rank, *widths)


def test_a_stranger_cannot_make_a_reader_take_more_than_a_few_times_its_file(hub, record, tmp_path):
    """Measured in a process of its own: refusing takes no more memory than a sound adapter does."""
    publish(hub, record, bomb(400_000), ["compeft"])
    program = (
        "import resource, sys, adapterhub, adapterhub.transform.compress\n"
        "from adapterhub.errors import HubError\n"
        "hub = adapterhub.open(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    hub.inspect('me/x')\n"
        "except HubError as error:\n"
        "    print(type(error).__name__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(hub.root)], capture_output=True, text=True)
    kind, grown = done.stdout.split()
    assert kind == "CodecError" and int(grown) < 200_000, done.stderr  # it said 1.6 GB


def soak():
    spec = importlib.util.spec_from_file_location("soak_decode", ROOT / "benchmarks" / "soak_decode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "flips", [150, pytest.param(5000, marks=pytest.mark.slow, id="5000 flips of each codec under 2 GB")]
)
def test_D3_flipped_bits_of_headers_manifests_and_codecs_are_refused_or_another_value(flips):
    found = soak().d3(flips=flips, seed=7)
    assert {"header", "manifest", "codec compeft", "codec int8", "codec svd", "codec topk"} <= set(found)
    for what, counts in found.items():
        assert counts["refused"] and counts["refused"] + counts["another"] >= 0.95 * flips, (what, json.dumps(counts))
