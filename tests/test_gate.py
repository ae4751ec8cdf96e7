"""Gates: a learned share for each child at every token, against the formula written out in NumPy, float64."""

import numpy as np
import pytest
import torch

import adapterhub
from adapterhub import Model, Step
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.bases.resolution import resolve
from adapterhub.errors import IncompatibleBase, NotFoldable, UsageError
from adapterhub.forms.affine import Affine
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.composers import Stack
from adapterhub.forms.gate import Gate
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.prefix import Prefix
from adapterhub.sites import Site
from adapterhub.testing.bed import padded, random_adapter

SITE = Site("model.layers.0.self_attn.q_proj", "query", 6, 5, True)
DATA = (
    '{"prompt": "ab", "completion": "c"}\n{"prompt": "hello", "completion": "d"}\n{"prompt": "x", "completion": "yz"}\n'
)


def numbers(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def test_it_is_a_softmax_of_what_goes_in():
    w, b, x, y = numbers(2, 6, seed=0), numbers(2, seed=1), numbers(2, 3, 6, seed=2), numbers(2, 3, 5, seed=3)
    down, up, gain = numbers(2, 6, seed=4), numbers(5, 2, seed=5), numbers(5, seed=6)
    low = LowRank(down=torch.tensor(down), up=torch.tensor(up), scale=torch.tensor(1.0, dtype=torch.float64))
    gate = Gate(weight=torch.tensor(w), bias=torch.tensor(b)).over([low, Affine.of(gain=torch.tensor(gain))])
    want = np.empty((2, 3, 5))
    for r in range(2):
        for t in range(3):
            raw = np.exp(w @ x[r, t] + b)
            share = raw / raw.sum()
            want[r, t] = share[0] * (up @ (down @ x[r, t])) + share[1] * gain * y[r, t]
    got = gate.delta_out(torch.tensor(x), torch.tensor(y), Step())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
    with pytest.raises(NotFoldable):
        gate.delta_weight(torch.zeros(5, 6), None)


def test_children_that_change_the_input_get_their_share_of_it():
    w, x = numbers(2, 6, seed=0), numbers(1, 2, 6, seed=1)
    gains = numbers(2, 6, seed=2)
    children = [Affine.of(gain=torch.tensor(gain), into=True) for gain in gains]
    gate = Gate(weight=torch.tensor(w), bias=torch.zeros(2, dtype=torch.float64)).over(children)
    raw = np.exp(x @ w.T)
    share = raw / raw.sum(-1, keepdims=True)
    want = sum(share[..., i : i + 1] * gains[i] * x for i in range(2))
    assert gate.changes_input
    np.testing.assert_allclose(gate.delta_in(torch.tensor(x), Step()).numpy(), want, rtol=1e-12)


def test_what_makes_no_gate_is_refused():
    gate = Gate(weight=torch.zeros(2, 6), bias=torch.zeros(2))
    gate.check(SITE)
    with pytest.raises(IncompatibleBase):
        Gate(weight=torch.zeros(2, 5), bias=torch.zeros(2)).check(SITE)
    with pytest.raises(UsageError, match="over 2 adapters was given 3"):
        gate.over([Stack([])] * 3)
    prefix = Prefix(keys=torch.ones(2, 3, 4), values=torch.ones(2, 3, 4), shift=torch.tensor(0))
    with pytest.raises(UsageError, match="prefix"):
        gate.over([prefix, Stack([])])


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_folder):
    """me/a low rank, me/b a bottleneck, me/r a trained gate over both."""
    hub = adapterhub.open(tmp_path_factory.mktemp("hub"), create=True)
    base = fingerprint(resolve(str(tiny_folder)))
    model = hub.load(str(tiny_folder), device="cpu").base
    for seed, (name, form) in enumerate({"me/a": LowRank, "me/b": Bottleneck}.items()):
        publish_tensors(hub, random_adapter(form, model, seed), name=name, base=base.base, sketch=base.sketch)
    hub.compose("0.5*me/a", "me/half")
    data = tmp_path_factory.mktemp("data") / "d.jsonl"
    data.write_text(DATA)
    settings = {"steps": 6, "lr": 0.1, "device": "cpu", "batch_size": 2}
    hub.train(str(tiny_folder), "gate", data, "me/r", on=["me/a", "me/b"], **settings)
    hub.train(str(tiny_folder), "gate", data, "me/s", on=["me/half", "me/b"], **settings)
    return hub


@pytest.fixture
def model(hub, tiny_folder):
    loaded = hub.load(str(tiny_folder), device="cpu")
    return Model(loaded.base.double(), loaded.tokenizer, hub=hub, fingerprint=loaded.fingerprint)


def test_training_learns_shares_and_publishes_them(hub):
    release = hub.resolve("me/r")
    assert [(p.name, p.relation) for p in release.manifest.parents] == [("me/a", "gate"), ("me/b", "gate")]
    assert {form for forms in release.manifest.forms.values() for form in forms} == {"gate"}
    assert release.manifest.recipe.get("beneath") is None
    children = [set(hub.resolve(name).manifest.forms) for name in ("me/a", "me/b")]
    assert set(release.manifest.forms) == children[0] | children[1]
    from adapterhub.adapters.adapter import Adapter

    moved = [t for name, t in Adapter.load(hub, release).tensors.items() if name.endswith("weight")]
    assert any(t.abs().max() > 1e-3 for t in moved)


def test_rows_alone_and_in_a_batch(model):
    rows = ["me/r", "gate(me/r, me/b, me/a)", "me/a + 0.5*me/r", None, "me/s", "logits(me/r - 0.5*base)"]
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 96, (n,), generator=generator) for n in (5, 8, 3, 7, 6, 4)]
    for side in ("left", "right"):
        ids, mask = padded(texts, side)
        with torch.no_grad():
            got = model(input_ids=ids, attention_mask=mask, adapters=rows).logits
            for row, text in enumerate(texts):
                want = model(input_ids=text[None], adapters=[rows[row]]).logits[0]
                assert (got[row][mask[row].bool()] - want).abs().max() <= 1e-9 * want.abs().max()
    out = model.generate(input_ids=ids, attention_mask=mask, adapters=rows, max_new_tokens=4, do_sample=False)
    assert out.shape[0] == len(rows)


def test_equal_shares_are_half_of_each(model, hub, tiny_folder, tmp_path):
    """A gate that never learned weighs each child by 1/2: the mix of the halves, exactly."""
    untrained = {path: torch.zeros_like(t) for path, t in _tensors(hub, "me/r").items()}
    base = fingerprint(resolve(str(tiny_folder)))
    from adapterhub.adapters.adapter import modifications_of

    publish_tensors(
        hub,
        modifications_of(untrained),
        name="me/zero",
        base=base.base,
        sketch=base.sketch,
        parents=hub.resolve("me/r").manifest.parents,
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        got = model(input_ids=ids, adapters=["me/zero"]).logits
        want = model(input_ids=ids, adapters=["mix(0.5*me/a, 0.5*me/b)"]).logits
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def _tensors(hub, name):
    from adapterhub.adapters.adapter import Adapter

    return Adapter.load(hub, hub.resolve(name)).tensors


def test_it_installs_with_its_children_and_goes_on(hub, tiny_folder, tmp_path):
    hub.export_bundle("me/s", tmp_path / "bundle")
    other = adapterhub.open(tmp_path / "other", create=True)
    got = [str(release) for release in other.install(tmp_path / "bundle")]
    assert {name.partition("@")[0] for name in got} == {"me/s", "me/half", "me/a", "me/b"}
    data = tmp_path / "d.jsonl"
    data.write_text(DATA)
    after = other.train(str(tiny_folder), data=data, continue_from="me/s", steps=2, device="cpu", batch_size=2)
    relations = [(p.name, p.relation) for p in after.manifest.parents]
    assert relations == [("me/s", "continue"), ("me/half", "gate"), ("me/b", "gate")]
    model = other.load(str(tiny_folder), "me/s", trainable=["me/s"], device="cpu")
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().mean().backward()
    grads = [p.grad for p in model.trainable_parameters()]
    assert grads and all(g is not None for g in grads)
    saved = model.save("me/s")
    assert [(p.name, p.relation) for p in saved.manifest.parents][1:] == relations[1:]
    assert str(saved) == "me/s@0.3.0"


def test_what_is_refused(hub, model, tiny_folder, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text(DATA)
    with pytest.raises(UsageError, match="weighs adapters"):
        hub.train(str(tiny_folder), "gate", data, "me/x", device="cpu")
    with pytest.raises(UsageError, match="no gate"):
        model.use("gate(me/a, me/b)")
    with pytest.raises(UsageError, match="was given 3"):
        model.use("gate(me/r, me/a, me/b + me/a, me/b)")
    with pytest.raises(NotFoldable):
        model.use("me/r")
        model.fold()


def test_a_composer_is_no_part_that_packages_bring(capsys):
    """Its word is the parser's: it loads, and `plugins list` does not show it."""
    from adapterhub import plugins
    from adapterhub.cli.app import execute

    assert plugins.load("composers", "gate").form == "gate"
    assert execute(["plugins", "list"]) == 0
    groups = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert "forms" in groups and "composers" not in groups
