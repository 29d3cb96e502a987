"""What API v1 and v2 of OpenStack Zaqar share. Rackspace Cloud Queues speak v1.

What looks odd here follows from the behaviour of Zaqar 18.0.0 and 23.0.1 in tests.
"""

import json
import math
import os
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, MaxRetryError

from . import errors
from .base import Claim, Message, Settlement, Stats, check_queue, decode, expiry
from .errors import AnswerLost, ConfigError, QueueUnavailable
from .remote import RemoteQueues, is_here

REQUEST_BYTES = 262_144  # of a whole POST; one byte more is HTTP 400
LONGEST_TTL_S = 1_209_600
PAGE = 20  # most messages of a list, and most queues of one
FIRST_RATE, LEAST_RATE = 10.0, 1e-6  # messages a second: what the first wait expects, and the least
RECENT_S = 2.0  # for about this long a message counts towards their rate
LOOK_S = 0.5  # between two looks of a wait, at one message a second
TIMEOUT_S = (5.0, 30.0)  # to connect, and between two bytes of an answer
THREADS = 64  # this many may ask at once, each over a connection that is kept
LONGEST_RETRY_AFTER_S = 3600.0

Found = tuple[tuple[Message, ...], str]  # and the id of their claim, or the next marker
T = TypeVar("T")
Answer = requests.Response
Refusals = Mapping[int, type[errors.QueuesError]]  # by HTTP status
REFUSALS: Refusals = {
    400: ConfigError,
    401: errors.CredentialsError,
    403: errors.QueueForbidden,
    404: errors.QueueNotFound,
    **dict.fromkeys((408, 413, 429, 503), QueueUnavailable),
}
ADVICE = {
    errors.CredentialsError: "; the service does not accept these credentials",
    errors.QueueForbidden: "; ask the owner of the account or project for that right",
    errors.QueueNotFound: "; the queue does not exist: create it with --create",
}


class HttpSession(requests.Session):
    """Connections for all threads, with time limits; no password from ~/.netrc, no plain text to another machine.

    trust_env: use the environment's proxies, but not for this machine.
    """

    def __init__(self, *, trust_env: bool) -> None:
        super().__init__()
        self.trust_env = trust_env
        self.auth = lambda request: request  # else requests looks for the host in ~/.netrc
        for scheme in list(self.adapters):
            self.mount(scheme, HTTPAdapter(pool_maxsize=THREADS))

    def send(self, request: requests.PreparedRequest, **options: Any) -> Answer:
        if is_here(str(request.url).partition("?")[0]):
            options["proxies"] = {}
        options["timeout"] = options.get("timeout") or TIMEOUT_S
        if options.get("verify") is True:  # requests reads the variable only where it trusts the environment
            options["verify"] = os.environ.get("REQUESTS_CA_BUNDLE") or True
        try:
            return super().send(request, **options)
        except (requests.RequestException, HTTPError) as error:
            # urllib3 wraps failures before a request is sent (name lookup, connecting, TLS) in MaxRetryError.
            if error.args and isinstance(unsent := error.args[0], MaxRetryError):
                raise QueueUnavailable(str(unsent.reason)) from error
            raise AnswerLost(str(error)) from error
        except OSError as error:
            raise ConfigError(f"{error}; see REQUESTS_CA_BUNDLE") from error


class ZaqarApi(RemoteQueues):
    """Queues of one service, by either API. around: what stands before and after the bodies of a post.

    In both APIs a missing queue looks like an empty one when it is claimed from or listed. exists() tells them apart.
    """

    around: tuple[str, str]

    def __init__(self, http: HttpSession, address: str, credentials: str) -> None:
        super().__init__()
        self.address, self.credentials = address, credentials
        self.request_room = REQUEST_BYTES - len("".join(self.around)) + 1  # the last takes no comma
        self._http = http
        self._looks = dict[str, tuple[float, float, float]]()  # times of the next and last look; messages a second

    @abstractmethod
    def _send(self, method: str, path: str, **options: Any) -> Answer:
        """Send a request, with requests' `params` and `data`; returns refusals too, except those of a sign-in."""

    def create(self, queue: str) -> None:
        self._ask("create", queue, f"PUT /queues/{queue}", bool)

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        request, terms = f"POST /queues/{queue}/claims?limit={limit}", json.dumps({"ttl": ttl, "grace": grace})
        ask = partial(self._ask, "claim from", queue, request, _messages, data=terms)
        messages, id_, asked_at = self._look(queue, limit, wait, ask)
        return Claim(id_, queue, ttl, grace, messages, expiry(asked_at, ttl)) if messages else None

    def renew(self, claim: Claim) -> None:
        asked_at = time.monotonic()
        terms = json.dumps({"ttl": claim.ttl, "grace": claim.grace})  # a value left out becomes the server's default
        request = f"PATCH /queues/{claim.queue}/claims/{claim.id}"
        self._ask(f"renew claim {claim.id} on", claim.queue, request, bool, {404: errors.ClaimLost}, data=terms)
        claim.expires_at = expiry(asked_at, claim.ttl)

    def release(self, claim: Claim, *, delay: float = 0) -> None:
        request = f"DELETE /queues/{claim.queue}/claims/{claim.id}"
        self._ask(f"release claim {claim.id} on", claim.queue, request, bool)
        self._looks.pop(claim.queue, None)  # there is something to find

    def browse(self, queue: str, *, after: str = "", limit: int = 20, wait: float = 0) -> tuple[list[Message], str]:
        shown = {"echo": "true", "include_claimed": "true", "include_delayed": "true"}
        query = {"marker": after or "-1", "limit": min(limit, PAGE), **shown}  # the Redis driver needs a marker

        def read(answer: Answer) -> Found:
            """Without what came before: the Redis driver shows the first message of a queue again after itself."""
            found, marker = _messages(answer)
            ids = [message.id for message in found]
            return found[ids.index(after) + 1 if after in ids else 0 :], marker

        ask = partial(self._ask, "browse", queue, f"GET /queues/{queue}/messages", read, params=query)
        messages, marker, _ = self._look(queue, min(limit, PAGE), wait, ask)
        return list(messages), marker or after

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        """One request for each message: the bulk delete removes claimed messages too."""
        for id_ in ids:
            if re.fullmatch("[A-Za-z0-9_-]+", id_):  # ".." would name the queue
                self._delete_one(queue, id_)

    def purge(self, queue: str) -> None:
        """Page by page. Deleting and creating the queue again would also begin its markers again."""
        self.stats(queue)  # a missing queue would look empty
        messages, marker = self.browse(queue)
        while messages:
            self._delete_unfenced(queue, [message.id for message in messages], "")
            messages, marker = self.browse(queue, after=marker)

    def stats(self, queue: str) -> Stats:
        return self._ask("count", queue, f"GET /queues/{queue}/stats", _stats)

    def close(self) -> None:
        self.stop_waiting()
        self._http.close()

    def _look(self, queue: str, limit: int, wait: float, ask: Callable[[], Found]) -> tuple[*Found, float]:
        """What is found within the wait, and when that was asked for (monotonic). Neither API has a long poll.

        At twice the messages a second it looks 1.4 times as often: this keeps both their delay and the requests low.
        After a full answer, the next look follows at once.
        """
        asked_at, deadline, was_stopped = 0.0, time.monotonic() + wait, self._stopped.is_set()
        while True:
            now = time.monotonic()
            next_at, looked_at, rate = self._looks.get(queue, (now, now, FIRST_RATE))
            pause = min(next_at, looked_at + wait) - now
            is_over = self._stopped.wait(max(0, min(pause, deadline - now))) or now + pause > deadline
            if is_over and (asked_at or (self._stopped.is_set() and not was_stopped)):
                return (), "", now
            asked_at = time.monotonic()
            found = ask()
            rate = max(LEAST_RATE, rate * math.exp((looked_at - asked_at) / RECENT_S) + len(found[0]) / RECENT_S)
            pause = LOOK_S / math.sqrt(rate) if len(found[0]) < limit else 0.0
            self._looks[queue] = asked_at + pause, asked_at, rate
            if found[0]:
                return *found, asked_at

    def _ask(
        self, doing: str, queue: str, request: str, read: Callable[[Answer], T], also: Refusals = REFUSALS, **query: Any
    ) -> T:
        """Send a request about a queue; returns what `read` makes of the answer. request: its method and path."""
        what = f"{doing} {check_queue(queue)} at {self.address}"
        try:
            answer = self._send(*request.split(" "), **query)
            if answer.status_code >= requests.codes.multiple_choices:
                raise refusal(answer, also)
            self._has_worked = True
            return read(answer)
        except errors.QueuesError as error:
            if isinstance(error, errors.CredentialsError) and self._has_worked:
                raise QueueUnavailable(f"{what}: {error}") from error
            error.args = (f"{what}: {error}",)
            raise
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise AnswerLost(f"{what}: that is no answer of {self.limits.service}") from error

    def _document(self, body: Any, ttl: int | None) -> str:
        return f'{{"ttl":{ttl or LONGEST_TTL_S},"body":{self.limits.encode(body)}}}'

    def _send_batch(self, queue: str, documents: Sequence[str]) -> list[str]:
        """The ids of those that were accepted: all, or the first few where the answer says `partial`."""

        def read(answer: Answer) -> list[str]:
            ids = [_id(path) for path in json.loads(answer.content)["resources"]]
            if not 0 < len(ids) <= len(documents):
                raise ValueError
            return ids

        request, data = f"POST /queues/{queue}/messages", ",".join(documents).join(self.around)
        return self._ask("post to", queue, request, read, {400: errors.MessageRefused}, data=data)

    def _delete_settled(self, claim: Claim, settlements: Sequence[Settlement]) -> None:
        unfenced = [each.message.id for each in settlements if not each.fenced]
        self._delete_unfenced(claim.queue, unfenced, claim.id)
        claim.deleted.update(unfenced)
        for each in settlements:
            if each.fenced and self._delete_one(claim.queue, each.message.id, claim.id):
                claim.deleted.add(each.message.id)

    def _delete_unfenced(self, queue: str, ids: Sequence[str], claim_id: str) -> None:
        """Delete in one request, even what others hold. Servers with `message_delete_with_claim_id` want a claim id."""
        if ids:  # an encoded comma would not separate them
            request = f"DELETE /queues/{queue}/messages?ids={','.join(ids)}&claim_ids={claim_id}"
            self._ask("delete from", queue, request, bool)

    def _delete_one(self, queue: str, id_: str, claim_id: str = "") -> bool:
        """Delete one message; returns whether it is gone."""
        request = f"DELETE /queues/{queue}/messages/{id_}?claim_id={claim_id}".removesuffix("?claim_id=")
        try:
            return self._ask("delete from", queue, request, bool, {400: errors.ClaimLost})
        except errors.ClaimLost:
            return False  # the claim is over
        except errors.QueueForbidden as error:
            if "not authorized" in str(error):  # as Zaqar says where its policy forbids it
                raise
            return False  # another holds the message


def refusal(answer: Answer, instead: Refusals) -> errors.QueuesError:
    """The error for an HTTP status of 300 or more. instead: takes precedence over REFUSALS."""
    status, said = answer.status_code, said_by(answer)
    other = AnswerLost if status >= requests.codes.server_error else errors.QueueError
    kind = {**REFUSALS, **instead}.get(status, other)
    said += ADVICE.get(kind, "")
    return kind(said, retry_after=retry_after_s(answer)) if issubclass(kind, QueueUnavailable) else kind(said)


def said_by(answer: Answer) -> str:
    """What an answer says, for people."""
    return f"HTTP {answer.status_code} {' '.join(answer.text.split())[:200]}"


def retry_after_s(answer: Answer) -> float:
    """Seconds that its Retry-After asks for, at most an hour; 0 where it names none."""
    text = answer.headers.get("Retry-After", "").strip()
    return min(float(text), LONGEST_RETRY_AFTER_S) if text.isdecimal() else 0.0


def _messages(answer: Answer) -> Found:
    """The messages of a claim, and its id; or those of a list, and the next marker. Both are empty without messages.

    Zaqar stores bodies that hold NaN: they are returned as text.
    """
    found: Any = json.loads(answer.content) if answer.status_code != requests.codes.no_content else []
    entries = found if isinstance(found, list) else found["messages"]
    if not entries:
        return (), ""
    made = [Message(_id(each["href"]), decode(json.dumps(each["body"])), float(each["age"])) for each in entries]
    if "Location" in answer.headers:
        return tuple(made), _id(answer.headers["Location"])
    return tuple(made), parse_qs(urlsplit(found["links"][0]["href"]).query)["marker"][0]


def _stats(answer: Answer) -> Stats:
    counts = json.loads(answer.content)["messages"]
    age = float(counts["oldest"]["age"]) if "oldest" in counts else None
    return Stats(int(counts["free"]), int(counts["claimed"]), 0, age)


def _id(path: str) -> str:
    return urlsplit(path).path.rpartition("/")[2]
