"""A secret from keyring, and from no backend of it that would not keep one."""

import keyring
from keyring.backends import chainer, fail, null

from .errors import CredentialsError


def secret(service: str, user: str, *, what: str) -> str:
    """What `keyring set SERVICE USER` has stored. what: what it is, for people.

    Raises CredentialsError, which says what to do, where there is none or where keyring has no safe place for it.
    """
    store = f"keyring set {service} {user}"
    then = f"then store the {what}: {store}"
    try:
        backend = keyring.get_keyring()
        backends = backend.backends if isinstance(backend, chainer.ChainerBackend) else [backend]
        usable = [found for found in backends if not isinstance(found, fail.Keyring | null.Keyring)]
        plain = [found for found in backends if type(found).__module__.startswith("keyrings.alt.")]
        found = keyring.get_password(service, user) if usable and not plain else None
    except Exception as error:  # a backend is a plug-in, and raises what it likes
        reason = f"{type(error).__name__}: {error}"
        raise CredentialsError(f"keyring failed ({reason}): mend, unlock or choose its backend, {then}") from error
    if plain:
        name = f"{type(plain[0]).__module__}.{type(plain[0]).__name__}"
        raise CredentialsError(f"keyring keeps secrets in plain text ({name}): choose another backend, {then}")
    if not usable:
        raise CredentialsError(
            f"keyring has no usable backend ({type(backend).__module__}): start GNOME Keyring or KWallet, use"
            f" macOS's or Windows's own, or name one that encrypts by itself in PYTHON_KEYRING_BACKEND, {then}"
        )
    if not found:
        raise CredentialsError(f"keyring has no {what} of {user} for {service}: {store}")
    return str(found)
