"""Random worlds: a tiny base of a family, adapters of every installed form that share its modules, and expressions over them.

All of it hangs on the family and a seed. Two scripts and a test draw from here, one of them against other commits: so this imports
names that stay."""

import random
import warnings
from pathlib import Path

import torch

import adapterhub
from adapterhub import plugins
from adapterhub.adapter import check_fit
from adapterhub.bases.fingerprint import fingerprint
from adapterhub.errors import IncompatibleBase
from adapterhub.expression import depth, parse
from adapterhub.forms.affine import Affine
from adapterhub.forms.dense import Dense
from adapterhub.gate import Gate
from adapterhub.publish import publish_tensors
from adapterhub.sites import sites
from adapterhub.testing.families import tiny

WEIGHTS = ("0", "1", "-1", "0.5", "-0.7", "1.8", "1e-6", "0.1", "0.35", "-0.01")
"""Nothing, the whole, the opposite, more than the whole, next to nothing; and some with which (1 - w) + w is not 1."""
OF_WEIGHTS = ("affine", "dense", "dora", "low_rank", "peft", "sparse")
"""Forms that are a change of a weight."""


class World:
    """A base in float32 and a hub in the folder with adapters for it: `adapters` {name: {site path: [modification, ...]}}, among them
    `folding`, made of changes of weights, and `hidden`, that have no prefix; `gates` {name: how many it weighs}."""

    def __init__(self, family: str, seed: int, folder: Path, adapters: int = 8):
        self.family, self.seed = family, seed
        self.random = random.Random(f"{family} {seed}")
        self.base = tiny(family, seed).requires_grad_(False)
        torch.manual_seed(self.random.randrange(2**31))
        self.sites = {site.path: site for site in sites(self.base)}
        self.meeting = self._meeting()
        self.hub = adapterhub.open(folder / "hub", create=True)
        self.print = fingerprint(self.base)
        self.adapters, self.gates, self.folding, self.hidden = {}, {}, [], []
        self._waiting: list[str] = []
        for n in range(adapters):
            self._adapter(f"w/{'abcdefghijklmnop'[n]}", folds=n % 2 == 0, plain=n % 4 == 0)
        for children in (2, 3):
            self._gate(f"w/gate{children}", children)

    def put(self, name: str, parts: dict, **fields):
        """Publish modifications under a name."""
        return publish_tensors(self.hub, parts, name=name, base=self.print.base, sketch=self.print.sketch, **fields)

    def _meeting(self) -> list[list]:
        """Where adapters meet: a fused projection with its columns, or a linear layer; and two modules of other roles."""
        every = list(self.sites.values())
        fused = [site.module for site in every if site.columns]
        hot = [self.random.choice(fused or [site.path for site in every if site.linear])]
        roles = ("embedding", "block", "attention", "norm", "head", "ffn", "ffn_up")
        there = [role for role in roles if any(site.role == role for site in every)]
        for role in self.random.sample(there, 2):
            hot.append(self.random.choice([site.path for site in every if site.role == role]))
        return [[site for site in every if site.module == module] for module in hot]

    def _adapter(self, name: str, folds: bool, plain: bool) -> None:
        """One to five parts, most of them where adapters meet. folds: all changes of weights; plain: of one form, each at a
        site of its own, as most real adapters are."""
        parts, wanted = {}, self.random.randint(1, 5)
        form = self.random.choice(OF_WEIGHTS)
        for _ in range(200):
            together = self.random.random() < 0.8 and self.random.choice(self.meeting)
            site = self.random.choice(together or list(self.sites.values()))
            if (plain and site.path in parts) or (folds and not (site.linear or site.embedding)):
                continue
            if not plain:
                form = self.random.choice(OF_WEIGHTS) if folds else self._form()
            if (part := self._random(form, site)) is not None:
                parts.setdefault(site.path, []).append(part)
                wanted -= 1
            if not wanted:
                break
        self.adapters[name] = parts
        self.put(name, parts)
        if folds:
            self.folding.append(name)
        if not any(part.form == "prefix" for here in parts.values() for part in here):
            self.hidden.append(name)

    def _form(self) -> str:
        """The installed forms, each as often as the others, what sees the order of things more often."""
        if not self._waiting:
            self._waiting = [*plugins.names("forms"), "affine", "affine", "bottleneck", "prefix"]
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
        gates = {
            path: [Gate(weight=torch.randn(children, site.inputs) * site.inputs**-0.5, bias=torch.randn(children))]
            for path, site in self.sites.items()
        }
        self.put(name, gates)
        self.gates[name] = children

    # --- expressions -----------------------------------------------------------------------------------------------

    def expression(self, deepest: int = 4, anything: bool = False) -> str:
        """A random one; every second is of adapters that fold. anything: prefixes under gates too, which is refused."""
        while True:
            folds = self.random.random() < 0.5
            if not folds and self.random.random() < 0.12:
                text = self._ensemble(deepest - 1, anything)
            else:
                text = self._node(deepest, self.folding if folds else list(self.adapters), not folds, anything)
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
            gate, children = self.random.choice(list(self.gates.items()))
            weighed = among if anything else [name for name in among if name in self.hidden]
            if weighed:
                return f"gate({', '.join([gate, *(inner(weighed) for _ in range(children))])})"
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
