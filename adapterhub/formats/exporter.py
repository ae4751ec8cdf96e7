"""Export: a release as files for other software. PEFT's LoRA so far: what is low rank is written exactly."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapterhub import durable
from adapterhub.adapter import Adapter, Modifications
from adapterhub.compose import expand, warn_missing_parents
from adapterhub.errors import UsageError
from adapterhub.expression import Ref, references
from adapterhub.formats.peft import TENSORS
from adapterhub.formats.peft_config import CONFIG
from adapterhub.formats.peft_lora import PREFIX
from adapterhub.forms.low_rank import LowRank
from adapterhub.manifest import Manifest, Reference, Release
from adapterhub.plan import assemble
from adapterhub.tensors import dump

if TYPE_CHECKING:
    from adapterhub.hub import Hub

FORMATS = ("peft",)


def export(hub: Hub, reference: str | Reference, folder: str | Path, format: str = "peft") -> Path:
    """Write a release into a new folder: adapter_config.json, adapter_model.safetensors and a card, which plain PEFT loads
    with the same logits. A composition of low-rank adapters becomes one. Returns the folder.

    Raises UsageError for an unknown format, and when a form is not low rank; NameInUse when the folder is there already.
    Warns (ParentsWarning) of an adapter trained over another that is not in it: PEFT has no word for that."""
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}", f"formats: {', '.join(FORMATS)}; or bundle, for another hub")
    release = hub.resolve(reference)
    node = expand(hub, Ref(Reference(release.name, release.version)))
    warn_missing_parents([hub.resolve(reference) for reference in dict.fromkeys(references(node))])
    parts = _low_rank(release, assemble(node, _loader(hub), join=True))
    folder = durable.user_path(folder)
    with durable.new_folder(folder) as out:
        tensors = {}
        for path, part in parts.items():
            tensors[f"{PREFIX}{path}.lora_A.weight"] = part.down
            tensors[f"{PREFIX}{path}.lora_B.weight"] = part.up
        durable.write_bytes(out / TENSORS, dump(tensors))
        config = _config(release.manifest, parts)
        durable.write_bytes(out / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
        durable.write_bytes(out / "README.md", _card(release).encode())
    return folder


def _loader(hub: Hub):
    def load(key: str) -> Modifications:
        return Adapter.load(hub, hub.resolve(key)).modifications()

    return load


def _low_rank(release: Release, program: Modifications) -> dict[str, LowRank]:
    """{site path: the one low-rank change there}; several at a site are joined, which is exact."""
    others = Counter(
        type(p).form if hasattr(type(p), "form") else "composition" for here in program.values() for p in here
    )
    if set(others) != {"low_rank"}:
        foreign = ", ".join(f"{count} {form}" for form, count in sorted(others.items()) if form != "low_rank")
        raise UsageError(
            f"{release} cannot be written for PEFT's LoRA: it holds {foreign or 'no tensors'}",
            f"for another hub: adapterhub export {release} --format bundle OUT",
        )
    return {path: here[0] if len(here) == 1 else LowRank.join(here) for path, here in sorted(program.items())}


def _config(manifest: Manifest, parts: Mapping[str, LowRank]) -> dict[str, Any]:
    """PEFT's config with the exact scale of every site: alpha / r (or its root) gives it back, so that A and B are
    written as they are. Names are whole paths, and patterns anchored: neither matches any other module."""
    ranks = {path: part.down.shape[0] for path, part in parts.items()}
    scales = {path: float(part.scale) for path, part in parts.items()}
    plain = {path: _alpha(scales[path], ranks[path]) for path in parts}
    rooted = {path: _alpha(scales[path], math.sqrt(ranks[path])) for path in parts}
    # rsLoRA where only that gives whole numbers, as it was trained; the scale is the same either way.
    use_rslora = not _whole(plain) and _whole(rooted)
    alphas = rooted if use_rslora else plain
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    options = manifest.method.options if manifest.method and manifest.method.name == "lora" else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.base.name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": options.get("lora_dropout", 0.0),
        "use_rslora": use_rslora,
        "target_modules": list(parts),
        "rank_pattern": {_anchored(path): n for path, n in ranks.items() if n != r},
        "alpha_pattern": {_anchored(path): a for path, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _alpha(scale: float, divisor: float) -> float | int:
    """alpha with alpha / divisor = scale: a whole number if it gives the same float32, else the exact product (a float32
    times a rank has no rounding in float64)."""
    near = round(scale * divisor)
    same = torch.tensor(near / divisor, dtype=torch.float32) == torch.tensor(scale, dtype=torch.float32)
    return near if same else scale * divisor


def _whole(alphas: Mapping[str, float | int]) -> bool:
    return all(isinstance(alpha, int) for alpha in alphas.values())


def _anchored(path: str) -> str:
    """An expression for this path and no other (PEFT lets anything with a dot stand before an expression)."""
    return "^" + path.replace(".", r"\.")


def _card(release: Release) -> str:
    manifest = release.manifest
    front = {"base_model": manifest.base.name, "library_name": "peft", "license": manifest.licence}
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]  # JSON texts are YAML
    parents = "".join(f"- {p.relation}: {p.name} {p.version}\n" for p in manifest.parents)
    return (
        "---\n" + "\n".join(lines) + "\n---\n\n"
        f"# {release}\n\nA LoRA adapter, exported by adapterhub from the release `{release.digest}`.\n"
        + (f"\nMade from:\n\n{parents}" if parents else "")
        + '\n```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, "this/folder")\n```\n'
    )
