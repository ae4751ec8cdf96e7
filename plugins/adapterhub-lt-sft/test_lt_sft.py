"""LT-SFT: the laws, the selection against NumPy, the rewinding, and that nothing else moves."""

import json

import numpy as np
import pytest
import torch
from adapterhub_lt_sft import LTSFT, strongest

import adapterhub
from adapterhub import BuildContext, plugins
from adapterhub.adapters.adapter import Adapter, modifications_of
from adapterhub.errors import UsageError
from adapterhub.sites import select, sites
from adapterhub.tensors.file import load
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama


def config(**options):
    return plugins.options(LTSFT.Config, options)


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    assert [f"{r.law}: {r.detail}" for r in check("lt_sft") if r.verdict == "failed"] == []


@pytest.mark.parametrize("count", [1, 7, 30, 64])
def test_exactly_the_k_largest_of_all_tensors_together(count):
    draw = np.random.default_rng(0)
    changes = [draw.integers(-4, 5, size=shape).astype(np.float32) for shape in ((4, 6), (10,), (5, 6))]  # many ties
    flat = np.concatenate([change.reshape(-1) for change in changes])
    wanted = np.zeros(flat.size, bool)
    wanted[np.argsort(-np.abs(flat), kind="stable")[:count]] = True  # among equals the earlier
    found = strongest([torch.tensor(change) for change in changes], count)
    got = [np.isin(np.arange(c.size), f.numpy()) for c, f in zip(changes, found, strict=True)]
    assert np.concatenate(got).tolist() == wanted.tolist() and sum(map(len, found)) == count
    assert all((f.diff() > 0).all() for f in found)


def test_places_are_those_that_moved_most_and_values_start_at_zero():
    """One threshold for the whole model: a site whose weights hardly moved gets none."""
    here = sites(tiny_llama())
    probe, train = LTSFT().stages(config(k=50))
    torch.manual_seed(0)
    before = probe.build(BuildContext(here, None))
    assert set(before) == {site.path for site in select(here, "all-linear")}
    for n, part in enumerate(before.values()):
        part.tensors["weight"] = torch.randn_like(part.weight) * (1.0 if n < 2 else 1e-3)
    made = train.build(BuildContext(here, None, before))
    assert set(made) == set(list(before)[:2])
    assert sum(len(part.index) for part in made.values()) == 50
    assert all(not part.values.any() for part in made.values())
    flat = np.concatenate([part.weight.numpy().reshape(-1) for part in before.values()])
    least = np.sort(np.abs(flat))[-50]
    for path, part in made.items():
        moved = before[path].weight.reshape(-1).abs().numpy()
        assert part.index.tolist() == np.flatnonzero(moved >= least).tolist()


def test_the_penalty_is_the_mean_over_all_that_may_change():
    here = sites(tiny_llama())
    size = sum(site.inputs * site.outputs for site in select(here, "all-linear"))
    probe, train = LTSFT().stages(config(k=10, l1=0.5))
    before = probe.build(BuildContext(here, None))
    for part in before.values():
        part.tensors["weight"] = torch.full_like(part.weight, -2.0)
    assert probe.penalty(before).item() == pytest.approx(0.5 * 2.0)
    made = train.build(BuildContext(here, None, before))
    for part in made.values():
        part.tensors["values"] = torch.full_like(part.values, 3.0)
    assert train.penalty(made).item() == pytest.approx(0.5 * 10 * 3.0 / size)


def test_training_keeps_the_places_of_its_probe_and_shares_it(tiny_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)))
    hub = adapterhub.open(tmp_path / "hub", create=True)
    settings = {"steps": 12, "lr": 1e-2, "device": "cpu"}
    few = hub.train(str(tiny_folder), "lt_sft", path, "me/few", options={"k": 40}, **settings)
    kept = list((hub.root / "training/stages").glob("*.safetensors"))
    many = hub.train(str(tiny_folder), "lt_sft", path, "me/many", options={"k": 90}, **settings)
    assert list((hub.root / "training/stages").glob("*.safetensors")) == kept and len(kept) == 1  # one probe for both
    probe = {path: part.weight.numpy() for path, [part] in modifications_of(load(kept[0])).items()}
    order = sorted(probe)
    for release, k in ((few, 40), (many, 90)):
        tensors = Adapter.load(hub, release).tensors
        assert release.manifest.recipe["found"]["train"]["k"] == k
        assert sum(len(t) for name, t in tensors.items() if name.endswith("index")) == k
        least = np.sort(np.abs(np.concatenate([probe[p].reshape(-1) for p in order])))[-k]
        for path_ in order:
            places = np.flatnonzero(np.abs(probe[path_].reshape(-1)) >= least)
            index = tensors.get(f"{path_}.sparse.0.index", torch.zeros(0))
            assert set(index.tolist()) <= set(places.tolist())
        assert any(t.any() for name, t in tensors.items() if name.endswith("values"))
    assert [stage["name"] for stage in few.manifest.recipe["stages"]] == ["probe", "train"]
    after = hub.train(str(tiny_folder), data=path, continue_from="me/few", steps=2, device="cpu")
    before, now = (Adapter.load(hub, r).tensors for r in (few, after))
    assert all(torch.equal(before[n], now[n]) for n in before if n.endswith("index"))
    assert any(not torch.equal(before[n], now[n]) for n in before if n.endswith("values"))


def test_a_random_mask_has_k_places_by_the_seed_and_needs_no_probe():
    base = sites(tiny_llama())
    (only,) = LTSFT().stages(config(k=500, mask="random"))

    def places(seed):
        torch.manual_seed(seed)
        return {path: part.index.tolist() for path, part in only.build(BuildContext(base, None)).items()}

    drawn = places(0)
    assert sum(map(len, drawn.values())) == 500 and drawn == places(0) != places(1)
    sizes = {site.path: site.outputs * site.inputs for site in select(base, "all-linear")}
    share = 500 / sum(sizes.values())  # each matrix gets its part, within five standard deviations
    assert all(abs(len(drawn.get(path, [])) - share * n) < 5 * (share * n) ** 0.5 for path, n in sizes.items())


@pytest.mark.parametrize(
    "options",
    [{"density": 0.0}, {"density": 1.5}, {"k": 0}, {"k": 10**9}, {"probe_share": 1.0}, {"l1": -1.0},
     {"target_modules": "norm"}, {"mask": "best"}],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        stages, given = LTSFT().stages(config(**options)), BuildContext(sites(tiny_llama()), None)
        stages[0].build(given)
        stages[-1].check(given)
    assert caught.value.hint
