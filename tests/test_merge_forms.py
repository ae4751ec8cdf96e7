"""Merges across forms as they run: against mixes of the same adapters, and against the formulas in NumPy, float64."""

import numpy as np
import pytest
import torch

import adapterhub
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.changes import change_of, cheapest
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import IncompatibleBase, NotFoldable, NotMergeable
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.sparse import Sparse
from adapterhub.kinds.modification import Modification
from adapterhub.mergers.linear import Linear
from adapterhub.mergers.ties import Ties
from adapterhub.sites import sites
from adapterhub.transform.merge import merge_modifications

LAYER = "model.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


def put(hub, name, parts, model):
    base, sketch = fingerprint(model, name="tiny")
    return publish_tensors(hub, parts, name=name, base=base, sketch=sketch)


def at(model, path):
    return next(site for site in sites(model) if site.path == path)


def merged(hub, release):
    return Adapter.load(hub, release).modifications()


def logits(hub, model, expression):
    loaded = hub.load(model, expression)
    with torch.no_grad():
        out = loaded(input_ids=torch.arange(3, 15)[None]).logits[0]
    loaded.detach()
    return out


def test_a_merge_runs_as_the_mix_of_its_adapters(hub, tiny_model):
    """What stands side by side at a site needs its order: gains and inputs first. Every form, and every site twice."""
    model = tiny_model()
    torch.manual_seed(0)

    def affine(path, into):
        site = at(model, path)
        width = site.inputs if into else site.outputs
        return Affine.of(gain=0.3 * torch.randn(width), shift=0.1 * torch.randn(width), into=into)

    def random(form, path):
        return form.random(at(model, path))

    a = {
        Q: [random(LowRank, Q)],
        K: [affine(K, False), random(Sparse, K)],
        V: [random(Sparse, V)],
        OUT: [random(DoRA, OUT)],
        LAYER: [affine(LAYER, False)],
    }
    b = {
        Q: [affine(Q, True), random(Sparse, Q)],
        K: [random(LowRank, K)],
        V: [random(Dense, V)],
        OUT: [random(DoRA, OUT), Affine.of(shift=torch.randn(32))],
        LAYER: [affine(LAYER, False)],
    }
    put(hub, "me/a", a, model)
    put(hub, "me/b", b, model)
    release = hub.merge(["me/a", "me/b"], name="me/both")
    assert {path: sorted(forms) for path, forms in release.manifest.forms.items()} == {
        Q: ["affine", "low_rank", "sparse"],
        K: ["affine", "low_rank", "sparse"],
        V: ["dense"],
        OUT: ["affine", "dora", "dora"],
        LAYER: ["affine"],
    }
    wanted, got = logits(hub, model, "mix(me/a, me/b)"), logits(hub, model, "me/both")
    assert (wanted - logits(hub, model, None)).abs().max() > 0.1
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_gain_after_a_change_needs_the_base(hub, tiny_model):
    """(W + BA) scaled by 1 + g is no sum of a gain and a pair: g·BA is left over."""
    model = tiny_model()
    torch.manual_seed(1)
    pair, gain, other = LowRank.random(at(model, Q)), Affine.of(gain=torch.randn(32)), LowRank.random(at(model, Q))
    put(hub, "me/a", {Q: [pair, gain]}, model)
    put(hub, "me/b", {Q: [other]}, model)
    with pytest.raises(NotMergeable, match=rf"me/a@0.1.0 .*{Q}.*own weight") as caught:
        hub.merge(["me/a", "me/b"], name="me/c")
    assert "--base" in caught.value.hint
    ((part,),) = merged(hub, hub.merge(["me/a", "me/b"], name="me/c", base=model)).values()

    def product(m):
        return m.scale.double().numpy() * (m.up.double() @ m.down.double()).numpy()

    weight = model.get_submodule(Q).weight.detach().double().numpy()
    wanted = (weight + product(pair)) * (1 + gain.gain.double().numpy()[:, None]) - weight + product(other)
    assert np.abs(part.weight.double().numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_columns_of_a_transposed_fused_weight_are_the_bases_own(hub):
    """GPT-2: queries are some columns of one Conv1D, stored the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    path = "transformer.h.0.attn.c_attn.value"
    part, other = DoRA.random(at(model, path)), LowRank.random(at(model, path))
    put(hub, "me/a", {path: [part]}, model)
    put(hub, "me/b", {path: [other]}, model)
    ((got,),) = merged(hub, hub.merge(["me/a", "me/b"], weights=[0.5, 1], name="me/c", base=model)).values()
    weight = model.transformer.h[0].attn.c_attn.weight.detach().double().numpy()[:, 32:].T
    v = weight + 1.5 * (part.up.double() @ part.down.double()).numpy()
    change = part.magnitude.double().numpy()[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - weight
    wanted = 0.5 * change + 1.5 * (other.up.double() @ other.down.double()).numpy()
    assert np.abs(got.weight.double().numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_ties_across_forms_is_ties_of_their_dense_changes(hub, tiny_model):
    from peft.utils.merge_utils import ties

    model = tiny_model()
    torch.manual_seed(3)
    pair, places, whole = (form.random(at(model, V)) for form in (LowRank, Sparse, Dense))
    for name, part in (("me/a", pair), ("me/b", places), ("me/c", whole)):
        put(hub, name, {V: [part]}, model)
    options = {"density": 0.25}
    release = hub.merge(["me/a", "me/b", "me/c"], merger="ties", options=options, name="me/d")
    ((part,),) = merged(hub, release).values()
    wanted = ties([1.5 * pair.up @ pair.down, places.dense(), whole.weight], torch.ones(3), 0.25)
    kept = int(wanted.count_nonzero())
    assert isinstance(part, Dense if 2 * kept > wanted.numel() else Sparse)
    got = part.weight if isinstance(part, Dense) else part.dense()
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-7)
    assert release.manifest.recipe["options"] == options


def test_ties_of_gains_alone_sees_the_gains(tiny_model):
    """As the paper merges (IA)3, without the base; a norm has no weight to change anyway."""
    path = f"{LAYER}.input_layernorm"
    one, two = torch.tensor([0.9, -0.1, 0.8, 0.2]), torch.tensor([0.7, 0.1, -0.9, 0.3])
    adapters = [{path: [Affine.of(gain=one)]}, {path: [Affine.of(gain=two)]}]
    (part,) = merge_modifications(adapters, [1.0, 1.0], Ties(), Ties.Config(density=0.5)).modifications[path]
    assert torch.allclose(part.gain, torch.tensor([0.8, 0.0, -0.9, 0.0])) and "shift" not in part.tensors


def test_a_gain_on_columns_beside_a_change_of_the_whole_is_refused():
    whole, column = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn.query"
    pair = LowRank(down=torch.randn(2, 16), up=torch.randn(48, 2), scale=torch.tensor(1.0))
    adapters = [{whole: [pair]}, {column: [Affine.of(gain=torch.randn(16))]}]
    with pytest.raises(NotMergeable, match="no sum"):
        merge_modifications(adapters, [1.0, 1.0], Linear(), Linear.Config())
    shift = [{whole: [pair]}, {column: [Affine.of(shift=torch.randn(16))]}]  # reads nothing, so the two add up
    assert set(merge_modifications(shift, [1.0, 1.0], Linear(), Linear.Config()).modifications) == {whole, column}


def test_another_base_is_refused_and_a_live_adapter_is_left_as_it_is(hub, tiny_model):
    model = tiny_model()
    torch.manual_seed(4)
    part = DoRA.random(at(model, Q))
    put(hub, "me/a", {Q: [part]}, model)
    with pytest.raises(IncompatibleBase):
        hub.merge(["me/a", "me/a"], weights=[0.5, 0.5], name="me/c", base=tiny_model(seed=5))
    own, others = (torch.randn(32, 32) for _ in range(2))
    part.bind(own)
    before, _ = part.delta_weight(own, None)
    merge_modifications([{Q: [part]}], [0.5], Linear(), Linear.Config(), base=lambda path: (others, None))
    assert torch.equal(part.delta_weight(own, None)[0], before)


def test_older_paths_are_the_same_modules(hub):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(7)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **config)).eval()
    new, old = "layers.0.attention.q_proj", "encoder.layer.0.attention.attention.query"
    one, two = (LowRank.random(at(model, new)) for _ in range(2))
    put(hub, "me/new", {new: [one]}, model)
    put(hub, "me/old", {old: [two]}, model)
    ((part,),) = merged(hub, hub.merge(["me/new", "me/old"], name="me/both")).values()
    wanted = 1.5 * (one.up @ one.down + two.up @ two.down)
    assert torch.allclose(part.weight, wanted, atol=1e-5)  # two of rank 4 take more than 16 x 16
    assert hub.merge(["me/old"], name="me/same").manifest.files == hub.resolve("me/old").manifest.files
    put(hub, "me/torn", {new: [one], old: [two]}, model)
    with pytest.raises(IncompatibleBase, match="twice"):
        hub.load(model, "me/torn")


def test_equal_changes_and_what_cancels_take_no_room():
    torch.manual_seed(5)
    pair = LowRank(down=torch.randn(3, 20), up=torch.randn(24, 3), scale=torch.tensor(2.0))
    places = Sparse.at(torch.tensor([1, 5, 9]), torch.tensor([1.0, 2.0, 3.0]), (24, 20))
    other = Sparse.at(torch.tensor([5, 30]), torch.tensor([2.0, 1.0]), (24, 20))
    parts = [{Q: [pair], V: [places]}, {Q: [pair], V: [other]}]
    got = merge_modifications(parts, [1.0, -1.0], Linear(), Linear.Config()).modifications
    assert got.keys() == {V} and got[V][0].index.tolist() == [1, 9, 30] and got[V][0].values.tolist() == [1, 3, -1]
    ((twice,),) = merge_modifications([{Q: [pair]}, {Q: [pair]}], [1.0, 1.0], Linear(), Linear.Config())[0].values()
    assert twice.down.shape == (3, 20)
    assert torch.allclose(twice.scale * twice.up @ twice.down, 4 * pair.up @ pair.down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 7, 21])
def test_a_whole_change_is_stored_at_its_rank_if_that_is_less(rank):
    torch.manual_seed(rank)
    exact = torch.randn(64, rank, dtype=torch.float64) @ torch.randn(rank, 48, dtype=torch.float64)
    part, shift = cheapest(exact.float(), torch.ones(64))
    assert isinstance(part, LowRank) and part.down.shape == (rank, 48) and isinstance(shift, Affine)
    error = (part.up.double() @ part.down.double() - exact).norm() / exact.norm()
    assert error < 1e-6


def test_a_whole_change_is_stored_as_it_is_cheapest():
    torch.manual_seed(6)
    full = torch.randn(30, 40)
    (part,) = cheapest(full, torch.ones(30))
    assert isinstance(part, Dense) and torch.equal(part.weight, full) and torch.equal(part.bias, torch.ones(30))
    for share, form in ((0.45, Sparse), (0.55, Dense)):  # a place and its value take as much as two values
        some = torch.where(torch.rand(30, 40) < share, full, 0.0)
        (part,) = cheapest(some)
        assert type(part) is form
        assert torch.equal(part.dense() if form is Sparse else part.weight, some)
    assert cheapest(torch.zeros(3, 3), torch.zeros(3)) == []
    assert [p.form for p in cheapest(None, torch.ones(3))] == ["affine"]


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w * 0.5, lambda w: 2 / w, lambda w: -w, lambda w: w[0], lambda w: w @ torch.ones(2, 2), lambda w: torch.ones(2) + w,
        lambda w: w == 0, lambda w: len(w), lambda w: w.shape, torch.zeros_like, bool, list,
    ],
)  # fmt: skip
def test_whatever_a_form_does_with_a_weight_that_is_not_known_is_refused_as_that(use):
    class Reader(Modification):
        form = "reader"
        additive = True

        def delta_weight(self, weight, bias):
            return use(weight), None

    with pytest.raises(NotFoldable, match="depends on the base's own weight"):
        change_of([Reader()])
