"""Sign what is POSTed, and check signatures, by Standard Webhooks (https://www.standardwebhooks.com)."""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from standardwebhooks import Webhook, WebhookVerificationError

from claim_queues import ConfigError, CredentialsError

SERVICE = "itchy-octo-chainsaw"
WELL_FORMED = "whsec_([A-Za-z0-9+/]{4}){8,}([A-Za-z0-9+/]{2,3}={0,2})?"


class Signer:
    """Signs with each secret in the text; accepts what any of them signed. Raises CredentialsError for a weak one."""

    def __init__(self, text: str, where: str) -> None:
        if not re.fullmatch(rf"\s*{WELL_FORMED}(\s+{WELL_FORMED})?\s*", text):
            raise CredentialsError(f"{where}: needs one or two secrets: whsec_ and the base64 of 24 to 64 random bytes")
        self._keys = [Webhook(secret) for secret in text.split()]

    def headers(self, message_id: str, body: bytes) -> dict[str, str]:
        """The headers that sign a POST of this body, sent now. message_id: printable ASCII."""
        now = datetime.now(UTC)
        signed = " ".join(key.sign(message_id, now, body.decode()) for key in self._keys)
        return {"webhook-id": message_id, "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signed}

    def check(self, headers: Mapping[str, str], body: bytes) -> None:
        """Raise WebhookVerificationError unless a secret signed this body and id within 5 minutes of now."""
        for key in self._keys:
            try:
                return key.verify(body, dict(headers), json_parse=False)  # type: ignore[no-any-return]
            except (WebhookVerificationError, ValueError) as error:  # ValueError: not base64, ASCII or UTF-8
                problem = str(error) if isinstance(error, WebhookVerificationError) else "The signature cannot be read"
        raise WebhookVerificationError(problem)


def signing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--signing-secret-file and --signing-secret-keyring, for `load_signer`."""
    text = f"Keyring entry with the same, stored by `keyring set {SERVICE} NAME`."
    function = click.option("--signing-secret-keyring", metavar="NAME", help=text)(function)
    return click.option("--signing-secret-file", metavar="FILE", help="File with one secret, or new and old.")(function)


def load_signer(file: str | None, keyring_name: str | None) -> Signer | None:
    """None where neither is named. Raises ConfigError where both are, CredentialsError where no secret is found."""
    if file is not None and (keyring_name is not None or file.startswith("whsec_")):
        raise ConfigError("the signing secret: name a file or a keyring entry, not both, and never the secret itself")
    if keyring_name is not None:
        from claim_queues.keyrings import secret

        return Signer(secret(SERVICE, keyring_name, what="signing secret"), f"keyring entry {keyring_name}")
    try:
        return Signer(Path(file).read_bytes().decode("ascii", "replace"), file) if file is not None else None
    except OSError as error:
        raise CredentialsError(f"signing secret {file}: {error.strerror}") from error
