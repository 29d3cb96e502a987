"""Rackspace Cloud Queues, API v1, through pyrax; and any OpenStack Zaqar that still speaks API v1.

Two subclasses replace what pyrax does badly: it has no timeouts, opens a connection for each request, cannot sign in
again after one bad answer, turns TLS verification off by one mistaken setting, and needs two requests for a claim.
"""

import collections.abc
import configparser
import threading
import uuid
import warnings
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote

import requests

from . import keyrings
from .base import Limits
from .errors import ConfigError, CredentialsError, QueueNotFound, QueueUnavailable
from .remote import is_here, split_url, with_options
from .zaqar_api import REQUEST_BYTES, Answer, HttpSession, ZaqarApi, retry_after_s, said_by

for _name in collections.abc.__all__:  # where oslo.config, as plain pip installs it for pyrax, looks for them
    setattr(collections, _name, getattr(collections.abc, _name))
vars(configparser).setdefault("SafeConfigParser", configparser.ConfigParser)  # gone from Python 3.12
try:
    with warnings.catch_warnings():  # pyrax's dependencies warn when they are imported
        warnings.simplefilter("ignore")
        configparser.ConfigParser().read(Path.home() / ".pyrax.cfg")
        import pyrax
        from pyrax.identity.rax_identity import AUTH_ENDPOINT, RaxIdentity
        from pyrax.queueing import QueueClient
except (configparser.Error, RuntimeError, UnicodeError) as _error:  # RuntimeError: there is no home
    # The parser's own words show lines of the file, and people write keys into it.
    raise ConfigError(f"~/.pyrax.cfg cannot be read ({type(_error).__name__}): correct it or remove it") from None

USAGE = "write rackspace://USER@REGION, or with ?identity=URL for another service; keyring keeps the API key"


class Identity(RaxIdentity):  # type: ignore[misc]
    """A sign-in with an API key."""

    token: str | None

    def __init__(self, user: str, key: str, endpoint: str | None, http: HttpSession) -> None:
        super().__init__(username=user, api_key=key, auth_endpoint=endpoint)
        is_here(self.auth_endpoint)
        self._http = http
        self._signing_in = threading.Lock()

    def sign_in(self, refused: str | None) -> str:
        """A token other than the refused one; threads whose token was refused share one sign-in."""
        with self._signing_in:
            if self.token in (None, refused):
                try:
                    self.authenticate()
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    self.token = None  # authenticate() may have set it
                    raise QueueUnavailable(f"{self.auth_endpoint}: this is not the answer of a sign-in") from error
            return str(self.token)

    def method_post(self, uri: str, *_: Any, data: Any = None, **__: Any) -> tuple[Answer, Any]:
        # Refusals are raised here: once RaxIdentity sees one, it signs in with passwords until the process ends.
        url = f"{self.auth_endpoint.rstrip('/')}/{uri}"
        answer = self._http.post(url, json=data, allow_redirects=False)
        if (status := answer.status_code) < requests.codes.multiple_choices:
            return answer, answer.json()
        said = f"sign-in of {self.username} at {url}: {said_by(answer)}"
        if status in (408, 413, 429) or status >= requests.codes.server_error:
            raise QueueUnavailable(said, retry_after=retry_after_s(answer))
        raise CredentialsError(f"{said}; store the API key, not the password: keyring set pyrax {self.username}")

    def queues_url(self, region: str) -> str:
        """Where the service catalog says that the region's Cloud Queues are."""
        endpoints = getattr(self.services.get("queues"), "endpoints", {})
        urls = {name.upper(): str(each.public_url).rstrip("/") for name, each in endpoints.items() if each.public_url}
        if region not in urls:
            found = ", ".join(sorted(urls)) or "none"
            raise ConfigError(f"{self.username} has no Cloud Queues in region {region}; regions that have: {found}")
        return urls[region]


class Client(QueueClient):  # type: ignore[misc]
    """pyrax's client of one region. It returns refusals instead of raising them."""

    management_url: str | None

    def __init__(self, identity: Identity, region: str, http: HttpSession) -> None:
        super().__init__(identity, region_name=region)
        self.client_id = str(uuid.uuid4())
        self._http = http

    def _api_request(self, uri: str, method: str, **options: Any) -> tuple[Answer, Any]:
        token, again = self.identity.sign_in(None), True
        while True:
            headers = {"User-Agent": pyrax.USER_AGENT, "Content-Type": "application/json"}
            headers |= {"X-Auth-Token": token, "X-Auth-Project-Id": str(self.identity.tenant_id)}
            self._add_custom_headers(headers)
            self.management_url = self.management_url or self.identity.queues_url(self.region_name)
            url = f"{self.management_url}{uri}"
            answer = self._http.request(method, url, headers=headers, allow_redirects=False, **options)
            if answer.status_code != requests.codes.unauthorized or not again:
                return answer, answer.content
            token, again = self.identity.sign_in(token), False  # tokens live for a day


class CloudQueues(ZaqarApi):
    """Queues of one account in one region. client: sends the requests over `http`, which is closed with it."""

    # At most 10 bodies: docs.rackspace.com, Messages operations. Zaqar itself takes more.
    limits = Limits(service="Rackspace Cloud Queues", claim_limit=20, post_limit=10, message_bytes=REQUEST_BYTES - 25)
    around = "[", "]"

    def __init__(self, client: QueueClient, http: HttpSession, address: str, credentials: str) -> None:
        super().__init__(http, address, credentials)
        self._client = client

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `rackspace://[USER@]REGION[?identity=URL]`; nothing is asked of the service yet.

        Raises ConfigError for any other URL, CredentialsError where keyring has no key for the user.
        """
        place, options = split_url(url, "(?:[^/@:?#]+@)?[A-Za-z0-9_-]+", ("identity",), USAGE)
        named, _, region = place.rpartition("@")
        if not (user := unquote(named) or pyrax.get_setting("keyring_username")):
            raise CredentialsError(f"no user is named: {USAGE}; or set CLOUD_KEYRING_USER")
        http = HttpSession(trust_env=True)
        key = keyrings.secret("pyrax", user, what="API key")
        identity = Identity(user, key, options.get("identity"), http)
        elsewhere = identity.auth_endpoint if identity.auth_endpoint != AUTH_ENDPOINT else None
        address = with_options(f"rackspace://{quote(user)}@{region.upper()}", {"identity": elsewhere})
        return cls(Client(identity, region.upper(), http), http, address, f"the API key of {user}, in keyring")

    def exists(self, queue: str) -> bool:
        try:
            return self._ask("look for", queue, f"HEAD /queues/{queue}", bool)
        except QueueNotFound:
            return False

    def _send(self, method: str, path: str, **options: Any) -> Answer:
        answer: Answer = getattr(self._client, f"method_{method.lower()}")(path, **options)[0]
        return answer
