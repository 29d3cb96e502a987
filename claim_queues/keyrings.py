"""Secrets from keyring, but never from a backend that keeps them in plain text."""

import keyring

from .errors import CredentialsError


def secret(service: str, user: str, *, what: str) -> str:
    """The secret that `keyring set SERVICE USER` stored. what: its kind, for messages.

    Raises CredentialsError, which says what to do, where keyring has none, fails, or would keep it in plain text.
    """
    then = f"then store the {what}: keyring set {service} {user}"
    try:
        backend = keyring.get_keyring()
        chain = getattr(backend, "backends", [backend])
        names = [f"{type(each).__module__}.{type(each).__name__}" for each in chain]
        plain = [name for name in names if name.startswith("keyrings.alt.") and "Encrypted" not in name]
        found = None if plain else backend.get_password(service, user)
    except Exception as error:  # a backend is a plug-in, and may raise anything
        raise CredentialsError(
            f"keyring failed ({type(error).__name__}: {error}): start or unlock GNOME Keyring or KWallet, or name a"
            f" backend that encrypts by itself in PYTHON_KEYRING_BACKEND, {then}"
        ) from error
    if plain:
        raise CredentialsError(f"keyring keeps secrets in plain text ({plain[0]}): choose another backend, {then}")
    if not found:
        asked = ", ".join(names)
        raise CredentialsError(f"keyring ({asked}) has no {what} of {user} for {service}: keyring set {service} {user}")
    return str(found)
