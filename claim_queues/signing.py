"""Sign what is POSTed, and check signatures, as Standard Webhooks has it (https://www.standardwebhooks.com)."""

import base64
import os
import re
import stat
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

from .command_line import Log, option
from .errors import ConfigError, CredentialsError
from .store import APPLICATION

PREFIX = "whsec_"
LEAST_BYTES, MOST_BYTES = 24, 64
MOST_SECRETS = 2
"""One, or the new one and the old one while a secret is changed."""
MOST_FILE_BYTES = 4_096

log = Log("signing")


class BadSignature(Exception):
    """The signature is missing, wrong, of another body or id, or too old."""


class Signer:
    """Signs with each of its secrets, and takes what any of them has signed. Never shows them."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._keys = [Webhook(secret) for secret in secrets]

    def headers(self, message_id: str, body: str) -> dict[str, str]:
        """The three headers that sign the body of a POST now; message_id: printable ASCII."""
        now = datetime.now(UTC)
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(key.sign(message_id, now, body) for key in self._keys),
        }

    def check(self, headers: dict[str, str], body: bytes) -> None:
        """Raise BadSignature unless one of the secrets signed this body and id, within 5 minutes of now."""
        problems = set()
        for key in self._keys:
            try:
                key.verify(body, headers, json_parse=False)
            except (WebhookVerificationError, ValueError) as error:  # ValueError: of what is no base64, ASCII or UTF-8
                own = isinstance(error, WebhookVerificationError)
                problems.add(str(error) if own else "The signature cannot be read")
            else:
                return
        raise BadSignature("; ".join(sorted(problems)))


def signing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--signing-secret-file and --signing-secret-keyring, for load_signer()."""
    function = option(
        "--signing-secret-keyring",
        metavar="NAME",
        help=f"The same from keyring, where `keyring set {APPLICATION} NAME` puts it.",
    )(function)
    return option(
        "--signing-secret-file",
        metavar="FILE",
        help="File with the secret that POSTs are signed with, or with the new and the old one.",
    )(function)


def load_signer(file: str | None, keyring_name: str | None) -> Signer | None:
    """The signer with the secrets of that file or keyring entry, None where neither is named.

    Raises ConfigError where both are, CredentialsError where the secrets are missing or weak.
    """
    if file is not None and keyring_name is not None:
        raise ConfigError("--signing-secret-file and --signing-secret-keyring exclude each other")
    if file is not None:
        if file.startswith(PREFIX):
            raise ConfigError("--signing-secret-file: name a file: a command line is no place for a secret")
        return Signer(_parse(_read(file), file))
    if keyring_name is not None:
        from . import keyrings

        found = keyrings.secret(APPLICATION, keyring_name, what="signing secret")
        return Signer(_parse(found, f"keyring entry {keyring_name}"))
    return None


def _read(file: str) -> str:
    try:
        with Path(file).open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                log.warning("others may read the signing secret: chmod 600", file=file)
            return opened.read(MOST_FILE_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise CredentialsError(f"signing secret {file}: {error.strerror}") from error


def _parse(text: str, where: str) -> list[str]:
    secrets = text.split()
    if not 1 <= len(secrets) <= MOST_SECRETS:
        raise CredentialsError(f"{where}: holds {len(secrets)} signing secrets: write one, or the new and the old one")
    for number, secret in enumerate(secrets, 1):
        if problem := _problem(secret):
            raise CredentialsError(
                f"{where}: signing secret {number} {problem}: write {PREFIX} and the base64 of"
                f" {LEAST_BYTES} to {MOST_BYTES} random bytes"
            )
    return secrets


def _problem(secret: str) -> str | None:
    encoded = secret.removeprefix(PREFIX)
    if encoded == secret:
        return f"does not begin with {PREFIX}"
    if not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", encoded) or len(encoded.rstrip("=")) % 4 == 1:
        return "is no base64"
    size = len(base64.b64decode(encoded.rstrip("=") + "=="))
    if size < LEAST_BYTES:
        return f"is weak: it has {size} bytes"
    return None if size <= MOST_BYTES else f"has {size} bytes"
