"""What a module's weight is: plain, or kept in a way of its own."""

import odd_weights
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterhub.errors import IncompatibleBase
from adapterhub.sites.weights import compute_device, compute_dtype, computes, matrix, unlike, values, widths


def layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(12, 8, bias=bias)


def test_plain_weights_are_views_outputs_by_inputs():
    linear, conv, table = layer(), Conv1D(8, 12), nn.Embedding(12, 8)
    for module, stored in ((linear, linear.weight), (conv, conv.weight.mT), (table, table.weight.mT)):
        assert widths(module) == (8, 12)
        assert unlike(module) == ""
        assert matrix(module).shape == (8, 12)
        assert matrix(module).data_ptr() == stored.data_ptr()
        assert torch.equal(values(module), stored)
        assert computes(module)


def test_what_is_no_matrix_has_none():
    assert matrix(nn.LayerNorm(4)) is None
    assert widths(nn.Sequential(nn.Linear(2, 2))) is None


@pytest.mark.parametrize("kind", odd_weights.KINDS)
def test_other_weights_are_told_apart(kind):
    plain = layer(bias=False)
    before = plain.weight.detach().clone()
    odd = odd_weights.KINDS[kind](plain)
    assert widths(odd) == (8, 12)
    assert unlike(odd)
    assert matrix(odd) is None
    assert not computes(odd)
    if kind not in odd_weights.READABLE:
        with pytest.raises(IncompatibleBase, match="not known"):
            values(odd)
        return
    assert torch.allclose(values(odd), before, atol=float(before.abs().max()) / 200)
    assert torch.equal(odd(torch.eye(12)), torch.nn.functional.linear(torch.eye(12), values(odd)))


def test_a_float_weight_of_another_shape_is_packed():
    module = odd_weights.IntegerLinear(layer())
    module.weight = nn.Parameter(torch.zeros(48, 1))
    assert "(48, 1)" in unlike(module)


def test_a_shape_that_torch_multiplies_with_is_the_layers_own():
    head = layer(bias=False)
    head.weight = nn.Parameter(torch.randn(5, 12))  # a vocabulary cut without telling the layer
    assert widths(head) == (5, 12) and matrix(head).shape == (5, 12)


def test_a_weight_that_stands_in_for_one_call_is_not_the_own():
    module = layer()
    module.__dict__["weight"] = torch.zeros(8, 12)
    assert torch.equal(matrix(module), module._parameters["weight"])


def test_whether_a_layer_computes_with_its_weight_is_tried():
    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    class Normed(nn.Embedding):
        def forward(self, ids):
            return nn.functional.normalize(super().forward(ids), dim=-1)

    for dtype in (torch.float32, torch.bfloat16):
        assert computes(Own(12, 8).to(dtype)) and computes(Scaled(12, 8).to(dtype))
        assert not computes(Normed(12, 8).to(dtype))
        assert not computes(odd_weights.RoundingLinear(layer(bias=False)).to(dtype))
    patched = layer()
    patched.forward = lambda x: torch.zeros(*x.shape[:-1], 8)
    assert not computes(patched)


def test_meta_weights_have_no_numbers():
    with torch.device("meta"):
        bare = nn.Linear(12, 8)
    assert matrix(bare).is_meta
    with pytest.raises(IncompatibleBase, match="meta device"):
        values(bare)


def test_an_offloaded_weight_is_fetched():
    from accelerate import cpu_offload

    module = layer()
    own = module.weight.detach().clone()
    cpu_offload(nn.Sequential(module), execution_device=torch.device("cpu"))
    assert matrix(module).is_meta
    assert torch.equal(values(module), own)


def test_where_and_in_what_a_module_computes():
    packed = odd_weights.PackedLinear(layer(bias=False))
    assert compute_device(packed) == torch.device("cpu")
    assert compute_dtype(packed) == torch.float32  # its scales
    assert compute_dtype(odd_weights.float8(layer(bias=False))) == torch.float32
    assert compute_dtype(nn.Identity()) is None and compute_device(nn.Identity()) is None
    with torch.device("meta"):
        assert compute_device(nn.Linear(2, 2)) is None
