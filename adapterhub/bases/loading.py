"""From a folder to a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adapterhub.bases.resolution import INTEGERS, TOKENIZER_FILES, ResolvedBase, first_line, quantised, weight_files
from adapterhub.errors import HubError, IncompatibleBase, IntegrityError, UsageError
from adapterhub.files.safetensors_header import read_layout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TASKS = {
    "FOR_CAUSAL_LM_": "AutoModelForCausalLM",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM_": "AutoModelForSeq2SeqLM",
    "FOR_SEQUENCE_CLASSIFICATION_": "AutoModelForSequenceClassification",
    "FOR_TOKEN_CLASSIFICATION_": "AutoModelForTokenClassification",
    "FOR_QUESTION_ANSWERING_": "AutoModelForQuestionAnswering",
    "FOR_MASKED_LM_": "AutoModelForMaskedLM",
    "FOR_IMAGE_CLASSIFICATION_": "AutoModelForImageClassification",
    "FOR_SPEECH_SEQ_2_SEQ_": "AutoModelForSpeechSeq2Seq",
    "": "AutoModel",
}
"""transformers' MODEL_..._MAPPING, by which a class name is found -> the auto class that loads it."""


def skeleton(resolved: ResolvedBase) -> PreTrainedModel:
    """The model without its weights (on the meta device): widths and names only. No code from the folder runs.

    Raises IncompatibleBase if transformers does not know it."""
    import torch

    try:
        config, auto = _class(resolved)
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)
    except Exception as error:  # a damaged config.json makes transformers raise anything, AssertionError included
        raise IncompatibleBase(
            f"{resolved.name} is no model that transformers knows: {first_line(error)}",
            "give another base model; models that bring their own code are not run",
        ) from None


def _class(resolved: ResolvedBase) -> tuple[Any, Any]:
    """The config, and transformers' auto class for what its `architectures` names: a causal language model unless it is
    another that we know how to load."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(resolved.folder, local_files_only=True, trust_remote_code=False)
    for task, auto in TASKS.items():
        known = getattr(transformers, f"MODEL_{task}MAPPING").get(type(config), ())
        if {cls.__name__ for cls in (known if isinstance(known, tuple) else (known,))} & set(
            config.architectures or ()
        ):
            return config, getattr(transformers, auto)
    return config, transformers.AutoModelForCausalLM


def load_model(
    resolved: ResolvedBase, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The model that config.json's `architectures` names (without one, the causal language model), in eval mode and frozen.
    dtype: "float32", "bfloat16", "float16", "auto" (as stored) or torch's. No code from the folder ever runs. Raises
    IntegrityError if a weight is missing or left over, IncompatibleBase if it is no model that transformers knows."""
    import torch

    if isinstance(dtype, str) and dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise UsageError(f"unknown dtype {dtype!r}", "use float32, bfloat16, float16, auto or stored")
    from adapterhub.bases.device import default_device

    device = default_device(device)
    how = quantised(resolved.folder)
    if not how:
        _refuse_codes(resolved)
    get = (
        f"install what it is quantised with ({how}), or give the unquantised base"
        if how
        else "get the base model again"
    )
    with quiet():
        try:
            _, auto = _class(resolved)
            model, info = auto.from_pretrained(
                resolved.folder,
                dtype=dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # a damaged config.json makes transformers raise anything, AssertionError included
            raise IncompatibleBase(
                f"{resolved.name} does not load as a model that transformers knows: {first_line(error)}",
                get if how else "give another base model; models that bring their own code are not run",
            ) from error
    _require_all_weights(resolved, info["missing_keys"], info["unexpected_keys"], get)
    return model.to(device).eval().requires_grad_(False)


def _refuse_codes(resolved: ResolvedBase) -> None:
    """Refuse integers as weights of a base that does not say how it is quantised: transformers would compute with them."""
    for file in weight_files(resolved.folder):
        for name, (kind, shape, _) in read_layout(file).items():
            if kind in INTEGERS and len(shape) > 1 and name.endswith(".weight"):
                raise IntegrityError(
                    f"{resolved.name} holds {name} as integers, and its config.json does not say how it is quantised",
                    "give the unquantised base",
                )


def _require_all_weights(
    resolved: ResolvedBase, missing: Collection[str], unexpected: Collection[str], get: str
) -> None:
    if missing:
        # transformers would fill them with random numbers.
        raise IntegrityError(
            f"{resolved.name} lacks weights of its own architecture: {', '.join(sorted(missing)[:3])}", get
        )
    if unexpected:
        # transformers has taken out what the architecture declares as needless; without the rest it is another model.
        raise IntegrityError(
            f"{resolved.name} has weights that its config.json does not use: "
            f"{', '.join(sorted(unexpected)[:3])} ({len(unexpected)} in all)",
            f"{get}, config.json and weights from one place",
        )


def load_tokenizer(resolved: ResolvedBase) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, or None if there is none."""
    if not any((resolved.folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(resolved.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raise bare Exceptions on damaged files
            raise HubError(
                f"the tokenizer of {resolved.name} does not load: {first_line(error)}",
                "get the base model again",
            ) from error


@contextmanager
def quiet():
    """transformers' progress bars and notices off while it loads; errors stay."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
