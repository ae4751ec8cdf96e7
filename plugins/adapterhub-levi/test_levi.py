"""LEVI: the laws, the ensemble written out in NumPy, which states it reads, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapterhub_levi import LEVI, LayerEnsemble

import adapterhub
from adapterhub import Step, plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.fit import check_fit
from adapterhub.errors import BatchError, IncompatibleBase, UsageError
from adapterhub.forms.low_rank import LowRank
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.fold import fold
from adapterhub.sites import Site, select, sites
from adapterhub.testing import check
from adapterhub.testing.bed import plan, random_adapter, tiny_llama
from adapterhub.testing.families import padded, tiny

HEAD = Site("lm_head", "head", 32, 96, True, causal=True)
BOTH = ["model.layers.0", "model.layers.1"]
"""The layers of the tiny Llama."""


def config(**options):
    return plugins.options(LEVI.Config, options)


def made(model, seed=1, **options):
    """An adapter of the method, every tensor of it random, in float64."""
    torch.manual_seed(seed)
    ((path, part),) = LEVI().build(sites(model), config(**options)).items()
    for name in set(part.tensors) - part.constants:
        part.tensors[name] = torch.randn(part.tensors[name].shape)
    return path, part.to(dtype=torch.float64)


def written_out(part, states, ids, pooled=False):
    """The ensemble's predictions for one row without padding: states, of each layer that votes (tokens, inputs); ids
    (tokens,). (tokens, outputs), or (outputs,) where the head sees one vector a row."""
    given = {name: tensor.numpy() for name, tensor in part.tensors.items()}

    def normed(h):
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)

    views = [normed(f.numpy()) for f in states]
    if "table" in given:
        h = given["table"][ids.numpy()]
        for kernel, offset in zip(given["kernel"], given["offset"], strict=True):
            size, after = len(kernel), 0 if given["causal"] else (len(kernel) - 1) // 2
            new = np.empty_like(h)
            for t in range(len(h)):
                total = offset.copy()
                for k in range(size):
                    at = t + after - (size - 1) + k
                    if 0 <= at < len(h):
                        total += h[at] @ kernel[k]
                new[t] = h[t] + np.maximum(total, 0)
            h = new
        views = [np.concatenate([view, normed(h)], 1) for view in views]
    if pooled:
        views = [view.mean(0, keepdims=True) for view in views]
    weights = np.exp(given["weights"]) if "weights" in given else np.ones(len(views))
    weights = weights / weights.sum()
    total = sum(
        w * np.maximum(view @ a.T + b, 0) @ h.T
        for w, view, a, b, h in zip(weights, views, given["down"], given["bias"], given["head"], strict=True)
    )
    return torch.tensor(total[0] if pooled else total)


def read(base, layers, ids):
    """What these modules of a plain model put out for one row: its own hooks, none of ours."""
    states = []

    def keep(module, args, output):
        states.append((output[0] if isinstance(output, tuple) else output)[0])

    hooks = [base.get_submodule(layer).register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        logits = base(input_ids=ids[None]).logits[0]
    for hook in hooks:
        hook.remove()
    return states, logits


def random_ids(*lengths):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (length,), generator=draw) for length in lengths]


def run(base, rows, ids, **given):
    attachment = Attachment.of(base)
    with torch.no_grad(), attachment.running(plan(attachment, rows, len(rows))):
        return base(input_ids=ids, **given).logits


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    assert [f"{r.law}: {r.detail}" for r in check("levi") if r.verdict == "failed"] == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"width": 5, "kernel": 3, "depth": 2},
        {"width": 5, "kernel": 4, "average": "learned", "mode": "replace"},
        {"g": False, "layers": [1]},
    ],
)
def test_the_change_is_the_formula(options, side):
    model = tiny_llama().double()
    _, part = made(model, r=4, **options)
    rows = random_ids(5, 8, 1)
    ids, mask = padded(rows, side)
    states = {tap: torch.randn(3, 8, 32, dtype=torch.float64) for tap in part.views}
    y = torch.randn(3, 8, 96, dtype=torch.float64)
    tapped = (states | dict.fromkeys(part.taps[len(part.views) :], ids)).__getitem__
    got = part.delta_out(torch.randn(3, 8, 32).double(), y, Step(mask.bool(), tapped=tapped))
    for row, tokens in enumerate(rows):
        real = mask[row].bool()
        want = written_out(part, [states[tap][row][real] for tap in part.views], tokens)
        want = want - y[row][real] if options.get("mode") == "replace" else want
        torch.testing.assert_close(got[row][real], want, rtol=0, atol=1e-11)
    last = part.delta_out(torch.randn(3, 2, 32).double(), y[:, -2:], Step(mask.bool(), tapped=tapped))
    torch.testing.assert_close(last, got[:, -2:], rtol=0, atol=1e-12)


def test_a_fresh_one_is_the_base_exactly():
    base, (ids,) = tiny_llama(), random_ids(9)
    fresh = {path: [part] for path, part in LEVI().build(sites(base), config()).items()}
    assert torch.equal(run(base, [fresh], ids[None]), run(base, [{}], ids[None]))


def test_in_place_of_the_base_it_can_be_the_base():
    """relu(z) - relu(-z) = z: over the last layer's state, A = (1, -1) and H = (W, -W) with W the base's head times its last
    norm are the base's own logits; at twice H they are twice those, since nothing of the base's is left. (The base's
    norm computes in float32.)"""
    base = tiny_llama().double()
    torch.nn.init.normal_(base.model.norm.weight)
    (ids,) = random_ids(9)
    with torch.no_grad():
        want, weight = base(input_ids=ids[None]).logits, base.lm_head.weight * base.model.norm.weight
    path, part = made(base, g=False, layers=[1], r=64, mode="replace")
    eye = torch.eye(32, dtype=torch.float64)
    part.tensors |= {"down": torch.cat([eye, -eye])[None], "bias": torch.zeros(1, 64, dtype=torch.float64)}
    for times in (1, 2):
        part.tensors["head"] = times * torch.cat([weight, -weight], 1).detach()[None]
        torch.testing.assert_close(run(base, [{path: [part]}], ids[None]), times * want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_it_reads_the_states_that_the_adapters_beneath_left(mode):
    """Over a LoRA it is the formula over the states of a plain model into whose weights the LoRA was folded."""
    base, folded = tiny_llama().double(), tiny_llama().double()
    lora = random_adapter(LowRank, base, 4, select(sites(base), "all-linear"))
    fold(folded, lora)
    path, part = made(base, mode=mode)
    (ids,) = random_ids(9)
    states, logits = read(folded, BOTH, ids)
    bare, _ = read(base, BOTH, ids)
    want = written_out(part, states, ids) + (logits if mode == "residual" else 0)
    assert (written_out(part, bare, ids) - written_out(part, states, ids)).abs().max() > 1e-2
    torch.testing.assert_close(run(base, [lora | {path: [part]}], ids[None])[0], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_keep_their_own(side):
    """Two LEVIs of unlike layers, the bare base and a LEVI without g, padded: each row by the formula from its own states."""
    base = tiny_llama().double()
    adapters = [made(base, 1), made(base, 2, layers=[0], kernel=2, width=3), None, made(base, 3, g=False)]
    rows, programs = random_ids(5, 9, 4, 7), [{} if a is None else {a[0]: [a[1]]} for a in adapters]
    ids, mask = padded(rows, side)
    got = run(base, programs, ids, attention_mask=mask)
    for row, (tokens, adapter) in enumerate(zip(rows, adapters, strict=True)):
        layers = [f"model.layers.{tap.layer}" for tap in adapter[1].views] if adapter else []
        states, want = read(base, layers, tokens)
        want = want + written_out(adapter[1], states, tokens) if adapter else want
        torch.testing.assert_close(got[row][mask[row].bool()], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_and_logits_to_keep(side):
    """A padded prefill of which the head sees the last token only, as in generate, then one token at a time: the formula."""
    base = tiny_llama().double()
    path, part = made(base, kernel=4, depth=2)
    rows = random_ids(9, 12)
    ids, mask = padded([tokens[:-6] for tokens in rows], side)
    attachment, steps = Attachment.of(base), []
    with torch.no_grad(), attachment.running(plan(attachment, [{path: [part]}] * 2, 2)):
        out = base(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        prefilled = out.logits
        for k in range(6):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            token = torch.stack([tokens[len(tokens) - 6 + k] for tokens in rows])[:, None]
            out = base(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    for row, tokens in enumerate(rows):
        states, logits = read(base, BOTH, tokens)
        want = logits + written_out(part, states, tokens)
        torch.testing.assert_close(torch.cat([step[row] for step in steps]), want[-6:], rtol=0, atol=1e-9)
        if side == "left" or row == 1:  # on the right the last of the shorter row's tokens is padding
            torch.testing.assert_close(prefilled[row], want[-7:-6], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForMaskedLM"])
@pytest.mark.parametrize("options", [{}, {"kernel": 4, "depth": 2}, {"g": False, "average": "learned"}])
def test_an_encoders_head(kind, options):
    """In place of a prediction of each token, g looking both ways; and of the one of a row, from the means of the views."""
    base = tiny("bert", kind=kind, num_labels=3).double()
    path, part = made(base, mode="replace", **options)
    assert not part.looks_back and not part.stateful
    rows = random_ids(5, 9, 4)
    ids, mask = padded(rows, "right")
    got = run(base, [{path: [part]}] * 3, ids, attention_mask=mask)
    layers, pooled = [site.path for site in select(sites(base), "block")], kind == "BertForSequenceClassification"
    for row, tokens in enumerate(rows):
        states, _ = read(base, layers, tokens)
        want = written_out(part, states, tokens, pooled)
        torch.testing.assert_close(got[row] if pooled else got[row][: len(tokens)], want, rtol=0, atol=1e-9)


def test_a_decoder_that_classifies():
    """Its head scores every token, and the base takes the last one's."""
    base = tiny("llama", kind="LlamaForSequenceClassification", num_labels=3).double()
    path, part = made(base, mode="replace")
    ids, mask = padded(rows := random_ids(5, 9), "right")
    got = run(base, [{path: [part]}] * 2, ids, attention_mask=mask)
    for row, tokens in enumerate(rows):
        states, _ = read(base, BOTH, tokens)
        torch.testing.assert_close(got[row], written_out(part, states, tokens)[-1], rtol=0, atol=1e-9)


def test_layers_vote_as_chosen():
    model = tiny_llama(num_hidden_layers=6)
    for options, layers in (({}, [1, 3, 5]), ({"layers": [4, 0]}, [0, 4])):
        (part,) = LEVI().build(sites(model), config(**options)).values()
        assert part.layers.tolist() == layers == [tap.layer for tap in part.views]
    assert len(LEVI().build(sites(tiny_llama()), config())["lm_head"].layers) == 2  # it has no more


@pytest.mark.parametrize(
    "options",
    [{"layers": [2]}, {"layers": []}, {"r": 0}, {"kernel": 0}, {"depth": 0}, {"average": "sum"}, {"mode": "add"}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        LEVI().build(sites(tiny_llama()), config(**options))
    assert caught.value.hint


def test_a_base_that_it_does_not_suit_is_refused():
    nameless = [replace(site, role="" if site.role == "block" else site.role) for site in sites(tiny_llama())]
    for here in (nameless, sites(tiny("t5"))):
        with pytest.raises(UsageError, match="one stack of known layers"):
            LEVI().build(here, config())
    with pytest.raises(UsageError, match="token ids"):
        LEVI().build(sites(tiny("vit")), config())
    assert LEVI().build(sites(tiny("vit")), config(g=False))
    part = LayerEnsemble.random(HEAD)
    part.check(HEAD)
    for wrong in (replace(HEAD, role="query"), replace(HEAD, inputs=33), replace(HEAD, outputs=95)):
        with pytest.raises(IncompatibleBase):
            part.check(wrong)
    with pytest.raises(IncompatibleBase, match="no sites 'block'"):  # a layer that this base does not have
        check_fit({"lm_head": [LayerEnsemble.random(HEAD)]}, nameless, "me/x")


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": torch.tensor(0, dtype=torch.uint8)},
        {"causal": torch.ones(1, dtype=torch.uint8)},
        {"replace": torch.zeros(1, dtype=torch.uint8)},
        {"layers": torch.tensor([[0], [1]])},
        {"kernel": torch.zeros(2, 0, 6, 6)},
    ],
    ids=str,
)
def test_a_hostile_file_is_refused(changes):
    """What looks ahead at a causal head, constants of other shapes, a kernel that sees nothing."""
    part = LayerEnsemble.random(HEAD)
    if "layers" in changes:  # no tap reads them
        part.tensors |= changes
    else:
        part = LayerEnsemble(**part.tensors | changes)
    with pytest.raises(IncompatibleBase) as caught:
        part.check(HEAD)
    assert caught.value.hint
    if changes.keys() == {"causal"} and not part.looks_back:
        part.check(replace(HEAD, causal=False))


def test_a_token_beyond_the_table_is_refused():
    base = tiny_llama().double()
    path, part = made(base)
    part.tensors["table"] = part.table[:7]
    with pytest.raises(BatchError, match="7 tokens, and token 95") as caught:
        run(base, [{path: [part]}], torch.tensor([[3, 95, 6]]))
    assert caught.value.hint
    assert run(base, [{path: [part]}], torch.tensor([[3, 5, 6]])).isfinite().all()


def test_it_needs_the_ids_and_the_last_tokens():
    base = tiny_llama().double()
    path, part = made(base)
    program = {path: [part]}
    with pytest.raises(BatchError, match="at the embedding"):
        run(base, [program], None, inputs_embeds=torch.randn(1, 4, 32).double())
    with pytest.raises(BatchError, match="chosen tokens"):
        run(base, [program], random_ids(3)[0][None], logits_to_keep=torch.tensor([0]))


def test_through_a_hub(tiny_folder, tmp_path):
    """Over another adapter and on from itself; it stores constants as they are, and generates what one pass predicts."""
    hub = adapterhub.open(tmp_path / "hub", create=True)
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{n} ", "completion": "abc"}) for n in range(8)))
    given = {"steps": 4, "lr": 1e-2, "device": "cpu"}
    hub.train(str(tiny_folder), "lora", path, "me/lora", **given)
    options = {"layers": [1], "width": 8}
    hub.train(str(tiny_folder), "levi", path, "me/levi", options=options, on=["me/lora"], **given)
    after = hub.train(str(tiny_folder), data=path, continue_from="me/levi", **given)
    first, second = (Adapter.load(hub, hub.resolve(f"me/levi@{v}")).tensors for v in ("0.1.0", after.version))
    changed = {name.rpartition(".")[2]: not torch.equal(first[name], second[name]) for name in first}
    assert changed == {name: name not in LayerEnsemble.constants for name in LayerEnsemble.stores if name != "weights"}
    model = hub.load(str(tiny_folder), "me/lora + me/levi")
    ids = model.tokenizer(["1 a", "2 b"], return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(model(input_ids=out).logits[:, 2:-1].argmax(-1), out[:, 3:])
