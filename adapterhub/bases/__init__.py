"""Base models: a known name, a folder or a Hugging Face repo id becomes a folder of safetensors, then a loaded model.

A known name is an entry point of the group `adapterhub.bases`: a class whose instances have `note` (what its record
says about it) and `folder() -> Path` (makes the folder if it must).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub import durable, plugins
from adapterhub import project as projects
from adapterhub.boundary import Wrong, guard
from adapterhub.bounded import read_json
from adapterhub.errors import HubError, IncompatibleBase, IntegrityError, NotFound, UnsafeFile, UsageError
from adapterhub.formats.safetensors_header import read_layout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
REPO_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
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
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class ResolvedBase:
    """A base model on this machine."""

    name: str
    folder: Path
    """Holds config.json and safetensors, perhaps a tokenizer."""
    note: str = ""


def cache_folder() -> Path:
    """`ADAPTERHUB_CACHE`, else the platform's cache folder. Whatever lies there can be made again."""
    if folder := os.environ.get("ADAPTERHUB_CACHE"):
        return durable.user_path(folder)
    import platformdirs

    return Path(platformdirs.user_cache_dir("adapterhub"))


def resolve(base: str | Path) -> ResolvedBase:
    """A known name ("smollm2"), else a folder with config.json and safetensors, else a Hugging Face repo id, which is
    downloaded (from its own cache when offline). Before all, what the nearest adapterhub.toml calls so in [bases].

    Raises NotFound, or UnsafeFile for a folder of pickles."""
    text = str(base)
    if isinstance(base, str) and (folder := projects.nearest()) is not None:
        text = projects.read(folder).bases.get(text, text)
        base = folder / text if text.startswith((".", "/")) else text
    if text in plugins.enabled_names("bases"):
        return _known(text)
    folder = durable.user_path(base)
    if folder.is_dir():
        check_folder(folder)
        if not folder.resolve().name.isprintable():  # no release could record it
            raise UsageError(f"the folder's name {folder.resolve().name!r} holds control characters", "rename it")
        return ResolvedBase(folder.resolve().name, folder.resolve())
    if isinstance(base, Path) or folder.exists() or not REPO_ID.fullmatch(text):
        raise NotFound(f"there is no base model at {text}", "give a folder with config.json and *.safetensors")
    folder = _download(text)
    check_folder(folder)
    return ResolvedBase(text, folder)


def _known(name: str) -> ResolvedBase:
    part = plugins.load("bases", name)
    with guard(part, "__init__"):
        known = part()
    with guard(known, "folder"):
        folder, note = known.folder(), getattr(known, "note", "")
        if not isinstance(folder, str | Path) or not Path(folder).is_dir():
            raise Wrong(f"a folder that is there was expected, this is {folder!r}")
        if not isinstance(note, str):
            raise Wrong(f"its note is {note!r}, not a text")
    return ResolvedBase(name, Path(folder), note)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint in order: those that its index names, else the one file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise IntegrityError(f"{index} is not an index of safetensors", "get the base model again") from None
        if not all(type(name) is str and name == Path(name).name for name in names):
            raise UnsafeFile(f"{index} names files outside its folder", "get the base model from a source you trust")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise NotFound(f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} of {len(names)} files)",
                           "get the base model again")  # fmt: skip
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def check_folder(folder: Path) -> None:
    """Raises NotFound or UnsafeFile unless the folder holds config.json and all the safetensors it needs."""
    if not (folder / "config.json").is_file():
        raise NotFound(f"{folder} is no base model: it has no config.json", "give the folder of a transformers model")
    if not weight_files(folder):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise UnsafeFile(f"{folder} holds its weights as a pickle, which can run code when opened",
                             "get a copy with safetensors")  # fmt: skip
        raise NotFound(f"{folder} has no safetensors", "give the folder of a transformers model")


def quantised(folder: Path) -> str:
    """How the weights in a folder are quantised, as its config.json has it ("bitsandbytes", "gptq"); "" if they are not."""
    try:
        said = read_json((folder / "config.json").read_bytes(), strict=False).get("quantization_config")
    except (OSError, ValueError, AttributeError):  # whoever loads it says what is wrong
        return ""
    return str(said.get("quant_method") or "an unnamed method") if isinstance(said, dict) else ""


def _download(repo: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=REPO_FILES, ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise NotFound(f"the base model {repo} is gated", "accept its terms on the Hub, then `hf auth login`") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = f"the base model {repo!r} is not on this machine, and the Hub cannot be reached"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        problem = f"no base model {repo!r}: {first_line(error)}"
    near = get_close_matches(repo, plugins.enabled_names("bases"), 1)
    raise NotFound(
        problem,
        f"did you mean {near[0]!r}?" if near
        else f"give a folder, a repo id while online, or one of: {', '.join(plugins.enabled_names('bases'))}",
    )  # fmt: skip


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
    from adapterhub.device import default_device

    device = default_device(device)
    how = quantised(resolved.folder)
    if not how:
        _refuse_codes(resolved)
    get = (
        f"install what it is quantised with ({how}), or give the unquantised base"
        if how
        else "get the base model again"
    )
    with _quiet():
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

    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(resolved.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raise bare Exceptions on damaged files
            raise HubError(
                f"the tokenizer of {resolved.name} does not load: {first_line(error)}",
                "get the base model again",
            ) from error


def first_line(error: Exception) -> str:
    """The first line of what a library says is wrong, or the error's kind when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet():
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
