"""One expression, computed four ways: attached without gradients, with gradients, while training, and folded. Each gives what
tests/support/by_hand.py gives, which is docs/guide/composition.md written out in float64.

Random expressions over random adapters on tiny bases of every family (tests/support/worlds.py). By hand, for as long as you like:

    python tests/test_four_ways.py --seconds 600 [--seed 7] [--family gpt2]
"""

import argparse
import copy
import os
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))  # where this is run as a script
os.environ.setdefault("ADAPTERHUB_PLUGINS", "*")

import pytest
import torch
from by_hand import ByHand
from forms_by_hand import FORMS
from worlds import OF_WEIGHTS, World, smaller_than, whole

from adapterhub import plugins
from adapterhub.adapters.names import named_tensors
from adapterhub.errors import NotFoldable
from adapterhub.spec.expression import Ensemble, Gate, Ref, Scale, Stack, depth, references
from adapterhub.spec.names import Reference
from adapterhub.spec.parser import parse
from adapterhub.testing.families import FAMILIES, inputs

EXACT = 1e-9
"""Of the largest logit."""
ROUNDED = 1e-5
"""Of the largest gradient: parameters that train are float32."""
LEAST = 8
"""Expressions of each family that are tried however slow the machine is."""
EACH = 12
"""Expressions over one set of adapters."""
NEW = Reference("w/new")


class Trial:
    """A world, attached once, and its reference."""

    def __init__(self, family, seed, folder):
        self.world = world = World(family, seed, Path(folder), torch.float64)
        self.pristine = copy.deepcopy(world.base)
        self.given = inputs(world.base, [torch.arange(3, 10), torch.arange(20, 27)])
        self.tensors = {name: named_tensors(parts) for name, parts in world.everything.items()}
        columns = {s.path: (s.module, s.columns.index()) for s in world.sites.values() if s.columns}
        read = ("embedding", "block", "attention", "query")
        reads = {(s.role, s.layer, s.part): s.path for s in world.sites.values() if s.role in read}
        self.reference = ByHand(world.base, self.tensors, columns, reads)
        world.hub.resolve = cache(
            world.hub.resolve
        )  # it holds all it will: half of the time would go into asking it for names
        self.model = world.hub.load(world.base)
        self._known = "nothing yet", None
        self.trained = ""

    # --- the ways: each gives {what: (got, want)} ------------------------------------------------------------------

    def want(self, node):
        """The logits by hand; known while one expression is tried in all ways."""
        if node != self._known[0]:
            with torch.no_grad():
                self._known = node, self.reference(node, self.given)
        return self._known[1]

    def attached(self, text, node):
        with torch.no_grad():
            return {"logits": (self.model(**self.given, adapters=text).logits, self.want(node))}

    def gradients(self, text, node):
        return {"logits": (self.model(**self.given, adapters=text).logits.detach(), self.want(node))}

    def training(self, text, node):
        """Some of its adapters train, and every third time a fresh one on top of it all."""
        chosen = random_of(text, sorted({str(reference) for reference in references(node)}))
        leaves = {name: self._leaves(name) for name in chosen}
        fresh, name = self.fresh() if len(text) % 3 == 0 else ({}, "")
        self.trained = f" | {', '.join(chosen)} train" + f", a copy of {name} on top" * bool(fresh)
        try:
            self.model.use(text, trainable=chosen)
            if fresh:
                self.model.attach_new(fresh)
                self.reference.put(str(NEW), named_tensors(fresh))
                leaves[str(NEW)] = self._leaves(str(NEW), named_tensors(fresh))
                node = over(node, Ref(NEW))
            logits = self.model(**self.given).logits
            wanted = self.reference(node, self.given)
            found = {"logits": (logits.detach(), wanted.detach())}
            if not self.model.trainable_parameters():  # none chosen, or adapters without tensors
                return found
            logits.square().mean().backward()
            wanted.square().mean().backward()
            return found | {"gradients": self._gradients(leaves, bool(fresh))}
        finally:
            self.model.attach_new({})
            self.model.use(None)
            for name in chosen:
                self.reference.put(name, self.tensors[name])

    def _leaves(self, name, tensors=None):
        """The tensors that train, in the reference too."""
        tensors = self.tensors[name] if tensors is None else tensors
        leaves = {key: t.double().requires_grad_() if t.is_floating_point() else t for key, t in tensors.items()}
        self.reference.put(name, leaves)
        return leaves

    def _gradients(self, leaves, fresh):
        """Of all that trains, in one order."""
        trained = self.model.trainable_tensors()
        assert trained, "nothing trains"
        got, want = [], []
        for key, parameter in trained.items():
            adapter, _, name = key.rpartition(":")
            adapter = adapter.partition("@")[0].replace("new", str(NEW)) if adapter else next(iter(leaves))
            expected = leaves[adapter][name].grad
            got.append(torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten())
            want.append(torch.zeros(parameter.numel()) if expected is None else expected.flatten())
        return torch.cat(got).double(), torch.cat(want).double()

    def fresh(self):
        """New modifications: those of the adapter with the most sites."""
        name = max(self.world.adapters, key=lambda name: len(self.world.adapters[name]))
        return copy.deepcopy(self.world.adapters[name]), name

    def folded(self, text, node):
        """Nothing where it is refused, which it may not be if all of it is changes of weights."""
        model = self.world.hub.load(copy.deepcopy(self.pristine), text)
        try:
            plain = model.fold()
        except NotFoldable:
            assert not self.must_fold(node), "it is refused"
            return {}
        with torch.no_grad():
            return {"logits": (plain(**self.given).logits, self.want(node))}

    def must_fold(self, node):
        """Whether all of it is changes of weights that no other module shares, with biases to hold the shifts."""
        if isinstance(node, Ensemble) or any(isinstance(inner, Gate) for inner in whole(node)):
            return False
        owners = [id(parameter) for _, parameter in self.pristine.named_parameters(remove_duplicate=False)]
        for name in {reference.name for reference in references(node)}:
            for path, parts in self.world.everything[name].items():
                site = self.world.sites[path]
                if not (site.linear or site.embedding) or any(part.form not in OF_WEIGHTS for part in parts):
                    return False
                shared = owners.count(id(self.pristine.get_submodule(site.module).weight)) > 1
                if shared or (site.embedding and any({"shift", "bias"} & part.tensors.keys() for part in parts)):
                    return False
        return True

    # --- one expression --------------------------------------------------------------------------------------------

    def wrong(self, text, ways):
        """{way: what is wrong}."""
        found, node = {}, parse(text)
        for way in ways:
            try:
                with warnings.catch_warnings(action="ignore"):
                    pairs = getattr(self, way)(text, node)
            except Exception as error:
                found[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            for what, (got, want) in pairs.items():
                apart = float((got - want).abs().max() / max(float(want.abs().max()), 1e-30))
                if not apart <= (EXACT if what == "logits" else ROUNDED):
                    found[way] = f"{what} off by {apart:.1e}"
        return found

    def told(self, text, way):
        """The smallest part of it that goes wrong this way, and what is in it."""
        text = self.smallest(text, way)
        self.trained = ""
        wrong = self.wrong(text, [way]).get(way)
        lines = [f"{self.world.family}, seed {self.world.seed}, {way}: {text}{self.trained}", f"  {wrong}"]
        for name in dict.fromkeys(reference.name for reference in references(parse(text))):
            parts = self.world.adapters.get(name, {}) | self.world.moving.get(name, {})
            lines += [f"  {name} at {path}: {', '.join(_said(part) for part in here)}" for path, here in parts.items()]
        return "\n".join(lines)

    def smallest(self, text, way):
        while smaller := next((s for s in smaller_than(parse(text)) if self.wrong(s, [way])), None):
            text = smaller
        return text


WAYS = ("attached", "gradients", "training", "folded")


def _said(part):
    more = "".join(f" {key}" for key in ("gain", "shift") if part.form == "affine" and key in part.tensors)
    return part.form + more + (" of the input" if part.changes_input else "")


def random_of(text, names):
    """One or two of the names, always the same ones."""
    import random

    return random.Random(text).sample(names, min(len(names), 1 + len(text) % 2))


def over(node, new):
    """The expression with `new` on top, in an ensemble on top of every lane."""
    if isinstance(node, Ensemble):
        return Ensemble(tuple((weight, over(inner, new)) for weight, inner in node.lanes))
    return new if node is None else Stack((node, new))


def trials(family, folder, seconds, seed=0):
    """Expressions until the time is over, at least LEAST: of each, what goes wrong."""
    end, tried = time.monotonic() + seconds, 0
    while tried < LEAST or time.monotonic() < end:
        trial = Trial(family, seed, Path(folder) / f"{family}-{seed}")
        for _ in range(EACH):
            text = trial.world.expression()
            tried += 1
            yield [trial.told(text, way) for way in trial.wrong(text, WAYS)]
            if tried >= LEAST and time.monotonic() >= end:
                break
        seed += 1


def hold(family, folder, seconds):
    found = dict.fromkeys(told for wrong in trials(family, folder, seconds) for told in wrong)
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_ways(family, tmp_path):
    hold(family, tmp_path, 20 / len(FAMILIES))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_four_ways_for_longer(family, tmp_path):
    hold(family, tmp_path, 180 / len(FAMILIES))


def test_every_installed_form_is_written_by_hand():
    assert set(FORMS) == set(plugins.names("forms")), "write it in tests/support/forms_by_hand.py"


def test_what_is_drawn_at_least(tmp_path):
    """Every form, composer and kind of weight is among the expressions that are tried on any machine, and depth 4."""
    forms, kinds, deepest, weights = set(), set(), 0, set()
    for family in FAMILIES:
        world = World(family, 0, tmp_path)
        for _ in range(LEAST):
            node = parse(world.expression())
            lanes = [inner for _, inner in node.lanes if inner is not None] if isinstance(node, Ensemble) else [node]
            nodes = [inner for lane in lanes for inner in whole(lane)]
            kinds |= {type(inner).__name__ for inner in (node, *nodes)}
            weights |= {inner.weight for inner in nodes if isinstance(inner, Scale)}
            deepest = max(deepest, depth(node))
            named = [world.everything[reference.name] for reference in references(node)]
            forms |= {part.form for parts in named for here in parts.values() for part in here}
    assert forms == {*plugins.names("forms"), "gate"}, set(plugins.names("forms")) - forms
    assert kinds == {"Ref", "Scale", "Stack", "Mix", "Gate", "Ensemble"}, kinds
    assert deepest == 4
    assert weights >= {0.0, 1e-6} and min(weights) < 0 and max(weights) > 1, sorted(weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=FAMILIES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for family in [given.family] if given.family else FAMILIES:
            share = given.seconds if given.family else given.seconds / len(FAMILIES)
            tried = 0
            for wrong in trials(family, folder, share, given.seed):
                print(*(f"{told}\n" for told in wrong), sep="\n", end="", flush=True)
                failed, tried = failed + bool(wrong), tried + 1
            print(f"{family}: {tried} expressions", flush=True)
    raise SystemExit(bool(failed))
