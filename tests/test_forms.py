"""Numbers of the forms made outside our code: the papers' formulas in NumPy, float64, written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapterhub import plugins
from adapterhub.adapters.adapter import modifications_of
from adapterhub.adapters.fit import check_fit
from adapterhub.errors import IncompatibleBase, IntegrityError, NotFoldable, PluginError, UsageError
from adapterhub.forms.affine import Affine
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.composers import Mix, Scaled, Stack
from adapterhub.forms.dense import Dense
from adapterhub.forms.dora import DoRA
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.prefix import Prefix
from adapterhub.forms.sparse import Sparse
from adapterhub.kinds.modification import Step
from adapterhub.methods.bottleneck import BottleneckAdapter
from adapterhub.methods.lora import LoRA
from adapterhub.runtime.attachment import Attachment
from adapterhub.sites import Columns, Heads, Site
from adapterhub.testing.bed import alone
from adapterhub.testing.families import tiny

QUERY = Site("model.layers.1.self_attn.q_proj", "query", 6, 5, True)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_low_rank_is_scale_up_down_x():
    a, b, x = numbers(2, 6), numbers(5, 2, seed=1), numbers(1, 3, 6, seed=2)
    form = LowRank(down=torch.tensor(a), up=torch.tensor(b), scale=torch.tensor(0.5, dtype=torch.float64))
    want = np.stack([0.5 * (b @ (a @ token)) for token in x[0]])[None]
    got = form.delta_out(torch.tensor(x), torch.zeros(1, 3, 5), Step())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
    np.testing.assert_allclose(form.delta_weight(torch.zeros(5, 6), None)[0].numpy(), 0.5 * b @ a, rtol=1e-12)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda h: np.maximum(h, 0)),
        ("gelu", lambda h: h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2),
        ("silu", lambda h: h / (1 + np.exp(-h))),
        ("tanh", np.tanh),
    ],
)
def test_bottleneck_is_houlsbys(parallel, activation, function):
    a, ab, b, bb = numbers(3, 6), numbers(3, seed=1), numbers(6, 3, seed=2), numbers(6, seed=3)
    x, y = numbers(1, 4, 6, seed=4), numbers(1, 4, 6, seed=5)
    form = Bottleneck(
        down=torch.tensor(a),
        down_bias=torch.tensor(ab),
        up=torch.tensor(b),
        up_bias=torch.tensor(bb),
        scale=torch.tensor(0.25, dtype=torch.float64),
        **Bottleneck.switches(parallel, activation),
    )
    h = x if parallel else y
    want = np.stack([0.25 * (b @ function(a @ token + ab) + bb) for token in h[0]])[None]
    got = form.delta_out(torch.tensor(x), torch.tensor(y), Step())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)
    with pytest.raises(NotFoldable):
        form.delta_weight(torch.zeros(6, 6), None)
    site = Site("f", "ffn", 6, 6, False)
    form.check(site)
    form.tensors["scale"] = torch.ones(6)
    with pytest.raises(IncompatibleBase):
        form.check(site)


def changes(form, x, y, w=None, b=None):
    """What a form makes of y = W x + b: what stands there attached, and by the weights it says to fold."""
    x, y = torch.tensor(x), None if y is None else torch.tensor(y)
    step = Step()
    into = form.delta_in(x, step)
    x = x if into is None else x + into
    y = y if w is None else x @ torch.tensor(w).mT + torch.tensor(b)
    out = form.delta_out(x, y, step)
    return (y if out is None else y + out).numpy()


def folded(form, w, b):
    dw, db = form.delta_weight(torch.tensor(w), torch.tensor(b))
    return w + (0 if dw is None else dw.numpy()), b + (0 if db is None else db.numpy())


W, B, X = numbers(5, 6, seed=10), numbers(5, seed=11), numbers(2, 3, 6, seed=12)


def test_dense_adds_to_the_weight_and_the_bias():
    dw, db = numbers(5, 6), numbers(5, seed=1)
    form = Dense(weight=torch.tensor(dw), bias=torch.tensor(db))
    np.testing.assert_allclose(changes(form, X, None, W, B), X @ (W + dw).T + B + db, rtol=1e-12)
    without = Dense(weight=torch.tensor(dw))
    np.testing.assert_allclose(changes(without, X, None, W, B), X @ (W + dw).T + B, rtol=1e-12)
    joined = Dense.join([form, without, form.scaled(-0.5)])
    np.testing.assert_allclose(joined.weight.numpy(), 1.5 * dw, rtol=1e-12)
    np.testing.assert_allclose(joined.bias.numpy(), 0.5 * db, rtol=1e-12)


@pytest.mark.parametrize("count", [3, 25])  # few entries are summed one by one, many as a whole matrix
def test_sparse_is_dense_with_zeros(count):
    places = np.random.default_rng(3).choice(30, count, replace=False)
    values, dw = numbers(count, seed=4), np.zeros((5, 6))
    for place, value in zip(places, values, strict=True):
        dw[place // 6, place % 6] = value
    form = Sparse.at(torch.tensor(places), torch.tensor(values), (5, 6))
    assert form.index.dtype == torch.int32 and (form.index.diff() > 0).all()
    for x in (X, X[:1, :1]):
        np.testing.assert_allclose(changes(form, x, None, W, B), x @ (W + dw).T + B, rtol=1e-12)
    np.testing.assert_array_equal(form.delta_weight(None, None)[0].numpy(), dw)
    other = Sparse.at(torch.tensor([29, 0]), torch.tensor([1.0, 2.0], dtype=torch.float64), (5, 6))
    both = dw.copy()
    both[4, 5] += -3.0
    both[0, 0] += -6.0
    np.testing.assert_allclose(Sparse.join([form, other.scaled(-3.0)]).dense().numpy(), both, rtol=1e-12)


@pytest.mark.parametrize("has", ["gain", "shift", "both"])
@pytest.mark.parametrize("into", [False, True])
def test_affine_scales_and_shifts_its_side(into, has):
    width = 6 if into else 5
    g, s = numbers(width) * (has != "shift"), numbers(width, seed=1) * (has != "gain")
    given = {"gain": torch.tensor(g), "shift": torch.tensor(s)}
    form = Affine.of(into=into, **{name: t for name, t in given.items() if has in (name, "both")})
    y = X @ W.T + B
    want = ((1 + g) * X + s) @ W.T + B if into else (1 + g) * y + s
    np.testing.assert_allclose(changes(form, X, None, W, B), want, rtol=1e-12)
    w, b = folded(form, W, B)
    np.testing.assert_allclose(X @ w.T + b, want, rtol=1e-12)
    assert form.additive == (not into and has == "shift")
    half = form.scaled(0.5)
    np.testing.assert_allclose(changes(half, X, None, W, B), y + 0.5 * (want - y), rtol=1e-12)


def test_dora_gives_the_changed_weight_lengths_of_its_own():
    a, b, m, s = numbers(2, 6), numbers(5, 2, seed=1), numbers(5, seed=2), 0.7
    v = W + s * b @ a
    changed = np.stack([m[i] * v[i] / np.sqrt((v[i] ** 2).sum()) for i in range(5)])
    tensors = {"down": a, "up": b, "scale": np.array(s), "magnitude": m}
    form = DoRA(**{name: torch.tensor(value) for name, value in tensors.items()})
    form.bind(torch.tensor(W))
    np.testing.assert_allclose(changes(form, X, None, W, B), X @ changed.T + B, rtol=1e-11)
    w, bias = folded(form, W, B)
    np.testing.assert_allclose(w, changed, rtol=1e-11)
    np.testing.assert_array_equal(bias, B)
    low = LowRank(down=torch.tensor(numbers(3, 6)), up=torch.tensor(numbers(5, 3)), scale=torch.tensor(2.0).double())
    want = X @ (W + 0.25 * (changed - W) + 2.0 * numbers(5, 3) @ numbers(3, 6)).T + B
    for program in (Stack([Scaled(form, 0.25), low]), Stack([low, Scaled(form, 0.25)]), Mix([low, Scaled(form, 0.25)])):
        np.testing.assert_allclose(changes(program, X, None, W, B), want, rtol=1e-11)
        np.testing.assert_allclose(X @ folded(program, W, B)[0].T + B, want, rtol=1e-11)


def test_what_changes_the_input_in_a_composition():
    """(IA)3 on what goes in, low rank and (IA)3 on what comes out: stacked in every order, scaled and mixed."""
    g, h, delta = numbers(6), numbers(5, seed=1), 2.0 * numbers(5, 3) @ numbers(3, 6)
    into, out = Affine.of(gain=torch.tensor(g), into=True), Affine.of(gain=torch.tensor(h))
    low = LowRank(down=torch.tensor(numbers(3, 6)), up=torch.tensor(numbers(5, 3)), scale=torch.tensor(2.0).double())
    inner, outer = np.diag(1 + g), np.diag(1 + h)
    cases = {
        Stack([into, low]): (W @ inner + delta, B),  # the last is outermost: the low rank sees the input as it came
        Stack([low, into]): ((W + delta) @ inner, B),
        Stack([out, into]): (outer @ W @ inner, (1 + h) * B),
        Stack([into, low, out]): (outer @ (W @ inner + delta), (1 + h) * B),
        Scaled(Stack([into, low]), 0.5): (W + 0.5 * (W @ inner + delta - W), B),
        Scaled(Stack([low, into]), 0.5): (W + 0.5 * ((W + delta) @ inner - W), B),
        Mix([Scaled(into, 0.3), low]): (W + 0.3 * (W @ inner - W) + delta, B),
        # One y for all that read it: that of the input with every change.
        Mix([into, Scaled(out, 0.3)]): ((np.eye(5) + 0.3 * np.diag(h)) @ W @ inner, (1 + 0.3 * h) * B),
        # y is that of the input with half of its change, and the gain is of that y.
        Scaled(Stack([into, out]), 0.5): (np.diag(1 + 0.5 * h) @ W @ np.diag(1 + 0.5 * g), (1 + 0.5 * h) * B),
        # The low rank reads what its own part of the mix makes of the input, whatever the others add to y.
        Mix([Stack([low, into]), out]): (outer @ W @ inner + delta @ inner, (1 + h) * B),
        Mix([Stack([into, low]), out]): (outer @ W @ inner + delta, (1 + h) * B),
        Stack([Mix([Scaled(into, 0.5), low]), out, into]): (
            outer @ (W @ np.diag(1 + 0.5 * g) + delta) @ inner,
            (1 + h) * B,
        ),
    }
    for program, (weight, bias) in cases.items():
        np.testing.assert_allclose(changes(program, X, None, W, B), X @ weight.T + bias, rtol=1e-11)
        w, b = folded(program, W, B)
        np.testing.assert_allclose(w, weight, rtol=1e-11)
        np.testing.assert_allclose(b, bias, rtol=1e-11)


class BothEnds(Affine):
    """Doubles what goes in and what comes out: W' = 2W2."""

    form = "both_ends"
    changes_input = changes_output = True

    def delta_weight(self, weight, bias):
        return 3 * weight, bias


def test_a_part_that_changes_both_ends_folds_at_full_weight_alone():
    both, low = BothEnds.of(gain=torch.ones(6)), LowRank.random(Site("x", "", 6, 5, True)).to(dtype=torch.float64)
    delta = (low.scale * low.up @ low.down).numpy()
    for whole in (both, Stack([both]), Scaled(both, 1.0), Mix([both])):
        np.testing.assert_allclose(folded(whole, W, B)[0], 4 * W)
    np.testing.assert_allclose(folded(Stack([low, both]), W, B)[0], 4 * (W + delta))
    for weighed in (Scaled(both, 0.5), Mix([both, low])):
        with pytest.raises(NotFoldable, match="input and output at once"):
            folded(weighed, W, B)


def test_token_ids_stand_for_one_hot_rows():
    """At an embedding of 7 words, width 5: W is (5, 7), what comes out its columns."""
    ids, w = np.array([[0, 3, 6], [3, 3, 1]]), numbers(5, 7)
    one_hot, y = np.eye(7)[ids], numbers(5, 7).T[ids]
    a, b, dw = numbers(2, 7, seed=1), numbers(5, 2, seed=2), numbers(5, 7, seed=3)
    forms = {
        LowRank(down=torch.tensor(a), up=torch.tensor(b), scale=torch.tensor(3.0).double()): 3.0 * b @ a,
        Dense(weight=torch.tensor(dw)): dw,
        Sparse.at(torch.tensor([8, 34]), torch.tensor([2.0, -1.0]).double(), (5, 7)): np.array(
            [[2.0 * (i == 1 and j == 1) - (i == 4 and j == 6) for j in range(7)] for i in range(5)]
        ),
    }
    for form, delta in forms.items():
        form.check(Site("wte", "embedding", 7, 5, False))
        np.testing.assert_allclose(changes(form, ids, y), one_hot @ (w + delta).T, rtol=1e-12)
    gain = Affine.of(gain=torch.tensor(numbers(5, seed=4)))
    np.testing.assert_allclose(changes(gain, ids, y), y * (1 + numbers(5, seed=4)), rtol=1e-12)


def test_columns_of_a_fused_projection():
    """Key, value and query of GPT-2's c_attn, each its own form, and one on the whole: against a weight folded by hand."""
    base, own = tiny("gpt2").requires_grad_(False).double(), tiny("gpt2").requires_grad_(False).double()
    path, d = "transformer.h.0.attn.c_attn", 32
    a, b, dw, h, g = numbers(2, d), numbers(d, 2, seed=1), numbers(d, d), numbers(d, seed=2), numbers(3 * d, seed=3)
    adapter = {
        f"{path}.key": [LowRank(down=torch.tensor(a), up=torch.tensor(b), scale=torch.tensor(0.25).double())],
        f"{path}.value": [Dense(weight=torch.tensor(0.1 * dw))],
        f"{path}.query": [Affine.of(gain=torch.tensor(h), shift=torch.tensor(h))],
        path: [Affine.of(gain=torch.tensor(g))],
    }
    module = own.get_submodule(path)  # a Conv1D: (inputs, outputs); query, key, value one after another
    w, bias = module.weight.detach().numpy().T * (1 + g)[:, None], module.bias.detach().numpy() * (1 + g)
    w[:d], bias[:d] = w[:d] * (1 + h)[:, None], bias[:d] * (1 + h) + h
    w[d : 2 * d] += 0.25 * b @ a
    w[2 * d :] += 0.1 * dw
    ids = torch.arange(3, 20)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(w.T))
        module.bias.copy_(torch.tensor(bias))
        want = own(ids[None]).logits[0]
        bare = tiny("gpt2").requires_grad_(False).double()(ids[None]).logits[0]
    got = alone(Attachment.of(base), adapter, ids)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert (got - bare).abs().max() > 0.1


def attention(q, k, v, memories):
    """softmax(q·[memory; k] / √d) over [memory; v], causal among the tokens, head by head: (heads, tokens, d) each."""
    out = np.zeros_like(q)
    for head in range(q.shape[0]):
        keys = np.concatenate([m[0][head] for m in memories] + [k[head]])
        values = np.concatenate([m[1][head] for m in memories] + [v[head]])
        beside = len(keys) - len(k[head])
        for token in range(q.shape[1]):
            seen = beside + token + 1
            score = keys[:seen] @ q[head, token] / math.sqrt(q.shape[2])
            weight = np.exp(score - score.max())
            out[head, token] = weight @ values[:seen] / weight.sum()
    return out


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_prefixes_are_memories_of_the_attention(kernel):
    """Alone, stacked, scaled and mixed on GPT-2's first attention: what comes out of it before its last projection."""
    base = tiny("gpt2").requires_grad_(False).double()
    base.set_attn_implementation(kernel)
    path, heads = "transformer.h.0.attn", (4, 8)
    held = {
        name: (numbers(4, n, 8, seed=n), numbers(4, n, 8, seed=9 + n)) for name, n in {"a": 3, "b": 5, "c": 2}.items()
    }
    a, b, c = (
        Prefix(keys=torch.tensor(keys), values=torch.tensor(values), shift=torch.tensor(0))
        for keys, values in held.values()
    )
    seen = {}
    attn = base.get_submodule(path)
    attn.c_attn.register_forward_hook(lambda module, args, out: seen.update(qkv=out))
    attn.c_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))

    def plain(*names):
        q, k, v = (t.numpy().reshape(-1, *heads).transpose(1, 0, 2) for t in seen["qkv"][0].split(32, -1))
        return attention(q, k, v, [held[name] for name in names])

    cases = [
        ([a], lambda: plain("a")),
        ([a, b], lambda: plain("a", "b")),
        ([b, a], lambda: plain("a", "b")),
        ([Scaled(a, 0.5)], lambda: 0.5 * plain() + 0.5 * plain("a")),
        ([Scaled(a, -1.5)], lambda: 2.5 * plain() - 1.5 * plain("a")),
        ([Scaled(Stack([a, b]), 0.25)], lambda: 0.75 * plain() + 0.25 * plain("a", "b")),
        ([Mix([Scaled(a, 0.3), Scaled(b, 0.7)])], lambda: 0.3 * plain("a") + 0.7 * plain("b")),
        ([Mix([a, b])], lambda: plain("a") + plain("b") - plain()),
        ([Scaled(a, 0.5), c], lambda: 0.5 * plain("c") + 0.5 * plain("a", "c")),
    ]
    for program, reference in cases:
        alone(Attachment.of(base), {path: program}, torch.arange(3, 12))
        got = seen["out"][0].numpy().reshape(-1, *heads).transpose(1, 0, 2)
        np.testing.assert_allclose(got, reference(), rtol=1e-9, atol=1e-11)


def test_a_prefix_that_moves_positions_is_neither_scaled_nor_mixed():
    moving = Prefix(keys=torch.ones(4, 3, 8), values=torch.ones(4, 3, 8), shift=torch.tensor(3))
    still = Prefix(keys=torch.ones(4, 3, 8), values=torch.ones(4, 3, 8), shift=torch.tensor(0))
    assert Stack([moving, still, moving]).advance == 6 and Scaled(still, 0.5).advance == 0
    for program in (Scaled(moving, 0.5), Mix([moving, still])):
        with pytest.raises(UsageError, match="cannot be scaled or mixed"):
            _ = program.advance


@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [
        ({"r": 4, "lora_alpha": 16}, 4, 16 / 4),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 4, 16 / 2),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {"q_proj": 9}}, 9, 16 / 9),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"q_proj": 3}}, 4, 3 / 4),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 9}}, 9, 16 / 3),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": {"k_proj": 9}}, 4, 16 / 4),
    ],
)
def test_lora_scales_as_its_papers_say(options, rank, scale):
    config = plugins.options(LoRA.Config, options)
    made = LoRA().build([QUERY], config)[QUERY.path]
    assert made.down.shape == (rank, 6) and made.up.shape == (5, rank)
    assert made.scale.item() == pytest.approx(scale, rel=1e-6)
    assert made.up.count_nonzero() == 0 and made.down.count_nonzero()


def test_options_from_the_command_line():
    config = plugins.options(
        LoRA.Config,
        {
            "r": "8",
            "lora_alpha": "32",
            "target_modules": "q_proj,v_proj",
            "use_rslora": "true",
            "rank_pattern": '{"a": 2}',
        },
    )
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 32.0, ("q_proj", "v_proj"))
    assert config.use_rslora is True and config.rank_pattern == {"a": 2}
    assert plugins.options(LoRA.Config, {"layers_to_transform": "3"}).layers_to_transform == (3,)
    assert plugins.options(LoRA.Config, {"target_modules": "q_proj"}).target_modules == "q_proj"


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (LoRA, {"rank": 8}, "unknown option 'rank'"),
        (LoRA, {"r": "eight"}, "wrong value"),
        (LoRA, {"r": 0}, "rank"),
        (LoRA, {"lora_dropout": 1.0}, "lora_dropout"),
        (LoRA, {"target_modules": "w_proj"}, "no site"),
        (BottleneckAdapter, {"activation": "sine"}, "unknown activation"),
        (BottleneckAdapter, {"r": 0}, "r >= 1"),
    ],
)
def test_wrong_options_are_named(method, options, words):
    block = Site("model.layers.1.mlp", "ffn", 6, 6, False)
    attention = Site("model.layers.1.self_attn", "attention", 6, 6, False)
    with pytest.raises(UsageError, match=words) as caught:
        method().build([QUERY, attention, block], plugins.options(method.Config, options))
    assert caught.value.hint


def test_lora_on_a_module_that_is_no_weight_is_refused():
    with pytest.raises(UsageError, match="linear"):
        LoRA().build(
            [Site("model.layers.0.mlp", "ffn", 6, 6, False)], plugins.options(LoRA.Config, {"target_modules": "ffn"})
        )


def test_half_a_pair_and_strangers_are_all_listed():
    with pytest.raises(IntegrityError) as caught:
        modifications_of(
            {
                "a.low_rank.0.down": torch.ones(2, 3),
                "a.low_rank.0.scale": torch.ones(()),
                "b.low_rank.0.magnitude": torch.ones(2),
            }
        )
    text = str(caught.value)
    assert "a.low_rank.0 has no 'up'" in text
    assert "b.low_rank.0.magnitude belongs to no low_rank" in text and "b.low_rank.0 has no 'down'" in text


def test_names_that_say_no_form_are_refused():
    with pytest.raises(IntegrityError, match="is not named"):
        modifications_of({"base_model.model.q_proj.lora_A.weight": torch.ones(2)})
    with pytest.raises(PluginError, match="no form named 'lowrank'"):
        modifications_of({"a.lowrank.0.down": torch.ones(2)})


def test_a_rank_over_the_width_warns_of_the_lossless_one():
    form = LowRank(down=torch.ones(9, 6), up=torch.ones(5, 9), scale=torch.ones(()))
    with pytest.warns(UserWarning, match="rank 5 holds the same"):
        form.check(QUERY)
    with pytest.raises(IncompatibleBase):
        form.check(replace(QUERY, inputs=7))


def test_dropout_only_while_training():
    config = plugins.options(LoRA.Config, {"lora_dropout": 0.5, "r": 4})
    form = LoRA().build([QUERY], config)[QUERY.path]
    form.tensors["up"] = torch.ones(5, 4)
    x = torch.ones(1, 8, 6)
    still = form.delta_out(x, None, Step())
    assert torch.equal(still, form.delta_out(x, None, Step()))
    assert not torch.equal(still, form.delta_out(x, None, Step(training=True)))


def test_a_form_that_is_not_installed_names_the_package_it_came_with():
    from adapterhub.spec.manifest import Base, File, Made, Manifest

    file = File(digest="sha256:" + "0" * 64, size=1)
    manifest = Manifest(
        name="me/x",
        version="0.1.0",
        base=Base(name="b", architecture="llama", structure=file.digest, sketch=file),
        method=Made(name="warp", distribution="adapterhub-loreft 1.2.0"),
        forms={"a": ["warp"]},
    )
    with pytest.raises(PluginError, match=r"me/x 0\.1\.0 needs the form 'warp'") as caught:
        modifications_of({"a.warp.0.k": torch.ones(2)}, manifest)
    assert "adapterhub-loreft 1.2.0" in caught.value.hint


def test_the_stored_numbers_of_activations_never_change():
    from adapterhub.forms.bottleneck import ACTIVATIONS

    assert list(ACTIVATIONS)[:4] == ["relu", "gelu", "silu", "tanh"]


U8, I64 = torch.uint8, torch.int64
WHOLE = {
    "bottleneck": {
        "down": torch.ones(2, 3), "down_bias": torch.ones(2), "up": torch.ones(3, 2), "up_bias": torch.ones(3),
        "scale": torch.ones(()), **Bottleneck.switches(False, "relu"),
    },
    "low_rank": {"down": torch.ones(2, 3), "up": torch.ones(3, 2), "scale": torch.ones(())},
    "dense": {"weight": torch.ones(3, 3), "bias": torch.ones(3)},
    "sparse": {"index": torch.tensor([0, 3, 8]), "values": torch.ones(3), "shape": torch.tensor([3, 3])},
    "affine": {"gain": torch.ones(3), "shift": torch.ones(3), "side": torch.tensor(0, dtype=U8)},
    "dora": {"down": torch.ones(2, 3), "up": torch.ones(3, 2), "scale": torch.ones(()), "magnitude": torch.ones(3)},
    "prefix": {"keys": torch.ones(2, 5, 4), "values": torch.ones(2, 5, 4), "shift": torch.tensor(5)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("bottleneck", {"activation": torch.tensor(200, dtype=U8)}),
        ("bottleneck", {"activation": torch.ones(2, dtype=U8)}),
        ("bottleneck", {"down": torch.ones(())}),
        ("low_rank", {"down": torch.ones(())}),
        ("low_rank", {"down": torch.ones(2, 3, dtype=I64)}),
        ("low_rank", {"scale": torch.ones(2)}),
        ("dense", {"weight": torch.ones(9)}),
        ("dense", {"bias": torch.ones(3, 1)}),
        ("dense", {"bias": torch.ones(())}),
        ("dense", {"weight": None}),
        ("sparse", {"index": torch.tensor([3, 0, 8])}),
        ("sparse", {"index": torch.tensor([0, 3, 3])}),
        ("sparse", {"index": torch.tensor([0, 3, 9])}),
        ("sparse", {"index": torch.tensor([-1, 3, 8])}),
        ("sparse", {"index": torch.tensor([0.0, 3.5, 8.0])}),
        ("sparse", {"index": torch.tensor([[0, 3, 8]])}),
        ("sparse", {"index": torch.tensor([False, True, True])}),
        ("sparse", {"values": torch.ones(2)}),
        ("sparse", {"values": torch.ones(3, 1)}),
        ("sparse", {"shape": torch.tensor([9, 1])}),
        ("sparse", {"shape": torch.tensor([3])}),
        ("sparse", {"shape": torch.tensor(9)}),
        ("sparse", {"shape": torch.tensor([3.0, 3.0])}),
        ("affine", {"gain": None, "shift": None}),
        ("affine", {"gain": torch.ones(4)}),
        ("affine", {"shift": torch.ones(3, 3)}),
        ("affine", {"shift": torch.ones(())}),
        ("affine", {"side": torch.ones(2, dtype=U8)}),
        ("affine", {"side": torch.tensor(7, dtype=U8)}),
        ("affine", {"side": torch.tensor(0.5)}),
        ("affine", {"side": None}),
        ("dora", {"magnitude": torch.ones(2)}),
        ("dora", {"magnitude": torch.ones(3, 1)}),
        ("dora", {"magnitude": None}),
        ("dora", {"down": torch.ones(3, 3)}),
        ("prefix", {"keys": torch.ones(4, 5, 4)}),
        ("prefix", {"keys": torch.ones(2, 5, 8), "values": torch.ones(2, 5, 8)}),
        ("prefix", {"values": torch.ones(2, 4, 4)}),
        ("prefix", {"keys": torch.ones(5, 8), "values": torch.ones(5, 8)}),
        ("prefix", {"shift": torch.tensor(-1)}),
        ("prefix", {"shift": torch.tensor(10**12)}),
        ("prefix", {"shift": torch.tensor(0.5)}),
        ("prefix", {"shift": torch.ones(2, dtype=I64)}),
    ],
)
def test_tensors_that_make_no_form_are_the_files_fault(form, change):
    tensors, site = WHOLE[form], Site("a", "query", 3, 3, True)
    if form == "prefix":
        site = Site("a", "attention", 3, 3, False, heads=Heads(4, 2, 4))

    def read(tensors):
        check_fit(modifications_of({f"a.{form}.0.{key}": tensor for key, tensor in tensors.items()}), [site], "me/x")

    read(tensors)
    with pytest.raises((IntegrityError, IncompatibleBase)) as caught:
        read({name: tensor for name, tensor in (tensors | change).items() if tensor is not None})
    assert "a" in str(caught.value) and caught.value.hint


def test_a_form_at_the_wrong_kind_of_site():
    key = Site("c_attn.key", "key", 3, 3, True, columns=Columns(3, 3, 0, 1))
    embedding = Site("wte", "embedding", 3, 3, False)
    into = Affine.of(gain=torch.ones(3), into=True)
    for site in (key, embedding):
        Affine.of(gain=torch.ones(3)).check(site)
        with pytest.raises(IncompatibleBase, match="not this site's own"):
            into.check(site)
    with pytest.raises(IncompatibleBase, match="this is none"):
        modifications_of({f"a.prefix.0.{k}": t for k, t in WHOLE["prefix"].items()})["a"][0].check(key)


def test_sites_that_only_the_manifest_names_are_missing():
    from adapterhub.spec.manifest import Base, File, Manifest

    file = File(digest="sha256:" + "0" * 64, size=1)
    base = Base(name="b", architecture="llama", structure=file.digest, sketch=file)
    forms = {"a": ["low_rank"], "b": ["low_rank"]}
    manifest = Manifest(name="me/x", version="0.1.0", base=base, forms=forms)
    tensors = {"down": torch.ones(2, 3), "up": torch.ones(3, 2), "scale": torch.ones(())}
    with pytest.raises(IntegrityError, match=r"names .* at b"):
        modifications_of({f"a.low_rank.0.{key}": tensor for key, tensor in tensors.items()}, manifest)


def test_a_dora_keeps_small_changes_of_length_on_a_bfloat16_base():
    """A row that grows by 1/500 would not grow at all if its length were rounded to 8 bits."""
    weight = torch.eye(6)
    part = DoRA(
        down=torch.zeros(2, 6), up=torch.zeros(6, 2), scale=torch.tensor(1.0), magnitude=torch.full((6,), 1.002)
    ).to(dtype=torch.bfloat16)
    part.bind(weight.bfloat16())
    change = part.delta_out(torch.ones(1, 1, 6, dtype=torch.bfloat16), torch.zeros(1, 1, 6), Step())
    assert torch.allclose(change.float(), torch.full((1, 1, 6), 0.002), rtol=1e-2)


def test_a_dora_of_a_row_of_zeros_is_finite():
    part = DoRA(down=torch.zeros(2, 6), up=torch.zeros(6, 2), scale=torch.tensor(1.0), magnitude=torch.ones(6))
    part.bind(torch.zeros(6, 6))
    assert not part.delta_out(torch.ones(1, 1, 6), torch.zeros(1, 1, 6), Step()).any()
