"""Which TIES ours is: beside PEFT's, mergekit's and the authors', where they agree and by how much they do not (docs/guide/composition.md)."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.merge_utils import ties as of_peft

from adapterhub.mergers.ties import Ties

CHANGES = [[4.0, -2.0, 1.0, 0.5], [-7.0, 1.0, 3.0, 0.2], [2.0, 1.0, -0.5, 3.0]]
"""At density 0.5 these keep 4 and -2, -7 and 3, 2 and 3."""


def ours(changes, weights, density=0.5):
    changes = [torch.tensor(change, dtype=torch.float64) for change in changes]
    return Ties().combine(changes, weights, Ties.Config(density=density)).numpy()


def pefts(changes, weights, density=0.5):
    """PEFT's `ties_svd`, before it cuts the rank: votes are not weighed, the sum is divided by the count of those that agree."""
    return of_peft(
        [torch.tensor(change, dtype=torch.float64) for change in changes], torch.tensor(weights), density
    ).numpy()


def mergekits(changes, weights, density=0.5, normalize=True):
    """mergekit 0.1.5, `ties`: the largest of each tensor, times the weight; the sign of their sum, 0 counting as plus; the sum of those
    that agree, divided by the sum of *their weights* unless `normalize` is off."""
    changes, weights = np.array(changes), np.array(weights)[:, None]
    kept = np.zeros_like(changes)
    for row, change in zip(kept, changes, strict=True):
        places = np.argsort(-np.abs(change), kind="stable")[: int(density * len(change))]
        row[places] = change[places]
    votes = weights * kept
    agree = np.sign(votes) == np.where(votes.sum(0) >= 0, 1, -1)
    total, divisor = (votes * agree).sum(0), (weights * agree).sum(0)
    return total / np.where(divisor == 0, 1, divisor) if normalize else total


def authors(changes, density):
    """The authors' code at λ 1: all weights of a model as one vector with one threshold; the mean of those that agree."""
    changes = np.array(changes)
    kept = np.array([np.where(np.abs(c) >= np.sort(np.abs(c))[-int(density * len(c)) - 1], c, 0) for c in changes])
    sign = np.sign(kept.sum(0))
    agree = np.sign(kept) == np.where(sign == 0, np.sign(sign.sum()), sign)
    return (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)


def test_at_weights_of_one_all_are_the_same():
    """By hand. First place: 4 - 7 + 2 is below 0, and -7 alone agrees. Elsewhere one change is left."""
    for merge in (ours, pefts, mergekits):
        assert merge(CHANGES, [1.0, 1.0, 1.0]).tolist() == [-7, -2, 3, 3]


def test_at_unlike_weights_all_differ():
    """By hand, at 0.5, 0.3, 0.9. First place: 2 - 2.1 + 1.8 is above 0; of 2 and 1.8 ours takes the mean, mergekit the sum over
    0.5 + 0.9. PEFT elects as at weights of one: minus, and 0.3 times -7 is left. mergekit cancels the weight of what stands alone."""
    weights = [0.5, 0.3, 0.9]
    assert ours(CHANGES, weights) == pytest.approx([1.9, -1, 0.9, 2.7])
    assert pefts(CHANGES, weights) == pytest.approx([-2.1, -1, 0.9, 2.7])
    assert mergekits(CHANGES, weights) == pytest.approx([3.8 / 1.4, -2, 3, 3])
    assert mergekits(CHANGES, weights, normalize=False) == pytest.approx([3.8, -1, 0.9, 2.7])


def test_all_weights_halved_halve_ours_and_pefts_and_leave_mergekits():
    for merge, factor in ((ours, 0.5), (pefts, 0.5), (mergekits, 1.0)):
        assert merge(CHANGES, [0.5] * 3) == pytest.approx(factor * merge(CHANGES, [1.0] * 3))


def test_a_negative_weight_merges_the_opposite_in_ours_alone():
    """By hand: 1 and -1 on (2, -3) and (5, 1) vote 2 - 5 and -3 - 1. Ours: -5, and the mean of -3 and -1. PEFT elects plus and minus from
    the changes as they are: of 2 and -5 the mean, and -3 alone. mergekit: -5/-1, the second as if added; then -4, since 1 - 1 is 0."""
    changes, weights = [[2.0, -3.0], [5.0, 1.0]], [1.0, -1.0]
    assert ours(changes, weights, 1.0).tolist() == [-5, -2]
    with pytest.warns(UserWarning, match="no pruning"):
        assert pefts(changes, weights, 1.0).tolist() == [-1.5, -3]
    assert mergekits(changes, weights, 1.0).tolist() == [5, -4]


def test_where_the_signs_weigh_the_same_ours_leaves_nothing_and_the_others_take_plus():
    changes = [[1.0, 2.0], [-1.0, 2.0]]
    assert ours(changes, [1.0, 1.0], 1.0).tolist() == [0, 2]
    assert mergekits(changes, [1.0, 1.0], 1.0).tolist() == [1, 2]
    with pytest.warns(UserWarning, match="no pruning"):
        assert pefts(changes, [1.0, 1.0], 1.0).tolist() == [1, 2]


def test_one_threshold_for_all_weights_leaves_small_sites_nothing():
    """The same two changes as one site and as a tenth of it at another: ours keeps half of each, the authors' code the large one."""
    large = [[4.0, -2.0, 1.0, 0.5], [3.0, 1.0, 2.0, 0.2]]
    whole = [[*change, *(0.1 * entry for entry in change)] for change in large]
    assert ours(large, [1.0, 1.0]).tolist() == [3.5, -2, 2, 0]
    assert ours(0.1 * np.array(large), [1.0, 1.0]) == pytest.approx([0.35, -0.2, 0.2, 0])
    assert authors(whole, 0.25).tolist() == [3.5, -2, 1.5, 0, 0, 0, 0, 0]


def test_pefts_ties_svd_is_ours_at_weights_of_one_and_its_ties_on_the_factors_is_another_rule():
    """Through PEFT itself: two LoRAs of rank 2 on one layer, the merge at full rank."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(5, 6, bias=False)), config, "one")
    model.add_adapter("two", config)
    layer = model.base_model.model[0]
    for name in ("one", "two"):
        torch.nn.init.normal_(layer.lora_B[name].weight)
    changes = [layer.get_delta_weight(name).detach() for name in ("one", "two")]
    wanted = Ties().combine(changes, [1.0, 1.0], Ties.Config(density=0.5))
    for kind, options in (("ties_svd", {"svd_rank": 5}), ("ties", {})):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], kind, kind, density=0.5, **options)
    torch.testing.assert_close(layer.get_delta_weight("ties_svd").detach(), wanted, rtol=1e-4, atol=1e-5)
    assert (layer.get_delta_weight("ties") - wanted).norm() > 0.3 * wanted.norm()


def test_how_far_apart_on_random_changes():
    """The figures of docs/guide/composition.md: ten draws of three random changes, relative to the size of ours."""
    draw, weights = np.random.default_rng(0), [0.5, 0.3, 0.9]
    for density, wanted in ((0.2, (0.39, 0.76, 0.32)), (0.5, (0.53, 0.69, 0.58))):
        apart = []
        for _ in range(10):
            changes = draw.standard_normal((3, 3000))
            mine = ours(changes, weights, density)
            others = (pefts(changes, weights, density), mergekits(changes, weights, density))
            others += (mergekits(changes, weights, density, normalize=False),)
            apart.append([np.linalg.norm(other - mine) / np.linalg.norm(mine) for other in others])
        assert np.mean(apart, 0) == pytest.approx(wanted, abs=0.01)
