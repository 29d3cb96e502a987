"""OpenStack Zaqar, API v2; openstacksdk signs in, finds the service and keeps the connections.

Its message resource is left alone: seen in 4.22, create_claim fails after it claimed, with a limit that the server
ignores, and update_claim takes every refusal for success. XR1 to XR18 are defects of Zaqar 23.0.1's Redis driver.
"""

import re
import uuid
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Self, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import requests
from keystoneauth1 import exceptions as auth
from keystoneauth1.adapter import Adapter
from keystoneauth1.noauth import NoAuth
from keystoneauth1.session import Session
from openstack import exceptions as sdk
from openstack.config import OpenStackConfig
from openstack.connection import Connection

from .base import Message, Page, Stats, parse_retry_after
from .errors import (
    ClaimLost,
    ConfigError,
    CredentialsError,
    MessageRefused,
    QueueError,
    QueueNotFound,
    QueueUnavailable,
)
from .zaqar_api import (
    PAGE,
    REFUSALS,
    Answer,
    ErrorMap,
    Refusals,
    ZaqarApi,
    content,
    last_part,
    limits_of,
    reason,
    said_of,
    translated,
)

LIMITS = limits_of(
    "OpenStack Zaqar",
    post_batch=100,  # the server counts bytes only
    around_a_body='{"messages":[{"ttl":1209600,"body":}]}',
)
TIMEOUTS_S = (5, 30)
"""To connect, and to read; openstacksdk sets none."""
NO_MESSAGE = "0" * 24
USAGE = "write zaqar://CLOUD, a name in clouds.yaml, or zaqar://?endpoint=URL&project=NAME for a Zaqar without Keystone"

ERRORS: ErrorMap = (
    ((auth.Unauthorized, auth.Forbidden), CredentialsError, "; see the cloud's `auth` in clouds.yaml"),
    ((auth.ConnectionError, auth.RetriableConnectionFailure, auth.InvalidResponse), QueueUnavailable, ""),
    ((auth.HttpServerError, auth.TooManyRequests, auth.RequestTimeout), QueueUnavailable, ""),
    ((auth.VersionNotAvailable,), ConfigError, "; is that a Zaqar with API v2?"),
    (
        (auth.DiscoveryFailure, sdk.ServiceDiscoveryException, sdk.NotSupported),
        QueueUnavailable,
        "; is the service up, and a Zaqar with API v2?",
    ),
    ((auth.CatalogException,), ConfigError, "; the cloud offers no `messaging` there: see region_name, interface"),
    (
        (auth.AuthPluginException, auth.AuthorizationFailure, auth.MissingAuthMethods),
        CredentialsError,
        "; see the cloud's `auth` in clouds.yaml",
    ),
    (
        (auth.ClientException, auth.ImpliedVersionMismatch, sdk.SDKException, OSError),
        ConfigError,
        "; see the cloud in clouds.yaml",
    ),
)
"""What becomes of each error of openstacksdk, and of keystoneauth under it; most specific first."""
SDK_ERRORS = tuple(kind for kinds, _, _ in ERRORS for kind in kinds)


class ZaqarQueues(ZaqarApi):
    """Queues of one project. connection: closed with it. project: needed where the server has no Keystone.

    A post to a missing queue creates it, as API v2 does.
    """

    limits = LIMITS
    refusals: ClassVar[Refusals] = {**REFUSALS, 413: (MessageRefused, "")}
    other_refusals = (QueueError, "; is that a Zaqar with API v2?")
    wraps_messages = True

    def __init__(self, connection: Connection, address: str, *, project: str | None = None) -> None:
        super().__init__(address)
        self._connection = connection
        connection.session.timeout = connection.session.timeout or cast(Any, TIMEOUTS_S)
        self._headers = {"Client-ID": str(uuid.uuid4()), "Content-Type": "application/json"}
        if project:
            self._headers["X-Project-Id"] = project

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `zaqar://CLOUD[?region_name=&interface=]` or `zaqar://?endpoint=URL&project=NAME`.

        Nothing is asked of the service yet. Raises ConfigError for any other URL or an unknown cloud, CredentialsError
        where the cloud's credentials are incomplete.
        """
        cloud, options = _parse(url)
        address = f"zaqar://{quote(cloud)}" + (f"?{urlencode(sorted(options.items()), safe='/:')}" if options else "")
        if endpoint := options.get("endpoint"):
            session = Session(auth=NoAuth(endpoint=endpoint))
            connection = Connection(session=session, message_endpoint_override=endpoint)
            return cls(connection, address, project=options["project"])
        try:
            return cls(Connection(cloud=cloud, **options), address)
        except Exception as error:  # what reads clouds.yaml lets through the errors of files and YAML too
            kind, advice = next((row[1:] for row in ERRORS if isinstance(error, row[0])), (ConfigError, ""))
            raise kind(f"{address}: {said_of(error)}{advice}") from error

    @property
    def credentials(self) -> str:
        if not (cloud := urlsplit(self.address).netloc):
            return "none: a Zaqar without Keystone"
        return f"those of {unquote(cloud)} in {OpenStackConfig().config_filename}"

    def exists(self, queue: str) -> bool:
        """Say whether the queue is listed: API v2 answers everything else as if it were."""
        self.limits.check_queue(queue)
        # No name lies between the marker and the queue's own.
        first = self._queue_after(queue, f"{queue[:-1]}{chr(ord(queue[-1]) - 1)}~")
        if first is None or first >= queue:
            return first == queue
        # The Redis driver starts at the first queue of all where it does not know the marker.
        return self._queue_after(queue, queue) != first

    def _queue_after(self, queue: str, marker: str) -> str | None:
        """The first queue of the project behind the marker."""
        what, query = f"look for {queue} at {self.address}", {"limit": 1, "marker": marker}
        _, found = self._send(what, "GET", "/queues", {}, params=query)
        with self._reading("look for", queue):
            return next((str(each["name"]) for each in found["queues"]), None)

    def purge(self, queue: str) -> None:
        """As the contract says, in one request but for what is claimed."""
        self._ask("purge", queue, "POST", "purge", data='{"resource_types":["messages"]}')
        super().purge(queue)

    def stats(self, queue: str) -> Stats:
        """As the contract says; where the queue has a default delay, delayed messages count as free."""
        found = super().stats(queue)
        if not found.total and not self.exists(queue):
            raise QueueNotFound(f"count {queue} at {self.address}: it does not exist: create it with --create")
        return found

    def inspect(self, queue: str) -> list[str]:
        """Look for what moves or hides messages behind our back: metadata of the queue, and the server's driver."""
        _, metadata = self._ask("read", queue, "GET")
        with self._reading("read", queue):
            receives, letters = metadata.get("_max_claim_count"), metadata.get("_dead_letter_queue")
            delay = metadata.get("_default_message_delay")
        found = []
        if receives and letters:
            found.append(
                f"has a receive limit of the service's own: after {receives} claims a message moves to {letters},"
                " in an outage too (_max_claim_count, _dead_letter_queue)"
            )
        if delay:
            found.append(f"hides each message for its first {delay} seconds, and counts it as free meanwhile")
        if self._delete_one(queue, NO_MESSAGE, claim_id="none"):  # only the MongoDB driver looks at the claim first
            found.append(
                "is not kept by Zaqar's MongoDB driver: the Redis driver's claims of several messages also take what"
                " others hold, and cannot be released then: use --claim-limit 1"  # XR1, XR5
            )
        return found

    def close(self) -> None:
        self.stop_waiting()
        self._connection.close()
        self._connection.session.session.close()

    def _send(self, what: str, method: str, path: str, instead: Refusals, **options: Any) -> Answer:
        self.requests[what.partition(" ")[0]] += 1
        try:
            answer = self._request(path, method, options)
            if answer.status_code == requests.codes.unauthorized:
                # keystoneauth renews a token that has run out, but not for a thread that meets it while another does.
                answer = self._request(path, method, options)
        except SDK_ERRORS as error:
            # keystoneauth made its error of one of requests.
            raise translated(error, what, ERRORS, error.__context__) from error
        found, status = content(answer), answer.status_code
        if status < requests.codes.multiple_choices:
            return answer, found
        said = reason(found)
        if "claim" not in said.lower():  # then no claim is lost
            instead = {code: row for code, row in instead.items() if row[0] is not ClaimLost}
        wait_s = parse_retry_after(answer.headers.get("Retry-After"))
        raise self._refused(what, status, f"HTTP {status} {said}", wait_s, instead)

    def _request(self, path: str, method: str, options: dict[str, Any]) -> requests.Response:
        # Past the message proxy's own request(), which warns of its own deprecations at every call (4.22).
        return Adapter.request(
            self._connection.message,
            path,
            method,
            headers=self._headers,
            raise_exc=False,
            redirect=False,
            connect_retries=0,
            status_code_retries=0,
            **options,
        )

    def _page(self, queue: str, after: str, limit: int, claimed: bool, **more: str) -> Page:
        """One request's worth; the delayed with the claimed."""
        # The Redis driver's markers are the messages' ids; it begins with the marker's own message where that is the
        # first (XR9), and answers include_claimed without a marker with 503 (XR8). -1 is before all on both drivers.
        after_id = bool(after) and not after.isdecimal()
        marker, asked = after or ("-1" if claimed else ""), min(PAGE, limit + after_id)
        page = super()._page(queue, marker, asked, claimed, include_delayed=str(claimed).lower(), **more)
        messages = tuple(message for message in page.messages if message.id != after)[:limit]
        if not messages:
            return Page((), after)
        return Page(messages, page.marker if page.marker.isdecimal() else messages[-1].id)

    def _last(self, queue: str, marker: str) -> str:
        """As the counts name it: the Redis driver's markers are the messages' ids."""
        _, found = self._ask("count", queue, "GET", "stats")
        with self._reading("count", queue):
            return last_part(found["messages"]["newest"]["href"])

    def _bulk_query(self, ids: Sequence[str], claim_ids: Collection[str]) -> dict[str, str]:
        """With the claims, for servers that ask for them (`message_delete_with_claim_id`); others ignore them."""
        return {**super()._bulk_query(ids, claim_ids), "claim_ids": ",".join(claim_ids)}

    def _life(self, message: Message, claim_ttl: int, grace: int) -> int:
        """API v2 shows claim TTL plus grace for a message that lives on."""
        shown = message.ttl or 0
        return shown + int(message.age) if shown == claim_ttl + grace else shown


def _parse(url: str) -> tuple[str, dict[str, Any]]:
    """The cloud's name or "", and the options. The errors do not show the URL: it may hold a secret."""
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        endpoint = urlsplit(options.get("endpoint", ""))
    except ValueError:
        raise ConfigError(f"the queue URL cannot be read: {USAGE}") from None
    cloud = unquote(parts.netloc)
    if set("@:") & set(parts.netloc) or "@" in endpoint.netloc:
        raise ConfigError(f"the queue URL names a user or a port, and may hold a secret: {USAGE}")
    allowed = ("region_name", "interface") if cloud else ("endpoint", "project")
    if unknown := sorted(set(options) - set(allowed)):
        names = ", ".join(re.sub("[^A-Za-z0-9_-]", "?", name)[:40] for name in unknown)
        raise ConfigError(f"the queue URL has options that are not taken there ({names}); secrets never are: {USAGE}")
    if not cloud and not (endpoint.scheme in ("http", "https") and endpoint.netloc and options.get("project")):
        raise ConfigError(f"the queue URL names no cloud, or lacks the endpoint or project: {USAGE}")
    if parts.path.strip("/") or parts.fragment:
        raise ConfigError(f"the queue URL has a path: {USAGE}")
    return cloud, options
