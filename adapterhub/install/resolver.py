"""Which versions fit together: resolvelib over adapters, the bases they were made for, and the plugins they need.

What a user asks for by name gets one version. A parent is named by its digest, so there is nothing to choose, and it may
stand beside another version of the same name. What runs together, a stack or a composition, shares one base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import Version
from resolvelib import AbstractProvider, BaseReporter, ResolutionImpossible, ResolutionTooDeep, Resolver

from adapterhub import plugins
from adapterhub.errors import HubError, NotFound
from adapterhub.install.conflicts import Conflict, explain
from adapterhub.install.question import Asked, BaseOf, Found, Installed, Plugin, Resolution, Rules
from adapterhub.sources.source import Candidate
from adapterhub.sources.table import Sources
from adapterhub.spec.manifest import Base
from adapterhub.spec.requirement import Requirement

ROUNDS = 20_000
"""Steps of the search after which it is given up."""


def resolve(
    asked: Sequence[Asked], sources: Sources, stacks: Mapping[str, Collection[str]], rules: Rules | None = None
) -> Resolution:
    """The newest versions that fit together.

    stacks: name -> the names of the adapters that run together. The answer does not depend on the order of anything.
    Raises NotFound for a name or version that no source has, Conflict when there is no answer, HubError when the search is
    given up, and what the sources raise."""
    provider = _Provider(sources, stacks, rules or Rules())
    asked = sorted(asked, key=lambda one: (str(one.requirement), one.by))
    for one in asked:
        provider.require_known(one)
    try:
        found = Resolver(provider, BaseReporter()).resolve(asked, max_rounds=ROUNDS)
    except ResolutionImpossible as error:
        raise explain([(cause.requirement, cause.parent) for cause in error.causes], provider.offered) from None
    except ResolutionTooDeep:
        raise HubError(
            f"no answer after {ROUNDS} steps", "ask for fewer adapters at once, or for exact versions"
        ) from None
    answer = Resolution({}, {}, {}, sorted(provider.notes))
    for candidate in found.mapping.values():
        if isinstance(candidate, Found):
            release, *others = candidate.releases
            answer.chosen[release.name] = (release, candidate.source)
            answer.releases |= {each.digest: (each, candidate.source) for each in (release, *others)}
            if candidate.candidate.yanked is not None:
                answer.notes.append(f"{release} was yanked: {candidate.candidate.yanked or 'no reason given'}")
        elif isinstance(candidate, Installed):
            answer.plugins[candidate.name] = candidate.version
    return answer


class _Provider(AbstractProvider):
    """What resolvelib asks. Identifiers: ("adapter", name), ("base", group), ("plugin", distribution)."""

    def __init__(self, sources: Sources, stacks: Mapping[str, Collection[str]], rules: Rules):
        self.sources, self.rules = sources, rules
        self.groups: dict[str, list[str]] = {}
        for stack, names in sorted(stacks.items()):
            for name in names:
                self.groups.setdefault(name, []).append(f"the stack {stack}")
        self.notes: set[str] = set()
        self._fitting: dict[tuple[int, int], bool] = {}
        self._offered: dict[tuple[str, str | None], list[Found]] = {}

    def offered(self, name: str, source: str | None = None) -> list[Found]:
        """What the sources have under a name, newest first, what is locked before all."""
        key = (name, source)
        if key not in self._offered:
            where, candidates, higher = self.sources.candidates(name, source)
            for other in higher:
                self.notes.add(f"{name}: {other} has a higher version than {where}, which comes first")
            seen = [c for c in candidates if not self.rules.before or name in self.rules.but or self._early(c)]
            seen.sort(key=lambda c: (c.digest != self.rules.prefer.get(name), *_descending(c.version)))
            self._offered[key] = [Found(c, where, self.sources.get(where)) for c in seen]
        return self._offered[key]

    def _early(self, candidate: Candidate) -> bool:
        return bool(candidate.created) and candidate.created <= self.rules.before

    def require_known(self, asked: Asked) -> None:
        requirement = asked.requirement
        found = self.offered(requirement.name, requirement.source)
        if not found:
            where = requirement.source or ", ".join(self.sources.bound(requirement.name))
            late = f" of {self.rules.before} or before" if self.rules.before else ""
            raise NotFound(
                f"no source has {requirement.name}{late} (asked for by {asked.by}; looked in {where})",
                "check the name, or add its source: [sources.NAME] in adapterhub.toml",
            )
        if not any(self._fits(requirement, one) for one in found):
            versions = ", ".join(
                one.candidate.version + (" (yanked)" if one.candidate.yanked is not None else "") for one in found[:20]
            )
            raise NotFound(
                f"{requirement} is asked for by {asked.by}, and {found[0].source} has no such version",
                f"it has {versions}",
            )

    def _fits(self, requirement: Requirement, one: Found) -> bool:
        """Remembered: resolvelib asks again at every step."""
        key = (id(requirement), id(one))
        if key not in self._fitting:
            self._fitting[key] = self._would_fit(requirement, one)
        return self._fitting[key]

    def _would_fit(self, requirement: Requirement, one: Found) -> bool:
        locked = one.candidate.digest == self.rules.prefer.get(requirement.name)
        if one.candidate.yanked is not None and not requirement.exact and not locked:
            return False
        return requirement.accepts(one.candidate)

    # --- resolvelib --------------------------------------------------------------------------------------------

    def identify(self, requirement_or_candidate: Any) -> tuple[str, str]:
        match requirement_or_candidate:
            case Asked(requirement=requirement):
                return ("adapter", requirement.name)
            case Found(candidate=candidate):
                return ("adapter", candidate.name)
            case BaseOf(group=group) | _Based(group=group):
                return ("base", group)
            case one:
                return ("plugin", one.name)

    def get_preference(self, identifier, resolutions, candidates, information, backtrack_causes) -> Any:
        """Bases and plugins first: there is nothing to choose. Then what has just been in the way, then by name."""
        kind, name = identifier
        causing = any(self.identify(cause.requirement) == identifier for cause in backtrack_causes)
        return (kind == "adapter", not causing, name)

    def find_matches(self, identifier, requirements, incompatibilities) -> Iterable[Any]:
        kind, name = identifier
        wanted = list(requirements[identifier])
        excluded = list(incompatibilities[identifier])
        if kind == "adapter":
            only = {one.requirement.source for one in wanted} - {None}
            if len(only) > 1:
                return []
            found = self.offered(name, next(iter(only), None))
            return [one for one in found if one not in excluded and all(self._fits(w.requirement, one) for w in wanted)]
        if kind == "base":
            first = _Based(name, wanted[0].base)
            fits = first not in excluded and all(self.is_satisfied_by(one, first) for one in wanted)
            return [first] if fits else []
        installed = plugins.installed(name)
        fits = installed is not None and all(plugins.runs(installed, one.version) for one in wanted)
        return [Installed(name, installed)] if fits and Installed(name, installed) not in excluded else []

    def is_satisfied_by(self, requirement, candidate) -> bool:
        match requirement:
            case Asked(requirement=wanted):
                return self._fits(wanted, candidate)
            case BaseOf(base=base):
                return same_base(base, candidate.base, self.rules.copies)
            case Plugin(version=version):
                return plugins.runs(candidate.version, version)
        return False

    def get_dependencies(self, candidate) -> Iterator[Any]:
        if not isinstance(candidate, Found):
            return
        root = candidate.releases[0]
        bases, needed = {}, {}
        for release in candidate.releases:  # thousands may say the same
            base = release.manifest.base
            bases.setdefault((base.structure, base.sketch.digest, base.tokenizer, str(base.computes)), (base, release))
            for need in release.manifest.plugins.items():
                needed.setdefault(need, release)
        if len(bases) > 1:
            yield from (BaseOf(str(root), base, str(release)) for base, release in bases.values())
        yield from (Plugin(name, version, str(release)) for (name, version), release in sorted(needed.items(), key=str))
        for group in self.groups.get(root.name, ()):
            yield BaseOf(group, root.manifest.base, str(root))


@dataclass(frozen=True)
class _Based:
    """A base as the candidate for what a group runs on."""

    group: str
    base: Base

    def __hash__(self) -> int:
        return hash((self.group, self.base.sketch.digest, self.base.tokenizer))


def same_base(one: Base, other: Base, copies: Callable[[Base, Base], bool]) -> bool:
    """Whether two records are of one model, or of copies of it, with one tokenizer."""
    if one.tokenizer and other.tokenizer and one.tokenizer != other.tokenizer:
        return False
    if one.structure != other.structure:
        return False
    return (one.sketch.digest, one.computes) == (other.sketch.digest, other.computes) or copies(one, other)


def _descending(version: str) -> tuple[int, ...]:
    return tuple(-piece for piece in Version(version).release)


__all__ = ["Asked", "Conflict", "Resolution", "Rules", "resolve"]
