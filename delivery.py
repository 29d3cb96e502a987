"""Deliver one request to the widget maker, and say what its answer means.

answer of the maker                                     kind           whose fault
201 or 200, JSON naming the same widget id              CREATED
400, 413, 415, 422 with the maker's own JSON error      REJECTED       the request's
any other 5xx                                           FAILED         the message's, unless everything fails
none, 408, 425, 429, 502, 503, 504                      UNAVAILABLE    the maker's, unless others pass
everything else: a redirect, a login, another server    MISCONFIGURED  ours: that is not our maker
"""

import email.utils
import http.client
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
import urllib3

from claim_queues import JSON, ConfigError, QueuesError
from claim_queues.command_line import __version__

CONNECT_TIMEOUT_S = 5.0
MOST_ANSWER_BYTES = 65_536
LONGEST_RETRY_AFTER_S = 3_600.0

REJECTING = frozenset({400, 413, 415, 422})
UNAVAILABLE = frozenset({408, 425, 429, 502, 503, 504})


class Kind(Enum):
    """What an answer means for the request."""

    CREATED = "created"
    REJECTED = "rejected"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    MISCONFIGURED = "misconfigured"


@dataclass(frozen=True, slots=True)
class Answer:
    """status: HTTP status, None without an answer. reason: for people. retry_after_s: as the maker asked, or None."""

    kind: Kind
    status: int | None
    reason: str = ""
    retry_after_s: float | None = None

    @property
    def passed(self) -> bool:
        """The maker did its work for the request, whatever it thought of it."""
        return self.kind in (Kind.CREATED, Kind.REJECTED)


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
        """Say whether the maker's /healthz answers 200."""
        with requests.Session() as session:
            session.trust_env = False
            try:
                answer = session.get(
                    self._health_url,
                    timeout=min(CONNECT_TIMEOUT_S, self.deadline_s),
                    allow_redirects=False,
                    stream=True,
                )
            except requests.RequestException:
                return False
            return bool(answer.status_code == requests.codes.ok)

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
            time.sleep(max(nap, 0.001))
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
            return Answer(Kind.UNAVAILABLE, None, self._explain(error))
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
        transport.request(
            "POST", self._maker.target, body.encode(), _HEADERS | headers, preload_content=False, decode_content=False
        )
        response = transport.getresponse()
        content = response.read(MOST_ANSWER_BYTES + 1)
        if len(content) > MOST_ANSWER_BYTES or self._aborted:
            transport.close()
        return response.status, response.headers, content

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
        return Answer(Kind.CREATED, status)
    if status in REJECTING and isinstance(reason, str):
        return Answer(Kind.REJECTED, status, reason)
    if status in UNAVAILABLE:
        return Answer(Kind.UNAVAILABLE, status, _reason(reason, status), retry_after_s)
    if status >= 500:  # noqa: PLR2004
        return Answer(Kind.FAILED, status, _reason(reason, status), retry_after_s)
    if 300 <= status < 400:  # noqa: PLR2004
        return Answer(
            Kind.MISCONFIGURED, status, f"redirected (HTTP {status}) to {headers.get('Location')}: not followed"
        )
    return Answer(Kind.MISCONFIGURED, status, f"HTTP {status}, but not as the widget maker answers")


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


def backoff(attempt: int, *, base_s: float, longest_s: float, uniform: Callable[[float, float], float]) -> float:
    """Seconds to wait before attempt number attempt + 1: exponential with full jitter."""
    return uniform(0, min(longest_s, base_s * 2.0 ** min(attempt, 32)))


class Breaker:
    """Whether the maker can be trusted with more than a probe.

    It opens when MOST_FAILURES different messages failed in a row, when no answer showed who was to blame for a
    failure, or at once when nothing has ever passed and the maker does not look like ours. Not thread-safe.
    """

    MOST_FAILURES = 10
    FIRST_PAUSE_S = 1.0
    LONGEST_PAUSE_S = 60.0

    def __init__(self, *, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self.is_open = False
        self.row: list[str] = []
        self.last_failed = ""
        self.next_probe_at = 0.0
        self._ever_passed = False
        self._failed_probes = 0

    def passed(self) -> None:
        """The maker did its work for some message: it is well."""
        self.is_open = False
        self._ever_passed = True
        self.row.clear()
        self._failed_probes = 0

    def failed(self, message_id: str, answer: Answer) -> bool:
        """The message failed; True when the breaker has to open now."""
        self.row.append(message_id)
        self.last_failed = message_id
        if self.is_open:
            return False
        strange = answer.kind is Kind.MISCONFIGURED and not self._ever_passed
        return strange or len(set(self.row)) >= self.MOST_FAILURES

    def open(self, answer: Answer, now: float) -> list[str]:
        """Open, or stay open after a failed probe; returns the messages that failed since the maker was well."""
        self.is_open = True
        pause = backoff(
            self._failed_probes, base_s=self.FIRST_PAUSE_S, longest_s=self.LONGEST_PAUSE_S, uniform=self._uniform
        )
        self._failed_probes += 1
        self.next_probe_at = now + max(pause, answer.retry_after_s or 0)
        row, self.row = self.row, []
        return row


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
