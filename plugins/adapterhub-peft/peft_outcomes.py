"""What becomes of each of PEFT's types as a method, found out by trying: `outcome(type)`, and FAMILIES to try further."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from adapterhub_peft import Peft
from adapterhub_peft_layer import TRAINED, TYPES, PeftLayer, layer_state
from torch import Tensor, nn

from adapterhub.errors import HubError
from adapterhub.formats.peft.tuner import built
from adapterhub.runtime.model import Model
from adapterhub.testing.bed import tiny_llama
from adapterhub.training.stages import attach, given, trained

SMALL: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 50},
    "LILY": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 8},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 7]},
    "UNILORA": {"theta_d_length": 16, "init_theta_d_bound": 0.2},
    "VBLORA": {"num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 50},
    **{kind: {"r": 4} for kind in (
        "DEFT", "DELORA", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA", "LORA", "MISS", "PEANUT", "PSOFT", "PVERA", "VERA",
    )},
}  # fmt: skip
"""Options with which a type suits a model of width 32; of those left out PEFT's own do."""
FAMILIES = {
    kind: {"type": kind, "config": SMALL.get(kind, {})}
    for kind in (
        "BEFT", "C3A", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "LORA", "OFT",
        "OSF", "PSOFT", "RANDLORA", "ROAD", "SHIRA", "TINYLORA", "TRAINABLE_TOKENS", "VBLORA", "VERA",
    )
}  # fmt: skip
"""One type of each kind of change, with the options of the method `peft` that try it."""
EXACT = 1e-5
"""Of the largest logit."""
IDS = torch.arange(3, 27).reshape(2, 12)


def outcome(kind: str, lower: str = "auto", base: Callable[[], nn.Module] = tiny_llama) -> str:
    """ "lowered to <forms>", "runs in PEFT's layer", or "refused: <reason>": trained for three steps on a tiny model, whose logits and
    gradients must then be those of PEFT's own model with the same tensors, and its logits as stored. Raises AssertionError if not."""
    model, options = Model(base().requires_grad_(False)), SMALL.get(kind, {})
    try:
        stage = Peft().stages(Peft.Config(type=kind, config=options, lower=lower))[-1]
        start = given(model, {})
        attach(model, stage, start, 0)
    except HubError as error:
        return f"refused: {str(error).removeprefix(f'{kind} does not train here: ')}"
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    model.training_mode(True)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.training_mode(False)
    parts = {path: part for path, [part] in model.new_modifications().items()}
    peft = theirs(kind, options, parts, base())
    found, wanted = _logits(model), _logits(peft)
    assert _apart(_logits(base()), wanted) > 100 * EXACT, f"{kind}: nothing changes"
    assert _apart(found, wanted) < EXACT, f"{kind}: {_apart(found, wanted):.1e} from PEFT's while it trains"
    for each in (model, peft):
        each(input_ids=IDS, labels=IDS).loss.backward()
    largest = max(parameter.grad.abs().max() for parameter in model.trainable_parameters())
    for path, part in parts.items():
        state = layer_state(peft.base_model.model.get_submodule(path))
        for key in part.tensors.keys() & set(TRAINED):
            apart = (part.tensors[key].grad - state[part.names[key]].grad).abs().max() / largest
            assert apart < EXACT, f"{kind}: the gradient of {part.names[key]} at {path} is {apart:.1e} from PEFT's"
    done = stage.finish(trained(model), start)
    model.attach_new(done)
    assert _apart(_logits(model), wanted) < EXACT, (
        f"{kind}: {_apart(_logits(model), wanted):.1e} from PEFT's as it is stored"
    )
    forms = sorted({part.form for here in model.new_modifications().values() for part in here})
    return "runs in PEFT's layer" if forms == ["peft"] else f"lowered to {', '.join(forms)}"


def table() -> dict[str, str]:
    """{type: its outcome}, of every type that PEFT has."""
    return {kind: outcome(kind) for kind in sorted(TYPES)}


def theirs(kind: str, options: dict[str, Any], parts: dict[str, PeftLayer], base: nn.Module) -> nn.Module:
    """PEFT's own model on this base, with the tensors that our parts have."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = built(kind, {"target_modules": list(parts), **options}, base, trains=True).eval()
        for path, part in parts.items():
            state, tensors = layer_state(model.base_model.model.get_submodule(path)), part.whole()
            for key, name in part.names.items():
                state[name].copy_(tensors[key])
    return model


@torch.no_grad()
def _logits(model) -> Tensor:
    return model(input_ids=IDS).logits


def _apart(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
