"""Every law of methods fails on a method that breaks it."""

import pytest
import torch

from adapterhub.errors import UsageError
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.method import Method
from adapterhub.methods.lora import LoRA
from adapterhub.testing import methods
from adapterhub.testing.forms import Declined


class Offset(LoRA):
    """B is not zero."""

    def build(self, sites, config):
        parts = super().build(sites, config)
        for part in parts.values():
            part.tensors["up"] += 0.1
        return parts


class Honest(Offset):
    starts_at_base = False


class Forgetful(LoRA):
    def after_step(self, modifications):
        for part in modifications.values():
            part.up.zero_()


class Spare(LowRank):
    stores = (*LowRank.stores, "spare")


class Unused(LoRA):
    def build(self, sites, config):
        parts = super().build(sites, config)
        return {path: Spare(**part.tensors, spare=torch.zeros(3)) for path, part in parts.items()}


class Bound(LowRank):
    def bind(self, weight):
        self.weight = weight


class Vandal(LoRA):
    """It trains the base too."""

    def build(self, sites, config):
        return {path: Bound(**part.tensors) for path, part in super().build(sites, config).items()}

    def after_step(self, modifications):
        for part in modifications.values():
            part.weight.mul_(0.999)


class Counting(LoRA):
    """What it does at a step hangs on how many it has seen itself."""

    def build(self, sites, config):
        type(self).steps = 0
        return super().build(sites, config)

    def after_step(self, modifications):
        type(self).steps += 1
        for part in modifications.values():
            part.up.mul_(1 - 0.01 * type(self).steps)


class Louder(LowRank):
    gain = 1.0

    def delta_out(self, x, y, step):
        return super().delta_out(x, y, step) * self.gain


class Secret(LoRA):
    """What it stores is not all that it runs."""

    def build(self, sites, config):
        parts = {path: Louder(**part.tensors) for path, part in super().build(sites, config).items()}
        for part in parts.values():
            part.gain = 2.0
        return parts


class Nothing(Method):
    def build(self, sites, config):
        return {}


@pytest.mark.parametrize(
    ("law", "method", "says"),
    [
        (methods.start, Offset, "moves the logits"),
        (methods.learn, Forgetful, "the loss went"),
        (methods.gradients, Unused, "no gradient reaches"),
        (methods.gradients, Vandal, "changed the base"),
        (methods.gradients, Nothing, "nothing to train"),
        (methods.resume, Counting, "other values"),
        (methods.save, Secret, "away from the trained one"),
    ],
)
def test_a_method_that_breaks_it_fails(law, method, says):
    with pytest.raises((AssertionError, UsageError), match=says):
        law(method, "cpu")


def test_a_method_that_says_it_changes_the_base_is_excused():
    with pytest.raises(Declined):
        methods.start(Honest, "cpu")
    methods.learn(Honest, "cpu")
