"""Every law over every installed part, and a table that pins which laws each built-in declines."""

import pytest

from adapterhub import plugins
from adapterhub.testing import TRIED, check_part, laws

DECLINED = {
    ("forms", "affine"): set(),
    ("forms", "bottleneck"): {"fold"},
    ("forms", "conv_bottleneck"): {"fold"},
    ("forms", "dense"): set(),
    ("forms", "dora"): set(),
    ("forms", "head_bottleneck"): {"fold"},
    ("forms", "levi"): {"fold"},
    ("forms", "low_rank"): set(),
    ("forms", "peft"): set(),
    ("forms", "prefix"): {"fold"},
    ("forms", "soft_mixture"): {"decode", "chunks", "fold"},
    ("forms", "sparse"): set(),
    ("forms", "subspace"): {"fold"},
    ("methods", "bitfit"): set(),
    ("methods", "bottleneck"): set(),
    ("methods", "conv_adapter"): set(),
    ("methods", "corda"): set(),
    ("methods", "full"): set(),
    ("methods", "gate"): {"start"},
    ("methods", "ia3"): set(),
    ("methods", "levi"): set(),
    ("methods", "lofit"): {"start"},
    ("methods", "lora"): set(),
    ("methods", "loreft"): set(),
    ("methods", "lt_sft"): set(),
    ("methods", "peft"): set(),
    ("methods", "prefix"): {"start"},
    ("methods", "soft_moa"): set(),
    ("methods", "unified"): {"start"},
    ("objectives", "canonical"): set(),
    ("objectives", "copg"): set(),
    ("objectives", "rft_ppo"): set(),
    ("objectives", "sft"): set(),
    ("recipes", "cocktail"): set(),
    ("recipes", "masked_thought"): set(),
    ("recipes", "neftune"): set(),
    ("recipes", "response_only"): set(),
    ("recipes", "semantic_preserve"): set(),
    ("schedules", "hft"): set(),
    ("schedules", "layer_policy"): set(),
    ("verifiers", "answer_match"): set(),
    ("mergers", "linear"): set(),
    ("mergers", "ties"): {"weighted_sum"},
    ("codecs", "compeft"): set(),
    ("codecs", "int8"): set(),
    ("codecs", "svd"): set(),
    ("codecs", "topk"): set(),
}
"""Part -> the laws it declines; it runs all others of its group."""

PARTS = [(group, name) for group in TRIED for name in plugins.names(group)]


def tried():
    """The built-in parts; those of packages are slow here, and their own tests run the laws by hand (.ci/long)."""
    for part in PARTS:
        built_in = plugins.distribution(*part).startswith("adapterhub ")
        yield part if built_in else pytest.param(*part, marks=pytest.mark.slow)


@pytest.mark.parametrize(("group", "name"), tried())
def test_laws(group, name, device):
    results = check_part(group, name, device)
    failed = [f"{r.law}: {r.detail}" for r in results if r.verdict == "failed"]
    assert not failed, "\n".join(failed)
    assert [r.law for r in results] == [law.__name__ for law in laws(group)]
    declined = {r.law for r in results if r.verdict == "declined"}
    assert declined == DECLINED.get((group, name), declined)


def test_the_table_covers_what_is_built_in():
    """A package's own parts may stand in it, and need not."""
    built_in = {part for part in PARTS if plugins.distribution(*part).startswith("adapterhub ")}
    assert built_in <= set(DECLINED) <= set(PARTS)
