"""What is asked of the resolver, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from adapterhub.sources.source import Candidate, Source, closure
from adapterhub.spec.manifest import Base, Release
from adapterhub.spec.requirement import Requirement


@dataclass(frozen=True)
class Asked:
    """A requirement and who has it."""

    requirement: Requirement
    by: str
    """"adapterhub.toml", "the command line", "the stack helpdesk"."""


@dataclass(frozen=True)
class Rules:
    """What counts besides the requirements."""

    before: str = ""
    """Releases that came to their source after this time (UTC, ISO 8601) are not seen ..."""
    but: Collection[str] = ()
    """... unless their name is among these."""
    prefer: Mapping[str, str] = field(default_factory=dict)
    """Name -> digest of the release to take where it fits: what is locked."""
    copies: Callable[[Base, Base], bool] = lambda one, other: False
    """Whether two bases of one structure with unlike sketches are copies of one model."""


@dataclass
class Resolution:
    """The answer."""

    chosen: dict[str, tuple[Release, str]]
    """Name that was asked for -> its release and its source's name."""
    releases: dict[str, tuple[Release, str]]
    """Digest -> every release that is needed, parents too, and its source's name."""
    plugins: dict[str, str]
    """Distribution -> the installed version."""
    notes: list[str]
    """What the user should know: a higher version elsewhere, a yanked one that was asked for."""


@dataclass(frozen=True)
class BaseOf:
    """What runs together in `group` runs on this base, because of `by`."""

    group: str
    base: Base
    by: str


@dataclass(frozen=True)
class Plugin:
    """A distribution that `by` needs to run, and the version that it was made with."""

    name: str
    version: str
    by: str


@dataclass(frozen=True)
class Installed:
    """A distribution as it is installed here."""

    name: str
    version: str


@dataclass(frozen=True, eq=False)
class Found:
    """A release of a source that would do; its manifest and those of its parents are fetched when they are looked at."""

    candidate: Candidate
    source: str
    origin: Source

    def __post_init__(self):
        object.__setattr__(self, "_releases", None)

    @property
    def releases(self) -> list[Release]:
        """Itself, then what it needs to run."""
        if self._releases is None:
            c = self.candidate
            root = self.origin.release(c.name, c.version, c.digest)
            object.__setattr__(self, "_releases", closure(self.origin, [root]))
        return self._releases

    def __str__(self) -> str:
        return f"{self.candidate.name}@{self.candidate.version}"
