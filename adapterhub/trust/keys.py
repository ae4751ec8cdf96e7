"""Ed25519 keys: private ones as PEM files that only their owner reads, public ones as one line of text."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from adapterhub.config.user import config_folder
from adapterhub.errors import NameInUse, NotFound, UnsafeFile, UsageError
from adapterhub.files import durable

PREFIX = "ed25519:"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DEFAULT = "default"


class PublicKey:
    """A public key: `ed25519:` and 44 characters of base64."""

    def __init__(self, text: str):
        """Raises UsageError for a text that is no key."""
        try:
            raw = base64.b64decode(text.removeprefix(PREFIX), validate=True)
            if not text.startswith(PREFIX) or len(raw) != 32:
                raise ValueError
            self._key = Ed25519PublicKey.from_public_bytes(raw)
        except (ValueError, binascii.Error):
            raise UsageError(
                f"{text[:80]!r} is no public key", f"a key is {PREFIX} and 44 characters of base64"
            ) from None
        self.text = text
        self.id = "sha256:" + hashlib.sha256(raw).hexdigest()

    def holds(self, signature: bytes, message: bytes) -> bool:
        """Whether the signature of the message is this key's."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def __str__(self) -> str:
        return self.text


class PrivateKey:
    """A private key by its name in the user's configuration folder."""

    def __init__(self, name: str, key: Ed25519PrivateKey):
        self.name = name
        self._key = key
        raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public = PublicKey(PREFIX + base64.b64encode(raw).decode())

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


def new_key(name: str = DEFAULT) -> PrivateKey:
    """Make a key. Raises NameInUse for a name that has one: a key is never overwritten."""
    path = _path(name)
    if path.exists():
        raise NameInUse(f"there is a key named {name!r} already", "take another name, or adapterhub key rm first")
    key = Ed25519PrivateKey.generate()
    durable.write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return PrivateKey(name, key)


def load_key(name: str = DEFAULT) -> PrivateKey:
    """The key with this name. Raises NotFound, UnsafeFile for a file that is none."""
    path = _path(name)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise NotFound(f"there is no key named {name!r}", f"make one: adapterhub key new {name}") from None
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UnsafeFile(
            f"{path} holds no key that can be read: {error}", "make a new one under another name"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UnsafeFile(f"{path} holds a key of another kind", "adapterhub signs with ed25519")
    return PrivateKey(name, key)


def list_keys() -> list[PrivateKey]:
    """The user's own keys, by name."""
    return [load_key(path.stem) for path in sorted(_folder().glob("*.pem"))]


def remove_key(name: str) -> None:
    """Remove a key for good. Raises NotFound."""
    load_key(name)
    durable.remove(_path(name))


def _folder() -> Path:
    return config_folder() / "keys"


def _path(name: str) -> Path:
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a key", "use a-z, 0-9, dot, dash and underscore")
    return _folder() / f"{name}.pem"
