"""The adapter in a PEFT folder, of whatever type, as tensors by our names. Every tensor of the file is accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapterhub import plugins
from adapterhub.adapters.adapter import modifications_of
from adapterhub.errors import AGAIN, IntegrityError, ManifestError, NotFound, UnsafeFile
from adapterhub.formats.peft import bounded_re
from adapterhub.formats.peft.base import BaseModel
from adapterhub.formats.peft.config import CONFIG, MEASURED, Config, LoraConfig
from adapterhub.formats.peft.lora import read_lora
from adapterhub.formats.peft.names import current
from adapterhub.formats.peft.prompt import read_prompt
from adapterhub.formats.peft.tuner import read_tuner
from adapterhub.formats.peft.types import CACHES, PROMPTS
from adapterhub.kinds.modification import Modifications
from adapterhub.runtime.plan import stacked
from adapterhub.spec.manifest import Made
from adapterhub.tensors.file import load

TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftAdapter:
    parts: Modifications
    """What is LoRA stays as stored, bit by bit; what had to be computed is float32."""
    method: Made | None
    """`lora` with the options in PEFT's names, if that is all there is."""


def read(folder: Path, config: Config, base: BaseModel) -> PeftAdapter:
    """The adapter in a folder, for this base. Weights of the base are loaded only where the change depends on them.

    Raises UnsafeFile (pickle, NaN), NotFound, IntegrityError or IncompatibleBase listing every tensor that has no place,
    HubError for what no form holds, ManifestError for an expression that takes too long."""
    stored = _stored(folder)
    try:
        if config.peft_type in CACHES | PROMPTS:
            return PeftAdapter(read_prompt(folder.name, config, stored, base), None)
        config, stored = current(config, stored, base)
        if isinstance(config, LoraConfig):
            return _lora(folder.name, config, stored, base)
        return PeftAdapter(read_tuner(folder.name, config, stored, base), None)
    except bounded_re.BadExpression as error:
        raise ManifestError(f"{CONFIG} has a pattern that cannot be used: {error}"[:200], AGAIN) from None


def _lora(label: str, config: LoraConfig, stored: Mapping[str, Tensor], base: BaseModel) -> PeftAdapter:
    if any(config.raw.get(key) for key in MEASURED):
        return PeftAdapter(read_tuner(label, config, stored, base), None)
    lora = read_lora(label, config, stored, base.skeleton, base.sites)
    parts = modifications_of(lora.tensors)
    if lora.rest or config.modules_to_save or config.trainable_token_indices:
        parts = stacked([parts, read_tuner(label, config, stored, base, lora.paths)])
    elif not parts:
        raise IntegrityError(f"{label} holds no LoRA tensors", AGAIN)
    alone = {part.form for here in parts.values() for part in here} == {"low_rank"} and not lora.rest
    made = Made(name="lora", options=lora.options, distribution=plugins.distribution("methods", "lora"))
    return PeftAdapter(parts, made if alone else None)


def _stored(folder: Path) -> dict[str, Tensor]:
    if not (folder / TENSORS).is_file():
        if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")):
            raise UnsafeFile(
                f"{folder.name} holds its weights as a pickle ({pickles[0]}), which can run code when opened",
                "get a copy with safetensors, or convert it where it can do no harm: PEFT's save_pretrained writes safetensors",
            )
        raise NotFound(f"{folder} holds no {TENSORS}", AGAIN)
    return load(folder / TENSORS)
