"""Reinforced fine-tuning on a model: the rollout, the reference, the first ratio, and going on."""

import json

import numpy as np
import pytest
import torch
from adapterhub_answer_match import AnswerMatch
from adapterhub_rft_ppo import RFTPPO, gae
from safetensors.torch import load_file

import adapterhub
from adapterhub import Example, StepContext, TrainingContext, Verdict, plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.errors import HubError, NoEffect, UsageError
from adapterhub.runtime.model import Model
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama, tiny_tokenizer
from adapterhub.training.trainer import _Watch

ROWS = [{"prompt": f"{i}+{i + 1}=", "completion": str(2 * i + 1)} for i in range(12)]
OPTIONS = {"rft_ppo.max_new_tokens": 4}
SETTINGS = {"objective": "rft_ppo", "lr": 1e-2, "batch_size": 4, "device": "cpu"}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


@pytest.fixture
def hub(tmp_path):
    return adapterhub.open(tmp_path / "hub", create=True)


@pytest.mark.parametrize("part", ["rft_ppo", "answer_match"])
@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws(part):
    assert [f"{r.law}: {r.detail}" for r in check(part) if r.verdict == "failed"] == []


# --- on a model ----------------------------------------------------------------------------------------------------


class Always(AnswerMatch):
    """The same reward for all that is sampled; a row's own completion is right."""

    reward = 0.0

    def verify(self, prompt, reference, answer):
        return Verdict(1.0 if answer == reference else self.reward)


def prepared(scale=0.3, dropout=0.0, rows=None, judge=None, **options):
    """The tiny Llama under a LoRA that does something, the objective ready, and a batch of unlike lengths."""
    model = Model(tiny_llama().requires_grad_(False), tiny_tokenizer())
    method = plugins.load("methods", "lora")
    torch.manual_seed(1)
    parts = method().build(model.sites, plugins.options(method.Config, {"r": 2, "lora_dropout": dropout}))
    for part in parts.values():
        for name, tensor in part.tensors.items():
            part.tensors[name] = scale * torch.randn_like(tensor)
    model.attach_new(parts)
    text = model.tokenizer
    rows = rows or [("1+1=", "2"), ("20+22=", "42"), ("say yes", "yes"), ("7", "7")]
    examples = [
        Example(n, (*text(p)["input_ids"], *text(c)["input_ids"], 2), len(text(p)["input_ids"]))
        for n, (p, c) in enumerate(rows, 1)
    ]
    objective = RFTPPO(RFTPPO.Config(**{"max_new_tokens": 6} | options))
    objective.prepare(TrainingContext(model, examples, pad=0))
    if judge is not None:
        objective.verifier = judge
    return objective, objective.setting.batch(examples), examples


def moment(step=0):
    return StepContext(step, 10, torch.Generator().manual_seed(step))


def alone(model, prompt, answer, adapters=None):
    """Log-probabilities of the answer's tokens, unpadded, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer]), adapters=adapters).logits[0].double()
    chances = logits.log_softmax(-1)
    return [chances[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)]


def test_the_rollout_is_what_each_prompt_gives_alone():
    objective, batch, examples = prepared(kl_coef=0.2)
    model = objective.setting.model
    rollout = objective.roll(batch, moment().draw)
    lengths = rollout.real.sum(1).tolist()
    assert len(set(lengths)) > 1 or lengths[0] == 6
    rewards = np.zeros(rollout.real.shape)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        answer = rollout.batch["labels"][row, :length].tolist()
        assert 2 not in answer[:-1] and (answer[-1] == 2 or length == 6)  # up to the end token, or cut
        real = rollout.batch["attention_mask"][row].bool()
        assert rollout.batch["input_ids"][row, real].tolist() == example.prompt + answer
        old = alone(model, example.prompt, answer)
        assert rollout.old[row, :length].tolist() == pytest.approx(old, abs=1e-4)
        with model.without_new():
            reference = alone(model, example.prompt, answer)
        rewards[row, :length] = -0.2 * (np.array(old) - reference)
        rewards[row, length - 1] += objective.verdict(example.prompt, example.completion, answer).reward
    wanted = gae(torch.tensor(rewards), torch.zeros(rewards.shape), rollout.real)  # the value head starts at zero
    assert np.abs(rollout.returns.detach().numpy() - wanted.numpy()).max() < 1e-3
    assert not rollout.values.any()


def test_values_are_read_from_the_state_before_each_token():
    objective, batch, examples = prepared()
    with torch.no_grad():
        objective.direction.copy_(torch.randn(32))
        objective.offset.fill_(0.5)
    rollout = objective.roll(batch, moment().draw)
    model = objective.setting.model
    for row, example in enumerate(examples):
        answer = rollout.batch["labels"][row, rollout.real[row]].tolist()
        with torch.no_grad():
            out = model(input_ids=torch.tensor([example.prompt + answer]), output_hidden_states=True)
        states = out.hidden_states[-1][0, len(example.prompt) - 1 : -1].double()
        wanted = states @ objective.direction.double() + 0.5
        assert rollout.values[row, : len(answer)].tolist() == pytest.approx(wanted.tolist(), abs=1e-3)


def test_the_first_ratio_is_exactly_1_in_spite_of_dropout():
    objective, batch, _ = prepared(dropout=0.5)
    model = objective.setting.model
    model.training_mode(True)
    objective.loss(batch, moment())
    rollout = objective.rollout
    assert model.base.training  # as it was
    model.training_mode(False)
    assert torch.equal(objective.seen(rollout.batch)[0].detach(), rollout.old)
    model.training_mode(True)
    assert not torch.equal(objective.seen(rollout.batch)[0].detach(), rollout.old)  # there is dropout


def test_a_rollout_is_used_in_ppo_epochs_steps():
    objective, batch, _ = prepared(ppo_epochs=3)
    assert objective.period == 3
    seen = []
    for step in range(7):
        objective.loss(batch, moment(step))
        seen.append(objective.rollout)
    assert seen[0] is seen[1] is seen[2] is not seen[3] and seen[3] is seen[5] is not seen[6]


def test_without_reward_a_policy_at_its_reference_stays_bit_by_bit():
    objective, batch, _ = prepared(scale=0.0, judge=Always(Always.Config()))
    trained = [*objective.setting.model.trainable_parameters(), *objective.parameters().values()]
    before, optimizer = [t.detach().clone() for t in trained], torch.optim.AdamW(trained, 0.1, weight_decay=0.0)
    for step in range(4):
        optimizer.zero_grad()
        objective.loss(batch, moment(step)).backward()
        optimizer.step()
    assert all(torch.equal(was, now) for was, now in zip(before, trained, strict=True))


def test_without_reward_a_policy_that_left_comes_back():
    objective, batch, _ = prepared(judge=Always(Always.Config()), kl_coef=0.5, max_new_tokens=2)
    model = objective.setting.model
    batch = {key: tensor.repeat(16, 1) for key, tensor in batch.items()}
    optimizer = torch.optim.AdamW([*model.trainable_parameters(), *objective.parameters().values()], 3e-3)

    first = {key: batch[key][:4] for key in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def left():
        """KL(pi || pi_ref) of the token before the last of each row."""
        ours = model(**first).logits[:, -3].log_softmax(-1)
        with model.without_new():
            return (ours.exp() * (ours - model(**first).logits[:, -3].log_softmax(-1))).sum(1).mean().item()

    start = left()
    for step in range(60):
        optimizer.zero_grad()
        objective.loss(batch, moment(step)).backward()
        optimizer.step()
    assert left() < 0.7 * start


def test_self_training_learns_the_right_answers_and_the_datas_own():
    objective, batch, examples = prepared(update="self_training", judge=Always(Always.Config()))
    model = objective.setting.model
    own = np.mean([-np.mean(alone(model, e.prompt, e.completion)) for e in examples])
    assert objective.loss(batch, moment()).item() == pytest.approx(own / 2, abs=1e-4)  # none is right
    objective.verifier.reward = sum([0.1] * 10)  # 1, but for rounding
    loss = objective.loss(batch, moment(2)).item()
    rollout = objective.rollout
    answers = [rollout.batch["labels"][row, real].tolist() for row, real in enumerate(rollout.real)]
    right = np.mean([-np.mean(alone(model, e.prompt, a)) for e, a in zip(examples, answers, strict=True)])
    assert loss == pytest.approx((own + right) / 2, abs=1e-4)


# --- through the hub -----------------------------------------------------------------------------------------------


def train(hub, folder, path, name, **given):
    return hub.train(str(folder), "lora", path, name, **SETTINGS | {"options": OPTIONS | {"r": 2}, "steps": 8} | given)


def test_a_killed_run_ends_with_the_same_bytes_and_the_value_head_is_not_released(
    tiny_folder, path, tmp_path, monkeypatch
):
    whole = adapterhub.open(tmp_path / "whole", create=True)
    first = train(whole, tiny_folder, path, "me/x", save_every=3)
    hub = adapterhub.open(tmp_path / "killed", create=True)
    logged = _Watch.on_log

    def dies(self, args, state, control, logs=None, **kwargs):
        logged(self, args, state, control, logs, **kwargs)
        if state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Watch, "on_log", dies)
    with pytest.raises(KeyboardInterrupt):
        train(hub, tiny_folder, path, "me/x", save_every=3)
    (checkpoint,) = (hub.root / "training").glob("*/train/checkpoint-*")
    assert checkpoint.name == "checkpoint-4"  # asked for every 3 steps; whole rollouts only
    kept = load_file(checkpoint / "model.safetensors")
    assert kept["value/direction"].any() and kept["value/offset"] != 0
    monkeypatch.setattr(_Watch, "on_log", logged)
    again = train(hub, tiny_folder, path, "me/x", save_every=3)
    assert again.digest == first.digest
    assert not any("value" in name for name in Adapter.load(hub, again).tensors)
    assert again.manifest.recipe["objective"]["verifier"] == "adapterhub-rft-ppo 0.1.0"


def test_on_a_warm_up_the_warm_up_is_the_reference_and_continue_goes_on(hub, tiny_folder, path):
    warm = hub.train(
        str(tiny_folder), "lora", path, "me/warm", options={"r": 2}, steps=40, lr=2e-2, batch_size=4, device="cpu"
    )
    over = train(hub, tiny_folder, path, "me/over", on=["me/warm"])
    assert over.manifest.recipe["beneath"] == f"me/warm@{warm.version}"
    model = hub.load(str(tiny_folder), "me/warm")
    bare = hub.load(str(tiny_folder))
    method = plugins.load("methods", "lora")
    torch.manual_seed(0)
    model.attach_new(method().build(model.sites, method.Config(r=2)))
    text = model.tokenizer
    ids = text("1+2=")["input_ids"]
    objective = RFTPPO(RFTPPO.Config(max_new_tokens=4, kl_coef=1.0))
    objective.prepare(TrainingContext(model, [Example(1, (*ids, *text("3")["input_ids"], 2), len(ids))], pad=0))
    rollout = objective.roll(objective.setting.batch(objective.setting.examples), moment().draw)
    answer = rollout.batch["labels"][0].tolist()
    warmed = alone(bare, ids, answer, "me/warm")
    assert rollout.old[0].tolist() == pytest.approx(warmed, abs=1e-4)  # fresh over the warm-up
    assert abs(sum(warmed) - sum(alone(bare, ids, answer))) > 0.1
    # So no token has paid: the return before each is the verdict, times 0.95 to the power of the tokens to come.
    reward = objective.verdict(ids, [*text("3")["input_ids"], 2], answer).reward
    wanted = [reward * 0.95**k for k in reversed(range(len(answer)))]
    assert rollout.returns[0].tolist() == pytest.approx(wanted, abs=1e-3)
    after = hub.train(str(tiny_folder), data=path, continue_from="me/over", steps=2, options=OPTIONS, **SETTINGS)
    before, now = (Adapter.load(hub, release).tensors for release in (over, after))
    assert before.keys() == now.keys() and any(not torch.equal(before[n], now[n]) for n in before)


def test_without_any_reward_nothing_is_published(hub, tiny_folder, path, monkeypatch):
    monkeypatch.setattr(AnswerMatch, "verify", Always.verify)
    monkeypatch.setattr(AnswerMatch, "reward", 0.0, raising=False)
    with pytest.raises(NoEffect):
        train(hub, tiny_folder, path, "me/x", steps=2, options={"rft_ppo.max_new_tokens": 4})


class Tenths(AnswerMatch):
    """Ten checks of a tenth each, which add up to 0.9999999999999999."""

    def verify(self, prompt, reference, answer):
        return Verdict(sum([0.1] * 10) if answer == reference else 0.9)


def test_a_reward_that_is_1_but_for_rounding_is_right(monkeypatch):
    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda group, name: Tenths if group == "verifiers" else load(group, name))
    objective, _, _ = prepared()
    ids = objective.setting.model.tokenizer(["1", "2"])["input_ids"]
    assert [objective.verdict(ids[0], ids[1], answer).right for answer in (ids[1], ids[0])] == [True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"ppo_epochs": 0}, "ppo_epochs"), ({"kl_coef": -1.0}, "kl_coef"),
     ({"kl_coef": float("inf")}, "kl_coef"), ({"update": "best"}, "update"), ({"verifier": "nobody"}, "nobody"),
     ({"max_new_tokens": 250}, "no room for 250 more"), ({"verifier_options": {"patern": "x"}}, "patern"),
     ({"verifier_options": {"pattern": "[#](?P<answer>[0-9]{7,9})"}}, "none of the data's own"),
     ({"verifier_options": {"pattern": "z(?P<answer>z)"}}, "none of the data's own")],
)  # fmt: skip
def test_wrong_options_are_refused(options, said):
    with pytest.raises(HubError, match=said) as caught:
        prepared(**options, rows=[("1+1+1+1=", "4")])
    assert caught.value.hint


def test_a_base_without_tokenizer_an_empty_prompt_and_raw_text_are_refused(hub, tiny_folder, tmp_path):
    objective = RFTPPO(RFTPPO.Config())
    bare, example = tiny_llama().requires_grad_(False), Example(1, (5, 6, 2), 1)
    with pytest.raises(UsageError, match="no tokenizer"):
        objective.prepare(TrainingContext(Model(bare), [example], pad=0))
    with pytest.raises(UsageError, match="line 4: the prompt is empty"):
        objective.prepare(TrainingContext(Model(bare, tiny_tokenizer()), [Example(4, (5, 2), 0)], pad=0))
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"text": "no question"}))
    with pytest.raises(UsageError, match="'text' rows"):
        train(hub, tiny_folder, raw, "me/x")
