"""A Rackspace account through pyrax: the sign-in with an API key, and requests over kept connections.

What pyrax's identity and client do badly is replaced in two subclasses: no timeouts, a new connection for each
request, a sign-in that one bad answer breaks for good, settings that turn TLS verification off by a slip.
"""

import collections.abc
import configparser
import ipaddress
import json
import logging
import threading
import uuid
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from .base import parse_retry_after
from .errors import ConfigError, CredentialsError, QueueUnavailable
from .zaqar_api import content, reason, said_of

for _module, _name, _thing in (
    # From Python 3.10 on collections lacks what oslo.config, as plain pip installs it for pyrax, looks for there, and
    # from 3.12 on configparser lacks what pyrax reads its file with.
    *((collections, name, getattr(collections.abc, name)) for name in collections.abc.__all__),
    (configparser, "SafeConfigParser", configparser.ConfigParser),
):
    if not hasattr(_module, _name):
        setattr(_module, _name, _thing)
try:
    with warnings.catch_warnings():  # pyrax's dependencies warn when they are imported
        warnings.simplefilter("ignore")
        configparser.ConfigParser().read(Path.home() / ".pyrax.cfg")
        import pyrax
        from pyrax import exceptions as sdk
        from pyrax.identity.rax_identity import AUTH_ENDPOINT, RaxIdentity
        from pyrax.queueing import QueueClient
except (configparser.Error, UnicodeError) as _error:
    # The parser's own words show lines of the file, and people write keys into it.
    raise ConfigError(f"~/.pyrax.cfg cannot be read ({type(_error).__name__}): mend it or remove it") from None
except ImportError as _error:
    raise ConfigError(f"rackspace:// needs pyrax ({_error}): pip install -r requirements.txt") from _error
# With http_debug in ~/.pyrax.cfg pyrax prints keys and tokens, through a handler of its own.
pyrax.set_http_debug(False)
logging.getLogger("pyrax").handlers.clear()
logging.getLogger("pyrax").setLevel(logging.WARNING)

__all__ = ["AUTH_ENDPOINT", "Client", "Identity", "QueueClient", "configured_user", "sdk"]

TIMEOUT_S = (5, 30)
"""To connect, and between two bytes of an answer."""


def configured_user() -> str | None:
    """The user that pyrax's own settings name: keyring_username in ~/.pyrax.cfg, else CLOUD_KEYRING_USER."""
    return pyrax.get_setting("keyring_username") or None


class Identity(RaxIdentity):  # type: ignore[misc]
    """A sign-in with an API key, as often as a token is refused. endpoint: None is pyrax's setting or Rackspace's.

    signed_in: the token, once all of the answer that brought it is known. Thread-safe, unlike pyrax's own `token`.
    Raises CredentialsError where the key is refused, QueueUnavailable where there is no answer now.
    """

    def __init__(self, user: str, key: str, endpoint: str | None, session: requests.Session) -> None:
        super().__init__(username=user, api_key=key, auth_endpoint=endpoint)
        self._session = session
        self._signing_in = threading.Lock()
        self.signed_in: str | None = None
        _require_safe(self.auth_endpoint, "the identity service")

    def sign_in(self, refused: str | None) -> str:
        """A token other than the refused one; threads whose token was refused share one sign-in."""
        with self._signing_in:
            if self.signed_in == refused:
                self.authenticate()
                self.signed_in = str(self.token)
            return str(self.signed_in)

    def authenticate(self, *_: Any, **__: Any) -> None:
        try:
            super().authenticate()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise QueueUnavailable(f"{self._where}: the answer is none of identity service v2.0") from error

    def method_post(self, uri: str, *_: Any, data: Any = None, headers: Any = None, **__: Any) -> tuple[Any, Any]:
        url = f"{self.auth_endpoint.rstrip('/')}/{uri}"
        # Raised here: after any refusal that it sees, a 429 too, RaxIdentity signs in with passwords, and never back.
        try:
            return send(self._session, "POST", url, data=json.dumps(data), headers=headers)
        except (sdk.BadRequest, sdk.Unauthorized, sdk.Forbidden) as error:
            then = f"store the API key, which is not the password: keyring set pyrax {self.username}"
            raise CredentialsError(f"{self._where}: {error}; {then}") from error
        except sdk.NotFound as error:
            raise ConfigError(f"{self._where}: {error}; the URL of identity service v2.0 ends with /v2.0") from error
        except (sdk.ClientException, requests.RequestException, HTTPError) as error:
            asked = getattr(error, "retry_after_s", None)
            raise QueueUnavailable(f"{self._where}: {said_of(error)}", retry_after_s=asked) from error

    def queues_url(self, region: str) -> str:
        """Where the service catalog says that the region's Cloud Queues are."""
        endpoints = getattr(self.services.get("queues"), "endpoints", {})
        for name, endpoint in endpoints.items():
            if name.upper() == region.upper() and endpoint.public_url:
                _require_safe(endpoint.public_url, f"Cloud Queues of {name}")
                return str(endpoint.public_url).rstrip("/")
        found = ", ".join(sorted(endpoints)) or "none"
        raise ConfigError(f"{self.username} has no Cloud Queues in region {region}; regions that have: {found}")

    @property
    def _where(self) -> str:
        return f"sign-in of {self.username} at {self.auth_endpoint}"


class Client(QueueClient):  # type: ignore[misc]
    """pyrax's client of one region, without its ever growing list of timings. Raises pyrax's and requests' errors."""

    management_url: str | None

    def __init__(self, identity: Identity, region: str, session: requests.Session) -> None:
        super().__init__(identity, region_name=region, verify_ssl=True, timeout=TIMEOUT_S)
        self.client_id = str(uuid.uuid4())
        self._session = session

    def _api_request(self, uri: str, method: str, **options: Any) -> tuple[Any, Any]:
        token = self.identity.signed_in or self.identity.sign_in(None)
        try:
            return self.request(uri, method, token=token, **options)
        except sdk.Unauthorized:  # tokens live for a day
            return self.request(uri, method, token=self.identity.sign_in(token), **options)

    def request(self, uri: str, method: str, *, token: str, **options: Any) -> tuple[Any, Any]:
        self.management_url = self.management_url or self.identity.queues_url(self.region_name)
        headers = {"User-Agent": pyrax.USER_AGENT, "Accept": "application/json", "Content-Type": "application/json"}
        headers |= {"X-Auth-Token": token, "X-Auth-Project-Id": str(self.identity.tenant_id)}
        self._add_custom_headers(headers)
        return send(self._session, method, self.management_url + uri, headers=headers, **options)


def send(session: requests.Session, method: str, url: str, **options: Any) -> tuple[requests.Response, Any]:
    """Send one request; gives the answer and its content, parsed where it is JSON.

    An answer from 300 on is raised as pyrax's error, with the service's own words. TLS is always verified: pyrax's
    settings, where `verify_ssl = true` means no, are not asked.
    """
    answer = session.request(method, url, timeout=TIMEOUT_S, verify=True, allow_redirects=False, **options)
    found = content(answer)
    if answer.status_code >= requests.codes.multiple_choices:
        error = sdk.from_response(answer, {"message": reason(found) or answer.reason})
        error.retry_after_s = parse_retry_after(answer.headers.get("Retry-After"))
        raise error
    return answer, found


def _require_safe(url: str, what: str) -> None:
    """Raise ConfigError unless secrets can be sent to that URL."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        raise ConfigError(f"{what}: its URL cannot be read") from None
    if not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"{what}: its URL must be https://HOST/PATH, without credentials, query and fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise ConfigError(f"{what}, {url}: only https is safe, or http to this very machine")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
