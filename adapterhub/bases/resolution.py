"""From a known name, a folder or a repo id to a folder with a base model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from adapterhub import plugins
from adapterhub.config import project as projects
from adapterhub.errors import IntegrityError, NotFound, UnsafeFile, UsageError
from adapterhub.files import durable
from adapterhub.files.bounded import read_json
from adapterhub.plugins.boundary import Wrong, guard

REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


REPO_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


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


def first_line(error: Exception) -> str:
    """The first line of what a library says is wrong, or the error's kind when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
