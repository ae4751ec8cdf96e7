"""Whom the user believes for which namespace, and what that makes of a release's signatures.

config.toml:

    [trust.acme]
    keys = ["ed25519:..."]
    until = 2027-12-31       # optional: the last day on which these keys count
    require = true           # optional: nothing of acme/... is installed unless one of them signed it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from adapterhub.config import user
from adapterhub.errors import HubError, IntegrityError, NotFound, UnsafeFile, UsageError
from adapterhub.spec.manifest import Release
from adapterhub.spec.names import NAME
from adapterhub.store.blobs import DATABASE, Problem
from adapterhub.store.releases import Releases
from adapterhub.trust.keys import PublicKey, list_keys
from adapterhub.trust.signature import RELEASE, opened, statement


@dataclass(frozen=True)
class Trusted:
    """The keys that vouch for one namespace."""

    keys: tuple[PublicKey, ...]
    until: date | None = None
    require: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a release's signatures are worth."""

    kind: str
    """"valid", "unsigned", "untrusted key", "expired", "another release"."""
    key: PublicKey | None = None


Policy = Mapping[str, Trusted]
"""Namespace ("acme" of acme/sql; "*" for every other) -> who vouches for it."""


def policy() -> Policy:
    """The user's, from config.toml. Raises UsageError."""
    return {namespace: _trusted(namespace, table) for namespace, table in user.load().trust.items()}


def known_keys() -> list[PublicKey]:
    """The user's own keys, and those that they trust."""
    own = []
    with suppress(HubError):
        own = [key.public for key in list_keys()]
    return own + [key for trusted in policy().values() for key in trusted.keys]


def verdict(
    release: Release, envelopes: Iterable[bytes], trusted: Trusted | None, now: datetime | None = None
) -> Verdict:
    """The best that any of the envelopes says. Without trusted keys every signature is of an untrusted key."""
    order = ["valid", "expired", "another release", "untrusted key", "unsigned"]
    found = [_one(release, envelope, trusted, now or datetime.now(UTC)) for envelope in envelopes]
    return min([*found, Verdict("unsigned")], key=lambda each: order.index(each.kind))


def trusted_for(policy: Policy, name: str) -> Trusted | None:
    """Who vouches for an adapter of this name."""
    return policy.get(name.partition("/")[0] if "/" in name else "", policy.get("*"))


def check_signed(release: Release, envelopes: Iterable[bytes], policy: Policy) -> None:
    """Raise UnsafeFile when the policy requires a signature that the release does not have."""
    trusted = trusted_for(policy, release.name)
    if trusted is None or not trusted.require:
        return
    found = verdict(release, envelopes, trusted)
    if found.kind != "valid":
        raise UnsafeFile(
            f"{release} is refused: {_told(found)}, and your configuration requires a trusted signature",
            f"ask its publisher to sign it, or change [trust] in {user.config_file()}",
        )


def unsigned(hub: Releases) -> list[Problem]:
    """The releases in namespaces with trusted keys that none of those vouches for."""
    rules, found = policy(), []
    for row in hub.releases():
        trusted = trusted_for(rules, row.name)
        release = hub.index.get(row.name, row.version) if trusted else None
        if release is not None:
            worth = verdict(release, hub.index.signatures(row.digest), trusted)
            if worth.kind != "valid":
                found.append(Problem(hub.root / DATABASE, _told(worth), (str(row),)))
    return found


def trust_key(namespace: str, key: str, until: str | None = None, require: bool = False) -> None:
    """Add a key to the namespace's in config.toml. Raises UsageError for what is none, and changes nothing then."""
    table: dict[str, Any] = {"keys": [PublicKey(key).text]}
    try:
        table |= {"until": date.fromisoformat(until)} if until else {}
    except ValueError:
        raise UsageError(f"{until!r} is no date", "write it as 2027-12-31") from None
    table |= {"require": True} if require else {}
    _trusted(namespace, table)
    with user.edited() as document:
        here = document.setdefault("trust", {}).setdefault(namespace, {})
        known = list(here.get("keys", []))
        here.update(table)
        here["keys"] = list(dict.fromkeys([*known, key]))


def distrust(namespace: str) -> None:
    """Take a namespace out of config.toml. Raises NotFound."""
    with user.edited() as document:
        if namespace not in document.get("trust", {}):
            raise NotFound(f"no key is trusted for {namespace!r}", "adapterhub trust list")
        del document["trust"][namespace]


def _told(verdict: Verdict) -> str:
    return {
        "unsigned": "it is not signed",
        "untrusted key": "it is signed with a key that you do not trust",
        "expired": "the trust in its key has ended",
        "another release": "its signature is of another release",
    }[verdict.kind]


def _one(release: Release, envelope: bytes, trusted: Trusted | None, now: datetime) -> Verdict:
    try:
        payload, key = opened(envelope, RELEASE, trusted.keys if trusted else ())
    except IntegrityError:
        return Verdict("unsigned")
    if payload != statement(release):
        return Verdict("another release", key)
    if key is None:
        return Verdict("untrusted key")
    if trusted and trusted.until and now.date() > trusted.until:
        return Verdict("expired", key)
    return Verdict("valid", key)


def _trusted(namespace: str, table: Mapping[str, Any]) -> Trusted:
    where = f"[trust.{namespace}] in {user.config_file()}"
    if namespace != "*" and (not NAME.fullmatch(namespace) or "/" in namespace):
        raise UsageError(f"{where} is no namespace", "acme, of adapters named acme/..., or *")
    if unknown := set(table) - {"keys", "until", "require"}:
        raise UsageError(f"{where} says {min(unknown)!r}", "it may say keys, until and require")
    keys, until, require = table.get("keys", []), table.get("until"), table.get("require", False)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or not isinstance(require, bool):
        raise UsageError(f"{where} is not right", "keys is a list of texts, require is true or false")
    if until is not None and type(until) is not date:
        raise UsageError(f"{where}: until is no date", "write it as until = 2027-12-31")
    return Trusted(tuple(PublicKey(key) for key in keys), until, require)
