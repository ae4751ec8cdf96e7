"""Repos of the Hub as a source. huggingface_hub moves the bytes; we hash every one of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from packaging.version import Version

from adapterhub.errors import AGAIN, IntegrityError, NotFound
from adapterhub.files.bounded import read_json
from adapterhub.files.progress import bar
from adapterhub.sources import huggingface_layout
from adapterhub.sources.huggingface_layout import LARGEST_MANIFEST, MANIFEST, OURS
from adapterhub.sources.huggingface_transport import Repo
from adapterhub.sources.room import check_disk
from adapterhub.sources.source import Candidate
from adapterhub.spec.digest import canonical, digest_of
from adapterhub.spec.manifest import File, Release
from adapterhub.store import segments
from adapterhub.store.blobs import Store


class Pushed:
    """A release of ours in a repo, at a commit."""

    def __init__(self, repo: Repo, commit: str):
        """Raises NotFound when the repo holds none of ours there, IntegrityError."""
        self.repo, self.commit = repo, commit
        self.label = f"hf:{repo.name}"
        self.root = self._manifest(MANIFEST, None)
        self._layout: huggingface_layout.Layout | None = None

    def candidates(self, name: str) -> list[Candidate]:
        return [Candidate(name, self.root.version, self.root.digest)] if name == self.root.name else []

    def release(self, name: str, version: str, digest: str | None = None) -> Release:
        if (name, version) == (self.root.name, self.root.version):
            if digest not in (None, self.root.digest):
                raise IntegrityError(f"{self.label} has {self.root.digest} as {self.root}, not {digest}", AGAIN)
            return self.root
        if digest is None:
            raise NotFound(f"{self.label} has no {name}@{version}", f"it holds {self.root}")
        return self._manifest(f"{OURS}manifests/{digest.removeprefix('sha256:')}.json", digest)

    def signatures(self, digest: str) -> list[bytes]:
        path = f"{OURS}signatures/{digest.removeprefix('sha256:')}.json"
        try:
            found = read_json(self.repo.read(path, self.commit, LARGEST_MANIFEST))
            return [canonical(envelope) for envelope in found if isinstance(envelope, dict)]
        except NotFound:
            return []
        except (ValueError, TypeError, RecursionError):
            raise IntegrityError(f"{self.label}: {path} holds no signatures", AGAIN) from None

    def fetch(self, files: Collection[File], store: Store) -> None:
        if self._layout is None:
            data = self.repo.read(f"{OURS}layout.json", self.commit, huggingface_layout.LARGEST)
            self._layout = huggingface_layout.decode(data, self.repo.name)
        blobs: set[File] = set()
        for file in files:
            if file.parts:
                listed = File(digest=file.digest, size=sum(size for _, _, size in self._pieces(file)))
                if listed.size > segments.LARGEST_LIST:
                    raise IntegrityError(f"{self.label}: the list of parts {file.digest} is too large", AGAIN)
                self._take(listed, store, set())
                blobs |= set(segments.decode(store.read(listed), file))
            else:
                blobs.add(file)
        lacking = [blob for blob in sorted(blobs, key=lambda b: b.digest) if store.fault(blob) is not None]
        check_disk(store.root, sum(blob.size for blob in lacking))
        with bar(f"fetch {self.label}", sum(blob.size for blob in lacking)) as advance:
            for path in {path for blob in lacking for path, _, _ in self._pieces(blob)}:
                self.repo.file(path, self.commit)  # once, before several ask for it
            store.fill(lacking, lambda blob, unsynced: (self._take(blob, store, unsynced), advance(blob.size)))

    def _pieces(self, blob: File) -> list[huggingface_layout.Piece]:
        if self._layout is None or blob.digest not in self._layout:
            raise NotFound(f"{self.label} does not say where {blob.digest} is", AGAIN)
        return self._layout[blob.digest]

    def _take(self, blob: File, store: Store, unsynced: set[Path]) -> None:
        """Cut a blob out of the repo's files. Wrong bytes: the files are downloaded once more, from zero."""
        for again in (False, True):
            try:
                return store.take(blob, self._bytes(blob, again), self.label, unsynced)
            except IntegrityError:
                if again:
                    raise

    def _bytes(self, blob: File, again: bool) -> Iterator[bytes]:
        for path, offset, size in self._pieces(blob):
            if size > blob.size:
                raise IntegrityError(f"{self.label}: its layout gives {size} bytes for {blob.digest}", AGAIN)
            with self.repo.file(path, self.commit, again).open("rb") as file:
                file.seek(offset)
                yield file.read(size)

    def _manifest(self, path: str, digest: str | None) -> Release:
        """A manifest by its digest; the first, which nobody has named yet, by what the Hub lists for it."""
        for again in (False, True):
            if digest is None:
                data = self.repo.checked(path, self.commit, LARGEST_MANIFEST).read_bytes()
            else:
                data = self.repo.read(path, self.commit, LARGEST_MANIFEST, again)
            if digest in (None, digest_of(data)):
                return Release.decode(data)
        raise IntegrityError(f"{self.label}: {path} is not {digest}", AGAIN)


class Owner:
    """The repos of one owner of the Hub as a source: acme/sql is the repo sql, its versions are the tags v1.2.0."""

    def __init__(self, owner: str, name: str = "", offline: bool = False):
        self.owner, self.offline = owner, offline
        self.label = name or f"hf:{owner}"
        self._pushed: dict[tuple[str, str], Pushed] = {}
        self._holders: dict[str, Pushed] = {}

    def candidates(self, name: str) -> list[Candidate]:
        repo = self._repo(name)
        try:
            versions = repo.versions()
        except NotFound:
            return []
        found = []
        for version in sorted(versions, key=Version, reverse=True):
            pushed = self._at(repo, version, versions[version])
            found += [c for c in pushed.candidates(name) if c.version == version]
        return found

    def release(self, name: str, version: str, digest: str | None = None) -> Release:
        if digest is not None and digest in self._holders:
            return self._holders[digest].release(name, version, digest)
        repo = self._repo(name)
        versions = repo.versions()
        if version not in versions:
            raise NotFound(f"{self.label} has no {name}@{version}", "it may have been removed there")
        pushed = self._at(repo, version, versions[version])
        if pushed.root.version != version or pushed.root.name != name:
            raise IntegrityError(
                f"hf:{repo.name} has {pushed.root} under the tag v{version}", "the tag was moved: ask its owner"
            )
        release = pushed.release(name, version, digest)
        self._hold(pushed)
        return release

    def fetch(self, files: Collection[File], store: Store) -> None:
        for pushed in dict.fromkeys(self._holders.values()):
            mine = {file for one in self._named(pushed) for file in one.manifest.needs}
            if wanted := [file for file in files if file in mine]:
                pushed.fetch(wanted, store)

    def signatures(self, digest: str) -> list[bytes]:
        return self._holders[digest].signatures(digest) if digest in self._holders else []

    def _repo(self, name: str) -> Repo:
        return Repo(f"{self.owner}/{name.rpartition('/')[2]}", self.offline)

    def _at(self, repo: Repo, version: str, commit: str) -> Pushed:
        if (repo.name, commit) not in self._pushed:
            self._pushed[repo.name, commit] = Pushed(repo, commit)
        return self._pushed[repo.name, commit]

    def _hold(self, pushed: Pushed) -> None:
        """Remember which repo has which release: what a release needs is pushed with it."""
        for one in self._named(pushed):
            self._holders.setdefault(one.digest, pushed)

    def _named(self, pushed: Pushed) -> list[Release]:
        from adapterhub.sources.source import closure

        return closure(pushed, [pushed.root])
