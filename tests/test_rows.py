"""The promise of a batch: each row gives what it gives alone and unpadded, whatever the others run."""

import pytest
import torch

from adapterhub.attach import Attachment
from adapterhub.composers import Scaled, Stack
from adapterhub.forms.bottleneck import Bottleneck
from adapterhub.forms.low_rank import LowRank
from adapterhub.plan import stacked
from adapterhub.sites import sites
from adapterhub.testing.bed import alone, decoded, distance, logits, random_adapter, tiny_llama


def programs(model, strength=1.0):
    """LoRA, rsLoRA's scale, both bottlenecks, LoReFT, a stack of two, one at a quarter, the bare base."""
    from adapterhub_loreft import Subspace

    def low_rank(seed, rank, scale):
        torch.manual_seed(seed)
        return {
            s.path: [
                LowRank(
                    down=torch.randn(rank, s.inputs) * s.inputs**-0.5,
                    up=torch.randn(s.outputs, rank) * 0.05 * strength,
                    scale=torch.tensor(scale),
                )
            ]
            for s in sites(model)
            if s.linear and s.role != "head"
        }

    def bottleneck(seed, parallel):
        torch.manual_seed(seed)
        made = {}
        for s in sites(model):
            if s.role in ("attention", "ffn"):
                made[s.path] = [
                    Bottleneck(
                        down=torch.randn(6, s.outputs) * s.outputs**-0.5,
                        down_bias=torch.randn(6) * 0.1,
                        up=torch.randn(s.outputs, 6) * 0.1 * strength,
                        up_bias=torch.randn(s.outputs) * 0.05 * strength,
                        scale=torch.tensor(0.8),
                        **Bottleneck.switches(parallel, "relu"),
                    )
                ]
        return made

    lora, rslora = low_rank(1, 4, 16 / 4), low_rank(2, 7, 16 / 7**0.5)
    sequential, parallel = bottleneck(3, False), bottleneck(4, True)
    loreft = {
        path: [Scaled(part, strength) for part in parts] for path, parts in random_adapter(Subspace, model, 5).items()
    }
    rows = [
        lora,
        rslora,
        sequential,
        parallel,
        loreft,
        stacked([sequential, lora]),
        {path: [Scaled(Stack(parts), 0.25)] for path, parts in rslora.items()},
        {},
    ]
    return [
        {path: [part.to(model.device, model.dtype) for part in parts] for path, parts in row.items()} for row in rows
    ]


def hold(model, tolerance, strength=1.0, seed=0, vocabulary=93):
    bed = Attachment.of(model)
    rows = programs(model, strength)
    generator = torch.Generator().manual_seed(seed)
    sequences = [
        torch.randint(3, vocabulary, (n,), generator=generator).to(model.device)
        for n in (12, 20, 9, 15, 17, 10, 14, 11)
    ]
    want = [alone(bed, row, s) for row, s in zip(rows, sequences, strict=True)]
    base = [alone(bed, {}, s) for s in sequences]
    for i, (own, bare) in enumerate(zip(want[:-1], base, strict=False)):
        moved = (own - bare).abs().max().item()
        assert 0.1 <= moved <= 5, f"row {i} moves the logits by {moved:.2f}: not a fair trial"
    worst = 0.0
    for side in ("left", "right"):
        for got in (logits(bed, rows, sequences, side), decoded(bed, rows, sequences, side, steps=8)):
            worst = max(worst, *(distance(g, w) for g, w in zip(got, want, strict=True)))
    assert worst <= tolerance, f"off by {worst:.1e} of the largest logit"
    bed.detach()
    return worst


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_tiny_llama_with_grouped_queries(device, dtype, tolerance):
    hold(tiny_llama().to(device, dtype), tolerance, strength=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_smollm2(device, dtype, tolerance):
    from adapterhub import bases

    model = bases.load_model(bases.resolve("smollm2"), dtype, device)
    hold(model, tolerance, strength=0.02, vocabulary=40_000)
