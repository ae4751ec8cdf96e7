"""The unified view: the laws, each axis against its closed form in NumPy, the paper's identity of prefixes and gated parallel
adapters, what folds, and what is refused."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from adapterhub_unified import AXES, PRESETS, HeadBottleneck, Unified

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter, modifications_of
from adapterhub.adapters.fit import check_fit
from adapterhub.adapters.names import named_tensors
from adapterhub.errors import IncompatibleBase, NotFoldable, UsageError
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.fold import fold
from adapterhub.runtime.plan import placed
from adapterhub.sites import select, sites
from adapterhub.testing import check
from adapterhub.testing.bed import alone, decoded, distance, logits, plan, random_adapter, tiny_llama
from adapterhub.testing.families import tiny

IDS = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(3))
LAYER = "model.layers.0."
HEADS, KEYS, WIDTH, HIDDEN = 4, 2, 8, 32
"""Of the tiny Llama."""


def built(base, random=True, **options):
    """A fresh adapter; random: its trained tensors drawn anew, so that none is zero. {path: [modification]}"""
    torch.manual_seed(1)
    parts = Unified().build(sites(base), plugins.options(Unified.Config, options))
    for part in parts.values():
        for name, tensor in part.tensors.items():
            if random and name not in part.constants:
                part.tensors[name] = 0.3 * torch.randn_like(tensor)
    return {path: [part.to(dtype=base.dtype)] for path, part in parts.items()}


def seen(base, adapter, **modules):
    """What goes into and comes out of modules in one pass under the adapter, changes included: {name: (x, y)} in NumPy."""
    found, attachment = {}, Attachment.of(base)

    def keep(name, own):
        """A forward that the module is given: adapters act around it, so it gets what they made of the input."""

        def forward(*args, **kwargs):
            found[name] = (args[0] if args else kwargs["hidden_states"])[0].numpy()
            return own(*args, **kwargs)

        return forward

    def after(name):
        def hook(module, args, output):
            found[name] = found[name], (output[0] if isinstance(output, tuple) else output)[0].numpy()

        return hook

    parts = {name: base.get_submodule(path) for name, path in modules.items()}
    for name, module in parts.items():
        module.forward = keep(name, module.forward)
    hooks = [module.register_forward_hook(after(name)) for name, module in parts.items()]
    with torch.no_grad(), attachment.running(plan(attachment, [adapter])):
        base(input_ids=IDS)
    attachment.detach()
    for hook, module in zip(hooks, parts.values(), strict=True):
        hook.remove()
        del module.forward
    return found


def arrays(adapter, path):
    return {name: tensor.numpy() for name, tensor in adapter[path][0].tensors.items()}


def relu(x):
    return np.maximum(x, 0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("part", ["unified", "head_bottleneck"])
@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws(part):
    assert [f"{r.law}: {r.detail}" for r in check(part) if r.verdict == "failed"] == []


# --- the closed forms ------------------------------------------------------------------------------------------------


def test_prefix_tuning_is_a_gated_parallel_adapter():
    """Paper, equations 7 to 10: (1-λ) attention + λ softmax(x W_q P_kᵀ) P_v, on the Llama's own attention: causal, grouped
    keys, rotated queries (a prefix's keys are those that the kernel gets)."""
    base = tiny_llama().double()
    path = LAYER + "self_attn"
    adapter = built(base, preset="prefix", r=5)
    found = seen(base, adapter, attention=path, after=path + ".o_proj")
    x, out = found["attention"][0], found["after"][0]
    weights = {name: base.get_submodule(f"{path}.{name}_proj").weight.detach().numpy() for name in "qkv"}
    prefix, tokens = arrays(adapter, path), len(x)
    angle = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)

    def rotated(h):  # pairs (i, i + WIDTH/2) turned by the position's angle
        a, b = h[:, : WIDTH // 2], h[:, WIDTH // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    for head in range(HEADS):
        own, shared = (slice(n * WIDTH, (n + 1) * WIDTH) for n in (head, head * KEYS // HEADS))
        query = rotated(x @ weights["q"][own].T) / WIDTH**0.5
        key, value = rotated(x @ weights["k"][shared].T), x @ weights["v"][shared].T
        p_k, p_v = prefix["keys"][head * KEYS // HEADS], prefix["values"][head * KEYS // HEADS]
        scores = np.where(np.tril(np.ones((tokens, tokens), bool)), query @ key.T, -np.inf)
        mass, beside = np.exp(scores).sum(1), np.exp(query @ p_k.T).sum(1)
        gate = (beside / (beside + mass))[:, None]
        want = (1 - gate) * (softmax(scores) @ value) + gate * (softmax(query @ p_k.T) @ p_v)
        assert 0.02 < gate.min() < gate.max() < 0.98 and np.ptp(gate) > 0.1  # neither term is idle
        np.testing.assert_allclose(out[:, own], want, rtol=1e-6, atol=1e-7)  # transformers' angles are float32


@pytest.mark.parametrize("site, role", [("ffn", "mlp"), ("attention", "self_attn")])
@pytest.mark.parametrize("preset, scale", [("sequential", 1.0), ("parallel", 1.0), ("scaled-parallel", 4.0)])
def test_bottlenecks_read_the_input_or_the_output(preset, scale, site, role):
    base = tiny_llama().double()
    adapter = built(base, preset=preset, site=site, r=6)
    path = LAYER + role
    x, h = seen(base, {}, it=path)["it"]
    changed = seen(base, {path: adapter[path]}, it=path)["it"][1]
    part = arrays(adapter, path)
    read = h if preset == "sequential" else x
    want = relu(read @ part["down"].T + part["down_bias"]) @ part["up"].T + part["up_bias"]
    np.testing.assert_allclose(changed - h, scale * want, rtol=1e-9, atol=1e-12)


def test_a_scaled_adapter_is_s_times_the_plain_one():
    base = tiny_llama().double()
    path = LAYER + "mlp"
    plain = built(base, preset="parallel", r=6)
    for s in (4.0, -0.5):
        scaled = built(base, preset="parallel", combine="scaled", scale=s, r=6)
        h = seen(base, {}, it=path)["it"][1]
        one, many = (seen(base, {path: parts[path]}, it=path)["it"][1] - h for parts in (plain, scaled))
        np.testing.assert_allclose(many, s * one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reads", ["query", "x"])
def test_the_multi_head_adapter_is_block_diagonal(reads):
    """z + ReLU(x M) blockdiag(U_1, ..), z the heads' results side by side; M is the D_i beside each other, and of queries
    the frozen projection times their block diagonal."""
    base = tiny_llama().double()
    attention = LAYER + "self_attn"
    path = attention + ".o_proj"
    adapter = built(base, preset="mh-parallel", input=reads, r=3)
    z = seen(base, {}, it=path)["it"][0]
    got = seen(base, {path: adapter[path]}, it=path, whole=attention)
    part, x = arrays(adapter, path), got["whole"][0]
    up, down = np.zeros((HEADS * 3, HEADS * WIDTH)), np.zeros((HEADS * WIDTH, HEADS * 3))
    for n in range(HEADS):
        up[n * 3 : (n + 1) * 3, n * WIDTH : (n + 1) * WIDTH] = part["up"][n].T
        if reads == "query":
            down[n * WIDTH : (n + 1) * WIDTH, n * 3 : (n + 1) * 3] = part["down"][n].T
    if reads == "query":
        first = base.get_submodule(attention + ".q_proj").weight.detach().numpy().T @ down
    else:
        first = part["down"].reshape(HEADS * 3, HIDDEN).T
    np.testing.assert_allclose(got["it"][0] - z, relu(x @ first) @ up, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["t5", "whisper", "gpt2", "bert"])
def test_multi_head_adapters_read_their_own_half_of_a_model(family):
    """Encoder, decoder and cross attention of one layer number apart; a batch equals each row alone, cached equals whole."""
    base = tiny(family).double()
    bed = Attachment.of(base)
    options = {"input": "x"} if family == "gpt2" else {}
    adapters = [built(base, preset="mh-parallel", r=3, **options), {}]
    assert {parts[0].taps[0].part for parts in adapters[0].values()} == {
        s.part for s in select(sites(base), "attention")
    }
    draw = torch.Generator().manual_seed(5)
    sequences = [torch.randint(3, 96, (9,), generator=draw) for _ in adapters]
    got = {"batch": logits(bed, adapters, sequences, "right")}
    if family != "bert":
        got["cached"] = decoded(bed, adapters, sequences, "right", steps=4)
    for rows in got.values():
        for row, (adapter, sequence) in enumerate(zip(adapters, sequences, strict=True)):
            assert distance(rows[row], alone(bed, adapter, sequence)) < 1e-9
        assert distance(rows[0], alone(bed, {}, sequences[0])) > 1e-3


def test_mam_is_the_sum_of_its_two_parts():
    """A prefix of 30 at every attention, a scaled bottleneck of r at every feed-forward: together what they are by
    themselves, one over the other."""
    base = tiny_llama().double()
    mam = built(base, preset="mam", r=6)
    halves = {
        form: {p: parts for p, parts in mam.items() if parts[0].form == form} for form in ("prefix", "bottleneck")
    }
    assert [s.path for s in select(sites(base), "attention")] == list(halves["prefix"])
    assert [s.path for s in select(sites(base), "ffn")] == list(halves["bottleneck"])
    assert all(part.keys.shape == (KEYS, 30, WIDTH) for [part] in halves["prefix"].values())
    assert all((part.scale, part.parallel) == (4.0, 1) for [part] in halves["bottleneck"].values())
    # In one layer the feed-forward's change is that of the bottleneck alone, at the x that the prefix leads to.
    path = LAYER + "mlp"
    x, y = seen(base, mam, it=path)["it"]
    _, plain = seen(base, halves["prefix"], it=path)["it"]
    part = arrays(mam, path)
    want = 4 * (relu(x @ part["down"].T + part["down_bias"]) @ part["up"].T + part["up_bias"])
    np.testing.assert_allclose(y - plain, want, rtol=1e-9, atol=1e-12)
    wide = tiny("t5")
    assert {s.path for s in select(sites(wide), "attention")} < set(built(wide, preset="mam", r=2))  # cross too


# --- the axes --------------------------------------------------------------------------------------------------------


def test_parameters_are_the_papers():
    """Section 4.1 and Appendix B: 2ld a prefix, 2rd an adapter (and its biases), 4rd LoRA at query and value, 10rd at a
    feed-forward of width 4d, 2rd a multi-head adapter."""
    base, d, r = tiny("gpt2"), 32, 3  # its feed-forward has two matrices of 4d, and as many keys as queries

    def count(base=base, **options):
        numbers = 0
        for [part] in built(base, r=r, **options).values():
            numbers += sum(t.numel() for name, t in part.tensors.items() if name not in part.constants)
        return numbers / 2  # layers

    assert count(preset="prefix") == count(tiny("bert"), preset="mh-parallel") == 2 * r * d
    assert count(preset="sequential") == count(preset="parallel", site="attention") == 2 * r * d + r + d
    assert count(preset="lora", site="attention") == 4 * r * d
    assert count(preset="lora") == 10 * r * d


def test_what_the_axes_say_of_folding_is_so():
    """Every combination of axes: refused with a reason, or built, and then it folds exactly where they say so."""
    outcomes = {"refused": 0, "folds": 0, "does not": 0}
    values = product(AXES["form"], AXES["input"], ("ffn", "attention", "head", "down_proj"), AXES["combine"])
    for form, read, site, combine in values:
        options = {"preset": "parallel", "form": form, "input": read, "site": site, "combine": combine, "r": 2}
        base = tiny_llama().double()
        try:
            adapter = placed(built(base, **options), sites(base))
        except UsageError as error:
            assert error.hint
            outcomes["refused"] += 1
            continue
        bed, says = Attachment.of(base), plugins.options(Unified.Config, options).foldable
        want = alone(bed, adapter, IDS[0])
        bed.close()
        try:
            fold(base, adapter)
        except NotFoldable:
            assert not says, options
            outcomes["does not"] += 1
            continue
        assert says, options
        assert distance(alone(Attachment.of(base), {}, IDS[0]), want) < 1e-9
        outcomes["folds"] += 1
    # low_rank: ffn, attention, down_proj by add, scaled. bottleneck: x or h at those three, x or query at the heads, each
    # by add, scaled; prefix: at head and attention.
    assert outcomes == {"refused": 108 - 6 - 16 - 2, "folds": 6, "does not": 18}


def test_fresh_adapters_but_prefixes_leave_the_base_as_it_is():
    base = tiny_llama()
    bed = Attachment.of(base)
    bare = alone(bed, {}, IDS[0])
    for preset in PRESETS:
        fresh = alone(bed, built(base, random=False, preset=preset, r=4), IDS[0])
        assert torch.equal(fresh, bare) == (preset != "prefix")
    part = built(base, random=False, preset="parallel", r=400, init="bert")[LAYER + "mlp"][0]
    for tensor in (part.down, part.up):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.05)
    low = built(base, random=False, preset="mh-parallel", r=50)[LAYER + "self_attn.o_proj"][0].down
    assert low.abs().max().item() == pytest.approx(
        WIDTH**-0.5, rel=0.02
    )  # Kaiming-uniform with a = √5: ±1/√(what is read)


def test_a_preset_is_changed_by_the_axes_given_besides():
    config = plugins.options(Unified.Config, {"preset": "sequential", "input": "x", "combine": "scaled", "r": "64"})
    (axes,) = config.parts
    assert (axes.form, axes.input, axes.site, axes.combine, axes.r, axes.s) == (
        "bottleneck",
        "x",
        "ffn",
        "scaled",
        64,
        4,
    )
    prefix, bottleneck = plugins.options(Unified.Config, {"r": 16, "scale": 2, "length": 8}).parts
    assert (prefix.r, bottleneck.r, bottleneck.s) == (8, 16, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "best"}, {"preset": "mam", "form": "low_rank"}, {"r": 0}, {"length": 0}, {"scale": float("inf")},
        {"preset": "parallel", "form": "dense"}, {"preset": "parallel", "input": "y"}, {"preset": "parallel", "scale": 2.0},
        {"preset": "parallel", "combine": "gated"}, {"preset": "lora", "combine": "gated"}, {"preset": "lora", "input": "h"},
        {"preset": "prefix", "combine": "add"}, {"preset": "prefix", "input": "h"}, {"preset": "prefix", "site": "ffn"},
        {"preset": "mh-parallel", "input": "h"}, {"preset": "parallel", "input": "query"}, {"preset": "lora", "site": "head"},
        {"preset": "lora", "site": "block"}, {"preset": "parallel", "site": "embedding"}, {"preset": "parallel", "length": 3},
        {"preset": "prefix", "activation": "relu"}, {"preset": "prefix", "init": "bert"}, {"init": "zero"},
        {"activation": "sine"},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        built(tiny_llama(), **options)
    assert caught.value.hint


@pytest.mark.parametrize("family, preset", [("bert", "parallel"), ("whisper", "mam"), ("gpt2", "mh-parallel")])
def test_what_a_base_cannot_give_is_refused(family, preset):
    """No module around the feed-forward, whose input would be read; no query projection of its own."""
    with pytest.raises(UsageError) as caught:
        built(tiny(family), preset=preset)
    assert "--set input=" in caught.value.hint


def test_a_multi_head_adapter_of_another_layer_is_refused():
    base = tiny_llama()
    adapter = random_adapter(HeadBottleneck, base, 0)
    one, other = (LAYER.replace("0", str(n)) + "self_attn.o_proj" for n in (0, 1))
    check_fit(adapter, sites(base), "me/x")
    with pytest.raises(IncompatibleBase, match="layer 0 and sits at"):
        check_fit({other: adapter[one]}, sites(base), "me/x")
    stored = modifications_of(named_tensors(adapter))
    assert [part.taps for [part] in stored.values()] == [part.taps for [part] in adapter.values()]


@pytest.mark.parametrize("name", ["scale", "activation"])
@pytest.mark.parametrize("shape", [(1,), (2,)])
def test_constants_that_are_no_scalars_are_refused(name, shape):
    base = tiny_llama()
    ((path, [part]), *_) = random_adapter(HeadBottleneck, base, 0).items()
    part.tensors[name] = part.tensors[name].expand(shape)
    with pytest.raises(IncompatibleBase, match="do not fit 4 heads") as caught:
        part.check(next(site for site in sites(base) if site.path == path))
    assert caught.value.hint


# --- training --------------------------------------------------------------------------------------------------------


def test_training_goes_on_and_stands_over_others(tiny_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)))
    hub = adapterhub.open(tmp_path / "hub", create=True)
    settings = {"data": path, "steps": 4, "lr": 1e-2, "device": "cpu"}

    def tensors(reference):
        return Adapter.load(hub, hub.resolve(reference)).tensors

    options = {"preset": "mh-parallel", "r": 4}
    hub.train(str(tiny_folder), "unified", name="me/heads", options=options, **settings)
    after = hub.train(str(tiny_folder), continue_from="me/heads", **settings)
    before, now = tensors("me/heads@0.1.0"), tensors(f"me/heads@{after.version}")
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], now[name])}
    assert moved == {"down", "up"}
    mam = hub.train(
        str(tiny_folder), "unified", name="me/mam", options={"r": 4, "length": 3}, on=["me/heads"], **settings
    )
    assert {form for forms in mam.manifest.forms.values() for form in forms} == {"prefix", "bottleneck"}
    model = hub.load(str(tiny_folder), "me/heads + me/mam")
    rows = ["0.5*me/heads", "me/heads + me/mam", None]
    many = model(input_ids=IDS.expand(3, -1), adapters=rows).logits
    for row, expression in enumerate(rows):
        one = model(input_ids=IDS, adapters=[expression]).logits[0]
        assert distance(many[row], one) < 1e-5
