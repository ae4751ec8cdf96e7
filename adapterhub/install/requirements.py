"""Install what fits the requirements that a user types."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.config import project as projects
from adapterhub.config.source_tables import HERE
from adapterhub.errors import NotFound
from adapterhub.install.bring import bring
from adapterhub.install.options import Options, copies_of_one_model, sources
from adapterhub.install.question import Asked, Rules
from adapterhub.install.resolver import resolve
from adapterhub.sources import room
from adapterhub.sources.source import Source, closure
from adapterhub.spec.manifest import Release
from adapterhub.store.releases import Releases


def install(hub: Releases, asked: Sequence[Asked], options: Options) -> tuple[list[Release], list[str]]:
    """Bring the newest releases that fit together and meet the requirements, from the sources there are."""
    try:
        folder = projects.find()
        project = projects.read(folder)
    except NotFound:
        folder, project = None, None
    found = sources(hub, folder, project, options.offline)
    rules = Rules(options.exclude_newer, options.but, {}, copies_of_one_model(hub, found))
    answer = resolve(asked, found, {}, rules)
    here = [release for release, source in answer.chosen.values() if source == HERE]
    wanted = [(found.get(source), release) for release, source in answer.chosen.values() if source != HERE]
    return here + bring_from_all(hub, wanted, options.max_bytes), answer.notes


def bring_from_all(hub: Releases, wanted: Sequence[tuple[Source, Release]], max_bytes: int | None) -> list[Release]:
    """Bring releases of several sources. Raises HubError, before anything is fetched, when they announce too many bytes."""
    if max_bytes is not None:
        every = [one for source, release in wanted for one in closure(source, [release])]
        room.check_cap(
            room.announced(hub.store, every), max_bytes, ", ".join(str(release) for _, release in wanted[:5])
        )
    return [one for source, release in wanted for one in bring(hub, source, [release])]
