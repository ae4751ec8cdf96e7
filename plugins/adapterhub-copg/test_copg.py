"""CoPG: the pair loss against NumPy, its gradient, its optimum against the closed form, the reference, and going on."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from adapterhub_copg import CoPG, pair_loss

import adapterhub
from adapterhub import Example, TrainingContext, plugins
from adapterhub.errors import UsageError
from adapterhub.runtime.model import Model
from adapterhub.runtime.scoring import label_scores, token_losses
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama

ROWS = [
    {"prompt": f"{i} is", "completions": [" odd", " even", " big"], "rewards": [i % 2, 1 - i % 2, 0.25 * (i % 3)]}
    for i in range(12)
]
SETTINGS = {"objective": "copg", "lr": 1e-2, "batch_size": 4, "device": "cpu"}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


def losses(hub, release):
    return [entry["loss"] for entry in json.loads(hub.store.read(release.manifest.files["log"]))]


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    """Resuming to the same bits is one of them."""
    assert [f"{r.law}: {r.detail}" for r in check("copg") if r.verdict == "failed"] == []


# --- the pair loss -------------------------------------------------------------------------------------------------


def drawn(seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=9), draw.normal(size=9), np.array([0, 0, 0, 0, 3, 3, 7, 7, 7])


@pytest.mark.parametrize("pair", ["copg", "ipo", "dpo"])
def test_all_pairs_of_each_prompt_and_no_others(pair):
    rewards, ratios, group = drawn()
    rewards[1] = rewards[2]  # a tie
    beta, told = 0.3, []
    for i, j in combinations(range(9), 2):
        if group[i] == group[j]:
            gap, ratio = rewards[i] - rewards[j], ratios[i] - ratios[j]
            sign = np.sign(gap)
            told.append(
                {
                    "copg": -(gap - 0.5 * beta * ratio) * ratio,
                    "ipo": (sign * ratio - 1 / (2 * beta)) ** 2,
                    "dpo": np.log1p(np.exp(-beta * sign * ratio)),
                }[pair]
            )
    assert len(told) == 6 + 1 + 3
    found = pair_loss(*map(torch.tensor, (rewards, ratios, group)), beta, pair)
    assert found.item() == pytest.approx(np.mean(told), rel=1e-12)


@pytest.mark.parametrize("pair", ["copg", "ipo", "dpo"])
def test_the_gradient_is_that_of_finite_differences(pair):
    rewards, ratios, group = map(torch.tensor, drawn(1))
    assert torch.autograd.gradcheck(lambda given: pair_loss(rewards, given, group, 0.3, pair), ratios.requires_grad_())


def test_the_gradient_is_the_regularised_reward_less_the_partners():
    """(ΔR - beta Δl)(∇ log pi(y) - ∇ log pi(y')), which is what makes the optimum beta's."""
    rewards, ratios = torch.tensor([[1.0, 0.2], [0.3, -0.4]], dtype=torch.float64)
    ratios.requires_grad_()
    pair_loss(rewards, ratios, torch.zeros(2), 0.5).backward()
    kept = (1.0 - 0.2) - 0.5 * (0.3 + 0.4)
    assert ratios.grad.tolist() == pytest.approx([-kept, kept], rel=1e-12)


def test_its_optimum_is_the_closed_form_whoever_wrote_the_answers():
    """A bandit of ten arms; pairs from a policy that is neither pi nor pi_ref. The optimum is beta's, not 2 beta's, which is
    where the loss without its 1/2 would end."""
    torch.manual_seed(0)
    beta, rewards = 0.5, torch.randn(10, dtype=torch.float64)
    reference, logged = torch.randn(2, 10, dtype=torch.float64).log_softmax(-1)
    arms = torch.multinomial(logged.exp(), 600, replacement=True)
    group = torch.arange(600) // 2
    assert set(arms.tolist()) == set(range(10))
    policy = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([policy], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = pair_loss(rewards[arms], (policy.log_softmax(-1) - reference)[arms], group, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = policy.detach().log_softmax(-1)

    def apart(price):
        best = (reference + rewards / price).log_softmax(-1)
        return (found.exp() * (found - best)).sum().item()

    assert apart(beta) < 1e-10 < 1e-2 < apart(2 * beta)


# --- on a model ----------------------------------------------------------------------------------------------------


def fresh(scale=0.3):
    """The tiny Llama with a LoRA on it that does something, and rows of three completions."""
    model = Model(tiny_llama().requires_grad_(False))
    method = plugins.load("methods", "lora")
    torch.manual_seed(1)
    parts = method().build(model.sites, method.Config(r=2))
    for part in parts.values():
        for name, tensor in part.tensors.items():
            part.tensors[name] = scale * torch.randn_like(tensor)
    model.attach_new(parts)
    lengths = [(3, 4, 2), (5, 1, 3)]
    rows = [
        tuple(Example(g + 1, (*range(5, 9 + g), *range(20, 20 + n)), 4 + g, float(n), g) for n in row)
        for g, row in enumerate(lengths)
    ]
    return model, rows


def log_likelihood(base, example):
    """Of the completion, unpadded, in float64."""
    with torch.no_grad():
        chances = base(torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
    return sum(chances[at - 1, example.ids[at]].item() for at in range(example.start, len(example.ids)))


@pytest.mark.parametrize("standardise", [True, False])
def test_the_loss_is_the_formula_with_sums_over_tokens_and_the_bare_base_as_reference(standardise):
    model, rows = fresh()
    objective = CoPG(CoPG.Config(beta=0.2, standardise=standardise))
    objective.prepare(TrainingContext(model, rows, pad=0))
    batch = objective.setting.batch(rows)
    with model.without_new():
        reference = token_losses(model, batch).sum(1)
    here = token_losses(model, batch).sum(1)
    bare = tiny_llama()  # another copy, on which nothing ever was
    flat = [example for row in rows for example in row]
    assert (-reference).tolist() == pytest.approx([log_likelihood(bare, e) for e in flat], rel=1e-5)
    assert (here - reference).abs().min() > 1e-2  # and the adapter does something
    ratios = (reference - here).double().detach().numpy()
    scale = np.std([e.reward for e in flat]) if standardise else 1.0
    told = []
    for i, j in [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]:
        gap, ratio = (flat[i].reward - flat[j].reward) / scale, ratios[i] - ratios[j]
        told.append(-(gap - 0.1 * ratio) * ratio)
    loss = objective.loss(batch, None)
    assert loss.item() == pytest.approx(np.mean(told), rel=1e-4)
    assert objective.found() == {"pairs": 6, "scale": pytest.approx(scale)}
    loss.backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in model.trainable_parameters())


@pytest.mark.parametrize("pair", ["copg", "ipo", "dpo"])
@pytest.mark.parametrize("offset", [1e7, 1e9])
def test_what_all_rewards_have_in_common_changes_nothing(offset, pair):
    """In groups of unlike size, whose numbers have gaps, in a batch of another order."""
    model, rows = fresh()
    rows = [tuple(replace(e, group=3 * e.group + 2) for e in row[g:]) for g, row in enumerate(rows)]
    found = []
    for more in (0.0, offset):
        here = [tuple(replace(e, reward=e.reward / 64 + more) for e in row) for row in rows]
        objective = CoPG(CoPG.Config(pair=pair))
        objective.prepare(TrainingContext(model, here, pad=0))
        loss = objective.loss(objective.setting.batch(here[::-1]), None)
        found.append([loss, *torch.autograd.grad(loss, model.trainable_parameters())])
    for plain, shifted in zip(*found, strict=True):
        torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=1e-8)
    assert found[0][0].dtype == torch.float32


def test_it_learns_to_prefer_and_beta_holds_it_back(hub, tiny_folder, path):
    model = hub.load(str(tiny_folder))
    prompts, choices = [], []
    for row in ROWS:
        best, worst = (" odd", " even") if row["rewards"][0] else (" even", " odd")
        ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row["prompt"], best, worst)]
        prompts.append(ids[0])
        choices.append(ids[1:])
    before, moved = label_scores(model, prompts, choices), {}
    for beta, name in ((0.1, "me/cheap"), (10.0, "me/dear")):
        made = hub.train(
            str(tiny_folder), "lora", path, name, options={"r": 4, "copg.beta": beta}, steps=30, **SETTINGS
        )
        ratios = label_scores(model, prompts, choices, name) - before
        moved[name] = (ratios[:, 0] - ratios[:, 1]).mean().item()
        assert made.manifest.recipe["objective"]["options"]["beta"] == beta
        assert made.manifest.recipe["found"]["train"]["objective"]["pairs"] == 36
    assert moved["me/cheap"] > 1 and moved["me/cheap"] > 5 * abs(moved["me/dear"])


def test_the_reference_is_what_lies_beneath(hub, tiny_folder, path):
    """A fresh LoRA changes nothing, so at the first step every ratio and the loss are 0, over another adapter too; an adapter
    that goes on is still held against what it began from."""
    settings = SETTINGS | {"options": {"r": 2, "copg.beta": 0.5}, "steps": 6}
    first = hub.train(str(tiny_folder), "lora", path, "me/first", **settings)
    above = hub.train(str(tiny_folder), "lora", path, "me/above", on=["me/first"], **settings)
    more = hub.train(
        str(tiny_folder), data=path, name=None, continue_from="me/first", **settings | {"options": {"copg.beta": 0.5}}
    )
    assert losses(hub, first)[0] == losses(hub, above)[0] == 0 > losses(hub, first)[-1]
    assert losses(hub, more)[0] < 0 and more.name == "me/first"


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": -1.0}, {"beta": "inf"}, {"pair": "ppo"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        plugins.options(CoPG.Config, options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "completions": [" b"], "rewards": [1]}, "line 2: one completion"),
        ({"prompt": "a", "completions": [" b", " c"], "rewards": [1, 1]}, "nothing to prefer"),
    ],
)
def test_rows_without_a_pair_are_refused(hub, tiny_folder, tmp_path, row, told):
    path = tmp_path / "bad.jsonl"
    same = {"prompt": "x", "completions": [" y", " z"], "rewards": [0, 0]}
    path.write_text(json.dumps(same) + "\n" + json.dumps(row))
    with pytest.raises(UsageError, match=told) as caught:
        hub.train(str(tiny_folder), "lora", path, "me/x", steps=2, **SETTINGS)
    assert caught.value.hint


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize(("size", "offset"), [(1e308, 0.0), (1e39, 0.0), (1e-46, 0.0), (1.0, 1e40)])
def test_rewards_out_of_range_are_refused(size, offset, standardise):
    """Whose differences overflow, or vanish: because they are tiny, or beside what parts one row from another."""
    model, rows = fresh()
    rows = [
        tuple(replace(e, reward=size * (-1) ** n + g * offset) for n, e in enumerate(r)) for g, r in enumerate(rows)
    ]
    with pytest.raises(UsageError, match="the rewards differ by") as caught:
        CoPG(CoPG.Config(standardise=standardise)).prepare(TrainingContext(model, rows, pad=0))
    assert "sane range" in caught.value.hint
