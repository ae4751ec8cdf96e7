"""The skeleton of a base: the modules that its config.json describes, with no weights in them (torch's meta device)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub.bases import ResolvedBase, _quiet, first_line
from adapterhub.errors import IncompatibleBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(resolved: ResolvedBase) -> PreTrainedModel:
    """The causal language model on the meta device: it has sites and shapes, runs at no cost, and computes nothing.

    No code from the folder ever runs. Raises IncompatibleBase if transformers knows no such causal language model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(resolved.folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # a damaged config.json makes transformers raise anything
            raise IncompatibleBase(
                f"{resolved.name} is no causal language model: {first_line(error)}",
                "give another base model; models that bring their own code are not run",
            ) from error
    return model.eval().requires_grad_(False)
