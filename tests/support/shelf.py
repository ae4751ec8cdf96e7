"""Releases out of nothing, and a source that offers them from memory: a whole `Source`, nothing of it is pretended."""

from pathlib import Path

from packaging.version import Version

from adapterhub.config.source_tables import Table
from adapterhub.errors import IntegrityError, NotFound
from adapterhub.sources.source import Candidate
from adapterhub.sources.table import Sources
from adapterhub.spec.digest import digest_of
from adapterhub.spec.manifest import Base, File, Made, Manifest, Parent, Release


def base(name="tiny", tokenizer=""):
    return Base(
        name=name,
        architecture="llama",
        structure=digest_of(b"shapes"),
        sketch=File(digest=digest_of(name.encode()), size=len(name)),
        tokenizer=tokenizer and digest_of(tokenizer.encode()),
    )


def release(name, version, on=(), made_for=None, **more):
    """A release that runs only with those in `on`."""
    parents = [Parent(name=p.name, version=p.version, digest=p.digest, relation="on") for p in on]
    manifest = Manifest(
        name=name, version=version, base=made_for or base(), method=Made(name="lora"), parents=parents, **more
    )
    return Release(manifest, digest_of(manifest.encode()))


class Shelf:
    """A source."""

    def __init__(self, label="shelf"):
        self.label = label
        self.offered: dict[str, list[Candidate]] = {}
        self.releases: dict[str, Release] = {}
        self.asked: list[str] = []

    def put(self, *given, created="2026-01-01T00:00:00Z", yanked=None, tags=()):
        for one in given:
            candidate = Candidate(one.name, one.version, one.digest, created, yanked, tuple(tags))
            self.offered.setdefault(one.name, []).append(candidate)
            self.releases[one.digest] = one
        return given[0]

    def candidates(self, name):
        return sorted(self.offered.get(name, []), key=lambda c: Version(c.version), reverse=True)

    def release(self, name, version, digest=None):
        self.asked.append(f"{name}@{version}")
        found = digest or next((c.digest for c in self.candidates(name) if c.version == version), None)
        if found not in self.releases:
            raise NotFound(f"{self.label} has no {name}@{version}", "")
        if self.releases[found].digest != found:
            raise IntegrityError("another manifest", "")
        return self.releases[found]

    def fetch(self, files, store):
        raise AssertionError("resolving fetches no tensors")

    def signatures(self, digest):
        return []


class NoHub:
    """A hub with nothing in it."""

    root = Path("none")

    class index:
        @staticmethod
        def releases(name=None):
            return []


def sources(*shelves, bound=None):
    """Sources over these, in order; bound: label -> namespaces."""
    tables = [(s.label, Table(path="x", namespaces=(bound or {}).get(s.label, [])), Path()) for s in shelves]
    made = Sources(NoHub, tables)
    made._opened.update({shelf.label: shelf for shelf in shelves})
    return made
