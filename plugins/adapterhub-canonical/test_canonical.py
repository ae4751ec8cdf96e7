"""Canonical: the losses and the divergence against NumPy, the drift that is told, the search inside the budget, and the carried
change against the formula, with and without a cache."""

import json

import numpy as np
import pytest
import torch
from adapterhub_canonical import Canonical, Carried, divergence, edit_loss, within

import adapterhub
from adapterhub import Example, Model, TrainingContext, plugins
from adapterhub.data.batches import pad_left
from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama, tiny_tokenizer

FACTS = [{"prompt": f"{i} is", "completions": [" good", " bad"], "rewards": [1, -1]} for i in range(8)]
SETTINGS = {"objective": "canonical", "lr": 2e-2, "batch_size": 4, "device": "cpu", "steps": 12}


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def facts(tmp_path):
    return written(tmp_path / "facts.jsonl", FACTS)


@pytest.fixture(scope="module")
def texts():
    """What the tiny Llama says by itself: any change of it makes that less likely."""
    model = Model(tiny_llama(), tiny_tokenizer())
    start = torch.arange(20, 40)[:, None]
    torch.manual_seed(0)
    options = {
        "do_sample": True,
        "top_k": 0,
        "min_new_tokens": 16,
        "max_new_tokens": 16,
        "suppress_tokens": [0, 1, 2, 3],
    }
    said = model.generate(input_ids=start, attention_mask=torch.ones_like(start), **options)
    return [{"text": text} for text in model.tokenizer.batch_decode(said)]


@pytest.fixture
def background(tmp_path, texts):
    return written(tmp_path / "background.jsonl", texts)


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


def chances(base, ids):
    """The log-probabilities after each token of one unpadded sequence, float64 in NumPy."""
    with torch.no_grad():
        logits = base(torch.tensor([ids])).logits[0].double().numpy()
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def with_lora(model, scale):
    """A LoRA whose tensors are all random on top of it."""
    method = plugins.load("methods", "lora")
    torch.manual_seed(1)
    parts = method().build(model.sites, method.Config(r=2))
    for part in parts.values():
        for name, tensor in part.tensors.items():
            part.tensors[name] = scale * torch.randn_like(tensor)
    model.attach_new(parts)
    return model


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    """Resuming to the same bits is one of them."""
    assert [f"{r.law}: {r.detail}" for r in check("canonical") if r.verdict == "failed"] == []


# --- the loss ------------------------------------------------------------------------------------------------------


def test_each_row_compares_the_means_of_its_sides():
    losses = torch.tensor([1.0, 2.0, 4.0, 0.5, 3.0])
    group, reward = torch.tensor([4, 4, 4, 9, 9]), torch.tensor([1.0, 2.0, -1.0, -0.5, 3.0])
    good, bad = np.array([1.5, 3.0]), np.array([4.0, 0.5])
    told = {"good": good, "bad": -bad, "good_vs_bad": good - bad, "balance": abs(good - bad)}
    for kind, values in told.items():
        assert edit_loss(losses, group, reward, kind).item() == pytest.approx(values.mean())


def test_the_divergence_is_the_formula_over_real_tokens_only():
    model = with_lora(Model(tiny_llama().requires_grad_(False)), 0.2)
    examples = [Example(1, (5, 6, 7, 8, 9), 0), Example(2, (10, 11, 12), 0), Example(3, (4, 9, 20, 21), 2)]
    total = []
    for example in examples:
        before, after = chances(tiny_llama(), example.ids), chances(lambda ids: model(input_ids=ids), example.ids)
        kl = (np.exp(before) * (before - after)).sum(-1)
        total += kl[max(example.start, 1) - 1 : -1].tolist()  # where a label is predicted
    assert len(total) == 4 + 2 + 2
    found = divergence(model, TrainingContext(model, examples, 0).batch(examples))
    assert found.item() == pytest.approx(np.mean(total), rel=1e-4) and found.item() > 0.01
    found.backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in model.trainable_parameters())


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_loss_is_the_examples_and_the_weighed_divergence_of_the_rows_drawn(weight):
    model = with_lora(Model(tiny_llama().requires_grad_(False)), 0.2)
    rows = [
        tuple(Example(g + 1, (5, 6 + g, *range(20, 20 + n)), 2, r, g) for n, r in sides)
        for g, sides in enumerate([[(2, 1.0), (4, -1.0)], [(3, -1.0), (1, 1.0), (2, 1.0)]])
    ]
    general = [Example(n, (30 + n, 31, 32, 33 - n), 0) for n in range(10)]
    objective = Canonical(Canonical.Config(loss="good_vs_bad", weight=weight, rows=3))
    setting = TrainingContext(model, rows, 0, extras={"background": general})
    objective.prepare(setting)
    assert [e.line for e in objective.held_out] == [0, 5] and len(objective.general) == 8
    moment = adapterhub.StepContext(0, 1, torch.Generator().manual_seed(4))
    drawn = torch.randperm(8, generator=torch.Generator().manual_seed(4))[:3]
    wanted = []
    for row in rows:
        sides = {True: [], False: []}
        for e in row:
            here = chances(lambda ids: model(input_ids=ids), e.ids)
            sides[e.reward > 0].append(-np.mean([here[at - 1, e.ids[at]] for at in range(e.start, len(e.ids))]))
        wanted.append(np.mean(sides[True]) - np.mean(sides[False]))
    apart = divergence(model, setting.batch([objective.general[n] for n in drawn])).item()
    found = objective.loss(setting.batch(rows), moment)
    assert found.item() == pytest.approx(np.mean(wanted) + weight * apart, rel=1e-4)


def test_prompt_rows_are_all_good(hub, tiny_folder, background, tmp_path):
    """And the divergence of a fresh LoRA is 0: the first loss is that of the completions."""
    rows = written(tmp_path / "rows.jsonl", [{"prompt": "1 is", "completion": " good"}] * 4)
    made = hub.train(str(tiny_folder), "lora", rows, "me/a", extras={"background": background}, **SETTINGS)
    plain = hub.evaluate(None, str(tiny_folder), rows)["loss"]
    log = json.loads(hub.store.read(made.manifest.files["log"]))
    assert log[0]["loss"] == pytest.approx(plain, rel=1e-3) and log[-1]["loss"] < plain / 2


# --- drift ---------------------------------------------------------------------------------------------------------


def test_the_drift_is_told_and_the_divergence_holds_it_down(hub, tiny_folder, facts, background, texts, tmp_path):
    held_out = written(tmp_path / "held.jsonl", texts[::5])
    drifts = {}
    for name, weight in (("free", 0.0), ("held", 10.0)):
        options = {"r": 4, "canonical.weight": weight, "canonical.loss": "good_vs_bad", "canonical.budget": 0.02}
        made = hub.train(
            str(tiny_folder), "lora", facts, name, options=options, extras={"background": background}, **SETTINGS
        )
        told = made.manifest.recipe["found"]["train"]["objective"]
        before, after = (hub.evaluate(e, str(tiny_folder), held_out)["loss"] for e in (None, name))
        assert told["before"] == pytest.approx(before, rel=1e-5) and told["after"] == pytest.approx(after, rel=1e-5)
        assert told["drift"] == pytest.approx(after / before - 1, abs=1e-5)
        assert told["inside"] is (told["drift"] <= 0.02)
        drifts[name] = told["drift"]
    assert drifts["free"] > 0.02 and drifts["held"] < drifts["free"] / 2


def test_what_lies_beneath_is_the_reference_and_an_edit_goes_on(hub, tiny_folder, facts, background, texts):
    given = SETTINGS | {"extras": {"background": background}}
    hub.train(str(tiny_folder), "lora", facts, "first", **given)
    above = hub.train(str(tiny_folder), "lora", facts, "above", on=["first"], **given)
    beneath = hub.evaluate("first", str(tiny_folder), written(background.parent / "held.jsonl", texts[::5]))["loss"]
    assert above.manifest.recipe["found"]["train"]["objective"]["before"] == pytest.approx(beneath, rel=1e-5)
    more = hub.train(str(tiny_folder), data=facts, continue_from="first", **given)
    assert more.name == "first" and more.version != "0.1.0"


def test_within_is_the_largest_weight_inside_the_budget(hub, tiny_folder, facts, background):
    options = {"r": 4, "canonical.weight": 0.0}
    hub.train(str(tiny_folder), "lora", facts, "a", options=options, extras={"background": background}, **SETTINGS)
    model = hub.load(str(tiny_folder))
    plain = hub.evaluate(None, str(tiny_folder), background)["loss"]
    grown = {
        n / 10: hub.evaluate(f"{n / 10}*a", str(tiny_folder), background)["loss"] / plain - 1 for n in range(1, 11)
    }
    for budget in (0.0, 0.5 * grown[0.4] + 0.5 * grown[0.3], 10.0):
        inside = [weight for weight, drift in grown.items() if drift <= budget]
        assert within(model, background, budget, "a") == max(inside, default=0.0)
    assert within(model, background, 10.0, "a") == 1.0 and max(grown.values()) > 0.01
    for wrong in ({"budget": -1.0, "expression": "a"}, {"budget": 0.1}):
        with pytest.raises(UsageError) as caught:
            within(model, background, **wrong)
        assert caught.value.hint


# --- carried -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory, texts):
    """A large model (wider, deeper, with some spare ids) and the small one, and its adapter `edit`, in float64."""
    folder = tmp_path_factory.mktemp("carried")
    facts, background = (written(folder / name, rows) for name, rows in (("facts", FACTS), ("background", texts)))
    hub = adapterhub.open(folder / "hub", create=True)
    hub.train(str(tiny_folder), "lora", facts, "edit", extras={"background": background}, **SETTINGS)
    tiny_llama(7, 100, hidden_size=48, num_hidden_layers=3).save_pretrained(folder / "big")
    tiny_tokenizer().save_pretrained(folder / "big")
    loaded = [hub.load(str(path), device="cpu", dtype="float32") for path in (folder / "big", tiny_folder)]
    return [Model(m.base.double(), m.tokenizer, hub=hub, fingerprint=m.fingerprint) for m in loaded]


def batch():
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 96, (n,), generator=draw).tolist() for n in (3, 7, 5)]
    return rows, *pad_left(rows, 0)


def by_hand(big, small, ids, weight):
    """(tokens, 100) of one unpadded row, each of the three models run by itself."""
    one = torch.tensor([ids])
    with torch.no_grad():
        logits = big(input_ids=one).logits[0].numpy().copy()
    tuned, plain = (
        chances(lambda given, name=name: small(input_ids=given, adapters=name), ids) for name in ("edit", None)
    )
    logits[:, :96] += weight * (tuned - plain)
    logits[:, 96:] = -np.inf  # no token of the tokenizer
    return logits


@torch.no_grad()
def test_the_sum_is_the_formula_in_a_padded_batch(models):
    big, small = models
    rows, ids, mask = batch()
    for weight in (0.0, 0.7):
        out = Carried(big, small, "edit", weight)(ids, mask).logits
        for row, logits in zip(rows, out, strict=True):
            np.testing.assert_allclose(logits[-len(row) :].numpy(), by_hand(big, small, row, weight), atol=1e-9)
    assert not np.allclose(by_hand(big, small, rows[0], 0.7), by_hand(big, small, rows[0], 0.0), atol=0.1)
    other = Carried(big, small, "0.5*edit", 0.7)(ids, mask, adapters="edit", logits_to_keep=2).logits
    torch.testing.assert_close(other, out[:, -2:], rtol=0, atol=1e-9)
    with pytest.raises(UsageError, match="past_key_values"):
        Carried(big, small, "edit")(ids, mask, past_key_values=None)


@pytest.mark.parametrize("sample", [False, True])
@torch.no_grad()
def test_cached_generation_is_uncached_generation(models, sample):
    """Two answers to each row, a row alone included; and the change decides what is said."""
    big, small = models
    _, ids, mask = batch()
    options = {
        "do_sample": sample,
        "num_return_sequences": 2 if sample else 1,
        "max_new_tokens": 6,
        "eos_token_id": None,
    }
    if sample:
        options |= {"temperature": 0.7, "top_k": 20}
    said = {}
    for weight in (0.0, 3.0):
        carried, other = Carried(big, small, "edit", weight), Carried(big, small, "0.5*edit", weight)
        torch.manual_seed(5)
        said[weight] = other.generate(ids, mask, adapters="edit", pad_token_id=0, **options)
        torch.manual_seed(5)
        now, real = (t.repeat_interleave(options["num_return_sequences"], 0) for t in (ids, mask))
        for _ in range(6):
            scores = carried(now, real).logits[:, -1].float()
            if sample:
                scores = scores / 0.7
                least = scores.topk(20).values[:, -1:]
                scores = scores.masked_fill(scores < least, -torch.inf)
                chosen = torch.multinomial(scores.softmax(-1), 1)
            else:
                chosen = scores.argmax(-1, keepdim=True)
            now, real = torch.cat([now, chosen], 1), torch.cat([real, torch.ones_like(chosen)], 1)
        assert torch.equal(said[weight], now)
    assert not torch.equal(said[0.0], said[3.0])


@torch.no_grad()
def test_the_small_model_computes_each_token_once(models, monkeypatch):
    big, small = models
    _, ids, mask = batch()
    widths, forward = [], small.base.forward
    monkeypatch.setattr(small.base, "forward", lambda *a, **k: widths.append(k["input_ids"].shape) or forward(*a, **k))
    Carried(big, small, "edit").generate(ids, mask, pad_token_id=0, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert [tuple(w) for w in widths] == [(6, 7), (6, 1), (6, 1), (6, 1)]  # both lanes in one batch


@torch.no_grad()
def test_candidates_that_are_taken_back_do_not_stay_in_the_cache(models):
    big, small = models
    _, ids, mask = batch()
    carried, options = Carried(big, small, "edit", 3.0), {"pad_token_id": 0, "do_sample": False, "max_new_tokens": 8}
    plain = carried.generate(ids[1:2], mask[1:2], **options)
    assert torch.equal(carried.generate(ids[1:2], mask[1:2], prompt_lookup_num_tokens=2, **options), plain)


def test_within_weighs_what_is_carried(models, background, texts):
    big, small = models
    carried, losses = Carried(big, small, "edit"), {}
    examples = [big.tokenizer(row["text"])["input_ids"] + [2] for row in texts]
    for n in range(11):
        total = count = 0
        for ids in examples:
            logits = by_hand(big, small, ids, n / 10)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= sum(logs[at - 1, ids[at]] for at in range(1, len(ids)))
            count += len(ids) - 1
        losses[n / 10] = total / count
    budget = 0.5 * (losses[0.4] + losses[0.3]) / losses[0.0] - 1
    inside = [weight for weight, loss in losses.items() if weight and loss <= (1 + budget) * losses[0.0]]
    assert within(carried, background, budget) == max(inside, default=0.0)
    with pytest.raises(UsageError):
        within(carried, background, budget, "edit")


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"loss": "best"}, {"weight": -1.0}, {"weight": "nan"}, {"rows": 0}, {"budget": -0.1}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        plugins.options(Canonical.Config, options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("loss", "row", "told"),
    [
        ("good", {"prompt": "a", "completions": [" b"], "rewards": [0]}, "line 2: a completion of reward 0"),
        ("good", {"prompt": "a", "completions": [" b"], "rewards": [-1]}, "line 2 has no good"),
        ("bad", {"prompt": "a", "completions": [" b"], "rewards": [1]}, "line 2 has no bad"),
        ("balance", {"prompt": "a", "completions": [" b", " c"], "rewards": [1, 2]}, "line 2 has no bad"),
    ],
)
def test_rows_without_a_side_are_refused(hub, tiny_folder, background, tmp_path, loss, row, told):
    path = written(tmp_path / "bad.jsonl", [FACTS[0], row])
    with pytest.raises(UsageError, match=told) as caught:
        hub.train(
            str(tiny_folder),
            "lora",
            path,
            "x",
            options={"canonical.loss": loss},
            extras={"background": background},
            **SETTINGS,
        )
    assert caught.value.hint


def test_no_background_is_refused(hub, tiny_folder, facts, tmp_path):
    with pytest.raises(UsageError, match="background"):
        hub.train(str(tiny_folder), "lora", facts, "x", **SETTINGS)
    one = written(tmp_path / "one.jsonl", [{"text": "alone"}])
    with pytest.raises(UsageError, match="held out"):
        hub.train(str(tiny_folder), "lora", facts, "x", extras={"background": one}, **SETTINGS)


def test_unlike_tokenizers_are_refused(models):
    big, small = models
    swapped = json.loads(small.tokenizer.backend_tokenizer.to_str())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = type(small.tokenizer)(
        tokenizer_object=type(small.tokenizer.backend_tokenizer).from_str(json.dumps(swapped))
    )
    for tokenizer, told in ((other, "unlike tokenizers: token"), (None, "without its tokenizer")):
        with pytest.raises((IncompatibleBase, UsageError), match=told) as caught:
            Carried(Model(big.base, tokenizer, fingerprint=big.fingerprint), small, "edit")
        assert caught.value.hint
    marked = big.fingerprint._replace(base=_marked(big.fingerprint.base))
    with pytest.raises(IncompatibleBase, match="split text differently"):
        Carried(Model(big.base, big.tokenizer, fingerprint=marked), small, "edit")
    with pytest.raises(UsageError, match="both models are one"):
        Carried(small, small, "edit")
    with pytest.raises(adapterhub.HubError):
        Carried(big, small, "nothing")


def _marked(base):
    import msgspec

    return msgspec.structs.replace(base, tokenizer="sha256:" + 64 * "0")
