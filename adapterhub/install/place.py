"""Install from a place: a bundle's folder, another hub, or a repo of the Hub."""

from __future__ import annotations

from pathlib import Path

from adapterhub.install.bring import bring
from adapterhub.sources.opening import from_text
from adapterhub.spec.manifest import Release
from adapterhub.store.releases import Releases


def install(hub: Releases, source: str | Path, offline: bool = False, max_bytes: int | None = None) -> list[Release]:
    """Bring a release with the parents it needs from a bundle's folder, another hub (`HUB:name[@version]`) or the Hub
    (`hf:user/repo[@revision]`); itself first.

    Raises IntegrityError for bytes that are not what their digest says, UnsafeFile for what we do not open
    or what the user's policy wants signed, NameInUse for a version that is here with other content, HubError for more
    than max_bytes, or than the disk has room for."""
    text = str(source)
    if text.startswith("hf:"):
        from adapterhub.install import huggingface

        return huggingface.install(hub, text.removeprefix("hf:"), offline, max_bytes)
    origin, chosen = from_text(text)
    return bring(hub, origin, [origin.release(chosen.name, chosen.version, chosen.digest)], max_bytes)
