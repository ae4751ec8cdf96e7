"""Sites: the modules of a base model where a modification can sit, and their roles by architecture."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from adapterhub.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Site:
    """A module of the base model where a modification can sit."""

    path: str
    """Where, in this model: "model.layers.3.self_attn.q_proj"."""
    role: str
    """What, in any model: "query", "ffn_down", "block", ...; "" for a module without a known role."""
    inputs: int
    """Width of what goes in."""
    outputs: int
    """Width of what comes out."""
    linear: bool
    """Whether the module is one weight (and perhaps a bias)."""

    @property
    def layer(self) -> int | None:
        """The number of its layer, from its path; None outside the layers."""
        number = re.search(r"\.(\d+)(\.|$)", self.path)
        return int(number[1]) if number else None


@cache
def _roles(model_type: str) -> list[tuple[re.Pattern, str]]:
    families = tomllib.loads(files("adapterhub").joinpath("architectures.toml").read_text())
    return [
        (re.compile(re.escape(pattern).replace(r"\*", r"\d+")), role)
        for family in families.values()
        if model_type in family["model_types"]
        for pattern, role in family["roles"].items()
    ]


def sites(model: PreTrainedModel) -> list[Site]:
    """The sites of a loaded model in its own order: every module with a role, and every other linear layer without one."""
    import torch

    roles = _roles(model.config.model_type)
    width = model.config.get_text_config().hidden_size
    found = []
    for path, module in model.named_modules():
        role = next((role for pattern, role in roles if pattern.fullmatch(path)), "")
        if isinstance(module, torch.nn.Linear):
            found.append(Site(path, role, module.in_features, module.out_features, True))
        elif role:
            found.append(Site(path, role, width, width, False))
    return found


def select(sites: Sequence[Site], targets: str | Sequence[str]) -> list[Site]:
    """Sites by role ("query"), by the end of their path ("q_proj", "0.mlp") or "all-linear" (every linear layer but the head).

    Raises UsageError if a target selects nothing."""
    if targets == "all-linear":
        return [
            site for site in sites if site.linear and site.role != "head" and site.path.rpartition(".")[2] != "lm_head"
        ]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen = []
    for target in wanted:
        hits = [s for s in sites if target == s.role or s.path == target or s.path.endswith(f".{target}")]
        if not hits:
            roles = sorted({s.role for s in sites if s.role}) or sorted({s.path.rpartition(".")[2] for s in sites})
            raise UsageError(
                f"no site of this base is named {target!r}",
                f"use all-linear, a module's name, or one of: {', '.join(roles)}",
            )
        chosen += hits
    return [site for site in sites if site in set(chosen)]
