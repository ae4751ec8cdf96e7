"""PPO's arithmetic against NumPy, its definition and a bandit's closed-form optimum; what sampling draws from."""

import numpy as np
import pytest
import torch
from adapterhub_rft_ppo import gae, ppo_loss, sampled, whitened

from adapterhub.runtime.model import Model
from adapterhub.testing.bed import tiny_llama


def drawn(seed=0, rows=5, tokens=7):
    """float64 arrays, and answers of lengths 1 to `tokens`."""
    draw = np.random.default_rng(seed)
    lengths = np.array([1, tokens, *draw.integers(1, tokens + 1, rows - 2)])
    real = np.arange(tokens) < lengths[:, None]
    return draw, lengths, real


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_double_sum_of_its_definition(gamma, lam):
    draw, lengths, real = drawn()
    rewards, values = draw.normal(size=(2, *real.shape))
    wanted = np.zeros(real.shape)
    for row, length in enumerate(lengths):
        v = [*values[row, :length], 0.0]
        delta = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            wanted[row, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
    found = gae(*map(torch.tensor, (rewards, values, real)), gamma, lam).numpy()
    assert np.abs(found - wanted).max() < 1e-12
    if (gamma, lam) == (1.0, 1.0):  # what is still to come, less the value
        left = (rewards * real)[:, ::-1].cumsum(1)[:, ::-1] - values
        assert np.abs(found - left * real).max() < 1e-12


def test_whitening_is_over_the_real_tokens_alone():
    draw, _, real = drawn(1)
    advantages = draw.normal(3, 5, real.shape)
    found = whitened(torch.tensor(advantages), torch.tensor(real)).numpy()
    wanted = (advantages - advantages[real].mean()) / advantages[real].std()
    assert np.abs(found - wanted * real).max() < 1e-8
    assert not whitened(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)).any()  # nothing to tell apart


def test_the_clipped_loss_is_the_one_written_out():
    draw, lengths, real = drawn(2, rows=6)
    old, moved, values, shift, advantages, returns = draw.normal(size=(6, *real.shape))
    new, old_values = old + 0.4 * moved, values + 0.3 * shift
    rows = []
    for row, length in enumerate(lengths):
        total = 0.0
        for t in range(length):
            ratio, a = np.exp(new[row, t] - old[row, t]), advantages[row, t]
            clipped = min(max(ratio, 0.8), 1.2)
            near = min(max(values[row, t], old_values[row, t] - 0.2), old_values[row, t] + 0.2)
            error = max((values[row, t] - returns[row, t]) ** 2, (near - returns[row, t]) ** 2)
            total += max(-a * ratio, -a * clipped) + 5 * 0.5 * error
        rows.append(total / length)
    given = map(torch.tensor, (new, old, values, old_values, advantages, returns, real))
    assert ppo_loss(*given).item() == pytest.approx(np.mean(rows), rel=1e-12)


def test_the_policy_gradient_is_nothing_beyond_the_clip_and_the_plain_one_at_ratio_1():
    real, zero = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    new = torch.tensor([[0.3, -0.3, 0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    ppo_loss(new, zero, zero, zero, advantages, zero, real).backward()
    # Too far already in the direction that pays: no more. The other way: the whole ratio.
    assert new.grad[0].tolist() == pytest.approx([0, -np.exp(-0.3) / 4, np.exp(0.3) / 4, 0], rel=1e-12)
    at = zero.clone().requires_grad_()
    ppo_loss(at, zero, zero, zero, advantages, zero, real).backward()
    assert torch.equal(at.grad, -advantages / 4)


def test_a_tabular_policy_reaches_the_closed_form_optimum():
    """A bandit of six arms, one-token answers. E[R] - c KL(pi || pi_ref) is greatest where pi is proportional to
    pi_ref exp(R / c): the policy ends within 0.02 of it in total variation, and not at twice or half that c."""
    torch.manual_seed(0)
    price, rewards = 0.5, torch.tensor([1.0, 0.1, 0.1, 0.0, 1.0, 0.0], dtype=torch.float64)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    policy, value = reference.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([policy, value], 0.03)
    steps, real = 600, torch.ones(512, 1, dtype=torch.bool)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps // 2):
        with torch.no_grad():
            chances = policy.log_softmax(-1)
            arms = torch.multinomial(chances.exp(), 512, replacement=True)[:, None]
            old, old_values = chances[arms], value.expand(512, 1).clone()
            gained = gae(rewards[arms] - price * (old - reference[arms]), old_values, real)
        for _ in range(2):
            optimizer.zero_grad()
            new = policy.log_softmax(-1)[arms]
            args = new, old, value.expand(512, 1), old_values, whitened(gained, real), gained + old_values, real
            ppo_loss(*args).backward()
            optimizer.step()
            decay.step()

    def apart(price):
        best = (reference + rewards / price).softmax(-1)
        return (policy.detach().softmax(-1) - best).abs().sum().item() / 2

    assert apart(price) < 0.02
    assert min(apart(price / 2), apart(2 * price), apart(1e9)) > 0.06


def test_answers_are_drawn_from_the_models_own_probabilities():
    """One token, 4000 draws: each token's share is within five standard deviations of its probability."""
    model, prompt = Model(tiny_llama().requires_grad_(False)), [5, 40, 7]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()

    def drawn():
        return sampled(model, [prompt] * 4000, 0, 2, 1, torch.Generator().manual_seed(0))[:, 0]

    shares = np.bincount(drawn().numpy(), minlength=96)[:96] / 4000
    assert (np.abs(shares - chances) <= 5 * np.sqrt(chances * (1 - chances) / 4000) + 1e-12).all()
    assert torch.equal(drawn(), drawn())
