"""Push a release to a repo of the Hub: one commit, then the tag that makes it a version."""

from __future__ import annotations

import json

from adapterhub.errors import HubError, NameInUse, NotFound
from adapterhub.files.bounded import read_json
from adapterhub.share.card import card
from adapterhub.sources import huggingface_layout
from adapterhub.sources.disk import Disk
from adapterhub.sources.huggingface_layout import LARGEST_MANIFEST, MANIFEST, OURS
from adapterhub.sources.huggingface_transport import Repo
from adapterhub.sources.source import closure
from adapterhub.spec.digest import canonical
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import Reference
from adapterhub.store.releases import Releases


def push(
    hub: Releases, reference: str | Reference, repo: str, private: bool = False, message: str | None = None
) -> tuple[Release, bool]:
    """Publish a release, with what it needs, as hf:repo@v<version>; returns it and whether it is new there.

    PEFT's files are in it whenever PEFT can say what the adapter is. A repo holds one adapter: raises NameInUse for
    another in it, and for a version that is there with other content; Unreachable, HubError."""
    release, there = hub.resolve(reference), Repo(repo)
    there.create(private)
    versions, head = there.versions(), _head(there)
    tag = f"v{release.version}"
    if release.version in versions:
        if _manifest(there, versions[release.version]).digest == release.digest:
            return release, False
        raise NameInUse(f"hf:{repo} has {tag} already with other content", "publish it under another version")
    there_now = there.files(head) if head else []
    if MANIFEST in there_now and (name := _manifest(there, head).name) != release.name:
        raise NameInUse(f"hf:{repo} holds {name}", f"push {release.name} to a repo of its own")
    before = (
        there.read("README.md", head, LARGEST_MANIFEST).decode(errors="replace") if "README.md" in there_now else ""
    )
    files = contents(hub, release, repo, before)
    gone = [path for path in there_now if path.startswith(OURS) and path not in files]
    gone += [
        path for path in (huggingface_layout.TENSORS, "adapter_config.json") if path in there_now and path not in files
    ]
    commit = there.push(files, gone, message or f"{release.name} {release.version}", head)
    there.tag(tag, commit)
    return release, True


def contents(hub: Releases, release: Release, repo: str, before: str = "") -> dict[str, bytes]:
    """The files of the repo: path -> bytes. before: the README that is there."""
    with hub.store.shared():
        releases = closure(Disk(hub), [release])
        config, tensors = _peft(hub, release)
        placed, rest = huggingface_layout.build(hub.store, releases, tensors)
    files = {
        MANIFEST: release.manifest.encode(),
        f"{OURS}layout.json": huggingface_layout.encode(placed),
        huggingface_layout.REST: rest,
    }
    for one in releases:
        digits = one.digest.removeprefix("sha256:")
        if one != release:
            files[f"{OURS}manifests/{digits}.json"] = one.manifest.encode()
        if envelopes := hub.index.signatures(one.digest):
            files[f"{OURS}signatures/{digits}.json"] = canonical([read_json(envelope) for envelope in envelopes])
    kind = None
    if config is not None and tensors is not None:
        kind = str(config["peft_type"])
        files["adapter_config.json"] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
        files[huggingface_layout.TENSORS] = tensors
    files["README.md"] = card(release, repo, kind, before).encode()
    return files


def _peft(hub: Releases, release: Release) -> tuple[dict | None, bytes | None]:
    """PEFT's config and tensor file; neither when PEFT has no type that says the same."""
    from adapterhub.formats.exporting import as_peft
    from adapterhub.tensors.file import dump

    try:
        config, tensors = as_peft(hub, release)
    except HubError:  # it is pushed all the same, and the card says so by not naming PEFT
        return None, None
    return config, dump(tensors)


def _head(repo: Repo) -> str | None:
    try:
        return repo.commit()
    except NotFound:
        return None


def _manifest(repo: Repo, commit: str) -> Release:
    data = repo.read(MANIFEST, commit, LARGEST_MANIFEST)
    return Release.decode(data)
