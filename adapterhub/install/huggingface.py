"""`install hf:user/repo[@revision]`: a release of ours with what it needs, or a plain PEFT repo as it is."""

from __future__ import annotations

from pathlib import Path

from packaging.version import Version

from adapterhub.errors import NotFound, UnsafeFile, UsageError
from adapterhub.files import durable
from adapterhub.install.bring import bring
from adapterhub.sources.huggingface import Pushed
from adapterhub.sources.huggingface_transport import Repo
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import NAME
from adapterhub.store.releases import Releases

PEFT = ("adapter_config.json", "adapter_model.safetensors")


def install(hub: Releases, text: str, offline: bool = False, max_bytes: int | None = None) -> list[Release]:
    """Bring `user/repo` at a revision: a tag, branch or commit; without one its newest version, else the main branch.

    A repo of ours comes with its parents, itself first. A plain PEFT repo is imported as user/repo, held against the
    base that its config names. Raises what the parts of it raise."""
    name, _, revision = text.partition("@")
    repo = Repo(name, offline, max_bytes)
    commit = _commit(repo, revision)
    try:
        pushed = Pushed(repo, commit)
    except NotFound:
        return [_peft(hub, repo, commit)]
    return bring(hub, pushed, [pushed.root], max_bytes)


def _commit(repo: Repo, revision: str) -> str:
    if revision or repo.offline:
        return repo.commit(revision or None)
    versions = repo.versions()
    return versions[max(versions, key=Version)] if versions else repo.commit()


def _peft(hub: Releases, repo: Repo, commit: str) -> Release:
    from adapterhub.formats.importing import import_adapter

    listed = [] if repo.offline else repo.files(commit)
    if listed and "adapter_config.json" not in listed:
        raise NotFound(
            f"hf:{repo.name} holds no adapter", "it has neither adapterhub/manifest.json nor adapter_config.json"
        )
    if listed and PEFT[1] not in listed:
        raise UnsafeFile(
            f"hf:{repo.name} has no {PEFT[1]}" + (", only a pickle" if "adapter_model.bin" in listed else ""),
            "ask its owner for safetensors",
        )
    name = repo.name.lower()
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for an adapter", "download it, then adapterhub import DIR --name NAME")
    folder = hub.root / "incoming" / f"hf-{commit[:40]}"
    durable.remove_tree(folder)
    try:
        with durable.new_folder(folder) as here:
            for file in (*PEFT, *({"README.md"} & set(listed))):
                durable.write_file(here / file, Path(repo.checked(file, commit)))
        return import_adapter(hub, folder, name)
    finally:
        durable.remove_tree(folder)
