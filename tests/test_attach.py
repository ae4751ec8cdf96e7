"""What must not leak: from one call into another, from one forward pass into a checkpoint's second run, out of a detach."""

import copy

import pytest
import torch

from adapterhub.errors import BatchError, UsageError
from adapterhub.forms.composers import Mix, Scaled, Stack
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.modification import Modification, Step
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.fold import fold
from adapterhub.runtime.model import Model
from adapterhub.runtime.plan import build
from adapterhub.testing.bed import random_adapter, tiny_llama

IDS = torch.arange(3, 21).reshape(2, 9)


def plan(*rows):
    return build(rows, len(rows) if len(rows) > 1 else None, object(), trains=True)


def test_outside_of_a_call_the_base_is_bare_also_with_gradients_on():
    base = tiny_llama()
    bare = base(input_ids=IDS).logits
    model = Model(base)
    model.attach_new({path: parts[0] for path, parts in random_adapter(LowRank, base, 1).items()})
    changed = model(input_ids=IDS).logits
    assert not torch.allclose(changed, bare, atol=1e-2)
    assert torch.equal(base(input_ids=IDS).logits, bare)
    assert torch.equal(Model(base)(input_ids=IDS).logits, bare)  # a second one on the same base
    assert torch.equal(model(input_ids=IDS).logits, changed)


def test_a_detached_or_folded_model_takes_no_calls():
    base = tiny_llama()
    model = Model(base)
    model.attach_new({path: parts[0] for path, parts in random_adapter(LowRank, base, 1).items()})
    model(input_ids=IDS)
    model.detach()
    with pytest.raises(UsageError, match="detached"):
        model(input_ids=IDS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_again_under_its_own_forward(reentrant):
    """Two adapters, two masks, then one backward: gradients as without checkpointing."""

    class Masked(LowRank):
        """Its change depends on the mask, so that a wrong mask shows."""

        def delta_out(self, x, y, step):
            return super().delta_out(x, y, step) * (1 + step.mask.sum())

    def gradients(checkpointing):
        base = tiny_llama().double().requires_grad_(False)
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
            base.train()
        adapters = [random_adapter(Masked, base, seed) for seed in (1, 2)]
        leaves = [p.tensors["down"].requires_grad_() for a in adapters for parts in a.values() for p in parts]
        masks = [torch.ones_like(IDS), torch.ones_like(IDS)]
        masks[1][0, :4] = 0
        total = 0
        for adapter, mask, weight in zip(adapters, masks, (1, 2), strict=True):
            with Attachment.of(base).running(plan(adapter)):
                out = base(input_ids=IDS, attention_mask=mask, use_cache=False)
            total = total + weight * out.logits.square().mean()
        total.backward()
        return [leaf.grad for leaf in leaves]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-9, atol=1e-12)


class Twice(Modification):
    """A form that changes the input: what goes in is doubled, and the output tells what input it saw."""

    form = "twice"

    def delta_in(self, x, step):
        return x

    def delta_out(self, x, y, step):
        return 10 * x


class More(Modification):
    """One more goes in."""

    form = "more"

    def delta_in(self, x, step):
        return torch.ones_like(x)


def through(modification, x):
    """A site that is the identity."""
    step = Step()
    change = modification.delta_in(x, step)
    inner = x if change is None else x + change
    return inner + modification.delta_out(inner, inner, step)


def test_input_changes_in_stacks_mixes_and_scales():
    x, t = torch.ones(1, 1, 1, dtype=torch.float64), Twice()
    assert through(t, x) == 2 + 20
    assert through(Stack([t]), x) == 22
    # Outer first: 2 then 4 go in; the inner one saw 4, the outer one its own 2.
    assert through(Stack([t, t]), x) == 4 + 40 + 20
    # The last is outermost: 1 more goes in first, then the double of that.
    assert Stack([t, More()]).delta_in(x, Step()) == 3 and Stack([More(), t]).delta_in(x, Step()) == 2
    assert through(Mix([t, t]), x) == 3 + 20 + 20  # first order: both add x to what goes in, each reads its own 2
    assert through(Mix([Stack([t]), Stack([t])]), x) == 43  # as the planner builds it
    assert through(Scaled(t, 0.5), x) == through(Scaled(Stack([t]), 0.5), x) == 1.5 + 10  # half of each of its changes


def test_a_scale_is_the_same_on_a_bfloat16_base():
    part = LowRank(down=torch.eye(4), up=torch.eye(4), scale=torch.tensor(16 / 6**0.5))
    x = torch.randn(1, 64, 4).bfloat16()
    moved = part.scaled(0.7).to(dtype=torch.bfloat16)
    exact = (x.double() * (0.7 * 16 / 6**0.5)).bfloat16()
    assert (moved.delta_out(x, x, Step()) == exact).float().mean() > 0.99  # float32 may tip a tie
    assert moved.scale.dtype == torch.float32 and moved.down.dtype == torch.bfloat16


def test_fold_is_exact_in_float64_and_needs_no_hooks():
    base = tiny_llama().double()
    adapter = random_adapter(LowRank, base, 1)
    with torch.no_grad():
        with Attachment.of(base).running(plan(adapter)):
            want = base(input_ids=IDS).logits
        folded = copy.deepcopy(base)
        fold(folded, adapter)
        got = folded(input_ids=IDS).logits
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()


def test_a_folded_base_is_folded_once_and_its_other_models_refuse():
    base = tiny_llama()
    one, other = Model(base), Model(base)
    one.fold()
    for model in (one, other):
        with pytest.raises(UsageError, match="folded"):
            model(input_ids=IDS)
        with pytest.raises(UsageError, match="folded"):
            model.fold()
        with pytest.raises(UsageError, match="folded"):
            model.use(None)
    assert Model(base)(input_ids=IDS).logits.isfinite().all()  # a new one takes the base as it is now


def test_ids_once_and_embeddings_then_is_told_each_time():
    """An adapter of the embedding has no say where the embedding is not asked: never in silence."""
    base = tiny_llama()
    adapter = random_adapter(LowRank, base, 1)
    program = build([adapter], None, "one")
    with torch.no_grad(), Attachment.of(base).running(program):
        base(input_ids=IDS)
        with pytest.raises(BatchError, match="embed_tokens"):
            base(inputs_embeds=base.model.embed_tokens.weight[IDS])
        base(input_ids=IDS)
