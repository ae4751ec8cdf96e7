"""Every ordered pair of installed methods: stacked, mixed, gated, routed, folded, merged, saved, and the second trained on
over the first. Each equals what tests/support/by_hand.py computes, or is refused as the table REFUSED says.

`python tests/test_pairs.py` rewrites docs/evidence/pairs.md, which shows the outcome.
"""

import copy
import os
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).parent / "support"))  # where this is run as a script

import pytest
import torch
from by_hand import ByHand

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.adapter import Adapter
from adapterhub.adapters.names import named_tensors
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import HubError, NotFoldable, NotMergeable, UsageError
from adapterhub.forms.gate import Gate
from adapterhub.runtime.model import Model
from adapterhub.spec.manifest import Made
from adapterhub.spec.parser import parse
from adapterhub.testing.bed import distance, padded, tiny_llama
from adapterhub.testing.methods import setting_of
from adapterhub.training.stages import attach, given, measure, trained
from adapterhub.training.watched import staged
from adapterhub.transform.merge import merge

os.environ.setdefault("ADAPTERHUB_PLUGINS", "*")  # as in the tests, where this is run as a script
PAGE = Path(__file__).parent.parent / "docs" / "evidence" / "pairs.md"
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

# --- the bed: one base, one hub, two adapters of each method -------------------------------------------------------


def names():
    """The methods that make adapters, and DoRA; a gate weighs others: it is an operation here."""
    parts = {name: plugins.load("methods", name) for name in plugins.names("methods")}
    methods = {name: (name, {}) for name, part in parts.items() if not part.weighs and not part.bidirectional}
    return dict(sorted((methods | OPTIONS).items()))


def bridged():
    """One of PEFT's types for each family, trained by the method `peft`."""
    sys.path.insert(0, str(PAGE.parents[2] / "plugins" / "adapterhub-peft"))
    from peft_outcomes import FAMILIES

    return {f"peft_{kind.lower()}": ("peft", options) for kind, options in sorted(FAMILIES.items())}


class Bed:
    def __init__(self):
        self.base = tiny_llama().double().requires_grad_(False)
        self.print = fingerprint(tiny_llama())
        self.hub = adapterhub.open(Path(mkdtemp()) / "hub", create=True)
        self.model = Model(self.base, hub=self.hub, fingerprint=self.print)
        read = ("embedding", "block", "attention", "query")
        self.reference = ByHand(
            self.base, {}, {}, {(s.role, s.layer, s.part): s.path for s in self.model.sites if s.role in read}
        )
        self.sequences = [torch.arange(3 + row, 3 + row + n) % 90 + 3 for row, n in enumerate((9, 6, 8, 7))]
        self.publish_gate()

    def ensure(self, name):
        """Two adapters of it in the hub."""
        if f"me/{name}-1" not in self.reference.adapters:
            method, options = (names() | bridged())[name]
            for seed in (1, 2):
                self.publish(f"{name}-{seed}", method, options, seed)

    def publish(self, name, method, options, seed):
        """Trained-looking: what the method's stages build, every trained tensor moved at random."""
        part = plugins.load("methods", method)
        config = plugins.options(part.Config, options)
        fresh, before = Model(tiny_llama().requires_grad_(False)), {}
        for stage in staged(part(), config):
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
        self.reference.put(f"me/{name}", self.stored(f"me/{name}@0.1.0"))

    def put(self, name, parts, **fields):
        return publish_tensors(
            self.hub, parts, name=f"me/{name}", base=self.print.base, sketch=self.print.sketch, **fields
        )

    def stored(self, key):
        return dict(Adapter.load(self.hub, self.hub.resolve(key)).tensors)

    def publish_gate(self):
        """A gate over two at every site but the embedding."""
        torch.manual_seed(5)
        sites = [site for site in self.model.sites if site.role != "embedding"]
        gates = {s.path: [Gate(weight=torch.randn(2, s.inputs), bias=torch.randn(2))] for s in sites}
        self.put("gate", gates)
        self.reference.put("me/gate", named_tensors(gates))

    @torch.no_grad()
    def run(self, expression):
        return self.model(input_ids=self.sequences[0][None], adapters=expression).logits[0]

    @torch.no_grad()
    def want(self, expression, row=0):
        """The same by hand; None: the bare base."""
        return self.by_hand(expression, self.sequences[row])

    def by_hand(self, expression, ids):
        return self.reference(expression and parse(expression), {"input_ids": ids[None]})[0]


@cache
def bed():
    torch.set_num_threads(1)
    return Bed()


# --- the operations: what we give, and what it must be --------------------------------------------------------------


def stack(bed, a, b, name):
    text = f"me/{a}@0.1.0 + me/{b}@0.1.0"
    return bed.run(text), bed.want(text)


def mix(bed, a, b, name):
    text = f"mix(0.3*me/{a}@0.1.0, 0.7*me/{b}@0.1.0)"
    return bed.run(text), bed.want(text)


def gate(bed, a, b, name):
    text = f"gate(me/gate, me/{a}@0.1.0, me/{b}@0.1.0)"
    return bed.run(text), bed.want(text)


def route(bed, a, b, name):
    """Four padded rows: one, the other, half of their stack's first on the second, the base."""
    ids, mask = padded(bed.sequences, "left")
    rows = [f"me/{a}@0.1.0", f"me/{b}@0.1.0", f"0.5*me/{a}@0.1.0 + me/{b}@0.1.0", None]
    with torch.no_grad():
        logits = bed.model(input_ids=ids, attention_mask=mask, adapters=rows).logits
    want = [bed.want(text, row) for row, text in enumerate(rows)]
    return torch.cat([logits[row][mask[row].bool()] for row in range(4)]), torch.cat(want)


def fold(bed, a, b, name):
    model = Model(copy.deepcopy(tiny_llama().double().requires_grad_(False)), hub=bed.hub, fingerprint=bed.print)
    text = f"me/{a}@0.1.0 + me/{b}@0.1.0"
    model.use(text)
    with torch.no_grad():
        return model.fold()(bed.sequences[0][None]).logits[0], bed.want(text)


def merged(bed, a, b, name):
    """The weighted sum of the changes of each weight, by hand from what each adapter makes of nothing and of a one."""
    merge(bed.hub, [f"me/{a}@0.1.0", f"me/{b}@0.1.0"], weights=[0.3, 0.7], name=f"me/merged-{name}", base=tiny_llama())
    own = copy.deepcopy(bed.base)
    for weight, one in ((0.3, parse(f"me/{a}")), (0.7, parse(f"me/{b}"))):
        for path in bed.reference.acting(one):
            module, base, program = (
                own.get_submodule(path),
                bed.base.get_submodule(path),
                bed.reference.program(one, [path]),
            )
            if isinstance(base, torch.nn.Embedding):
                module.weight += weight * program.out(torch.arange(base.num_embeddings), base.weight)
                continue
            x = torch.cat([torch.zeros(1, base.in_features), torch.eye(base.in_features)]).double()
            y = base(x + program.into(x))
            change = y + program.out(x, y) - base(x)
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
        return again(input_ids=bed.sequences[0][None]).logits[0], bed.want(f"0.7*me/{a} + me/{b}")


def go_on(bed, a, b, name):
    """A gradient step of the second over the first, which stays as it is: the same step by hand, and what is saved."""
    ids = bed.sequences[0][None]
    model = Model(bed.base, hub=bed.hub, fingerprint=bed.print)
    model.use(f"me/{a}@0.1.0 + me/{b}@0.1.0", trainable=[f"me/{b}@0.1.0"])
    leaves = {
        n: t.requires_grad_() if n in model.trainable_tensors() else t for n, t in bed.stored(f"me/{b}@0.1.0").items()
    }
    bed.reference.put("me/trained", leaves)
    model(input_ids=ids).logits.square().mean().backward()
    bed.by_hand(f"me/{a} + me/trained", ids[0]).square().mean().backward()
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
    assert distance(bed().want(f"me/{kind}-1"), bed().want(None)) > 0.01


@pytest.mark.parametrize("name", names())
def test_each_moves_the_base(name):
    """Else equal would say nothing."""
    bed().ensure(name)
    assert distance(bed().want(f"me/{name}-1"), bed().want(None)) > 0.01


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
        "Or it is refused: one line says what is wrong, one line what to do. The model is the tiny Llama, with two random adapters of each method.",
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
        "Why: the forms of `bottleneck`, `conv_adapter`, `levi`, `loreft`, `prefix` and `unified` do not change a weight, so they can be neither folded nor",
        "merged; a gate weighs changes of hidden states, and a prefix is not one. `dora` is `lora` with `use_dora`; `unified` is MAM, its default, and",
        "`mh_parallel` its preset of that name; `peft` is PEFT's LoRA. A gate is not a row of its own: it weighs the two. `soft_moa` refuses causal",
        "models, and so has no row here. An embedding gets token ids, which no gate reads. Objectives, recipes and schedules decide how an adapter is trained, not what it is: they have no row either.",
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
