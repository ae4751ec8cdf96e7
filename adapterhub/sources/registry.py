"""A registry as a source (docs/guide/registry.md): only blobs that the store lacks are asked for, several side by side, and a
transfer that broke goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from packaging.version import Version

from adapterhub.errors import AGAIN, HubError, IntegrityError, NotFound, Unreachable, UsageError
from adapterhub.files.bounded import read_json
from adapterhub.files.progress import bar
from adapterhub.sources.http import Http
from adapterhub.sources.room import check_disk
from adapterhub.sources.serials import check_no_older
from adapterhub.sources.source import Candidate
from adapterhub.sources.tokens import token_for
from adapterhub.spec.address import address
from adapterhub.spec.claims import check_listed
from adapterhub.spec.digest import check_digest, digest_of
from adapterhub.spec.manifest import File, Release
from adapterhub.spec.names import check_version
from adapterhub.store import segments
from adapterhub.store.blobs import Store, each
from adapterhub.store.partial import PartialBlob

LARGEST = 32 << 20
"""Bytes of a list or manifest."""
BREAKS = 8
"""How often a transfer that breaks goes on."""


class Registry:
    """The registry at an address. With `key`, its lists must be signed by it, be no older than one that was seen before,
    and not have expired."""

    def __init__(
        self,
        url: str,
        name: str = "",
        key: str = "",
        offline: bool = False,
        typed: bool = False,
        insecure: bool = False,
    ):
        """typed: the user wrote the address in this very call, so that ADAPTERHUB_TOKEN is meant for it. insecure: its table
        allows plain HTTP. Raises UsageError."""
        there = address(url)
        self.http = Http(there, token_for(there, typed), offline, insecure)
        self.label = name or self.http.url
        self._key = key

    def candidates(self, name: str) -> list[Candidate]:
        try:
            data = self._bytes(f"/v1/adapters/{quote(name)}")
        except NotFound:
            return []
        found = self._list(data, name)
        try:
            listed = [Candidate(name=name, tags=tuple(one.pop("tags", ())), **one) for one in found["releases"]]
            for one in listed:
                check_digest(one.digest)
                check_version(one.version)
                check_listed(one.created, one.yanked, one.tags)
            return sorted(listed, key=lambda one: Version(one.version), reverse=True)
        except (KeyError, TypeError, AttributeError):
            raise IntegrityError(f"{self.label} lists {name} in a way that we do not understand", AGAIN) from None
        except (ValueError, HubError) as error:
            raise IntegrityError(
                f"{self.label} lists {name} in a way that we do not understand: {error}", AGAIN
            ) from None

    def release(self, name: str, version: str, digest: str | None = None) -> Release:
        if digest is None:
            digest = next((c.digest for c in self.candidates(name) if c.version == version), None)
            if digest is None:
                raise NotFound(f"{self.label} has no {name}@{version}", "it may have been removed there")
        data = self._bytes(f"/v1/manifests/{check_digest(digest)}")
        if digest_of(data) != digest:
            raise IntegrityError(f"{self.label} gives another manifest for {name}@{version} ({digest})", AGAIN)
        release = Release.decode(data, digest)
        if (release.name, release.version) != (name, version):
            raise IntegrityError(f"{self.label} gives {release} for {name}@{version}", AGAIN)
        return release

    def fetch(self, files: Collection[File], store: Store) -> None:
        blobs: dict[str, File] = {}
        for file in files:
            if file.parts:
                listed = self._parts(file, store)
                blobs[file.digest] = File(digest=file.digest, size=len(listed))
                blobs |= {part.digest: part for part in segments.decode(listed, file)}
            else:
                blobs[file.digest] = file
        lacking = [blob for blob, fault in zip(blobs.values(), each(store.fault, blobs.values()), strict=True) if fault]
        check_disk(store.root, sum(blob.size for blob in lacking))
        with bar(f"fetch from {self.label}", sum(blob.size for blob in lacking)) as advance:
            each(lambda blob: self._blob(blob, store, advance), lacking)

    def signatures(self, digest: str) -> list[bytes]:
        from adapterhub.trust.envelopes import listed

        data = self.http.read(f"/v1/signatures/{check_digest(digest)}", LARGEST, cut=True)
        try:
            return list(listed(data))
        except ValueError:
            raise IntegrityError(f"{self.label} gives no signatures for {digest}", AGAIN) from None

    # --- inside ------------------------------------------------------------------------------------------------

    def _bytes(self, path: str) -> bytes:
        return self.http.read(path, LARGEST)

    def _parts(self, file: File, store: Store) -> bytes:
        """The list of a file's parts, from the store when it is there."""
        try:
            return store.read(File(digest=file.digest, size=0))
        except IntegrityError:
            data = self.http.read(f"/v1/blobs/{file.digest}", segments.LARGEST_LIST)
            if digest_of(data) != file.digest:
                data = self.http.read(f"/v1/blobs/{file.digest}", segments.LARGEST_LIST)
            store.take(File(digest=file.digest, size=len(data)), [data], self.label)
            return data

    def _blob(self, blob: File, store: Store, advance: Callable[[int], None]) -> None:
        """Fetch one blob. A byte that was changed on the way costs one more try, from zero; a break costs nothing."""
        incoming = PartialBlob(store, blob)
        with incoming.held():
            if store.fault(blob) is None:  # another process was faster
                return advance(blob.size)
            for last in (False, True):
                try:
                    self._pieces(incoming, advance)
                    return incoming.finish()
                except IntegrityError:
                    incoming.discard()
                    if last:
                        raise

    def _pieces(self, incoming: PartialBlob, advance: Callable[[int], None]) -> None:
        breaks = 0
        while incoming.offset < incoming.blob.size:
            before = incoming.offset
            try:
                self._piece(incoming, advance)
            except Unreachable:
                breaks = breaks + 1 if incoming.offset == before else 0
                if self.http.offline or breaks > BREAKS:
                    raise
                time.sleep(0.1 * 2**breaks)

    def _piece(self, incoming: PartialBlob, advance: Callable[[int], None]) -> None:
        blob, offset = incoming.blob, incoming.offset
        headers = {"range": f"bytes={offset}-"} if offset else {}
        headers["accept-encoding"] = "identity"
        with self.http.stream(f"/v1/blobs/{blob.digest}", headers) as answer:
            if offset and answer.status_code != 206:  # it begins anew, or what we have is no beginning of it
                incoming.discard()
                if answer.status_code != 200:
                    return
            incoming.append(_counted(answer.iter_raw(), advance))  # as it comes: what a break leaves counts
        if incoming.offset < blob.size:
            raise Unreachable(f"{self.label} ended {blob.digest} early", "try again")

    def _list(self, data: bytes, name: str) -> dict[str, Any]:
        """What a list says, after all that can make us distrust it."""
        if self._key:
            found = self._signed(data)
        else:
            try:
                found = read_json(data)
                if isinstance(found, dict) and "payload" in found:  # signed, and we have no key to hold it against
                    from adapterhub.trust.signature import LIST, opened

                    found, _ = opened(data, LIST, ())
            except (ValueError, RecursionError):
                found = None
        if not isinstance(found, dict) or found.get("name") != name or not isinstance(found.get("releases"), list):
            raise IntegrityError(f"{self.label} gives no list of the releases of {name}", AGAIN)
        return found

    def _signed(self, data: bytes) -> dict[str, Any]:
        from adapterhub.trust.keys import PublicKey
        from adapterhub.trust.signature import LIST, opened

        try:
            found, signer = opened(data, LIST, [PublicKey(self._key)])
        except UsageError as error:
            raise UsageError(f"the key of the source {self.label}: {error}", error.hint) from None
        if signer is None:
            raise IntegrityError(f"{self.label}: its list is not signed by the key that you gave", "ask who runs it")
        expires, serial = str(found.get("expires", "")), found.get("serial")
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if expires < now:
            raise IntegrityError(
                f"{self.label}: its list expired at {expires or 'no time'}, it is {now}", "ask who runs it"
            )
        if type(serial) is not int:
            raise IntegrityError(f"{self.label}: its list has no serial number", AGAIN)
        check_no_older(self.http.url, serial, self.label)
        return found


def _counted(chunks: Iterator[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        advance(len(chunk))
