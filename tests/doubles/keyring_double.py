"""Keyring backends for tests, also by name: PYTHON_KEYRING_BACKEND=doubles.keyring_double.Keyring."""

from contextlib import AbstractContextManager
from unittest.mock import patch

import keyring
from keyring.backend import KeyringBackend
from keyring.backends.chainer import ChainerBackend
from keyring.errors import PasswordSetError

USER = "tester"
KEY = "canary-5f0c7d1e9ab24c68"
"""What keyring holds for USER; a test finds it wherever it leaks to."""


class Keyring(KeyringBackend):
    """Holds one secret, and keeps it to itself."""

    priority = -2  # keyring never finds it by itself

    def get_password(self, service: str, username: str) -> str | None:
        return KEY if (service, username) == ("pyrax", USER) else None

    def set_password(self, service: str, username: str, password: str) -> None:
        raise PasswordSetError("this keyring holds what it holds")


class PlainText(Keyring):
    """Holds the same secret as a backend of the package keyrings.alt, which writes it to a file."""


class Encrypted(Keyring):
    """Holds it as keyrings.alt's encrypted file does."""


PlainText.__module__ = Encrypted.__module__ = "keyrings.alt.file"
Encrypted.__name__ = "EncryptedKeyring"


class Broken(Keyring):
    """A backend whose own service is away."""

    def get_password(self, service: str, username: str) -> str | None:
        raise RuntimeError("no D-Bus here")


class Chain(ChainerBackend):
    """The backend that asks all of these, as keyring makes one where it finds several."""

    priority = -2
    backends = ()

    def __init__(self, *backends: KeyringBackend) -> None:
        super().__init__()
        self.backends = backends


def keyring_of(backend: KeyringBackend) -> AbstractContextManager[object]:
    """Use that backend until the block ends; keyring.set_keyring() could not be undone where there was none yet."""
    return patch.object(keyring.core, "_keyring_backend", backend)
