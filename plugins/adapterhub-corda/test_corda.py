"""CorDA: the laws, the decomposition against NumPy, what is measured, what trains and what stays."""

import json

import numpy as np
import pytest
import torch
from adapterhub_corda import Anchored, CorDA, covariances, decompose

import adapterhub
from adapterhub import BuildContext, Example, Model, Step, TrainingContext, plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.errors import UsageError
from adapterhub.forms.low_rank import LowRank
from adapterhub.runtime.fold import fold
from adapterhub.sites import select, sites
from adapterhub.tensors.file import load
from adapterhub.testing import check
from adapterhub.testing.bed import distance, tiny_llama
from adapterhub.testing.families import tiny

IDS = torch.randint(3, 96, (4, 9), generator=torch.Generator().manual_seed(7))


def config(**options):
    return plugins.options(CorDA.Config, options)


def setting(model, batch_size=4, **extras):
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 96, (5 + n % 6,), generator=draw) for n in range(12)]
    examples = [Example(n, tuple(row.tolist()), 2) for n, row in enumerate(rows)]
    pad = 9  # a token with an embedding, that of <pad> is zero
    return TrainingContext(
        model, examples, pad, batch_size, extras={name: examples[:count] for name, count in extras.items()}
    )


def begun(base, **options):
    """The model and what is fresh on it, {site path: Anchored}, with the covariances beneath it."""
    model = Model(base.requires_grad_(False))
    (stage,) = CorDA().stages(config(**options))
    with torch.no_grad():
        stage.check(BuildContext(model.sites, base))
        measured = stage.measurement.take(setting(model, calibration=6))
    return model, stage.build(BuildContext(model.sites, base, measured=measured)), measured


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def projected(weight, covariance, damp, taken):
    """By the paper's definition, another way: B0·A0 = U_r·U_rᵀ·W, U the eigenvectors of (W·C')·(W·C')ᵀ, the largest first."""
    damped = covariance + damp * np.diag(covariance).mean() * np.eye(len(covariance))
    turned = weight @ damped
    u = np.linalg.eigh(turned @ turned.T)[1][:, ::-1][:, : min(weight.shape)][:, taken]
    return u @ u.T @ weight


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    assert [f"{r.law}: {r.detail}" for r in check("corda") if r.verdict == "failed"] == []


# --- the decomposition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_decomposition_is_the_papers_and_gives_back_the_weight(shape):
    draw = np.random.default_rng(0)
    w, x = draw.standard_normal(shape), draw.standard_normal((40, shape[1])) * np.geomspace(3, 0.1, shape[1])
    c = torch.tensor(x.T @ x)
    u, s, vt = (t.numpy() for t in decompose(torch.tensor(w), c, 0.01))
    damped = ((x.T @ x) / np.diag(x.T @ x).mean() + 0.01 * np.eye(shape[1])) / 1.01  # mean of its diagonal: 1
    np.testing.assert_allclose(u * s @ vt, w, atol=1e-12)
    np.testing.assert_allclose(s, np.linalg.svd(w @ damped, compute_uv=False), rtol=1e-10)
    np.testing.assert_allclose(u.T @ u, np.eye(min(shape)), atol=1e-12)
    turned = vt @ damped  # V is orthonormal before C' is taken off again
    np.testing.assert_allclose(turned @ turned.T, np.eye(min(shape)), atol=1e-12)
    for ours, theirs in zip((u, s, vt), decompose(torch.tensor(w), 3e-5 * c, 0.01), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)  # a multiple of the covariance changes nothing


def test_the_context_decides_which_components_are_large():
    """W = diag(3, 2, 1) on inputs with covariance diag(1, 4, 16): W·C = diag(3, 8, 16), so the largest of the weight is the
    smallest here. Without the context (a very large damp) all is as in the decomposition of W itself: PiSSA's."""
    weight, c = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([1.0, 4.0, 16.0]))

    def first(damp):
        u, s, vt = decompose(weight, c, damp)
        return (s[0] * torch.outer(u[:, 0], vt[0])).numpy()

    np.testing.assert_allclose(first(1e-9), np.diag([0.0, 0.0, 1.0]), atol=1e-12)
    np.testing.assert_allclose(first(1e9), np.diag([3.0, 0.0, 0.0]), atol=1e-12)
    np.testing.assert_allclose(decompose(weight, c, 1e9)[1], [3.0, 2.0, 1.0], rtol=1e-7)


@pytest.mark.parametrize(("mode", "taken"), [("ipm", slice(3)), ("kpm", slice(-3, None))])
@pytest.mark.parametrize(("family", "targets"), [("llama", "all-linear"), ("gpt2", "query"), ("gpt_neox", "value")])
def test_the_components_of_each_mode(family, targets, mode, taken):
    """Of fused projections too: there the components are those of some of its columns."""
    model, made, measured = begun(tiny(family), r=3, mode=mode, target_modules=targets, damp=0.1)
    chosen = select(model.sites, targets)
    assert list(made) == [site.path for site in chosen] and set(measured) == {site.module for site in chosen}
    for site in chosen:
        module, part = model.base.get_submodule(site.module), made[site.path]
        weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
        weight = weight.detach().double().numpy()[site.columns.index() if site.columns else slice(None)]
        want = projected(weight, measured[site.module].double().numpy(), 0.1, taken)
        assert part.up.shape == (site.outputs, 6) and part.down.shape == (6, site.inputs) and part.scale == 1
        np.testing.assert_allclose((part.up[:, 3:] @ part.down[:3]).numpy(), want, atol=2e-5)
        assert not part.up[:, :3].any() and not part.down[3:].any() and torch.equal(part.anchor, part.down[:3])


# --- what is measured ----------------------------------------------------------------------------------------------


def test_covariances_are_of_real_tokens_each_row_divided_by_its_largest():
    """What goes into the first layer's projections is RMSNorm of the embeddings: in NumPy, each row alone, unpadded."""
    model = Model(tiny_llama().requires_grad_(False))
    data, want = setting(model), 0
    inner = model.base.model
    table, gain = inner.embed_tokens.weight.numpy(), inner.layers[0].input_layernorm.weight.numpy()
    for example in data.examples:
        x = table[list(example.ids)].astype(np.float64)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + model.base.config.rms_norm_eps) * gain
        x = x / np.abs(x).max()
        want = want + x.T @ x
    found = covariances(data, data.examples, select(model.sites, "all-linear"))
    for name in ("q_proj", "k_proj", "v_proj"):
        np.testing.assert_allclose(found[f"model.layers.0.self_attn.{name}"].numpy(), want, rtol=1e-4, atol=1e-5)
    alone = covariances(setting(model, batch_size=1), data.examples, select(model.sites, "all-linear"))
    assert found.keys() == alone.keys() and all(distance(found[path], alone[path]) < 1e-5 for path in found)
    assert not any(module._forward_hooks for module in model.base.modules() if isinstance(module, torch.nn.Linear))


def test_it_is_measured_over_what_lies_beneath():
    model = Model(tiny_llama().requires_grad_(False))
    data, path = setting(model), "model.layers.0.mlp.down_proj"
    bare = covariances(data, data.examples, select(model.sites, "down_proj"))
    (gate,) = [site for site in model.sites if site.path == "model.layers.0.mlp.gate_proj"]
    model.attach_new({gate.path: LowRank.random(gate)})
    with torch.no_grad():
        moved = covariances(data, data.examples, select(model.sites, "down_proj"))
    assert distance(moved[path], bare[path]) > 1e-3


# --- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fresh_one_changes_nothing(mode, dtype):
    model, made, _ = begun(tiny_llama().to(dtype), r=8, mode=mode)
    bare = logits(model)
    model.attach_new(made)
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize(("mode", "taken"), [("ipm", slice(4)), ("kpm", slice(-4, None))])
def test_a_small_change_survives_bfloat16(mode, taken):
    """B moved by about 1e-3 of itself, A by 3e-4: B·A − B0·A0 in float64, against what a bfloat16 base gets."""
    model, made, measured = begun(tiny_llama(), r=4, mode=mode)
    torch.manual_seed(0)
    for site in select(model.sites, "all-linear"):
        u, s, vt = decompose(model.base.get_submodule(site.module).weight, measured[site.module], 0.01)
        b0, a0 = u[:, taken] * s[taken].sqrt(), s[taken].sqrt()[:, None] * vt[taken]
        e, d = 1e-3 * b0 * torch.randn(b0.shape), 3e-4 * torch.randn(a0.shape)
        part, x = made[site.path], torch.randn(3, 7, site.inputs).bfloat16()
        part.up[:, :4] += e
        part.down[:4] += d
        CorDA().after_step({"": part})
        want = (b0 + e) @ (a0 + d) - b0 @ a0
        for kind in (Anchored, LowRank):  # as it trains, and as it is loaded
            rounded = kind(**part.tensors).to(dtype=torch.bfloat16)
            assert distance(rounded.delta_out(x, None, Step()), x.double() @ want.T) < 0.02
            assert distance(rounded.delta_weight(None, None)[0], want) < 0.02


def test_the_gradient_is_that_of_the_papers_layer():
    """W_res·x + B·A·x with W_res = W − B0·A0 held fast, by autograd on that very formula in float64."""
    torch.manual_seed(0)
    weight, x, y = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 8), (2, 5, 8), (2, 5, 6)))
    b0, a0, b, a = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 2), (2, 8), (6, 2), (2, 8)))
    b, a = b.requires_grad_(), a.requires_grad_()
    (x @ (weight - b0 @ a0 + b @ a).T - y).square().sum().backward()
    down = torch.cat([a.detach(), a.detach() - a0]).requires_grad_()
    up = torch.cat([b.detach() - b0, b0], 1).requires_grad_()
    for kind in (Anchored, LowRank):
        part = kind(down=down, up=up, scale=torch.tensor(1.0))
        if kind is LowRank:  # a loop of one's own: from here on there are hooks
            CorDA().take_up({"": part})
        assert torch.allclose(part.anchor, a0)
        for change in (part.delta_out(x, x @ weight.T, Step()), x @ part.delta_weight(weight, None)[0].T):
            down.grad = up.grad = None
            (x @ weight.T + change - y).square().sum().backward()
            assert torch.allclose(down.grad[:2], a.grad) and torch.allclose(up.grad[:, :2], b.grad)
            assert not down.grad[2:].any() and not up.grad[:, 2:].any()


@pytest.fixture
def rows(tmp_path):
    made = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    return tmp_path / "rows.jsonl"


def quarters(parts):
    """{site path: (E, B0, A, D)}"""
    return {path: (*part.up.chunk(2, 1), *part.down.chunk(2)) for path, [part] in parts.items()}


def went_on(before, after):
    """Everywhere: E and A have moved, B0 has not, bit for bit, and D is A less what A was when D was 0."""
    for path in before | after:
        (e, b0, a, d), (e_then, b0_then, a_then, d_then) = after[path], before[path]
        assert torch.equal(b0, b0_then) and torch.equal(d, a - (a_then - d_then))
        assert not torch.equal(e, e_then) and not torch.equal(a, a_then)


def test_training_moves_one_half_and_the_covariance_is_measured_once(tiny_folder, tmp_path, rows):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    given = {"steps": 6, "lr": 1e-2, "device": "cpu"}

    def train(name, **settings):
        options = {"r": 4} | settings.pop("options", {})
        release = hub.train(str(tiny_folder), "corda", rows, name, options=options, **given | settings)
        return release, release.manifest.recipe["found"]["train"]["measured"]

    def files():
        return {path.name: path.stat().st_mtime_ns for path in (hub.root / "training/measured").iterdir()}

    release, digest = train("me/x")
    kept = files()
    (measured,) = map(load, (hub.root / "training/measured").glob("*.safetensors"))
    base = tiny_llama()
    fresh = CorDA().stages(config(r=4))[0].build(BuildContext(sites(base), base, measured=measured))
    parts = Adapter.load(hub, release).modifications()
    before, after = quarters({path: [part] for path, part in fresh.items()}), quarters(parts)
    went_on(before, after)

    # Trained, it is W_res + B·A: folded, and in NumPy.
    weights = {path: base.get_submodule(path).weight.detach().double().numpy() for path in parts}
    with torch.no_grad():
        fold(base, parts)
    for path, [part] in parts.items():
        (e, b0, a, _), (*_, a0, _) = ([t.double().numpy() for t in each[path]] for each in (after, before))
        want = weights[path] - b0 @ a0 + (b0 + e) @ a
        np.testing.assert_allclose(weights[path] + (part.up.double() @ part.down.double()).numpy(), want, atol=1e-8)
        np.testing.assert_allclose(base.get_submodule(path).weight.detach().numpy(), want, atol=1e-6)

    # Another rank and damping measure nothing.
    assert train("me/wide", options={"r": 6, "damp": 0.1})[1] == digest
    assert files() == kept
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"{i} is a number"}) for i in range(9)))
    assert train("me/other", options={"mode": "kpm"}, extras={"calibration": other})[1] != digest
    assert len(files()) == 2 * len(kept)

    # It goes on, here and in a loop of one's own, from the same A0 and B0; over another it begins as before.
    release = hub.train(str(tiny_folder), data=rows, continue_from="me/x", **given | {"steps": 2})
    hub.train(str(tiny_folder), data=rows, continue_from="me/other", **given | {"steps": 2})  # and needs no calibration
    further = quarters(Adapter.load(hub, release).modifications())
    went_on(after, further)
    model = hub.load(str(tiny_folder), "me/x", trainable=["me/x"], device="cpu")
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.after_step()
    went_on(further, quarters(Adapter.load(hub, model.save("me/x")).modifications()))
    over, beneath = train("me/over", on=["me/x"], options={"target_modules": ["q_proj", "down_proj"]})
    assert over.manifest.recipe["beneath"] and beneath != digest


def test_keeping_needs_to_know_what(tiny_folder, tmp_path, rows):
    hub = adapterhub.open(tmp_path / "hub", create=True)
    with pytest.raises(UsageError) as caught:
        hub.train(str(tiny_folder), "corda", rows, "me/x", options={"mode": "kpm"}, steps=2, device="cpu")
    assert "--extra calibration=" in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [{"r": 0}, {"r": 17}, {"mode": "spm"}, {"damp": 0.0}, {"damp": float("inf")}, {"target_modules": "norm"},
     {"target_modules": "lm_head"}, {"target_modules": "embedding"}, {"target_modules": "nothing"}],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        begun(tiny_llama(), **options)
    assert caught.value.hint


def test_a_module_that_sees_nothing_is_refused():
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(UsageError, match=r"reaches model\.layers\.1\.mlp\.down_proj"):
        begun(base)
