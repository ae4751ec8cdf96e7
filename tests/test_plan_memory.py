"""What a model keeps from batch to batch does not grow with the variety of batches."""

import gc
import random

import pytest
import torch

import adapterhub
from adapterhub.adapters.publish import publish_tensors
from adapterhub.forms.low_rank import LowRank
from adapterhub.runtime.model import Model

ROWS, ORDERS, RANK = 8, 40, 16
IDS = torch.arange(3, 3 + 2 * ROWS).reshape(ROWS, 2)


def bytes_alive():
    """Of all tensors in this process; what several share counts once."""
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def with_adapters(model: Model) -> list[str]:
    """ROWS LoRAs at every linear module in the model's hub; their names."""
    torch.manual_seed(0)
    names = [f"me/{i}" for i in range(ROWS)]
    for name in names:
        parts = {
            site.path: [
                LowRank(
                    down=torch.randn(RANK, site.inputs) * site.inputs**-0.5,
                    up=torch.randn(site.outputs, RANK) * 0.02,
                    scale=torch.tensor(1.0),
                )
            ]
            for site in model.sites
            if site.linear and site.role != "head"
        }
        publish_tensors(model.hub, parts, name=name, base=model.fingerprint.base, sketch=model.fingerprint.sketch)
    return names


def orders(names):
    """Forty of the 40,320 orders."""
    shuffled = random.Random(0)
    found = dict.fromkeys(tuple(shuffled.sample(names, ROWS)) for _ in range(2 * ORDERS))
    return [list(order) for order in found][:ORDERS]


@torch.no_grad()
def growth(model: Model) -> float:
    """By what part of all that a model, its adapters and its first batch hold, forty orders of the adapters add to it."""
    names = with_adapters(model)
    mixes = orders(names)
    assert len(mixes) == ORDERS
    model(input_ids=IDS, adapters=mixes[0])
    first = bytes_alive()
    for mix in mixes[1:]:
        model(input_ids=IDS, adapters=mix)
    return (bytes_alive() - first) / first


def test_forty_orders_of_eight_adapters(tmp_path, tiny_model, tiny_saved):
    base = tiny_saved(tmp_path / "base", tiny_model(hidden_size=128, intermediate_size=256))
    model = adapterhub.open(tmp_path / "hub", create=True).load(base, device="cpu")
    assert growth(model) < 0.05


@pytest.mark.slow
def test_forty_orders_of_eight_adapters_on_smollm2(tmp_path):
    model = adapterhub.open(tmp_path / "hub", create=True).load("smollm2", dtype="float32", device="cpu")
    assert growth(model) < 0.05


def test_bytes_alive_are_those_of_tensors():
    before = bytes_alive()
    kept = [torch.zeros(1000), torch.nn.Parameter(torch.zeros(500))]
    kept.append(kept[0][10:])
    assert bytes_alive() - before == 6000
