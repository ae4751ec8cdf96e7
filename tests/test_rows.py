"""The promise of a batch: each row gives what it gives alone and unpadded, whatever the others run, in every family."""

import inspect

import pytest
import torch
from float64 import in_float64

from adapterhub import plugins
from adapterhub.bases import loading, resolution
from adapterhub.forms.composers import Mix, Scaled, Stack
from adapterhub.forms.prefix import Prefix
from adapterhub.runtime.attachment import Attachment
from adapterhub.runtime.plan import stacked
from adapterhub.sites import family, sites
from adapterhub.testing.bed import alone, decoded, distance, logits, random_adapter
from adapterhub.testing.families import FAMILIES, tiny

EAGER_IN_FLOAT64 = ("gpt2", "bert", "roberta", "t5", "whisper", "audio")
"""The other families' eager kernels in transformers compute the softmax in float32 whatever comes in: that is no float64, and
a masked score, the lowest float64, is minus infinity there, so that a row padded on the left is not a number in the bare
base already. They are held to float32's tolerance in float32."""
BFLOAT16 = 0.04
"""Of the largest logit: both the routed row and the row alone are rounded to 8 bits at every module, in unlike orders."""


def programs(model, strength, among=None):
    """By name, a program for each row: every installed form at every site it suits (columns of a fused projection, the
    embedding and norms too; or at those `among` them, and prefixes at the last), three forms in a stack, the half of that, mixed prefixes, the bare base."""

    def one(form, seed):
        return random_adapter(plugins.load("forms", form), model, seed, among)

    def weighed(adapter, weight):
        return {path: [Scaled(Stack(parts), weight)] for path, parts in adapter.items()}

    def prefix(seed, moves=False):
        made, parts = {}, one("prefix", seed)
        for path in list(parts)[-1:] if among else parts:
            [part] = parts[path]
            shift = torch.tensor(part.keys.shape[1] if moves else 0)
            made[path] = [Prefix(keys=part.keys, values=0.2 * part.values, shift=shift)]
        return made

    forms = [form for form in plugins.names("forms") if form != "prefix"]
    # A random magnitude is another length for every row of a weight: DoRA moves most, and so does what PEFT's layer computes.
    less = {"dora": 0.4, "peft": 0.3}
    rows = {form: weighed(one(form, seed), strength * less.get(form, 1)) for seed, form in enumerate(forms)}
    rows["prefix"] = prefix(20)
    rows["another prefix"] = prefix(21)
    rows["stack"] = stacked([rows["bottleneck"], rows["low_rank"], rows["prefix"]])
    rows["half the stack"] = weighed(rows["stack"], 0.5)
    mixed = [weighed(prefix(seed), weight) for seed, weight in ((22, 0.7), (23, 0.6))]
    rows["mixed prefixes"] = {path: [Mix([Stack(m[path]) for m in mixed])] for path in mixed[0]}
    if moves_positions(model):
        rows["prefix that moves"] = prefix(20, moves=True)
    rows["base"] = {}
    return rows


def moves_positions(model):
    taken = "position_ids" in inspect.signature(model.forward).parameters
    return taken and not family(model.config.model_type).own_positions


def hold(model, tolerance, strength=None, among=None, vocabulary=96):
    bed = Attachment.of(model)
    strength = strength or {"vit": 1.0}.get(model.config.model_type, 0.5)
    named = programs(model, strength, among)
    rows = list(named.values())
    generator = torch.Generator().manual_seed(0)
    lengths = [9 + 7 * row % 12 for row in range(len(rows))]
    sequences = [torch.randint(3, vocabulary, (n,), generator=generator).to(model.device) for n in lengths]
    want = [alone(bed, row, s) for row, s in zip(rows, sequences, strict=True)]
    for name, row, own, sequence in zip(named, rows, want, sequences, strict=True):
        moved = (own - alone(bed, {}, sequence)).abs().max().item()
        assert 0.1 <= moved <= 5 or not row, f"{name} moves the logits by {moved:.2f}: not a fair trial"
    worst = {}
    for side in ("left", "right"):
        trials = {"whole": logits(bed, rows, sequences, side)}
        if model.can_generate() and not (side == "right" and getattr(model.config, "sliding_window", None)):
            trials["cached"] = decoded(bed, rows, sequences, side, steps=8)
        for trial, got in trials.items():
            for name, mine, own in zip(named, got, want, strict=True):
                worst[f"{name}, padded {side}, {trial}"] = distance(mine, own)
    bed.detach()
    off = {name: f"{value:.1e}" for name, value in worst.items() if not value <= tolerance}
    assert not off, f"off by more than {tolerance} of the largest logit: {off}"
    return max(worst.values())


KINDS = [*FAMILIES, "audio"]


def make(name, kernel, **changes):
    if name == "audio":  # the encoder by itself: it gets no mask at all
        return tiny("whisper", kind="WhisperForAudioClassification", attn_implementation=kernel, **changes)
    return tiny(name, attn_implementation=kernel, **changes)


@pytest.mark.parametrize("name", KINDS)
def test_sdpa_in_float64(name, device):
    hold(in_float64(make(name, "sdpa")).to(device), 1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "audio"])
def test_sdpa_in_float32(name, device):
    hold(make(name, "sdpa").to(device, torch.float32), 1e-5)


@pytest.mark.parametrize("name", EAGER_IN_FLOAT64)
def test_eager_in_float64(name, device):
    hold(in_float64(make(name, "eager")).to(device), 1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_eager_in_float32(name, device):
    hold(make(name, "eager").to(device, torch.float32), 1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_sdpa_in_bfloat16(name, device):
    hold(make(name, "sdpa").to(device, torch.bfloat16), BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_smollm2(device, dtype, tolerance):

    model = loading.load_model(resolution.resolve("smollm2"), dtype, device)
    model = in_float64(model) if dtype == torch.float64 else model
    among = [site for site in sites(model) if site.layer in (0, 14, 29) and site.role not in ("block", "norm")]
    hold(model, tolerance, strength=0.05, among=among, vocabulary=40_000)
