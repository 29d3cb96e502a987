"""A secret from keyring, and from no backend of it that would not keep one."""

from typing import Any

import keyring
from keyring.backends import chainer, fail, null

from .errors import CredentialsError


def secret(service: str, user: str, *, what: str) -> str:
    """What `keyring set SERVICE USER` has stored. what: what it is, for people.

    Raises CredentialsError, which says what to do, where there is none or where keyring has no safe place for it.
    """
    then = f"then store the {what}: keyring set {service} {user}"
    try:
        backends = _leaves(keyring.get_keyring())
        usable = [each for each in backends if not isinstance(each, fail.Keyring | null.Keyring)]
        files = [each for each in backends if type(each).__module__.startswith("keyrings.alt.")]
        plain = [each for each in files if "Encrypted" not in type(each).__name__]
        found = keyring.get_password(service, user) if usable and not plain else None
    except Exception as error:  # a backend is a plug-in, and raises what it likes
        reason = f"{type(error).__name__}: {error}"
        raise CredentialsError(f"keyring failed ({reason}): repair, unlock or choose its backend, {then}") from error
    if plain:
        name = f"{type(plain[0]).__module__}.{type(plain[0]).__name__}"
        raise CredentialsError(f"keyring keeps secrets in plain text ({name}): choose another backend, {then}")
    if not usable:
        raise CredentialsError(
            "keyring has no usable backend: start GNOME Keyring or KWallet, use macOS's or Windows's own, or name one"
            f" that encrypts by itself in PYTHON_KEYRING_BACKEND, {then}"
        )
    if not found:
        raise CredentialsError(f"keyring has no {what} of {user} for {service}: keyring set {service} {user}")
    return str(found)


def _leaves(backend: Any) -> list[Any]:
    """The backend, or those that it asks in turn."""
    inner = backend.backends if isinstance(backend, chainer.ChainerBackend) else None
    return [backend] if inner is None else [leaf for each in inner for leaf in _leaves(each)]
