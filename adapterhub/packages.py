"""The package manager: the releases of one folder, to look at, add, install, tag, remove and verify. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import msgspec
from packaging.version import Version

from adapterhub import bundle, durable
from adapterhub.compose import check_expressions
from adapterhub.errors import HubError, IntegrityError, ManifestError, NameInUse, NotFound, UsageError
from adapterhub.index import Index, Row
from adapterhub.manifest import TAG, VERSION, File, Manifest, Parent, Reference, Release, check_version, digest_of
from adapterhub.store import DATABASE, Problem, Store, identify


@dataclass(frozen=True)
class Packages:
    """The releases of one folder: an index and the blobs beside it."""

    root: Path
    index: Index

    @property
    def store(self) -> Store:
        return Store(self.root)

    # --- looking -----------------------------------------------------------------------------------------------

    def releases(self, name: str | None = None) -> list[Row]:
        """What is here, by name, each name's newest version first."""
        return self.index.releases(name)

    def resolve(self, reference: str | Reference) -> Release:
        """`name`: its newest version; `name@0.1.0`; `name@tag`. Raises NotFound, with a near name as the hint."""
        wanted = Reference.parse(reference) if isinstance(reference, str) else reference
        rows = self._named(wanted)
        row = next((row for row in rows if wanted.at in (None, row.version, *row.tags)), None)
        release = row and self.index.get(row.name, row.version)
        if release is None:
            raise NotFound(f"{wanted.name} has no {wanted.at}", f"it has {', '.join(r.version for r in rows)}")
        return release

    def exact(self, parent: Parent) -> Release:
        """The very release that a manifest names as its parent. Raises NotFound."""
        release = self.index.get(parent.name, parent.version)
        if release is None or release.digest != parent.digest:
            raise NotFound(
                f"{self.root} has no {parent.name}@{parent.version} with the digest {parent.digest[:19]}",
                "install it first, from where its child came",
            )
        return release

    def _named(self, wanted: Reference) -> list[Row]:
        rows = self.index.releases(wanted.name)
        if not rows:
            names = self.index.names()
            near = get_close_matches(wanted.name, names, 1) or [n for n in names if n.endswith("/" + wanted.name)]
            raise NotFound(
                f"no adapter named {wanted.name!r} in {self.root}",
                f"did you mean {near[0]}?" if near else "adapterhub list shows what is there",
            )
        return rows

    # --- adding ------------------------------------------------------------------------------------------------

    def publish(
        self,
        manifest: Manifest,
        files: Mapping[str, bytes | Path],
        sketch: bytes | None = None,
        version: str | None = None,
    ) -> tuple[Release, bool]:
        """Store the files and add the release; returns it and whether it is new.

        The manifest's version, files and base.sketch are filled in here; sketch None keeps the manifest's own, whose blob
        must be here. Without a version the first is 0.1.0, then the next minor of the newest. The same content
        again is no new release. Raises NameInUse for a version that exists with other content, NotFound for a parent that is
        not here."""
        if version is not None:
            check_version(version)
        with self._adding() as put:
            base = manifest.base
            base = msgspec.structs.replace(base, sketch=put(sketch) if sketch is not None else base.sketch)
            stored = {role: put(content) for role, content in files.items()}
            manifest = msgspec.structs.replace(manifest, base=base, files=stored)
            if sketch is None:
                self.store.checked(base.sketch)
            for parent in manifest.parents:
                self.exact(parent)
            rows = self.index.releases(manifest.name)
            for row in rows if version is None else [row for row in rows if row.version == version]:
                release = _release(manifest, row.version)
                if release.digest == row.digest:
                    return release, False
            release = _release(manifest, version or _next(rows))
            self.index.add([release])
        return release, True

    def install(self, source: str | Path) -> list[Release]:
        """Copy a release with its parents from a bundle's folder or another hub (`HUB:name[@version]`); itself first.

        Raises IntegrityError for bytes that are not what their digest says, UnsafeFile for what we do not open,
        NameInUse for a version that is here with other content."""
        from adapterhub.formats.safetensors_header import read_header

        origin = bundle.source(str(source))
        releases = bundle.closure(origin, origin.root())
        files = {file for release in releases for file in release.manifest.blobs}
        with self._adding() as put:
            for file in _progress("install", sorted(files, key=lambda file: file.digest)):
                put(origin.blob(file), file)
            for release in releases:
                if "tensors" in release.manifest.files:
                    read_header(self.store.path(release.manifest.files["tensors"].digest))
            self.index.add(releases)
        return releases

    @contextmanager
    def _adding(self) -> Iterator[Callable[..., File]]:
        """Alone among the writers of this hub: put blobs with what is yielded, then add rows. A failure takes them away."""
        put: list[File] = []

        def keep(content: bytes | Path, expected: File | None = None) -> File:
            file = expected or identify(content)
            put.append(file)
            return self.store.put(content, file)

        with self._locked():
            try:
                yield keep
            except BaseException:
                with suppress(HubError):  # the first error is the one to tell
                    needed = self._needed()
                    for file in put if not self.index.check() else ():
                        if file.digest not in needed:
                            self.store.remove(file.digest)
                raise

    def _locked(self) -> AbstractContextManager[None]:
        return durable.lock(self.root / "hub.lock")

    def _needed(self) -> set[str]:
        return {file.digest for file in self.index.files()}

    # --- the rest of the package manager -----------------------------------------------------------------------

    def tag(self, reference: str | Reference, tag: str) -> Release:
        """Let `name@tag` mean this release; a tag that is there already moves."""
        if not TAG.fullmatch(tag):
            raise UsageError(f"{tag!r} is not a tag", "use [a-z][a-z0-9._-]*, for example stable")
        release = self.resolve(reference)
        with self._locked():
            self.index.set_tag(release.name, tag, release.version)
        return release

    def remove(self, reference: str | Reference, force: bool = False) -> list[str]:
        """Remove one version (`name@version`, `name@tag`) or all (`name`), then the blobs that nothing else needs.

        While the index is damaged (`verify` says how) blobs stay; the next removal after its repair takes them.
        Returns what went. Raises HubError when something that stays was made from it, unless forced."""
        wanted = Reference.parse(reference) if isinstance(reference, str) else reference
        with self._locked():
            rows = [row for row in self._named(wanted) if wanted.at in (None, row.version, *row.tags)]
            if not rows:
                raise NotFound(f"{wanted.name} has no {wanted.at}", f"adapterhub show {wanted.name}")
            going = [str(row) for row in rows]
            needed = {child for row in rows for child in self.index.children(row.digest)} - set(going)
            if needed and not force:
                raise HubError(
                    f"{wanted} is needed by {', '.join(sorted(needed))}", "remove those first, or use --force"
                )
            self.index.remove([row.digest for row in rows])
            if not self.index.check():  # a damaged index does not know which bytes others need: then all of them stay
                self.store.sweep(self._needed())
        return going

    def verify(self) -> list[Problem]:
        """Hash every manifest and blob, and look for every parent. Empty when all is sound."""
        problems: list[Problem] = []
        try:
            problems += [Problem(self.root / DATABASE, reason) for reason in self.index.check()]
            problems += self._orphans()
            needed = self.index.files()
            damaged = [*self.store.verify(_progress("verify", needed))]
            needed = self.index.files() if damaged else needed  # another process may have removed some meanwhile
            problems += [replace(p, releases=tuple(needed[file])) for file, p in damaged if file in needed]
        except IntegrityError as error:  # the index cannot be read at all
            problems.append(Problem(self.root / DATABASE, str(error)))
        return problems

    def _orphans(self) -> Iterator[Problem]:
        rows = self.index.releases()
        here = {row.digest for row in rows}
        for row in rows:
            with suppress(IntegrityError, ManifestError):  # a damaged manifest is among the index's own problems
                release = self.index.get(row.name, row.version)
                for parent in release.manifest.parents if release else ():
                    if parent.digest not in here:
                        lost = f"the parent {parent.name}@{parent.version} is missing"
                        yield Problem(self.root / DATABASE, lost, (str(row),))

    def export_bundle(self, reference: str | Reference, folder: str | Path) -> Release:
        """Write a release and its parents as a bundle: a plain folder that `install` takes."""
        release = self.resolve(reference)
        bundle.write(self, release, durable.user_path(folder))
        return release


def _release(manifest: Manifest, version: str) -> Release:
    """The release that this manifest would be; what is stored can be read again."""
    try:
        data = msgspec.structs.replace(manifest, version=version).encode()
    except (TypeError, ValueError) as error:
        raise ManifestError(
            f"the manifest of {manifest.name} cannot be stored: {error}",
            "it may hold finite numbers, text, lists and tables",
        ) from None
    check_expressions(manifest)
    return Release(Manifest.decode(data), digest_of(data))


def _next(rows: Sequence[Row]) -> str:
    """The first version, or the next minor of the newest."""
    if not rows:
        return "0.1.0"
    newest = Version(rows[0].version)
    following = f"{newest.major}.{newest.minor + 1}.0"
    if not VERSION.fullmatch(following):
        raise NameInUse(f"after {rows[0]} there is no next minor version", "give a version, or take another name")
    return following


def _progress(title: str, files: Collection[File]) -> Iterator[File]:
    """The files one by one, with a bar of their bytes on a terminal."""
    if not sys.stderr.isatty():
        yield from files
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    with Progress(
        TextColumn(title), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=sum(file.size for file in files))
        for file in files:
            yield file
            bar.advance(task, file.size)
