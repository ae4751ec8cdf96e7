"""Mergers: the laws over every installed one, and that they catch mergers that break them."""

import pytest
import torch

from adapterhub import plugins
from adapterhub.mergers import Merger
from adapterhub.testing import check_part, laws
from adapterhub.testing.forms import Declined


@pytest.mark.parametrize("name", plugins.names("mergers"))
def test_laws(name):
    results = check_part("mergers", name)
    assert len(results) == 5
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
