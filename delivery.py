"""Deliver one request to the widget maker, and say what its answer means.

answer of the maker                                     outcome   failure
201 or 200, JSON naming the same widget id              created
400, 413, 415, 422 with the maker's own JSON error      rejected
any other 5xx but 501, 505; a request that cannot be sent         FAILED
none, 408, 425, 429, 502, 503, 504                                UNAVAILABLE
everything else: a redirect, a login, another server              MISCONFIGURED

A POST may be signed, and goes over plain HTTP to this machine alone unless that is allowed.
"""

import ipaddress
import json
import math
import os
import re
import socket
import string
import sys
import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import quote, urlsplit

import httptools
import requests
import urllib3

from claim_queues import JSON, ConfigError, QueuesError
from claim_queues.base import parse_retry_after
from claim_queues.breaker import Failure
from claim_queues.command_line import __version__
from claim_queues.keeper import Held
from claim_queues.signing import Signer
from receive_counts import Receives

CONNECT_TIMEOUT_S = 5.0
TCP_ESTABLISHED, RECEIVED = 1, slice(128, 136)
"""Of Linux's struct tcp_info: the first byte is the state; these tell how many bytes were received (since 4.1)."""
OUTCOMES = ("created", "rejected", "failed")
"""What can become of a request; a failed one becomes a dead letter."""
MOST_ANSWER_BYTES = 65_536
MOST_REASON = 1_000
"""Characters; a reason goes into responses and dead letters, which queues limit in size."""
RESPONSE_IDS = uuid.UUID("8f3f2a0c-5d0f-5a52-9c0b-6f1f5f1d2c11")

REJECTING = frozenset({400, 413, 415, 422})
UNAVAILABLE = frozenset({408, 425, 429, 502, 503, 504})
REFUSING = frozenset({401, 403, 421})
NO_POSTS_HERE = frozenset({501, 505})
"""What a plain file server answers to a POST."""

METADATA_SERVICES = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "fd00:ec2::254")))
"""Where clouds hand out a machine's credentials, beside link-local addresses."""

_HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": f"itchy-octo-chainsaw/{__version__}",
}
_SAFE_IN_HEADERS = string.punctuation.replace("%", "")
_ENCODE = json.JSONEncoder(allow_nan=False).encode
_NO_ANSWER_ERRORS = (OSError, httptools.HttpParserError, urllib3.exceptions.HTTPError)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the maker's answer means: an outcome (`created` or `rejected`), or a failure and no outcome yet.

    status: HTTP status, None without an answer. reason: for people. retry_after_s: as the maker asked, or None.
    refused: it is our maker, and it does not know us or this name of its own; its reason says what to mend.
    """

    outcome: str | None
    failure: Failure | None
    status: int | None
    reason: str = ""
    retry_after_s: float | None = None
    refused: bool = False


NO_ANSWER = Answer(None, None, None)


@dataclass(eq=False, slots=True)
class Delivery:
    """One received message on its way to the maker, with the maker's latest answer.

    probe: it tries whether the maker is back. alone: so did it the last time, so its failure alone proves nothing.
    well_before: then its /healthz answered before the POST.
    on_trial: this receive counts against it only once its POST starts. single: it is not to join a batch again.
    batch_refusal: why the maker, or whoever answered, would have nothing to do with the batch that it was in.
    post_s: seconds that its latest POST took, None before.
    """

    held: Held
    receives: Receives
    probe: bool = False
    alone: bool = False
    well_before: bool = False
    on_trial: bool = False
    single: bool = False
    batch_refusal: str = ""
    answer: Answer = NO_ANSWER
    post_s: float | None = None

    @property
    def id(self) -> str:
        return self.held.message.id

    @property
    def safe_id(self) -> str:
        """The id as a header takes it."""
        return quote(self.id, safe=_SAFE_IN_HEADERS, errors="surrogatepass")

    @property
    def failure(self) -> Failure | None:
        return self.answer.failure

    @property
    def retry_after_s(self) -> float | None:
        return self.answer.retry_after_s

    @property
    def widget_id(self) -> str | None:
        """The id that the request asks for; None when the body is no request."""
        body = self.held.message.body
        found = body.get("widget_id") if isinstance(body, dict) else None
        return found if isinstance(found, str) else None

    def joins(self, other: "Delivery") -> bool:
        """Whether both may be POSTed in one batch: of one claim, and neither needs an answer of its own."""
        apart = any(found.probe or found.on_trial or found.single for found in (self, other))
        return self.held.of is other.held.of and not apart

    def fields(self) -> dict[str, Any]:
        """What every log line about the message says."""
        return {
            "message": self.id,
            "widget": self.widget_id,
            "receives": self.receives.count,
            "status": self.answer.status,
            "ms": None if self.post_s is None else round(self.post_s * 1000, 1),
        }

    def headers(self, queue: str) -> dict[str, str]:
        """What the POST tells of the message beside the request itself."""
        return {
            "Idempotency-Key": self.safe_id,
            "webhook-id": self.safe_id,
            "X-Message-Receive-Count": str(self.receives.count),
            "X-Message-Queue": queue,
            "X-Message-Age": str(int(self.held.message.age)),
        }

    def item(self) -> dict[str, JSON]:
        """What a batch tells of the message."""
        message = self.held.message
        return {
            "message_id": message.id,
            "receive_count": self.receives.count,
            "age": int(message.age),
            "request": message.body,
        }

    def response(self, outcome: str, reason: str) -> dict[str, JSON]:
        """The body for the response queue; response_id is the same for a repeated response."""
        return {
            "version": 1,
            "response_id": str(uuid.uuid5(RESPONSE_IDS, f"{self.id} {outcome}")),
            "request_id": self.id,
            "widget_id": self.widget_id,
            "outcome": outcome,
            "reason": reason,
            "status": self.answer.status,
            "receive_count": self.receives.count,
        }

    def dead_letter(self, queue: str, reason: str) -> dict[str, JSON]:
        """The body for the dead-letter queue: the original body, and everything that is known of it.

        receive_count: of all receives, also those that do not count against it.
        """
        return {
            "version": 1,
            "request_id": self.id,
            "queue": queue,
            "body": self.held.message.body,
            "reason": reason,
            "status": self.answer.status,
            "receive_count": self.receives.count,
            "first_received_at": _iso(self.receives.first_at),
            "last_received_at": _iso(self.receives.last_at),
        }


class Durations:
    """How long POSTs took. counts: of those that took up to each of BOUNDS_S, and of longer ones; in all: seconds."""

    BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS_S) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Not thread-safe."""
        self.counts[bisect_left(self.BOUNDS_S, seconds)] += 1
        self.seconds += seconds


class MakerMisconfigured(QueuesError):
    """What answers at the maker's URL is not our maker, or does not know us; waiting does not mend it."""


class ForbiddenAddress(OSError):
    """The maker's name leads to an address where no maker can be."""


class Maker:
    """The widget maker at one URL. deadline_s: wall-clock seconds for one POST, connecting included.

    signer: signs each POST. allow_plain_http: to other machines too, where everybody on the way can read and change it.

    requests decides how the maker is reached: certificates are checked (against REQUESTS_CA_BUNDLE, where the
    environment names it), no proxy, no .netrc. Raises ConfigError for a URL that is no http or https URL, holds
    credentials or is not allowed, and for an unusable REQUESTS_CA_BUNDLE.
    """

    def __init__(
        self, url: str, *, deadline_s: float, signer: Signer | None = None, allow_plain_http: bool = False
    ) -> None:
        _check(url, allow_plain_http=allow_plain_http)
        self._signer = signer
        self.url = url
        self.deadline_s = deadline_s
        self._pool, self._target, self._host = _reach(url)
        path, mark, query = self._target.partition("?")
        self._batch_target = f"{path.rstrip('/')}/batch{mark}{query}"
        self._lock = threading.Lock()
        self._running: dict[Connection, float] = {}
        threading.Thread(target=self._watch_deadlines, name="deadlines", daemon=True).start()

    def connect(self) -> "Connection":
        """A connection for one thread; its first POST opens it, and it is kept open."""
        return Connection(self, self._pool._new_conn())  # noqa: SLF001 a connection of its own, set up by the pool

    def request(self, content: JSON, headers: dict[str, str], *, batch: bool = False) -> bytes:
        """The bytes of a POST. ValueError or RecursionError for what cannot be sent."""
        body = _ENCODE(content)
        if self._signer is not None:
            headers = headers | self._signer.headers(headers.get("webhook-id", ""), body)
        head = self._head("POST", self._batch_target if batch else self._target, headers)
        return b"%b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body.encode())

    def health_request(self) -> bytes:
        """The bytes that ask for /healthz."""
        return self._head("GET", "/healthz", {}) + b"\r\n\r\n"

    def _head(self, method: str, target: str, headers: dict[str, str]) -> bytes:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in (_HEADERS | headers).items()]
        head = "\r\n".join(lines)
        if not head.isascii() or len(head.splitlines()) != len(lines):
            raise ValueError("a header is not printable ASCII")
        return head.encode()

    def is_healthy(self) -> bool:
        """Say whether the maker's /healthz answers as ours does: 200 and `{"status": "ok"}`."""
        return self.connect().is_healthy()

    def trouble(self) -> str | None:
        """Why requests cannot be made there, and what to do; None where it answers as our maker does."""
        connection = self.connect()
        answer = connection.post({"widget_id": ""}, {"webhook-id": "check"})
        connection.close()
        if answer.outcome:
            return None
        return answer.reason if answer.refused else f"{answer.reason}: start it, or mend --maker-url"

    @contextmanager
    def deadline(self, connection: "Connection") -> Iterator[None]:
        """Abort what the connection does in this block once deadline_s have passed."""
        with self._lock:
            self._running[connection] = time.monotonic() + self.deadline_s
        try:
            yield
        finally:
            with self._lock:
                del self._running[connection]

    def _watch_deadlines(self) -> None:
        # What starts during a sleep ends after it: each has the same number of seconds.
        nap = self.deadline_s
        while True:
            time.sleep(max(nap, 0.01))
            with self._lock:
                now = time.monotonic()
                for connection, deadline in self._running.items():
                    if deadline <= now:
                        connection.abort()
                nap = min(self._running.values(), default=now + self.deadline_s) - now


class Connection:
    """One kept-alive connection to the maker, for one thread.

    requests opens it, with all that it knows of TLS; the POSTs go over its socket directly: a deadline needs the
    socket, and what a requests.Session does for each POST costs many times the POST.
    """

    def __init__(self, maker: Maker, transport: Any) -> None:
        self._maker = maker
        self._transport = transport
        self._socket: socket.socket | None = None
        self._patience_s = math.inf
        self._received = 0
        self._aborted = False

    def post(self, request: dict[str, JSON], headers: dict[str, str]) -> Answer:
        """POST the request and read the whole answer; never raises, never follows a redirect."""
        found = self._post(request, headers)
        if isinstance(found, Answer):
            return found
        return judge(found.status, found.headers, _json_object(found.body), request["widget_id"])

    def post_batch(self, deliveries: Sequence[Delivery]) -> Answer | None:
        """POST the requests in one batch and give each delivery its own answer; never raises.

        Returns None, or the answer to the batch as a whole where it does not answer item by item.
        """
        id_of_all = uuid.uuid5(RESPONSE_IDS, " ".join(delivery.safe_id for delivery in deliveries))
        headers = {"webhook-id": str(id_of_all)}
        found = self._post([delivery.item() for delivery in deliveries], headers, batch=True)
        if isinstance(found, Answer):
            return found
        content = _json_object(found.body)
        answers = content.get("answers")
        if found.status != HTTPStatus.OK or not isinstance(answers, list):
            return judge(found.status, found.headers, content, "")
        by_id = {str(item.get("message_id")): item for item in answers if isinstance(item, dict)}
        for delivery in deliveries:
            item = by_id.get(delivery.id, {})
            status, own = item.get("status"), item.get("body")
            if isinstance(status, int) and status in range(100, 600) and isinstance(own, dict):
                delivery.answer = judge(status, {}, own, delivery.widget_id or "")
            else:
                delivery.answer = Answer(None, Failure.FAILED, None, "the maker's answer to the batch leaves it out")
        return None

    def _post(self, content: JSON, headers: dict[str, str], *, batch: bool = False) -> "_Incoming | Answer":
        """POST; an Answer where no whole answer came."""
        most_bytes = MOST_ANSWER_BYTES * (len(content) if batch else 1)
        try:
            return self._exchange(self._maker.request(content, headers, batch=batch), most_bytes=most_bytes)
        except _NO_ANSWER_ERRORS as error:
            self.close()
            failure = Failure.MISCONFIGURED if isinstance(error, ForbiddenAddress) else Failure.UNAVAILABLE
            return Answer(None, failure, None, self._explain(error))
        except (ValueError, RecursionError) as error:
            self.close()
            return Answer(None, Failure.FAILED, None, f"the request cannot be sent: {error}"[:MOST_REASON])

    def is_healthy(self) -> bool:
        """Ask /healthz once, and close the connection."""
        try:
            answer = self._exchange(self._maker.health_request(), patience_s=CONNECT_TIMEOUT_S)
        except _NO_ANSWER_ERRORS:
            return False
        finally:
            self.close()
        return answer.status == HTTPStatus.OK and _json_object(answer.body).get("status") == "ok"

    def abort(self) -> None:
        """End what runs in another thread."""
        self._aborted = True
        if self._socket is not None:
            with suppress(OSError):  # not connected yet, or over by itself
                # Not SSLSocket's own: after that, the other thread would send on without encryption.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next POST opens a new one."""
        self._transport.close()

    def _exchange(
        self, request: bytes, *, most_bytes: int = MOST_ANSWER_BYTES, patience_s: float = math.inf
    ) -> "_Incoming":
        """Ask, and read the whole answer. patience_s: longest silence; the deadline ends all of it."""
        self._aborted = False
        with self._maker.deadline(self):
            sock = self._open()
            self._patience_s = min(patience_s, self._maker.deadline_s)
            if patience_s < self._maker.deadline_s:
                sock.settimeout(patience_s)
            with suppress(BrokenPipeError):  # it may have answered without reading all
                sock.sendall(request)
            answer = self._read_answer(sock, most_bytes)
            self._check_deadline()  # the abort may look like the end of the answer
        if not answer.keeps_alive:
            self.close()
        return answer

    def _read_answer(self, sock: socket.socket, most_bytes: int) -> "_Incoming":
        answer, before = _Incoming(), self._received
        while not answer.is_whole:
            data = sock.recv(MOST_ANSWER_BYTES)
            self._received += len(data)
            if data:
                answer.feed(data)
            elif answer.ends_with_connection:
                break
            else:
                raise ConnectionError("the answer ends in the middle" if self._received > before else "no answer")
            if self._received - before > most_bytes:  # it is not our maker's
                answer.body, answer.keeps_alive = b"", False
                break
        if not answer.status:
            raise ConnectionError("the answer's head is too long")
        return answer

    def _open(self) -> socket.socket:
        if not self._is_quiet():  # never opened, or closed by the maker while idle
            self._transport.close()
            self._patience_s = self._transport.timeout = min(CONNECT_TIMEOUT_S, self._maker.deadline_s)
            self._transport.connect()
            self._socket = self._transport.sock
            self._socket.settimeout(None)  # the deadline ends every wait; a timeout costs a system call before each
            self._received = 0
            if is_forbidden(address := self._socket.getpeername()[0]):
                raise ForbiddenAddress(f"the maker's name leads to {address}, where no maker can be")
        self._check_deadline()
        return cast(socket.socket, self._transport.sock)

    def _is_quiet(self) -> bool:
        """Whether the connection is open, and nothing came on it since the last answer, not even its end."""
        if sys.platform == "linux" and type(self._transport.sock) is socket.socket:  # without TLS
            # A poll() lets go of the interpreter, for which all slots wait: asked so, one process makes a fifth more.
            with suppress(OSError):
                info = self._transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, RECEIVED.stop)
                if info[0] == TCP_ESTABLISHED and int.from_bytes(info[RECEIVED], sys.byteorder) == self._received:
                    return True
        return bool(self._transport.is_connected)

    def _check_deadline(self) -> None:
        if self._aborted:
            raise TimeoutError

    def _explain(self, error: Exception) -> str:
        cause = error.__cause__ or error
        if self._aborted or isinstance(cause, TimeoutError):
            return f"no answer within {self._maker.deadline_s if self._aborted else self._patience_s:g} s"
        return f"{type(cause).__name__}: {getattr(cause, 'strerror', None) or cause}"[:MOST_REASON]


class _Incoming:
    """The maker's answer, as httptools parses it: headers by lower-case name. Complete once is_whole."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_whole = self.keeps_alive = False

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if not self.is_whole:
                raise
            self.keeps_alive = False  # what follows the answer is none

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is the end of this answer, as it is where nothing tells its length."""
        return bool(self.status) and not {"content-length", "transfer-encoding"} & self.headers.keys()

    # Called by the parser

    def on_message_begin(self) -> None:
        self.keeps_alive = False  # more than one answer

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.is_whole:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if not self.is_whole and self._parser.get_status_code() != HTTPStatus.CONTINUE:
            self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if not self.is_whole:
            self.body += data

    def on_message_complete(self) -> None:
        if self.status and not self.is_whole:
            self.is_whole = True
            self.keeps_alive = self.status >= HTTPStatus.OK and self._parser.should_keep_alive()


def judge(status: int, headers: Mapping[str, str], content: dict[str, Any], widget_id: str) -> Answer:
    """What this answer means for the request that asked for widget_id.

    headers: by lower-case name. content: its body as a JSON object, empty where it is none.
    """
    reason = _own_reason(content)
    named = content.get("id")
    if status in (200, 201) and isinstance(named, str) and named.lower() == widget_id.lower():
        return Answer("created", None, status)
    if status in REJECTING and reason is not None:
        return Answer("rejected", None, status, reason)
    if (500 <= status < 600 or status in UNAVAILABLE) and status not in NO_POSTS_HERE:  # noqa: PLR2004
        failure = Failure.UNAVAILABLE if status in UNAVAILABLE else Failure.FAILED
        said = f"HTTP {status}" if reason is None else f"HTTP {status}: {reason}"
        return Answer(None, failure, status, said, parse_retry_after(headers.get("retry-after")))
    if 300 <= status < 400:  # noqa: PLR2004
        said = f"redirected (HTTP {status}) to {headers.get('location', 'nowhere')[:MOST_REASON]}: not followed"
        return Answer(None, Failure.MISCONFIGURED, status, said)
    if status in REFUSING and reason is not None:
        return Answer(None, Failure.MISCONFIGURED, status, f"HTTP {status}: {reason}", refused=True)
    return Answer(None, Failure.MISCONFIGURED, status, f"HTTP {status}, but not as the widget maker answers")


def _own_reason(content: dict[str, Any]) -> str | None:
    """The message of an error as our maker words it; None where another wrote the answer."""
    error = content.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("code"), str):
        return None
    reason = error.get("message")
    return reason[:MOST_REASON] if isinstance(reason, str) else None


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_forbidden(address: str) -> bool:
    """Whether no maker can be at that IP address: link-local, multicast, or a cloud's metadata service."""
    found = _ip(address)
    return found is not None and (found.is_link_local or found.is_multicast or found in METADATA_SERVICES)


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _check(url: str, *, allow_plain_http: bool) -> None:
    """Raise ConfigError, which never shows credentials, unless the URL can be POSTed to."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and not re.search(r"[\s\x00-\x1f\x7f\\]", url)
    except ValueError:
        usable = False
    if usable and (parts.username is not None or parts.fragment):
        raise ConfigError("maker URL: it must hold neither credentials nor a fragment")
    if not usable:
        shown = "" if "@" in url else f" {url}"
        raise ConfigError(f"maker URL{shown}: write http://HOST[:PORT]/PATH or https://...")
    host = str(parts.hostname)
    if is_forbidden(host):
        raise ConfigError(f"maker URL {url}: no maker can be at a link-local, multicast or metadata address")
    address = _ip(host)
    is_this_machine = host == "localhost" if address is None else address.is_loopback
    if parts.scheme == "http" and not allow_plain_http and not is_this_machine:
        raise ConfigError(
            f"maker URL {url}: everybody on the way could read and change it: use https://, or allow it with"
            " --allow-plain-http"
        )


def _reach(url: str) -> tuple[Any, str, str]:
    """The connection pool for the URL, its path and query as a request line takes them, and its Host header."""
    session = requests.Session()
    session.trust_env = False
    adapter: Any = session.get_adapter(url)
    verify = os.environ.get("REQUESTS_CA_BUNDLE") or True  # another authority, never none
    try:
        prepared = session.prepare_request(requests.Request("POST", url))
        pool = adapter.get_connection_with_tls_context(prepared, verify=verify)
        adapter.cert_verify(pool, url, verify, cert=None)
        pool.host.encode("idna")
    except (OSError, ValueError) as error:
        raise ConfigError(f"maker URL {url}: {error}") from error
    return pool, prepared.path_url, urlsplit(str(prepared.url)).netloc


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
