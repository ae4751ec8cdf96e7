"""Signatures as DSSE envelopes: a payload, its type, and who signed both (https://github.com/secure-systems-lab/dsse).

Signed is not a file but what a manifest's digest names; through it every byte of the release.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any

from adapterhub.errors import IntegrityError, UsageError
from adapterhub.files.bounded import read_json
from adapterhub.spec.digest import canonical
from adapterhub.spec.manifest import Release
from adapterhub.trust.keys import PrivateKey, PublicKey

RELEASE = "application/vnd.adapterhub.release+json"
"""The payload's type: {"digest", "name", "version"} of a release."""
LIST = "application/vnd.adapterhub.list+json"
"""The type of a registry's list of the releases of one name."""
LARGEST = 4 << 20
"""Bytes of an envelope: a list may name thousands of releases."""


def sign(payload: Mapping[str, Any], kind: str, key: PrivateKey) -> bytes:
    """The envelope of a payload."""
    body = canonical(payload)
    signature = {"keyid": key.public.id, "public": key.public.text, "sig": _text(key.sign(_encoded(kind, body)))}
    return canonical({"payload": _text(body), "payloadType": kind, "signatures": [signature]})


def opened(envelope: bytes, kind: str, keys: Iterable[PublicKey]) -> tuple[dict[str, Any], PublicKey | None]:
    """The payload, and which of the keys signed it (None: none of them, then nothing vouches for it).

    Raises IntegrityError for what is no envelope of this kind."""
    try:
        if len(envelope) > LARGEST:
            raise ValueError("it is too large")
        found = read_json(envelope)
        if found["payloadType"] != kind:
            raise ValueError(f"it is about {found['payloadType']!r}"[:100])
        body = base64.b64decode(found["payload"], validate=True)
        payload = read_json(body)
        signatures = [base64.b64decode(each["sig"], validate=True) for each in found["signatures"]]
        if not isinstance(payload, dict) or len(signatures) > 16:
            raise ValueError("it is malformed")
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError) as error:
        raise IntegrityError(f"not a signature's envelope: {error}", "get the release again from its source") from None
    message = _encoded(kind, body)
    signer = next((key for key in keys if any(key.holds(signature, message) for signature in signatures)), None)
    return payload, signer


def proven(envelope: bytes, kind: str, known: Iterable[PublicKey] = ()) -> tuple[dict[str, Any], bytes]:
    """The payload, and an envelope of it with those signatures alone that hold under the key that they carry, or under a
    known one. A signature that holds says that somebody has the key, not that anybody trusts them.

    Raises IntegrityError for what is no envelope of this kind, and when no signature holds."""
    payload, _ = opened(envelope, kind, ())
    found = read_json(envelope)
    message, keys = _encoded(kind, base64.b64decode(found["payload"])), {key.id: key for key in known}
    holding = []
    for each in found["signatures"]:
        key = _carried(each) or keys.get(str(each.get("keyid")))
        if key is not None and key.holds(base64.b64decode(each["sig"]), message):
            holding.append({"keyid": key.id, "public": key.text, "sig": each["sig"]})
    if not holding:
        raise IntegrityError(
            "no signature in the envelope holds under a key that it carries",
            "adapterhub sign makes one that carries its public key",
        )
    return payload, canonical({"payload": found["payload"], "payloadType": kind, "signatures": holding})


def with_keys(envelope: bytes, keys: Iterable[PublicKey]) -> dict[str, Any]:
    """The envelope as JSON, with the public keys that its signatures do not carry and that are among these."""
    found, known = read_json(envelope), {key.id: key.text for key in keys}
    for each in found.get("signatures", ()):
        if isinstance(each, dict) and each.get("keyid") in known:
            each.setdefault("public", known[each["keyid"]])
    return found


def _carried(signature: Mapping[str, Any]) -> PublicKey | None:
    try:
        return PublicKey(signature["public"])
    except (KeyError, AttributeError, TypeError, UsageError):
        return None


def statement(release: Release) -> dict[str, str]:
    """What is signed of a release."""
    return {"digest": release.digest, "name": release.name, "version": release.version}


def _encoded(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: no two (type, payload) give the same bytes."""
    return b"DSSEv1 %d %b %d %b" % (len(kind.encode()), kind.encode(), len(body), body)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
