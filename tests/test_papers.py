"""The experiments in examples/papers run, and say what their numbers say."""

import itertools
import runpy
import sys
from pathlib import Path

import pytest

PAPERS = Path(__file__).parents[1] / "examples" / "papers"


@pytest.fixture(autouse=True)
def beside(monkeypatch, tmp_path_factory):
    """The scripts' folder, and one cache for all: the hardly trained model is made once."""
    monkeypatch.syspath_prepend(str(PAPERS))
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


SAYS = {
    "lofit": "selected", "lt_sft": "random both", "levi": "always levi", "conv_adapter": "local pattern", "unified": "mam",
    "hft": "half rate", "layer_policy": "fresh top", "copg": "optimum", "canonical": "carried", "masked_thought": "masked 0.4",
    "corda": "kpm", "rft_ppo": "ppo", "response_only": "one-way", "cocktail": "mixed-general", "semantic_preserve": "weight-10 recall",
}  # fmt: skip
"""What the scripts say of a word each."""


def test_every_script_is_tried():
    assert {path.stem for path in PAPERS.glob("*.py")} - {"tiny"} == set(SAYS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "says"), SAYS.items())
def test_quick(name, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    runpy.run_path(str(PAPERS / f"{name}.py"), run_name="__main__")
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("differences", "control", "said"),
    [
        ([0.1, 0.2, 0.3, 0.2, 0.2], 1.0, "seen"),
        ([-0.1, -0.2, -0.3, -0.2, -0.2], 1.0, "not seen"),
        ([0.001, -0.001, 0.002, -0.002, 0.0], 1.0, "not seen"),
        ([0.1, -0.1, 0.2, -0.2, 0.0], 1.0, "not resolved"),
        ([0.1, 0.2, 0.3, 0.2, 0.2], 0.0, "not resolved"),
    ],
)
def test_the_verdict(differences, control, said):
    import tiny

    assert tiny.verdict("a - b", differences, control).endswith(f": {said}")


def test_the_interval_is_students():
    """Of 1, 2, 3, 4, 5: mean 3, standard deviation √2.5, so 3 ± 2.776·√(2.5/5) = 3 ± 1.963."""
    import tiny

    assert "+3.000, 95 % interval +1.037 to +4.963" in tiny.verdict("a - b", [1, 2, 3, 4, 5], 10)


def test_the_corpus_walks_as_it_says():
    import random

    import tiny

    draw = random.Random(0)
    for tag, steps in (("forward", {1, 2, 3}), ("backward", {5, 6, 7})):
        tag_there, *words = tiny.sentence(draw, "abc", tag, 200).split()
        meanings = [int(word[1]) for word in words]
        assert tag_there == tag and {word[0] for word in words} == set("abc")
        assert {(b - a) % 8 for a, b in itertools.pairwise(meanings)} == steps
    ways = [tiny.sentence(draw, "a", "any", 2).split()[1:] for _ in range(2000)]
    back = sum((int(b[1]) - int(a[1])) % 8 > 4 for a, b in ways) / len(ways)
    assert 0.17 < back < 0.23
