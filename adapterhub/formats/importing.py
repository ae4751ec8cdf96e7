"""Import: a PEFT folder becomes a release of the hub, after everything that can be wrong with it has been looked at."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from adapterhub.adapters import scan
from adapterhub.adapters.fit import check_fit, require_effect
from adapterhub.adapters.publish import publish_tensors
from adapterhub.bases import resolution
from adapterhub.bases.fingerprint import Fingerprint, check_base, fingerprint
from adapterhub.errors import HubError, NotFound, UsageError
from adapterhub.files import durable
from adapterhub.formats.peft import read
from adapterhub.formats.peft.base import BaseModel
from adapterhub.formats.peft.config import CONFIG, read_config
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import check_name, check_version
from adapterhub.store.releases import Releases

MAX_CARD = 1 << 20


def import_adapter(
    hub: Releases,
    folder: str | Path,
    name: str,
    version: str | None = None,
    base: object = None,
    licence: str | None = None,
    force: bool = False,
) -> Release:
    """Take the PEFT adapter in a folder into the hub. The same files again are no new release.

    base: a known name, a folder, a repo id or a loaded transformers model, which is only read; None: the one that the
    adapter's config names. licence: None: the one that the adapter's model card states.
    Raises what `formats.peft.read` raises; NotFound when there is no base; IncompatibleBase for tensors of other widths, or
    when the config names a folder on this machine that holds another model than `base` (unless forced); NoEffect; UnsafeFile for
    changes that are absurdly large (unless forced; `adapters.scan`). The scan's report stands in the manifest's metrics."""
    check_name(name)
    if version is not None:
        check_version(version)
    folder = durable.user_path(folder)
    _require_peft(folder)
    config = read_config(folder)
    source = _base(folder, base, config.base_model_name_or_path)
    model = BaseModel(source)
    adapter = read.read(folder, config, model)
    parts = adapter.parts
    check_fit(parts, model.sites, folder.name)
    needs = any(part.form == "dora" for here in parts.values() for part in here)  # its change depends on the weights
    require_effect(parts, model.sites, model.load() if needs else model.skeleton, folder.name)
    current = fingerprint(source)
    report = scan.scan(parts, current.sketch)
    scan.check(report, folder.name, force)
    if base is not None:
        _require_same(config.base_model_name_or_path, current, force)
    recipe = {
        "imported": "peft",
        "peft_type": config.peft_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "peft_version": config.peft_version,
        "files": {file: _digest(folder / file) for file in (CONFIG, read.TENSORS)},
    }
    return publish_tensors(
        hub,
        parts,
        name=name,
        version=version,
        base=current.base,
        sketch=current.sketch,
        method=adapter.method,
        recipe={key: value for key, value in recipe.items() if value},
        metrics={"scan": report},
        licence=licence or _card_licence(folder),
    )


def _require_peft(folder: Path) -> None:
    if (folder / CONFIG).is_file():
        return
    if (folder / "manifest.json").is_file():
        raise UsageError(f"{folder} is a bundle, not a PEFT adapter", f"adapterhub install {folder}")
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}", "give the folder that PEFT's save_pretrained wrote")
    raise NotFound(f"{folder} holds no {CONFIG}", "give the folder that PEFT's save_pretrained wrote")


def _base(folder: Path, given: object, named: str | None) -> resolution.ResolvedBase | PreTrainedModel:
    if isinstance(given, PreTrainedModel):
        return given
    if isinstance(given, nn.Module):
        what = type(given).__name__
        raise UsageError(
            f"{what} is not a plain transformers model", "give the model that it was made of, or its folder"
        )
    if given is not None:
        return resolution.resolve(given)
    if not named:
        raise NotFound(
            f"{folder.name} does not name its base model", "say which: --base PATH, a repo id or a known name"
        )
    try:
        return resolution.resolve(named)
    except (HubError, OSError, RuntimeError, ValueError) as error:  # the last three: a text that is no path at all
        raise (type(error) if isinstance(error, HubError) else NotFound)(
            f"{folder.name} was made for the base model {ascii(named)[:100]}, which cannot be had: {error}"[:500],
            "give it: --base PATH, a repo id or a known name",
        ) from None


def _require_same(named: str | None, current: Fingerprint, force: bool) -> None:
    """If the base that the config names lies on this machine, the one given must be the same model or a copy of it."""
    try:
        folder = Path(named or "").expanduser()
        original = fingerprint(folder) if named and folder.is_dir() else None
    except (HubError, OSError, RuntimeError, ValueError):
        return  # a folder of that name that is no checkpoint, or a text that is no path, says nothing
    if original:
        check_base(original.base, original.sketch, current, force=force)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _card_licence(folder: Path) -> str | None:
    """`license: apache-2.0` from the front matter of README.md; None for anything less simple."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open("rb") as file:
        text = file.read(MAX_CARD).decode(errors="replace")
    front = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
    licence = front and re.search(r"^license:[ \t]*([\w.+-]{1,64})[ \t]*$", front[1].replace("\r", ""), re.MULTILINE)
    return licence[1] if licence else None
