"""What API v1 and v2 of OpenStack Zaqar share, Rackspace Cloud Queues being the former: requests, bodies, markers.

A service's module adds its SDK and what its API does otherwise. A claim on a missing queue, and a list of it, look
empty to both APIs: exists() tells. What looks odd below follows from what Zaqar 18.0.0 and 23.0.1 were seen to do.
"""

import itertools
import json
import logging
import re
import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import requests
from urllib3.exceptions import HTTPError, MaxRetryError

from .base import (
    JSON,
    Claim,
    Limits,
    Message,
    Outgoing,
    Page,
    Queues,
    Range,
    Settled,
    Settlement,
    Stats,
    ahead_of,
    decode,
)
from .errors import (
    AnswerLost,
    ClaimLost,
    ConfigError,
    CredentialsError,
    MessageRefused,
    PostIncomplete,
    QueueForbidden,
    QueueNotFound,
    QueuesError,
    QueueUnavailable,
)

log = logging.getLogger(__name__)

MESSAGE_TTL = Range(60, 1_209_600)
REQUEST_BYTES = 262_144
"""Of a whole POST; one byte more is HTTP 400."""
PAGE = 20
"""Most messages of a list, and most ids of a bulk delete."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Between looks of a wait: neither API has a long poll. Claims have the second from their caller."""
LONGEST_REASON = 200

Outcome = tuple[type[QueuesError], str]
"""An error of ours, and advice to end its message with."""
Refusals = Mapping[int, Outcome]
"""What becomes of each HTTP status."""
ErrorMap = tuple[tuple[tuple[type[Exception], ...], type[QueuesError], str], ...]
"""What becomes of each error of an SDK; most specific first."""
Answer = tuple[requests.Response, Any]
"""An answer below HTTP status 300, and its content()."""


REFUSALS: Refusals = {
    400: (ConfigError, "; the service has other limits, or needs a project, or the queue another name"),
    401: (CredentialsError, "; the service does not take the token of a fresh sign-in"),
    403: (QueueForbidden, "; ask the owner of the account or project for that right"),
    404: (QueueNotFound, "; the queue does not exist: create it with --create"),
    408: (QueueUnavailable, ""),
    429: (QueueUnavailable, ""),
    500: (AnswerLost, ""),
    502: (AnswerLost, ""),
    503: (QueueUnavailable, ""),
    504: (AnswerLost, ""),
}
REFUSED_AT_POST: Refusals = {400: (MessageRefused, "")}
LOST_AT_RENEWAL: Refusals = {404: (ClaimLost, "; the claim lapsed or was released")}
LOST_AT_DELETE: Refusals = {400: (ClaimLost, ""), 403: (ClaimLost, "")}
"""400: the claim is over. 403: another holds the message."""


def limits_of(service: str, *, post_batch: int, around_a_body: str) -> Limits:
    """The limits of a service. around_a_body: what a request that posts one body holds besides it."""
    return Limits(
        service=service,
        claim_ttl=Range(60, 43_200),
        grace=Range(60, 43_200),
        message_ttl=MESSAGE_TTL,
        keeps_for_ever=False,
        claim_limit=20,  # a 21st is HTTP 400
        post_batch=post_batch,
        message_bytes=REQUEST_BYTES - len(around_a_body),
        can_browse=True,
        counts_receives=False,
        fenced_delete=True,
        atomic_settle=False,
        releases_one_message=False,
        release_delay=0,
        settle_linger=0.1,
    )


class ZaqarApi(Queues):
    """Queues of one service. What the APIs do in their own ways stands at the end of the class.

    refusals, other_refusals: what becomes of each HTTP status that an operation does not expect, and of all others.
    wraps_messages: whether the list of messages that a post sends and a claim gives is a member of an object.
    """

    refusals: ClassVar[Refusals]
    other_refusals: ClassVar[Outcome]
    wraps_messages: ClassVar[bool]

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests = Counter()
        self._stopped = threading.Event()
        self._next_looks: dict[str, tuple[float, float]] = {}  # by queue: when, and after which pause

    def create(self, queue: str) -> None:
        self._ask("create", queue, "PUT")

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        self.limits.check_queue(queue)
        self.limits.check_message_ttl(ttl)
        documents = [self._document(body, ttl) for body in bodies]
        accepted: list[str] = []
        try:
            self._post_all(queue, documents, accepted)
        except QueuesError as error:
            done = len(accepted)
            unknown = len(self._batch(documents[done:])) if isinstance(error, AnswerLost) else 0
            if not done and not unknown:
                raise
            raise PostIncomplete(
                f"{error}; {done:,} of {len(bodies):,} were accepted",
                accepted=dict(enumerate(accepted)),
                refused={index: str(error) for index in range(done + unknown, len(bodies))},
                unknown=range(done, done + unknown),
            ) from error
        return accepted

    def _document(self, body: JSON, ttl: int | None) -> str:
        return f'{{"ttl":{ttl or MESSAGE_TTL.high},"body":{self.limits.encode(body)}}}'

    def _post_all(self, queue: str, documents: Sequence[str], accepted: list[str]) -> None:
        """Post them in order; the ids go into `accepted` as they come, so that an error leaves them there."""
        while batch := self._batch(documents[len(accepted) :]):
            try:
                accepted += self._post(queue, batch)
            except AnswerLost:  # once more: a repeat is harmless, a loss is not
                with suppress(QueuesError):
                    accepted += self._post(queue, batch)
                    continue
                raise

    def _batch(self, documents: Sequence[str]) -> list[str]:
        """As many of the first documents as one request takes."""
        size = len(self._listed([])) - len(",")
        batch = []
        for document in documents[: self.limits.post_batch]:
            size += len(",") + len(document)
            if size > REQUEST_BYTES:
                break
            batch.append(document)
        return batch

    def _listed(self, documents: Sequence[str]) -> str:
        listed = f"[{','.join(documents)}]"
        return f'{{"messages":{listed}}}' if self.wraps_messages else listed

    def _post(self, queue: str, batch: Sequence[str]) -> list[str]:
        """The ids of those that were accepted: all, or the first few where the answer says `partial`."""
        _, found = self._ask("post to", queue, "POST", "messages", REFUSED_AT_POST, data=self._listed(batch))
        with self._reading("post to", queue):
            ids = [last_part(path) for path in found["resources"]]
            if not 0 < len(ids) <= len(batch):
                raise ValueError
        return ids

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        """As the contract says.

        After each look in vain the pause doubles, over successive claims too; its longest is `wait`.
        """
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        deadline = time.monotonic() + wait
        while True:
            look_at, pause = self._next_looks.get(queue, (0.0, 0.0))
            rest = min(look_at, deadline) - time.monotonic()
            if rest > 0 and not self._stopped.is_set() and self._stopped.wait(rest):
                return None
            if found := self._claim(queue, ttl, grace, limit):
                self._next_looks.pop(queue, None)
                return found
            now, pause = time.monotonic(), max(FIRST_PAUSE_S, min(2 * pause, wait))
            self._next_looks[queue] = now + pause, pause
            if self._stopped.is_set() or deadline - now < FIRST_PAUSE_S:
                return None

    def _claim(self, queue: str, ttl: int, grace: int, limit: int) -> Claim | None:
        terms = json.dumps({"ttl": ttl, "grace": grace})  # a limit would be ignored here
        answer, found = self._ask("claim from", queue, "POST", "claims", params={"limit": limit}, data=terms)
        if answer.status_code == requests.codes.no_content:
            return None
        with self._reading("claim from", queue):
            id_ = last_part(answer.headers["Location"])
            messages = _messages(found["messages"] if self.wraps_messages else found)
        held = tuple(message._replace(ttl=self._life(message, ttl, grace)) for message in messages)
        return Claim(id_, queue, held, grace) if held else None

    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        self.limits.check_claim(ttl=ttl, grace=claim.grace, limit=1)
        terms = json.dumps({"ttl": ttl, "grace": claim.grace})  # one left out becomes the server's default
        doing, path = f"renew claim {claim.id} on", f"claims/{_quoted(claim.id)}"
        self._ask(doing, claim.queue, "PATCH", path, LOST_AT_RENEWAL, data=terms)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        """When it is repeated after an error, what was posted before stays so and is not posted again."""
        refused: dict[str, MessageRefused] = {}
        outcomes: list[Outgoing] = []
        for post in [post for settlement in settlements for post in settlement.posts]:
            self.limits.check_queue(post.queue)
            self.limits.check_message_ttl(post.ttl)
        for id_, posts in ((settlement.message.id, settlement.posts) for settlement in settlements):
            documents = ((post.queue, self._document(post.body, post.ttl)) for post in posts)
            try:
                outcomes += [Outgoing(id_, place, *document) for place, document in enumerate(documents)]
            except MessageRefused as error:
                refused[id_] = error
        for queue in dict.fromkeys(outcome.queue for outcome in outcomes):
            wanted = [each for each in outcomes if each.queue == queue and each not in claim.posted]
            wanted = [each for each in wanted if each.message_id not in refused]
            refused |= self._post_outcomes(queue, wanted, claim.posted)
        kept = [settlement for settlement in settlements if settlement.message.id not in refused]
        self._delete_unfenced(claim.queue, [each.message.id for each in kept if not each.fenced], {claim.id})
        lost = {
            each.message.id
            for each in kept
            if each.fenced and not self._delete_one(claim.queue, each.message.id, claim.id)
        }
        return Settled(frozenset(each.message.id for each in kept) - lost, frozenset(lost), refused)

    def _post_outcomes(
        self, queue: str, outcomes: Sequence[Outgoing], posted: set[Outgoing]
    ) -> dict[str, MessageRefused]:
        """Post them and note so; where a batch is refused, each alone, to find which it is."""
        accepted: list[str] = []
        refused = {}
        try:
            self._post_all(queue, [each.text for each in outcomes], accepted)
        except MessageRefused:
            for outcome in outcomes[len(accepted) :]:
                try:
                    self._post_all(queue, [outcome.text], [])
                    posted.add(outcome)
                except MessageRefused as error:
                    refused[outcome.message_id] = error
        finally:
            posted.update(outcomes[: len(accepted)])
        return refused

    def _delete_unfenced(self, queue: str, ids: Sequence[str], claim_ids: Collection[str]) -> None:
        """In bulk; a claim on a message does not save it."""
        for some in (ids[start : start + PAGE] for start in range(0, len(ids), PAGE)):
            query = urlencode(self._bulk_query(some, claim_ids), safe=",")  # an encoded comma would not part them
            self._ask("delete from", queue, "DELETE", f"messages?{query}")

    def _delete_one(self, queue: str, id_: str, claim_id: str | None = None) -> bool:
        """Say whether it is gone. The MongoDB driver lets a lapsed claim delete what nobody has claimed since."""
        fence = {"params": {"claim_id": claim_id}} if claim_id else {}
        try:
            self._ask(f"delete {id_} from", queue, "DELETE", f"messages/{_quoted(id_)}", LOST_AT_DELETE, **fence)
        except ClaimLost:
            return False
        return True

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        self.limits.check_release(delay=delay)
        if messages is not None and {message.id for message in messages} != {held.id for held in claim.messages}:
            raise ConfigError(f"{self.limits.service} releases only whole claims")
        self._ask(f"release claim {claim.id} on", claim.queue, "DELETE", f"claims/{_quoted(claim.id)}")

    def browse(self, queue: str, *, after: str = "", limit: int = 20, claimed: bool = False, wait: float = 0) -> Page:
        deadline, pause = time.monotonic() + wait, FIRST_PAUSE_S
        while True:
            page, left = self._browse(queue, after, limit, claimed), deadline - time.monotonic()
            if page.messages or left <= 0 or self._stopped.wait(min(pause, left)):
                return page
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _browse(self, queue: str, after: str, limit: int, claimed: bool) -> Page:
        messages: tuple[Message, ...] = ()
        while asked := min(PAGE, limit - len(messages)):
            page = self._page(queue, after, asked, claimed)
            messages, after = messages + page.messages, page.marker
            if len(page.messages) < asked:
                break
        return Page(messages, after)

    def _page(self, queue: str, after: str, limit: int, claimed: bool, **more: str) -> Page:
        """One request's worth; our own messages too (echo). more: of the query."""
        query = {"marker": after or None, "limit": limit, "echo": "true", "include_claimed": str(claimed).lower()}
        answer, found = self._ask("browse", queue, "GET", "messages", params=query | more)
        if answer.status_code == requests.codes.no_content:
            return Page((), after)
        with self._reading("browse", queue):
            if not (messages := _messages(found["messages"])):
                return Page((), after)
            (onward,) = (link["href"] for link in found["links"] if link["rel"] == "next")
            return Page(messages, parse_qs(urlsplit(onward).query)["marker"][0])

    def end_marker(self, queue: str) -> str:
        """As the contract says, without reading the queue where markers are numbers (MongoDB driver, Rackspace)."""
        if not (total := self.stats(queue).total):
            return ""
        marker = self._page(queue, "", 1, claimed=True).marker
        return str(self._last_number(queue, int(marker), total)) if marker.isdecimal() else self._last(queue, marker)

    def _last_number(self, queue: str, marker: int, total: int) -> int:
        """The newest message's marker, from that of the oldest: a search in O(log n) requests of one message."""

        def number_after(number: int) -> int | None:
            page = self._page(queue, str(number), 1, claimed=True)
            return int(page.marker) if page.messages else None

        # Without gaps the second newest is total - 2 behind the oldest; from there in growing steps.
        for step in itertools.chain([max(0, total - 2)], (2**n - 1 for n in itertools.count())):
            if (found := number_after(marker + step)) is None:
                break
            marker = found
        end = marker + step
        while marker < end:
            middle = (marker + end) // 2
            if (found := number_after(middle)) is None:
                end = middle
            else:
                marker = found
        return marker

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        """As the contract says, a request each: the bulk delete removes claimed messages too."""
        self.limits.check_queue(queue)
        for id_ in ids:
            if re.fullmatch("[A-Za-z0-9_-]+", id_):
                self._delete_one(queue, id_)

    def purge(self, queue: str) -> None:
        """As the contract says. The queue is not deleted and made anew: its markers would begin anew too."""
        page = self._page(queue, "", PAGE, claimed=True)
        while page.messages:
            handles = {message.handle for message in page.messages if message.handle}
            self._delete_unfenced(queue, [message.id for message in page.messages], handles)
            page = self._page(queue, page.marker, PAGE, claimed=True)

    def stats(self, queue: str) -> Stats:
        _, found = self._ask("count", queue, "GET", "stats")
        with self._reading("count", queue):
            counts = found["messages"]
            age = float(counts["oldest"]["age"]) if "oldest" in counts else None
            return Stats(int(counts["free"]), int(counts["claimed"]), 0, age)

    def clock_ahead(self, queue: str) -> float | None:
        answer, _ = self._ask("count", queue, "GET", "stats")
        return ahead_of(answer.headers.get("Date"))

    def stop_waiting(self) -> None:
        self._stopped.set()

    def _ask(
        self, doing: str, queue: str, method: str, path: str = "", instead: Refusals | None = None, **options: Any
    ) -> Answer:
        """Send a request that concerns a queue; a refusal becomes an error, by `instead` or else by `refusals`."""
        self.limits.check_queue(queue)
        url = f"/queues/{queue}/{path}".rstrip("/")
        return self._send(f"{doing} {queue} at {self.address}", method, url, instead or {}, **options)

    @contextmanager
    def _reading(self, doing: str, queue: str) -> Iterator[None]:
        """Around the reading of an answer; one of another shape (a proxy's page) is no answer."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            service = self.limits.service
            raise AnswerLost(f"{doing} {queue} at {self.address}: the answer is none of {service}") from error

    def _refused(
        self, what: str, status: int, said: str, retry_after_s: float | None, instead: Refusals
    ) -> QueuesError:
        """The error for an answer with that HTTP status. said: what the service said, status included."""
        kind, advice = {**self.refusals, **instead}.get(status, self.other_refusals)
        return _error(kind, f"{what}: {said}{advice}", retry_after_s)

    @abstractmethod
    def _send(self, what: str, method: str, path: str, instead: Refusals, **options: Any) -> Answer:
        """Send a request, with requests' `data` and `params`; every failure is raised as an error of ours."""

    @abstractmethod
    def _life(self, message: Message, claim_ttl: int, grace: int) -> int:
        """The TTL of a message that was just claimed: one that would end in the claim lives until `grace` after it."""

    def _bulk_query(self, ids: Sequence[str], claim_ids: Collection[str]) -> dict[str, str]:
        """The query of a bulk delete. claim_ids: of all claims that may hold the messages."""
        return {"ids": ",".join(ids)}

    def _last(self, queue: str, marker: str) -> str:
        """The newest message's marker, from that of the oldest, where markers are no numbers."""
        while (page := self._page(queue, marker, PAGE, claimed=True)).messages:
            marker = page.marker
        return marker


def _messages(entries: Any) -> tuple[Message, ...]:
    """The messages of an answer, each once. handle: the claim that the href names, held or lapsed.

    What is no message is left out, and comes back when its claim ends; ValueError where that leaves none.
    """
    if not isinstance(entries, list):
        raise TypeError
    messages = {}
    for entry in entries:
        try:
            # Dumped again: a body that holds NaN, which Zaqar stores, is given as text.
            body = decode(json.dumps(entry["body"]))
            claim = parse_qs(urlsplit(entry["href"]).query).get("claim_id", [""])[0]
            message = Message(last_part(entry["href"]), body, float(entry["age"]), int(entry["ttl"]), handle=claim)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("a message in an answer of the queue service lacks %s: it is left out", error)
            continue
        messages[message.id] = message
    if entries and not messages:
        raise ValueError
    return tuple(messages.values())


def last_part(path: str) -> str:
    """The id at the end of a path. ValueError where there is none."""
    id_ = urlsplit(path).path.rsplit("/", 1)[-1]
    if not id_:
        raise ValueError(path)
    return unquote(id_)


def _quoted(id_: str) -> str:
    return quote(id_, safe="")


def content(answer: requests.Response) -> Any:
    """What an answer holds: a JSON value, or the text where it is not JSON."""
    try:
        return json.loads(answer.content)
    except (ValueError, RecursionError):
        return answer.text


def reason(found: Any) -> str:
    """What a refusal's content says went wrong: Zaqar's title and description, a sign-in's message, else its text."""
    if isinstance(found, dict):
        inner = next((value for value in found.values() if isinstance(value, dict)), found)
        found = ": ".join(str(inner[key]) for key in ("title", "description", "message") if inner.get(key))
    return " ".join(str(found).split())[:LONGEST_REASON]


def translated(error: Exception, what: str, errors: ErrorMap, cause: BaseException | None) -> QueuesError:
    """Our error for one of an SDK. cause: the error of requests that lies under it, if there is one."""
    kind, advice = next(row[1:] for row in errors if isinstance(error, row[0]))
    if kind is QueueUnavailable and _may_have_arrived(cause):
        kind = AnswerLost
    return _error(kind, f"{what}: {said_of(error)}{advice}", getattr(error, "retry_after", None) or None)


def said_of(error: BaseException) -> str:
    """What went wrong: the reason that lies under urllib3's retries, else the SDK's words but for those on versions."""
    under = error.args[0] if error.args else None
    if isinstance(under, MaxRetryError) and under.reason:
        return str(under.reason)
    return re.sub(r"\.?( Required version range .*)?$", "", str(error), flags=re.DOTALL)


def _error(kind: type[QueuesError], message: str, retry_after_s: float | None) -> QueuesError:
    return kind(message, retry_after_s=retry_after_s) if issubclass(kind, QueueUnavailable) else kind(message)


def _may_have_arrived(error: BaseException | None) -> bool:
    """Whether an error of requests leaves open if the service got the request."""
    # requests makes ValueErrors of what it cannot send; urllib3 wraps in MaxRetryError what fails before it is sent:
    # to find the host, to connect, TLS.
    if not isinstance(error, OSError | HTTPError) or isinstance(error, ValueError):
        return False
    return not (error.args and isinstance(error.args[0], MaxRetryError))
