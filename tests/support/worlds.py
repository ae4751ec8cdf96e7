"""Random worlds: a tiny base of a family, adapters of every installed form that share its modules, and expressions over them.

All of it hangs on the family and a seed. A test and a benchmark draw from here, the benchmark against other commits: so this
imports names that stay."""

import inspect
import random
import warnings
from functools import cached_property
from pathlib import Path

import torch
from float64 import in_float64

import adapterhub
from adapterhub import plugins
from adapterhub.adapters.fit import check_fit
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import IncompatibleBase
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.forms.gate import Gate as Weighing
from adapterhub.sites import sites
from adapterhub.spec.expression import Ensemble, Gate, Ref, Scale, depth
from adapterhub.spec.parser import parse
from adapterhub.testing.families import tiny

WEIGHTS = ("0", "1", "-1", "0.5", "-0.7", "1.8", "1e-6", "0.1", "0.35", "-0.01")
"""Nothing, the whole, the opposite, more than the whole, next to nothing; and some with which (1 - w) + w is not 1."""
OF_WEIGHTS = ("affine", "dense", "dora", "low_rank", "peft", "sparse")
"""Forms that are a change of a weight."""
MOVING = "w/moving"


class World:
    """A base and adapters for it: `adapters` and `gates` {name: {site path: [modification, ...]}}; by name, `folding` are made of
    changes of weights, and `hidden` have no prefix. Where the base takes positions, MOVING is a prefix that moves them."""

    def __init__(self, family: str, seed: int, folder: Path, dtype: torch.dtype = torch.float32):
        self.family, self.seed, self.folder = family, seed, folder
        self.random = random.Random(f"{family} {seed}")
        self.base = tiny(family, seed).requires_grad_(False)
        if dtype == torch.float64:
            in_float64(self.base)
        torch.manual_seed(self.random.randrange(2**31))
        self.sites = {site.path: site for site in sites(self.base)}
        self.meeting = self._meeting()
        self.adapters, self.gates, self.folding, self.hidden, self.moving = {}, {}, [], [], {}
        self._waiting: list[str] = []
        for n, letter in enumerate("abcdefgh"):
            self._adapter(f"w/{letter}", folds=n % 2 == 0, plain=n % 4 == 0)
        for children in (2, 3):
            self._gate(f"w/gate{children}", children)
        if family != "roberta" and "position_ids" in inspect.signature(self.base.forward).parameters:
            self._prefix_that_moves()

    @property
    def everything(self) -> dict:
        return self.adapters | self.gates | self.moving

    @cached_property
    def hub(self):
        """A hub in the folder, all of them published there."""
        hub, (base, sketch) = adapterhub.open(self.folder / "hub", create=True), fingerprint(self.base)
        for name, parts in self.everything.items():
            publish_tensors(hub, parts, name=name, base=base, sketch=sketch)
        return hub

    def _meeting(self) -> list[list]:
        """Where adapters meet: a fused projection with its columns, or a linear layer; an attention; two modules of other roles."""
        every = list(self.sites.values())
        fused = [site.module for site in every if site.columns]
        hot = [self.random.choice(fused or [site.path for site in every if site.linear])]
        roles = ("embedding", "block", "norm", "head", "ffn", "ffn_up")
        there = [role for role in roles if any(site.role == role for site in every)]
        for role in ("attention", *self.random.sample(there, 2)):
            hot.append(self.random.choice([site.path for site in every if site.role == role]))
        return [[site for site in every if site.module == module] for module in hot]

    def _adapter(self, name: str, folds: bool, plain: bool) -> None:
        """One to five parts, most of them where adapters meet. folds: all changes of weights; plain: of one form, each at a
        site of its own, as most real adapters are."""
        parts = {}
        form = self.random.choice(OF_WEIGHTS)
        for _ in range(self.random.randint(1, 5)):
            if not plain:
                form = self.random.choice((*OF_WEIGHTS, "affine", "affine")) if folds else self._form()
            for site in self._places():
                if (plain and site.path in parts) or (folds and not (site.linear or site.embedding)):
                    continue
                if (part := self._random(form, site)) is not None:
                    parts.setdefault(site.path, []).append(part)
                    break
        self.adapters[name] = parts
        if folds:
            self.folding.append(name)
        if not any(part.form == "prefix" for here in parts.values() for part in here):
            self.hidden.append(name)

    def _places(self) -> list:
        """All sites in the order in which a part looks for one that it suits; mostly, where adapters meet first."""
        near = [
            site
            for sites in self.random.sample(self.meeting, len(self.meeting))
            for site in self.random.sample(sites, len(sites))
        ]
        every = self.random.sample(list(self.sites.values()), len(self.sites))
        return near + every if self.random.random() < 0.8 else every

    def _form(self) -> str:
        """The installed forms, each as often as the others, what sees the order of things more often."""
        if not self._waiting:
            self._waiting = [*plugins.names("forms"), "affine", "affine", "bottleneck", "prefix", "prefix", "prefix"]
            self.random.shuffle(self._waiting)
        return self._waiting.pop()

    def _random(self, form: str, site):
        """A modification of the form that fits the site; None if there is no such."""
        made = plugins.load("forms", form).random(site)
        if made is None:
            return None
        if form == "affine":  # a gain, a shift, or both
            held = {key: made.tensors[key] for key in self.random.choice((("gain",), ("shift",), ("gain", "shift")))}
            made = Affine.of(**held, into=bool(made.side))
        if form == "dense" and self.random.random() < 0.3:
            made = Dense(weight=made.weight, bias=0.1 * torch.randn(site.outputs))
        try:
            with warnings.catch_warnings(action="ignore"):  # of a rank that the smallest weights cannot use
                check_fit({site.path: [made]}, list(self.sites.values()), "it")
        except IncompatibleBase:  # it reads sites that this base has not
            return None
        return made

    def _gate(self, name: str, children: int) -> None:
        """A gate at every site, so that it weighs whatever stands there."""
        self.gates[name] = {
            path: [Weighing(weight=torch.randn(children, site.inputs) * site.inputs**-0.5, bias=torch.randn(children))]
            for path, site in self.sites.items()
        }

    def _prefix_that_moves(self) -> None:
        site = self.random.choice([site for site in self.sites.values() if site.role == "attention"])
        made = plugins.load("forms", "prefix").random(site).tensors
        moves = made | {"shift": torch.tensor(made["keys"].shape[1])}
        self.moving[MOVING] = {site.path: [plugins.load("forms", "prefix")(**moves)]}

    # --- expressions -----------------------------------------------------------------------------------------------

    def expression(self, deepest: int = 4, anything: bool = False) -> str:
        """A random one; every second is of adapters that fold. anything: prefixes under gates too, which is refused."""
        while True:
            folds = self.random.random() < 0.5
            if not folds and self.random.random() < 0.12:
                text = self._ensemble(deepest - 1, anything)
            else:
                text = self._node(deepest, self.folding if folds else list(self.adapters), not folds, anything)
            if self.moving and not text.startswith("logits") and self.random.random() < 0.05:
                text = f"{MOVING} + {_bracketed(text)}"  # stacked at full weight: it cannot be scaled, mixed or gated
            if depth(parse(text)) <= deepest:
                return text

    def _node(self, deepest: int, among: list[str], gates: bool, anything: bool) -> str:
        kinds = ["one", "one", "stack", "minus", "mix", "mix", "scale", "scale", *["gate"] * gates]
        kind = self.random.choice(kinds) if deepest > 0 else "one"

        def inner(among: list[str] = among) -> str:
            return self._node(deepest - 1, among, gates, anything)

        if kind in ("stack", "minus"):
            sign = " + " if kind == "stack" else " - "
            return sign.join(_bracketed(inner()) for _ in range(self.random.choice((2, 2, 3))))
        if kind == "mix":
            return f"mix({', '.join(inner() for _ in range(self.random.choice((2, 2, 3))))})"
        if kind == "scale":
            return f"{self._weight()}*{_bracketed(inner())}"
        if kind == "gate":
            children = self.random.choice((2, 3))
            weighed = among if anything else [name for name in among if name in self.hidden]
            if weighed:
                return f"gate({', '.join([f'w/gate{children}', *(inner(weighed) for _ in range(children))])})"
        return self.random.choice(among)

    def _weight(self) -> str:
        return self.random.choice(WEIGHTS) if self.random.random() < 0.8 else f"{self.random.uniform(-2, 2):.2f}"

    def _ensemble(self, deepest: int, anything: bool) -> str:
        lanes = ["base"] * self.random.randint(0, 1)
        for _ in range(self.random.randint(1, 2)):
            lanes.append(f"({self._node(deepest, list(self.adapters), True, anything)})")
        return f"logits({' + '.join(f'{self._weight()}*{lane}' for lane in lanes)})"


def _bracketed(text: str) -> str:
    """As an operand of a stack or a factor."""
    return text if " " not in text and "*" not in text else f"({text})"


def whole(node):
    """Every node."""
    inner = getattr(node, "nodes", ()) or ((node.node,) if isinstance(node, Scale) else ())
    return [node, *(n for part in inner for n in whole(part))]


def smaller_than(node):
    """Texts of what is left when one thing is taken away."""
    if isinstance(node, Ensemble):
        yield from (str(inner) for _, inner in node.lanes if inner is not None)
        for n, (weight, inner) in enumerate(node.lanes):
            if len(node.lanes) > 1:
                yield str(Ensemble(node.lanes[:n] + node.lanes[n + 1 :]))
            if inner is not None:
                yield from (
                    str(Ensemble((*node.lanes[:n], (weight, parse(less)), *node.lanes[n + 1 :])))
                    for less in smaller_than(inner)
                )
        return
    if isinstance(node, Scale):
        yield str(node.node)
        yield from (str(Scale(node.weight, parse(less))) for less in smaller_than(node.node))
    elif not isinstance(node, Ref):
        yield from map(str, node.nodes)
        for n, inner in enumerate(node.nodes):
            rest = node.nodes[:n] + node.nodes[n + 1 :]
            if len(node.nodes) > 2 and not isinstance(node, Gate):
                yield str(type(node)(rest))
            for less in smaller_than(inner):
                nodes = (*node.nodes[:n], parse(less), *node.nodes[n + 1 :])
                yield str(Gate(node.gate, nodes) if isinstance(node, Gate) else type(node)(nodes))
