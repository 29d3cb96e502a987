"""Deliver one request to the widget maker, and say what its answer means.

answer of the maker                                     outcome   failure
201 or 200, JSON naming the same widget id              created
400, 413, 415, 422 with the maker's own JSON error      rejected
any other 5xx                                                     FAILED
none, 408, 425, 429, 502, 503, 504                                UNAVAILABLE
everything else: a redirect, a login, another server              MISCONFIGURED
"""

import email.utils
import http.client
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
import urllib3

from claim_queues import JSON, ConfigError, QueuesError
from claim_queues.breaker import Failure
from claim_queues.command_line import __version__
from claim_queues.keeper import Held
from receive_counts import Receives

CONNECT_TIMEOUT_S = 5.0
MOST_ANSWER_BYTES = 65_536
LONGEST_RETRY_AFTER_S = 3_600.0
RESPONSE_IDS = uuid.UUID("8f3f2a0c-5d0f-5a52-9c0b-6f1f5f1d2c11")

REJECTING = frozenset({400, 413, 415, 422})
UNAVAILABLE = frozenset({408, 425, 429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Answer:
    """What the maker's answer means: an outcome (`created` or `rejected`), or a failure and no outcome yet.

    status: HTTP status, None without an answer. reason: for people. retry_after_s: as the maker asked, or None.
    """

    outcome: str | None
    failure: Failure | None
    status: int | None
    reason: str = ""
    retry_after_s: float | None = None


NO_ANSWER = Answer(None, None, None)


@dataclass(eq=False, slots=True)
class Delivery:
    """One received message on its way to the maker, with the maker's latest answer.

    probe: it tries whether the maker is back. alone: so did it the last time, so its failure alone proves nothing.
    """

    held: Held
    receives: Receives
    probe: bool = False
    alone: bool = False
    answer: Answer = NO_ANSWER

    @property
    def id(self) -> str:
        return self.held.message.id

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

    def fields(self) -> dict[str, object]:
        """What every log line about the message says."""
        return {
            "message": self.id,
            "widget": self.widget_id,
            "receives": self.receives.count,
            "status": self.answer.status,
        }

    def headers(self, queue: str) -> dict[str, str]:
        """What the POST tells of the message beside the request itself."""
        message = self.held.message
        return {
            "Idempotency-Key": message.id,
            "webhook-id": message.id,
            "X-Message-Receive-Count": str(self.receives.count),
            "X-Message-Queue": queue,
            "X-Message-Age": str(int(message.age)),
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
        """The body for the dead-letter queue: the original body, and everything that is known of it."""
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


class MakerMisconfigured(QueuesError):
    """What answers at the maker's URL is not our maker, or does not know us; waiting does not mend it."""


class Maker:
    """The widget maker at one URL. deadline_s: wall-clock seconds for one POST, connecting included.

    Raises ConfigError for a URL that is no http or https URL, or that holds credentials.
    """

    def __init__(self, url: str, *, deadline_s: float) -> None:
        parts = _checked(url)
        self.url = url
        self.deadline_s = deadline_s
        self.target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        self._health_url = urlunsplit((parts.scheme, parts.netloc, "/healthz", "", ""))
        self._posting: dict[Connection, float] = {}
        threading.Thread(target=self._watch_deadlines, name="deadlines", daemon=True).start()

    def connect(self) -> "Connection":
        """A connection for one thread; its first POST opens it, and it is kept open."""
        return Connection(self)

    def is_healthy(self) -> bool:
        """Say whether the maker's /healthz answers as ours does: 200 and `{"status": "ok"}`."""
        with requests.Session() as session:
            session.trust_env = False
            timeout = min(CONNECT_TIMEOUT_S, self.deadline_s)
            try:
                answer = session.get(self._health_url, timeout=timeout, allow_redirects=False, stream=True)
                content = answer.raw.read(MOST_ANSWER_BYTES)
            except (requests.RequestException, urllib3.exceptions.HTTPError):
                return False
            return bool(answer.status_code == requests.codes.ok and _json_object(content).get("status") == "ok")

    @contextmanager
    def deadline(self, connection: "Connection") -> Iterator[None]:
        """Abort what the connection does in this block once deadline_s have passed."""
        self._posting[connection] = time.monotonic() + self.deadline_s
        try:
            yield
        finally:
            self._posting.pop(connection, None)

    def _watch_deadlines(self) -> None:
        # A POST that starts during a sleep ends after it: every POST has the same number of seconds.
        nap = self.deadline_s
        while True:
            time.sleep(max(nap, 0.01))
            now = time.monotonic()
            for connection, deadline in list(self._posting.items()):
                if deadline <= now:
                    connection.abort()
            nap = min(list(self._posting.values()), default=now + self.deadline_s) - now


class Connection:
    """One kept-alive connection to the maker, for one thread.

    requests decides how the maker is reached (certificates checked, no proxy, no .netrc). Its transport is then
    driven directly: a deadline needs the socket, and a Session's own work costs several times the POST's.
    """

    def __init__(self, maker: Maker) -> None:
        self._maker = maker
        self._aborted = False
        session = requests.Session()
        session.trust_env = False
        prepared = session.prepare_request(requests.Request("POST", maker.url))
        adapter: Any = session.get_adapter(maker.url)
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or True  # another authority, never none
        pool = adapter.get_connection_with_tls_context(prepared, verify=verify)
        adapter.cert_verify(pool, maker.url, verify, cert=None)
        self._transport = pool._new_conn()  # noqa: SLF001 a connection of our own, set up by the pool

    def post(self, request: dict[str, JSON], headers: dict[str, str]) -> Answer:
        """POST the request and read the whole answer; never raises, never follows a redirect."""
        self._aborted = False
        try:
            with self._maker.deadline(self):
                status, found, body = self._exchange(json.dumps(request, allow_nan=False), headers)
        except (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
            self.close()
            return Answer(None, Failure.UNAVAILABLE, None, self._explain(error))
        return judge(status, found, body, request["widget_id"])

    def abort(self) -> None:
        """End the POST that runs in another thread."""
        self._aborted = True
        with suppress(OSError, AttributeError):  # not connected yet, or over by itself
            self._transport.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next POST opens a new one."""
        self._transport.close()

    def _exchange(self, body: str, headers: dict[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        transport = self._transport
        if not transport.is_connected:  # never opened, or closed by the maker while idle
            transport.close()
            transport.timeout = min(CONNECT_TIMEOUT_S, self._maker.deadline_s)
            transport.connect()
        transport.timeout = self._maker.deadline_s
        self._check_deadline()
        transport.request(
            "POST", self._maker.target, body.encode(), _HEADERS | headers, preload_content=False, decode_content=False
        )
        response = transport.getresponse()
        content = response.read(MOST_ANSWER_BYTES + 1)
        self._check_deadline()  # the abort may look like the end of the answer
        if len(content) > MOST_ANSWER_BYTES:
            transport.close()
        return response.status, response.headers, content

    def _check_deadline(self) -> None:
        if self._aborted:
            raise TimeoutError

    def _explain(self, error: Exception) -> str:
        cause = error.__cause__ or error
        if self._aborted or isinstance(cause, TimeoutError | urllib3.exceptions.ReadTimeoutError):
            return f"no answer within {self._maker.deadline_s:g} s"
        return f"{type(cause).__name__}: {getattr(cause, 'strerror', None) or cause}"


_HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": f"itchy-octo-chainsaw/{__version__}",
}


def judge(status: int, headers: Mapping[str, str], body: bytes, widget_id: str) -> Answer:
    """What this answer means for the request that asked for widget_id."""
    content = _json_object(body)
    error = content.get("error")
    reason = error.get("message") if isinstance(error, dict) and isinstance(error.get("code"), str) else None
    retry_after_s = parse_retry_after(headers.get("Retry-After"))
    if status in (200, 201) and str(content.get("id")).lower() == widget_id.lower():
        return Answer("created", None, status)
    if status in REJECTING and isinstance(reason, str):
        return Answer("rejected", None, status, reason)
    if status in UNAVAILABLE:
        return Answer(None, Failure.UNAVAILABLE, status, _reason(reason, status), retry_after_s)
    if status >= 500:  # noqa: PLR2004
        return Answer(None, Failure.FAILED, status, _reason(reason, status), retry_after_s)
    if 300 <= status < 400:  # noqa: PLR2004
        reason = f"redirected (HTTP {status}) to {headers.get('Location')}: not followed"
        return Answer(None, Failure.MISCONFIGURED, status, reason)
    return Answer(None, Failure.MISCONFIGURED, status, f"HTTP {status}, but not as the widget maker answers")


def _reason(reason: JSON, status: int) -> str:
    return f"HTTP {status}: {reason}" if isinstance(reason, str) else f"HTTP {status}"


def parse_retry_after(value: str | None, *, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a Retry-After header asks for (whole seconds or an HTTP date), at most 3,600; None for nonsense."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,10}", value, re.ASCII):
        return min(float(value), LONGEST_RETRY_AFTER_S)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, moment - now()), LONGEST_RETRY_AFTER_S)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body) if len(body) <= MOST_ANSWER_BYTES else None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _checked(url: str) -> Any:
    """The URL's parts; ConfigError says what is wrong with it."""
    try:
        parts = urlsplit(url)
        usable = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.scheme not in ("http", "https") or re.search(r"[\s\x00-\x1f\x7f\\]", url):
        raise ConfigError(f"maker URL {url}: write http://HOST[:PORT]/PATH or https://...")
    if parts.username is not None or parts.fragment:
        raise ConfigError("maker URL: it must hold neither credentials nor a fragment")
    return parts


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
