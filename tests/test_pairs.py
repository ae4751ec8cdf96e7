"""Every ordered pair of installed methods: stacked, mixed, gated, routed, folded, merged, saved, and the second trained on
over the first. Each equals what is computed by hand below, or is refused as the table REFUSED says.

`python tests/test_pairs.py` rewrites docs/pairs.md, which shows the outcome.
"""

import copy
import math
import os
import sys
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch.nn.functional import one_hot
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import adapterhub
from adapterhub import plugins
from adapterhub.adapter import Adapter
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import HubError, NotFoldable, NotMergeable, UsageError
from adapterhub.forms.bottleneck import ACTIVATIONS
from adapterhub.gate import Gate
from adapterhub.manifest import Made
from adapterhub.merge import merge
from adapterhub.publish import publish_tensors
from adapterhub.runtime import Model
from adapterhub.sites import matrix
from adapterhub.stages import attach, given, measure, trained
from adapterhub.testing.bed import distance, padded, tiny_llama
from adapterhub.testing.methods import setting_of

os.environ.setdefault("ADAPTERHUB_PLUGINS", "*")  # as in the tests, where this is run as a script
PAGE = Path(__file__).parent.parent / "docs" / "pairs.md"
EXACT, ROUNDED = 1e-9, 1e-5
"""Of the largest number: in float64, and where float32 tensors are stored or trained on the way."""
OPTIONS = {
    "dora": ("lora", {"use_dora": True}),
    "mh_parallel": ("unified", {"preset": "mh-parallel"}),
}
"""What is tried besides each method's defaults."""

# --- what may be refused -------------------------------------------------------------------------------------------

NO_WEIGHT = {"bottleneck", "conv_adapter", "levi", "loreft", "mh_parallel", "prefix", "unified"}
"""Their forms are no change of a weight."""
REFUSED = {
    "fold": (NotFoldable, lambda a, b: {a, b} & NO_WEIGHT),
    "merge": (NotMergeable, lambda a, b: {a, b} & NO_WEIGHT),
    "gate": (UsageError, lambda a, b: {a, b} & {"prefix", "unified", "peft_trainable_tokens"}),
}
"""Operation -> how it is refused, and for which pairs; anything else that is refused, or is not refused, fails."""

# --- by hand: what each form does, as functions of the site's input x and output y ---------------------------------


def by_hand(form, t, w, seen):
    """(x -> what is added to x, (x, y) -> what is added to y), from its tensors and the base's weight there; or a memory.
    seen: what has gone into and come out of the modules so far, (inputs, outputs) by path."""
    if form == "prefix":
        return t["keys"], t["values"]
    if form == "affine":
        change = lambda h: h * t.get("gain", 0) + t.get("shift", 0)  # noqa: E731
        return (change, None) if t["side"] else (None, lambda x, y: change(y))
    if form == "low_rank":
        return None, lambda x, y: t["scale"] * (x @ t["down"].T @ t["up"].T)
    if form == "dense":
        return None, lambda x, y: _vectors(x, t["weight"].shape[1]) @ t["weight"].T + t.get("bias", 0)
    if form == "sparse":
        delta = (one_hot(t["index"].long(), math.prod(t["shape"].tolist())) * t["values"][:, None]).sum(0)
        outputs, inputs = t["shape"].tolist()
        return None, lambda x, y: _vectors(x, inputs) @ delta.view(outputs, inputs).T
    if form == "dora":
        v = w + t["scale"] * t["up"] @ t["down"]
        changed = t["magnitude"][:, None] * v / v.square().sum(1, keepdim=True).sqrt().detach()
        return None, lambda x, y: x @ (changed - w).T
    if form == "bottleneck":
        act = list(ACTIVATIONS.values())[int(t["activation"])]
        inner = lambda h: act(h @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]  # noqa: E731
        return None, lambda x, y: t["scale"] * inner(x if t["parallel"] else y)
    if form == "subspace":
        return None, lambda x, y: (y @ t["source"].T + t["bias"] - y @ t["basis"].T) @ t["basis"]
    if form == "conv_bottleneck":
        return None, lambda x, y: t["scale"] * _convolved(t, x if t["parallel"] else y)
    if form == "head_bottleneck":
        act, (query, layer, _) = list(ACTIVATIONS.values())[int(t["activation"])], t["reads"].tolist()

        def heads(x):
            read = (
                seen[f"model.layers.{layer}.self_attn.q_proj"][1]
                if query
                else seen[f"model.layers.{layer}.self_attn"][0]
            )
            each = read.chunk(len(t["down"]), -1) if query else [read] * len(t["down"])
            return torch.cat(
                [t["scale"] * (act(q @ d.T) @ u.T) for q, d, u in zip(each, t["down"], t["up"], strict=True)], -1
            )

        return heads, None
    if form == "levi":
        return None, lambda x, y: _levi(t, seen) - (y if t["replace"] else 0)
    raise AssertionError(f"the form {form!r} has no reference here: write it")


def _vectors(x, count):
    """Token ids as the rows that they stand for."""
    return x if x.is_floating_point() else one_hot(x, count).double()


def _normed(h, weight, bias):
    spread = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return spread * weight + bias


def _before(h, size):
    """The last `size` tokens at each token, zeros before the first: (rows, tokens, size, width)."""
    wide = torch.cat([h.new_zeros(len(h), size - 1, h.shape[2]), h], 1)
    return torch.stack([wide[:, k : k + h.shape[1]] for k in range(size)], 2)


def _convolved(t, h):
    a, b = (_normed(h, t["norm"], t["norm_bias"]) @ t["down"].T + t["down_bias"]).chunk(2, -1)
    along = (_before(a * torch.sigmoid(b), t["kernel"].shape[1]) * t["kernel"].T).sum(2) + t["kernel_bias"]
    inner = _normed(along, t["inner"], t["inner_bias"])
    return (inner * torch.sigmoid(inner)) @ t["up"].T + t["up_bias"]


def _levi(t, seen):
    def root(h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    own = t["table"][seen["model.embed_tokens"][0]]
    for kernel, offset in zip(t["kernel"], t["offset"], strict=True):
        own = own + torch.relu(sum(_before(own, len(kernel))[:, :, k] @ kernel[k] for k in range(len(kernel))) + offset)
    votes = []
    for n, layer in enumerate(t["layers"].tolist()):
        view = torch.cat([root(seen[f"model.layers.{layer}"][1]), root(own)], -1)
        votes.append(torch.relu(view @ t["down"][n].T + t["bias"][n]) @ t["head"][n].T)
    return sum(votes) / len(votes)


def program(hand, *groups):
    """{path: groups there}: one group after another, in each (weight or gate, adapter) side by side."""
    paths = dict.fromkeys(path for group in groups for _, name in group for path in hand[name])
    return {
        path: [
            [(w(path, i) if callable(w) else w, hand[name].get(path)) for i, (w, name) in enumerate(g)] for g in groups
        ]
        for path in paths
    }


READ = ["model.embed_tokens"] + [
    f"model.layers.{n}{part}" for n in range(2) for part in ("", ".self_attn", ".self_attn.q_proj")
]
"""The modules whose states others read."""


class ByHand:
    """A base whose modules are called through plain closures, and whose attention is written out."""

    def __init__(self, base):
        self.base = copy.deepcopy(base)
        AttentionInterface.register("by_hand", _attend)
        AttentionMaskInterface.register("by_hand", lambda *args, **kwargs: None)
        self.base.set_attn_implementation("by_hand")
        self.seen = {}
        for path in READ:
            self.base.get_submodule(path).register_forward_hook(partial(self.see, path), with_kwargs=True)

    def see(self, path, module, args, kwargs, output):
        self.seen[path] = (
            args[0] if args else kwargs["hidden_states"],
            output[0] if isinstance(output, tuple) else output,
        )

    def __call__(self, groups, ids):
        for path, here in groups.items():
            module = self.base.get_submodule(path)
            module.__dict__["lanes"] = _lanes(here)
            for group in here:
                module.forward = _around(module.forward, [(w, p) for w, p in group if _moves(p)])
        try:
            return self.base(ids[None]).logits[0]
        finally:
            for path in groups:
                module = self.base.get_submodule(path)
                module.__dict__.pop("lanes")
                module.__dict__.pop("forward", None)


def _moves(part):
    return part is not None and not isinstance(part[0], torch.Tensor)


def _around(inner, group):
    def forward(*args, **kwargs):
        x = args[0] if args else kwargs.pop("hidden_states")
        shares = [w(x) if callable(w) else w for w, _ in group]
        moved = x + sum(s * into(x) for s, (_, (into, _)) in zip(shares, group, strict=True) if into)
        y = inner(moved, *args[1:], **kwargs)
        y, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        y = y + sum(s * out(x, y) for s, (_, (_, out)) in zip(shares, group, strict=True) if out)
        return y if rest is None else (y, *rest)

    return forward


def _lanes(groups):
    lanes = [(1.0, [])]
    for group in groups:
        beside = [(w, p) for w, p in group if p is not None and not _moves(p)]
        terms = [(1 - sum(w for w, _ in beside), []), *((w, [p]) for w, p in beside)] if beside else [(1.0, [])]
        lanes = [(v * w, m + n) for v, m in lanes for w, n in terms]
    return lanes


def _attend(module, query, key, value, mask, scaling, **kwargs):
    tokens, share = query.shape[2], query.shape[1] // key.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    total = 0
    for weight, memories in module.__dict__.get("lanes", [(1.0, [])]):
        keys = torch.cat([*(m[0][None] for m in memories), key], 2).repeat_interleave(share, 1)
        values = torch.cat([*(m[1][None] for m in memories), value], 2).repeat_interleave(share, 1)
        beside = torch.ones(tokens, keys.shape[2] - tokens, dtype=torch.bool)
        score = (query @ keys.mT * scaling).masked_fill(~torch.cat([beside, causal], 1), -math.inf)
        total = total + weight * (score.softmax(-1) @ values)
    return total.transpose(1, 2), None


# --- the bed: one base, one hub, two adapters of each method -------------------------------------------------------


def names():
    """The methods that make adapters, and DoRA; a gate weighs others: it is an operation here."""
    parts = {name: plugins.load("methods", name) for name in plugins.names("methods")}
    methods = {name: (name, {}) for name, part in parts.items() if not part.weighs and not part.bidirectional}
    return dict(sorted((methods | OPTIONS).items()))


def bridged():
    """One of PEFT's types for each family, trained by the method `peft`."""
    sys.path.insert(0, str(PAGE.parents[1] / "plugins" / "adapterhub-peft"))
    from peft_outcomes import FAMILIES

    return {f"peft_{kind.lower()}": ("peft", options) for kind, options in sorted(FAMILIES.items())}


class Bed:
    def __init__(self):
        self.base = tiny_llama().double().requires_grad_(False)
        self.print = fingerprint(tiny_llama())
        self.hub = adapterhub.open(Path(mkdtemp()) / "hub", create=True)
        self.model = Model(self.base, hub=self.hub, fingerprint=self.print)
        self.reference = ByHand(self.base)
        self.sequences = [torch.arange(3 + row, 3 + row + n) % 90 + 3 for row, n in enumerate((9, 6, 8, 7))]
        self.hand = {}
        self.gate = self.publish_gate()

    def ensure(self, name):
        """Two adapters of it in the hub."""
        if f"{name}-1" not in self.hand:
            method, options = (names() | bridged())[name]
            for seed in (1, 2):
                self.publish(f"{name}-{seed}", method, options, seed)

    def publish(self, name, method, options, seed):
        """Trained-looking: what the method's stages build, every trained tensor moved at random."""
        part = plugins.load("methods", method)
        config = plugins.options(part.Config, options)
        fresh, before = Model(tiny_llama().requires_grad_(False)), {}
        for stage in part().stages(config):
            measured, _ = measure(stage.measurement, setting_of(fresh), Path(mkdtemp()), {})
            begun = given(fresh, before, measured)
            attach(fresh, stage, begun, seed)
            with torch.no_grad():
                for tensor in fresh.trainable_parameters():
                    tensor += torch.randn_like(tensor) * (
                        0.03 if method == "peft" else 0.5 if tensor.ndim == 3 else 0.1
                    )
                if stage.after_step:
                    stage.after_step({path: one for path, [one] in fresh.new_modifications().items()})
            before = trained(fresh) if stage.finish is None else stage.finish(trained(fresh), begun)
        fresh.attach_new(before)
        made = Made(name=method, options=options, distribution=plugins.distribution("methods", method))
        self.put(name, fresh.new_modifications(), method=made)
        self.hand[name] = self.read(f"me/{name}@0.1.0")

    def put(self, name, parts, **fields):
        return publish_tensors(
            self.hub, parts, name=f"me/{name}", base=self.print.base, sketch=self.print.sketch, **fields
        )

    def read(self, key, leaves=None):
        """By hand, from the stored tensors (leaves: these in their place, to differentiate)."""
        tensors = leaves or {n: t for n, t in Adapter.load(self.hub, self.hub.resolve(key)).tensors.items()}
        grouped = {}
        for name, tensor in tensors.items():
            path, form, n, key = name.rsplit(".", 3)
            assert n == "0", "one of a form at a site"
            grouped.setdefault(path, {}).setdefault(form, {})[key] = (
                tensor.double() if tensor.is_floating_point() else tensor
            )
        made = {}
        for path, forms in grouped.items():
            ((form, held),) = forms.items()
            made[path] = by_hand(form, held, matrix(self.base.get_submodule(path)), self.reference.seen)
        return made

    def publish_gate(self):
        """A gate over two at every site but the head's and the embedding's; its shares by hand."""
        torch.manual_seed(5)
        sites = [site for site in self.model.sites if site.role != "embedding"]
        gates = {s.path: Gate(weight=torch.randn(2, s.inputs), bias=torch.randn(2)) for s in sites}
        self.put("gate", {path: [gate] for path, gate in gates.items()})

        def shares(path, child):
            w, b = gates[path].weight.double(), gates[path].bias.double()
            return lambda x: torch.softmax(x @ w.T + b, -1)[..., child, None]

        return shares

    @torch.no_grad()
    def run(self, expression):
        return self.model(input_ids=self.sequences[0][None], adapters=expression).logits[0]

    @torch.no_grad()
    def want(self, *groups, row=0, hand=None):
        return self.reference(program(hand or self.hand, *groups), self.sequences[row])


@cache
def bed():
    torch.set_num_threads(1)
    return Bed()


# --- the operations: what we give, and what it must be --------------------------------------------------------------


def stack(bed, a, b, name):
    return bed.run(f"me/{a}@0.1.0 + me/{b}@0.1.0"), bed.want([(1.0, a)], [(1.0, b)])


def mix(bed, a, b, name):
    return bed.run(f"mix(0.3*me/{a}@0.1.0, 0.7*me/{b}@0.1.0)"), bed.want([(0.3, a), (0.7, b)])


def gate(bed, a, b, name):
    return bed.run(f"gate(me/gate, me/{a}@0.1.0, me/{b}@0.1.0)"), bed.want([(bed.gate, a), (bed.gate, b)])


def route(bed, a, b, name):
    """Four padded rows: one, the other, half of their stack's first on the second, the base."""
    ids, mask = padded(bed.sequences, "left")
    rows = [f"me/{a}@0.1.0", f"me/{b}@0.1.0", f"0.5*me/{a}@0.1.0 + me/{b}@0.1.0", None]
    with torch.no_grad():
        logits = bed.model(input_ids=ids, attention_mask=mask, adapters=rows).logits
    programs = [[[(1.0, a)]], [[(1.0, b)]], [[(0.5, a)], [(1.0, b)]], []]
    want = [bed.want(*groups, row=row) for row, groups in enumerate(programs)]
    return torch.cat([logits[row][mask[row].bool()] for row in range(4)]), torch.cat(want)


def fold(bed, a, b, name):
    model = Model(copy.deepcopy(tiny_llama().double().requires_grad_(False)), hub=bed.hub, fingerprint=bed.print)
    model.use(f"me/{a}@0.1.0 + me/{b}@0.1.0")
    with torch.no_grad():
        return model.fold()(bed.sequences[0][None]).logits[0], bed.want([(1.0, a)], [(1.0, b)])


def merged(bed, a, b, name):
    """The weighted sum of the changes of each weight, by hand from what each adapter makes of nothing and of a one."""
    merge(bed.hub, [f"me/{a}@0.1.0", f"me/{b}@0.1.0"], weights=[0.3, 0.7], name=f"me/merged-{name}", base=tiny_llama())
    own = copy.deepcopy(bed.base)
    for weight, one in ((0.3, a), (0.7, b)):
        for path, (into, out) in bed.hand[one].items():
            module, base = own.get_submodule(path), bed.base.get_submodule(path)
            if isinstance(base, torch.nn.Embedding):
                module.weight += weight * out(torch.arange(base.num_embeddings), base.weight)
                continue
            x = torch.cat([torch.zeros(1, base.in_features), torch.eye(base.in_features)]).double()
            y = base(x + into(x) if into else x)
            change = (y + out(x, y) if out else y) - base(x)
            if module.bias is None:
                module.bias = torch.nn.Parameter(torch.zeros(base.out_features).double(), requires_grad=False)
            module.bias += weight * change[0]
            module.weight += weight * (change[1:] - change[0]).T
    with torch.no_grad():
        return bed.run(f"me/merged-{name}"), own(bed.sequences[0][None]).logits[0]


def save(bed, a, b, name):
    """As a composition, read again from the folder by another hub object."""
    bed.hub.compose(f"0.7*me/{a}@0.1.0 + me/{b}@0.1.0", name=f"me/saved-{name}")
    again = Model(bed.base, hub=adapterhub.open(bed.hub.root), fingerprint=bed.print)
    again.use(f"me/saved-{name}")
    with torch.no_grad():
        return again(input_ids=bed.sequences[0][None]).logits[0], bed.want([(0.7, a)], [(1.0, b)])


def go_on(bed, a, b, name):
    """A gradient step of the second over the first, which stays as it is: the same step by hand, and what is saved."""
    ids = bed.sequences[0][None]
    model = Model(bed.base, hub=bed.hub, fingerprint=bed.print)
    model.use(f"me/{a}@0.1.0 + me/{b}@0.1.0", trainable=[f"me/{b}@0.1.0"])
    leaves = {
        n: t.requires_grad_() if n in model.trainable_tensors() else t
        for n, t in Adapter.load(bed.hub, bed.hub.resolve(f"me/{b}@0.1.0")).tensors.items()
    }
    hand = bed.hand | {"trained": bed.read("", leaves)}
    model(input_ids=ids).logits.square().mean().backward()
    bed.reference(program(hand, [(1.0, a)], [(1.0, "trained")]), ids[0]).square().mean().backward()
    got, want = [], []
    with torch.no_grad():
        for n, parameter in model.trainable_tensors().items():
            size = max(float(leaves[n].grad.abs().max()), 1e-12)
            got.append((parameter.grad / size).flatten())
            want.append((_trains(b, n, leaves[n]) / size).flatten())
            parameter -= 0.01 * parameter.grad / size
        model.after_step()
    release = model.save(f"me/{b}")
    stored = Adapter.load(bed.hub, release).tensors
    assert all(torch.equal(stored[n], t.detach()) for n, t in model.trainable_tensors().items())
    return torch.cat(got), torch.cat(want)


def _trains(adapter, name, tensor):
    """The gradient by hand of what a method trains, 0 where its numbers stay: of LoFiT the heads that were taken, of CorDA the
    first halves, with which the second one of `down` moves."""
    if adapter.startswith("lofit"):
        return tensor.grad * (tensor != 0)
    if adapter.startswith("corda"):
        down = name.endswith("down")
        first, second = tensor.grad.chunk(2, dim=0 if down else 1)
        return torch.cat([first + second if down else first, 0 * second], dim=0 if down else 1)
    return tensor.grad


OPERATIONS = {
    "stack": (stack, EXACT),
    "mix": (mix, EXACT),
    "gate": (gate, EXACT),
    "route": (route, EXACT),
    "fold": (fold, EXACT),
    "merge": (merged, ROUNDED),
    "save": (save, EXACT),
    "continue": (go_on, ROUNDED),
}


@cache
def outcome(a, b):
    """{operation: "" where it is the reference, "refused" where that is allowed, else what is wrong}."""
    bed().ensure(a)
    bed().ensure(b)
    told = {}
    for name, (operation, tolerance) in OPERATIONS.items():
        error, who = REFUSED.get(name, (None, None))
        refused = bool(who and who(a, b))
        try:
            got, want = operation(bed(), f"{a}-1", f"{b}-2", f"{a}-{b}")
        except HubError as problem:
            as_told = refused and isinstance(problem, error) and problem.hint
            told[name] = "refused" if as_told else f"{type(problem).__name__}: {problem}"
            continue
        apart = distance(got, want)
        told[name] = "it is not refused" if refused else "" if apart <= tolerance else f"off by {apart:.1e}"
    return told


def wrong(pairs):
    """{"first, second: operation": what is wrong with it}"""
    return {
        f"{first}, {second}: {operation}": said
        for first, second in pairs
        for operation, said in outcome(first, second).items()
        if said not in ("", "refused")
    }


def told(found):
    return "\n".join(f"{where}: {said}" for where, said in found.items())


@pytest.mark.parametrize("first", names())
def test_some_pairs(first):
    """Each method with itself, with LoRA and with the next one: the quick part of what is slow below."""
    after = list(names())[list(names()).index(first) - 1]
    found = wrong((first, second) for second in dict.fromkeys((first, "lora", after)))
    assert not found, told(found)


@pytest.mark.slow
@pytest.mark.parametrize("first", names())
def test_pairs(first):
    found = wrong((first, second) for second in names())
    assert not found, told(found)


def with_bridged(kind):
    """A bridged type's pairs: with itself, with the next type, and with every method in both orders."""
    kinds = list(bridged())
    return [(kind, kind), (kind, kinds[kinds.index(kind) - 1])] + [p for n in names() for p in ((kind, n), (n, kind))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", bridged())
def test_pairs_of_bridged_types(kind):
    found = wrong(with_bridged(kind))
    assert not found, told(found)
    assert distance(bed().want([(1.0, f"{kind}-1")]), bed().want()) > 0.01


@pytest.mark.parametrize("name", names())
def test_each_moves_the_base(name):
    """Else equal would say nothing."""
    bed().ensure(name)
    assert distance(bed().want([(1.0, f"{name}-1")]), bed().want()) > 0.01


LETTERS = {operation: operation[0] for operation in OPERATIONS}
LETTERS["gate"] = "w"  # weighed by a gate


def cell(a, b):
    return " ".join(LETTERS[o] for o, said in outcome(a, b).items() if said) or "·"


def page():
    rows = [
        "# Pairs of methods",
        "",
        "Every ordered pair of installed methods (first, then second) under eight operations: stack, mix, gate, route, fold, merge, save,",
        "continue (train the second over the first). Each equals a reference written out by hand: the forms' formulas as plain closures",
        "and a plain attention, in float64 within 1e-9 of the largest logit; merge and continue, which go through float32, within 1e-5.",
        "Or it is refused, with one line what is wrong and one line what to do. The tiny Llama, two random adapters of each method.",
        "Made by `python tests/test_pairs.py`, held by `tests/test_pairs.py` (`pytest -m slow`; a part of it in the default tests).",
        "",
        "A dot: all eight hold. Letters: what is refused, " + ", ".join(f"**{LETTERS[o]}** {o}" for o in REFUSED) + ".",
        "",
        "| first \\ second | " + " | ".join(f"`{name}`" for name in names()) + " |",
        "|---" * (len(names()) + 1) + "|",
    ]
    rows += [f"| `{a}` | " + " | ".join(cell(a, b) for b in names()) + " |" for a in names()]
    rows += [
        "",
        "PEFT's types, one of each family, trained by the method `peft` (adapterhub-peft) and stored as forms of ours: first and second the type, then",
        "with each method; after a slash, where it differs, in the other order.",
        "",
        "| type | itself | " + " | ".join(f"`{name}`" for name in names()) + " |",
        "|---" * (len(names()) + 2) + "|",
    ]
    for kind in bridged():
        both = [(cell(kind, name), cell(name, kind)) for name in names()]
        cells = [one if one == other else f"{one} / {other}" for one, other in both]
        rows.append(f"| {kind.removeprefix('peft_').upper()} | {cell(kind, kind)} | " + " | ".join(cells) + " |")
    rows += [
        "",
        "Why: the forms of `bottleneck`, `conv_adapter`, `levi`, `loreft`, `prefix` and `unified` are no change of a weight, so they neither fold nor",
        "merge; a gate weighs changes of hidden states, and a prefix is none. `dora` is `lora` with `use_dora`; `unified` is MAM, its default, and",
        "`mh_parallel` its preset of that name; `peft` is PEFT's LoRA. A gate is not a row of its own: it weighs the two. `soft_moa` refuses causal",
        "models, and so has no row here. An embedding gets token ids, which no gate reads. Objectives, recipes and schedules decide how an adapter is trained, not what it is: they have none either.",
        "",
    ]
    return "\n".join(rows)


@pytest.mark.slow
def test_the_page_is_what_was_found():
    assert PAGE.read_text() == page(), "stale: python tests/test_pairs.py"


if __name__ == "__main__":
    pairs = [(a, b) for a in names() for b in names()] + [pair for kind in bridged() for pair in with_bridged(kind)]
    print(told(wrong(pairs)))
    PAGE.write_text(page())
