"""Which sites a user means: all-linear, roles, or module names."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.errors import UsageError
from adapterhub.sites.site import Site


def select(sites: Sequence[Site], targets: str | Sequence[str]) -> list[Site]:
    """Sites by role ("query", "decoder.query", "cross.value"), by the end of their path ("q_proj", "0.mlp") or
    "all-linear": every linear layer but the head, a fused projection whole.

    Raises UsageError if a target selects nothing."""
    if targets == "all-linear":
        heads = ("lm_head", "classifier", "score")
        return [
            site
            for site in sites
            if site.linear and not site.columns and site.role != "head" and site.path.rpartition(".")[2] not in heads
        ]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen = []
    for target in wanted:
        hits = [
            s
            for s in sites
            if target in (s.role, f"{s.part}.{s.role}") or s.path == target or s.path.endswith(f".{target}")
        ]
        if not hits and target == "ffn":  # a family without a module around its two layers: what the second puts out
            hits = [s for s in sites if s.role == "ffn_down"]
        if not hits:
            raise _nothing(sites, target)
        chosen += hits
    return [site for site in sites if site in set(chosen)]


def _nothing(sites: Sequence[Site], target: str) -> UsageError:
    roles = sorted({site.role for site in sites if site.role})
    if roles or not sites:
        return UsageError(
            f"no site of this base is named {target!r}",
            f"use all-linear, a module's name, or one of: {', '.join(roles)}",
        )
    kind, names = sites[0].model_type, sorted({site.path.rpartition(".")[2] for site in sites})
    return UsageError(
        f"no site of this base is named {target!r}: the roles of the architecture {kind!r} are not known",
        f"use all-linear or a module's name ({', '.join(names)}); or name its modules' roles in "
        f"adapterhub/sites/architectures.toml: model_types = [{kind!r}] and a line for each, as the families there have it",
    )
