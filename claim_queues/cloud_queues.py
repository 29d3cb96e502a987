"""Rackspace Cloud Queues, API v1, through pyrax; and any OpenStack Zaqar that still speaks API v1."""

import re
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import requests
from requests import exceptions as http
from urllib3.exceptions import HTTPError

from . import keyrings
from .base import Message
from .errors import ConfigError, CredentialsError, QueueError, QueueUnavailable
from .pyrax_client import AUTH_ENDPOINT, Client, Identity, QueueClient, configured_user, sdk
from .zaqar_api import MESSAGE_TTL, REFUSALS, Answer, ErrorMap, Refusals, ZaqarApi, limits_of, translated

LIMITS = limits_of(
    "Rackspace Cloud Queues",
    post_batch=10,  # docs.rackspace.com, Messages operations; Zaqar itself takes more
    around_a_body='[{"ttl":1209600,"body":}]',
)

T = TypeVar("T")

ERRORS: ErrorMap = (
    (
        (sdk.AuthenticationFailed, sdk.AuthorizationFailure, sdk.NotAuthenticated),
        CredentialsError,
        "; ask the account's owner for Cloud Queues",
    ),
    ((sdk.InternalServerError,), QueueUnavailable, ""),
    ((sdk.PyraxException,), ConfigError, ""),
    (
        (http.InvalidURL, http.MissingSchema, http.InvalidSchema, http.InvalidProxyURL, http.InvalidHeader),
        ConfigError,
        "; see identity= of the queue URL, and the environment's proxies",
    ),
    ((http.RequestException, HTTPError, ConnectionError, TimeoutError), QueueUnavailable, ""),
    ((OSError,), ConfigError, "; see REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE"),
)
"""What becomes of each error of pyrax that has no HTTP status, and of requests under it; most specific first."""


class CloudQueues(ZaqarApi):
    """Queues of one account in one region. client: sends the requests, over `session`, which is closed with it."""

    limits = LIMITS
    refusals: ClassVar[Refusals] = {**REFUSALS, 501: (QueueError, "; is that Cloud Queues, API v1?")}
    other_refusals = (QueueUnavailable, "")
    wraps_messages = False

    def __init__(self, client: QueueClient, address: str, session: requests.Session) -> None:
        super().__init__(address)
        self._client = client
        self._session = session

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `rackspace://[USER@]REGION[?identity=URL]`; nothing is asked of the service yet.

        Raises ConfigError for any other URL, CredentialsError where keyring has no key for the user.
        """
        named, region, endpoint = _parse(url)
        if not (user := named or configured_user()):
            raise CredentialsError(
                "no user is named: write rackspace://USER@REGION, or set CLOUD_KEYRING_USER,"
                " or keyring_username in ~/.pyrax.cfg"
            )
        key = keyrings.secret("pyrax", user, what="API key")
        session = requests.Session()
        session.auth = lambda request: request  # or requests takes a password for the host from ~/.netrc
        identity = Identity(user, key, endpoint, session)
        address = f"rackspace://{quote(user)}@{region}"
        if identity.auth_endpoint != AUTH_ENDPOINT:
            address += f"?identity={identity.auth_endpoint}"
        return cls(Client(identity, region, session), address, session)

    @property
    def credentials(self) -> str:
        return f"the API key of {self._client.identity.username}, in keyring"

    def exists(self, queue: str) -> bool:
        self.limits.check_queue(queue)
        return bool(self._call(f"look for {queue} at {self.address}", {}, self._client.queue_exists, queue))

    def purge(self, queue: str) -> None:
        self.stats(queue)  # or a missing queue would look empty
        super().purge(queue)

    def close(self) -> None:
        self.stop_waiting()
        self._session.close()

    def _send(self, what: str, method: str, path: str, instead: Refusals, **options: Any) -> Answer:
        # pyrax's own claim reads the claim back with a second request: where that fails, the claim is lost.
        send: Callable[..., Answer] = getattr(self._client, f"method_{method.lower()}")
        return self._call(what, instead, send, path, **options)

    def _call(self, what: str, instead: Refusals, call: Callable[..., T], path: str, **options: Any) -> T:
        """Call pyrax; its errors become ours."""
        self.requests[what.partition(" ")[0]] += 1
        try:
            return call(path, **options)
        except sdk.ClientException as error:
            seconds = getattr(error, "retry_after_s", None)
            raise self._refused(what, error.code, str(error), seconds, instead) from error
        except (sdk.PyraxException, OSError, HTTPError) as error:
            raise translated(error, what, ERRORS, error) from error

    def _life(self, message: Message, claim_ttl: int, grace: int) -> int:
        """API v1 shows its TTL plus grace for a message that lives on; where the answer allows two, the longer."""
        shown = message.ttl or 0
        if MESSAGE_TTL.low <= shown - grace < message.age + claim_ttl:
            return max(shown, int(message.age) + claim_ttl + grace)
        return shown


def _parse(url: str) -> tuple[str, str, str | None]:
    """The user or "", the region and the identity service's URL. The errors do not show the URL: it may hold a key."""
    try:
        parts = urlsplit(url)
        user, _, region = parts.netloc.rpartition("@")
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ConfigError("the queue URL cannot be read: write rackspace://USER@REGION") from None
    if ":" in user:
        raise ConfigError("the queue URL holds a secret, which everyone may see: keyring set pyrax USER keeps it")
    if set(options) - {"identity"} or not all(options.values()):
        raise ConfigError("the queue URL has an unknown or empty option: rackspace:// takes identity=URL alone")
    if not re.fullmatch("[A-Za-z0-9_-]+", region) or parts.path.strip("/") or parts.fragment:
        raise ConfigError("the queue URL names no region: write rackspace://USER@REGION, such as rackspace://me@DFW")
    return unquote(user), region.upper(), options.get("identity")
