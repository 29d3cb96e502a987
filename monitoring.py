"""What a running consumer tells of itself: metrics for Prometheus, its health, a page and a line for people.

It reads what the consumer keeps anyway, when it is asked: messages cost no more for it.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from claim_queues import ConfigError, Queues, Stats
from claim_queues.breaker import Failure
from claim_queues.fresh import Fresh
from claim_queues.terminal import Rate, clock_time
from delivery import OUTCOMES, Durations, Maker

if TYPE_CHECKING:
    from widget_consumer import Consumer

PATIENCE_S = 2.0
"""How long a request here waits for the queue service or the maker; Prometheus itself waits for 10 s."""
LINE_PATIENCE_S = 1.0
"""How long the line on the terminal stands still for a queue service that does not tell how much is queued."""
LOCAL_HOSTS = ("127.0.0.1", "localhost")
JSON_TYPE, HTML_TYPE = "application/json", "text/html; charset=utf-8"
STYLE = "body{font:16px/1.5 sans-serif;margin:2rem auto;max-width:40rem}th{text-align:left;padding-right:2rem}"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

PREFIX = "widget_consumer_"
BREAKER_STATES = ("closed", *(failure.value for failure in Failure))
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="5">
<title>Widget consumer: {state}</title>
<link rel="stylesheet" href="/style.css">
<h1>Widget consumer: {state}</h1>
<table>{table}</table>
<p><a href="/metrics">metrics</a> <a href="/healthz">healthz</a> <a href="/readyz">readyz</a></p>
</html>
"""

Answer = tuple[HTTPStatus, str, str]
"""Status, content type, content."""


class Monitor(Collector):
    """The consumer's numbers and health.

    queues: of the same service, for looks at its queues alone. names: of the queues to look at, by kind, `request`
    among them.
    """

    def __init__(self, consumer: "Consumer", maker: Maker, queues: Queues, names: Mapping[str, str]) -> None:
        self._consumer = consumer
        self._maker = maker
        self._queues = queues
        self._depths = {kind: Fresh(lambda name=name: queues.stats(name)) for kind, name in names.items()}  # type: ignore[misc]
        self._health = Fresh(maker.is_healthy)
        self._rate = Rate()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def answer(self, path: str) -> Answer | None:
        """What a GET of the path is answered; None for an unknown one."""
        pages: dict[str, Callable[[], Answer]] = {
            "/metrics": self._metrics,
            "/healthz": self._alive,
            "/readyz": self._ready,
            "/": self._page,
            "/style.css": lambda: (HTTPStatus.OK, "text/css", STYLE),
        }
        page = pages.get(path)
        return page and page()

    def status_line(self) -> str:
        """What a terminal shows of the consumer at work, in less than 80 columns.

        An open breaker, the rate, POSTs in flight, messages in the queue and the time that they need, outcomes.
        """
        totals, trouble = Counter(self._consumer.totals), self._consumer.maker_trouble
        rate = self._rate.per_second(sum(totals[outcome] for outcome in OUTCOMES))
        try:
            depth = self._depths["request"].get(LINE_PATIENCE_S).total
            queued = f"{depth:,} queued" + (f" {clock_time(depth / rate)}" if depth and rate >= 1 else "")
        except Exception:  # the log says what is wrong with the service
            queued = "? queued"
        words = [f"maker {trouble.value}"] if trouble else []
        words += [f"{rate:,.0f}/s", f"{self._consumer.status()['posting']} in flight", queued]
        words += [f"{totals[outcome]:,} {outcome}" for outcome in OUTCOMES if totals[outcome]]
        return "  ".join(words)

    def collect(self) -> Iterator[Metric]:
        """The metrics, for the registry."""
        totals, status = Counter(self._consumer.totals), self._consumer.status()
        yield _counter("receives", "Messages claimed.", totals["received"])
        yield _counter("redeliveries", "Messages claimed that had been received before.", totals["redelivered"])
        outcomes = {outcome: totals[outcome] for outcome in OUTCOMES}
        yield _counter("outcomes", "Messages with an outcome; failed ones are dead letters.", outcomes, "outcome")
        returns = {"failed": totals["retried"], "excused": totals["excused"]}
        yield _counter("returns", "Messages given back, failed or excused because nobody tried them.", returns, "why")
        yield _counter("claims_lost", "Messages whose claim ended before they were settled.", totals["lost"])
        yield _gauge("claims_held", "Claims that hold messages.", status["claims"])
        messages = {state: status[state] for state in ("held", "waiting", "posting")}
        yield _gauge("messages", "Messages held; of these, waiting for a slot and being POSTed.", messages, "state")
        yield _gauge("slots_busy", "Slots that POST.", status["busy_slots"])
        trouble = self._consumer.maker_trouble
        states = {state: int(state == (trouble.value if trouble else "closed")) for state in BREAKER_STATES}
        yield _gauge("breaker_state", "1 for the breaker's state: closed, or what it is open for.", states, "state")
        yield self._post_times()
        yield from self._queue_depths()
        requests = Counter(self._consumer.requests) + Counter(self._queues.requests)
        yield _counter("queue_requests", "Requests sent to the queue service.", requests, "operation")

    def _post_times(self) -> Metric:
        times = self._consumer.post_times
        counts, seconds = times.counts[:], times.seconds
        bounds = [*map(str, Durations.BOUNDS_S), "+Inf"]
        cumulated = [(bound, float(sum(counts[: place + 1]))) for place, bound in enumerate(bounds)]
        found = HistogramMetricFamily(f"{PREFIX}post_duration_seconds", "Time of a POST, with its answer.")
        found.add_metric([], cumulated, sum_value=seconds)
        return found

    def _queue_depths(self) -> Iterator[Metric]:
        """Of the queues whose service answers now; a queue that is not known is not empty."""
        found = {kind: stats for kind, stats in self._looks().items() if isinstance(stats, Stats)}
        depth = GaugeMetricFamily(f"{PREFIX}queue_messages", "Messages in a queue.", labels=["queue", "state"])
        for kind, stats in found.items():
            for state in ("free", "claimed", "delayed"):
                depth.add_metric([kind, state], getattr(stats, state))
        yield depth
        ages = {kind: stats.oldest_age for kind, stats in found.items() if stats.oldest_age is not None}
        yield _gauge("queue_oldest_age_seconds", "Age of a queue's oldest message.", ages, "queue")

    def _looks(self) -> dict[str, Stats | Exception]:
        found: dict[str, Stats | Exception] = {}
        for kind, depth in self._depths.items():
            try:
                found[kind] = depth.get(PATIENCE_S)
            except Exception as error:  # whatever it is, the rest of the page is to be seen
                found[kind] = error
        return found

    def _metrics(self) -> Answer:
        return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry).decode()

    def _alive(self) -> Answer:
        """Whether the consumer works, or waits for something that others are to mend."""
        stuck = self._consumer.is_stuck
        status = HTTPStatus.SERVICE_UNAVAILABLE if stuck else HTTPStatus.OK
        return status, JSON_TYPE, json.dumps({"status": "stuck" if stuck else "ok"})

    def _ready(self) -> Answer:
        troubles = self._troubles()
        status = HTTPStatus.SERVICE_UNAVAILABLE if troubles else HTTPStatus.OK
        return status, JSON_TYPE, json.dumps({"status": "not ready" if troubles else "ok", **troubles})

    def _troubles(self) -> dict[str, str]:
        """What cannot be reached, and why."""
        found = {}
        look = self._looks()["request"]
        if isinstance(look, Exception):
            found["queue"] = str(look) or "no answer"
        try:
            if not self._health.get(PATIENCE_S):
                found["maker"] = f"{self._maker.url}: its /healthz does not answer as the widget maker's does"
        except TimeoutError:
            found["maker"] = f"{self._maker.url}: no answer"
        return found

    def _page(self) -> Answer:
        totals, status = Counter(self._consumer.totals), self._consumer.status()
        trouble, troubles = self._consumer.maker_trouble, self._troubles()
        rows: list[tuple[str, object]] = [
            ("Queue service", troubles.get("queue", self._queues.address)),
            ("Maker", troubles.get("maker", self._maker.url)),
            ("Breaker", f"open: the maker is {trouble.value}" if trouble else "closed"),
            *((f"{outcome.capitalize()}", f"{totals[outcome]:,}") for outcome in OUTCOMES),
            ("Messages held", f"{status['held']:,}, of which {status['posting']:,} are being POSTed"),
        ]
        for kind, look in self._looks().items():
            shown = f"{look.total:,} messages" if isinstance(look, Stats) else "not known now"
            if isinstance(look, Stats) and look.oldest_age is not None:
                shown += f", the oldest {look.oldest_age:,.0f} s old"
            rows.append((f"{kind.replace('_', '-').capitalize()} queue", shown))
        table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
        well = not troubles and not trouble and not self._consumer.is_stuck
        return HTTPStatus.OK, HTML_TYPE, PAGE.format(state="at work" if well else "in trouble", table=table)


def _counter(name: str, help_: str, values: float | Mapping[str, float], label: str = "") -> Metric:
    return _filled(CounterMetricFamily(PREFIX + name, help_, labels=[label] if label else []), values)


def _gauge(name: str, help_: str, values: float | Mapping[str, float], label: str = "") -> Metric:
    return _filled(GaugeMetricFamily(PREFIX + name, help_, labels=[label] if label else []), values)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, values: float | Mapping[str, float]
) -> CounterMetricFamily | GaugeMetricFamily:
    for label, value in values.items() if isinstance(values, Mapping) else [(None, values)]:
        family.add_metric([] if label is None else [label], value)
    return family


@contextmanager
def serve(monitor: Monitor, port: int) -> Iterator[None]:
    """Serve it at http://127.0.0.1:PORT/ until the block ends. Raises ConfigError for a port that is not to be had."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            # Another web site's page must not read this one under a name of its own.
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host.lower() not in LOCAL_HOSTS:
                status, kind, text = HTTPStatus.MISDIRECTED_REQUEST, "text/plain", "ask for 127.0.0.1 or localhost\n"
            else:
                found = monitor.answer(self.path.partition("?")[0])
                status, kind, text = found or (HTTPStatus.NOT_FOUND, "text/plain", "/metrics /healthz /readyz /\n")
            content = text.encode()
            self.send_response(status)
            for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing: a line for each scrape would bury what the log is for."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(f"metrics port {port}: {error.strerror}") from error
    with server:
        # The interval is how long the end may take: the server looks for it so often.
        threading.Thread(target=server.serve_forever, args=(0.1,), name="monitor", daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
