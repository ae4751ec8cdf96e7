"""Taps: a modification reads hidden states of other sites, as the adapters in the stack left them, of its own rows."""

import copy

import pytest
import torch

from adapterhub.errors import BatchError, IncompatibleBase
from adapterhub.forms.low_rank import LowRank
from adapterhub.kinds.modification import Modification
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.plan import stacked
from adapterhub.sites import Tap, sites, tapped
from adapterhub.testing.bed import alone, decoded, distance, logits, plan, random_adapter, tiny_llama
from adapterhub.testing.families import inputs, tiny

STATE, IDS = Tap("block", 0), Tap("embedding", into=True)


class Reader(Modification):
    """At the head: Δy = table[ids] + (what the first block puts out) times up."""

    form = "reader"
    stores = ("table", "up")
    taps = (STATE, IDS)

    def delta_out(self, x, y, step):
        kept = y.shape[1]
        return self.table[step.tap(IDS)[:, -kept:]] + step.tap(STATE)[:, -kept:] @ self.up.mT


def reader(seed):
    torch.manual_seed(seed)
    return {"lm_head": [Reader(table=torch.randn(96, 96), up=torch.randn(96, 32) * 0.1)]}


def to(adapter, dtype=torch.float64):
    return {path: [part.to(dtype=dtype) for part in parts] for path, parts in adapter.items()}


@pytest.fixture
def model():
    return tiny_llama().double()


def by_hand(model, part, ids):
    kept = {}
    hook = model.get_submodule("model.layers.0").register_forward_hook(lambda m, a, out: kept.update(h=out))
    y = model(input_ids=ids[None]).logits[0]
    hook.remove()
    h = kept["h"][0] if isinstance(kept["h"], tuple) else kept["h"]
    return y + part.table[ids] + h.reshape(len(ids), -1) @ part.up.T


SEQUENCES = [torch.arange(5, 14), torch.arange(40, 46), torch.arange(20, 32)]


@torch.no_grad()
def test_it_reads_what_the_stack_beneath_left(model):
    lora, ours = random_adapter(LowRank, model, 3), to(reader(1))
    changed = copy.deepcopy(model)
    for path, (part,) in lora.items():
        if (module := changed.get_submodule(path)).__class__.__name__ == "Linear":
            module.weight += part.scale * part.up @ part.down
    lora = {path: parts for path, parts in lora.items() if path != "model.embed_tokens"}
    for order in ([lora, ours], [ours, lora]):
        got = alone(Attachment.of(model), stacked(order), SEQUENCES[0])
        assert distance(got, by_hand(changed, ours["lm_head"][0], SEQUENCES[0])) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_read_their_own(model, side):
    rows = [to(reader(1)), {}, to(reader(2))]
    for got, row, sequence in zip(logits(Attachment.of(model), rows, SEQUENCES, side), rows, SEQUENCES, strict=True):
        with torch.no_grad():
            want = (
                by_hand(copy.deepcopy(model), row["lm_head"][0], sequence) if row else model(sequence[None]).logits[0]
            )
        assert distance(got, want) < 1e-9


def test_a_chunk_reads_its_own_tokens(model):
    rows = [to(reader(1)), to(reader(2)), {}]
    whole = logits(Attachment.of(model), rows, SEQUENCES, "left")
    for got, want in zip(decoded(Attachment.of(model), rows, SEQUENCES, "left", 3), whole, strict=True):
        assert distance(got, want) < 1e-9


def test_only_the_last_logits(model):
    attachment, ids = Attachment.of(model), SEQUENCES[0][None]
    with torch.no_grad(), attachment.running(plan(attachment, [to(reader(1))])):
        whole, last = model(input_ids=ids).logits, model(input_ids=ids, logits_to_keep=2).logits
    assert distance(last, whole[:, -2:]) < 1e-9


def test_gradients_reach_through_it(model):
    model.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    lora, ours = random_adapter(LowRank, model, 3), to(reader(1))
    leaf = lora["model.layers.0.mlp.down_proj"][0].tensors["up"].requires_grad_()
    attachment = Attachment.of(model)
    with attachment.running(plan(attachment, [stacked([lora, ours])], trains=True)):
        out = model(input_ids=SEQUENCES[0][None]).logits
        (got,) = torch.autograd.grad(out.square().mean(), leaf)
    model.activation_checkpointing_disable()
    with attachment.running(plan(attachment, [stacked([lora, ours])], trains=True)):
        (want,) = torch.autograd.grad(model(input_ids=SEQUENCES[0][None]).logits.square().mean(), leaf)
    assert distance(got, want) < 1e-9


def test_what_has_not_run_is_an_error(model):
    attachment = Attachment.of(model)
    with attachment.running(plan(attachment, [to(reader(1))])), pytest.raises(BatchError, match="embedding") as caught:
        model(inputs_embeds=torch.zeros(1, 4, 32, dtype=torch.float64))
    assert "input_ids" in caught.value.hint


def test_a_base_without_the_site_is_refused(model):
    attachment = Attachment.of(model)

    class Far(Reader):
        taps = (Tap("block", 7),)

    far = {"lm_head": [Far(table=torch.zeros(96, 96), up=torch.zeros(96, 32))]}
    with pytest.raises(IncompatibleBase, match="layer 7"), attachment.running(plan(attachment, [far])):
        pass


def test_taps_name_modules_in_every_family():
    for name in ("gpt2", "bert", "t5"):
        base = tiny(name)
        here = sites(base)
        part = next(site.part for site in here if site.role == "block")
        path = tapped(here, Tap("block", 0, part=part)).path
        assert (
            next(site for site in here if site.role == "block" and site.layer == 0 and site.part == part).path == path
        )


def test_causal_sites():
    """By the architectures' own definition: decoders look back only, encoders both ways."""
    want = {"gpt2": True, "llama": True, "bert": False, "vit": False}
    for name, causal in want.items():
        assert {site.causal for site in sites(tiny(name))} == {causal}, name
    for site in sites(tiny("t5")):
        assert site.causal == (site.part != "encoder"), site


def test_an_encoder_inside_an_encoder_decoder_sees_its_mask():
    """A form that reads the mask: padding in the encoder is none of its business."""

    class Counting(Modification):
        form = "counting"
        stores = ("width",)

        def delta_out(self, x, y, step):
            real = torch.ones(y.shape[:2], dtype=torch.bool) if step.mask is None else step.mask
            return (real.sum(1)[:, None, None] * self.width).expand_as(y)

    base = tiny("t5").double()
    path = next(s.path for s in sites(base) if s.role == "ffn" and s.part == "encoder")
    adapter = {path: [Counting(width=torch.full((base.config.d_model,), 0.01, dtype=torch.float64))]}
    sequences = [torch.arange(5, 12), torch.arange(30, 34)]
    attachment = Attachment.of(base)
    for got, sequence in zip(logits(attachment, [adapter, adapter], sequences, "right"), sequences, strict=True):
        with torch.no_grad(), attachment.running(plan(attachment, [adapter])):
            want = base(**inputs(base, [sequence])).logits[0]
        assert distance(got[: len(want)], want) < 1e-9
