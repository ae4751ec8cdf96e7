"""Merging releases: against float64 sums and peft's own merge, exact where it can be, refused where it cannot."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import IncompatibleBase, NoEffect, NotFound, NotMergeable, PluginError, UsageError
from adapterhub.forms.affine import Affine
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.dense import Dense
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.prefix import Prefix
from adapterhub.forms.sparse import Sparse
from adapterhub.kinds.modification import Modification
from adapterhub.mergers import Merger
from adapterhub.mergers.linear import Linear
from adapterhub.sites import sites
from adapterhub.transform.merge import merge_modifications

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


def lora(seed, outputs=32, inputs=32, rank=4, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        down=torch.randn(rank, inputs, generator=generator).to(dtype),
        up=torch.randn(outputs, rank, generator=generator).to(dtype),
        scale=torch.tensor(scale, dtype=dtype),
    )


def put(hub, name, parts, model, **more):
    base, sketch = fingerprint(model, name="tiny")
    parts = {path: part if isinstance(part, list) else [part] for path, part in parts.items()}
    return publish_tensors(hub, parts, name=name, base=base, sketch=sketch, **more)


def change(*parts):
    """The change of the weight in float64, by the formulas."""

    def one(part):
        if isinstance(part, LowRank):
            return (part.scale.double() * (part.up.double() @ part.down.double())).numpy()
        if isinstance(part, Dense):
            return part.weight.double().numpy()
        whole = np.zeros(part.shape.prod().item())
        whole[part.index.long().numpy()] = part.values.double().numpy()
        return whole.reshape(part.shape.tolist())

    return sum(map(one, parts))


def merged_parts(hub, release):
    return Adapter.load(hub, release).modifications()


def test_the_weighted_sum_of_unlike_ranks_scales_and_sites(hub, tiny_model):
    model = tiny_model()
    a, b, c = lora(0, rank=2, scale=16 / 2), lora(1, rank=5, scale=16 / 5**0.5), lora(2, 32, 64, rank=3, scale=0.25)
    put(hub, "me/a", {Q: a}, model, licence="MIT")
    put(hub, "me/b", {Q: b, DOWN: c}, model, licence="Apache-2.0")
    release = hub.merge(["me/a", "me/b"], weights=[1, -0.5], name="me/c")
    parts = merged_parts(hub, release)
    ((q,), (down,)) = parts[Q], parts[DOWN]
    assert np.abs(change(q) - (change(a) - 0.5 * change(b))).max() < 1e-6 * np.abs(change(q)).max()
    assert np.abs(change(down) + 0.5 * change(c)).max() < 1e-6 * np.abs(change(c)).max()
    assert q.down.shape[0] == 7 and down.down.shape[0] == 3  # joined, no rank lost or padded
    manifest = release.manifest
    assert manifest.licence == "Apache-2.0 AND MIT" and manifest.method is None
    assert [(p.name, p.version, p.relation) for p in manifest.parents] == [
        ("me/a", "0.1.0", "merge"),
        ("me/b", "0.1.0", "merge"),
    ]
    assert manifest.recipe["merger"] == "linear" and manifest.recipe["weights"] == [1, -0.5]
    assert manifest.metrics["merge"]["relative_error"] < 1e-6 and manifest.metrics["merge"]["largest_rank"] == 7


def test_more_rank_than_a_weight_has_numbers_for_is_stored_whole(hub, tiny_model):
    model = tiny_model()
    path, parts = "model.layers.0.self_attn.k_proj", [lora(seed, 16, 32, rank=7) for seed in range(3)]
    for i, part in enumerate(parts):
        put(hub, f"me/x{i}", {path: part}, model)
    release = hub.merge(["me/x0", "me/x1", "me/x2"], weights=[1, 2, -1], name="me/c")
    ((part,),) = merged_parts(hub, release).values()
    wanted = change(parts[0]) + 2 * change(parts[1]) - change(parts[2])
    assert isinstance(part, Dense)  # 16 x 32 numbers: rank 16 would take 16 x (16 + 32)
    assert np.abs(change(part) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert 0 < release.manifest.metrics["merge"]["relative_error"] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [16 / 8, 16 / 8**0.5])
def test_one_alone_is_itself_bit_for_bit(hub, tiny_model, scale, dtype):
    put(hub, "me/a", {Q: [lora(0, scale=scale, dtype=dtype), lora(1, dtype=dtype)]}, tiny_model())
    release = hub.merge(["me/a"], name="me/b")
    assert release.manifest.files == hub.resolve("me/a").manifest.files
    assert release.manifest.forms == hub.resolve("me/a").manifest.forms


def test_peft_merges_plain_loras_to_the_same(hub, tmp_path, tiny_model, tiny_folder):
    """peft is right for plain LoRA ("cat"); read back from its own files, so the way in is checked too."""
    torch.manual_seed(0)
    model = tiny_model()
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]), "a")
    wrapped.add_adapter("b", LoraConfig(r=5, lora_alpha=20, target_modules=["q_proj", "down_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.add_weighted_adapter(["a", "b"], [0.7, 1.5], "both", combination_type="cat")
    wrapped.save_pretrained(tmp_path, selected_adapters=["a", "b"])
    for name in "ab":
        hub.import_adapter(tmp_path / name, name=f"me/{name}", base=tiny_folder)
    release = hub.merge(["me/a", "me/b"], weights=[0.7, 1.5], name="me/both")
    parts = merged_parts(hub, release)
    assert len(parts) == 4
    for path, (part,) in parts.items():
        wanted = wrapped.base_model.model.get_submodule(path).get_delta_weight("both").detach().double().numpy()
        assert np.abs(change(part) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_scaling_one_adapter_keeps_its_factors(hub, tiny_model):
    a = lora(0)
    put(hub, "me/a", {Q: a}, tiny_model())
    ((part,),) = merged_parts(hub, hub.merge(["me/a"], weights=[-3], name="me/b")).values()
    assert torch.equal(part.up, a.up) and torch.equal(part.down, a.down) and part.scale == -6.0


def test_scaling_one_adapter_of_too_large_a_rank(hub, tiny_model):
    a = lora(0, rank=40, scale=1.5)
    put(hub, "me/a", {Q: a}, tiny_model())
    ((part,),) = merged_parts(hub, hub.merge(["me/a"], weights=[0.5], name="me/b")).values()
    assert isinstance(part, Dense)
    assert np.abs(change(part) - 0.5 * change(a)).max() < 1e-5 * np.abs(change(a)).max()


def test_bf16_parts_are_joined_in_float32(hub, tiny_model):
    a, b = lora(0, dtype=torch.bfloat16), lora(1, scale=1.7, dtype=torch.bfloat16)
    put(hub, "me/a", {Q: a}, tiny_model())
    put(hub, "me/b", {Q: b}, tiny_model())
    ((part,),) = merged_parts(hub, hub.merge(["me/a", "me/b"], weights=[0.3, 0.7], name="me/c")).values()
    wanted = 0.3 * change(a) + 0.7 * change(b)
    assert np.abs(change(part) - wanted).max() < 1e-6 * np.abs(wanted).max()


class Median(Merger):
    def combine(self, deltas, weights, config):
        return torch.stack([w * d for w, d in zip(weights, deltas, strict=True)]).median(0).values


def test_other_mergers_see_dense_changes_and_zeros_where_an_adapter_has_none():
    a, b, c, d = lora(0), lora(1, rank=2), lora(2, rank=6), lora(3)
    adapters = [{Q: [a, d]}, {Q: [b]}, {Q: [c], DOWN: [lora(4, 32, 64)]}]
    merged = merge_modifications(adapters, [1.0, 2.0, 0.5], Median(), Median.Config())
    wanted = np.median([change(a, d), 2 * change(b), 0.5 * change(c)], axis=0)
    ((part,),) = merged.modifications.values()  # at DOWN the median of one change and two zeros is zero
    assert np.abs(change(part) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert merged.error < 1e-5 and merged.rank == 0 and isinstance(part, Dense)


class Relative(Modification):
    """A change that depends on the base's weight."""

    form = "relative"

    def delta_weight(self, weight, bias):
        return self.times * weight, None


class Shape(Relative):
    def delta_weight(self, weight, bias):
        return torch.ones(weight.shape), None


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (Relative(times=torch.ones(32, 1)), "the base's own weight"),
        (Shape(times=torch.ones(1)), "the base's own weight"),
    ],
)
def test_forms_without_a_change_of_their_own_need_the_base(part, problem):
    with pytest.raises(NotMergeable, match=problem) as caught:
        merge_modifications([{Q: [part]}, {Q: [lora(1)]}], [0.5, 1.0], Linear(), Linear.Config(), ["me/a", "me/b"])
    assert "--base" in caught.value.hint


def dense(seed, bias=False):
    torch.manual_seed(seed)
    return Dense(weight=torch.randn(32, 32), **({"bias": torch.randn(32)} if bias else {}))


def sparse(seed, count=40):
    torch.manual_seed(seed)
    return Sparse.at(torch.randperm(1024)[:count], torch.randn(count), (32, 32))


@pytest.mark.parametrize(
    ("parts", "forms"),
    [
        ([lora(0), sparse(1)], ["low_rank", "sparse"]),
        ([lora(0), dense(1)], ["dense"]),
        ([sparse(0), dense(1)], ["dense"]),
        ([sparse(0), sparse(1), sparse(2)], ["sparse"]),
        ([dense(0), dense(1)], ["dense"]),
        ([lora(0, rank=10), sparse(1, count=200), lora(2, rank=10)], ["dense"]),  # together they take more than 32 x 32
        ([lora(0), Affine.of(shift=torch.ones(32)), Affine.of(shift=torch.ones(32))], ["low_rank", "affine"]),
    ],
    ids=["factors beside places", "with dense", "places with dense", "places", "dense", "too many", "shifts"],
)
def test_the_cheapest_exact_form_of_a_sum_across_forms(parts, forms):
    weights = [0.7, -0.3, 1.5][: len(parts)]
    adapters = [{Q: [part]} for part in parts]
    merged = merge_modifications(adapters, weights, Linear(), Linear.Config())
    (got,) = merged.modifications.values()
    assert sorted(part.form for part in got) == sorted(forms)
    wanted = sum(w * change(p) for w, p in zip(weights, parts, strict=True) if not isinstance(p, Affine))
    whole = change(*[part for part in got if not isinstance(part, Affine)])
    assert np.abs(whole - wanted).max() < 1e-5 * np.abs(wanted).max()
    shift = sum(w for w, p in zip(weights, parts, strict=True) if isinstance(p, Affine))
    for part in got:
        if isinstance(part, Affine):
            np.testing.assert_allclose(part.tensors["shift"].numpy(), shift, rtol=1e-6)


def test_half_of_a_dora_needs_the_base_and_is_right_with_it(hub, tiny_model, tiny_folder):
    model = tiny_model()
    site = next(site for site in sites(model) if site.path == Q)
    torch.manual_seed(0)
    part, other = DoRA.random(site), lora(1)
    put(hub, "me/a", {Q: part}, model)
    put(hub, "me/b", {Q: other}, model)
    with pytest.raises(NotMergeable, match="the base's own weight"):
        hub.merge(["me/a", "me/b"], weights=[0.5, 2], name="me/c")
    got = merged_parts(hub, hub.merge(["me/a", "me/b"], weights=[0.5, 2], name="me/c", base=str(tiny_folder)))
    weight = model.get_submodule(Q).weight.double().detach().numpy()
    v = weight + part.scale.item() * (part.up.double() @ part.down.double()).numpy()
    row = np.linalg.norm(v, axis=1, keepdims=True)
    wanted = 0.5 * (part.magnitude.double().numpy()[:, None] * v / row - weight) + 2 * change(other)
    assert np.abs(change(*got[Q]) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_gains_add_without_a_base(hub, tiny_model):
    model = tiny_model()
    one, two = (Affine.of(gain=torch.linspace(-1, 1, 32) * k, shift=torch.ones(32) * k) for k in (1, 3))
    put(hub, "me/a", {Q: one}, model)
    put(hub, "me/b", {Q: two}, model)
    ((part,),) = merged_parts(hub, hub.merge(["me/a", "me/b"], weights=[2, -0.5], name="me/c")).values()
    assert torch.allclose(part.gain, torch.linspace(-1, 1, 32) * 0.5) and torch.allclose(
        part.tensors["shift"], torch.full((32,), 0.5)
    )


def test_a_prefix_alone_is_itself_and_merges_with_nothing(hub, tiny_model):
    model = tiny_model()
    site = next(site for site in sites(model) if site.role == "attention")
    put(hub, "me/a", {site.path: Prefix.random(site)}, model)
    put(hub, "me/b", {Q: lora(0)}, model)
    assert hub.merge(["me/a"], name="me/c").manifest.files == hub.resolve("me/a").manifest.files
    for merger in ("linear", "ties"):
        with pytest.raises(NotMergeable, match="'prefix'"):
            hub.merge(["me/a", "me/b"], merger=merger, name="me/d")


def test_a_bottleneck_is_refused_by_name_site_and_form_but_alone_is_itself(hub, tiny_model):
    model = tiny_model()
    site = next(site for site in sites(model) if site.role == "ffn")
    put(hub, "me/a", {site.path: Bottleneck.random(site)}, model)
    put(hub, "me/b", {Q: lora(0)}, model)
    with pytest.raises(NotMergeable, match=rf"me/a@0.1.0.*{site.path}.*'bottleneck'") as caught:
        hub.merge(["me/a", "me/b"], name="me/c")
    assert "compose" in caught.value.hint
    assert hub.merge(["me/a"], name="me/c").manifest.files == hub.resolve("me/a").manifest.files
    assert "me/d" not in hub.index.names()


def test_what_cannot_be_merged_is_refused(hub, tiny_model):
    put(hub, "me/a", {Q: lora(0)}, tiny_model())
    put(hub, "me/b", {Q: lora(0)}, tiny_model(), version="2.0.0")
    put(hub, "me/other", {Q: lora(1)}, tiny_model(seed=9))
    hub.compose("me/a + me/b", name="me/stack")
    refused = [
        (UsageError, "nothing to merge", [], {}),
        (UsageError, "2 adapters", ["me/a", "me/b"], {"weights": [1]}),
        (UsageError, "2 adapters", ["me/a", "me/b"], {"weights": [1, float("nan")]}),
        (UsageError, "unknown option 'density'", ["me/a"], {"options": {"density": 1}}),
        (PluginError, "no merger named 'lineer'", ["me/a"], {"merger": "lineer"}),
        (NotFound, "me/none", ["me/none"], {}),
        (NotMergeable, "saved composition", ["me/stack", "me/a"], {}),
        (IncompatibleBase, "tiny", ["me/a", "me/other"], {}),
        (NoEffect, "cancel", ["me/a", "me/b"], {"weights": [1, -1]}),
        (NoEffect, "cancel", ["me/a", "me/b"], {"weights": [0, 0]}),
    ]
    for error, problem, refs, more in refused:
        with pytest.raises(error, match=problem) as caught:
            hub.merge(refs, name="me/c", **more)
        assert caught.value.hint
    assert "me/c" not in hub.index.names()
