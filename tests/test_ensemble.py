"""Ensembles: whole models as lanes of one batch, against each model run by itself and added by hand, in float64."""

import pytest
import torch

import adapterhub
from adapterhub import Model
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.bases.resolution import resolve
from adapterhub.errors import BatchError, ExpressionError, NotFoldable, UsageError
from adapterhub.forms.low_rank import LowRank
from adapterhub.forms.prefix import Prefix
from adapterhub.testing.bed import padded, random_adapter

ROWS = ["logits(base + me/a - 0.5*me/b)", "me/a + me/b", None, "logits(0.3*(me/a + me/p) + 0.7*me/b)", "me/p"]
"""Three lanes, one, one, two, one."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_folder):
    """me/a and me/b low rank, me/p a prefix."""
    hub = adapterhub.open(tmp_path_factory.mktemp("hub"), create=True)
    base = fingerprint(resolve(str(tiny_folder)))
    model = hub.load(str(tiny_folder), device="cpu").base
    for seed, (name, form) in enumerate({"me/a": LowRank, "me/b": LowRank, "me/p": Prefix}.items()):
        publish_tensors(hub, random_adapter(form, model, seed), name=name, base=base.base, sketch=base.sketch)
    hub.compose("logits(base + me/a - me/b)", "me/steered")
    return hub


@pytest.fixture
def model(hub, tiny_folder):
    loaded = hub.load(str(tiny_folder), device="cpu")
    return Model(loaded.base.double(), loaded.tokenizer, hub=hub, fingerprint=loaded.fingerprint)


def sequences(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (n,), generator=generator) for n in lengths]


def by_hand(model, row, ids):
    """The logits of one unpadded row, its lanes run one after the other."""
    lanes = {
        ROWS[0]: [(1, None), (1, "me/a"), (-0.5, "me/b")],
        ROWS[3]: [(0.3, "me/a + me/p"), (0.7, "me/b")],
        "me/steered": [(1, None), (1, "me/a"), (-1, "me/b")],
    }.get(row, [(1, row)])
    with torch.no_grad():
        return sum(w * model(input_ids=ids[None], adapters=[e]).logits[0] for w, e in lanes)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_is_its_lanes_added_by_hand(model, side):
    texts = sequences(5, 8, 3, 7, 6)
    ids, mask = padded(texts, side)
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, adapters=ROWS).logits
    assert got.shape[0] == len(ROWS)
    for row, text in enumerate(texts):
        want = by_hand(model, ROWS[row], text)
        assert (got[row][mask[row].bool()] - want).abs().max() <= 1e-9 * want.abs().max()


def test_one_for_all_rows_and_a_saved_one(model):
    ids, mask = padded(sequences(4, 6), "left")
    model.use("me/steered")
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
    for row, text in enumerate(sequences(4, 6)):
        want = by_hand(model, "me/steered", text)
        assert (got[row][mask[row].bool()] - want).abs().max() <= 1e-9 * want.abs().max()


def test_generation_holds_lanes_in_its_cache(model):
    texts = sequences(5, 8, 3, 7, 6)
    ids, mask = padded(texts, "left")
    out = model.generate(
        input_ids=ids, attention_mask=mask, adapters=ROWS, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    for row, text in enumerate(texts):
        for _ in range(8):
            text = torch.cat([text, by_hand(model, ROWS[row], text)[-1].argmax()[None]])
        assert out[row, ids.shape[1] :].tolist() == text[-8:].tolist(), ROWS[row]


@pytest.mark.parametrize("repeats", [1, 3])
def test_sampling_draws_from_the_summed_logits(model, repeats):
    texts = sequences(5, 8, 3, 7, 6)
    ids, mask = padded(texts, "left")
    options = {
        "max_new_tokens": 4,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 0.7,
        "eos_token_id": None,
    }
    torch.manual_seed(11)
    out = model.generate(input_ids=ids, attention_mask=mask, adapters=ROWS, num_return_sequences=repeats, **options)
    torch.manual_seed(11)
    texts, rows = [t for t in texts for _ in range(repeats)], [r for r in ROWS for _ in range(repeats)]
    for _ in range(4):
        last = torch.stack([by_hand(model, row, text)[-1] for row, text in zip(rows, texts, strict=True)])
        drawn = torch.multinomial(torch.softmax((last.float() / 0.7), -1), 1)
        texts = [torch.cat([text, new]) for text, new in zip(texts, drawn, strict=True)]
    assert out[:, ids.shape[1] :].tolist() == [text[-4:].tolist() for text in texts]


def test_completions_and_labels(model, hub, tiny_folder, tmp_path):
    texts = ["ab", "hello"]
    got = model.complete(texts, adapters="me/steered", max_new_tokens=5)
    assert got == [model.complete([text], adapters=["me/steered"], max_new_tokens=5)[0] for text in texts]
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "ab", "completion": "c"}\n{"prompt": "hello", "completion": "d"}\n')
    measured = hub.evaluate("me/steered", str(tiny_folder), data, metrics=["label", "loss"], labels=["c", "d"])
    assert measured["n"] == 2 and measured["loss"] > 0


def test_what_an_ensemble_cannot_do(model, hub):
    with pytest.raises(NotFoldable, match="whole models"):
        model.use("me/steered")
        model.fold()
    with pytest.raises(UsageError, match="cannot be a part"):
        model.use("me/a + me/steered")
    with pytest.raises(ExpressionError, match="stands alone"):
        hub.compose("me/a + logits(me/b)", "me/x")
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(BatchError, match="own loss"):
        model(input_ids=ids, labels=ids, adapters=["me/steered"])
    with pytest.raises(BatchError, match="beam"):
        model.generate(input_ids=ids, adapters=["me/steered"], num_beams=2)
    with pytest.raises(BatchError, match="2 rows"):
        model(input_ids=ids, adapters=["me/steered", "me/a"])
