"""Deliver requests to the widget maker, and say what its answers mean.

| answer of the maker                                                     | outcome  | failure       |
| ----------------------------------------------------------------------- | -------- | ------------- |
| 200 or 201, JSON that names the widget id                               | created  |               |
| 400, 413, 415, 422 with the maker's own JSON error                      | rejected |               |
| 500; 506 to 599 with the maker's own JSON error                         |          | FAILED        |
| refused, 408, 425, 429, 502 to 504; 506 to 599 without that JSON        |          | UNAVAILABLE   |
| none by the deadline                                                    |          | LATE          |
| a connection that broke after the request was sent                      |          | CUT           |
| anything else: a redirect, a login, another server                      |          | MISCONFIGURED |

A rejection deletes a request, so it is believed only from a server that says in a header that it is a maker, or that
has created a widget. From any other it is MISCONFIGURED.
"""

import errno
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import certifi
import pycurl
import structlog

from claim_queues import JSON, ConfigError, Message, Post, Settlement
from claim_queues.base import decode, is_loopback
from claim_queues.checks import Report
from receive_counts import Receives

from .signing import Signer

CONNECT_TIMEOUT_S = HEALTH_TIMEOUT_S = 5
HEALTH_EVERY_S = 1.0
LONGEST_REST_S, LONGEST_LIFE_S = 1, 60  # of a connection: firewalls forget idle ones, names move
LONGEST_RETRY_AFTER_S = 300
MOST_ANSWER_BYTES = 1_048_576
MOST_REASON = 1_000  # characters: a reason goes into responses and dead letters, which queues limit in size
REJECTING = frozenset({400, 413, 415, 422})
UNAVAILABLE = frozenset({408, 425, 429, 502, 503, 504})
NOT_TAKEN = frozenset({404, 405, 501})  # from a server that has no such page, or takes no POST there
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})
RESPONSE_IDS = uuid.UUID("8f3f2a0c-5d0f-5a52-9c0b-6f1f5f1d2c11")
HEADERS = ["Content-Type: application/json", "Accept: application/json", "User-Agent: itchy-octo-chainsaw", "Expect:"]

log = structlog.get_logger()


class Failure(Enum):  # why there is no outcome yet
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    LATE = "late"
    CUT = "cut"
    MISCONFIGURED = "misconfigured"


@dataclass(frozen=True, slots=True)
class Answer:
    """An outcome (created, rejected, failed) or a failure; neither: there was no POST.

    status: HTTP status, None without an answer. retry_after: seconds that the maker asks for.
    """

    outcome: str | None = None
    failure: Failure | None = None
    status: int | None = None
    reason: str = ""
    retry_after: int = 0

    @property
    def is_silent(self) -> bool:
        """Whether a request was sent but the maker itself did not answer: a gateway's 502 or 504 is not its answer."""
        return self.failure in (Failure.CUT, Failure.LATE) or self.status in (502, 504)

    @property
    def asks_for_patience(self) -> bool:
        return self.status == 429 or (self.status == 503 and self.retry_after > 0)


class Reply(NamedTuple):
    """What came over the wire. status: 0 if nothing came. body: the JSON object; empty if it is anything else.

    is_maker: a header says so. failure: why nothing came.
    """

    status: int
    body: dict[str, Any]
    reason: str = ""
    retry_after: int = 0
    is_maker: bool = False
    failure: Failure = Failure.UNAVAILABLE


@dataclass(slots=True)
class Delivery:
    """One claimed message on its way. before: its counts so far. receives: the same with this receive, once counted.

    charged: for this receive, in fifths. backoff: the most seconds until it may come back. took: seconds of its POST.
    is_done: its outcome is stored and the message deleted, or another consumer has it.
    """

    message: Message
    before: Receives
    receives: Receives = Receives()  # noqa: RUF009 it is a tuple
    answer: Answer = Answer()
    charged: int = 0
    backoff: float = 0.0
    took: float = 0.0
    is_done: bool = False

    @property
    def id(self) -> str:
        return self.message.id

    @property
    def widget_id(self) -> str | None:
        """None where the body is not a request."""
        body = self.message.body
        found = body.get("widget_id") if isinstance(body, dict) else None
        return found if isinstance(found, str) else None

    @property
    def receive_count(self) -> int:
        """The count to show: of this machine's POSTs, or the service's own count where that is higher."""
        return max(self.receives.receives, self.before.receives, self.message.receive_count or 1)

    def headers(self, queue: str) -> dict[str, str]:
        """What a POST says about the message, apart from the request."""
        id_ = quote(self.id, safe="!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~", errors="surrogatepass")
        return {
            "Idempotency-Key": id_,
            "webhook-id": id_,
            "X-Message-Receive-Count": str(self.receive_count),
            "X-Message-Queue": queue,
            "X-Message-Age": str(int(self.message.age)),
        }

    def item(self) -> dict[str, JSON]:
        """Its part of a batch."""
        age, request = int(self.message.age), self.message.body
        return {"message_id": self.id, "receive_count": self.receive_count, "age": age, "request": request}

    def fields(self) -> dict[str, Any]:
        """What each log line about it says."""
        return {
            "message": self.id,
            "widget": self.widget_id,
            "receives": self.receive_count,
            "status": self.answer.status,
            "ms": round(self.took * 1000, 1) or None,
        }

    def settlement(self, queues: Sequence[str], ttl: int | None) -> Settlement:
        """What to post: the response, which lives for `ttl` seconds; before it a dead letter, if the message failed.

        queues: names of the request, response and dead-letter queue.
        """
        request_queue, response_queue, dead_letter_queue = queues
        answer = self.answer
        about = {"version": 1, "request_id": self.id, "reason": answer.reason, "status": answer.status}
        about["receive_count"] = self.receive_count
        response_id = str(uuid.uuid5(RESPONSE_IDS, f"{self.id} {answer.outcome}"))
        response = {"response_id": response_id, "widget_id": self.widget_id, "outcome": answer.outcome}
        posts = [Post(response_queue, about | response, ttl)]
        if answer.outcome == "failed":
            seen = self.receives if self.receives.receives else self.before
            times = {"first_received_at": _iso(seen.first_at), "last_received_at": _iso(seen.last_at)}
            letter = {"queue": request_queue, "body": self.message.body}
            posts.insert(0, Post(dead_letter_queue, about | letter | times))
        return Settlement(self.message, tuple(posts), fenced=answer.outcome == "failed")


class Maker:
    """The widget maker at one URL. deadline: wall-clock seconds for a POST, from looking up its name to its last byte.

    signer: signs each POST. takes_batches: until it refuses one. health: why its health page is not well, or empty.
    Raises ConfigError for a URL that cannot be POSTed to, or that is plain HTTP to another machine and not allowed.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline: float,
        health_url: str | None = None,
        signer: Signer | None = None,
        allow_plain_http: bool = False,
    ) -> None:
        parts = check_url(url, allow_plain_http=allow_plain_http)
        self.url = urlunsplit(parts._replace(query=""))  # as it is shown: a query may hold a token
        self.deadline = deadline
        self.takes_batches = True
        self.health = ""
        self._url, self._signer = url, signer
        self._batch_url = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/batch"))
        self._health_url = health_url or urljoin(self.url, "/healthz")
        self._is_elsewhere = (
            check_url(self._health_url, allow_plain_http=allow_plain_http, what="health").netloc != parts.netloc
        )
        self._asked_at, self._is_there, self._is_mute = 0.0, False, False
        self._has_created = False
        self._lock = threading.Lock()
        self._threads = threading.local()

    def post(self, delivery: Delivery, queue: str) -> Answer:
        """POST one request, never following a redirect.

        libcurl repeats a POST by itself if a reused connection was closed without an answer. So a message that was
        received before goes on a new connection: one receive is one POST.
        """
        try:
            text = json.dumps(delivery.message.body, allow_nan=False)
        except (ValueError, RecursionError) as error:
            return Answer("failed", reason=f"the body cannot be sent: {error}"[:MOST_REASON])
        reply = self._send(self._url, text, delivery.headers(queue), is_fresh=delivery.before.receives > 0)
        return self._believe(judge(reply, str(delivery.widget_id)), reply)

    def post_batch(self, deliveries: Sequence[Delivery]) -> Answer | None:
        """POST the messages together and set the answer of each; returns one only if the batch failed as a whole."""
        try:
            text = json.dumps([delivery.item() for delivery in deliveries], allow_nan=False)
        except (ValueError, RecursionError) as error:
            return Answer(failure=Failure.FAILED, reason=str(error))
        id_of_all = uuid.uuid5(RESPONSE_IDS, " ".join(delivery.id for delivery in deliveries))
        reply = self._send(self._batch_url, text, {"Idempotency-Key": str(id_of_all)})
        answers = reply.body.get("answers")
        if reply.status != 200 or not isinstance(answers, list):
            self.takes_batches = self.takes_batches and reply.status not in NOT_TAKEN
            return judge(reply, "")
        items = {str(item.get("message_id")): item for item in answers if isinstance(item, dict)}
        for delivery in deliveries:
            match items.get(delivery.id):
                case {"status": int(status), "body": dict(body)}:
                    answer = judge(Reply(status, body), str(delivery.widget_id))
                    delivery.answer = self._believe(answer, reply)
                case _:
                    delivery.answer = Answer(failure=Failure.FAILED, reason="left out of the answer to a batch")
        return None

    def is_well(self, since: float) -> bool:
        """Whether its health page answers with anything but 429 and 5xx, asked at that monotonic time or later.

        Threads share an answer; at most one is asked for per second. A page that is not well although the first widget
        was just created is the wrong page: it is ignored until it is well. But if the maker's own port does not answer
        at all, the maker is gone.
        """
        with self._lock:
            if self._asked_at < since:
                time.sleep(max(0.0, self._asked_at + HEALTH_EVERY_S - time.monotonic()))
                self._asked_at = time.monotonic()
                reply = _reply(_curl(self._health_url, HEALTH_TIMEOUT_S))
                self._is_there, health = reply.status > 0 or self._is_elsewhere, self.health
                is_well = 0 < reply.status < 500 and reply.status != 429
                self.health = "" if is_well else reply.reason
                self._is_mute = self._is_mute and not is_well
                if bool(health) != bool(self.health) and not self._is_mute:
                    say, event = (
                        (log.warning, "the maker is not well") if self.health else (log.info, "the maker is well")
                    )
                    say(event, reason=self.health or None)
            return not self.health or (self._is_mute and self._is_there)

    def check(self, report: Report) -> None:
        """Report whether the maker answers as one: POST a request that names no widget, and ask the health page."""
        reply = self._send(self._url, '{"widget_id": ""}', {"Idempotency-Key": "check"})
        answer = judge(reply, "")
        if answer.outcome is None:
            report.failure(f"maker {self.url}: {answer.reason}: start it, or correct --maker-url")
        elif not reply.is_maker:
            report.failure(f"maker {self.url}: it answers without the header Widget-Maker, as another server may")
        else:
            report.ok(f"maker {self.url}: answers as the widget maker does")
        if self.is_well(time.monotonic()):
            report.ok("maker: its health page is well")
        else:
            report.failure(f"maker: its health page is not well ({self.health}): see --health-url")

    def _believe(self, answer: Answer, reply: Reply) -> Answer:
        """The answer, unless it is a rejection from a server that may not be a maker."""
        if answer.outcome == "created" and not self._has_created:
            self._has_created = True
            if not self.is_well(time.monotonic()) and self._is_there:
                self._is_mute = True
                log.error("a widget was created, but this page is not well: ignored until it is", url=self._health_url)
        elif answer.outcome == "rejected" and not (self._has_created or reply.is_maker):
            reason = f"{answer.reason}: not believed without the header Widget-Maker, or a widget created before"
            return Answer(None, Failure.MISCONFIGURED, answer.status, reason)
        return answer

    def _send(self, url: str, text: str, headers: dict[str, str], *, is_fresh: bool = False) -> Reply:
        """POST on this thread's connection. is_fresh: on a new one."""
        if self._signer:
            headers = headers | self._signer.headers(headers["Idempotency-Key"], text.encode())
        mine = self._threads.__dict__
        curl = mine.get("curl") or mine.setdefault("curl", _curl(url, self.deadline))
        curl.setopt(pycurl.URL, url)
        curl.setopt(pycurl.FRESH_CONNECT, is_fresh)
        curl.setopt(pycurl.HTTPHEADER, [*HEADERS, *(f"{name}: {value}" for name, value in headers.items())])
        curl.setopt(pycurl.POSTFIELDS, text)
        return _reply(curl)


def judge(reply: Reply, widget_id: str) -> Answer:
    """What a reply means for the request of that widget."""
    status, body, made = reply.status, reply.body, reply.body.get("id")
    reason = reply.reason[:MOST_REASON] or f"HTTP {status}"
    error = body.get("error")
    own = str(error.get("message"))[:MOST_REASON] if isinstance(error, dict) and "code" in error else None

    def failure(kind: Failure, why: str = reason) -> Answer:
        return Answer(None, kind, status or None, why, reply.retry_after)

    if status in (200, 201) and isinstance(made, str) and made.lower() == widget_id.lower():
        return Answer("created", None, status)
    if status in REJECTING and own is not None:
        return Answer("rejected", None, status, own)
    said = reason if own is None else f"{reason}: {own}"
    if status == 0 or status in UNAVAILABLE:
        return failure(reply.failure, said)
    if 500 <= status < 600 and status not in (501, 505):
        return failure(Failure.FAILED if status == 500 or own is not None else Failure.UNAVAILABLE, said)
    return failure(Failure.MISCONFIGURED, said if own else f"{reason}: not an answer of the widget maker")


def check_url(url: str, *, allow_plain_http: bool, what: str = "maker") -> Any:
    """The parts of a usable URL. Raises ConfigError for any other; its text never shows credentials."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isascii()
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.fragment or re.search(r"[\s\x00-\x1f\x7f\\]", url):
        raise ConfigError(
            f"{what} URL: write http://HOST[:PORT]/PATH or https://..., without credentials or a fragment"
        )
    if parts.scheme == "http" and not allow_plain_http and not is_loopback(parts.hostname):
        raise ConfigError(f"{what} URL http://{parts.hostname}: others could read it: use https or --allow-plain-http")
    return parts


def _curl(url: str, deadline: float) -> pycurl.Curl:
    curl = pycurl.Curl()
    authorities = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or certifi.where()
    curl.setopt(pycurl.CAPATH if os.path.isdir(authorities) else pycurl.CAINFO, authorities)  # noqa: PTH112
    curl.setopt(pycurl.URL, url)
    curl.setopt(pycurl.TIMEOUT_MS, int(deadline * 1000))
    curl.setopt(pycurl.CONNECTTIMEOUT, CONNECT_TIMEOUT_S)
    curl.setopt(pycurl.MAXAGE_CONN, LONGEST_REST_S)
    curl.setopt(pycurl.MAXLIFETIME_CONN, LONGEST_LIFE_S)
    curl.setopt(pycurl.DNS_CACHE_TIMEOUT, 0)
    curl.setopt(pycurl.MAXFILESIZE, MOST_ANSWER_BYTES)
    curl.setopt(pycurl.PROXY, "")
    curl.setopt(pycurl.NOSIGNAL, 1)  # as every program with threads must
    return curl


def _reply(curl: pycurl.Curl) -> Reply:
    data, head = BytesIO(), BytesIO()
    curl.setopt(pycurl.WRITEDATA, data)
    curl.setopt(pycurl.WRITEHEADER, head)
    try:
        curl.perform()
    except pycurl.error as error:
        return _no_reply(curl, *error.args)
    status, location = curl.getinfo(pycurl.RESPONSE_CODE), curl.getinfo_raw(pycurl.REDIRECT_URL)
    body = decode(data.getvalue().decode(errors="replace"))
    reason = f"HTTP {status}"
    if location:
        reason += f"; redirects to {location.decode(errors='replace')}, which is not followed"
    retry_after = max(0, min(LONGEST_RETRY_AFTER_S, curl.getinfo(pycurl.RETRY_AFTER)))
    is_maker = b"\nwidget-maker:" in head.getvalue().lower()
    return Reply(status, body if isinstance(body, dict) else {}, reason, retry_after, is_maker)


def _no_reply(curl: pycurl.Curl, code: int, reason: str) -> Reply:
    if code in (pycurl.E_UNSUPPORTED_PROTOCOL, pycurl.E_FTP_WEIRD_SERVER_REPLY, pycurl.E_FILESIZE_EXCEEDED):
        return Reply(0, {}, f"not an answer of the widget maker: {reason}", failure=Failure.MISCONFIGURED)
    no_socket = code in (pycurl.E_COULDNT_CONNECT, pycurl.E_OUT_OF_MEMORY)  # where libcurl does not say why
    os_error = curl.getinfo(pycurl.OS_ERRNO) or (errno.EMFILE if no_socket else 0)
    reason = f"this machine: {os.strerror(os_error)}" if os_error in OURS else reason
    if not curl.getinfo(pycurl.REQUEST_SIZE):  # nothing was sent
        return Reply(0, {}, reason)
    return Reply(0, {}, reason, failure=Failure.LATE if code == pycurl.E_OPERATION_TIMEDOUT else Failure.CUT)


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment or time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
