"""Linear layers that keep their weight in ways of their own, as quantising libraries do; small, and with none of those installed."""

import torch
from torch import nn
from torch.nn.functional import embedding, linear


class Codes(torch.Tensor):
    """int8 codes and a scale for each row behind a tensor that says it is float32, as torchao and optimum-quanto have it."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{cls.__name__} does not implement {func}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is linear:
            return linear(args[0], args[1].dequantize(), *args[2:])
        if func is embedding:
            return embedding(args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


class Mute(Codes):
    """The same without a way to read it."""

    dequantize = torch.Tensor.dequantize

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is linear:
            return linear(args[0], args[1].codes * args[1].scale, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


class IntegerLinear(nn.Linear):
    """An integer weight of the usual shape and a scale, multiplied by its own forward (bitsandbytes' 8 bits, W8A16)."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        codes, scale = coded(layer.weight)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), layer.bias
        self.register_buffer("scale", scale)

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """A buffer of packed 4 bit codes and no parameter at all (GPTQ, AWQ)."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, scale = coded(layer.weight, 7)
        nibbles = (codes + 8).to(torch.uint8)
        self.register_buffer("qweight", nibbles[:, ::2] | nibbles[:, 1::2] << 4)
        self.register_buffer("scales", scale)
        self.bias = None

    def forward(self, x):
        nibbles = torch.stack([self.qweight & 15, self.qweight >> 4], dim=-1).flatten(1)
        return linear(x, (nibbles.to(x.dtype) - 8) * self.scales.to(x.dtype))


class RoundingLinear(nn.Linear):
    """A plain weight that is rounded to 8 bits at each call (quantisation-aware training, BitNet, quanto before `freeze`)."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight

    def forward(self, x):
        codes, scale = coded(self.weight)
        return linear(x, codes * scale)


class IntegerEmbedding(nn.Embedding):
    """An embedding whose rows are integers."""

    def __init__(self, layer):
        super().__init__(layer.num_embeddings, layer.embedding_dim)
        codes, scale = coded(layer.weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, ids):
        return embedding(ids, self.weight) * embedding(ids, self.scale)


def coded(weight, largest=127):
    """(codes int8, scale of each row)."""
    scale = weight.detach().abs().amax(1, keepdim=True) / largest
    return (weight.detach() / scale).round().to(torch.int8), scale


def float8(layer):
    """A float8 weight as a plain parameter, with its scale, under a forward of its own (DeepSeek's checkpoints)."""
    made = IntegerLinear(layer)
    made.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 448
    made.weight = nn.Parameter((layer.weight.detach() / made.scale).to(torch.float8_e4m3fn), requires_grad=False)
    return made


def with_tensor(cls):
    def make(layer):
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.weight, made.bias = nn.Parameter(cls(*coded(layer.weight)), requires_grad=False), layer.bias
        return made

    return make


def parametrised(layer):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    layer.weight.data *= 2
    return nn.utils.parametrize.register_parametrization(layer, "weight", Halved())


KINDS = {
    "tensor": with_tensor(Codes), "mute": with_tensor(Mute), "integer": IntegerLinear, "packed": PackedLinear,
    "float8": float8, "parametrised": parametrised,
}  # fmt: skip
"""Name -> what makes such a layer of an nn.Linear. None has a plain weight."""
READABLE = {"tensor", "parametrised"}
"""Those that say what their numbers are."""


def replaced(model, kind, keep=("lm_head",)):
    """The model with its linear layers of this kind, in place; heads stay as quantising libraries leave them."""
    make = KINDS.get(kind, kind)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path.rpartition(".")[2] not in keep:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module))
    return model.requires_grad_(False)
