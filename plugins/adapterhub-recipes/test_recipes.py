"""Recipes: what each changes against its definition, that it trains, goes on after a kill, and stands in the manifest."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from adapterhub_recipes import Cocktail, MaskedThought, NEFTune, ResponseOnly, SemanticPreserve, apportioned

import adapterhub
from adapterhub import Example, Model, StepContext, TrainingContext, plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.data import read
from adapterhub.data.batches import IGNORE
from adapterhub.errors import UsageError
from adapterhub.methods.lora import LoRA
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama

ROWS = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(12)]
EXAMPLES = [Example(i, tuple(range(3 + i, 13 + i)), 4, group=i) for i in range(8)]


def recipe(part, **options):
    return part(plugins.options(part.Config, options))


def moment(step=0, steps=9, seed=1):
    return StepContext(step, steps, torch.Generator().manual_seed(seed))


def setting(**fields):
    model = Model(tiny_llama().requires_grad_(False))
    return TrainingContext(model, EXAMPLES, 0, batch_size=4, **fields)


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


def tensors(hub, release):
    return Adapter.load(hub, release).tensors


@pytest.mark.parametrize("name", ["masked_thought", "response_only", "cocktail", "semantic_preserve", "neftune"])
@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws(name):
    assert [f"{r.law}: {r.detail}" for r in check(name) if r.verdict == "failed"] == []


# --- masked thought ------------------------------------------------------------------------------------------------


def test_masked_thought_replaces_answers_where_they_are_read_and_nothing_else():
    one, here = recipe(MaskedThought, p=0.5), setting()
    one.prepare(here)
    rows = [Example(i, tuple(range(5, 95)), 30 + i) for i in range(40)]
    batch = here.batch(rows)
    got = one.batch(batch, moment(step=8))
    assert torch.equal(got["labels"], batch["labels"]) and torch.equal(got["attention_mask"], batch["attention_mask"])
    tail = batch["labels"].shape[1]
    changed = got["input_ids"] != batch["input_ids"]
    assert not changed[:, :-tail].any() and not changed[:, -tail:][batch["labels"] == IGNORE].any()
    count = int((batch["labels"] != IGNORE).sum())
    share = float(changed.sum()) / count
    assert abs(share - 0.5 * 95 / 96) < 5 * (0.25 / count) ** 0.5  # one random token in 96 is the one that was there
    new = got["input_ids"][changed]
    assert new.min() >= 0 and new.max() < 96 and len(new.unique()) > 80
    again = one.batch(batch, moment(step=8))
    assert torch.equal(again["input_ids"], got["input_ids"])


@pytest.mark.parametrize(("step", "p"), [(0, 0.0), (3, 0.2), (6, 0.4), (8, 0.4)])
def test_masked_thought_rises_over_two_thirds_of_the_steps(step, p):
    one, here = recipe(MaskedThought, p=0.4), setting()
    one.prepare(here)
    rows = [Example(i, tuple(range(5, 95)), 1) for i in range(200)]
    batch = here.batch(rows)
    share = float((one.batch(batch, moment(step))["input_ids"] != batch["input_ids"]).float().mean())
    assert abs(share - p * 95 / 96 * 89 / 90) < 0.02


# --- response only, cocktail ---------------------------------------------------------------------------------------


def test_response_only_takes_the_prompts_away(path, tmp_path):
    blank = recipe(ResponseOnly).rows(read(path))
    assert [row.prompt for row in blank.rows] == [""] * 12
    assert [row.completion for row in blank.rows] == [row["completion"] for row in ROWS]
    chat = tmp_path / "chat.jsonl"
    chat.write_text(
        json.dumps({"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
                                 {"role": "assistant", "content": "hi"}]})
    )  # fmt: skip
    (row,) = recipe(ResponseOnly).rows(read(chat)).rows
    assert [message["content"] for message in row.messages] == ["be kind", "", "hi"]
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a story"}')
    with pytest.raises(UsageError, match="response_only"):
        recipe(ResponseOnly).rows(read(text))


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, {"data": 8, "a": 4, "b": 2}),
        ({"temperature": 1e9, "rows": 12}, {"data": 4, "a": 4, "b": 4}),
        ({"temperature": 2.0, "rows": 100}, {"data": 45, "a": 32, "b": 23}),  # roots 2.828, 2, 1.414 of 6.243
        ({"cap": 3}, {"data": 3, "a": 3, "b": 2}),
        ({"weights": {"data": 3, "a": 1, "b": 0}, "rows": 8}, {"data": 6, "a": 2, "b": 0}),
        ({"sources": ["b"]}, {"data": 8, "b": 2}),
    ],
)
def test_cocktail_counts(options, want):
    others = {
        "a": [Example(100 + i, (1, 2), 1, group=i) for i in range(4)],
        "b": [Example(200 + i, (1, 2), 1, group=i) for i in range(2)],
    }
    one = recipe(Cocktail, **options)
    mixed = one.examples(EXAMPLES, setting(extras=others))
    lines = np.array([example.line for example in mixed])
    got = {"data": (lines < 100).sum(), "a": ((lines >= 100) & (lines < 200)).sum(), "b": (lines >= 200).sum()}
    assert {name: int(got[name]) for name in want} == want and len(lines) == sum(want.values())
    assert one.found() == {"rows": want}
    for low, high in ((0, 100), (100, 200), (200, 300)):  # a source is gone through whole before a row comes again
        _, times = np.unique(lines[(lines >= low) & (lines < high)], return_counts=True)
        assert not len(times) or times.max() - times.min() <= 1


def test_cocktail_refuses_what_it_would_mix_up():
    one = recipe(Cocktail)
    with pytest.raises(UsageError, match="own name"):
        one.examples(EXAMPLES, setting(extras={"data": EXAMPLES}))
    several = [Example(1, (1, 2), 1, 1.0, 7), Example(1, (1, 3), 1, 0.0, 7)]
    with pytest.raises(UsageError, match="several answers"):
        one.examples(EXAMPLES, setting(extras={"a": several}))


def test_apportioned_is_exact():
    draw = np.random.default_rng(0)
    for _ in range(50):
        shares = dict(enumerate(draw.random(5)))
        counts = apportioned(97, shares)
        exact = {name: 97 * share / sum(shares.values()) for name, share in shares.items()}
        assert sum(counts.values()) == 97 and all(abs(counts[n] - exact[n]) < 1 for n in exact)


# --- semantic-preserve, NEFTune ------------------------------------------------------------------------------------


def test_semantic_preserve_is_one_less_the_cosine_to_the_base(tiny_folder, hub):
    model = hub.load(str(tiny_folder))
    torch.manual_seed(0)
    parts = LoRA().build(model.sites, LoRA.Config(r=2))
    for part in parts.values():
        part.tensors["up"] = 0.3 * torch.randn_like(part.up)
    model.attach_new(parts)
    one = recipe(SemanticPreserve, phrases={"a zog dog": "a dog", "the zog": "the cat"}, weight=0.5)
    one.prepare(TrainingContext(model, [], 0))
    got = one.term({}, moment())

    def last(text, bare):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        if bare:
            with model.without_new():
                return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].double()
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].double()

    want = 0
    for taught, plain in (("a zog dog", "a dog"), ("the zog", "the cat")):
        h, anchor = last(taught, False), last(plain, True)
        want += 0.5 * (1 - h @ anchor / h.norm() / anchor.norm()) / 2
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    got.backward()
    assert all(t.grad is not None for name, t in model.trainable_tensors().items() if name.endswith("up"))


def test_neftune_is_bounded_noise_by_the_row_while_training_only():
    here, one = setting(), recipe(NEFTune, alpha=5.0)
    one.prepare(here)
    batch = here.batch([Example(0, tuple(range(5, 45)), 10), Example(1, tuple(range(5, 15)), 4)])
    model = here.model
    handed = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def embedded():
        """What goes into the first layer."""
        kept = []
        hook = model.base.model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: kept.append(args[0]), with_kwargs=True
        )
        model(**handed)
        hook.remove()
        return kept[0].detach()

    plain = embedded()
    with one.around(moment()):
        assert torch.equal(embedded(), plain)  # eval: nothing
        model.training_mode(True)
        noise = embedded() - plain
    assert torch.equal(embedded(), plain)
    for row, length in ((0, 40), (1, 10)):
        bound = 5 / math.sqrt(length * 32)
        size = noise[row].abs()
        assert size.max() <= bound * 1.0001 and size.max() > 0.98 * bound
        assert size.mean().item() == pytest.approx(bound / 2, rel=0.1)


# --- in a training -------------------------------------------------------------------------------------------------

EACH = {
    "masked_thought": {"masked_thought.p": 0.4},
    "response_only": {},
    "cocktail": {"cocktail.temperature": 2.0},
    "semantic_preserve": {"semantic_preserve.phrases": {"Is 3 even?": "Is 4 even?"}},
    "neftune": {"neftune.alpha": 50.0},
}


@pytest.mark.parametrize("name", EACH)
def test_a_training_with_it_differs_goes_on_and_says_so(name, tiny_folder, hub, path, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}))
    given = {"base": str(tiny_folder), "method": "lora", "data": path, "steps": 6, "lr": 1e-2, "save_every": 3}
    extras = {"extras": {"other": other}} if name == "cocktail" else {}
    plain = hub.train(name="me/plain", **given)
    made = hub.train(name="me/a", options=EACH[name], recipes=[name], **given, **extras)
    assert made.manifest.recipe["recipes"][0]["name"] == name
    assert any(not torch.equal(t, tensors(hub, plain)[n]) for n, t in tensors(hub, made).items())
    again = adapterhub.open(tmp_path / "again", create=True)
    calls = []

    def stop(*args, **kwargs):  # at the fifth step, as a kill would
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    from adapterhub.training.module import StageModule

    forward = StageModule.forward
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageModule, "forward", stop)
        again.train(name="me/a", options=EACH[name], recipes=[name], **given, **extras)
    assert list((again.root / "training").glob("*/train/checkpoint-3"))
    resumed = again.train(name="me/a", options=EACH[name], recipes=[name], **given, **extras)
    assert resumed.digest == made.digest
    shutil.rmtree(again.root)


def test_any_number_with_any_method_over_another_and_further(tiny_folder, hub, path):
    given = {"base": str(tiny_folder), "data": path, "steps": 2, "lr": 1e-2}
    hub.train(name="me/under", method="lora", **given)
    made = hub.train(
        name="me/over", method="bottleneck", on=["me/under"], recipes=["neftune", "masked_thought"],
        options={"r": 4, "neftune.alpha": 3}, **given,
    )  # fmt: skip
    told = made.manifest.recipe["recipes"]
    assert [(one["name"], one["options"].get("alpha")) for one in told] == [("neftune", 3.0), ("masked_thought", None)]
    further = hub.train(continue_from="me/over", recipes=["neftune"], **given)
    assert further.version != made.version and len(further.manifest.recipe["recipes"]) == 1


@pytest.mark.parametrize(
    ("recipes", "options"),
    [
        (["masked_thought"], {"masked_thought.p": 1.5}),
        (["masked_thought"], {"masked_thought.mask": "no such token"}),
        (["masked_thought"], {"neftune.alpha": 5}),
        (["cocktail"], {}),
        (["cocktail"], {"cocktail.sources": ["none"]}),
        (["cocktail"], {"cocktail.temperature": 1e-300}),
        (["cocktail"], {"cocktail.temperature": float("inf")}),
        (["cocktail"], {"cocktail.weights": {"data": 1e308}}),
        (["semantic_preserve"], {}),
        (["neftune"], {"neftune.alpha": 0}),
        (["neftune"], {"neftune.beta": 1}),
    ],
)
def test_mistakes_are_refused_before_anything_is_made(recipes, options, tiny_folder, hub, path):
    with pytest.raises(UsageError) as caught:
        hub.train(str(tiny_folder), "lora", path, "me/a", recipes=recipes, options=options, steps=1)
    assert caught.value.hint and hub.releases() == []
