"""What adapters do to a base, written out by hand in float64: each form's formula, and docs/composition.md as a program.

It knows plain tensors by their stored names (`<site path>.<form>.<n>.<tensor>`) and the parsed expression; nothing else of adapterhub."""

import copy
import json
from functools import partial

import torch
from torch import nn
from torch.nn.functional import gelu, one_hot, relu, silu, tanh
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from adapterhub.expression import Ensemble, Gate, Mix, Ref, Scale, Stack, references

ACTIVATIONS = (relu, gelu, silu, tanh)
PARTS = ("", "encoder", "decoder", "cross")

# --- forms: {name: (tensors, what the base has there) -> (x -> what is added to x, (x, y) -> what is added to y)} ----------------


def affine(t, here):
    def change(h):
        return h * t.get("gain", 0) + t.get("shift", 0)

    return (change, None) if t["side"] else (None, lambda x, y: change(y))


def low_rank(t, here):
    return None, lambda x, y: t["scale"] * (_vectors(x, t["down"].shape[1]) @ t["down"].T @ t["up"].T)


def dense(t, here):
    return None, lambda x, y: _vectors(x, t["weight"].shape[1]) @ t["weight"].T + t.get("bias", 0)


def sparse(t, here):
    outputs, inputs = t["shape"].tolist()
    places = one_hot(t["index"].long(), outputs * inputs).to(t["values"])
    return None, lambda x, y: _vectors(x, inputs) @ (t["values"] @ places).view(outputs, inputs).T


def dora(t, here):
    v = here.weight + t["scale"] * t["up"] @ t["down"]
    changed = t["magnitude"][:, None] * v / v.square().sum(1, keepdim=True).sqrt().detach()
    return None, lambda x, y: _vectors(x, v.shape[1]) @ (changed - here.weight).T


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


def _vectors(x, count):
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


# --- programs: at one module, into(x) is what is added to x, and out(x, y) what is added to y, x being what came to the program -------


class Leaf:
    """One modification: it reads the input as it alone has changed it. At columns it sees and changes its own outputs only."""

    def __init__(self, into, out, columns=None):
        self._into, self._out, self.columns = into, out, columns

    def into(self, x):
        return self._into(x) if self._into else 0

    def out(self, x, y):
        if self._out is None:
            return 0
        seen = x + self.into(x)
        if self.columns is None:
            return self._out(seen, y)
        return torch.zeros_like(y).index_copy(-1, self.columns, self._out(seen, y[..., self.columns]))


class InTurn:
    """A stack: the last is outermost, so its change of x comes first, and its change of y last."""

    def __init__(self, parts):
        self.parts = parts

    def into(self, x):
        total = 0
        for part in reversed(self.parts):
            total = total + part.into(x + total)
        return total

    def out(self, x, y):
        came, total = [], 0
        for part in reversed(self.parts):
            came.insert(0, x)
            x = x + part.into(x)
        for part, seen in zip(self.parts, came, strict=True):
            total = total + part.out(seen, y + total)
        return total


class Together:
    """A weighed sum: all see the same x and y. weights: numbers, or shares(x) of a gate."""

    def __init__(self, weights, parts):
        self.weights, self.parts = weights, parts

    def _sum(self, x, changes):
        weights = self.weights(x) if callable(self.weights) else self.weights
        there = [w * change for w, change in zip(weights, changes, strict=True) if isinstance(change, torch.Tensor)]
        return sum(there[1:], there[0]) if there else 0

    def into(self, x):
        return self._sum(x, [part.into(x) for part in self.parts])

    def out(self, x, y):
        return self._sum(x, [part.out(x, y) for part in self.parts])


class ByHand:
    """A float64 base whose modules are called through these programs, and whose attention is written out.

    adapters: {name: {stored name: tensor}}, parts at a site in their order. columns: {site path: (its module's path, places
    among the module's outputs)}. reads: {(role, layer, part): site path}, of the sites whose states some forms read."""

    def __init__(self, base, adapters, columns, reads):
        AttentionInterface.register("by_hand", _attend)
        AttentionMaskInterface.register("by_hand", eager_mask)
        self.base = copy.deepcopy(base)
        self.base.set_attn_implementation("by_hand")
        self.columns = {path: (module, torch.tensor(places)) for path, (module, places) in columns.items()}
        self.reads, self._seen = reads, {}
        for module in {self.module(path) for path in reads.values()}:
            self.base.get_submodule(module).register_forward_hook(partial(self._see, module), with_kwargs=True)
        self.adapters = {}
        for name, tensors in adapters.items():
            self.put(name, tensors)

    def put(self, name, tensors):
        """Another adapter, or one anew."""
        parts = {}
        for stored, tensor in tensors.items():
            path, form, n, key = stored.rsplit(".", 3)
            wide = tensor.double() if tensor.is_floating_point() else tensor
            parts.setdefault(path, {}).setdefault((form, n), {})[key] = wide
        self.adapters[name] = parts

    def module(self, path):
        return self.columns[path][0] if path in self.columns else path

    def seen(self, role, layer, part=""):
        """What went into that site and what came out of it, in this forward pass."""
        path = self.reads[role, layer, part]
        x, y = self._seen[self.module(path)]
        return x, y[..., self.columns[path][1]] if path in self.columns else y

    def _see(self, path, module, args, kwargs, output):
        y = output[0] if isinstance(output, tuple) else output
        self._seen[path] = (args[0] if args else kwargs["hidden_states"], y)

    def leaf(self, path, form, tensors):
        return Leaf(*FORMS[form](tensors, _Here(self, path)), self.columns.get(path, (None, None))[1])

    def program(self, node, paths):
        """What an expression does at these sites of one module, the whole module first."""
        match node:
            case Ref(reference):
                parts = self.adapters[reference.name]
                return InTurn([self.leaf(p, form, t) for p in paths for (form, _), t in parts.get(p, {}).items()])
            case Scale(weight, inner):
                return Together([weight], [self.program(inner, paths)])
            case Stack(nodes):
                return InTurn([self.program(inner, paths) for inner in nodes])
            case Mix(nodes):
                return Together([1.0] * len(nodes), [self.program(inner, paths) for inner in nodes])
            case Gate(gate, nodes):
                at = [path for path in paths if any(path in self.acting(inner) for inner in nodes)]
                shares = [self.shares(gate.name, path) for path in at]
                children = [[self.program(inner, [path]) for inner in nodes] for path in at]
                return InTurn(list(map(Together, shares, children)))

    def acting(self, node):
        """The sites where it does something; a gate by itself does nothing."""
        inner = node.nodes if isinstance(node, Stack | Mix | Gate) else [node.node] if isinstance(node, Scale) else []
        paths = self.adapters[node.reference.name] if isinstance(node, Ref) else {}
        return {*paths, *(path for part in inner for path in self.acting(part))}

    def shares(self, gate, path):
        """x -> (children, ..., 1)."""
        t = self.adapters[gate][path]["gate", "0"]
        return lambda x: torch.softmax(_vectors(x, t["weight"].shape[1]) @ t["weight"].T + t["bias"], -1).movedim(
            -1, 0
        )[..., None]

    def lanes(self, node, path):
        """The attention as a weighed sum: (weight, memories beside the tokens)."""
        bare = [(1.0, [])]
        match node:
            case Ref(reference):
                parts = self.adapters[reference.name].get(path, {})
                return [(1.0, [(t["keys"], t["values"]) for (form, _), t in parts.items() if form == "prefix"])]
            case Scale(weight, inner):
                return [(1 - weight, []), *((weight * w, held) for w, held in self.lanes(inner, path))]
            case Stack(nodes):
                for inner in nodes:
                    bare = [(v * w, m + n) for v, m in bare for w, n in self.lanes(inner, path)]
                return bare
            case Mix(nodes):
                return [(1.0 - len(nodes), []), *(lane for inner in nodes for lane in self.lanes(inner, path))]
            case Gate():
                return bare

    def advance(self, node):
        """How many positions the tokens move up."""
        moves = {}
        for reference in references(node):  # stacked at full weight, else it is refused
            for path, parts in self.adapters[reference.name].items():
                for (form, _), t in parts.items():
                    if form == "prefix":
                        moves[path] = moves.get(path, 0) + int(t["shift"])
        return max(moves.values(), default=0)

    def __call__(self, node, given):
        """The logits of a parsed expression (None: the bare base)."""
        if isinstance(node, Ensemble):
            return sum(weight * self(inner, given) for weight, inner in node.lanes)
        if node is None:
            return self.base(**given).logits
        if advance := self.advance(node):
            given = given | {"position_ids": torch.arange(given["input_ids"].shape[1])[None] + advance}
        at = {}
        for path in self.acting(node):
            at.setdefault(self.module(path), set()).add(path)
        before = {path: self.base.get_submodule(path).__dict__.copy() for path in at}
        try:
            for path, sites in at.items():
                module = self.base.get_submodule(path)
                module.__dict__["lanes"] = self.lanes(node, path)
                module.__dict__["forward"] = _around(module, self.program(node, sorted(sites)))
            return self.base(**given).logits
        finally:
            for path, own in before.items():
                self.base.get_submodule(path).__dict__ = own
            self._seen.clear()


class _Here:
    """What a form may know of its place."""

    def __init__(self, whole, path):
        self._whole, self._path, self.seen = whole, path, whole.seen

    @property
    def weight(self):
        """The base's own, (outputs, inputs)."""
        module = self._whole.base.get_submodule(self._whole.module(self._path))
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        return weight[self._whole.columns[self._path][1]] if self._path in self._whole.columns else weight


def _around(module, program):
    inner, scale = module.forward, getattr(module, "embed_scale", 1)  # Gemma multiplies what it looks up

    def forward(*args, **kwargs):
        x = args[0] if args else kwargs.pop("hidden_states")
        came = inner(x + program.into(x), *args[1:], **kwargs)
        y = (came[0] if isinstance(came, tuple) else came) / scale
        y = (y + program.out(x, y)) * scale
        return (y, *came[1:]) if isinstance(came, tuple) else y

    return forward


def _attend(module, query, key, value, mask, scaling=None, position_bias=None, **kwargs):
    share = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    beside = torch.zeros(1) if mask is None else mask
    beside = beside + (0 if position_bias is None else position_bias)
    beside = beside.expand(len(query), query.shape[1], query.shape[2], key.shape[2])
    total = 0
    for weight, memories in module.__dict__.get("lanes", [(1.0, [])]):
        keys = torch.cat([*(k.expand(len(key), -1, -1, -1) for k, _ in memories), key], 2)
        values = torch.cat([*(v.expand(len(key), -1, -1, -1) for _, v in memories), value], 2)
        score = query @ keys.repeat_interleave(share, 1).mT * scaling
        score = score + nn.functional.pad(beside, (keys.shape[2] - key.shape[2], 0))
        total = total + weight * (score.softmax(-1) @ values.repeat_interleave(share, 1))
    return total.transpose(1, 2), None
