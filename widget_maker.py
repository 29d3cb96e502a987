#!/usr/bin/env python3
"""Make widgets: a small web app that checks a request, makes each widget once, and shows what it has made.

POST /widgets {"widget_id": "..."} is answered 201 (made now), 200 (made before) or with an error, as JSON, and only
after the commit has reached the disk: to repeat a request, for whatever reason, does no harm.
"""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import threading
import time
import uuid
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from hashlib import blake2b
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import click
from flask import Flask, Response, redirect, render_template, request, url_for
from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, disable_created_metrics, generate_latest
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from claim_queues.command_line import (
    SETTINGS,
    Log,
    Number,
    WholeNumber,
    __version__,
    configure_logging,
    one_line,
    option,
    run,
)
from claim_queues.errors import ConfigError, QueuesError, QueueUnavailable
from claim_queues.signing import BadSignature, Signer, load_signer, signing_options
from claim_queues.store import BUSY_TIMEOUT_S, open_store, state_path, store_errors, transaction

APPLICATION_ID, SCHEMA_VERSION = 0x57444754, 1
SCHEMA = "CREATE TABLE widget (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL) STRICT"
INSERT = "INSERT INTO widget (id, created_at) VALUES (?, ?) ON CONFLICT DO NOTHING RETURNING id, created_at"
SELECT = "SELECT id, created_at FROM widget WHERE id = ?"
SELECT_PAGE = "SELECT id, created_at, number FROM widget WHERE number < ? ORDER BY number DESC LIMIT ?"
SELECT_FOUND = "SELECT id, created_at FROM widget WHERE id > ? AND id < ? ORDER BY id LIMIT ?"
SELECT_TIME = "SELECT created_at FROM widget WHERE number >= ? ORDER BY number LIMIT 1"
NEWEST = 2**63 - 1

MOST_BODY_BYTES = 65_536
MOST_BATCH_BYTES = 20 * MOST_BODY_BYTES
MOST_LEVELS, MOST_KEYS = 32, 64
"""How deep a request may be nested, and how many keys each of its objects may have."""
MOST_HEAD_BYTES = 65_536
MOST_READERS = 256
"""Bodies that are read at once: each takes one of the server's 512 threads, and nothing ends one that stalls."""
MOST_HOSTS_LOGGED = 100
MOST_PER_PAGE = 100
FOUND_PER_PAGE = 20
BUCKET_S, BUCKETS = 5, 60
RATE_S = 10
RETRY_AFTER_S = 1
LONGEST_STOP_S = 1
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]*)?")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-([0-9a-f])[0-9a-f]{3}-([0-9a-f])[0-9a-f]{3}-[0-9a-f]{12}", re.I)
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

log = Log("widget_maker")


class CannotServe(QueuesError):
    """Nothing can be served at that address, or serving ended by itself."""


class Refused(HTTPException):
    """The request is answered with this status and, as JSON, this error code and message."""

    def __init__(self, status: int, error_code: str, message: str) -> None:
        super().__init__(message)
        self.code = status
        self.error_code = error_code


def error_body(code: str, message: str | None) -> dict[str, Any]:
    """What the body of every error holds."""
    return {"error": {"code": code, "message": message}}


def _attempt(step: Callable[[Any], str], value: Any) -> str | Refused:
    try:
        return step(value)
    except Refused as error:
        return error


@dataclass(eq=False, slots=True)
class Wish:
    """Ids of widgets to make; made: what became of each, None until it is safe on disk."""

    widget_ids: Sequence[str]
    made: list[tuple[dict[str, Any], bool]] | None = None


class Widgets:
    """The widgets of one SQLite file, each a dict of `id` and `created_at` (ISO 8601, UTC); thread-safe.

    Every method raises StoreError or QueueUnavailable where the file cannot be used now.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wishes: deque[Wish] = deque()
        # Two connections: one can look at the widgets while a POST waits for the disk or for another process.
        self._writer, self._reader = (
            (open_store(path, application_id=APPLICATION_ID, version=SCHEMA_VERSION, schema=SCHEMA), threading.Lock())
            for _ in range(2)
        )

    def make(self, widget_ids: Sequence[str]) -> list[tuple[dict[str, Any], bool]]:
        """For each id its widget, safe on disk, and whether it was made now.

        What others ask for while one waits for the disk goes into the next transaction together: one sync for all.
        """
        wish = Wish(widget_ids)
        self._wishes.append(wish)
        with self._using(*self._writer) as connection:
            if wish.made is None:
                wishes = [self._wishes.popleft() for _ in range(len(self._wishes))]
                try:
                    with transaction(connection):
                        found = [[_make(connection, widget_id) for widget_id in each.widget_ids] for each in wishes]
                except BaseException:
                    self._wishes.extend(each for each in wishes if each is not wish)  # each fails by itself
                    raise
                for each, made in zip(wishes, found, strict=True):
                    each.made = made
        return wish.made or []

    def find(self, widget_id: str) -> dict[str, Any] | None:
        """The widget of that id, or None."""
        with self._using(*self._reader) as connection:
            found = connection.execute(SELECT, (widget_id,)).fetchall()
        return _widget(found[0]) if found else None

    def page(self, after: int, limit: int) -> tuple[list[dict[str, Any]], str | None]:
        """Up to `limit` widgets behind the marker `after`, newest first, and the next marker (None: no more)."""
        with self._using(*self._reader) as connection:
            rows = connection.execute(SELECT_PAGE, (after, limit + 1)).fetchall()
        return [_widget(row) for row in rows[:limit]], str(rows[limit - 1][2]) if len(rows) > limit else None

    def search(self, prefix: str, after: str, limit: int) -> tuple[list[dict[str, Any]], str | None]:
        """Up to `limit` widgets whose ids begin with `prefix`, behind the id `after`, and the next such id.

        The prefix is no whole id: that one `find` finds.
        """
        with self._using(*self._reader) as connection:
            found = connection.execute(SELECT_FOUND, (max(prefix, after), prefix + "g", limit + 1)).fetchall()
        return [_widget(row) for row in found[:limit]], str(found[limit - 1][0]) if len(found) > limit else None

    def made_before(self, moment: datetime) -> int:
        """How many widgets were made before a moment that is over.

        Times rise with the numbers (until a clock is set back), so it is found by bisection: an index of times would
        cost every POST.
        """
        with self._using(*self._reader) as connection:
            numbers = range(1, 1 + connection.execute("SELECT coalesce(max(number), 0) FROM widget").get)
            return bisect_left(numbers, _iso(moment), key=lambda n: connection.execute(SELECT_TIME, (n,)).get)

    def count(self) -> int:
        """How many there are."""
        with self._using(*self._reader) as connection:
            # None is ever deleted, so the last number is the count; counting would read all of them.
            return int(connection.execute("SELECT coalesce(max(number), 0) FROM widget").get)

    def check(self) -> None:
        """Write to the file and sync it: reading alone would work on a full disk too."""
        with self._using(*self._writer) as connection:
            connection.pragma("user_version", SCHEMA_VERSION)

    def close(self) -> None:
        for connection, _ in (self._writer, self._reader):
            connection.close()

    @contextmanager
    def _using(self, connection: apsw.Connection, lock: threading.Lock) -> Iterator[apsw.Connection]:
        if not lock.acquire(timeout=BUSY_TIMEOUT_S):
            raise QueueUnavailable(f"{self._path}: others waited for it for {BUSY_TIMEOUT_S:.0f} s")
        try:
            with store_errors(self._path):
                yield connection
        finally:
            lock.release()


def _make(connection: apsw.Connection, widget_id: str) -> tuple[dict[str, Any], bool]:
    new = connection.execute(INSERT, (widget_id, _iso(datetime.now(UTC)))).fetchall()
    found = new or connection.execute(SELECT, (widget_id,)).fetchall()
    return _widget(found[0]), bool(new)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _widget(row: Sequence[Any]) -> dict[str, Any]:
    return {"id": row[0], "created_at": row[1]}


@dataclass(frozen=True)
class Faults:
    """What goes wrong on purpose, to try the rest.

    fail_rate: share of valid POSTs that are answered 500. latency_s: seconds before a valid POST is answered.
    ids: the widget ids, in lower case, that these two strike; empty means all.
    outage: when it starts, in seconds after `started`, and for how many seconds.
    """

    fail_rate: float = 0.0
    latency_s: float = 0.0
    ids: frozenset[str] = frozenset()
    outage: tuple[float, float] = (0.0, 0.0)
    started: float = field(default_factory=time.monotonic)
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = random.random
    sleep: Callable[[float], None] = time.sleep

    def is_outage(self) -> bool:
        start, seconds = self.outage
        return start <= self.clock() - self.started < start + seconds

    def strike(self, widget_id: str) -> bool:
        return not self.ids or widget_id in self.ids


NO_FAULTS = Faults()


class Numbers:
    """What happened since the start, for Prometheus."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="widget_maker", registry=self.registry)
        self.posts = counter("posts", "POSTs answered with a widget, created or repeated.", ["outcome"])
        self.rejections = counter("rejections", "Requests for widgets refused for a mistake of the client's.", ["code"])
        self.faults = counter("faults", "Faults played on purpose.", ["fault"])


class Bodies:
    """The bodies of POSTs. signer: only what it has signed is taken; None takes all."""

    def __init__(self, signer: Signer | None) -> None:
        self._signer = signer
        self._readers = threading.BoundedSemaphore(MOST_READERS)

    def read(self, most_bytes: int) -> Any:
        """The JSON value that the current request brings; Refused or RequestEntityTooLarge says what is wrong."""
        check_media_type()
        request.max_content_length = most_bytes + 1
        if not self._readers.acquire(blocking=False):
            raise Refused(503, "busy", "too many bodies are on their way: try again later")
        try:
            body = request.get_data(cache=False)
        finally:
            self._readers.release()
        if len(body) > most_bytes:
            raise RequestEntityTooLarge(f"a request may have {most_bytes:,} bytes")
        if request.content_length not in (None, len(body)):
            raise Refused(400, "bad_body", "the body is shorter than its Content-Length")
        self._check_signature(body)
        return parse_json(body)

    def _check_signature(self, body: bytes) -> None:
        if self._signer is None:
            return
        try:
            self._signer.check(dict(request.headers), body)
        except BadSignature as error:
            what = f"Standard Webhooks: {error}: give the consumer this maker's --signing-secret-file or -keyring"
            raise Refused(401, "bad_signature", what) from error


class Making:
    """From requests to widgets, with the faults that are played on the way."""

    def __init__(self, widgets: Widgets, faults: Faults, numbers: Numbers) -> None:
        self._widgets = widgets
        self._faults = faults
        self._numbers = numbers

    def make(self, contents: Sequence[Any]) -> list[tuple[dict[str, Any], int] | Refused]:
        """What becomes of each request: a widget and its HTTP status, or why not. All are safe on disk at once."""
        found = [_attempt(parse_request, content) for content in contents]
        self._play_latency([each for each in found if isinstance(each, str)])
        found = [_attempt(self._play_failure, each) if isinstance(each, str) else each for each in found]
        accepted = [each for each in found if isinstance(each, str)]
        made = iter(self._widgets.make(accepted) if accepted else ())
        return [each if isinstance(each, Refused) else self._answer(*next(made)) for each in found]

    def play_outage(self) -> None:
        if self._faults.is_outage():
            self._numbers.faults.labels("outage").inc()
            raise Refused(503, "outage", "an outage, as --outage asks")

    def _play_latency(self, widget_ids: Sequence[str]) -> None:
        if self._faults.latency_s and any(map(self._faults.strike, widget_ids)):
            self._numbers.faults.labels("latency").inc()
            self._faults.sleep(self._faults.latency_s)

    def _play_failure(self, widget_id: str) -> str:
        if self._faults.strike(widget_id) and self._faults.random() < self._faults.fail_rate:
            self._numbers.faults.labels("failure").inc()
            raise Refused(500, "failure", "a failure, as --fail-rate asks")
        return widget_id

    def _answer(self, widget: dict[str, Any], is_new: bool) -> tuple[dict[str, Any], int]:
        self._numbers.posts.labels("created" if is_new else "repeated").inc()
        return widget, 201 if is_new else 200


def create_app(
    database: Path,
    faults: Faults = NO_FAULTS,
    allowed_hosts: Collection[str] = LOCAL_HOSTS,
    signer: Signer | None = None,
) -> Flask:
    """The maker as a WSGI application.

    allowed_hosts: names in lower case, without port, to answer to. signer: only what it has signed is made.
    Raises StoreError or QueueUnavailable where the database cannot be used.
    """
    app = Flask(__name__)
    # One byte more: Flask cuts a body without a Content-Length there, without a word.
    app.config.update(MAX_CONTENT_LENGTH=MOST_BODY_BYTES + 1, PROVIDE_AUTOMATIC_OPTIONS=False)
    widgets, numbers = Widgets(database), Numbers()
    _guard(app, allowed_hosts)
    _answer_errors(app, numbers)
    _add_post(app, Making(widgets, faults, numbers), Bodies(signer), widgets, numbers)
    _add_views(app, widgets, numbers)
    _add_pages(app, widgets, faults, numbers)
    return app


def _guard(app: Flask, allowed_hosts: Collection[str]) -> None:
    """Keep other web sites out: none may write here through a browser, or read here under a name of its own."""
    logged: set[str] = set()

    def refuse(host: str) -> Refused:
        if host not in logged and len(logged) < MOST_HOSTS_LOGGED:
            logged.add(host)
            log.warning("asked by a name that is none of its own: --allowed-host adds one", host=host)
        return Refused(421, "host_not_allowed", f"Host {host!r} is no name of this maker: its --allowed-host adds one")

    @app.before_request
    def check_host_and_origin() -> None:
        host = request.headers.get("Host", "").lower()
        name = HOST.fullmatch(host)
        if not name or name[1] not in allowed_hosts:
            raise refuse(one_line(host, 80))
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("Origin")
            is_foreign = origin is not None and origin.lower().partition("://")[2] != host
            if is_foreign or request.headers.get("Sec-Fetch-Site") == "cross-site":
                raise Refused(403, "cross_site", "other web sites may not write here")

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(SECURITY_HEADERS)
        return response


def _answer_errors(app: Flask, numbers: Numbers) -> None:
    @app.errorhandler(HTTPException)
    def answer(error: HTTPException) -> Any:
        response = error.get_response()
        code = error.error_code if isinstance(error, Refused) else error.name.lower().replace(" ", "_")
        if wants_page():
            response.data = render_template("error.html", name=error.name, message=error.description)
        else:
            response.data = json.dumps(error_body(code, error.description))
            response.content_type = "application/json"
        response.vary.add("Accept")
        if error.code == HTTPStatus.UNAUTHORIZED:
            response.headers["WWW-Authenticate"] = "StandardWebhooks"
        if response.status.startswith("4") and request.endpoint in ("make_one", "make_batch"):
            numbers.rejections.labels(code).inc()
        elif response.status.startswith("503"):
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return response

    @app.errorhandler(QueuesError)
    def answer_store_error(error: QueuesError) -> Any:
        log.error("the widgets cannot be used now", reason=str(error))
        return answer(Refused(503, "store_unavailable", "the widgets cannot be used now: try again later"))


def _add_post(app: Flask, making: Making, bodies: Bodies, widgets: Widgets, numbers: Numbers) -> None:
    @app.post("/widgets")
    def make_one() -> Any:
        making.play_outage()
        (answer,) = making.make([bodies.read(MOST_BODY_BYTES)])
        if isinstance(answer, Refused):
            raise answer
        return answer

    @app.post("/widgets/batch")
    def make_batch() -> Any:
        making.play_outage()
        batch = parse_batch(bodies.read(MOST_BATCH_BYTES))
        answers = []
        for message_id, answer in zip(batch, making.make(list(batch.values())), strict=True):
            if isinstance(answer, Refused):
                numbers.rejections.labels(answer.error_code).inc()
                body, status = error_body(answer.error_code, answer.description), answer.code
            else:
                body, status = answer
            answers.append({"message_id": message_id, "status": status, "body": body})
        return {"answers": answers}

    @app.get("/healthz")
    def health() -> Any:
        making.play_outage()
        widgets.check()
        return {"status": "ok"}


def _add_views(app: Flask, widgets: Widgets, numbers: Numbers) -> None:
    @app.get("/widgets")
    def listing() -> Any:
        found, following = widgets.page(*parse_page(request.args))
        return {"widgets": found, "next": following}

    @app.get("/widgets/<widget_id>")
    def one(widget_id: str) -> Any:
        widget = widgets.find(widget_id.lower())
        if widget is None:
            raise Refused(404, "not_found", f"there is no widget {one_line(widget_id, 80)!r}")
        response = app.make_response(
            render_template("widget.html", widget=widget, origin=read_id(widget["id"])) if wants_page() else widget
        )
        response.vary.add("Accept")
        return response

    @app.get("/metrics")
    def metrics() -> Any:
        return Response(generate_latest(numbers.registry), content_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    def description() -> Any:
        return app.send_static_file("openapi.json")


def _add_pages(app: Flask, widgets: Widgets, faults: Faults, numbers: Numbers) -> None:
    app.jinja_env.globals["chooser"] = chooser
    made_before = lru_cache(maxsize=2 * BUCKETS)(widgets.made_before)  # most moments are asked for each second

    @app.get("/")
    def page() -> Any:
        after, limit = parse_page(request.args)
        found, following = widgets.page(after, limit)
        count = widgets.count()
        shown = {"widgets": found, "count": count, "limit": limit, "pages": _pages(after, limit, count, following)}
        if after <= count:
            return render_template("widgets.html", last=after - 1, **shown)
        totals = [
            ("Widgets", count, []),
            ("Repeated requests", *_total(numbers.posts, "outcome", "repeated")),
            ("Rejected requests", *_total(numbers.rejections, "code")),
            ("Faults played", *_total(numbers.faults, "fault")),
        ]
        return render_template(
            "widgets.html", is_first=True, totals=totals, faults=faults, **measure_rates(made_before), **shown
        )

    @app.get("/search")
    def search() -> Any:
        prefix, after = request.args.get("id", "").strip().lower(), request.args.get("after", "")
        if widgets.find(prefix):
            return redirect(url_for("one", widget_id=prefix))
        found, following = widgets.search(prefix, after, FOUND_PER_PAGE)
        return render_template("search.html", searched=one_line(prefix, 80), widgets=found, following=following)


def wants_page() -> bool:
    """Whether the client would rather have a page than JSON, as browsers say; who takes both alike gets JSON."""
    return request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html"


def measure_rates(made_before: Callable[[datetime], int]) -> dict[str, Any]:
    """Widgets per second: rate, over the last RATE_S; rates, for each of the last BUCKETS of BUCKET_S, oldest first."""
    now = datetime.now(UTC)
    end = now.timestamp() // BUCKET_S * BUCKET_S
    ends = [datetime.fromtimestamp(end - BUCKET_S * ago, UTC) for ago in reversed(range(BUCKETS + 1))]
    rates = [(after - before) / BUCKET_S for before, after in pairwise(map(made_before, ends))]
    return {
        "rate": (made_before(now) - made_before(now - timedelta(seconds=RATE_S))) / RATE_S,
        "rate_s": RATE_S,
        "rates": rates,
        "top": round_up(max(rates)),
        "minutes": BUCKETS * BUCKET_S // 60,
    }


def round_up(number: float) -> float:
    """The next number that is 1, 2 or 5 times a power of ten; 1 for 0."""
    power: float = 10.0 ** math.floor(math.log10(number or 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


def read_id(widget_id: str) -> dict[str, Any]:
    """What a UUID of version 1 says of its origin: made_at (ISO 8601, UTC), node, is_random (node), clock_sequence."""
    found = uuid.UUID(widget_id)
    made_at = datetime(1582, 10, 15, tzinfo=UTC) + timedelta(microseconds=found.time // 10)
    return {
        "made_at": made_at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "node": found.node.to_bytes(6).hex(":"),
        "is_random": bool(found.node >> 40 & 1),
        "clock_sequence": found.clock_seq,
    }


def chooser(widget_id: str) -> Callable[[Sequence[Any]], Any]:
    """A function that chooses from its options, each time anew, and for the same widget always the same."""
    bits = int.from_bytes(blake2b(widget_id.encode(), digest_size=16).digest())

    def choose(options: Sequence[Any]) -> Any:
        nonlocal bits
        bits, which = divmod(bits, len(options))
        return options[which]

    return choose


def _pages(after: int, limit: int, count: int, following: str | None) -> list[tuple[str, int | str | None]]:
    """The pages that one can go to from the one behind `after`: name and marker (None: the first)."""
    found: list[tuple[str, int | str | None]] = []
    if after <= count:
        found += [("Newest", None), ("Newer", after + limit if after + limit <= count else None)]
    if following:
        found += [("Older", following), ("Oldest", limit + 1)]
    return found


def _total(counter: Counter, label: str, value: str | None = None) -> tuple[int, list[tuple[str, int]]]:
    """The sum of a counter and its parts by that label."""
    samples = [sample for metric in counter.collect() for sample in metric.samples]
    parts = {sample.labels[label]: int(sample.value) for sample in samples}
    if value:
        return parts.get(value, 0), []
    return sum(parts.values()), [(name.replace("_", " "), often) for name, often in sorted(parts.items())]


def check_media_type() -> None:
    """Refuse the current request unless its body is plain JSON in UTF-8, which no web form can send."""
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if request.mimetype != "application/json" or charset not in ("utf-8", "utf8"):
        raise Refused(415, "unsupported_media_type", "send Content-Type: application/json, in UTF-8")
    if "Content-Encoding" in request.headers:
        raise Refused(415, "unsupported_media_type", "send the body without Content-Encoding")


def parse_json(body: bytes) -> Any:
    """The JSON value of a body; Refused says what is wrong with it."""
    try:
        content = json.loads(body.decode(), object_pairs_hook=_object)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # Python reads NaN and lone surrogates too
    except (ValueError, RecursionError) as error:
        raise Refused(400, "bad_json", f"the body is no JSON: {one_line(error)}") from error
    return content


def parse_request(content: Any) -> str:
    """The widget id, in lower case, that a request asks for; Refused says what is wrong with it."""
    if not isinstance(content, dict):
        raise Refused(400, "bad_json", "the body is no JSON object")
    if "widget_id" not in content:
        raise Refused(422, "bad_widget_id", "widget_id is missing")
    check_nesting(content)
    return parse_widget_id(content["widget_id"])


def check_nesting(content: Any) -> None:
    """Refuse what is nested too deep or has an object with too many keys."""
    level = [content]
    for _ in range(MOST_LEVELS):
        objects = [value for value in level if isinstance(value, dict)]
        if any(len(value) > MOST_KEYS for value in objects):
            raise Refused(422, "too_complex", f"an object has more than {MOST_KEYS} keys")
        inner: list[Any] = [value for value in level if isinstance(value, list)]
        inner += [value.values() for value in objects]
        level = [value for values in inner for value in values]
        if not level:
            return
    raise Refused(422, "too_complex", f"it is nested more than {MOST_LEVELS} levels deep")


def parse_batch(content: Any) -> dict[str, Any]:
    """The requests of a batch by message id; Refused says what is wrong with it."""
    items = content if isinstance(content, list) else []
    found = {item["message_id"]: item["request"] for item in items if _is_item(item)}
    if not items or len(found) < len(items):
        raise Refused(400, "bad_batch", "a batch is a JSON array of objects with request and an own message_id")
    return found


def _is_item(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("message_id"), str) and "request" in item


def parse_widget_id(value: object) -> str:
    """The widget id in lower case, a canonical UUID of version 1; Refused says what is wrong with it."""
    if not isinstance(value, str):
        raise Refused(422, "bad_widget_id", "widget_id must be a string")
    parts = UUID.fullmatch(value)
    if not parts:
        problem = "is no UUID: 8-4-4-4-12 hexadecimal digits"
    elif parts[2].lower() not in "89ab":
        problem = "is no RFC 4122 UUID: its fourth group must begin with 8, 9, a or b"
    elif parts[1] != "1":
        problem = f"is a UUID of version {parts[1]}: version 1 is needed"
    else:
        return value.lower()
    raise Refused(422, "bad_widget_id", f"widget_id {one_line(value, 80)!r} {problem}")


def parse_page(arguments: Mapping[str, str]) -> tuple[int, int]:
    """The marker and the number of widgets that a query asks for; Refused says what is wrong with it."""
    after, limit = arguments.get("after") or str(NEWEST), arguments.get("limit", "20")
    if not re.fullmatch(r"[0-9]{1,19}", after) or int(after) > NEWEST:
        raise Refused(400, "bad_parameter", "after must be what another page gave as next")
    if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= MOST_PER_PAGE:
        raise Refused(400, "bad_parameter", f"limit must be a whole number from 1 to {MOST_PER_PAGE}")
    return int(after), int(limit)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def check_host_name(name: str) -> str:
    """The name in lower case; ConfigError where no Host header could hold it, or with a port."""
    found = HOST.fullmatch(name.lower())
    if not found or found[2]:
        raise ConfigError(f"{name!r} is no host name or address without a port")
    return found[1]


def find_address(host: str, port: int) -> str:
    """The host's IP address; CannotServe where its port is taken or not to be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:  # granian itself would share the port with another maker
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise CannotServe(f"cannot listen at {host} port {port}: {error.strerror}") from error
    return str(address[0])


def serve(load: Callable[[], Flask], address: str, port: int) -> None:
    """Serve the application that `load` makes until a signal stops it; `load` is called in the serving process."""
    # No handlers: Python runs them in the main thread, which does not wake up when the kernel, as it may where
    # signals follow each other closely, gives them to another thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    server = Granian(
        "widget_maker",
        address=address,
        port=port,
        interface=Interfaces.WSGI,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(max_buffer_size=MOST_HEAD_BYTES),
        websockets=False,
        workers_kill_timeout=LONGEST_STOP_S,
        log_level=LogLevels.error,
        log_dictconfig={"loggers": {"_granian": {"propagate": True}}},
    )

    def stop_on_signal() -> None:
        signal.sigwait(STOP_SIGNALS)
        server.interrupt_signal = True
        server.main_loop_interrupt.set()

    threading.Thread(target=stop_on_signal, name="signals", daemon=True).start()
    try:
        server.serve(target_loader=load, wrap_loader=False)
    except SystemExit as error:
        if not server.interrupt_signal:
            raise CannotServe("serving ended by itself: the log above says why") from error


def _load(log_options: tuple[str, str], *app_options: Any) -> Flask:
    """Called in the serving process, which its parent stops by SIGTERM; Ctrl-C and SIGHUP are for the parent."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    configure_logging(*log_options)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    return create_app(*app_options)


def _end_with_parent() -> None:
    """A parent that was killed stops nobody."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


class OutageType(click.ParamType[tuple[float, float]]):
    """START:SECONDS, two decimal numbers."""

    name = "outage"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        start, colon, seconds = value.partition(":")
        if not colon:
            self.fail(f"{value!r} is not START:SECONDS, such as 10:30.", param, ctx)
        number = Number(0, 1_000_000, "seconds")
        return number.convert(start, param, ctx), number.convert(seconds, param, ctx)


@click.command(context_settings=SETTINGS)
@option("--host", default="127.0.0.1", help="Address to listen at.")
@option("--port", type=WholeNumber(1, 65_535), default=5000, help="Port to listen at.")
@option("--database", metavar="FILE", help="SQLite file of the widgets.  [default: one file per user]")
@option("--allowed-host", metavar="NAME", multiple=True, help="Another name to answer to in a Host header.")
@signing_options
@option("--fail-rate", type=Number(0, 1), default=0.0, help="Fault: the share of valid POSTs to answer 500.")
@option("--latency", type=Number(0, 3600, "seconds"), default=0.0, help="Fault: seconds before a valid POST's answer.")
@option("--fault-id", metavar="ID", multiple=True, help="Let these two faults strike only this widget id.")
@option("--outage", type=OutageType(), metavar="START:SECONDS", help="Fault: from START, answer 503 for SECONDS.")
@option("--log-format", type=click.Choice(["text", "json"]), default="text", help="Form of the log on stderr.")
@option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", help="Least level logged."
)
@click.version_option(__version__)
def cli(**given: Any) -> None:
    """Serve the widget maker, and a page that shows what it has made.

    Runs until SIGTERM or Ctrl-C.
    Exit codes: 0 stopped, 1 failed, 2 usage, 4 credentials, 5 the database cannot be used.
    """
    log_options = given["log_format"], given["log_level"]
    configure_logging(*log_options)
    faults = Faults(
        fail_rate=given["fail_rate"],
        latency_s=given["latency"],
        ids=frozenset(map(str.lower, given["fault_id"])),
        outage=given["outage"] or (0.0, 0.0),
    )
    host = f"[{given['host']}]" if ":" in given["host"] else given["host"]
    allowed_hosts = {*LOCAL_HOSTS, *map(check_host_name, [host, *given["allowed_host"]])}
    signer = load_signer(given["signing_secret_file"], given["signing_secret_keyring"])
    database = Path(given["database"]).absolute() if given["database"] else state_path("widgets.sqlite3")
    Widgets(database).close()  # what is wrong with it shows here, before anything is served
    address = find_address(given["host"], given["port"])
    log.info("making widgets", url=f"http://{host}:{given['port']}/", database=database)
    serve(partial(_load, log_options, database, faults, allowed_hosts, signer), address, given["port"])


def main() -> None:
    """Entry point of the command `widget-maker`."""
    run(cli)


if __name__ == "__main__":
    main()
