"""LoFiT: the laws, which heads are taken, that only they move, and what an offset is."""

import json

import numpy as np
import pytest
import torch
from adapterhub_lofit import LoFiT

import adapterhub
from adapterhub import BuildContext, Step, plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.errors import UsageError
from adapterhub.runtime.fold import fold
from adapterhub.sites import select, sites
from adapterhub.testing import check
from adapterhub.testing.bed import tiny_llama

HEADS, WIDTH = 4, 8
"""Of the tiny Llama, in each of its two layers."""


def config(**options):
    return plugins.options(LoFiT.Config, options)


@pytest.mark.long  # tests/test_laws.py runs them in the slow run
def test_laws():
    assert [f"{r.law}: {r.detail}" for r in check("lofit") if r.verdict == "failed"] == []


def test_the_heads_with_the_longest_gains_are_taken_over_all_layers():
    here = sites(tiny_llama())
    selecting, tune = LoFiT().stages(config(k=3))
    torch.manual_seed(0)
    gains = selecting.build(BuildContext(here, None))
    assert list(gains) == [site.path for site in select(here, "attention_output")]
    draw = np.random.default_rng(1).standard_normal((2, HEADS, WIDTH)).astype(np.float32)
    draw[1] *= 3  # all three lie in the second layer
    for part, values in zip(gains.values(), draw, strict=True):
        part.tensors["gain"] = torch.tensor(values.reshape(-1))
    wanted = np.sort(np.argsort(-np.linalg.norm(draw, axis=2).reshape(-1))[:3])
    (path, part), *rest = tune.build(BuildContext(here, None, gains)).items()
    assert not rest and path == "model.layers.1.self_attn.o_proj"
    assert part.heads == tuple(f"{head // HEADS}.{head % HEADS}" for head in wanted)
    outside = part.tensors["shift"].view(HEADS, WIDTH).any(1).tolist()
    assert outside == [HEADS + head in wanted for head in range(HEADS)]


def test_the_penalty_is_the_papers_l1():
    selecting, _ = LoFiT().stages(config(l1=0.25))
    gains = selecting.build(BuildContext(sites(tiny_llama()), None))
    for part in gains.values():
        part.tensors["gain"] = torch.full((HEADS * WIDTH,), -2.0)
    assert selecting.penalty(gains).item() == pytest.approx(0.25 * 2.0 * 2 * HEADS * WIDTH)


def test_an_offset_is_a_bias_after_the_output_projection():
    """W(z + v) = Wz + Wv, so it folds: the paper's fact, and the bias is W v to the last bits."""
    base = tiny_llama().double()
    (stage,) = LoFiT().stages(config(heads=["0.1", "0.3"]))
    ((path, part),) = stage.build(BuildContext(sites(base), None)).items()
    part.tensors["shift"] = torch.where(part.mask > 0, torch.randn(HEADS * WIDTH, dtype=torch.float64), 0.0)
    module, z = base.get_submodule(path), torch.randn(2, 5, HEADS * WIDTH, dtype=torch.float64)
    with torch.no_grad():
        want = module(z + part.delta_in(z, Step()))
        offset = module.weight.numpy() @ part.tensors["shift"].numpy()
        fold(base, {path: [part]})
        np.testing.assert_allclose(module.bias.numpy(), offset, rtol=1e-12)
        assert torch.allclose(module(z), want, rtol=1e-12)


def test_training_moves_the_chosen_heads_and_shares_the_selection(tiny_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)))
    hub = adapterhub.open(tmp_path / "hub", create=True)
    settings = {"steps": 12, "lr": 1e-2, "device": "cpu"}

    def train(name, **options):
        release = hub.train(str(tiny_folder), "lofit", path, name, options=options, **settings)
        heads = release.manifest.recipe["found"]["offsets"]["heads"]
        moved = {
            f"{name.split('.')[2]}.{head}"
            for name, t in Adapter.load(hub, release).tensors.items()
            if name.endswith("shift")
            for head in t.view(HEADS, WIDTH).any(1).nonzero()[:, 0].tolist()
        }
        assert moved == set(heads)
        return heads

    two, five = train("me/two", k=2), train("me/five", k=5)
    assert len(two) == 2 and len(five) == 5 and set(two) < set(five)
    assert len(list((hub.root / "training/stages").glob("*.safetensors"))) == 1  # one selection for both
    assert train("me/given", heads=five) == sorted(five)  # named as a recipe names them, and nothing is selected

    after = hub.train(str(tiny_folder), data=path, continue_from="me/two", steps=3, lr=1e-2, device="cpu")
    assert after.manifest.recipe["found"]["offsets"]["heads"] == two  # none is selected anew
    before, now = (Adapter.load(hub, hub.resolve(f"me/two@{version}")).tensors for version in ("0.1.0", after.version))
    for name in (name for name in before if name.endswith("shift")):
        assert torch.equal(before[name] != now[name], before[name] != 0)


def test_a_wrong_head_is_told_the_first_and_the_last_in_the_order_of_layers():
    """By the layers' numbers, not by their letters: 9.3 is not the last of twelve layers."""
    (stage,) = LoFiT().stages(config(heads=["12.0"]))
    with pytest.raises(UsageError) as caught:
        stage.build(BuildContext(sites(tiny_llama(num_hidden_layers=12)), None))
    assert caught.value.hint == "heads are named 0.0 to 11.3"


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 9}, {"heads": ["0.4"]}, {"heads": ["x"]}, {"select_share": 0.0}, {"l1": -1.0}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        stages, given = LoFiT().stages(config(**options)), BuildContext(sites(tiny_llama()), None)
        stages[0].build(given)
        stages[-1].check(given)
    assert caught.value.hint
