"""What a running consumer shows of itself: metrics for Prometheus, its health, a page, and a line on a terminal."""

import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus

from claim_queues import Stats, open_queues
from claim_queues.base import is_loopback
from claim_queues.cli import is_terminal

from .delivery import Delivery, Failure, Maker

if TYPE_CHECKING:
    from widget_consumer import Consumer


RECENT_POSTS, RECENT_FAILURES = 500, 10


class Metrics:
    """Counts what a consumer does. Thread-safe.

    took: seconds of the last POSTs. failures: the last POSTs that made no widget, newest first, each with its time
    (UTC seconds).
    """

    def __init__(self) -> None:
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry, counter = prometheus.CollectorRegistry(), prometheus.Counter
        self.named: dict[str, Any] = {"namespace": "widget_consumer", "registry": self.registry}
        self.receives = counter("receives", "Messages claimed.", **self.named)
        self.redeliveries = counter("redeliveries", "Messages claimed that had been POSTed before.", **self.named)
        self.outcomes = counter("outcomes", "Messages settled; `failed`: dead letters.", ["outcome"], **self.named)
        self.returns = counter("returns", "POSTs without an outcome; `excused`: uncharged.", ["why"], **self.named)
        self.lost = counter("claims_lost", "Messages whose claim ended before they were settled.", **self.named)
        self.posts = prometheus.Histogram("post_duration_seconds", "Time of a POST.", **self.named)
        held = prometheus.Gauge("messages", "Messages in the claims being worked on.", ["state"], **self.named)
        self.held = held.labels("held")
        self.took = deque[float](maxlen=RECENT_POSTS)
        self.failures = deque[tuple[float, Delivery]](maxlen=RECENT_FAILURES)
        for outcome in ("created", "rejected", "failed"):
            self.outcomes.labels(outcome)  # so that each is exported before it first happens
        for why in ("failed", "excused"):
            self.returns.labels(why)

    def claimed(self, deliveries: Collection[Delivery]) -> None:
        self.receives.inc(len(deliveries))
        self.redeliveries.inc(sum(delivery.before.receives > 0 for delivery in deliveries))
        self.held.inc(len(deliveries))

    def posted(self, delivery: Delivery) -> None:
        self.posts.observe(delivery.took)
        self.took.append(delivery.took)
        if delivery.answer.outcome != "created":
            self.failures.appendleft((time.time(), delivery))
        if not delivery.answer.outcome:
            self.returns.labels("failed" if delivery.charged else "excused").inc()

    def post_ms(self, share: float) -> float:
        """Milliseconds within which that share of the last POSTs ended; 0 before the first."""
        took = sorted(self.took.copy())
        return 1000 * took[int(share * (len(took) - 1))] if took else 0.0

    def totals(self) -> dict[str, int]:
        """Messages by outcome."""
        return {sample.labels["outcome"]: int(sample.value) for sample in next(iter(self.outcomes.collect())).samples}


class Watch:
    """Looks at a consumer's queues in a thread of its own, so that nobody waits for them, until `ended` is set.

    looks: the last ones, each with its time (monotonic), the outcomes so far, and the numbers of each queue, which are
    missing while `trouble` says why.
    """

    def __init__(self, consumer: "Consumer", maker: Maker, given: dict[str, Any]) -> None:
        self.consumer, self.maker, self.given, self.ended = consumer, maker, given, threading.Event()
        self.looks = deque[tuple[float, dict[str, int], dict[str, Stats]]](maxlen=4)
        self.looks.append((time.monotonic(), consumer.metrics.totals(), {}))
        self.trouble = "not asked yet"
        gauge: Any = partial(prometheus.Gauge, **consumer.metrics.named)
        gauge("slots_busy", "POSTs in flight.").set_function(lambda: consumer.slots.running)
        gauge("maker_well", "0 while the maker's health page is not well.").set_function(lambda: not maker.health)
        states = gauge("breaker_state", "1 for the breaker's state: closed, or what opened it.", ["state"])
        for state in (None, *Failure):
            is_so = partial(lambda state: consumer.breaker.failure is state, state)
            states.labels(state.value if state else "closed").set_function(is_so)
        failing = gauge("service_failing", "1 for each operation that fails at the queue service.", ["operation"])
        for operation in ("claim", "renew", "settle", "release"):
            failing.labels(operation).set_function(partial(consumer.trouble.reasons.__contains__, operation))
        self._depth = gauge("queue_messages", "Messages in a queue.", ["queue", "state"])
        self._age = gauge("queue_oldest_age_seconds", "Age of a queue's oldest message.", ["queue"])

    def run(self) -> None:
        queues = None
        while not self.ended.is_set():
            stats, trouble = dict[str, Stats](), ""
            try:
                queues = queues or open_queues(self.given["queue_url"])
                stats = {kind: queues.stats(self.given[f"{kind}_queue"]) for kind in ("dead_letter", "request")}
            except Exception as error:  # whatever it is, the consumer works on
                trouble = str(error) or type(error).__name__
            self.looks.append((time.monotonic(), self.consumer.metrics.totals(), stats))
            self.trouble = trouble
            self._depth.clear()
            self._age.clear()
            for kind, found in stats.items():
                for state in ("free", "claimed", "delayed"):
                    self._depth.labels(kind, state).set(getattr(found, state))
                if found.oldest_age is not None:
                    self._age.labels(kind).set(found.oldest_age)
            self.ended.wait(2)
        if queues:
            queues.close()

    def troubles(self) -> dict[str, str]:
        """What keeps the consumer from its work, and why; it may take five seconds to ask the maker."""
        is_well = self.maker.is_well(time.monotonic() - 5)
        found = {"queue": self.trouble, "maker": "" if is_well else f"{self.maker.url}: {self.maker.health}"}
        found |= {"breaker": self.consumer.breaker.reason, **self.consumer.trouble.reasons}
        found["consumer"] = "it is stopping" if self.consumer.slots.is_stopping else ""
        return {what: why for what, why in found.items() if why}

    def state(self, troubles: Collection[str]) -> str:
        """What it does now, in a few words."""
        if "consumer" in troubles:
            return "stopping"
        if self.consumer.trouble.reasons:
            return "settling fails" if "settle" in troubles else "waiting for the queue service"
        return "waiting for the maker" if "breaker" in troubles or "maker" in troubles else "working"

    def rate(self) -> float:
        """Outcomes a second, lately."""
        (began_at, before, _), (at, totals, _) = self.looks[0], self.looks[-1]
        done = sum(totals.values()) - sum(before.values())
        return done / (at - began_at) if done else 0.0

    def line(self) -> str:
        """The line on a terminal: an open breaker, rate, POSTs in flight, and queue and outcomes at one moment."""
        rate, (_, totals, stats) = self.rate(), self.looks[-1]
        depth = stats["request"].total if stats else None
        left = f" {timedelta(seconds=round(depth / rate))} left" if depth and rate >= 1 else ""
        failure = self.consumer.breaker.failure
        words = [f"maker {failure.value}"] if failure else []
        words += [f"{rate:,.0f}/s", f"{self.consumer.slots.running} in flight"]
        words += ["? queued" if depth is None else f"{depth:,} queued{left}"]
        return "  ".join(words + [f"{number:,} {outcome}" for outcome, number in totals.items() if number])


def serving(watch: Watch, host: str, port: int) -> AbstractContextManager[None]:
    """Serve the page, metrics and health until the block ends; on loopback not under foreign names. Raises OSError."""
    from flask import render_template

    from claim_queues import pages

    registry = watch.consumer.metrics.registry
    app = pages.create_app(
        "widgets", () if is_loopback(host) else None, hint="open it by its address, or see --metrics-host"
    )
    pages.serve_metrics(app, registry)
    prometheus.ProcessCollector(registry=registry)
    views: dict[str, Any] = {
        "/": lambda: render_template("consumer.html", watch=watch, troubles=watch.troubles(), now=time.monotonic()),
        "/healthz": lambda: ({"status": "stopping"}, 503) if watch.consumer.slots.is_stopping else {"status": "ok"},
        "/readyz": lambda: ({"status": "not ready"} | found, 503) if (found := watch.troubles()) else {"status": "ok"},
    }
    for path, view in views.items():
        app.add_url_rule(path, path, view)
    return pages.serving(app, host, port)


@contextmanager
def watched(consumer: "Consumer", maker: Maker, given: dict[str, Any]) -> Iterator[None]:
    """Show the consumer's state until the block ends: at --metrics-port, if given, and on a terminal under the log."""
    port, is_shown = given["metrics_port"], is_terminal(sys.stderr) and given["log_format"] == "text"
    with ExitStack() as closing:
        if port or is_shown:
            watch = Watch(consumer, maker, given)
            thread = threading.Thread(target=watch.run, name="looks", daemon=True)
            thread.start()
            closing.callback(thread.join, 0.5)  # a service that does not answer must not delay the end
            closing.callback(watch.ended.set)
        if port:
            closing.enter_context(serving(watch, given["metrics_host"], port))
        if is_shown:
            from rich import console, live

            terminal = console.Console(stderr=True, soft_wrap=True, highlight=False)
            closing.enter_context(live.Live(console=terminal, get_renderable=watch.line, transient=True))
        yield
