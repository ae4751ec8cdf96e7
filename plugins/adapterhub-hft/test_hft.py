"""HFT: the laws, the counts of the paper, the training against a plain loop of torch, rounds, resuming and merging."""

import json
import random
from collections import Counter

import pytest
import torch
from adapterhub_hft import HFT, drawn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.data.batches import IGNORE
from adapterhub.errors import UsageError
from adapterhub.sites import select, sites
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama
from adapterhub.training.module import StageModule

ATTENTION = ["query", "key", "value", "attention_output"]
FFN = ["ffn_gate", "ffn_up", "ffn_down"]


def schedule(**options):
    return HFT(plugins.options(HFT.Config, options))


def trained(part, here, seed=0):
    """The sites that train in the first round, of those here."""
    tensors = {f"{site.path}.dense.0.{name}": site for site in here for name in ("weight", "bias")}
    rates = part.rates(tensors, 0, random.Random(seed))
    assert rates.keys() == tensors.keys() and set(rates.values()) <= {0.0, 1.0}
    assert all(rates[f"{site.path}.dense.0.weight"] == rates[f"{site.path}.dense.0.bias"] for site in here)
    return [site for site in here if rates[f"{site.path}.dense.0.weight"]]


def deep(layers):
    return select(sites(tiny_llama(num_hidden_layers=layers)), [*ATTENTION, *FFN, "norm", "embedding", "head"])


def test_a_group_whose_share_is_whole_gives_just_that():
    """0.28 of 25 is 7, in floats a little more; the five groups of 5, whose share is 1.4, give 1 or 2 and 7 in all."""
    groups = [range(25), *(range(25 + 5 * n, 30 + 5 * n) for n in range(5))]
    for seed in range(30):
        taken = drawn(groups, 0.28, random.Random(seed))
        counts = [len(taken & set(group)) for group in groups]
        assert counts[0] == 7 and sum(counts) == 14 and set(counts[1:]) == {1, 2}


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def stored_sites(release, hub):
    return {name.rsplit(".", 3)[0] for name in Adapter.load(hub, release).tensors}


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    assert [f"{r.law}: {r.detail}" for r in check("hft") if r.verdict == "failed"] == []


# --- which half ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("complement", [False, True])
def test_by_category_each_block_trains_two_of_four_and_of_three_feed_forward_matrices_one_or_two(seed, complement):
    here = deep(6)
    chosen = trained(schedule(complement=complement), here, seed)
    per_block = Counter((site.layer, site.role in ATTENTION) for site in chosen if site.role in ATTENTION + FFN)
    assert [per_block[layer, True] for layer in range(6)] == [2] * 6
    assert sorted(per_block[layer, False] for layer in range(6)) == [1, 1, 1, 2, 2, 2]
    norms = Counter(site.layer for site in chosen if site.role == "norm")
    assert [norms[layer] for layer in range(6)] == [1] * 6 and norms[None] in (0, 1)
    assert sum(site.role in ("embedding", "head") for site in chosen) == 2
    other = trained(schedule(complement=not complement), here, seed)
    inner = {site for site in here if site.role not in ("embedding", "head")}
    assert {*chosen} & {*other} & inner == set() and {*chosen} | {*other} == {*here}


def test_an_odd_number_of_blocks_rounds_up_as_often_as_down_and_each_site_trains_half_of_the_time():
    here, times = deep(5), Counter()
    counts = Counter()
    for seed in range(400):
        chosen = trained(schedule(io="half"), here, seed)
        times.update(chosen)
        counts[sum(site.role in FFN for site in chosen)] += 1
        assert sum(site.role in ("embedding", "head") for site in chosen) == 1
    assert counts.keys() == {7, 8} and abs(counts[7] - 200) < 50  # five standard deviations of a fair coin
    assert all(abs(times[site] - 200) < 50 for site in here)


def test_the_coarser_granularities_and_the_ends():
    here = deep(6)
    inner = [site for site in here if site.role not in ("embedding", "head")]
    whole = trained(schedule(granularity="layer", io="freeze"), here)
    layers = {site.layer for site in whole}
    assert len(layers) in (3, 4) and whole == [site for site in inner if site.layer in layers]  # the last norm is one
    assert len(trained(schedule(granularity="model", io="freeze"), here)) in (len(inner) // 2, len(inner) // 2 + 1)
    assert len(trained(schedule(ratio=0.25, granularity="model", io="freeze"), inner[:40])) == 10
    per_block = Counter(s.layer for s in trained(schedule(ratio=0.75), here) if s.role in ATTENTION)
    assert set(per_block.values()) == {3}


def test_whole_modules_are_halved_over_the_layers_and_fused_projections_count_as_one():
    from transformers import GPT2Config, GPT2LMHeadModel

    blocks = select(sites(tiny_llama(num_hidden_layers=6)), "block")
    assert len(trained(schedule(), blocks)) == 3
    fused = sites(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=4, n_head=2)))
    chosen = trained(schedule(), select(fused, "all-linear"))  # c_attn and c_proj, c_fc and c_proj
    per_block = Counter((site.layer, "mlp" in site.path) for site in chosen)
    assert per_block == {(layer, mlp): 1 for layer in range(4) for mlp in (False, True)}


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"ratio": 0.0}, {"ratio": 1.0}, {"granularity": "element"}, {"io": "both"}, {"seed": 1}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        schedule(**options)
    assert caught.value.hint


# --- in a training -------------------------------------------------------------------------------------------------


def plain_loop(folder, batches, masks, lr, warmup):
    """Half fine-tuning as one would write it: AdamW over the chosen matrices alone, clipped at norm 1, the rate rising
    over `warmup` steps and falling to 0; what was frozen in the round before starts with fresh moments."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    weights, steps = dict(model.named_parameters()), len(batches)
    moments = {}
    for step, batch in enumerate(batches):
        names = masks[step * len(masks) // steps]
        moments = {name: moments.get(name, [0.0, 0.0, 0]) for name in names}
        for name in weights:
            weights[name].requires_grad_(name in names).grad = None
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"]
        answers = logits[:, -labels.shape[1] - 1 : -1]
        cross_entropy(answers.flatten(0, 1), labels.flatten(), ignore_index=IGNORE).backward()
        norm = sum(weights[name].grad.double().square().sum() for name in names).sqrt()
        rate = lr * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        with torch.no_grad():
            for name, state in moments.items():
                gradient = weights[name].grad * min(1.0, 1 / (norm.item() + 1e-6))
                state[0] = 0.9 * state[0] + 0.1 * gradient
                state[1] = 0.999 * state[1] + 0.001 * gradient.square()
                state[2] += 1
                first, second = state[0] / (1 - 0.9 ** state[2]), state[1] / (1 - 0.999 ** state[2])
                weights[name] -= rate * first / (second.sqrt() + 1e-8)
    return weights


def test_it_trains_as_a_plain_loop_over_the_chosen_matrices_and_stores_nothing_else(
    tiny_folder, hub, path, monkeypatch
):
    batches, learners = [], []

    def forward(self, **batch):
        batches.append(batch)
        learners.append(self)
        return whole(self, **batch)

    def after_step(self):
        names = {name: p for name, p in self.named_parameters()}
        held = {name for name, p in names.items() if p in self.optimizing.state}
        assert {name for name, p in names.items() if p.grad is not None} == held
        assert {name for name, p in names.items() if p.requires_grad} == held
        held_by_step.append({name.replace("/", ".").removesuffix(".dense.0.weight") for name in held})

    held_by_step, whole = [], StageModule.forward
    monkeypatch.setattr(StageModule, "forward", forward)
    monkeypatch.setattr(StageModule, "after_step", after_step)
    options = {"hft.rounds": 2, "target_modules": [*ATTENTION, *FFN, "embedding"], "hft.io": "freeze"}
    made = hub.train(
        str(tiny_folder), "full", path, "me/half", schedule="hft", options=options, steps=10, lr=3e-3, batch_size=5, seed=3
    )  # fmt: skip
    told = made.manifest.recipe["found"]["train"]["rates"]
    masks = [set(rates["1"]) for rates in told]
    assert held_by_step == [masks[0]] * 5 + [masks[1]] * 5 and masks[0] != masks[1]
    assert all(len(mask) == 2 * 2 + 3 for mask in masks)  # two blocks: 2 of 4 each, and 2 + 1 of 3
    assert made.manifest.recipe["schedule"]["options"]["rounds"] == 2 and made.manifest.recipe["seed"] == 3
    change = Adapter.load(hub, made).tensors
    assert {name.removesuffix(".dense.0.weight") for name in change} == masks[0] | masks[1]
    theirs = plain_loop(tiny_folder, batches, [{f"{name}.weight" for name in mask} for mask in masks], 3e-3, 1)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    for name, before in base.named_parameters():
        mine = change.get(name.removesuffix("weight") + "dense.0.weight")
        if mine is None:
            assert torch.equal(theirs[name], before)
        else:
            assert mine.abs().max() > 1e-3
            torch.testing.assert_close(before + mine, theirs[name], atol=1e-5, rtol=0)


def test_the_seed_draws_the_half(tiny_folder, hub, path):
    given = {"base": str(tiny_folder), "method": "full", "data": path, "schedule": "hft", "steps": 2, "lr": 1e-2}
    first, again, other = (hub.train(name=n, seed=s, **given) for n, s in (("me/a", 5), ("me/b", 5), ("me/c", 6)))
    a, b, c = (Adapter.load(hub, release).tensors for release in (first, again, other))
    assert a.keys() == b.keys() != c.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop", [3, 5, 6, 8])
def test_a_run_killed_before_at_or_after_the_border_of_rounds_ends_with_the_same_bytes(
    stop, tiny_folder, hub, path, tmp_path
):
    """Checkpoints after 2, 4, ... 8 of 9 steps, rounds of 4 and 5 steps; killed at the step `stop`, counted from 1."""
    given = {
        "base": str(tiny_folder), "method": "full", "data": path, "name": "me/a", "schedule": "hft", "steps": 9,
        "options": {"hft.rounds": 2}, "lr": 1e-2, "save_every": 2,
    }  # fmt: skip
    made, again, calls = hub.train(**given), adapterhub.open(tmp_path / "again", create=True), []
    assert len(set(map(str, made.manifest.recipe["found"]["train"]["rates"]))) == 2

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    forward = StageModule.forward
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageModule, "forward", killed)
        again.train(**given)
    assert list((again.root / "training").glob(f"*/train/checkpoint-{(stop - 1) // 2 * 2}"))
    assert again.train(**given).digest == made.digest


def test_complementary_halves_share_no_weight_and_merge_into_both_as_they_are(tiny_folder, hub, path):
    given = {"base": str(tiny_folder), "method": "full", "data": path, "schedule": "hft", "steps": 3, "lr": 1e-2}
    one = hub.train(name="me/one", **given)
    two = hub.train(name="me/two", options={"hft.complement": True}, **given)
    assert stored_sites(one, hub).isdisjoint(stored_sites(two, hub))
    linear = {site.path for site in select(sites(tiny_llama()), "all-linear")}
    assert stored_sites(one, hub) | stored_sites(two, hub) == linear
    both = Adapter.load(hub, one).tensors | Adapter.load(hub, two).tensors
    merged = Adapter.load(hub, hub.merge(["me/one", "me/two"], name="me/both")).tensors
    assert merged.keys() == both.keys() and all(torch.equal(merged[name], both[name]) for name in both)


@pytest.mark.parametrize(
    ("method", "targets"), [("lora", [*ATTENTION, *FFN]), ("bottleneck", ["ffn"]), ("loreft", ["block"])]
)
def test_any_method_over_another_and_further(method, targets, tiny_folder, hub, path):
    given = {"data": path, "steps": 2, "lr": 1e-2, "schedule": "hft"}
    hub.train(str(tiny_folder), "lora", name="me/under", **given)
    options = {"target_modules": targets}
    made = hub.train(str(tiny_folder), method, name="me/over", on=["me/under"], options=options, **given)
    assert len(stored_sites(made, hub)) == len(select(sites(tiny_llama()), targets)) // 2
    further = hub.train(str(tiny_folder), continue_from="me/over", seed=1, **given)
    before, after = (Adapter.load(hub, release).tensors for release in (made, further))
    [rates] = further.manifest.recipe["found"]["train"]["rates"]
    assert stored_sites(further, hub) == stored_sites(made, hub) | set(rates["1"])
    for name, tensor in before.items():
        frozen = name.rsplit(".", 3)[0] not in rates["1"]
        assert not frozen or torch.equal(tensor, after[name])
