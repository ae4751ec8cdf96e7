"""What each form does, written out by hand from its definition in plain tensors: FORMS {name: (tensors, its place) -> (x -> what is
added to x, (x, y) -> what is added to y)}; None: nothing. Of the place a form may ask for the base's own weight (`here.weight`) and for
the states at another site in the same pass (`here.seen`)."""

import json

import torch
from torch.nn.functional import gelu, one_hot, relu, silu, tanh

ACTIVATIONS = (relu, gelu, silu, tanh)
PARTS = ("", "encoder", "decoder", "cross")


def affine(t, here):
    def change(h):
        return h * t.get("gain", 0) + t.get("shift", 0)

    return (change, None) if t["side"] else (None, lambda x, y: change(y))


def low_rank(t, here):
    return None, lambda x, y: t["scale"] * (vectors(x, t["down"].shape[1]) @ t["down"].T @ t["up"].T)


def dense(t, here):
    return None, lambda x, y: vectors(x, t["weight"].shape[1]) @ t["weight"].T + t.get("bias", 0)


def sparse(t, here):
    outputs, inputs = t["shape"].tolist()
    places = one_hot(t["index"].long(), outputs * inputs).to(t["values"])
    return None, lambda x, y: vectors(x, inputs) @ (t["values"] @ places).view(outputs, inputs).T


def dora(t, here):
    v = here.weight + t["scale"] * t["up"] @ t["down"]
    changed = t["magnitude"][:, None] * v / v.square().sum(1, keepdim=True).sqrt().detach()
    return None, lambda x, y: vectors(x, v.shape[1]) @ (changed - here.weight).T


def bottleneck(t, here):
    act = ACTIVATIONS[int(t["activation"])]

    def inner(h):
        return act(h @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]

    return None, lambda x, y: t["scale"] * inner(x if t["parallel"] else y)


def prefix(t, here):
    return None, None  # it is a memory: `ByHand.lanes`


def subspace(t, here):
    return None, lambda x, y: (y @ t["source"].T + t["bias"] - y @ t["basis"].T) @ t["basis"]


def conv_bottleneck(t, here):
    size = t["kernel"].shape[1]

    def inner(h):
        a, b = (_normed(h, t["norm"], t["norm_bias"]) @ t["down"].T + t["down_bias"]).chunk(2, -1)
        window = _window(a * torch.sigmoid(b), size, size - 1 if t["causal"] else size // 2)
        along = _normed((window * t["kernel"].T).sum(2) + t["kernel_bias"], t["inner"], t["inner_bias"])
        return (along * torch.sigmoid(along)) @ t["up"].T + t["up_bias"]

    return None, lambda x, y: t["scale"] * inner(x if t["parallel"] else y)


def soft_mixture(t, here):
    n, slots = t["slots"].shape[:2]

    def inner(h):
        votes = h @ t["slots"].flatten(0, 1).T  # (rows, tokens, experts * slots)
        read = (votes.softmax(1).mT @ h).unflatten(1, (n, slots))
        made = [
            gelu(read[:, k] @ t["down"][k].T + t["down_bias"][k]) @ t["up"][k].T + t["up_bias"][k] for k in range(n)
        ]
        return votes.softmax(2) @ torch.cat(made, 1)

    return None, lambda x, y: t["scale"] * inner(x if t["parallel"] else y)


def head_bottleneck(t, here):
    act, (query, layer, part) = ACTIVATIONS[int(t["activation"])], t["reads"].tolist()
    heads = list(zip(t["down"], t["up"], strict=True))

    def into(x):
        if query:
            reads = here.seen("query", layer, PARTS[part])[1].chunk(len(heads), -1)
        else:
            reads = [here.seen("attention", layer, PARTS[part])[0]] * len(heads)
        return torch.cat([t["scale"] * (act(q @ d.T) @ u.T) for q, (d, u) in zip(reads, heads, strict=True)], -1)

    return into, None


def levi(t, here):
    assert t["causal"], "only what looks back is written here"

    def votes():
        own = t["table"][here.seen("embedding", None)[0]]
        for kernel, offset in zip(t["kernel"], t["offset"], strict=True):
            own = own + relu(torch.einsum("rtkc,kcd->rtd", _window(own, len(kernel), len(kernel) - 1), kernel) + offset)
        for n, layer in enumerate(t["layers"].tolist()):
            view = torch.cat([_root(here.seen("block", layer)[1]), _root(own)], -1)
            yield relu(view @ t["down"][n].T + t["bias"][n]) @ t["head"][n].T

    shares = t["weights"].softmax(0) if "weights" in t else [1 / len(t["layers"])] * len(t["layers"])
    return None, lambda x, y: sum(s * v for s, v in zip(shares, votes(), strict=True)) - (y if t["replace"] else 0)


def peft(t, here):
    told = json.loads(bytes(t["config"].tolist()))
    assert told["type"] == "VERA", "of PEFT's layers the one that its form gives as its random example is written here"
    a, b, d, out = (
        t[next(k for k, name in told["names"].items() if f"vera_{which}." in name)]
        for which in ("A", "B", "lambda_d", "lambda_b")
    )
    inputs, outputs = len(here.weight.T), len(here.weight)
    return None, lambda x, y: out * ((d * (x @ a[:, :inputs].T)) @ b[:outputs].T)


FORMS = {
    form.__name__: form
    for form in (
        affine, bottleneck, conv_bottleneck, dense, dora, head_bottleneck, levi, low_rank, peft, prefix, soft_mixture, sparse, subspace
    )
}  # fmt: skip


def vectors(x, count):
    """Token ids as the one-hot rows that they stand for."""
    return x if x.is_floating_point() else one_hot(x, count).double()


def _normed(h, weight, bias):
    spread = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return spread * weight + bias


def _root(h):
    return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _window(h, size, before):
    """`size` tokens at each token, `before` of them before it, zeros outside: (rows, tokens, size, width)."""
    wide = torch.cat(
        [h.new_zeros(len(h), before, h.shape[2]), h, h.new_zeros(len(h), size - 1 - before, h.shape[2])], 1
    )
    return torch.stack([wide[:, k : k + h.shape[1]] for k in range(size)], 2)
