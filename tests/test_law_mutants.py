"""Parts that are wrong in one way each: the law of that name fails on them, and the laws beside it, where they are named,
do not, which is how such parts survived before."""

import random
from dataclasses import dataclass, replace

import numpy
import pytest
import torch

from adapterhub import plugins
from adapterhub.cli.app import execute
from adapterhub.errors import IncompatibleBase
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.method import Measurement, Method, Stage
from adapterhub.kinds.modification import Modification
from adapterhub.kinds.recipe import Recipe
from adapterhub.kinds.schedule import ParameterSchedule
from adapterhub.kinds.verifier import Verdict, Verifier
from adapterhub.mergers import Merger
from adapterhub.methods.lora import LoRA
from adapterhub.objectives.sft import SFT
from adapterhub.testing import check, check_part, codecs, forms, ingredients, mergers, methods
from tests.support import acme
from tests.support.wrong_codecs import Half, Hashing, Lying, Remembering, Silent, Trying

# --- forms -------------------------------------------------------------------------------------------------------


class OneByOne(Modification):
    """It remembers the token before, and forgets it when more than one token comes."""

    form, stores, stateful = "one_by_one", ("gain",), True

    def check(self, site):
        if self.gain.shape != (site.outputs,):
            raise IncompatibleBase("another width", "use its own base")

    def delta_out(self, x, y, step):
        if y.shape[1] > 1:
            step.state.clear()
        return step.window(y, 2)[:, :, 0] * self.gain

    @classmethod
    def random(cls, site):
        return None if site.embedding else cls(gain=0.3 * torch.randn(site.outputs))


class AnyWidth(LowRank):
    def check(self, site):
        pass


class OutputsOnly(LowRank):
    """It does not look at what goes in."""

    def check(self, site):
        super().check(replace(site, inputs=self.down.shape[1]))


class LooseBias(Bottleneck):
    """It looks at its two matrices, not at the biases."""

    def check(self, site):
        loose = Bottleneck(**self.tensors)
        loose.tensors = self.tensors | {
            "down_bias": self.down_bias.new_zeros(self.down.shape[0]), "up_bias": self.up_bias.new_zeros(self.up.shape[0])
        }  # fmt: skip
        loose.check(site)


# --- methods -----------------------------------------------------------------------------------------------------


class Twice(Method):
    """LoRA from a LoRA; its first stage reads an option that it does not name, in a way that nobody sees."""

    @dataclass(frozen=True)
    class Config:
        r: int = 2
        pull: float = 0.5

    def stages(self, config):
        def first(given):
            return LoRA().build(given.sites, LoRA.Config(r=2))

        def second(given):
            parts = LoRA().build(given.sites, LoRA.Config(r=2))
            for path, part in parts.items():
                part.tensors["up"] = given.before[path].up * 0.5
            return parts

        def pulled(parts):
            return object.__getattribute__(config, "pull") * sum(part.down.square().sum() for part in parts.values())

        return [Stage("first", first, penalty=pulled, options=()), Stage("second", second)]


class Measured(Method):
    """What it measures depends on an option that the measurement does not name."""

    starts_at_base = False

    @dataclass(frozen=True)
    class Config:
        size: float = 0.5

    def stages(self, config):
        def build(given):
            parts = LoRA().build(given.sites, LoRA.Config(r=2))
            for part in parts.values():
                part.tensors["up"] = given.measured["size"].expand_as(part.up).clone()
            return parts

        def take(setting):
            return {"size": torch.tensor(object.__getattribute__(config, "size"))}

        measurement = Measurement("size", take, options=())
        return [Stage("train", build, measurement=measurement)]


class Numpys(LoRA):
    def build(self, sites, config):
        parts = super().build(sites, config)
        for part in parts.values():
            part.tensors["down"] = torch.from_numpy(numpy.random.randn(*part.down.shape)).float()
        return parts


# --- the other parts of a training -------------------------------------------------------------------------------


class Dropping(SFT):
    def loss(self, batch, moment):
        return super().loss(batch, moment) * (1 + 0 * torch.rand(()))


class Noisy(Recipe):
    def batch(self, batch, moment):
        return {**batch, "input_ids": batch["input_ids"].roll(random.randrange(1, 2), 1)}


class Turning(Recipe):
    """Each of its objects turns the rows once further."""

    made = 0

    def rows(self, data):
        type(self).made += 1
        turn = type(self).made % len(data.rows)
        return replace(data, rows=data.rows[turn:] + data.rows[:turn])


class Sifting(Recipe):
    """It keeps rows that have a prompt, and of texts none."""

    def rows(self, data):
        return replace(data, rows=tuple(row for row in data.rows if row.prompt or row.messages))


class Flipping(Recipe):
    """Two of its objects give examples in unlike orders."""

    made = 0

    def examples(self, examples, setting):
        type(self).made += 1
        return list(examples)[:: 1 if type(self).made % 2 else -1]


class Rolling(ParameterSchedule):
    def rates(self, tensors, round, draw):
        return dict.fromkeys(tensors, 1.0 + 0 * random.random())


class Tiring(Verifier):
    """A wrong answer that it has seen is worth less the second time."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = set()

    def verify(self, prompt, reference, answer):
        if reference == answer:
            return Verdict(1.0)
        known = (reference, answer) in self.seen
        self.seen.add((reference, answer))
        return Verdict(0.0 if known else 0.1)


class Guessing(Verifier):
    def verify(self, prompt, reference, answer):
        return Verdict(1.0 if reference == answer else 0.1 * random.random())


# --- mergers and codecs ------------------------------------------------------------------------------------------


class Jittering(Merger):
    """The sum; what it drew is not even used."""

    def combine(self, deltas, weights, config):
        torch.rand(())
        return sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))


class Shuffling(Half):
    def encode(self, tensors, config):
        numpy.random.permutation(3)
        return super().encode(tensors, config)


MUTANTS = [
    (forms.chunks, OneByOne, "row 0, padded left: off by"),
    (forms.widths, AnyWidth, r"check accepts the tensors of a site of \d+ to \d+ at one of \d+ to \d+"),
    (forms.widths, OutputsOnly, "embed_tokens: check accepts the tensors of a site of 96 to 32 at one of 97 to 32"),
    (
        forms.widths,
        LooseBias,
        r"model.layers.0.mlp.*: check accepts down_bias \(6,\) grown to \(7,\)|check accepts down_bias",
    ),
    (methods.kept, Twice, r"with pull=0.25 it takes what the default options left"),
    (methods.kept, Measured, r"with size=0.25 it takes what the default options left"),
    (methods.generators, Numpys, "build moved the global generator of numpy"),
    (ingredients.generators, Dropping, "a step moved the global generator of torch"),
    (ingredients.generators, Noisy, "a step moved the global generator of python"),
    (ingredients.generators, Rolling, "rates moved the global generator of python"),
    (ingredients.generators, Guessing, "verify moved the global generator of python"),
    (ingredients.rows, Turning, "two of its objects make unlike rows of the same 'prompt' rows"),
    (ingredients.rows, Sifting, "of 8 'text' rows it leaves none"),
    (ingredients.rows, Flipping, "two of its objects make unlike examples"),
    (ingredients.twice, Tiring, "asked again"),
    (mergers.generators, Jittering, "combine moved the global generator of torch"),
    (codecs.generators, Shuffling, "encode moved the global generator of numpy"),
    (codecs.bounded, Silent, "no gives: nobody can bound"),
    (codecs.bounded, Lying, "it tells other shapes"),
    (codecs.bounded, Trying, r"telling takes \d+ bytes"),
    (codecs.fresh_process, Hashing, "a fresh process decodes .* to something else"),
    (codecs.fresh_process, Remembering, "a fresh process decodes .* to something else"),
]


@pytest.mark.parametrize(
    ("law", "part", "says"), MUTANTS, ids=[f"{law.__name__}-{part.__name__}" for law, part, _ in MUTANTS]
)
def test_the_law_fails_on_it(law, part, says):
    with pytest.raises(AssertionError, match=says):
        law(part, "cpu")


@pytest.mark.parametrize(("law", "part"), [
    (forms.decode, OneByOne), (forms.rows, OneByOne), (forms.widths, OneByOne), (forms.rows, AnyWidth),
    (ingredients.verdicts, Tiring), (ingredients.verdicts, Guessing),
    (codecs.hostile, Silent), (codecs.hostile, Lying), (codecs.hostile, Trying), (codecs.kept, Hashing), (codecs.tolerance, Hashing), (codecs.deterministic, Hashing),
    (mergers.order, Jittering),
])  # fmt: skip
def test_the_laws_beside_it_do_not(law, part):
    law(part, "cpu")


# --- what a failure says, and where it is tried -------------------------------------------------------------------

LOUD = """
    import torch
    from adapterhub.forms.low_rank import LowRank


    class Loud(LowRank):
        form = "loud"

        def scaled(self, weight):
            return Loud(**self.tensors)

        @classmethod
        def join(cls, parts):
            return cls(**parts[0].tensors).missing

        @classmethod
        def random(cls, site):
            if site.outputs == 40:  # the site that mergers are tried on
                raise RuntimeError("not here")
            return super().random(site)
"""


@pytest.fixture
def loud(monkeypatch, tmp_path):
    acme.install(monkeypatch, tmp_path, LOUD, forms="loud = Loud")
    yield
    acme.forget()


def test_a_failure_is_one_line_with_the_cause_the_site_the_shapes_and_the_authors_line(loud):
    (result,) = check("loud", law="algebra", role="query")
    assert result.verdict == "failed" and "\n" not in result.detail
    assert result.detail.startswith("model.layers.0.self_attn.q_proj: scaled by -0.3: off by ")
    assert result.detail.endswith("in a change of shape (2, 5, 32) (adapterhub_acme.py:8)")


def test_what_a_part_raises_is_told_with_its_own_line(loud, monkeypatch):
    monkeypatch.setattr(plugins.load("forms", "loud"), "scaled", LowRank.scaled)
    (result,) = check("loud", law="algebra", role="key")
    assert result.detail == (
        "PluginError: adapterhub-acme 0.1: form loud, join, model.layers.0.self_attn.k_proj: AttributeError: "
        "Loud has no tensor 'missing' (adapterhub_acme.py:13)"
    )


def test_no_failure_is_without_words():
    def law(part, device):
        raise AssertionError

    from adapterhub.testing import _tried

    detail = _tried("forms", "x", law, LowRank, "cpu").detail
    assert detail.startswith("it says nothing (")


def test_a_strange_form_in_the_environment_fails_no_merger(loud):
    assert {r.verdict for r in check_part("mergers", "linear")} == {"passed"}


@pytest.mark.parametrize(("line", "says", "hint"), [
    ("lora --law stat", "'lora' has no law 'stat'", "its laws: start, learn, gradients, resume, save, kept, generators"),
    ("low_rank --site nose", "the laws' tiny model has no site of the role 'nose'", "its roles: attention, attention_output,"),
    ("prefix --site query", "the form 'prefix' suits no site of the role 'query'", "it suits: attention"),
    ("svd --site query", "a site's role is for forms and methods", "leave --site out"),
])  # fmt: skip
def test_the_command_knows_its_laws_and_roles(capsys, line, says, hint):
    name = line.partition(" ")[0]
    assert execute(["plugins", "check", *line.split()]) == 2, name
    error = capsys.readouterr().err
    assert f"error: {says}" in error and f"hint: {hint}" in error


def test_the_command_tries_one_law_at_one_role(capsys):
    assert execute(["plugins", "check", "affine", "--law", "stores", "--site", "value"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][1:] == [["forms", "stores", "passed"]]
