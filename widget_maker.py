#!/usr/bin/env python3
"""Make widgets: a small web app that validates a request, creates each widget once, and shows what it has made.

POST /widgets {"widget_id": "..."} is answered 201 (created now), 200 (it exists) or with an error, as JSON, and only
after the commit has reached the disk: a request can be repeated without harm.
"""

import json
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import structlog
from flask import render_template, request
from prometheus_client import CollectorRegistry, Counter, disable_created_metrics
from standardwebhooks import WebhookVerificationError
from werkzeug.exceptions import HTTPException

from claim_queues import ConfigError, QueuesError
from claim_queues.cli import Command, configure_logging, logging_options, one_line, run_until_signal, state_path
from claim_queues.pages import Refused, create_app, serve_metrics, serving
from widgets.signing import Signer, load_signer, signing_options
from widgets.store import Origin, Widget, Widgets

MOST_BODY_BYTES, MOST_BATCH_BYTES, PAGE = 65_536, 20 * 65_536, 24
UNITS = (86_400, "d"), (3600, "h"), (60, "min"), (0, "s")
HOST = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9._-]+")
ERROR_HEADERS = {401: {"WWW-Authenticate": "StandardWebhooks"}, 503: {"Retry-After": "1"}}

log = structlog.get_logger()


@dataclass(frozen=True)
class Faults:
    """Faults on purpose. fail_rate: share of valid POSTs answered 500. latency: seconds that valid POSTs have to wait.

    fault_id: the only widget ids that these two affect; empty: all. outage: its start (monotonic) and its seconds.
    """

    fail_rate: float = 0.0
    latency: float = 0.0
    fault_id: Collection[str] = ()
    outage: tuple[float, float] = (0.0, 0.0)

    def is_outage(self) -> bool:
        return 0 <= time.monotonic() - self.outage[0] < self.outage[1]


class Maker:
    """The answer at each path. app: all of them, as a WSGI application.

    hosts: the names it answers to, in lower case, without port. signer: checks each POST's signature; None: no check.
    """

    def __init__(self, widgets: Widgets, faults: Faults, hosts: Collection[str], signer: Signer | None) -> None:
        self._widgets, self._faults, self._signer = widgets, faults, signer
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        counter = partial(Counter, namespace="widget_maker", registry=self._registry)
        self._posts = counter("posts", "Requests", ["outcome"])
        self._refusals = counter("rejections", "Rejected requests", ["code"])
        self._played = counter("faults", "Faults played", ["fault"])
        self.app = app = create_app("widgets", hosts, {"Widget-Maker": "1"})  # so that consumers believe its rejections
        serve_metrics(app, self._registry)
        app.jinja_env.filters["ago"] = ago
        app.jinja_env.globals["chooser"] = lambda widget_id: random.Random(widget_id).choice  # noqa: S311
        app.register_error_handler(HTTPException, self.answer_error)
        app.register_error_handler(QueuesError, self.answer_error)
        app.post("/widgets")(self.create_one)
        app.post("/widgets/batch")(self.create_batch)
        app.get("/widgets")(self.listing)
        app.get("/widgets/<widget_id>")(self.one)
        app.get("/")(self.page)
        app.get("/search")(self.search)
        app.get("/healthz")(self.health)
        app.get("/openapi.json", endpoint="description")(partial(app.send_static_file, "openapi.json"))

    def create_one(self) -> Any:
        content, told = self._read(MOST_BODY_BYTES), request.headers.get
        origin = as_origin(told("Idempotency-Key"), told("X-Message-Receive-Count"), told("X-Message-Age"))
        return self._create([(content, origin)])[0]

    def create_batch(self) -> Any:
        content = self._read(MOST_BATCH_BYTES)
        try:
            batch = {
                item["message_id"]: (item["request"], as_origin(*map(item.get, ("message_id", "receive_count", "age"))))
                for item in content
            }
        except (KeyError, TypeError):
            batch = {}
        if not batch or len(batch) < len(content):  # 421 is no rejection: single requests may come here by mistake
            raise Refused(421, "bad_batch", "a batch is a JSON array of objects with a request and a unique message_id")
        answers = zip(batch, self._create(list(batch.values())), strict=True)
        return {"answers": [{"message_id": id_, "status": status, "body": body} for id_, (body, status) in answers]}

    def listing(self) -> Any:
        page = self._page()
        following = page["after"] - page["limit"]
        return {"widgets": page["widgets"], "next": str(following) if following > 1 else None}

    def page(self) -> str:
        around = {"rates": self._widgets.rates(), "faults": self._faults, "metrics": self._registry.collect()}
        return render_template("widgets.html", **self._page(), **around)

    def search(self) -> str:
        prefix = request.args.get("id", "").strip().lower()
        found = self._widgets.search(prefix, request.args.get("after", ""), PAGE + 1)
        shown = {"searched": one_line(prefix, 80), "widgets": found[:PAGE], "is_more": len(found) > PAGE}
        return render_template("search.html", **shown)

    def one(self, widget_id: str) -> Any:
        widget = self._widgets.find(widget_id.lower())
        if widget is None:
            raise Refused(404, "not_found", f"there is no widget {one_line(widget_id, 80)!r}")
        if not wants_page():
            return widget
        origin, before, after = self._widgets.origin(widget["id"])
        return render_template("widget.html", widget=widget, origin=origin, before=before, after=after)

    def health(self) -> Any:
        self._play_outage()
        self._widgets.check_writing()
        return {"status": "ok"}

    def answer_error(self, error: HTTPException | QueuesError) -> Any:
        if isinstance(error, QueuesError):
            log.error("the widget file cannot be used now", reason=str(error))
            error = Refused(503, "store_unavailable", "the widgets are not available now: try again later")
        answer, status = self._refuse(error)
        page = render_template("error.html", name=error.name, message=error.description) if wants_page() else answer
        return page, status, ERROR_HEADERS.get(status, {})

    def _page(self) -> dict[str, Any]:
        """The page that the current request asks for: up to `limit` widgets numbered below `after`; and their count."""
        count = self._widgets.count()
        after, limit = request.args.get("after") or str(count + 1), request.args.get("limit", str(PAGE))
        if not re.fullmatch("[0-9]{1,19}", after) or not re.fullmatch("[1-9][0-9]?|100", limit):
            raise Refused(400, "bad_parameter", "after must be the `next` of another page, and limit 1 to 100")
        before, most = min(int(after), count + 1), int(limit)
        return {"widgets": self._widgets.page(before, most), "after": before, "limit": most, "count": count}

    def _play_outage(self) -> None:
        if self._faults.is_outage():
            self._played.labels("outage").inc()
            raise Refused(503, "outage", "an outage on purpose: see --outage")

    def _read(self, most_bytes: int) -> Any:
        """The JSON value in the current request's body; raises HTTPException."""
        self._play_outage()
        if request.mimetype != "application/json":  # other web sites cannot send this type through a browser
            raise Refused(415, "unsupported_media_type", "send application/json")
        request.max_content_length = most_bytes
        body = request.get_data()
        try:
            if self._signer:
                self._signer.check(dict(request.headers), body)
            return json.loads(body.decode(), parse_constant=int)  # int() refuses these constants: NaN, Infinity
        except WebhookVerificationError as error:
            advice = "set the clocks" if "timestamp too" in str(error) else "give both the same --signing-secret-file"
            raise Refused(401, "bad_signature", f"Standard Webhooks: {error}: {advice}") from error
        except (ValueError, RecursionError) as error:
            raise Refused(400, "bad_json", f"the body is not JSON: {one_line(error)}") from error

    def _create(self, requests: Sequence[tuple[Any, Origin]]) -> list[tuple[dict[str, Any], int]]:
        """The body and the status of the answer to each request. All widgets are on disk by then, in one commit."""
        found = [parse_request(content) for content, _ in requests]
        only = self._faults.fault_id
        struck = {each for each in found if isinstance(each, str) and (not only or each in only)}
        if struck and self._faults.latency:
            self._played.labels("latency").inc()
            time.sleep(self._faults.latency)
        for number, each in enumerate(found):
            if each in struck and random.random() < self._faults.fail_rate:  # noqa: S311
                self._played.labels("failure").inc()
                found[number] = Refused(500, "failure", "a failure on purpose: see --fail-rate")
        valid = [(each, origin) for each, (_, origin) in zip(found, requests, strict=True) if isinstance(each, str)]
        created = iter(self._widgets.create(valid))
        return [self._refuse(each) if isinstance(each, Refused) else self._show(*next(created)) for each in found]

    def _refuse(self, error: HTTPException) -> tuple[dict[str, Any], int]:
        status, code = error.code or 500, getattr(error, "error_code", error.name.lower().replace(" ", "_"))
        if request.method == "POST" and status < 500:
            self._refusals.labels(code).inc()
        return {"error": {"code": code, "message": error.description}}, status

    def _show(self, widget: Widget, is_new: bool) -> tuple[Widget, int]:
        self._posts.labels("created" if is_new else "repeated").inc()
        return widget, 201 if is_new else 200


def parse_request(content: Any) -> str | Refused:
    """The widget id, in lower case, that a request asks for; or why it is refused."""
    if not isinstance(content, dict):
        return Refused(400, "bad_json", "the body is not a JSON object")
    value: Any = content.get("widget_id")
    with suppress(AttributeError, TypeError, ValueError):
        found = uuid.UUID(value)
        if found.version == 1 and str(found) == value.lower():  # uuid.UUID reads other forms too
            return str(found)
    return Refused(422, "bad_widget_id", f"widget_id {one_line(repr(value), 80)} is not a UUID of version 1")


def as_origin(message: Any, receives: Any, age: Any) -> Origin:
    """What a POST says about its message, where that is fit to be shown."""
    numbers = (int(each) if re.fullmatch("[0-9]{1,9}", str(each)) else None for each in (receives, age))
    return Origin(one_line(message, 200) if message else None, *numbers)


def ago(created_at: str) -> str:
    """How long ago a widget was made, for people."""
    seconds = max(0, time.time() - datetime.fromisoformat(created_at).timestamp())
    size, unit = next((size, unit) for size, unit in UNITS if seconds >= size)
    return f"{seconds // (size or 1):.0f} {unit} ago"


def wants_page() -> bool:
    """Whether the client prefers a page to JSON, as browsers do. One that takes either equally gets JSON."""
    return request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html"


def parse_outage(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, float]:
    start, colon, seconds = value.partition(":")
    if not colon:
        raise click.BadParameter(f"{value!r}: write START:SECONDS, such as 10:30", ctx, param)
    convert: Callable[..., float] = click.FloatRange(0, 1_000_000).convert
    return time.monotonic() + convert(start, param, ctx), convert(seconds, param, ctx)


@click.command(cls=Command, examples=["--port 8080", "--fail-rate 0.2 --outage 10:30"])
@click.option("--host", default="127.0.0.1", help="Address to listen at.")
@click.option("--port", type=click.IntRange(1, 65_535), default=5000, help="Port to listen at.")
@click.option("--database", metavar="FILE", type=Path, help="SQLite file of the widgets.  [default: one of this user]")
@click.option("--allowed-host", metavar="NAME", multiple=True, help="Another name to accept in Host headers.")
@signing_options
@click.option("--fail-rate", type=click.FloatRange(0, 1), default=0.0, help="Fault: share of valid POSTs answered 500.")
@click.option("--latency", type=click.FloatRange(0, 3600), default=0.0, help="Fault: seconds that valid POSTs wait.")
@click.option("--fault-id", metavar="ID", multiple=True, help="Limit these two faults to this widget id.")
@click.option(
    "--outage",
    callback=parse_outage,
    default="0:0",
    metavar="START:SECONDS",
    help="Fault: answer 503 after START s, for SECONDS s.",
)
@logging_options
def cli(host: str, port: int, database: Path | None, allowed_host: Sequence[str], **given: Any) -> None:
    """Serve the widget maker, and a page that shows what it has made, until SIGTERM or Ctrl-C."""
    configure_logging(given["log_format"], given["log_level"])
    name = f"[{host}]" if ":" in host else host
    hosts = [each.lower() for each in (name, *allowed_host)]
    if not all(map(HOST.fullmatch, hosts)):
        raise ConfigError("--host and --allowed-host take host names or addresses without a port")
    if given["fault_id"] and not (given["fail_rate"] or given["latency"]):
        raise ConfigError("--fault-id: there is no fault without --fail-rate or --latency")
    fault_id = [each.lower() for each in given["fault_id"]]
    faults = Faults(given["fail_rate"], given["latency"], fault_id, given["outage"])
    signer = load_signer(given["signing_secret_file"], given["signing_secret_keyring"])
    database = (database or state_path("widgets.sqlite3")).absolute()
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(1):
            widgets.check()

    with closing(Widgets(database)) as widgets:
        maker = Maker(widgets, faults, hosts, signer)
        threads = 64 if faults.latency else 8  # each POST that waits occupies one
        with serving(maker.app, host, port, threads):
            log.info("making widgets", url=f"http://{name}:{port}/", database=str(database))
            run_until_signal(watch, stopped.set)


if __name__ == "__main__":
    cli()
