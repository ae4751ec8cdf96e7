"""Export: a release as files for other software: PEFT's so far, of whatever type says the same exactly."""

from __future__ import annotations

import json
from pathlib import Path

from adapterhub.adapters.adapter import Adapter
from adapterhub.bases import resolution
from adapterhub.bases.fingerprint import check_base
from adapterhub.errors import HubError, IncompatibleBase, NotFound, UsageError
from adapterhub.files import durable
from adapterhub.formats.peft.base import BaseModel
from adapterhub.formats.peft.config import CONFIG
from adapterhub.formats.peft.read import TENSORS
from adapterhub.formats.peft.write import Files, FindBase, written
from adapterhub.kinds.modification import Modifications
from adapterhub.runtime.plan import assemble
from adapterhub.spec.expression import Ensemble, Ref, references
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import Reference
from adapterhub.spec.parents import warn_missing_parents
from adapterhub.store.expand import expand
from adapterhub.store.releases import Releases
from adapterhub.tensors.file import dump

FORMATS = ("peft",)


def export(
    hub: Releases, reference: str | Reference, folder: str | Path, format: str = "peft", base: str | Path | None = None
) -> Path:
    """Write a release into a new folder: adapter_config.json, adapter_model.safetensors and a card, which plain PEFT loads
    with the same logits. A composition of adapters that add up becomes one. base: the base model, which a prefix is laid
    out for (None: the one that the release names). Returns the folder.

    Raises UsageError for an unknown format and for what PEFT has no type for; NotFound or IncompatibleBase when the base is
    needed and is not at hand or another; NameInUse when the folder is there already.
    Warns (ParentsWarning) of an adapter trained over another that is not in it: PEFT has no word for that."""
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}", f"formats: {', '.join(FORMATS)}; or bundle, for another hub")
    release = hub.resolve(reference)
    config, tensors = as_peft(hub, release, base)
    folder = durable.user_path(folder)
    with durable.new_folder(folder) as out:
        durable.write_bytes(out / TENSORS, dump(tensors))
        durable.write_bytes(out / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
        durable.write_bytes(out / "README.md", _card(release, config["peft_type"]).encode())
    return folder


def as_peft(hub: Releases, release: Release, base: str | Path | None = None) -> Files:
    """PEFT's config and tensors of a release. Raises and warns as `export` does."""
    node = expand(hub, Ref(Reference(release.name, release.version)))
    if isinstance(node, Ensemble):
        raise UsageError(
            f"{release} weighs whole models, which PEFT has no type for",
            f"for another hub: adapterhub export {release} --format bundle OUT",
        )
    warn_missing_parents([hub.resolve(reference) for reference in dict.fromkeys(references(node))])
    return written(release, assemble(node, _loader(hub), join=True), _finder(hub, release, base))


def _loader(hub: Releases):
    def load(key: str) -> Modifications:
        return Adapter.load(hub, hub.resolve(key)).modifications()

    return load


def _finder(hub: Releases, release: Release, base: str | Path | None) -> FindBase:
    record = release.manifest.base

    def find(why: str) -> BaseModel:
        try:
            resolved = resolution.resolve(base or record.name)
        except HubError as error:
            raise NotFound(f"{why}, and the base model is not at hand: {error}", "give it: --base PATH") from None
        try:
            check_base(record, hub.store.read(record.sketch), resolved)
        except IncompatibleBase as error:
            raise IncompatibleBase(str(error), "give the base that it was made for: --base PATH") from None
        return BaseModel(resolved)

    return find


def _card(release: Release, kind: str) -> str:
    manifest = release.manifest
    front = {"base_model": manifest.base.name, "library_name": "peft", "license": manifest.licence}
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]  # JSON texts are YAML
    parents = "".join(f"- {p.relation}: {p.name} {p.version}\n" for p in manifest.parents)
    return (
        "---\n" + "\n".join(lines) + "\n---\n\n"
        f"# {release}\n\nA PEFT adapter ({kind}), exported by adapterhub from the release `{release.digest}`.\n"
        + (f"\nMade from:\n\n{parents}" if parents else "")
        + '\n```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, "this/folder")\n```\n'
    )
