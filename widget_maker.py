#!/usr/bin/env python3
"""Make widgets: a small web app that checks a request, makes each widget once, and shows what it has made.

POST /widgets {"widget_id": "..."} is answered 201 (made now), 200 (made before) or with an error, as JSON, and only
after the commit has reached the disk: to repeat a request, for whatever reason, does no harm.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

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
from claim_queues.errors import ConfigError, QueuesError
from claim_queues.one_core import stay_on_one_core
from claim_queues.signing import BadSignature, Signer, load_signer, signing_options
from claim_queues.store import state_path
from page import Pages, Total
from widgets import NEWEST, Widgets

MOST_BODY_BYTES = 65_536
MOST_BATCH_BYTES = 20 * MOST_BODY_BYTES
MOST_LEVELS, MOST_KEYS = 32, 64
"""How deep a request may be nested, and how many keys each of its objects may have."""
MOST_HEAD_BYTES = 65_536
MOST_READERS = 256
"""Bodies that are read at once: each takes one of the server's 512 threads, and nothing ends one that stalls."""
MOST_HOSTS_LOGGED = 100
MOST_PER_PAGE = 100
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

    def refused(self, status: int | None, code: str) -> None:
        """Count a refused request, unless it was no mistake of the client's."""
        if status and HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
            self.rejections.labels(code).inc()

    def totals(self) -> list[Total]:
        """What the page shows of them."""
        rejections, faults = _parts(self.rejections), _parts(self.faults)
        return [
            ("Repeated requests", _parts(self.posts).get("repeated", 0), []),
            ("Rejected requests", sum(rejections.values()), sorted(rejections.items())),
            ("Faults played", sum(faults.values()), sorted(faults.items())),
        ]


def _parts(counter: Counter) -> dict[str, int]:
    """How often, by the counter's one label."""
    samples = [sample for metric in counter.collect() for sample in metric.samples]
    return {label.replace("_", " "): int(each.value) for each in samples for label in each.labels.values()}


class Bodies:
    """The bodies of POSTs. signer: only what it has signed is taken; None takes all."""

    def __init__(self, signer: Signer | None) -> None:
        self._signer = signer
        self._readers = threading.BoundedSemaphore(MOST_READERS)

    def read(self, most_bytes: int) -> Any:
        """The JSON value that the current request brings; Refused or RequestEntityTooLarge says what is wrong."""
        check_media_type()
        request.max_content_length = most_bytes + 1  # Flask cuts a body without a Content-Length there, without a word
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
            advice = "give the consumer this maker's --signing-secret-file or -keyring"
            if "timestamp too" in str(error):
                advice = "set the clocks of the consumer's machine and of this one"
            raise Refused(401, "bad_signature", f"Standard Webhooks: {error}: {advice}") from error


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
    """The requests of a batch by message id; Refused says what is wrong with it.

    A single request is not refused as itself would be, or a consumer with this address would take it for rejected.
    """
    if isinstance(content, dict):
        raise Refused(421, "no_batch", "this address takes batches: single requests go to /widgets")
    items = content if isinstance(content, list) else []
    found = {item["message_id"]: item["request"] for item in items if _is_item(item)}
    if not items or len(found) < len(items):
        raise Refused(400, "bad_batch", "a batch is a JSON array of objects with request and an own message_id")
    return found


def _is_item(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("message_id"), str) and "request" in item


def parse_batched(content: Any) -> str:
    """As parse_request, for a request of a batch: refused too if it is too large to be POSTed alone."""
    if len(json.dumps(content)) > MOST_BODY_BYTES:
        raise Refused(413, "request_entity_too_large", f"a request may have {MOST_BODY_BYTES:,} bytes")
    return parse_request(content)


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


class Making:
    """From requests to widgets, with the faults that are played on the way."""

    def __init__(self, widgets: Widgets, faults: Faults, numbers: Numbers) -> None:
        self._widgets = widgets
        self._faults = faults
        self._numbers = numbers

    def make(
        self, contents: Sequence[Any], parse: Callable[[Any], str] = parse_request
    ) -> list[tuple[dict[str, Any], int] | Refused]:
        """What becomes of each request: a widget and its HTTP status, or why not. All are safe on disk at once."""
        found = [_attempt(parse, content) for content in contents]
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


def _attempt(step: Callable[[Any], str], value: Any) -> str | Refused:
    try:
        return step(value)
    except Refused as error:
        return error


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
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    widgets, numbers = Widgets(database), Numbers()
    _guard(app, allowed_hosts)
    _add_post(app, Making(widgets, faults, numbers), Bodies(signer), widgets, numbers)
    _add_views(app, widgets, Pages(app, widgets, faults, numbers.totals), numbers)
    _answer_errors(app, numbers)
    return app


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
        for message_id, answer in zip(batch, making.make(list(batch.values()), parse_batched), strict=True):
            if isinstance(answer, Refused):
                numbers.refused(answer.code, answer.error_code)
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


def _add_views(app: Flask, widgets: Widgets, pages: Pages, numbers: Numbers) -> None:
    @app.get("/")
    def page() -> Any:
        return pages.listed(*parse_page(request.args))

    @app.get("/search")
    def search() -> Any:
        prefix, after = request.args.get("id", "").strip().lower(), request.args.get("after", "")
        if widgets.find(prefix):
            return redirect(url_for("one", widget_id=prefix))
        return pages.found(prefix, after)

    @app.get("/widgets")
    def listing() -> Any:
        found, following = widgets.page(*parse_page(request.args))
        return {"widgets": found, "next": following}

    @app.get("/widgets/<widget_id>")
    def one(widget_id: str) -> Any:
        widget = widgets.find(widget_id.lower())
        if widget is None:
            raise Refused(404, "not_found", f"there is no widget {one_line(widget_id, 80)!r}")
        response = app.make_response(pages.one(widget) if wants_page() else widget)
        response.vary.add("Accept")
        return response

    @app.get("/metrics")
    def metrics() -> Any:
        return Response(generate_latest(numbers.registry), content_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    def description() -> Any:
        return app.send_static_file("openapi.json")


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
        if request.endpoint in ("make_one", "make_batch"):
            numbers.refused(error.code, code)
        if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return response

    @app.errorhandler(QueuesError)
    def answer_store_error(error: QueuesError) -> Any:
        log.error("the widgets cannot be used now", reason=str(error))
        return answer(Refused(503, "store_unavailable", "the widgets cannot be used now: try again later"))


def wants_page() -> bool:
    """Whether the client would rather have a page than JSON, as browsers say; who takes both alike gets JSON."""
    return request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html"


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


def serve(load: Callable[[], Flask], address: str, port: int, told: Mapping[str, Any]) -> None:
    """Serve the application that `load` makes until a signal stops it; `load` is called in the serving process.

    told: what its first line in the log says; a signal after that line stops it in good order.
    """
    # No handlers: Python runs them in the main thread, which does not wake up when the kernel, as it may where
    # signals follow each other closely, gives them to another thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    log.info("making widgets", **told)
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
    stay_on_one_core()
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
    told = {"url": f"http://{host}:{given['port']}/", "database": database}
    serve(partial(_load, log_options, database, faults, allowed_hosts, signer), address, given["port"], told)
    if database.exists():  # it may have been moved away
        with suppress(QueuesError):
            Widgets(database).close()  # who closes it last moves its log into it; the serving process just ends


def main() -> None:
    """Entry point of the command `widget-maker`."""
    run(cli)


if __name__ == "__main__":
    main()
