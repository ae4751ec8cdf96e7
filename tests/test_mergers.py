"""Mergers: the laws over every installed one, and that they catch mergers that break them."""

import numpy as np
import pytest
import torch

from adapterhub import plugins
from adapterhub.errors import UsageError
from adapterhub.mergers import Merger
from adapterhub.mergers.ties import Ties
from adapterhub.testing import check_part, laws
from adapterhub.testing.forms import Declined


@pytest.mark.parametrize("name", plugins.names("mergers"))
def test_laws(name):
    results = check_part("mergers", name)
    assert len(results) == 6
    assert [r for r in results if r.verdict == "failed"] == []


def test_linear_declines_nothing():
    assert {r.verdict for r in check_part("mergers", "linear")} == {"passed"}


def broken(law, merger):
    check = next(check for check in laws("mergers") if check.__name__ == law)
    with pytest.raises(AssertionError):
        check(merger, "cpu")


class Mean(Merger):
    """Halves one adapter at weight 1."""

    def combine(self, deltas, weights, config):
        return sum(w * d for w, d in zip(weights, deltas, strict=True)) / (len(deltas) + 1)


class First(Merger):
    def combine(self, deltas, weights, config):
        return weights[0] * deltas[0]


class Clipped(Merger):
    def combine(self, deltas, weights, config):
        return sum(w * d for w, d in zip(weights, deltas, strict=True)).clamp(-1, 1)


class InPlace(Merger):
    def combine(self, deltas, weights, config):
        for delta, weight in zip(deltas, weights, strict=True):
            delta.mul_(weight)
        return sum(deltas)


class NotASum(Merger):
    linear = True

    def combine(self, deltas, weights, config):
        return torch.stack([w * d for w, d in zip(weights, deltas, strict=True)]).amax(0)


@pytest.mark.parametrize(
    ("law", "merger"),
    [("itself", Mean), ("order", First), ("scaling", Clipped), ("inputs_kept", InPlace), ("weighted_sum", NotASum)],
)
def test_each_law_catches_the_merger_that_breaks_it(law, merger):
    broken(law, merger)


def test_a_merger_may_decline_what_it_says_it_is_not():
    class Ordered(First):
        symmetric = False

    check = next(check for check in laws("mergers") if check.__name__ == "order")
    with pytest.raises(Declined):
        check(Ordered, "cpu")


def ties_by_the_paper(deltas, weights, density):
    """Algorithm 1 of the paper, entry by entry: trim, elect, disjoint mean."""
    kept = []
    for delta, weight in zip(deltas, weights, strict=True):
        flat = delta.reshape(-1)
        stays = np.argsort(-np.abs(flat), kind="stable")[: max(1, round(density * flat.size))]
        trimmed = np.zeros(flat.size)
        trimmed[stays] = weight * flat[stays]
        kept.append(trimmed)
    merged = np.zeros(deltas[0].size)
    for place in range(merged.size):
        column = [k[place] for k in kept]
        sign = np.sign(sum(column))
        agreeing = [value for value in column if value and np.sign(value) == sign]
        merged[place] = np.mean(agreeing) if agreeing else 0.0
    return merged.reshape(deltas[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers(density):
    draw = np.random.default_rng(0)
    deltas, weights = [draw.standard_normal((12, 9)) for _ in range(3)], [1.0, 0.5, -2.0]
    got = Ties().combine([torch.tensor(d).float() for d in deltas], weights, Ties.Config(density=density))
    wanted = ties_by_the_paper([d.astype(np.float32).astype(float) for d in deltas], weights, density)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-7)


def test_ties_is_pefts_where_both_say_the_same():
    """peft trims per weight as we do, and votes by the sum of the values."""
    from peft.utils.merge_utils import ties

    torch.manual_seed(1)
    deltas, weights = [torch.randn(16, 10) for _ in range(4)], [1.0, 1.0, 1.0, 1.0]
    got = Ties().combine(deltas, weights, Ties.Config(density=0.3))
    wanted = ties(deltas, torch.tensor(weights), 0.3, majority_sign_method="total")
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_votes_that_cancel_but_for_rounding_elect_nobody():
    """0.1 + 0.2 and 0.3, which are not equal as floats; where one side has more, by however little, it wins."""
    delta = torch.full((1, 3), 0.7)
    deltas = [delta, delta, delta * torch.tensor([-1.0, -0.999, -1.001])]
    found = Ties().combine(deltas, [0.1, 0.2, 0.3], Ties.Config(density=1.0))
    assert found[0, 0] == 0 and torch.allclose(found[0, 1:], torch.tensor([0.15 * 0.7, -0.3 * 0.7 * 1.001]))


def test_ties_of_one_is_itself_and_a_density_of_nothing_is_refused():
    delta = torch.randn(5, 5)
    assert torch.equal(Ties().combine([delta], [1.0], Ties.Config()), delta)
    for density in (0.0, 1.5):
        with pytest.raises(UsageError, match="density"):
            Ties().combine([delta, delta], [1.0, 1.0], Ties.Config(density=density))
