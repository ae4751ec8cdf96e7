"""The releases of one folder, to look at, add, tag and remove. No torch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from adapterhub.errors import HubError, IntegrityError, ManifestError, NameInUse, NotFound, UsageError, YankedWarning
from adapterhub.spec.digest import digest_of
from adapterhub.spec.expression import Ensemble, Node
from adapterhub.spec.manifest import File, Manifest, Parent, Release
from adapterhub.spec.names import TAG, Reference, check_version
from adapterhub.spec.parents import check_expressions
from adapterhub.spec.parser import parse
from adapterhub.store import records
from adapterhub.store.blobs import Store
from adapterhub.store.index import ANY, FILES_AT_GC, Index, Row
from adapterhub.store.naming import check_look_alike, following_version

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Releases:
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
        """`name`: its newest version, one that is not yanked if there is one; `name@0.1.0`; `name@tag`.

        Raises NotFound, with a near name as the hint."""
        wanted = Reference.parse(reference) if isinstance(reference, str) else reference
        rows = self._named(wanted)
        if wanted.at is None:
            row = next((row for row in rows if row.yanked is None), rows[0])
        else:
            row = next((row for row in rows if wanted.at in (row.version, *row.tags)), None)
        release = row and self.index.get(row.name, row.version)
        if release is None:
            raise NotFound(f"{wanted.name} has no {wanted.at}", f"it has {', '.join(r.version for r in rows)}")
        if row.yanked is not None:
            warnings.warn(f"{row} was yanked: {row.yanked}", YankedWarning, stacklevel=2)
        return release

    def read(self, text: str) -> Node | Ensemble:
        """Return the tree of an expression as a user writes it. Raises ExpressionError."""
        return parse(text)

    def exact(self, parent: Parent) -> Release:
        """The very release that a manifest names as its parent. Raises NotFound."""
        release = self.index.get(parent.name, parent.version)
        if release is None or release.digest != parent.digest:
            raise NotFound(
                f"{self.root} has no {parent.label} with the digest {parent.digest[:19]}",
                "install it first, from where its child came",
            )
        return release

    def _named(self, wanted: Reference) -> list[Row]:
        rows = self.index.releases(wanted.name)
        if not rows:
            near = self._near(wanted.name)
            raise NotFound(
                f"no adapter named {wanted.name!r} in {self.root}",
                f"did you mean {near[0]}?" if near else "adapterhub list shows what is there",
            )
        return rows

    def _near(self, name: str) -> list[str]:
        """Names that a user may have meant: in a large hub only those are looked at that share its beginning."""
        names = self.index.names(limit=1000)
        if len(names) == 1000:
            names = self.index.names(name[:3], limit=1000) + self.index.names("/" + name, limit=10)
        return get_close_matches(name, names, 1) or [n for n in names if n.endswith("/" + name)]

    # --- adding ------------------------------------------------------------------------------------------------

    def publish(
        self,
        manifest: Manifest,
        files: Mapping[str, bytes | Path],
        sketch: bytes | None = None,
        version: str | None = None,
    ) -> tuple[Release, bool]:
        """Store the files and add the release; returns it and whether it is new. "tensors" is a safetensors file.

        The manifest's version, files and base.sketch are filled in here; sketch None keeps the manifest's own, whose blob
        must be here. Without a version the first is 0.1.0, then the next minor of the newest. The same content
        again is no new release. Raises NameInUse for a version that exists with other content and for a new name that looks
        like another, NotFound for a parent that is not here."""
        if version is not None:
            check_version(version)
        check_look_alike(self.index, manifest.name)
        with self.adding() as store:
            base = manifest.base
            base = msgspec.structs.replace(base, sketch=store.put(sketch) if sketch is not None else base.sketch)
            stored = {
                role: store.put_tensors(content) if role == "tensors" else store.put(content)
                for role, content in files.items()
            }
            manifest = msgspec.structs.replace(manifest, base=base, files=stored)
            if sketch is None:
                self.store.read(base.sketch)
            for parent in manifest.parents:
                self.exact(parent)
            while True:
                rows = self.index.releases(manifest.name)
                for row in rows if version is None else [row for row in rows if row.version == version]:
                    release = _release(manifest, row.version)
                    if release.digest == row.digest:
                        return release, False
                gone = self.index.gone(manifest.name)
                back = (
                    at for at, digest in gone.items() if _release(manifest, at).digest == digest
                )  # what was removed
                following = version or next(back, None) or following_version(manifest.name, rows, gone)
                release = _release(manifest, following)
                try:
                    self.add([release], store)
                    return release, True
                except NameInUse:  # another process took the number between our look and our step
                    if version is not None or not self.index.get(release.name, release.version):
                        raise

    @contextmanager
    def adding(self) -> Iterator[Store]:
        """Nothing is taken away from the store meanwhile: put blobs into it, then add rows.

        After a failure what has come is taken away again, unless others are at work: then gc finds it."""
        store = self.store
        try:
            with store.shared():
                yield store
        except BaseException:
            with suppress(HubError), store.alone(wait=False) as held:  # the first error is the one to tell
                if held and not self.index.check():
                    self._drop(store.came)
            raise

    def _drop(self, blobs: Collection[File]) -> None:
        """Remove those of these blobs that no release is made of and that nobody was told are here (a lease)."""
        kept = {blob.digest for file in self.index.files() for blob in self.store.blobs(file)}
        kept |= self.index.leased(time.time())
        self.store.remove(blob.digest for blob in blobs if blob.digest not in kept)

    def add(self, releases: Sequence[Release], store: Store | None = None) -> None:
        """List releases whose files are in the store. Only while the store is `shared`; raises what `Index.add` raises.

        store: told of the blobs that this puts there."""
        records.put(store or self.store, [release.manifest.encode() for release in releases])
        self.index.add(releases)
        if self.index.remembered(records.KEPT) is None:
            with suppress(HubError):  # what was added is there
                records.complete(self.index, self.store, records.AT_ONCE)

    def sign(self, digest: str, envelope: bytes) -> None:
        """Keep a signature with the release that has this digest. Raises NotFound."""
        with self.adding() as store:
            records.put(store, [envelope])
            self.index.sign(digest, envelope)

    # --- the rest of the package manager -----------------------------------------------------------------------

    def tag(self, reference: str | Reference, tag: str, expected: str | None = ANY) -> Release:
        """Let `name@tag` mean this release; a tag that is there already moves.

        expected: the version that it must mean now (None: nothing). Raises TagMoved when it means another."""
        if not TAG.fullmatch(tag):
            raise UsageError(f"{tag!r} is not a tag", "use [a-z][a-z0-9._-]*, for example stable")
        release = self.resolve(reference)
        self.index.set_tag(release.name, tag, release.version, expected)
        return release

    def remove(self, reference: str | Reference, force: bool = False) -> list[str]:
        """Remove one version (`name@version`, `name@tag`) or all (`name`), then the blobs that nothing else needs.

        While the index or a list of parts is damaged (`verify` says how) blobs stay; gc takes them after the repair.
        Returns what went. Raises HubError when something that stays was made from it, unless forced."""
        wanted = Reference.parse(reference) if isinstance(reference, str) else reference
        with self.store.alone():
            rows = [row for row in self._named(wanted) if wanted.at in (None, row.version, *row.tags)]
            if not rows:
                raise NotFound(f"{wanted.name} has no {wanted.at}", f"adapterhub show {wanted.name}")
            going = [str(row) for row in rows]
            needed = {child for row in rows for child in self.index.children(row.digest)} - set(going)
            if needed and not force:
                raise HubError(
                    f"{wanted} is needed by {', '.join(sorted(needed))}", "remove those first, or use --force"
                )
            blobs, files = self._blobs(rows), self._count()
            self.index.remove([row.digest for row in rows])
            if not self.index.check():  # a damaged index does not know which bytes others need: then all of them stay
                with suppress(IntegrityError):
                    self._drop(blobs)
                self._expect(files - self._count())
        return going

    def _count(self) -> int:
        return sum(1 for _ in self.index.stored()) if self.index.remembered(FILES_AT_GC) else 0

    def _expect(self, fewer: int) -> None:
        """Let gc, which refuses an index that suddenly lists far fewer files, know how many were taken away on purpose."""
        if fewer > 0 and (before := self.index.remembered(FILES_AT_GC)):
            self.index.remember(FILES_AT_GC, max(before - fewer, 0))

    def _blobs(self, rows: Sequence[Row]) -> list[File]:
        blobs: list[File] = []
        for row in rows:
            own = [row.digest, *map(digest_of, self.index.signatures(row.digest))]
            blobs += [File(digest=digest, size=0) for digest in own]
            with suppress(IntegrityError):  # a damaged manifest, or list of parts, does not say
                release = self.index.get(row.name, row.version)
                blobs += [b for file in release.manifest.needs for b in self.store.blobs(file)] if release else []
        return blobs


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
    return Release.decode(data)
