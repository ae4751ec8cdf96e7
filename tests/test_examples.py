"""The examples run as they stand, the demo makes its whole journey, and the data are what their notice says."""

import importlib.util
import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import adapterhub
from adapterhub import demo
from adapterhub.adapters.adapter import Adapter
from adapterhub.errors import NotFound

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = EXAMPLES / "data"


@pytest.fixture(autouse=True)
def one_thread():
    """A tiny model gains nothing from several, and they wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_example(monkeypatch, capsys):
    """run_example(name, argument, ...) -> its output's lines."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def tensors(hub, ref):
    return Adapter.load(hub, hub.resolve(ref)).tensors


def run_all(run_example, base, root, steps, rows):
    """The three scripts one after another, as their first lines say; what each must leave behind."""
    printed = run_example("train_two.py", "--base", base, "--hub", root, "--steps", steps, *rows)
    hub = adapterhub.open(root)
    assert [str(release) for release in hub.releases()] == printed[-3:]
    assert sum("rows right on" in line for line in printed) == 6
    assert hub.resolve("me/both").manifest.compose == "me/sentiment@0.1.0 + me/department@0.1.0"
    assert {form for forms in hub.resolve("me/department").manifest.forms.values() for form in forms} == {"bottleneck"}

    printed = run_example("compose_in_python.py", "--base", base, "--hub", root)
    moved = {line.split(" moves ")[0].strip(): float(line.split()[-1]) for line in printed if " moves " in line}
    assert moved["me/sentiment"] > 0 and moved["0.5*me/sentiment"] > 0
    assert moved["me/sentiment - me/sentiment"] < 1e-3 * moved["me/sentiment"]
    assert printed[-1] == "0.7*me/sentiment@0.1.0 + me/department@0.1.0"

    printed = run_example("plain_torch_loop.py", "--base", base, "--hub", root, "--steps", 3)
    assert [line.split(":")[0] for line in printed[:3]] == ["step 1", "step 2", "step 3"]
    parents = {p.name: p.relation for p in hub.resolve("me/department@0.2.0").manifest.parents}
    assert parents == {"me/department": "continue", "me/sentiment": "on"}
    before, after = tensors(hub, "me/department@0.1.0"), tensors(hub, "me/department@0.2.0")
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    assert [release.version for release in hub.releases("me/sentiment")] == ["0.1.0"]


def test_examples(run_example, tiny_folder, tmp_path):
    run_all(run_example, tiny_folder, tmp_path / "hub", 4, ["--rows", 16])


@pytest.mark.slow
def test_examples_on_smollm2(run_example, tmp_path):
    run_all(run_example, "smollm2", tmp_path / "hub", 4, ["--rows", 16])


def test_the_demos_journey(tiny_folder, tmp_path, capsys):
    """Every stage on a tiny base; a second run with the same seed finds all of it there and adds nothing."""
    again = []
    for _ in range(2):
        results = demo.run(tmp_path / "hub", quick=True, report=tmp_path / "report.html", base=str(tiny_folder))
        hub = adapterhub.open(tmp_path / "hub")
        again.append([(str(release), release.digest) for release in hub.releases()])
    assert again[0] == again[1] and len(again[0]) == 6
    names = [model["name"] for model in results["models"]]
    assert names[0] == "bare base" and sorted(names[1:]) == sorted(name for name, _ in again[0])
    (second,) = (tmp_path / "hub" / "demo").iterdir()
    assert {release.name for release in adapterhub.open(second).releases()} == {
        *("demo/sentiment", "demo/department", "demo/both-merged", "demo/both-stacked"),
    }  # what the merge was made of is told, and does not travel
    assert {check["what"]: check["passed"] for check in results["checks"]}[
        "each row of a mixed batch answers as it does alone"
    ]
    page = (tmp_path / "report.html").read_text()
    printed = capsys.readouterr().out
    assert all(name in page and name in printed for name in names)


def test_the_demo_uses_the_nearest_hub_or_makes_one_at_the_clones_root(tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "clone" / "inside").mkdir(parents=True)
    monkeypatch.setattr(demo, "CLONE", tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone" / "inside")
    assert demo._hub(None).root == tmp_path / "clone"
    adapterhub.open(tmp_path / "outside", create=True)
    monkeypatch.chdir(tmp_path / "outside")
    assert demo._hub(None).root == tmp_path / "outside"
    assert demo._hub(tmp_path / "named").root == tmp_path / "named"


def test_the_demo_outside_of_a_clone_says_where_its_data_are(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DATA", tmp_path / "examples" / "data")
    with pytest.raises(NotFound, match="data are not here") as caught:
        demo.run(tmp_path / "hub", report=tmp_path / "report.html")
    assert "clone" in caught.value.hint and not list(tmp_path.iterdir())


# --- the data ----------------------------------------------------------------------------------------------------


def rows_of(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("task", "labels"), [("sentiment", 2), ("department", 8)])
def test_data_are_balanced_and_apart(task, labels):
    train, test = rows_of(f"{task}-train"), rows_of(f"{task}-test")
    assert (len(train), len(test)) == (480, 304)
    for rows in (train, test):
        counts = Counter(row["completion"] for row in rows)
        assert len(counts) == labels and set(counts.values()) == {len(rows) // labels}
        assert all(label.startswith(" ") for label in counts)
    prompts = [row["prompt"].casefold() for row in train + test]
    assert len(set(prompts)) == len(prompts)
    for row in train + test:
        text = row["prompt"].split("\n")[0].partition(": ")[2]
        assert text.isascii() and len(text) >= 8 and len(row["prompt"]) < 160


def test_no_category_of_diagnoses_is_on_both_sides():
    train, test = ({row["code"][:3] for row in rows_of(f"department-{part}")} for part in ("train", "test"))
    assert len(train) > 100 and len(test) > 60 and not train & test


def test_the_data_are_what_their_script_makes_of_a_small_archive(tmp_path):
    """Ratings near neutral, texts too short or too long, and the same text twice are left out."""
    spec = importlib.util.spec_from_file_location("make_data", DATA / "make_data.py")
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    import io
    import tarfile

    lines = [f"{i}\t{2.5 if i % 2 else -1.5}\tA snippet of some length, number {i}." for i in range(900)]
    left_out = ["9\t0.9\tNearly neutral, so left out of it.", "9\t3\tToo short.", "9\t3\t" + "long " * 30]
    twice = ["9\t2.5\ta SNIPPET of some length, number 1!"]

    def packed(path, files):
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    sources = {
        f"hutto_ICWSM_2014/{source}_GroundTruth.txt": "\r\n".join(
            line.replace("snippet", source[:5]) for line in lines + left_out + twice
        ).encode()
        for source in make_data.SNIPPETS
    }
    packed(tmp_path / "inner.tar.gz", sources)
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    packed(tmp_path / "outer.tar.gz", {inner: (tmp_path / "inner.tar.gz").read_bytes()})
    train, test = make_data.sentiment(tmp_path / "outer.tar.gz")
    assert (len(train), len(test)) == (480, 304)
    texts = [row["prompt"].split("\n")[0] for row in train + test]
    assert len({text.lower() for text in texts}) == 784 and not any(
        "eutral" in t or "hort" in t or "long long" in t for t in texts
    )
    positive = [row for row in train if row["completion"] == " positive"]
    assert len(positive) == 240 and all(int(row["prompt"].split("number ")[1].split(".")[0]) % 2 for row in positive)
