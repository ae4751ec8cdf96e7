"""What docs/guide/composition.md says a factor means where one adapter has several parts at one module, against products of matrices in float64."""

import pytest
import torch

import adapterhub
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.forms.affine import Affine
from adapterhub.forms.low_rank import LowRank
from adapterhub.sites import sites
from adapterhub.testing.families import tiny

IDS = torch.tensor([[3, 4, 5, 6]])


def gain(site):
    return Affine.of(gain=0.5 * torch.randn(site.outputs))


def logits(tmp_path, family, adapter, expression):
    """Of a tiny model that runs the expression, in which `a` is the adapter."""
    base = tiny(family).double()
    hub, printed = adapterhub.open(tmp_path / "hub", create=True), fingerprint(base)
    publish_tensors(hub, adapter, name="a", base=printed.base, sketch=printed.sketch)
    with torch.no_grad():
        return hub.load(base)(IDS, adapters=expression).logits


def by_hand(family, path, change):
    """Of the same model, whose module at `path` puts out y + change(x, y)."""
    base = tiny(family).double()
    module = base.get_submodule(path)
    plain = module.forward
    module.forward = lambda x: (y := plain(x)) + change(x, y)
    with torch.no_grad():
        return base(IDS).logits


def times(low):
    matrix = low.scale.double() * low.up.double() @ low.down.double()
    return lambda x: x @ matrix.T


@pytest.mark.parametrize("weight", [0.5, -1.0, 2.0])
@pytest.mark.parametrize("order", ["gain first", "low rank first"])
def test_half_of_an_adapter_is_half_of_what_its_parts_do_together(tmp_path, order, weight):
    """And not the parts halved one by one: a gain sees what the parts before it put out."""
    torch.manual_seed(0)
    path = "model.layers.0.self_attn.q_proj"
    site = next(site for site in sites(tiny("llama")) if site.path == path)
    part, low = gain(site), LowRank.random(site)
    g, matrix = part.gain.double(), times(low)
    got = logits(tmp_path, "llama", {path: [part, low] if order == "gain first" else [low, part]}, f"{weight}*a")

    def together(x, y):
        return weight * (matrix(x) + g * (y if order == "gain first" else y + matrix(x)))

    def one_by_one(x, y):
        return weight * matrix(x) + weight * g * (y + weight * matrix(x))

    torch.testing.assert_close(got, by_hand("llama", path, together), rtol=0, atol=1e-12)
    if order == "low rank first":
        assert (got - by_hand("llama", path, one_by_one)).abs().max() > 1e-6


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_at_a_fused_projection_columns_see_what_the_same_adapter_did_to_the_whole_and_both_are_halved_together(
    tmp_path, weight
):
    """GPT-2's c_attn: low rank at the whole of it, a gain at its query columns."""
    torch.manual_seed(0)
    found = {site.path: site for site in sites(tiny("gpt2"))}
    whole = found["transformer.h.0.attn.c_attn"]
    query = found["transformer.h.0.attn.c_attn.query"]
    part, low = gain(query), LowRank.random(whole)
    got = logits(tmp_path, "gpt2", {query.path: [part], whole.path: [low]}, f"{weight}*a")
    matrix, columns = times(low), torch.tensor(query.columns.index())

    def change(x, y):
        made = matrix(x)
        made[..., columns] += part.gain.double() * (y + made)[..., columns]
        return weight * made

    torch.testing.assert_close(got, by_hand("gpt2", whole.path, change), rtol=0, atol=1e-12)
