"""Sites: the modules of a base model where a modification can sit, and their roles by architecture."""

from __future__ import annotations

from dataclasses import dataclass


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
