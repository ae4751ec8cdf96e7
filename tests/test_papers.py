"""The experiments in examples/papers run, and say what their numbers say."""

import ast
import itertools
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

PAPERS = Path(__file__).parents[1] / "examples" / "papers"
PAGE = (Path(__file__).parents[1] / "docs" / "evidence" / "papers.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def beside(monkeypatch, tmp_path_factory):
    """The scripts' folder, and one cache for all: the hardly trained model is made once."""
    monkeypatch.syspath_prepend(str(PAPERS))
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


SAYS = {
    "lofit": "selected", "lt_sft": "random both", "levi": "always levi", "conv_adapter": "local pattern", "unified": "mam",
    "hft": "half rate", "layer_policy": "fresh top", "copg": "optimum", "canonical": "carried", "masked_thought": "masked 0.4",
    "corda": "kpm", "rft_ppo": "ppo", "response_only": "one-way", "cocktail": "mixed-general", "semantic_preserve": "weight-10 recall",
    "compeft": "paper at 1", "linear_merge": "random taken off",
}  # fmt: skip
"""What the scripts say of a word each."""


def test_every_script_is_tried():
    assert {path.stem for path in PAPERS.glob("*.py")} - {"bed", "tiny"} == set(SAYS)


def test_whatever_a_script_defines_is_used():
    """LEVI's base once lost the training that plants its shortcut in it: the function stood there, and nobody called it."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in PAPERS.glob("*.py")}
    words = Counter(word for source in sources.values() for word in re.findall(r"\w+", source))
    for name, source in sources.items():
        body = ast.parse(source).body
        defined = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        set_to = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        defined += [node.id for target in set_to for node in ast.walk(target) if isinstance(node, ast.Name)]
        assert [one for one in defined if words[one] < 2] == [], name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "says"), SAYS.items())
def test_quick(name, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    runpy.run_path(str(PAPERS / f"{name}.py"), run_name="__main__")
    assert says in capsys.readouterr().out


def tables(page):
    """[{heading: cell} of each row] of each table."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        heads, _, *rows = [line.strip().strip("|").split(" | ") for line in block.splitlines()]
        heads = [head.strip() for head in heads]
        found.append([dict(zip(heads, (cell.strip().strip("`") for cell in row), strict=True)) for row in rows])
    return found


def on_another_bed(page, recipe):
    """What is wrong with the beds of the page's rows: of models that it does not list, or made by another recipe."""
    beds, rows = tables(page)
    current = {row["bed"] for row in beds if recipe.startswith(row["recipe"])}
    known = {"none", "earlier"} | current
    return [
        f"{row['paper']}: {row['claim']}: {row['bed']}" for row in rows if not known.issuperset(row["bed"].split(", "))
    ]


def test_every_row_names_the_bed_it_was_made_on():
    """Fails where bed.py has changed: then these rows are to be made anew, and the page's recipe and weights with them."""
    import bed

    assert on_another_bed(PAGE, bed.recipe()) == []
    assert len(on_another_bed(PAGE, "another")) > 2
    row = next(line for line in PAGE.splitlines() if line.startswith("| LoFiT"))
    other = PAGE.replace(row, re.sub("`[0-9a-f]{8}`", "`12345678`", row))
    assert [text.partition(" ")[0] for text in on_another_bed(other, bed.recipe())] == ["LoFiT"]


@pytest.mark.long
@pytest.mark.parametrize("row", tables(PAGE)[0], ids=lambda row: row["bed"])
def test_the_recipe_makes_the_weights_that_the_page_names(row):
    """A minute or two, where torch is made for the kind of processor that the page names (or told so: ATEN_CPU_CAPABILITY=avx2)."""
    import bed

    if row["made with"] != bed.made_with():
        pytest.skip(f"this bed was made with {row['made with']}; here is {bed.made_with()}")
    assert bed.weights(getattr(bed, row["model"])())[:8] == row["bed"]


def test_the_bed_comes_out_the_same_twice_and_leaves_no_trace(tmp_path, monkeypatch, capsys):
    import bed

    threads, made = torch.get_num_threads(), []
    for count in (1, 2):
        monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / str(count)))
        torch.set_num_threads(count)
        try:
            before = torch.random.get_rng_state()
            made.append(bed.weights(bed.base(2)))
            assert torch.get_num_threads() == count and torch.equal(before, torch.random.get_rng_state())
        finally:
            torch.set_num_threads(threads)
    assert made[0] == made[1]
    assert f"bed {made[0][:8]}: base, 2 steps, recipe {bed.recipe()[:8]}, torch" in capsys.readouterr().out


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

    import bed

    draw = random.Random(0)
    for tag, steps in (("forward", {1, 2, 3}), ("backward", {5, 6, 7})):
        tag_there, *words = bed.sentence(draw, "abc", tag, 200).split()
        meanings = [int(word[1]) for word in words]
        assert tag_there == tag and {word[0] for word in words} == set("abc")
        assert {(b - a) % 8 for a, b in itertools.pairwise(meanings)} == steps
    ways = [bed.sentence(draw, "a", "any", 2).split()[1:] for _ in range(2000)]
    back = sum((int(b[1]) - int(a[1])) % 8 > 4 for a, b in ways) / len(ways)
    assert 0.17 < back < 0.23
