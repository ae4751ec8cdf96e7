"""What adapters do to a base, written out by hand in float64: docs/guide/composition.md as a program, over the forms' formulas.

It knows plain tensors by their stored names (`<site path>.<form>.<n>.<tensor>`) and the parsed expression; nothing else of adapterhub."""

import copy
from functools import partial

import torch
from forms_by_hand import FORMS, vectors
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from adapterhub.spec.expression import Ensemble, Gate, Mix, Ref, Scale, Stack, references

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
            self.base.get_submodule(module).register_forward_pre_hook(partial(self._came, module), with_kwargs=True)
            self.base.get_submodule(module).register_forward_hook(partial(self._went, module))
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
        """What went into that site and what came out of it (None: not yet), in this forward pass."""
        path = self.reads[role, layer, part]
        x, y = self._seen[self.module(path)]
        return x, y[..., self.columns[path][1]] if path in self.columns else y

    def _came(self, path, module, args, kwargs):
        self._seen[path] = args[0] if args else kwargs["hidden_states"], None

    def _went(self, path, module, args, output):
        self._seen[path] = self._seen[path][0], output[0] if isinstance(output, tuple) else output

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
        return lambda x: torch.softmax(vectors(x, t["weight"].shape[1]) @ t["weight"].T + t["bias"], -1).movedim(-1, 0)[
            ..., None
        ]

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
