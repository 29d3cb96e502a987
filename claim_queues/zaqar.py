"""OpenStack Zaqar, API v2; openstacksdk signs in, finds the service and keeps the connections.

Its message resource is left alone: seen in 4.22, create_claim fails after it claimed, with a limit that the server
ignores, and update_claim takes every refusal for success. What looks odd below follows from what Zaqar 23.0.1 was seen
to do on its MongoDB and its Redis driver; XR1 to XR18 are defects of the latter.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Self, TypeVar, cast
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

import requests
from keystoneauth1 import exceptions as auth
from keystoneauth1.adapter import Adapter
from keystoneauth1.noauth import NoAuth
from keystoneauth1.session import Session
from openstack import exceptions as sdk
from openstack.connection import Connection
from urllib3.exceptions import MaxRetryError

from .base import JSON, Claim, Limits, Message, Page, Queues, Range, Settled, Settlement, Stats, decode
from .errors import (
    ClaimLost,
    ConfigError,
    CredentialsError,
    MessageRefused,
    PostIncomplete,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    QueuesError,
    QueueUnavailable,
)

LONGEST_TTL_S = 1_209_600
REQUEST_BYTES = 262_144
"""Of a whole POST, one byte more is HTTP 400 (`max_messages_post_size`)."""
LIMITS = Limits(
    service="OpenStack Zaqar",
    claim_ttl=Range(60, 43_200),
    grace=Range(60, 43_200),
    message_ttl=Range(60, LONGEST_TTL_S),
    keeps_for_ever=False,
    claim_limit=20,  # a 21st is HTTP 400 (`max_messages_per_claim_or_pop`)
    post_batch=100,  # the server counts bytes only
    message_bytes=REQUEST_BYTES - len('{"messages":[{"ttl":1209600,"body":}]}'),
    can_browse=True,
    counts_receives=False,
    fenced_delete=True,
    atomic_settle=False,
    releases_one_message=False,
    release_delay=0,
    settle_linger=0.1,
)
PAGE = 20
"""Most messages of a list, and most ids of a bulk delete (`max_messages_per_page`)."""
TIMEOUTS_S = (5, 30)
"""To connect, and to read; openstacksdk sets none."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Between looks of a wait: API v2 has no long poll."""
NO_MESSAGE = "0" * 24
USAGE = "write zaqar://CLOUD, a name in clouds.yaml, or zaqar://?endpoint=URL&project=NAME for a Zaqar without Keystone"

T = TypeVar("T")
Refusals = dict[int, tuple[type[QueuesError], str]]


class _AnswerLost(QueueUnavailable):
    """The request was sent, and nobody knows what the service did."""


ERRORS: tuple[tuple[tuple[type[Exception], ...], type[QueuesError], str], ...] = (
    ((auth.Unauthorized, auth.Forbidden), CredentialsError, "; see the cloud's `auth` in clouds.yaml"),
    (
        (auth.ConnectionError, auth.RetriableConnectionFailure, auth.HttpServerError, auth.TooManyRequests),
        QueueUnavailable,
        "",
    ),
    ((auth.RequestTimeout, auth.InvalidResponse), QueueUnavailable, ""),
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

REFUSALS: Refusals = {
    400: (ConfigError, "; the server has other limits, or needs a project"),
    401: (CredentialsError, "; the service does not take the token of a fresh sign-in"),
    403: (QueueForbidden, "; ask the project's owner for that right"),
    404: (QueueNotFound, "; the queue does not exist: create it with --create"),
    408: (QueueUnavailable, ""),
    429: (QueueUnavailable, ""),
    500: (_AnswerLost, ""),
    502: (_AnswerLost, ""),
    503: (QueueUnavailable, ""),
    504: (_AnswerLost, ""),
}
"""What becomes of each HTTP status that an operation does not expect; any other is a plain QueueError."""
REFUSED_AT_POST: Refusals = {400: (MessageRefused, ""), 413: (MessageRefused, "")}
LOST_AT_RENEWAL: Refusals = {404: (ClaimLost, "; the claim lapsed or was released")}
LOST_AT_DELETE: Refusals = {400: (ClaimLost, ""), 403: (ClaimLost, "")}
"""400: the claim is over. 403: another holds the message. Only where the answer speaks of a claim."""


class ZaqarQueues(Queues):
    """Queues of one project. connection: closed with it. project: needed where the server has no Keystone."""

    limits = LIMITS

    def __init__(self, connection: Connection, address: str, *, project: str | None = None) -> None:
        self.address = address
        self._connection = connection
        connection.session.timeout = connection.session.timeout or cast(Any, TIMEOUTS_S)
        self._headers = {"Client-ID": str(uuid.uuid4()), "Content-Type": "application/json"}
        if project:
            self._headers["X-Project-Id"] = project
        self._stopped = threading.Event()

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
            raise kind(f"{address}: {error}{advice}") from error

    def create(self, queue: str) -> None:
        self._ask("create", queue, "PUT")

    def exists(self, queue: str) -> bool:
        """Say whether the queue is listed: API v2 answers everything else as if it were."""
        self.limits.check_queue(queue)
        # No name lies between the marker and the queue's own.
        first = self._queue_after(queue, f"{queue[:-1]}{chr(ord(queue[-1]) - 1)}~")
        if first is None or first >= queue:
            return first == queue
        # The Redis driver starts at the first queue of all where it does not know the marker.
        return self._queue_after(queue, queue) != first

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        """As the contract says; a missing queue is created, as API v2 does."""
        self.limits.check_queue(queue)
        self.limits.check_message_ttl(ttl)
        documents = [self._document(body, ttl) for body in bodies]
        accepted: list[str] = []
        try:
            self._post_all(queue, documents, accepted)
        except QueuesError as error:
            done = len(accepted)
            unknown = len(_batch(documents[done:])) if isinstance(error, _AnswerLost) else 0
            if not done and not unknown:
                raise
            raise PostIncomplete(
                f"{error}; {done:,} of {len(bodies):,} were accepted",
                accepted=dict(enumerate(accepted)),
                refused={index: str(error) for index in range(done + unknown, len(bodies))},
                unknown=range(done, done + unknown),
            ) from error
        return accepted

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        """As the contract says. A missing queue looks empty to API v2: ask exists()."""
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        return self._poll(lambda: self._claim(queue, ttl, grace, limit), bool, wait)

    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        self.limits.check_claim(ttl=ttl, grace=claim.grace, limit=1)
        body = json.dumps({"ttl": ttl, "grace": claim.grace})  # one left out becomes the server's default
        self._ask("renew a claim on", claim.queue, "PATCH", f"claims/{_part(claim.id)}", LOST_AT_RENEWAL, data=body)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        refused: dict[str, MessageRefused] = {}
        posts: dict[str, list[tuple[str, str]]] = {}
        for settlement in settlements:
            for post in settlement.posts:
                self.limits.check_queue(post.queue)
                self.limits.check_message_ttl(post.ttl)
            try:
                documents = [(post.queue, self._document(post.body, post.ttl)) for post in settlement.posts]
            except MessageRefused as error:
                refused[settlement.message.id] = error
                continue
            for queue, document in documents:
                posts.setdefault(queue, []).append((settlement.message.id, document))
        for queue, found in posts.items():
            refused |= self._post_outcomes(queue, found)
        kept = [settlement for settlement in settlements if settlement.message.id not in refused]
        self._delete_unfenced(claim.queue, [each.message.id for each in kept if not each.fenced], {claim.id})
        lost = {
            each.message.id
            for each in kept
            if each.fenced and not self._delete_one(claim.queue, each.message.id, claim.id)
        }
        return Settled(frozenset(each.message.id for each in kept) - lost, frozenset(lost), refused)

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        self.limits.check_release(delay=delay)
        if messages is not None and {message.id for message in messages} != {held.id for held in claim.messages}:
            raise ConfigError(f"{self.limits.service} releases only whole claims")
        self._ask("release a claim on", claim.queue, "DELETE", f"claims/{_part(claim.id)}")

    def browse(self, queue: str, *, after: str = "", limit: int = 20, claimed: bool = False, wait: float = 0) -> Page:
        """As the contract says, at most 20 at a time. A missing queue looks empty to API v2: ask exists()."""
        return self._poll(lambda: self._page(queue, after, limit, claimed), lambda page: bool(page.messages), wait)

    def end_marker(self, queue: str) -> str:
        """As the contract says, without reading the queue: by a search where markers are numbers (MongoDB driver)."""
        if not (marker := self._page(queue, "", 1, claimed=True).marker):
            return ""
        if not marker.isdecimal():
            return self._stats(queue, lambda counts: _last_part(counts["newest"]["href"]))
        return str(self._last_number(queue, int(marker)))

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        """As the contract says, a request each: the bulk delete removes claimed messages too."""
        self.limits.check_queue(queue)
        for id_ in filter(None, ids):
            self._delete_one(queue, id_)

    def purge(self, queue: str) -> None:
        self._ask("purge", queue, "POST", "purge", data='{"resource_types":["messages"]}')
        page = self._page(queue, "", PAGE, claimed=True)
        while page.messages:  # the purge leaves what is claimed
            handles = {message.handle for message in page.messages if message.handle}
            self._delete_unfenced(queue, [message.id for message in page.messages], handles)
            page = self._page(queue, page.marker, PAGE, claimed=True)

    def stats(self, queue: str) -> Stats:
        """As the contract says; where the queue has a default delay, delayed messages count as free."""

        def read(counts: Any) -> Stats:
            age = float(counts["oldest"]["age"]) if "oldest" in counts else None
            return Stats(int(counts["free"]), int(counts["claimed"]), 0, age)

        found = self._stats(queue, read)
        if not found.total and not self.exists(queue):
            raise QueueNotFound(f"count {queue} at {self.address}: it does not exist: create it with --create")
        return found

    def inspect(self, queue: str) -> list[str]:
        """Look for what moves or hides messages behind our back: metadata of the queue, and the server's driver."""
        answer = self._ask("read", queue, "GET")
        with self._reading("read", queue):
            receives, letters, delay = map(
                json.loads(answer.text).get, ("_max_claim_count", "_dead_letter_queue", "_default_message_delay")
            )
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

    def stop_waiting(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.stop_waiting()
        self._connection.close()
        self._connection.session.session.close()

    def _ask(
        self, doing: str, queue: str, method: str, path: str = "", instead: Refusals | None = None, **options: Any
    ) -> requests.Response:
        """Send a request that concerns a queue; a refusal becomes an error, by `instead` or else by REFUSALS."""
        self.limits.check_queue(queue)
        url = f"/queues/{queue}/{path}".rstrip("/")
        return self._send(f"{doing} {queue} at {self.address}", method, url, REFUSALS | (instead or {}), **options)

    def _send(self, what: str, method: str, url: str, refusals: Refusals, **options: Any) -> requests.Response:
        try:
            # Past the message proxy's own request(), which warns of its own deprecations at every call (4.22).
            answer = Adapter.request(
                self._connection.message,
                url,
                method,
                headers=self._headers,
                raise_exc=False,
                redirect=False,
                connect_retries=0,
                status_code_retries=0,
                **options,
            )
        except SDK_ERRORS as error:
            raise _translated(error, what) from error
        if answer.status_code < requests.codes.multiple_choices:
            return answer
        said = _description(answer)
        kind, advice = refusals.get(answer.status_code, (QueueError, "; is that a Zaqar with API v2?"))
        if kind is ClaimLost and "claim" not in said.lower():
            kind, advice = REFUSALS[answer.status_code]
        message = f"{what}: HTTP {answer.status_code} {said}{advice}"
        if issubclass(kind, QueueUnavailable):
            raise kind(message, retry_after_s=_seconds(answer.headers.get("Retry-After")))
        raise kind(message)

    @contextmanager
    def _reading(self, doing: str, queue: str) -> Iterator[None]:
        """Around the reading of an answer; one of another shape (a proxy's page) is no answer."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise _AnswerLost(f"{doing} {queue} at {self.address}: the answer is none of Zaqar's") from error

    def _poll(self, look: Callable[[], T], is_found: Callable[[T], bool], wait: float) -> T:
        deadline, pause = time.monotonic() + wait, FIRST_PAUSE_S
        while True:
            found, left = look(), deadline - time.monotonic()
            if is_found(found) or left <= 0 or self._stopped.wait(min(pause, left)):
                return found
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _queue_after(self, queue: str, marker: str) -> str | None:
        """The first queue of the project behind the marker."""
        what = f"look for {queue} at {self.address}"
        answer = self._send(what, "GET", f"/queues?{urlencode({'limit': 1, 'marker': marker})}", REFUSALS)
        with self._reading("look for", queue):
            return next((str(found["name"]) for found in json.loads(answer.text)["queues"]), None)

    def _document(self, body: JSON, ttl: int | None) -> str:
        return f'{{"ttl":{ttl or LONGEST_TTL_S},"body":{self.limits.encode(body)}}}'

    def _post_all(self, queue: str, documents: Sequence[str], accepted: list[str]) -> None:
        """Post them in order; the ids go into `accepted` as they come, so that an error leaves them there."""
        while batch := _batch(documents[len(accepted) :]):
            try:
                accepted += self._post(queue, batch)
            except _AnswerLost:  # once more: a repeat is harmless, a loss is not
                with suppress(QueuesError):
                    accepted += self._post(queue, batch)
                    continue
                raise

    def _post(self, queue: str, batch: Sequence[str]) -> list[str]:
        """All of the batch is stored, or nothing of it."""
        data = f'{{"messages":[{",".join(batch)}]}}'
        answer = self._ask("post to", queue, "POST", "messages", REFUSED_AT_POST, data=data)
        with self._reading("post to", queue):
            ids = [_last_part(path) for path in json.loads(answer.text)["resources"]]
            if len(ids) != len(batch):
                raise ValueError
        return ids

    def _post_outcomes(self, queue: str, posts: Sequence[tuple[str, str]]) -> dict[str, MessageRefused]:
        """Post documents by their message's id; where a batch is refused, each alone, to find which it is."""
        accepted: list[str] = []
        refused = {}
        try:
            self._post_all(queue, [document for _, document in posts], accepted)
        except MessageRefused:
            for id_, document in posts[len(accepted) :]:
                try:
                    self._post_all(queue, [document], [])
                except MessageRefused as error:
                    refused[id_] = error
        return refused

    def _delete_unfenced(self, queue: str, ids: Sequence[str], claim_ids: Collection[str]) -> None:
        """In bulk. claim_ids: for servers that ask for them (`message_delete_with_claim_id`); others ignore them."""
        for some in (ids[start : start + PAGE] for start in range(0, len(ids), PAGE)):
            query = urlencode({"ids": ",".join(some), "claim_ids": ",".join(claim_ids)}, safe=",")
            self._ask("delete from", queue, "DELETE", f"messages?{query}")

    def _delete_one(self, queue: str, id_: str, claim_id: str | None = None) -> bool:
        """Say whether it is gone. The MongoDB driver lets a lapsed claim delete what nobody has claimed since."""
        query = "" if claim_id is None else f"?{urlencode({'claim_id': claim_id})}"
        try:
            self._ask("delete from", queue, "DELETE", f"messages/{_part(id_)}{query}", LOST_AT_DELETE)
        except ClaimLost:
            return False
        return True

    def _claim(self, queue: str, ttl: int, grace: int, limit: int) -> Claim | None:
        data = json.dumps({"ttl": ttl, "grace": grace})  # a limit would be ignored here
        answer = self._ask("claim from", queue, "POST", f"claims?limit={limit}", data=data)
        if answer.status_code == requests.codes.no_content:
            return None
        with self._reading("claim from", queue):
            messages = tuple(
                replace(message, ttl=_life(message, ttl, grace))
                for message in map(_message, json.loads(answer.text)["messages"])
            )
            return Claim(_last_part(answer.headers["Location"]), queue, messages, grace) if messages else None

    def _page(self, queue: str, after: str, limit: int, claimed: bool) -> Page:
        """One request's worth; our own messages too (echo), and the delayed with the claimed."""
        # The Redis driver's markers are the messages' ids; it begins with the marker's own message where that is the
        # first (XR9), and answers include_claimed without a marker with 503 (XR8). -1 is before all on both drivers.
        after_id = bool(after) and not after.isdecimal()
        query = {
            "marker": after or ("-1" if claimed else ""),
            "limit": min(PAGE, limit + after_id),
            "echo": "true",
            "include_claimed": str(claimed).lower(),
            "include_delayed": str(claimed).lower(),
        }
        answer = self._ask("browse", queue, "GET", f"messages?{urlencode(query)}")
        with self._reading("browse", queue):
            found = json.loads(answer.text)
            messages = tuple(m for m in map(_message, found["messages"]) if m.id != after)[:limit]
            onward = next((link["href"] for link in found["links"] if link["rel"] == "next"), None)
            marker = parse_qs(urlsplit(onward).query)["marker"][0] if onward else after
        if not messages:
            return Page((), after)
        return Page(messages, marker if marker.isdecimal() else messages[-1].id)

    def _last_number(self, queue: str, marker: int) -> int:
        """The newest message's marker, from that of the oldest: a search in O(log n) requests of one message."""

        def number_after(number: int) -> int | None:
            page = self._page(queue, str(number), 1, claimed=True)
            return int(page.marker) if page.messages else None

        step = 1
        while (found := number_after(marker + step - 1)) is not None:
            marker, step = found, 2 * step
        end = marker + step - 1
        while marker < end:
            middle = (marker + end) // 2
            if (found := number_after(middle)) is None:
                end = middle
            else:
                marker = found
        return marker

    def _stats(self, queue: str, read: Callable[[Any], T]) -> T:
        answer = self._ask("count", queue, "GET", "stats")
        with self._reading("count", queue):
            return read(json.loads(answer.text)["messages"])


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


def _translated(error: Exception, what: str) -> QueuesError:
    kind, advice = next(row[1:] for row in ERRORS if isinstance(error, row[0]))
    message = f"{what}: {error}{advice}"
    if kind is not QueueUnavailable:
        return kind(message)
    lost = _AnswerLost if _may_have_arrived(error.__context__) else QueueUnavailable
    return lost(message, retry_after_s=getattr(error, "retry_after", None) or None)


def _may_have_arrived(cause: BaseException | None) -> bool:
    """Whether requests' error, of which keystoneauth made its own, leaves open if the request arrived."""
    if isinstance(cause, requests.ReadTimeout | requests.exceptions.ChunkedEncodingError):
        return True
    # urllib3 wraps what fails before the request is sent, and TLS, in MaxRetryError.
    return type(cause) is requests.ConnectionError and not (cause.args and isinstance(cause.args[0], MaxRetryError))


def _batch(documents: Sequence[str]) -> list[str]:
    """As many of the first documents as one request takes."""
    size = len('{"messages":[]}') - len(",")
    batch = []
    for document in documents[: LIMITS.post_batch]:
        size += len(",") + len(document)
        if size > REQUEST_BYTES:
            break
        batch.append(document)
    return batch


def _message(entry: Any) -> Message:
    """A message of an answer. handle: the claim that the href names, held or lapsed."""
    # Dumped again: a body that holds NaN, which Zaqar stores, is given as text.
    body = decode(json.dumps(entry["body"]))
    claim = parse_qs(urlsplit(entry["href"]).query).get("claim_id", [""])[0]
    return Message(_last_part(entry["href"]), body, float(entry["age"]), int(entry["ttl"]), handle=claim)


def _life(message: Message, claim_ttl: int, grace: int) -> int:
    """The message's TTL once it is claimed.

    One that would end within the claim lives until `grace` after it, but Zaqar then shows claim TTL plus grace.
    """
    shown = message.ttl or 0
    return shown + int(message.age) if shown == claim_ttl + grace else shown


def _description(answer: requests.Response) -> str:
    """What the server says about a refusal, on one short line."""
    try:
        said = json.loads(answer.text)
        text = f"{said['title']}: {said['description']}"
    except (KeyError, TypeError, ValueError):
        text = answer.text
    return re.sub(r"\s+", " ", text).strip()[:300]


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after and re.fullmatch("[0-9]{1,6}", retry_after) else None


def _last_part(path: str) -> str:
    """The id at the end of a path. ValueError where there is none."""
    id_ = urlsplit(path).path.rsplit("/", 1)[-1]
    if not id_:
        raise ValueError(path)
    return unquote(id_)


def _part(id_: str) -> str:
    return quote(id_, safe="")
