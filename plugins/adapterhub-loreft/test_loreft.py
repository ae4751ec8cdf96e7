"""LoReFT: the laws, the paper's formula, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from adapterhub_loreft import LoReFT, Subspace, orthonormal

from adapterhub import Model, Step, plugins
from adapterhub.errors import IncompatibleBase, NotFoldable, UsageError
from adapterhub.sites import Site, sites
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama

BLOCKS = [Site(f"model.layers.{i}", "block", 8, 8, False) for i in range(3)]


def config(**options):
    return plugins.options(LoReFT.Config, options)


@pytest.mark.parametrize("name", ["subspace", "loreft"])
@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws(name):
    assert [f"{r.law}: {r.detail}" for r in check(name) if r.verdict == "failed"] == []


def test_the_edit_is_the_papers_formula():
    draw = np.random.default_rng(0)
    r = np.linalg.qr(draw.standard_normal((8, 3)))[0].T
    w, b, h = draw.standard_normal((3, 8)), draw.standard_normal(3), draw.standard_normal((2, 5, 8))
    form = Subspace(basis=torch.tensor(r), source=torch.tensor(w), bias=torch.tensor(b))
    edited = h + form.delta_out(torch.zeros(2, 5, 8), torch.tensor(h), Step()).numpy()
    want = np.array([[v + r.T @ (w @ v + b - r @ v) for v in row] for row in h])
    np.testing.assert_allclose(edited, want, rtol=0, atol=1e-13)
    # What it means: Wh + b stands in the subspace, and outside of it nothing moves.
    outside = np.eye(8) - r.T @ r
    np.testing.assert_allclose(edited @ r.T, h @ w.T + b, atol=1e-13)
    np.testing.assert_allclose(edited @ outside, h @ outside, atol=1e-13)
    with pytest.raises(NotFoldable):
        form.delta_weight(torch.eye(8), None)


def test_a_fresh_one_changes_nothing_at_all():
    for modification in LoReFT().build(BLOCKS, config(r=3)).values():
        assert torch.allclose(modification.basis @ modification.basis.T, torch.eye(3), atol=1e-6)
        assert torch.equal(modification.delta_out(None, torch.randn(2, 5, 8), Step()), torch.zeros(2, 5, 8))


def test_retraction_is_the_continuous_one():
    """A = LQ with L's diagonal positive: by Cholesky, AAᵀ = LLᵀ, so Q = L⁻¹A."""
    torch.manual_seed(0)
    rows = torch.randn(4, 9, dtype=torch.float64)
    want = torch.linalg.solve(torch.linalg.cholesky(rows @ rows.T), rows)
    assert torch.allclose(orthonormal(rows), want, atol=1e-12)
    assert torch.allclose(orthonormal(want), want, atol=1e-12)


def successors(rows, seed):
    """Random letters of an alphabet of 8, and each one's successor in it: (ids, labels), both (rows, 10)."""
    letters = torch.randint(0, 8, (rows, 10), generator=torch.Generator().manual_seed(seed))
    return letters + 20, (letters + 1) % 8 + 20


def test_it_learns_and_its_basis_stays_orthonormal():
    model, method = Model(tiny_llama().requires_grad_(False)), LoReFT()
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    torch.manual_seed(0)
    model.attach_new(method.build(model.sites, config(r=8)))
    fresh = {path: part.basis.detach().clone() for path, [part] in model.new_modifications().items()}
    ids, labels = successors(64, seed=1)
    unseen, truth = successors(64, seed=2)

    def accuracy():
        with torch.no_grad():
            return (model(input_ids=unseen).logits.argmax(-1) == truth).float().mean().item()

    start = accuracy()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        with torch.no_grad():
            method.after_step({path: part for path, [part] in model.new_modifications().items()})
    end = accuracy()
    assert start < 0.2 and end > 0.8, (start, end)
    for path, [part] in model.new_modifications().items():
        assert (part.basis @ part.basis.T - torch.eye(8)).abs().max() < 1e-5
        assert (part.basis - fresh[path]).abs().max() > 1e-2, "the basis never moved"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())


def test_sites_and_layers():
    model = tiny_llama()
    made = LoReFT().build(sites(model), config(layers_to_transform=[1]))
    assert list(made) == ["model.layers.1"] and made["model.layers.1"].basis.shape == (4, 32)
    assert list(LoReFT().build(sites(model), config(target_modules="ffn"))) == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


@pytest.mark.parametrize("options", [{"r": 0}, {"r": 9}, {"dropout": 1.0}, {"layers_to_transform": [7]}])
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        LoReFT().build(BLOCKS, config(**options))
    assert caught.value.hint


def test_another_width_is_refused():
    form = Subspace.random(BLOCKS[0])
    form.check(BLOCKS[0])
    with pytest.raises(IncompatibleBase):
        form.check(replace(BLOCKS[0], outputs=9))


def test_dropout_only_while_training():
    part = LoReFT().build(BLOCKS, config(dropout=0.5))["model.layers.0"]
    part.tensors["bias"] = torch.ones(4)
    y = torch.ones(1, 6, 8)
    still = part.delta_out(None, y, Step())
    assert torch.equal(still, part.delta_out(None, y, Step()))
    assert not torch.equal(still, part.delta_out(None, y, Step(training=True)))
