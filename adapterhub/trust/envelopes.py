"""Which of the envelopes that come with a release are worth keeping: those that can be signatures of it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress

from adapterhub.errors import IntegrityError
from adapterhub.files.bounded import read_json
from adapterhub.spec.digest import canonical
from adapterhub.spec.manifest import Release
from adapterhub.trust.signature import RELEASE, opened, statement

LARGEST = 16 << 10
"""Bytes of an envelope; ours have about 500."""
MOST = 64
"""Envelopes of a release."""
_SIGNATURE = 64
"""Bytes of an ed25519 signature."""


def worth(release: Release, envelopes: Iterable[bytes]) -> list[bytes]:
    """Those that are about this release and hold a signature, `MOST` at most; whose it is, the policy asks. Others are left
    out: whoever may write to a source could put any number of them beside a release."""
    found: dict[bytes, None] = {}
    for envelope in envelopes:
        if len(envelope) <= LARGEST and len(found) < MOST and _signs(envelope, release):
            found[envelope] = None
    return list(found)


def listed(data: bytes) -> Iterator[bytes]:
    """The objects of a JSON list one by one, as canonical JSON, as far as it can be read: its end may be cut off.

    Raises ValueError for what does not begin as a list."""
    text, decoder = data.decode(errors="replace").lstrip(), json.JSONDecoder()
    if not text.startswith("["):
        raise ValueError("it is not a list")
    at = 1
    while at < len(text):
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            found, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        with suppress(ValueError, RecursionError):  # half of a letter, no finite number: no envelope of ours
            if isinstance(found, dict):
                yield canonical(found)


def _signs(envelope: bytes, release: Release) -> bool:
    try:
        payload, _ = opened(envelope, RELEASE, ())
        signatures = [base64.b64decode(each["sig"], validate=True) for each in read_json(envelope)["signatures"]]
    except (IntegrityError, ValueError, LookupError, TypeError, binascii.Error):
        return False
    return payload == statement(release) and any(len(signature) == _SIGNATURE for signature in signatures)
