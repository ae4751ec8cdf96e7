"""Compressing releases: sizes and errors as measured by hand, what is recorded, what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import CodecError, NoEffect, PluginError, UsageError
from adapterhub.forms.affine import Affine
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.low_rank import LowRank
from adapterhub.sites import sites


@pytest.fixture
def hub(tmp_path, tiny_model):
    """me/a: a LoRA at every linear layer and two bottlenecks; float32."""
    hub = adapterhub.open(tmp_path / "hub", create=True)
    model = tiny_model()
    torch.manual_seed(0)
    parts = {}
    for site in sites(model):
        if site.role in ("query", "value", "ffn_down"):
            down, up = torch.randn(8, site.inputs) * 0.03, torch.randn(site.outputs, 8)
            parts[site.path] = [LowRank(down=down, up=up, scale=torch.tensor(2.0))]
        elif site.role == "ffn":
            parts[site.path] = [Bottleneck.random(site)]
    base, sketch = fingerprint(model, name="tiny")
    publish_tensors(hub, parts, name="me/a", base=base, sketch=sketch, licence="MIT", recipe={"seed": 0})
    return hub


def changes(adapter):
    """{site: the change of the weight, or the bottleneck's learned tensors in a row}, float64, by the formulas."""
    found = {}
    for path, (m,) in adapter.modifications().items():
        if isinstance(m, LowRank):
            found[path] = (m.scale.double() * (m.up.double() @ m.down.double())).numpy()
        else:
            found[path] = np.concatenate(
                [m.tensors[k].double().numpy().ravel() for k in ("down", "down_bias", "up", "up_bias")]
            )
    return found


def test_a_smaller_release_that_says_what_it_cost(hub):
    release = hub.compress("me/a", codec="compeft", options={"density": "0.5"}, name="me/small")
    before, after = hub.resolve("me/a"), hub.resolve("me/small")
    assert after.digest == release.digest
    manifest, measured = after.manifest, after.manifest.metrics["compress"]
    size = len(hub.store.read(manifest.files["tensors"]))
    assert measured["bytes_after"] == manifest.files["tensors"].size == size
    assert measured["bytes_before"] == before.manifest.files["tensors"].size > measured["bytes_bf16"] > size
    plain, packed = Adapter.load(hub, before), Adapter.load(hub, after)
    bf16 = {k: t.bfloat16() if t.is_floating_point() else t for k, t in plain.tensors.items()}
    assert measured["bytes_bf16"] == pytest.approx(len(save(bf16)), abs=16)
    old, new = changes(plain), changes(packed)
    errors = {path: np.linalg.norm(new[path] - old[path]) / np.linalg.norm(old[path]) for path in old}
    assert measured["worst_site"] == max(errors, key=errors.get)
    assert measured["worst_error"] == pytest.approx(max(errors.values()), rel=1e-6)
    assert measured["median_error"] == pytest.approx(np.median(list(errors.values())), rel=1e-6)
    assert 0.2 < measured["median_error"] < 0.7
    assert packed.tensors.keys() == plain.tensors.keys()
    assert manifest.licence == "MIT" and manifest.forms == before.manifest.forms
    (codec,) = manifest.codecs
    assert codec.name == "compeft"
    assert codec.options == {"density": 0.5, "scope": "tensor", "size": "mean", "alpha": 1.0}
    assert codec.distribution.startswith("adapterhub ")
    assert [(p.name, p.version, p.relation) for p in manifest.parents] == [("me/a", "0.1.0", "compress")]


def test_the_same_again_is_no_new_release(hub):
    first = hub.compress("me/a", codec="compeft", name="me/small")
    assert hub.compress("me/a", codec="compeft", name="me/small").digest == first.digest


def test_a_compressed_one_is_decoded_before_the_next_codec(hub):
    hub.compress("me/a", codec="svd", options={"rank": 4}, name="me/b")
    low = Adapter.load(hub, hub.resolve("me/b"))
    release = hub.compress("me/b", codec="compeft", options={"density": 0.3}, name="me/c")
    assert [codec.name for codec in release.manifest.codecs] == ["compeft"]
    both = Adapter.load(hub, release)
    assert {k: t.shape for k, t in both.tensors.items()} == {k: t.shape for k, t in low.tensors.items()}
    assert all(m.down.shape[0] == 4 for parts in both.modifications().values() for m in parts if isinstance(m, LowRank))


def test_svd_error_is_the_tail_of_the_singular_values(hub):
    measured = hub.compress("me/a", codec="svd", options={"rank": 5}, name="me/b").manifest.metrics["compress"]
    errors = {}
    for path, delta in changes(Adapter.load(hub, hub.resolve("me/a"))).items():
        s = np.linalg.svd(delta, compute_uv=False) if delta.ndim == 2 else np.zeros(9)
        errors[path] = np.sqrt((s[5:] ** 2).sum() / ((s**2).sum() or 1))
    assert measured["worst_site"] == max(errors, key=errors.get)
    assert measured["worst_error"] == pytest.approx(max(errors.values()), rel=1e-4)


def test_what_cannot_be_compressed_is_refused(hub, tiny_model):
    hub.compress("me/a", codec="compeft", options={"density": 0.3}, name="me/small")
    hub.compose("0.5*me/a", name="me/half")
    site = next(site for site in sites(tiny_model()) if site.role == "query")
    base, sketch = fingerprint(tiny_model(), name="tiny")
    big = torch.zeros(40, 32)
    big[0, 0] = 1.0  # one column of up meets a zero row of down: factors, but no change
    zero = LowRank(
        down=torch.cat([torch.zeros(1, 32), torch.ones(39, 32)]), up=big.T.contiguous(), scale=torch.tensor(1.0)
    )
    publish_tensors(hub, {site.path: [zero]}, name="me/zero", base=base, sketch=sketch)
    refused = [
        (PluginError, "no codec named 'compft'", "me/a", "compft", {}),
        (UsageError, "unknown option 'densty'", "me/a", "compeft", {"densty": 0.2}),
        (UsageError, "density", "me/a", "compeft", {"density": 2.0}),
        (UsageError, "saved composition", "me/half", "compeft", {}),
        (CodecError, "would not make me/small@0.1.0 smaller", "me/small", "compeft", {"density": 0.3}),
        (CodecError, "no low-rank pair", "me/a", "svd", {}),
        (NoEffect, "leaves nothing", "me/zero", "svd", {"rank": 1}),
    ]
    for error, problem, ref, codec, options in refused:
        with pytest.raises(error, match=problem) as caught:
            hub.compress(ref, codec=codec, options=options, name="me/c")
        assert caught.value.hint
    assert "me/c" not in hub.index.names()


def test_a_codec_that_changes_the_form_is_measured_and_runs(hub, tiny_model):
    """topk of a LoRA: the error is NumPy's of the changes of the weights, and the release runs as the sparse forms it holds."""
    release = hub.compress("me/a", codec="topk", options={"density": 0.15}, name="me/b")
    measured, before = release.manifest.metrics["compress"], Adapter.load(hub, hub.resolve("me/a"))
    after = Adapter.load(hub, hub.resolve("me/b")).modifications()
    errors = []
    for path, delta in changes(before).items():
        (part,) = after[path]
        if delta.ndim == 1:
            assert part.form == "bottleneck"
            errors.append(0.0)
            continue
        flat = delta.reshape(-1)
        left = np.zeros_like(flat)
        places = np.argsort(-np.abs(flat))[: round(0.15 * flat.size)]
        left[places] = flat[places]
        assert part.form == "sparse" and release.manifest.forms[path] == ["sparse"]
        np.testing.assert_allclose(part.dense().double().numpy().reshape(-1), left, rtol=1e-6)
        errors.append(np.linalg.norm(left - flat) / np.linalg.norm(flat))
    assert measured["worst_error"] == pytest.approx(max(errors), rel=1e-5)
    assert measured["median_error"] == pytest.approx(np.median(errors), rel=1e-5)
    model = hub.load(tiny_model(), "me/b")
    ids = torch.arange(3, 9)[None]
    assert not torch.equal(model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)
    again = hub.compress("me/b", codec="int8", name="me/c")  # decoded first; the forms are those of topk
    assert again.manifest.forms == release.manifest.forms


def test_int8_is_near(hub):
    release = hub.compress("me/a", codec="int8", name="me/b")
    measured = release.manifest.metrics["compress"]
    assert measured["bytes_after"] < 0.55 * measured["bytes_before"] and 0 < measured["worst_error"] < 0.01
    old, new = changes(Adapter.load(hub, hub.resolve("me/a"))), changes(Adapter.load(hub, release))
    worst = max(np.linalg.norm(new[path] - old[path]) / np.linalg.norm(old[path]) for path in old)
    assert measured["worst_error"] == pytest.approx(worst, rel=1e-5)


def test_other_forms_where_the_order_matters_are_refused(hub, tiny_model):
    site = next(site for site in sites(tiny_model()) if site.role == "query")
    base, sketch = fingerprint(tiny_model(), name="tiny")
    parts = [LowRank.random(site), Affine.of(gain=torch.randn(site.outputs))]
    publish_tensors(hub, {site.path: parts}, name="me/order", base=base, sketch=sketch)
    with pytest.raises(CodecError, match="order matters") as caught:
        hub.compress("me/order", codec="topk", name="me/c")
    assert "int8" in caught.value.hint
    hub.compress("me/order", codec="int8", name="me/c")
