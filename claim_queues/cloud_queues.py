"""Rackspace Cloud Queues, API v1, through pyrax; and any OpenStack Zaqar that still speaks API v1.

A claim on a missing queue, and a list of it, look empty to API v1: exists() tells. What looks odd below follows
from what Zaqar 18.0.0 and pyrax 1.10.0 were seen to do.
"""

import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Self, TypeVar
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

import requests
from requests import exceptions as http
from urllib3.exceptions import HTTPError, MaxRetryError

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
from .pyrax_client import AUTH_ENDPOINT, Client, Identity, QueueClient, api_key, configured_user, sdk

log = logging.getLogger(__name__)

MESSAGE_TTL = Range(60, 1_209_600)
REQUEST_BYTES = 262_144
"""Of a whole POST, one byte more is HTTP 400; docs.rackspace.com, Cloud Queues, Limits: 256 KB."""
LIMITS = Limits(
    service="Rackspace Cloud Queues",
    claim_ttl=Range(60, 43_200),
    grace=Range(60, 43_200),
    message_ttl=MESSAGE_TTL,
    keeps_for_ever=False,
    claim_limit=20,  # a 21st is HTTP 400
    post_batch=10,  # docs.rackspace.com, Messages operations; Zaqar itself takes more
    message_bytes=REQUEST_BYTES - len('[{"ttl":1209600,"body":}]'),
    can_browse=True,
    counts_receives=False,
    fenced_delete=True,
    atomic_settle=False,
    releases_one_message=False,
    release_delay=0,
    settle_linger=0.1,
)
PAGE = 20
"""Most messages of a list, and most ids of a bulk delete."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Between looks of a wait: API v1 has no long poll."""
MAYBE_STORED = frozenset({500, 502, 504})
"""Statuses of a server or gateway that may have stored a post before it failed."""

T = TypeVar("T")
ErrorMap = tuple[tuple[type[Exception] | tuple[type[Exception], ...], type[QueuesError], str], ...]


class _AnswerLost(QueueUnavailable):
    """The request was sent, and nobody knows what the service did."""


ERRORS: ErrorMap = (
    (
        (sdk.Unauthorized, sdk.AuthenticationFailed, sdk.AuthorizationFailure, sdk.NotAuthenticated),
        CredentialsError,
        "; the service does not take the token of a fresh sign-in: ask the account's owner for Cloud Queues",
    ),
    (sdk.BadRequest, ConfigError, "; the service has other limits, or the queue another name"),
    (sdk.Forbidden, QueueForbidden, "; ask the account's owner for that right"),
    (sdk.NotFound, QueueNotFound, "; the queue does not exist: create it with --create"),
    (sdk.HTTPNotImplemented, QueueError, "; is that Cloud Queues, API v1?"),
    ((sdk.ClientException, sdk.InternalServerError), QueueUnavailable, ""),
    (sdk.PyraxException, ConfigError, ""),
    (
        (http.InvalidURL, http.MissingSchema, http.InvalidSchema, http.InvalidProxyURL, http.InvalidHeader),
        ConfigError,
        "; see identity= of the queue URL, and the environment's proxies",
    ),
    ((http.RequestException, HTTPError, ConnectionError, TimeoutError), QueueUnavailable, ""),
    (OSError, ConfigError, "; see REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE"),
)
"""What becomes of each error of pyrax, and of requests under it; most specific first."""
LOST_AT_DELETE: ErrorMap = (((sdk.BadRequest, sdk.Forbidden), ClaimLost, ""),)
"""400: the claim is over. 403: another holds the message."""
LOST_AT_RENEWAL: ErrorMap = ((sdk.NotFound, ClaimLost, "; the claim lapsed or was released"),)
REFUSED_AT_POST: ErrorMap = ((sdk.BadRequest, MessageRefused, ""),)


class CloudQueues(Queues):
    """Queues of one account in one region. client: sends the requests, over `session`, which is closed with it."""

    limits = LIMITS

    def __init__(self, client: QueueClient, address: str, session: requests.Session) -> None:
        self.address = address
        self._client = client
        self._session = session
        self._stopped = threading.Event()

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
        session = requests.Session()
        session.auth = lambda request: request  # or requests takes a password for the host from ~/.netrc
        identity = Identity(user, api_key(user), endpoint, session)
        address = f"rackspace://{quote(user)}@{region}"
        if identity.auth_endpoint != AUTH_ENDPOINT:
            address += f"?identity={identity.auth_endpoint}"
        return cls(Client(identity, region, session), address, session)

    def create(self, queue: str) -> None:
        self.limits.check_queue(queue)
        self._ask(f"create {queue}", self._client.method_put, f"/queues/{queue}")

    def exists(self, queue: str) -> bool:
        self.limits.check_queue(queue)
        return bool(self._ask(f"look for {queue}", self._client.queue_exists, queue))

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
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
        """A missing queue looks empty to API v1: ask exists()."""
        self.limits.check_queue(queue)
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        return self._poll(lambda: self._claim(queue, ttl, grace, limit), bool, wait)

    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        self.limits.check_claim(ttl=ttl, grace=claim.grace, limit=1)
        self._ask(
            f"renew claim {claim.id} on {claim.queue}",
            self._client.method_patch,
            f"/queues/{claim.queue}/claims/{quote(claim.id, safe='')}",
            LOST_AT_RENEWAL,
            data=json.dumps({"ttl": ttl, "grace": claim.grace}),
        )

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        refused: dict[str, MessageRefused] = {}
        posts: dict[str, list[tuple[str, str]]] = {}
        for settlement in settlements:
            documents = []
            for post in settlement.posts:
                self.limits.check_queue(post.queue)
                self.limits.check_message_ttl(post.ttl)
            try:
                documents = [(post.queue, self._document(post.body, post.ttl)) for post in settlement.posts]
            except MessageRefused as error:
                refused[settlement.message.id] = error
            for queue, document in documents:
                posts.setdefault(queue, []).append((settlement.message.id, document))
        for queue, found in posts.items():
            refused |= self._post_outcomes(queue, found)
        kept = [settlement for settlement in settlements if settlement.message.id not in refused]
        self._delete_unfenced(claim.queue, [each.message.id for each in kept if not each.fenced])
        lost = {each.message.id for each in kept if each.fenced and not self._delete_fenced(claim, each.message)}
        return Settled(frozenset(each.message.id for each in kept) - lost, frozenset(lost), refused)

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        self.limits.check_release(delay=delay)
        if messages is not None and {message.id for message in messages} != {held.id for held in claim.messages}:
            raise ConfigError(f"{self.limits.service} releases only whole claims")
        path = f"/queues/{claim.queue}/claims/{quote(claim.id, safe='')}"
        self._ask(f"release claim {claim.id} on {claim.queue}", self._client.method_delete, path)

    def browse(self, queue: str, *, after: str = "", limit: int = 20, claimed: bool = False, wait: float = 0) -> Page:
        """A missing queue looks empty to API v1: ask exists()."""
        self.limits.check_queue(queue)
        return self._poll(lambda: self._browse(queue, after, limit, claimed), lambda page: bool(page.messages), wait)

    def end_marker(self, queue: str) -> str:
        """Found without reading the queue where markers are numbers, as Rackspace's are."""
        if not (total := self.stats(queue).total):
            return ""
        marker = self._page(queue, "", 1, claimed=True).marker
        if marker.isdecimal():
            return str(self._last_number(queue, int(marker), total))
        while (page := self._page(queue, marker, PAGE, claimed=True)).messages:
            marker = page.marker
        return marker

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        """A request each: the bulk delete removes claimed messages too."""
        self.limits.check_queue(queue)
        for id_ in ids:
            if re.fullmatch("[A-Za-z0-9_-]+", id_):
                with suppress(ClaimLost):
                    path = f"/queues/{queue}/messages/{id_}"
                    self._ask(f"delete {id_} from {queue}", self._client.method_delete, path, LOST_AT_DELETE)

    def purge(self, queue: str) -> None:
        """The queue is not deleted and made anew: its markers would begin anew too."""
        self.stats(queue)  # or a missing queue would look empty
        page = self._page(queue, "", PAGE, claimed=True)
        while page.messages:
            self._delete_unfenced(queue, [message.id for message in page.messages])
            page = self._page(queue, page.marker, PAGE, claimed=True)

    def stats(self, queue: str) -> Stats:
        self.limits.check_queue(queue)
        doing = f"count {queue}"
        _, found = self._ask(doing, self._client.method_get, f"/queues/{queue}/stats")
        with self._reading(doing):
            counts = found["messages"]
            age = float(counts["oldest"]["age"]) if "oldest" in counts else None
            return Stats(int(counts["free"]), int(counts["claimed"]), 0, age)

    def stop_waiting(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.stop_waiting()
        self._session.close()

    def _ask(self, doing: str, call: Callable[..., T], path: str, instead: ErrorMap = (), **options: Any) -> T:
        """Call pyrax; its errors become ours, by `instead` or else by ERRORS."""
        try:
            return call(path, **options)
        except (sdk.PyraxException, OSError, HTTPError) as error:
            ours, advice = next(row[1:] for row in (*instead, *ERRORS) if isinstance(error, row[0]))
            message = f"{doing} at {self.address}: {error}{advice}"
            if ours is not QueueUnavailable:
                raise ours(message) from error
            unavailable = _AnswerLost if _may_be_stored(error) else QueueUnavailable
            raise unavailable(message, retry_after_s=getattr(error, "retry_after_s", None)) from error

    @contextmanager
    def _reading(self, doing: str) -> Iterator[None]:
        """Around the reading of an answer; one of another shape (a proxy's page) is no answer."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise _AnswerLost(f"{doing} at {self.address}: the answer is none of Cloud Queues") from error

    def _poll(self, look: Callable[[], T], is_found: Callable[[T], bool], wait: float) -> T:
        deadline, pause = time.monotonic() + wait, FIRST_PAUSE_S
        while True:
            found, left = look(), deadline - time.monotonic()
            if is_found(found) or left <= 0 or self._stopped.wait(min(pause, left)):
                return found
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _document(self, body: JSON, ttl: int | None) -> str:
        return f'{{"ttl":{ttl or MESSAGE_TTL.high},"body":{self.limits.encode(body)}}}'

    def _post_all(self, queue: str, documents: Sequence[str], accepted: list[str]) -> None:
        """Post them in order; the ids go into `accepted` as they come, so that an error leaves them there."""
        while len(accepted) < len(documents):
            batch = _batch(documents[len(accepted) : len(accepted) + self.limits.post_batch])
            try:
                accepted += self._post(queue, batch)
            except _AnswerLost:  # once more: a repeat is harmless, a loss is not
                with suppress(QueuesError):
                    accepted += self._post(queue, batch)
                    continue
                raise

    def _post(self, queue: str, batch: Sequence[str]) -> list[str]:
        """The ids of those that were accepted: the first few of the batch where the answer says `partial`."""
        doing = f"post to {queue}"
        data = f"[{','.join(batch)}]"
        _, found = self._ask(doing, self._client.method_post, f"/queues/{queue}/messages", REFUSED_AT_POST, data=data)
        with self._reading(doing):
            ids = [_last_part(path) for path in found["resources"]]
            if not 0 < len(ids) <= len(batch):
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

    def _delete_unfenced(self, queue: str, ids: Sequence[str]) -> None:
        for some in (ids[start : start + PAGE] for start in range(0, len(ids), PAGE)):
            path = f"/queues/{queue}/messages?ids={','.join(some)}"  # an encoded comma would not part them
            self._ask(f"delete from {queue}", self._client.method_delete, path)

    def _delete_fenced(self, claim: Claim, message: Message) -> bool:
        """Say whether it is deleted. What nobody has claimed since the claim lapsed, the service deletes too."""
        path = f"/queues/{claim.queue}/messages/{message.id}"
        doing, params = f"delete {message.id} from {claim.queue}", {"claim_id": claim.id}
        try:
            self._ask(doing, self._client.method_delete, path, LOST_AT_DELETE, params=params)
        except ClaimLost:
            return False
        return True

    def _claim(self, queue: str, ttl: int, grace: int, limit: int) -> Claim | None:
        doing = f"claim from {queue}"
        data = json.dumps({"ttl": ttl, "grace": grace})
        path = f"/queues/{queue}/claims"
        # pyrax's own claim reads the claim back with a second request: where that fails, the claim is lost.
        answer, found = self._ask(doing, self._client.method_post, path, params={"limit": limit}, data=data)
        if answer.status_code == requests.codes.no_content:
            return None
        with self._reading(doing):
            id_ = _last_part(answer.headers["Location"])
            messages = tuple(replace(message, ttl=_life(message, ttl, grace)) for message in _messages(found))
        return Claim(id_, queue, messages, grace) if messages else None

    def _browse(self, queue: str, after: str, limit: int, claimed: bool) -> Page:
        messages: tuple[Message, ...] = ()
        while asked := min(PAGE, limit - len(messages)):
            page = self._page(queue, after, asked, claimed=claimed)
            messages, after = messages + page.messages, page.marker
            if len(page.messages) < asked:
                break
        return Page(messages, after)

    def _page(self, queue: str, after: str, limit: int, *, claimed: bool) -> Page:
        """One request's worth. Messages of our own are shown too (echo)."""
        doing = f"browse {queue}"
        params = {"limit": limit, "echo": "true", "include_claimed": str(claimed).lower(), "marker": after or None}
        answer, found = self._ask(doing, self._client.method_get, f"/queues/{queue}/messages", params=params)
        if answer.status_code == requests.codes.no_content:
            return Page((), after)
        with self._reading(doing):
            (onward,) = (link["href"] for link in found["links"] if link["rel"] == "next")
            return Page(_messages(found["messages"]), parse_qs(urlsplit(onward).query)["marker"][0])

    def _last_number(self, queue: str, marker: int, total: int) -> int:
        """The newest message's marker, from that of the oldest: a search in O(log n) requests of one message."""

        def next_number(number: int) -> int | None:
            page = self._page(queue, str(number), 1, claimed=True)
            return int(page.marker) if page.messages else None

        # Without gaps the second newest is total - 2 behind the oldest; from there in growing steps.
        for step in itertools.chain([max(0, total - 2)], (2**n - 1 for n in itertools.count())):
            if (found := next_number(marker + step)) is None:
                break
            marker = found
        end = marker + step
        while marker < end:
            middle = (marker + end) // 2
            if (found := next_number(middle)) is None:
                end = middle
            else:
                marker = found
        return marker


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


def _may_be_stored(error: Exception) -> bool:
    """Whether the service may have done what it was asked: nothing says that it did not."""
    if isinstance(error, sdk.ClientException):
        return error.code in MAYBE_STORED
    # urllib3 wraps in MaxRetryError what fails before the request is sent: to find the host, to connect, TLS.
    return not (error.args and isinstance(error.args[0], MaxRetryError))


def _batch(documents: Sequence[str]) -> list[str]:
    """As many of the first documents as one request takes."""
    size = 1
    batch = []
    for document in documents[: LIMITS.post_batch]:
        size += len(document) + 1
        if size > REQUEST_BYTES:
            break
        batch.append(document)
    return batch


def _messages(found: Any) -> tuple[Message, ...]:
    """The messages of an answer, each once; what is none is left out, and comes back when its claim ends."""
    if not isinstance(found, list):
        raise TypeError
    messages = {}
    for entry in found:
        try:
            # Dumped again: a body that holds NaN, which Zaqar stores, is given as text.
            body = decode(json.dumps(entry["body"]))
            message = Message(_last_part(entry["href"]), body, float(entry["age"]), int(entry["ttl"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("a message in an answer of Cloud Queues lacks %s: it is left out", error)
            continue
        messages[message.id] = message
    return tuple(messages.values())


def _life(message: Message, claim_ttl: int, grace: int) -> int:
    """The message's TTL once it is claimed; where the answer allows two, the longer.

    One that would end within the claim lives until `grace` after it, but Zaqar shows its TTL plus grace.
    """
    shown = message.ttl or 0
    if MESSAGE_TTL.low <= shown - grace < message.age + claim_ttl:
        return max(shown, int(message.age) + claim_ttl + grace)
    return shown


def _last_part(path: str) -> str:
    """The id at the end of a path; it says nothing else. ValueError where there is none."""
    id_ = urlsplit(path).path.rsplit("/", 1)[-1]
    if not id_:
        raise ValueError(path)
    return id_
