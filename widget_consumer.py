#!/usr/bin/env python3
"""Claim requests, POST each to the widget maker, and by its answer delete the message or give it back.

One message's life: `_claim` and `_admit` (the receive is counted first of all), `_work` (the POST), `_conclude` (what
the answer means), `_settle` (response or dead letter first, then the delete) or `_blame` (back to the queue). The
order is the safety: a crash anywhere repeats a request, never loses one, and the maker makes a widget once.
"""

import os
import queue
import random
import signal
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from claim_queues import (
    ConfigError,
    MessageRefused,
    Post,
    QueueError,
    Queues,
    QueueUnavailable,
    open_queues,
)
from claim_queues.command_line import (
    SETTINGS,
    Log,
    Number,
    WholeNumber,
    __version__,
    configure_logging,
    distinct,
    option,
    queue_options,
    require_queues,
    run,
)
from claim_queues.keeper import End, Held, Keeper
from claim_queues.store import state_path
from delivery import Answer, Breaker, Connection, Kind, Maker, MakerMisconfigured, backoff
from receive_counts import ReceiveCounts, Receives

POST_SPARE_S = 5.0
"""A POST starts only while the claim is surely held for the deadline and so much more, to settle in."""
BACKOFF_BASE_S, LONGEST_BACKOFF_S = 0.5, 300.0
MOST_BACKOFFS_PER_SLOT = 5
SUSPECT_S = 1.0
"""How long a message whose POST got no answer waits for another's answer to show whether the maker is up."""
CLAIM_PAUSE_S, LONGEST_CLAIM_PAUSE_S = 0.5, 30.0
CHECK_QUEUES_EVERY_S = 60.0
MISCONFIGURED_DRAIN_S = 60.0
RESPONSE_IDS = uuid.UUID("8f3f2a0c-5d0f-5a52-9c0b-6f1f5f1d2c11")

UNTRIED = Answer(Kind.UNAVAILABLE, None, "the maker's /healthz does not answer")

log = Log("widget_consumer")


@dataclass(eq=False, slots=True)
class Delivery:
    """One received message on its way to the maker, with the maker's latest answer.

    probe: it tries whether the maker is back. alone: so did it the last time, so its failure proves nothing.
    due: monotonic time at which a suspect's case is closed.
    """

    held: Held
    receives: Receives
    probe: bool = False
    alone: bool = False
    answer: Answer = UNTRIED
    due: float = 0.0

    @property
    def id(self) -> str:
        return self.held.message.id

    @property
    def widget_id(self) -> str | None:
        """The id that the request asks for; None when the body is no request."""
        body = self.held.message.body
        found = body.get("widget_id") if isinstance(body, dict) else None
        return found if isinstance(found, str) else None

    def fields(self) -> dict[str, object]:
        """What every log line about the message says."""
        status = self.answer.status
        return {"message": self.id, "widget": self.widget_id, "receives": self.receives.count, "status": status}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The consumer's options; durations in seconds. response_ttl None: the service's longest."""

    request_queue: str
    response_queue: str
    dead_letter_queue: str
    create: bool
    claim_ttl: int
    grace: int
    claim_limit: int
    slots: int
    max_receives: int
    poll_interval: float
    response_ttl: int | None
    drain: bool

    @property
    def queues(self) -> tuple[str, str, str]:
        return self.request_queue, self.response_queue, self.dead_letter_queue


class Consumer:
    """Takes requests from the queue to the maker until it is stopped, has drained the queue, or cannot go on.

    One lock guards all state; it is never held during a POST or a call of the queue service. totals: numbers of
    messages by what happened to them.
    """

    def __init__(
        self,
        queues: Queues,
        maker: Maker,
        counts: ReceiveCounts,
        settings: Settings,
        *,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._queues = queues
        self._maker = maker
        self._counts = counts
        self._settings = settings
        self._uniform = uniform
        self._breaker = Breaker(uniform=uniform)
        self._lock = threading.RLock()
        self._has_work = threading.Condition(self._lock)  # the slots wait for it
        self._has_room = threading.Condition(self._lock)  # the claiming thread waits for it
        self._waiting: deque[Delivery] = deque()
        self._posting: set[Delivery] = set()
        self._suspects: list[Delivery] = []
        self._stopping = False
        self._failure: Exception | None = None
        self._failing: set[str] = set()
        self._reported: Kind | None = None
        self._opened_at = self._misconfigured_since = 0.0
        self._next_check_at = 0.0
        self._empty_since: float | None = None
        self.totals: Counter[str] = Counter()
        self._keeper = Keeper(queues, self, claim_ttl=settings.claim_ttl, grace=settings.grace)

    def run(self) -> None:
        """Work until stop() or, with drain, until nothing is left; raise what made it impossible to go on."""
        slots = [
            threading.Thread(target=self._guard, args=(self._work,), name=f"slot-{number}", daemon=True)
            for number in range(self._settings.slots)
        ]
        for slot in slots:
            slot.start()
        self._guard(self._claim_until_done)
        self.stop()
        for slot in slots:
            slot.join()
        self._keeper.close(self._maker.deadline_s)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Claim nothing more, let POSTs in flight end, give everything else back at once. From any thread."""
        with self._lock:
            self._stopping = True
            self._has_work.notify_all()
            self._has_room.notify_all()
            self._queues.stop_waiting()
            self._give_all_back()

    def status(self) -> dict[str, int]:
        """What goes on now: messages held and waiting for a slot, POSTs in flight, and 1 for an open breaker."""
        with self._lock:
            return {
                "held": self._keeper.count(),
                "waiting": len(self._waiting),
                "posting": len(self._posting),
                "breaker_open": int(self._breaker.is_open),
            }

    def _claim_until_done(self) -> None:
        pause = 0.0
        while (limit := self._wait_for_room()) > 0:
            try:
                found = self._probe() if self._breaker.is_open else self._claim(limit, self._settings.poll_interval)
                if not found and self._is_done():
                    return
                pause = 0.0
                self._service_answers("claim")
            except QueueError as error:
                self._service_fails("claim", error)
                asked = error.retry_after_s or 0 if isinstance(error, QueueUnavailable) else 0
                pause = max(asked, min(LONGEST_CLAIM_PAUSE_S, max(CLAIM_PAUSE_S, 2 * pause)))
                with self._lock:
                    self._has_room.wait_for(lambda: self._stopping, pause * self._uniform(0.5, 1))

    def _wait_for_room(self) -> int:
        """Wait until a claim is wanted: of how many messages; 0 ends claiming."""
        with self._lock:
            while not self._stopping:
                now = time.monotonic()
                if self._breaker.is_open:
                    self._end_misconfigured_drain(now)
                    busy = bool(self._waiting or self._posting)
                    if not busy and now >= self._breaker.next_probe_at:
                        return 1
                    self._has_room.wait(None if busy else self._breaker.next_probe_at - now)
                elif self._suspects and now >= self._suspects[0].due:
                    self._open_breaker(self._suspects[-1].answer)
                elif len(self._waiting) >= self._settings.slots:
                    self._has_room.wait()
                elif self._keeper.backing_off() > MOST_BACKOFFS_PER_SLOT * self._settings.slots:
                    self._has_room.wait(CLAIM_PAUSE_S)
                else:
                    return self._settings.claim_limit
            return 0

    def _claim(self, limit: int, wait: float) -> bool:
        found = self._keeper.claim(self._settings.request_queue, limit=limit, wait=wait)
        if found:
            self._admit(found)
        return bool(found)

    def _probe(self) -> bool:
        """Claim one message to try the maker with: another than the one that failed last, if there is another."""
        if self._suspects and self._claim(1, wait=0):
            return True
        with self._lock:
            while self._suspects:
                self._excuse(self._suspects.pop())
        return self._claim(1, self._settings.poll_interval)

    def _is_done(self) -> bool:
        """See to the queues now and then while there is nothing to claim; with drain, say whether nothing is left."""
        settings, now = self._settings, time.monotonic()
        if now >= self._next_check_at:
            self._next_check_at = now + CHECK_QUEUES_EVERY_S
            require_queues(self._queues, settings.queues, create=settings.create)
        if not settings.drain or self._keeper.count() or self._queues.stats(settings.request_queue).total:
            self._empty_since = None
            return False
        if self._empty_since is None:
            self._empty_since = now
        return now - self._empty_since >= self._queues.limits.stats_settle

    def _admit(self, found: list[Held]) -> None:
        """Count the receives before anything else; then line the messages up for the slots, or end them here."""
        receives = self._counts.received([held.message for held in found])
        with self._lock:
            self.totals["received"] += len(found)
            for held, counted in zip(found, receives, strict=True):
                probe = self._breaker.is_open
                delivery = Delivery(
                    held, counted, probe=probe, alone=probe and self._breaker.last_failed == held.message.id
                )
                if delivery.widget_id is None:
                    self._bury(delivery, "the body is no request: a JSON object with a string widget_id")
                elif counted.charged > self._settings.max_receives:
                    self._bury(delivery, f"received {counted.charged} times without an outcome")
                elif self._stopping or (probe and len(found) > 1):
                    self._excuse(delivery)
                else:
                    self._waiting.append(delivery)
            self._has_work.notify(len(found))

    def _work(self) -> None:
        """One slot: POST one message after the other."""
        connection = self._maker.connect()
        while (delivery := self._next_delivery()) is not None:
            if self._keeper.holds(delivery.held, self._maker.deadline_s + POST_SPARE_S):
                started = time.monotonic()
                to_blame = self._post(delivery, connection)
                self._conclude(delivery, to_blame=to_blame, seconds=time.monotonic() - started)
            else:
                self._drop(delivery)
        connection.close()

    def _next_delivery(self) -> Delivery | None:
        with self._lock:
            self._has_work.wait_for(lambda: self._waiting or self._stopping)
            if self._stopping:
                return None
            delivery = self._waiting.popleft()
            self._posting.add(delivery)
            if len(self._waiting) == self._settings.slots - 1:
                self._has_room.notify()
            return delivery

    def _post(self, delivery: Delivery, connection: Connection) -> bool:
        """POST; True when the message is to blame: it failed alone, while the maker was well before and after."""
        message = delivery.held.message
        if delivery.alone and not self._maker.is_healthy():
            return False
        headers = {
            "Idempotency-Key": message.id,
            "webhook-id": message.id,
            "X-Message-Receive-Count": str(delivery.receives.count),
            "X-Message-Queue": self._settings.request_queue,
            "X-Message-Age": str(int(message.age)),
        }
        delivery.answer = connection.post(message.body, headers)
        return delivery.alone and not delivery.answer.passed and self._maker.is_healthy()

    def _conclude(self, delivery: Delivery, *, to_blame: bool, seconds: float) -> None:
        """Act on the maker's answer."""
        answer = delivery.answer
        with self._lock:
            self._posting.discard(delivery)
            if answer.passed:
                self._maker_is_well()
                self._settle(delivery, answer.kind.value, answer.reason, fenced=False)
                log.info(
                    answer.kind.value, **delivery.fields(), reason=answer.reason or None, ms=round(seconds * 1000, 1)
                )
            else:
                self._judge_failure(delivery, to_blame=to_blame)
            self._has_room.notify()

    def _maker_is_well(self) -> None:
        """A request passed: so those that failed meanwhile failed by their own fault."""
        if self._breaker.is_open:
            log.info("the maker is back", after_s=round(time.monotonic() - self._opened_at, 1))
        self._breaker.passed()
        self._misconfigured_since = 0.0
        suspects, self._suspects = self._suspects, []
        for suspect in suspects:
            self._blame(suspect)

    def _judge_failure(self, delivery: Delivery, *, to_blame: bool) -> None:
        """Blame the message, or suspect it until the maker's next answers show whose fault it was."""
        answer = delivery.answer
        was_open = self._breaker.is_open
        must_open = self._breaker.failed(delivery.id, answer)
        if to_blame or (answer.kind is Kind.FAILED and not was_open and not must_open):
            self._blame(delivery)
        elif was_open and not delivery.probe:
            self._excuse(delivery)
        else:
            delivery.due = time.monotonic() + SUSPECT_S
            self._suspects.append(delivery)
        if must_open or delivery.probe:
            self._open_breaker(answer)

    def _open_breaker(self, answer: Answer) -> None:
        """The maker is not well: blame nobody, keep the latest failure, give all else back, and only probe from now."""
        now = time.monotonic()
        if not self._breaker.is_open:
            self._opened_at = now
        if answer.kind is not Kind.MISCONFIGURED:
            self._misconfigured_since = 0.0
        elif not self._misconfigured_since:
            self._misconfigured_since = now
        self._report_maker(answer)
        failed = self._breaker.open(answer, now)
        kept, self._suspects = self._suspects[-1:], self._suspects[:-1]
        suspected = {suspect.id for suspect in [*kept, *self._suspects]}
        self._give_all_back()
        self._suspects = kept
        self._counts.excuse(id_ for id_ in failed if id_ not in suspected)

    def _report_maker(self, answer: Answer) -> None:
        """One line when the maker goes, or when what is wrong with it changes."""
        if self._breaker.is_open and self._reported is answer.kind:
            return
        self._reported = answer.kind
        if answer.kind is Kind.MISCONFIGURED:
            log.error("this is not our widget maker: check --maker-url", url=self._maker.url, reason=answer.reason)
        else:
            log.warning("the maker is unavailable: probing until it is back", url=self._maker.url, reason=answer.reason)

    def _end_misconfigured_drain(self, now: float) -> None:
        since = self._misconfigured_since
        if self._settings.drain and since and now - since >= MISCONFIGURED_DRAIN_S:
            raise MakerMisconfigured(
                f"{self._maker.url} is not our widget maker: check --maker-url; the queue is as it was"
            )

    def _blame(self, delivery: Delivery) -> None:
        """The failure counts: the message comes back after a backoff or, received often enough, is a dead letter."""
        charged, answer = delivery.receives.charged, delivery.answer
        if charged >= self._settings.max_receives:
            self._bury(delivery, answer.reason)
            return
        jittered = backoff(charged, base_s=BACKOFF_BASE_S, longest_s=LONGEST_BACKOFF_S, uniform=self._uniform)
        delay = max(jittered, answer.retry_after_s or 0)
        self.totals["retried"] += 1
        log.warning("failed, comes back", **delivery.fields(), reason=answer.reason, backoff_s=round(delay, 1))
        self._keeper.give_back(delivery.held, delay=delay)

    def _excuse(self, delivery: Delivery) -> None:
        """Give the message back at once; this receive does not count against it."""
        self.totals["excused"] += 1
        self._counts.excuse([delivery.id])
        self._keeper.give_back(delivery.held)

    def _drop(self, delivery: Delivery) -> None:
        """The claim could not be held for a POST: the message is another's, or goes back."""
        with self._lock:
            self._posting.discard(delivery)
            if not delivery.held.lost:
                self._excuse(delivery)
            self._has_room.notify()

    def _give_all_back(self) -> None:
        for delivery in [*self._waiting, *self._suspects]:
            self._excuse(delivery)
        self._waiting.clear()
        self._suspects.clear()

    def _bury(self, delivery: Delivery, reason: str) -> None:
        """Make the message a dead letter, with everything that is known of it."""
        message, receives = delivery.held.message, delivery.receives
        letter = {
            "version": 1,
            "request_id": message.id,
            "queue": self._settings.request_queue,
            "body": message.body,
            "reason": reason,
            "status": delivery.answer.status,
            "receive_count": receives.count,
            "first_received_at": _iso(receives.first_at),
            "last_received_at": _iso(receives.last_at),
        }
        log.error("dead letter", **delivery.fields(), reason=reason)
        self._settle(delivery, "failed", reason, Post(self._settings.dead_letter_queue, letter), fenced=True)

    def _settle(self, delivery: Delivery, outcome: str, reason: str, *letters: Post, fenced: bool) -> None:
        """Post the response, and delete the message only then."""
        self.totals[outcome] += 1
        response = {
            "version": 1,
            "response_id": str(uuid.uuid5(RESPONSE_IDS, f"{delivery.id} {outcome}")),
            "request_id": delivery.id,
            "widget_id": delivery.widget_id,
            "outcome": outcome,
            "reason": reason,
            "status": delivery.answer.status,
            "receive_count": delivery.receives.count,
        }
        post = Post(self._settings.response_queue, response, self._settings.response_ttl)
        self._keeper.settle(delivery.held, [*letters, post], fenced=fenced)

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; whatever it raises ends the consumer in good order."""
        try:
            work()
        except Exception as error:
            self.keeper_died(error)

    # What the keeper tells (KeeperEvents)

    def message_ended(self, held: Held, end: End) -> None:
        if end is End.SETTLED:
            self._counts.forget([held.message.id])
        if end is End.LOST:
            log.warning("claim lost: another consumer gets the message", message=held.message.id)
            with self._lock:
                self.totals["lost"] += 1
                self._waiting = deque(delivery for delivery in self._waiting if delivery.held is not held)
                self._suspects = [delivery for delivery in self._suspects if delivery.held is not held]

    def message_refused(self, held: Held, error: MessageRefused) -> None:
        log.error("no queue takes the outcome: the message stays queued", message=held.message.id, reason=str(error))

    def service_failed(self, error: Exception) -> None:
        self._service_fails("settle", error)

    def service_answered(self) -> None:
        self._service_answers("settle")

    def keeper_died(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error
        self.stop()

    def _service_fails(self, doing: str, error: Exception) -> None:
        """One line when the queue service stops doing something, not one for each attempt."""
        if doing not in self._failing:
            self._failing.add(doing)
            log.warning("the queue service fails: trying again", doing=doing, reason=str(error))

    def _service_answers(self, doing: str) -> None:
        if doing in self._failing:
            self._failing.discard(doing)
            log.info("the queue service is back", doing=doing)


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def serve_metrics(consumer: Consumer, port: int) -> None:
    """Serve the consumer's numbers to Prometheus at http://127.0.0.1:PORT/metrics."""
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector

    class Numbers(Collector):
        def collect(self) -> Iterator[Metric]:
            counted = CounterMetricFamily("widget_consumer_messages", "Messages by what happened.", labels=["event"])
            for event, number in dict(consumer.totals).items():
                counted.add_metric([event], number)
            yield counted
            for name, value in consumer.status().items():
                yield GaugeMetricFamily(f"widget_consumer_{name}", f"{name.replace('_', ' ')}, now.", value)

    registry = CollectorRegistry()
    registry.register(Numbers())
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ConfigError(f"metrics port {port}: {error.strerror}") from error


def run_until_signal(consumer: Consumer) -> None:
    """Run the consumer; the first signal stops it in good order, a second one ends the process at once."""
    events: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()  # its put is safe in a signal handler
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: events.put(number))

    def work() -> None:
        try:
            consumer.run()
            events.put(None)
        except Exception as error:
            events.put(error)

    threading.Thread(target=work, name="consumer", daemon=True).start()
    event = events.get()
    if isinstance(event, int):
        log.info("stopping: finishing what is in flight; a second signal ends at once")
        consumer.stop()
        event = events.get()
    if isinstance(event, int):
        os._exit(128 + event)
    if event is not None:
        raise event


@click.command(context_settings=SETTINGS)
@queue_options("request", "response", "dead-letter")
@option("--maker-url", default="http://127.0.0.1:5000/widgets", help="Where requests are POSTed.")
@option("--claim-ttl", type=WholeNumber(60, 43_200, "seconds"), default=300, help="Seconds a claim holds its messages.")
@option(
    "--grace", type=WholeNumber(60, 43_200, "seconds"), default=60, help="Seconds a claimed message outlives its claim."
)
@option(
    "--claim-limit",
    type=WholeNumber(1, 20, "messages"),
    help="Messages a claim asks for.  [default: the service's most]",
)
@option("--slots", type=WholeNumber(1, 256, "slots"), default=8, help="POSTs in flight at once.")
@option(
    "--deadline", type=Number(0.1, 43_190, "seconds"), default=20.0, help="Seconds for one POST, by the wall clock."
)
@option("--max-receives", type=WholeNumber(1, 1000, "receives"), default=5, help="Receives before a dead letter.")
@option("--poll-interval", type=Number(0.1, 20, "seconds"), default=2.0, help="Longest idle wait, in seconds.")
@option("--response-ttl", type=WholeNumber(60, 1_209_600, "seconds"), default=86_400, help="Seconds a response lives.")
@option("--drain", is_flag=True, help="Exit once nothing is left, messages claimed by others included.")
@option(
    "--receive-counts",
    metavar="FILE",
    help="Where receives are counted; `none`: in memory.  [default: one file per user]",
)
@option("--metrics-port", type=WholeNumber(1, 65_535), help="Serve Prometheus metrics on this loopback port.")
@option("--log-format", type=click.Choice(["text", "json"]), default="text", help="Form of the log on stderr.")
@option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", help="Least level logged."
)
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> None:
    """Claim requests, POST each to the widget maker, and settle each by its answer.

    Runs until SIGTERM or Ctrl-C: then it finishes what is in flight, gives the rest back, and exits 0.
    Exit codes: 0 stopped or drained, 1 failed, 2 usage, 4 credentials, 5 a local file cannot be used.
    """
    configure_logging(given["log_format"], given["log_level"])
    if given["deadline"] > given["claim_ttl"] - 10:
        raise ConfigError(f"--deadline {given['deadline']:g}: must be at most --claim-ttl less 10 seconds")
    distinct(given["request_queue"], given["response_queue"], given["dead_letter_queue"])
    maker = Maker(given["maker_url"], deadline_s=given["deadline"])
    with open_queues(given["queue_url"]) as queues:
        settings = _settings(ctx, queues, given)
        require_queues(queues, settings.queues, create=settings.create)
        counts = ReceiveCounts(
            _counts_path(given["receive_counts"]),
            f"{queues.address} {settings.request_queue}",
            counted_by_service=queues.limits.counts_receives,
        )
        consumer = Consumer(queues, maker, counts, settings)
        if given["metrics_port"]:
            serve_metrics(consumer, given["metrics_port"])
        log.info("consuming", queue=settings.request_queue, service=queues.address, maker=maker.url)
        run_until_signal(consumer)
        counts.close()


def _settings(ctx: click.Context, queues: Queues, given: dict[str, Any]) -> Settings:
    """The options as this service can honour them; an option that it cannot is refused."""
    limits = queues.limits
    for name, impossible in (("grace", limits.grace is None), ("response_ttl", limits.message_ttl is None)):
        if impossible and ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise ConfigError(f"--{name.replace('_', '-')}: {limits.service} has no such thing")
    values = {name: given[name] for name in Settings.__dataclass_fields__}
    values["claim_limit"] = given["claim_limit"] or limits.claim_limit
    values["response_ttl"] = given["response_ttl"] if limits.message_ttl else None
    limits.check_claim(ttl=values["claim_ttl"], grace=values["grace"], limit=values["claim_limit"])
    return Settings(**values)


def _counts_path(given: str | None) -> Path | None:
    if given == "none":
        return None
    return Path(given).absolute() if given else state_path("receive-counts.sqlite3")


def main() -> None:
    """Entry point of the command `widget-consumer`."""
    run(cli)


if __name__ == "__main__":
    main()
