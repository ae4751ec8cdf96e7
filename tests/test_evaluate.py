"""Evaluation against transformers on one unpadded row at a time, and against published intervals."""

import json
import math

import pytest
import torch
from torch.nn.functional import log_softmax

from adapterhub.data import read
from adapterhub.data.encoding import encode
from adapterhub.errors import DataError, UsageError
from adapterhub.evaluation.evaluate import evaluate
from adapterhub.evaluation.intervals import paired, wilson
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.modification import Modification
from adapterhub.runtime.model import Model
from adapterhub.runtime.scoring import label_scores

ROWS = [
    ("Is 2 even? ", "yes"),
    ("Is 3 even? ", "no"),
    ("a", "perhaps"),
    ("The number 12345 is not prime, is it? ", "yes"),
    ("x y z", "no"),
    ("Q", "yes"),
    ("Well ", "perhaps"),
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in ROWS))
    return file


@pytest.fixture
def make(tiny_model, tiny_folder):
    """A model whose adapter moves the logits, on the device."""

    def make(device="cpu", parts=None):
        from transformers import AutoTokenizer

        model = Model(tiny_model().to(device), AutoTokenizer.from_pretrained(tiny_folder))
        torch.manual_seed(1)
        model.attach_new(parts or {site.path: low_rank(site) for site in model.sites if site.linear})
        return model

    return make


def low_rank(site):
    return LowRank(
        down=torch.randn(4, site.inputs) * 0.2, up=torch.randn(site.outputs, 4) * 0.2, scale=torch.tensor(1.0)
    )


class Echo(Modification):
    """A quarter of the state before, which it keeps for the next chunk."""

    form = "echo"
    stateful = True

    def delta_out(self, x, y, step):
        last = step.state.get("last", torch.zeros_like(y[:, :1]))
        real = torch.ones(y.shape[:2], dtype=torch.bool) if step.mask is None else step.mask
        before = torch.cat([last, y[:, :-1]], 1) * torch.cat([real[:, :1] * 0 + 1, real[:, :-1]], 1).unsqueeze(-1)
        step.state["last"] = y[:, -1:]
        return self.weight * before


def echo():
    return {"model.layers.0.mlp": Echo(weight=torch.tensor(0.25)), "model.layers.1.mlp": Echo(weight=torch.tensor(0.5))}


def alone(model, ids):
    """The logits of one unpadded row, float32."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float().cpu()


def answer_log_probability(model, prompt, answer):
    logits = log_softmax(alone(model, [*prompt, *answer]), -1)[len(prompt) - 1 : -1]
    return float(logits[range(len(answer)), answer].sum())


def test_loss_is_transformers_loss_of_each_row_alone(make, path, device):
    model = make(device)
    result = evaluate(None, None, None, path, model=model, metrics=["loss"], batch_size=3)
    total = count = 0
    for example, row in zip(encode(read(path), model.tokenizer, 64)[0], result["rows"], strict=True):
        ids = torch.tensor([example.ids], device=device)
        labels = ids.clone()
        labels[:, : example.start] = -100
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        total, count = total + loss * len(example.completion), count + len(example.completion)
    assert result["loss"] == pytest.approx(total / count, abs=1e-5)
    assert (result["tokens"], result["n"]) == (count, 7)


def test_loss_of_texts_leaves_out_the_first_token(make, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "hello there"}\n{"text": "a"}')
    model = make()
    result = evaluate(None, None, None, file, model=model)
    ids = torch.tensor([model.tokenizer("hello there")["input_ids"] + [2]])
    with torch.no_grad():
        assert result["rows"][0]["loss"] == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=1e-5)
    assert result["tokens"] == 11 + 1 and "label" not in result and "exact" not in result


@pytest.mark.parametrize("kind", ["low_rank", "stateful"])
def test_labels_are_ranked_by_the_log_probability_of_full_forwards(make, path, kind, device):
    if kind == "stateful" and device != "cpu":
        pytest.skip("the test's own form makes its tensors on the CPU")
    model = make(device, None if kind == "low_rank" else echo())
    assert model.keeps_state() == (kind == "stateful")
    labels = ["no", "perhaps", "yes"]
    result = evaluate(None, None, None, path, model=model, labels=labels, metrics=["label"], batch_size=4)
    tokens = [model.tokenizer(label)["input_ids"] for label in labels]
    prompts = [example.prompt for example in encode(read(path), model.tokenizer, 64)[0]]
    with torch.no_grad():
        scores = label_scores(model, prompts, [tokens] * len(prompts))
    for prompt, got, row, (_, wanted) in zip(prompts, scores, result["rows"], ROWS, strict=True):
        alone = [answer_log_probability(model, prompt, answer) for answer in tokens]
        assert got.tolist() == pytest.approx(alone, rel=1e-5)
        best = labels[max(range(3), key=alone.__getitem__)]
        assert row["predicted"] == best and row["label"] == (best == wanted)
    assert result["label"] == sum(row["label"] for row in result["rows"]) / 7
    assert result["labels"] == labels


def test_the_shared_prompt_is_computed_once(make, path):
    model = make()
    seen = []
    hook = model.base.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    evaluate(None, None, None, path, model=model, labels=["no", "perhaps", "yes"], metrics=["label"], batch_size=7)
    hook.remove()
    assert seen == [(7, 38), (21, 6)]  # the prompts, then all three labels of each but their last token


def test_a_label_that_begins_another_is_ranked_with_its_end(make, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in [("a", "yes"), ("b", "yes!")]))
    model = make()
    result = evaluate(None, None, None, file, model=model, labels=["yes", "yes!"], metrics=["label"])
    for row, prompt in zip(result["rows"], "ab", strict=True):
        ids = [[*model.tokenizer(label)["input_ids"], 2] for label in ("yes", "yes!")]
        scores = [answer_log_probability(model, model.tokenizer(prompt)["input_ids"], answer) for answer in ids]
        assert row["predicted"] == ("yes", "yes!")[scores[1] > scores[0]]


def test_exact_match_is_greedy_generation_of_each_row_alone(make, tmp_path, device):
    """Half of the completions are what the model says by itself, after which it is made to end."""
    model = make(device)
    rows = []
    for i, (prompt, _) in enumerate(ROWS):
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
        new = model.generate(input_ids=ids, max_new_tokens=3 + i, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert 2 not in new  # this model never ends by itself
        rows.append((prompt, model.tokenizer.decode(new), new.tolist()))
    model.base.generation_config.eos_token_id = [2, rows[0][2][-1]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "completion": c or "?"}) for p, c, _ in rows))
    result = evaluate(None, None, None, file, model=model, metrics=["exact"], batch_size=4)
    expected = []
    for (_, text, new), row in zip(rows, result["rows"], strict=True):
        end = rows[0][2][-1]
        ended = new[: new.index(end)] if end in new else None
        said = model.tokenizer.decode(ended, skip_special_tokens=True) if ended is not None else None
        expected.append(said is not None and said.strip() == text.strip())
        if said is not None:
            assert row["output"] == said
    assert [row["exact"] for row in result["rows"]] == expected


def test_an_answer_counts_only_if_it_ends(make, tmp_path):
    model = make()
    ids = model.tokenizer("Q", return_tensors="pt")["input_ids"]
    new = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 1:].tolist()
    answer, after = model.tokenizer.decode(new[:3]), new[3]
    assert after not in new[:3]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Q", "completion": answer}))
    assert evaluate(None, None, None, file, model=model, metrics=["exact"])["exact"] == 0
    model.base.generation_config.eos_token_id = after
    result = evaluate(None, None, None, file, model=model, metrics=["exact"])
    assert result["exact"] == 1 and result["rows"][0]["output"] == answer


def test_batches_and_padding_change_nothing(make, path):
    model = make()
    labels = ["no", "perhaps", "yes"]
    one, seven = (
        evaluate(None, None, None, path, model=model, labels=labels, metrics=["loss", "label"], batch_size=size)
        for size in (1, 7)
    )
    assert [row["predicted"] for row in one["rows"]] == [row["predicted"] for row in seven["rows"]]
    for a, b in zip(one["rows"], seven["rows"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_what_the_data_allow(make, path, tmp_path):
    model = make()
    assert evaluate(None, None, None, path, model=model, limit=2)["n"] == 2
    found = evaluate(None, None, None, path, model=model, metrics=["label"])
    assert found["labels"] == ["no", "perhaps", "yes"]  # three answers on seven rows
    with pytest.raises(DataError, match="3 distinct answers in 3 rows"):
        evaluate(None, None, None, path, model=model, metrics=["label"], limit=3)
    assert "label" not in evaluate(None, None, None, path, model=model, limit=3)
    with pytest.raises(DataError, match="line 3: 'perhaps' is none of the labels"):
        evaluate(None, None, None, path, model=model, labels=["no", "yes"])
    for wrong in ({"labels": ["yes"]}, {"metrics": ["f1"]}, {"limit": 0}, {"batch_size": 0}):
        with pytest.raises(UsageError):
            evaluate(None, None, None, path, model=model, **wrong)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "hello there"}')
    with pytest.raises(UsageError, match="texts"):
        evaluate(None, None, None, texts, model=model, metrics=["label"])
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "", "completion": "b"}')
    with pytest.raises(DataError, match="line 1: the prompt is empty"):
        evaluate(None, None, None, empty, model=model, metrics=["exact"])


def test_the_model_is_left_in_the_mode_it_was_in(make, path):
    model = make()
    model.training_mode(True)
    evaluate(None, None, None, path, model=model, metrics=["loss"])
    assert model.base.training


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(right, n, low, high):
    """Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3."""
    assert wilson(right, n) == pytest.approx([low, high], abs=5e-5)
    assert wilson(n - right, n) == pytest.approx([1 - high, 1 - low], abs=5e-5)


def result(outcomes):
    return {"data": "d", "rows": [{"line": i, "label": bool(x)} for i, x in enumerate(outcomes)]}


def test_a_paired_interval_covers_the_truth():
    """Exact coverage, by enumerating every table of 30 rows: near 95 % for small and large differences."""
    n = 30
    for gain, loss in [(0.1, 0.1), (0.3, 0.05), (0.5, 0.2)]:
        covered = 0.0
        for gained in range(n + 1):
            for lost in range(n + 1 - gained):
                same = n - gained - lost
                chance = math.comb(n, gained) * math.comb(n - gained, lost) * gain**gained * loss**lost
                chance *= (1 - gain - loss) ** same
                if chance < 1e-9:
                    continue
                told = paired(result([0] * gained + [1] * (n - gained)), result([1] * gained + [0] * lost + [1] * same))
                assert told["difference"] == pytest.approx((gained - lost) / n)
                low, high = told["interval"]
                covered += chance * (low <= gain - loss <= high)
        assert 0.935 < covered < 0.985


def test_only_the_same_rows_are_paired():
    with pytest.raises(UsageError, match="same rows"):
        paired(result([1, 0]), result([1, 0, 1]))
    with pytest.raises(UsageError, match="same rows"):
        paired(result([1, 0]), {**result([1, 0]), "data": "other"})
    with pytest.raises(UsageError, match="no 'exact'"):
        paired(result([1, 0]), result([1, 0]), "exact")
