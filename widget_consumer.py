#!/usr/bin/env python3
"""Claim requests, POST each to the widget maker, and delete or release it according to the answer.

A message's life, in this order: `_claim` (hidden from others), `_post` (its receive counted, then the POST), `_settle`
(the outcome stored, then the message deleted; what has no outcome is released). A crash between any two steps repeats
a message and never loses one, and the maker makes each widget once.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import click
import structlog

from claim_queues import (
    Claim,
    ClaimLost,
    ConfigError,
    Limits,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    Queues,
    QueuesError,
    QueueUnavailable,
)
from claim_queues.checks import Report, check_descriptors, check_queues, check_state
from claim_queues.cli import (
    CLAIM_SECONDS,
    MESSAGE_SECONDS,
    Command,
    configure_logging,
    logging_options,
    opened,
    queue_options,
    require_queues,
    run_until_signal,
    state_path,
)
from claim_queues.releases import Releases
from receive_counts import ReceiveCounts
from widgets.breaker import Breaker
from widgets.charges import SHORT_BACKOFF_S, Charges, release_delay
from widgets.delivery import Delivery, Maker
from widgets.drain import Drain
from widgets.monitoring import Metrics, watched
from widgets.signing import load_signer, signing_options
from widgets.slots import Slots
from widgets.trouble import Trouble

POST_SPARE_S = 5.0  # when a POST begins, its claim must outlast the POST's deadline by this much
SETTLE_EVERY_S, STOP_PATIENCE_S, DRAIN_LOOKS_EVERY_S = 1.0, 10.0, 0.25
LOOK_EVERY_S = 60.0  # checks that the queues exist: on some services a missing queue looks empty
POSTING = ("deadline", "health_url", "allow_plain_http")
FILE = click.Path(path_type=Path, dir_okay=False)
Result = TypeVar("Result")
log = structlog.get_logger()


class Consumer:
    """Takes messages to the maker until stop() or, with drain, until none is left.

    Each worker thread owns one claim at a time, from claim to settlement; the POSTs run in the threads of `slots`.
    options: those of the command line, by name, as `fitting` returns them. trouble: the operations that the queue
    service fails at now. metrics: counts of what was done.
    """

    def __init__(self, queues: Queues, maker: Maker, counts: ReceiveCounts, options: SimpleNamespace) -> None:
        self._queues = queues
        self._maker = maker
        self._options = options
        self._stopping = threading.Event()
        self._give_up_at: float | None = None  # when settling is given up after a stop
        self._looked_at = time.monotonic()  # when it last checked that the queues exist
        self._lane = threading.Lock()  # held while a message that was twice left open is POSTed
        self._drain = Drain(queues, options.request_queue, options.drain_timeout) if options.drain else None
        self._releases = Releases(queues)
        self.breaker = Breaker()
        self.slots = Slots(options.slots, options.post_batch)
        self.trouble = Trouble()
        self.metrics = Metrics()
        self._charges = Charges(counts, maker, self.breaker, self.slots, self.metrics, most=options.max_receives)

    def run(self) -> None:
        """Work until stopped or drained; raise the error that made it impossible to go on."""
        with ThreadPoolExecutor(self._options.slots, "worker") as pool:
            workers = [pool.submit(self._work) for _ in range(self._options.slots)]
        self.slots.close()
        for claim in self._releases.all():
            with suppress(QueuesError):  # what is not released expires
                self._insist(claim, "release", partial(self._queues.release, claim))
        for worker in workers:
            worker.result()

    def stop(self) -> None:
        """Claim nothing more, finish the POSTs in flight, release everything else at once."""
        self._stopping.set()
        self._queues.stop_waiting()
        self.slots.stop()

    def _work(self) -> None:
        """Claim, deliver and settle batch after batch. While the breaker is open, one claim at a time is tried."""
        try:
            while not self._stopping.is_set():
                with self.breaker.turn() as is_try:
                    room = self.slots.reserve(self._options.claim_limit)  # only now: a waiting thread must hold no room
                    if room and (claim := self._claim(room, is_try=is_try)):
                        self._finish(claim)
        finally:
            self.stop()

    def _claim(self, room: int, *, is_try: bool) -> Claim | None:
        """Claim up to `room` messages; None where there are none, or the queue service fails."""
        options, claim = self._options, None
        try:
            if is_try:
                self._stopping.wait(self.breaker.next_pause())
            if self._drain:
                self._drain.check(self.breaker)
            if not self._stopping.is_set() and (is_try or not self.breaker.is_open):
                self._releases.due()
                limit = min(room, options.slots) if is_try else room
                terms = {"ttl": options.claim_ttl, "grace": options.grace, "wait": options.poll_interval}
                claim = self._queues.claim(options.request_queue, limit=limit, **terms)
                self._look_around(found=claim is not None)
                self.trouble.ends("claim")
        except (QueueUnavailable, QueueNotFound) as error:
            self._wait_out("claim", error)
        finally:
            self.slots.claimed(room, len(claim.messages) if claim else 0)
        if is_try and claim:
            self.breaker.tries(claim.id)
        return claim

    def _look_around(self, *, found: bool) -> None:
        """End a drain that is done. Check from time to time that the queues exist: a missing one may look empty."""
        if self._drain and self._drain.is_over(found=found):
            self.stop()
        elif not found and not self._drain and time.monotonic() - self._looked_at > LOOK_EVERY_S:
            require_queues(self._queues, self._options.queues, create=self._options.create)
            self._looked_at = time.monotonic()

    def _finish(self, claim: Claim) -> None:
        """Deliver the claim's messages, then give back those that were not settled."""
        deliveries = list[Delivery]()
        try:
            try:
                self._deliver_all(claim, deliveries)
            finally:
                self._charges.take_back(claim, deliveries)
                self.metrics.held.dec(len(deliveries))
                if claim.messages and claim.holds(0):
                    delay = 0 if self._stopping.is_set() else release_delay(deliveries)
                    self._insist(claim, "release", lambda: self._releases.add(claim, delay))
            self.trouble.ends("renew", "release")
        except ClaimLost as error:
            lost = [delivery.id for delivery in deliveries if not delivery.is_done]
            log.warning("claim lost: other consumers get its messages", reason=str(error), messages=lost)
            self.metrics.lost.inc(len(lost))
            self.trouble.ends("count", "renew", "settle", "release", is_back=False)

    def _deliver_all(self, claim: Claim, deliveries: list[Delivery]) -> None:
        """Look up what is known of each message, POST the messages, and every second settle those that are ready."""
        count, together, posts = len(claim.messages), list[list[Delivery]](), set[Future[list[Delivery]]]()
        try:
            deliveries += self._insist(claim, "count", lambda: self._charges.deliveries(claim.messages)) or []
            batch = self._options.post_batch if self._maker.takes_batches else 1
            together, lane = self._charges.plan(deliveries, batch)
            posts = waiting = {self.slots.submit(self._deliver, len(group), claim, group) for group in together}
            while waiting:
                self._renew_in_time(claim)
                done, waiting = wait(waiting, timeout=SETTLE_EVERY_S)
                self._settle(claim, [delivery for post in done for delivery in post.result()])
            if lane:
                self._post_alone(claim, lane)
        finally:
            wait(posts)
            self.slots.ended(count - sum(map(len, together)))

    def _post_alone(self, claim: Claim, lane: list[Delivery]) -> None:
        """POST and settle these one by one in this thread; only one thread of the process may do so at a time."""
        is_free = self._lane.acquire(blocking=False)
        silent_at = time.monotonic()
        try:
            for delivery in lane:
                delivery.backoff = SHORT_BACKOFF_S
                self._renew_in_time(claim)
                may_post = is_free and not self._stopping.is_set() and not self.slots.is_pausing
                if may_post and self._maker.is_well(silent_at):
                    self._post(claim, [delivery], is_alone=True)
                    self._settle(claim, [delivery])
                    silent_at = time.monotonic() if delivery.answer.is_silent else silent_at
        finally:
            if is_free:
                self._lane.release()

    def _deliver(self, claim: Claim, group: list[Delivery]) -> list[Delivery]:
        """POST the messages as needed; note each one's outcome, or how long it stays away."""
        if len(group) > 1 and self._post(claim, group):
            return group
        for delivery in group:
            if not self._charges.ends_unposted(delivery):
                self._post(claim, [delivery])
        return group

    def _post(self, claim: Claim, group: list[Delivery], *, is_alone: bool = False) -> bool:
        """Wait for a slot, count the receives, POST and judge. False: a batch failed, POST its messages one by one."""
        with self.slots.turn() as posted_at:
            if not self._may_post(claim, group):
                return True
            whole = self._maker.post_batch(group) if len(group) > 1 else None
            if len(group) == 1:
                group[0].answer = self._maker.post(group[0], self._options.request_queue)
        if whole:
            self._charges.take_back_batch(group, whole, posted_at)
        else:
            self._charges.judge(group, posted_at, is_alone=is_alone)
        return not whole

    def _may_post(self, claim: Claim, group: list[Delivery]) -> bool:
        """Whether a POST may begin now: the claim outlasts it, and the receive is counted on disk."""
        is_held = all(delivery.message in claim.messages for delivery in group)
        if self._stopping.is_set() or not is_held or not self.breaker.lets(claim.id):
            return False
        if claim.holds(self._maker.deadline + POST_SPARE_S):
            return self._charges.begin(group)
        self._charges.postpone(group)
        return False

    def _settle(self, claim: Claim, ended: list[Delivery]) -> None:
        """Store the outcomes of those that have one, and delete their messages."""
        if ready := [delivery for delivery in ended if delivery.answer.outcome]:
            settlements = [each.settlement(self._options.queues, self._options.response_ttl) for each in ready]
            if settled := self._insist(claim, "settle", lambda: self._queues.settle(claim, settlements)):
                self._charges.end(claim, ready, settled)

    def _insist(self, claim: Claim, what: str, do: Callable[[], Result]) -> Result | None:
        """Repeat the call until the service has done it, and keep the claim meanwhile; None where a stop ends this."""
        while True:
            try:
                result = do()
            except (QueueUnavailable, QueueNotFound, QueueForbidden) as error:
                if self._stopping.is_set():
                    self._give_up_at = self._give_up_at or time.monotonic() + STOP_PATIENCE_S
                    if time.monotonic() > self._give_up_at:
                        return None
                self._wait_out(what, error)
                self._renew_in_time(claim)
            else:
                self.trouble.ends(what)
                return result

    def _renew_in_time(self, claim: Claim) -> None:
        """Renew the claim at half of its TTL, or earlier where a POST would outlast it. Raises ClaimLost."""
        if claim.holds(max(claim.ttl / 2, self._maker.deadline + POST_SPARE_S + 2 * SETTLE_EVERY_S)):
            return
        try:
            self._queues.renew(claim)
            self.trouble.ends("renew")
        except ClaimLost:
            claim.expires_at = 0  # so that its POST threads see it too
            raise
        except (QueueUnavailable, QueueNotFound, QueueForbidden) as error:
            self.trouble.begins("renew", error)
            if not claim.holds(0):
                raise ClaimLost(f"it could not be renewed: {error}") from error

    def _wait_out(self, what: str, error: QueueError) -> None:
        """Log once that the service fails, create a missing queue again if --create is given, and pause."""
        if isinstance(error, QueueNotFound):
            if self._drain:
                raise error
            with suppress(QueuesError):
                require_queues(self._queues, self._options.queues, create=self._options.create)
        if self._drain:
            self._drain.check(self.breaker)
        pause = min(self.trouble.begins(what, error), self._options.claim_ttl / 4)
        if self._stopping.wait(pause):
            time.sleep(min(pause, SETTLE_EVERY_S))


@click.command(cls=Command, examples=["--slots 32 --metrics-port 9100", "--queue-url zaqar://mycloud --create --drain"])
@queue_options("request", "response", "dead-letter")
@click.option("--maker-url", default="http://127.0.0.1:5000/widgets", metavar="URL", help="Where requests are POSTed.")
@click.option("--health-url", metavar="URL", help="Health page of the maker.  [default: /healthz of its origin]")
@click.option("--allow-plain-http", is_flag=True, help="POST over http:// to other machines too.")
@signing_options
@click.option("--claim-ttl", type=CLAIM_SECONDS, default=300, help="Seconds a claim holds its messages.")
@click.option("--grace", type=CLAIM_SECONDS, default=60, help="Seconds a claimed message outlives its claim.")
@click.option("--claim-limit", type=click.IntRange(1, 20), help="Most messages per claim.  [default: the service's]")
@click.option("--slots", type=click.IntRange(1, 256), default=8, help="POSTs in flight at once.")
@click.option("--post-batch", type=click.IntRange(1, 20), default=1, help="Requests per POST, if makers take batches.")
@click.option("--deadline", type=click.FloatRange(0.1, 43_190), default=20.0, help="Seconds for one POST, in all.")
@click.option("--max-receives", type=click.IntRange(2, 1000), default=5, help="Failed receives before a dead letter.")
@click.option("--poll-interval", type=click.FloatRange(0.1, 20), default=2.0, help="Longest idle wait, in seconds.")
@click.option("--response-ttl", type=MESSAGE_SECONDS, default=86_400, help="Seconds a response lives.")
@click.option("--drain", is_flag=True, help="Exit once nothing is left, messages claimed by others included.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(1, 1_209_600),
    help="Seconds until a drain gives up (exit 3).  [default: never]",
)
@click.option("--receive-counts", type=FILE, help="File of this machine's receive counts.  [default: one of this user]")
@click.option("--metrics-port", type=click.IntRange(1, 65_535), help="Port for metrics, health and a status page.")
@click.option("--metrics-host", default="127.0.0.1", help="Address for --metrics-port.")
@click.option("--check", is_flag=True, help="Check queues, maker and options, say what is wrong with them, and exit.")
@logging_options
def cli(**given: Any) -> int:
    """Claim requests, POST each to the widget maker, and settle each according to its answer.

    Runs until SIGTERM or Ctrl-C: then it finishes what is in flight, gives the rest back, and exits 0.
    Exit codes: 0 stopped or drained, 1 failed, 2 usage, 3 the drain timed out, 4 credentials, 5 a file error.
    """
    configure_logging(given["log_format"], given["log_level"])
    signer = load_signer(given["signing_secret_file"], given["signing_secret_keyring"])
    maker = Maker(given["maker_url"], signer=signer, **{name: given[name] for name in POSTING})
    counts_path = (given["receive_counts"] or state_path("receive-counts.sqlite3")).absolute()
    with opened(given) as queues:
        options = fitting(queues.limits, given)
        if given["check"]:
            report = Report()
            maker.check(report)
            check_queues(report, queues, options.queues, create=options.create)
            check_state(report, counts_path)
            return report.exit_code
        require_queues(queues, options.queues, create=options.create)
        for sentence in queues.inspect(options.request_queue):
            log.warning(sentence)
        with closing(ReceiveCounts(counts_path, f"{queues.address} {options.request_queue}")) as counts:
            work(Consumer(queues, maker, counts, options), maker, given)
    return 0


def work(consumer: Consumer, maker: Maker, given: dict[str, Any]) -> None:
    """Run the consumer until it is done or a signal stops it."""
    is_stopped = threading.Event()

    def stop() -> None:
        log.info("stopping: finishing what is in flight; a second signal ends at once")
        is_stopped.set()
        consumer.stop()

    with watched(consumer, maker, given):
        log.info("consuming", queue=given["request_queue"], maker=maker.url)
        run_until_signal(consumer.run, stop)
        log.info("drained" if given["drain"] and not is_stopped.is_set() else "stopped", **consumer.metrics.totals())


def fitting(limits: Limits, given: dict[str, Any]) -> SimpleNamespace:
    """The options, if they fit each other, this machine and the service; else raises ConfigError.

    queues: added, the names of the three queues. response_ttl: None where the service has no TTL per message.
    """
    check_descriptors(given["slots"])
    found = SimpleNamespace(**given)
    if found.drain_timeout and not found.drain:
        raise ConfigError("--drain-timeout: there is no drain without --drain")
    if found.deadline > found.claim_ttl - 10:
        raise ConfigError(f"--deadline {found.deadline:g}: must be at most --claim-ttl less 10 seconds")
    if (found.claim_limit or 0) > limits.claim_limit:
        raise ConfigError(f"--claim-limit {found.claim_limit}: {limits.service} takes up to {limits.claim_limit}")
    found.claim_limit = found.claim_limit or limits.claim_limit
    found.response_ttl = found.response_ttl if limits.has_message_ttl else None
    if found.drain and not limits.approximate_s:
        found.poll_interval = min(found.poll_interval, DRAIN_LOOKS_EVERY_S)
    found.queues = [found.request_queue, found.response_queue, found.dead_letter_queue]
    return found


if __name__ == "__main__":
    cli()
