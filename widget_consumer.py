#!/usr/bin/env python3
"""Claim requests, POST each to the widget maker, and by its answer delete the message or give it back.

One message's life: `_claim` and `_admit` (the receive is counted first of all), `_work` (the POST), `_conclude` (what
the answer means), then `_settle` (response or dead letter first, then the delete) or `_blame` and `_excuse` (back to
the queue). The order is the safety: a crash anywhere repeats a request, never loses one, and the maker makes a widget
once.
"""

import math
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from claim_queues import (
    ConfigError,
    MessageRefused,
    Post,
    QueueError,
    QueueNotFound,
    Queues,
    QueuesError,
    QueueUnavailable,
    open_queues,
)
from claim_queues.breaker import LONGEST_PAUSE_S, Breaker, Failure, Verdict, backoff
from claim_queues.command_line import (
    SETTINGS,
    Log,
    Number,
    WholeNumber,
    __version__,
    configure_logging,
    distinct,
    end_at_interrupt,
    message_ttl,
    option,
    queue_options,
    require_grace,
    require_queues,
    run,
    run_until_signal,
)
from claim_queues.keeper import End, Held, Keeper
from claim_queues.one_core import stay_on_one_core
from claim_queues.preflight import Report, check_queues
from claim_queues.signing import load_signer, signing_options
from claim_queues.store import state_path
from claim_queues.terminal import is_terminal, live_line
from delivery import OUTCOMES, Connection, Delivery, Durations, Maker, MakerMisconfigured
from receive_counts import ReceiveCounts

POST_SPARE_S = 5.0
"""A POST starts only while the claim is surely held for the deadline and so much more, to settle in."""
BACKOFF_BASE_S, LONGEST_BACKOFF_S = 0.5, 300.0
MOST_BACKOFFS_PER_SLOT = 5
MOST_ROUNDS_UNSETTLED = 4
"""So many full claims, or POSTs of all slots, more may wait to be settled: what is claimed is hidden from others."""
CLAIM_PAUSE_S, LONGEST_CLAIM_PAUSE_S = 0.5, 30.0
LOOK_AGAIN_S = 0.1
"""How long a drain waits for messages before it looks whether any are left, and claiming for what clogs it."""
CHECK_QUEUES_EVERY_S = 60.0
MISCONFIGURED_DRAIN_S = 60.0
STUCK_AFTER_S = 180.0
"""More than the timeouts of a claim with its wait and its second attempt, or of a look at all queues, add up to."""
STOP_PATIENCE_S = 10.0
"""How long a queue service that fails may hold up the end; what is not given back then waits for its claim's end."""

NOT_OUR_MAKER = "this is not our widget maker: check --maker-url"
REFUSED_BY_MAKER = "the maker refuses us: its reason says what to mend"

log = Log("widget_consumer")


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
    post_batch: int
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
    messages by what happened to them. post_times: of the POSTs, a batch being one.
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
        self._breaker: Breaker[Delivery] = Breaker(uniform=uniform)
        self._lock = threading.RLock()
        self._has_work = threading.Condition(self._lock)  # the slots wait for it
        self._has_room = threading.Condition(self._lock)  # the claiming thread waits for it
        self._waiting: deque[Delivery] = deque()
        self._trials: deque[Delivery] = deque()  # they wait for each other too
        self._tried: Delivery | None = None
        self._posting = self._idle_slots = 0
        self._asking_since: float | None = None  # the queue service, by the claiming thread
        self._most_in_a_post = settings.post_batch
        self._stopping = self._clogged = False
        self._told_to_wait_for = False, False
        self._error: Exception | None = None
        self._failing: dict[str, type[Exception]] = {}
        self._reported = self._maker_said = ""
        self._next_check_at = 0.0
        self._empty_since: float | None = None
        self._patience_s = LOOK_AGAIN_S if settings.drain else settings.poll_interval
        self.totals: Counter[str] = Counter()
        self.post_times = Durations()
        self._keeper = Keeper(queues, self, claim_ttl=settings.claim_ttl, grace=settings.grace)

    def run(self) -> None:
        """Work until stop() or, with drain, until nothing is left; raise what made it impossible to go on."""
        slots = [
            threading.Thread(target=self._guard, args=(self._work,), name=f"slot-{number}", daemon=True)
            for number in range(self._settings.slots)
        ]
        log.info("consuming", queue=self._settings.request_queue, service=self._queues.address, maker=self._maker.url)
        for slot in slots:
            slot.start()
        self._guard(self._claim_until_done)
        self.stop()
        for slot in slots:
            slot.join()
        with self._lock:
            self._excuse(self._breaker.take_suspects())  # those of the last POSTs
        if left := self._keeper.close(STOP_PATIENCE_S):
            log.warning("not given back: free again when their claims end", messages=left)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Claim nothing more, let POSTs in flight end, give everything else back at once. From any thread."""
        self._queues.stop_waiting()
        self._keeper.hurry()
        with self._lock:
            self._stopping = True
            self._has_work.notify_all()
            self._has_room.notify_all()
            self._excuse([*self._breaker.take_suspects(), *self._take_waiting()])

    def status(self) -> dict[str, int]:
        """Numbers now: claims held, their open messages, those that wait for a slot, those being POSTed, busy slots."""
        with self._lock:
            return {
                "claims": self._keeper.count_claims(),
                "held": self._keeper.count(),
                "waiting": len(self._waiting) + len(self._trials),
                "posting": self._posting,
                "busy_slots": self._settings.slots - self._idle_slots,
            }

    @property
    def requests(self) -> Counter[str]:
        """Those sent to the queue service, by operation."""
        return self._queues.requests

    @property
    def maker_trouble(self) -> Failure | None:
        """Why the breaker is open; None while it is closed."""
        return self._breaker.open_for

    @property
    def is_stuck(self) -> bool:
        """Whether the queue service has kept the claiming thread waiting for longer than it ever should."""
        since = self._asking_since
        return since is not None and time.monotonic() - since > STUCK_AFTER_S

    # When to claim

    def _claim_until_done(self) -> None:
        pause = 0.0
        while (claim := self._next_claim()) is not None:
            try:
                self._asking_since = time.monotonic()
                try:
                    is_over = not claim() and self._is_done()
                finally:
                    self._asking_since = None
                if is_over:
                    outcomes: dict[str, Any] = {outcome: self.totals[outcome] for outcome in OUTCOMES}
                    log.info("drained", queue=self._settings.request_queue, **outcomes)
                    return
                pause = 0.0
                self._service_answers("claim")
            except QueueError as error:
                self._service_fails("claim", error)
                asked = error.retry_after_s or 0 if isinstance(error, QueueUnavailable) else 0
                pause = min(LONGEST_CLAIM_PAUSE_S, max(CLAIM_PAUSE_S, 2 * pause))
                with self._lock:
                    self._has_room.wait_for(lambda: self._stopping, max(asked, pause * self._uniform(0.5, 1)))

    def _next_claim(self) -> Callable[[], bool] | None:
        """Wait until a claim is wanted, of a batch or of one message to try the maker with; None ends claiming."""
        with self._lock:
            while not self._stopping:
                now = time.monotonic()
                decide_at = self._breaker.decide_at
                if self._breaker.is_open:
                    if now >= self._hopeless_at():
                        raise MakerMisconfigured(
                            f"{self._maker.url}: {self._reported} ({self._maker_said}); the queue is as it was"
                        )
                    busy = bool(self._waiting or self._trials or self._posting)
                    if not busy and now >= self._breaker.next_probe_at:
                        return self._probe
                    self._has_room.wait(None if busy else min(self._breaker.next_probe_at, self._hopeless_at()) - now)
                elif decide_at is not None and now >= decide_at:
                    self._act_on(self._breaker.undecided())
                elif self._has_enough():
                    self._has_room.wait(None if decide_at is None else decide_at - now)
                else:
                    self._clogged = True  # before the look, or what is settled in between would wake nobody
                    if not self._is_clogged():
                        self._clogged = False
                        return self._claim_batch
                    self._has_room.wait(LOOK_AGAIN_S)
            return None

    def _has_enough(self) -> bool:
        """Whether enough messages wait to fill all slots once."""
        return len(self._waiting) >= self._settings.slots * self._most_in_a_post

    def _is_clogged(self) -> bool:
        """Whether too many messages are held that nothing can be done with now."""
        most = MOST_BACKOFFS_PER_SLOT * self._settings.slots
        if self._keeper.backing_off() + len(self._trials) > most:
            return True
        in_a_round = max(self._settings.claim_limit, self._settings.slots * self._most_in_a_post)
        return self._keeper.settling() > most + MOST_ROUNDS_UNSETTLED * in_a_round

    def _hopeless_at(self) -> float:
        """When a drain gives up on a maker that waiting does not mend (monotonic); infinity while it need not."""
        since = self._breaker.misconfigured_since
        return since + MISCONFIGURED_DRAIN_S if self._settings.drain and since is not None else math.inf

    def _is_done(self) -> bool:
        """See to the queues now and then while there is nothing to claim; with drain, say whether nothing is left."""
        settings, now = self._settings, time.monotonic()
        if now >= self._next_check_at:
            self._next_check_at = now + CHECK_QUEUES_EVERY_S
            self._require_queues()
        if not settings.drain or self._keeper.count() or self._is_any_left():
            self._empty_since = None
            is_working = self._keeper.count() > self._keeper.backing_off()
            self._patience_s = LOOK_AGAIN_S if settings.drain and is_working else settings.poll_interval
            return False
        if self._empty_since is None:
            self._empty_since = now
        return now - self._empty_since >= self._queues.limits.stats_settle

    def _is_any_left(self) -> bool:
        """Whether the request queue holds messages while this consumer holds none; say what a drain waits for."""
        stats = self._queues.stats(self._settings.request_queue)
        waits_for = stats.claimed > 0, stats.delayed > 0
        if any(waits_for) and waits_for != self._told_to_wait_for and not self._stopping:
            self._told_to_wait_for = waits_for
            log.info("waiting: messages are claimed or delayed", claimed=stats.claimed, delayed=stats.delayed)
        return stats.total > 0

    # Claim

    def _claim_batch(self) -> bool:
        return self._claim(self._settings.claim_limit, wait=self._patience_s)

    def _probe(self) -> bool:
        """Claim one message to try the maker with: another than the one that failed last, if there is another."""
        if self._claim(1, wait=0, probe=True):
            return True
        with self._lock:
            self._excuse(self._breaker.take_suspects())
        return self._claim(1, wait=self._settings.poll_interval, probe=True)

    def _claim(self, limit: int, *, wait: float, probe: bool = False) -> bool:
        found = self._keeper.claim(self._settings.request_queue, limit=limit, wait=wait)
        if found:
            self._admit(found, probe=probe)
        return bool(found)

    def _admit(self, found: list[Held], *, probe: bool) -> None:
        """Count the receives before anything else; then line the messages up for the slots, or end them here."""
        try:
            receives = self._counts.received([held.message for held in found])
        except QueuesError:
            for held in found:
                self._keeper.give_back(held)
            raise
        with self._lock:
            self.totals["received"] += len(found)
            self.totals["redelivered"] += sum(counted.count > 1 for counted in receives)
            for held, counted in zip(found, receives, strict=True):
                alone = probe and self._breaker.last_failed == held.message.id
                delivery = Delivery(held, counted, probe=probe, alone=alone)
                if delivery.widget_id is None:
                    self._bury(delivery, "the body is no request: a JSON object with a string widget_id")
                elif counted.charged > self._settings.max_receives:
                    self._bury(delivery, f"received {counted.charged} times without an outcome")
                elif self._stopping or (self._breaker.is_open and not probe):
                    self._excuse([delivery])
                else:
                    self._waiting.append(delivery)
            self._put_on_trial()
            self._has_work.notify()

    # POST

    def _work(self) -> None:
        """One slot: POST one message, or one batch of them, after the other."""
        connection = self._maker.connect()
        while batch := self._next_batch():
            ready = [delivery for delivery in batch if self._is_ready(delivery)]
            if len(ready) > 1:
                self._post_batch(ready, connection)
            elif ready:
                self._post(ready[0], connection)
        connection.close()

    def _next_batch(self) -> list[Delivery]:
        """Wait for one message, or some that go together; none once the consumer stops."""
        with self._lock:
            self._idle_slots += 1
            self._has_work.wait_for(lambda: self._may_post() or self._stopping)
            if self._stopping:
                return []
            self._idle_slots -= 1
            had_enough = self._has_enough()
            if self._trials and self._tried is None:
                self._tried = self._trials.popleft()
                batch = [self._tried]
            else:
                batch = [self._waiting.popleft()]
            while self._waiting and len(batch) < self._most_in_a_post and batch[0].joins(self._waiting[0]):
                batch.append(self._waiting.popleft())
            self._posting += len(batch)
            if self._may_post():
                self._has_work.notify()  # one slot wakes the next: all at once would only queue for the lock
            if had_enough and not self._has_enough():
                self._has_room.notify()
            return batch

    def _may_post(self) -> bool:
        return bool(self._waiting or (self._trials and self._tried is None))

    def _is_ready(self, delivery: Delivery) -> bool:
        """Whether its claim is surely held for a POST; if not, the message is another's, or goes back."""
        if delivery.alone:  # before the look at the claim: this may take as long as a POST
            delivery.well_before = self._maker.is_healthy()
        # A stop may wait for one POST's deadline, not for a look at /healthz beside it.
        is_ready = not self._stopping and self._keeper.holds(delivery.held, self._maker.deadline_s + POST_SPARE_S)
        if is_ready and delivery.on_trial:
            with self._lock, self._counts_written():
                self._counts.charge([delivery.id])  # takes seconds while another process keeps them locked
            delivery.on_trial = False
            is_ready = self._keeper.holds(delivery.held, self._maker.deadline_s)
        if is_ready:
            return True
        with self._lock:
            self._posting -= 1
            self._end_trial([delivery.held])
            if not delivery.held.lost:
                self._excuse([delivery])
            self._has_room.notify()
        return False

    def _post(self, delivery: Delivery, connection: Connection) -> None:
        """POST. One that fails alone, with no other to try, is guilty if the maker is well before and after."""
        headers = delivery.headers(self._settings.request_queue)
        started = time.monotonic()
        delivery.answer = connection.post(delivery.held.message.body, headers)
        seconds = time.monotonic() - started
        proves = delivery.well_before and delivery.failure is not None and not self._stopping
        guilty = proves and self._maker.is_healthy()
        with self._lock:
            self.post_times.add(seconds)
        self._conclude(delivery, guilty=guilty, seconds=seconds)

    def _post_batch(self, batch: list[Delivery], connection: Connection) -> None:
        """POST them together; what fails as a whole is POSTed again one by one, to see whose fault it is."""
        started = time.monotonic()
        whole = connection.post_batch(batch)
        seconds = time.monotonic() - started
        with self._lock:
            self.post_times.add(seconds)
            if whole is None:
                for delivery in batch:
                    self._conclude(delivery, guilty=False, seconds=seconds)
                return
            self._posting -= len(batch)
            for delivery in batch:
                delivery.single = True
                delivery.batch_refusal = whole.reason if whole.failure is Failure.MISCONFIGURED else ""
            if self._stopping or self._breaker.is_open:
                self._excuse(batch)
            else:
                self._waiting.extendleft(reversed(batch))
                self._has_work.notify()
            self._has_room.notify()

    # Act on the answer

    def _conclude(self, delivery: Delivery, *, guilty: bool, seconds: float) -> None:
        answer, delivery.post_s = delivery.answer, seconds
        with self._lock:
            self._posting -= 1
            was_open = self._breaker.is_open
            if answer.outcome is None:
                self._end_trial([delivery.held])
                self._act_on(self._breaker.failed(delivery, probe=delivery.probe, guilty=guilty))
            else:
                log.info(answer.outcome, **delivery.fields(), outcome=answer.outcome, reason=answer.reason or None)
                self._settle(delivery, answer.outcome, answer.reason, fenced=False)
                self._act_on(self._breaker.passed(probe=delivery.probe))
                self._stop_batches(delivery.batch_refusal)
            if was_open and not self._breaker.is_open:
                self._reported = ""
                self._most_in_a_post = self._settings.post_batch
                log.info("the maker is back", after_s=round(time.monotonic() - self._breaker.opened_at, 1))
            if was_open or answer.outcome is None:
                self._has_room.notify()  # when to claim next may have changed

    def _settle(self, delivery: Delivery, outcome: str, reason: str, *letters: Post, fenced: bool) -> None:
        """Post the response, and delete the message only then."""
        self.totals[outcome] += 1
        response = delivery.response(outcome, reason)
        post = Post(self._settings.response_queue, response, self._settings.response_ttl)
        self._keeper.settle(delivery.held, [*letters, post], fenced=fenced)

    def _stop_batches(self, refusal: str) -> None:
        """Where a batch was refused that passes one by one, the batch was at fault, not the maker's URL."""
        if refusal and self._most_in_a_post > 1:
            self._most_in_a_post = 1
            log.error("the maker takes no batches: posting one by one", url=self._maker.url, reason=refusal)

    def _act_on(self, verdict: Verdict[Delivery]) -> None:
        """Blame and excuse as the breaker says; when it opens, give back all that waits for a slot."""
        for delivery in verdict.blamed:
            self._blame(delivery)
        with self._counts_written():
            for id_ in verdict.pardoned:  # one message may have been blamed more than once
                self._counts.excuse([id_])
        # Longer the longer it lasts, or a few bad ones at the head of the queue would be tried in turn for ever.
        open_s = time.monotonic() - self._breaker.opened_at if self._breaker.is_open else 0
        longest_s = min(LONGEST_BACKOFF_S, max(LONGEST_PAUSE_S, open_s))
        self._excuse(verdict.excused, longest_backoff_s=longest_s)
        if verdict.opened_by is not None:
            self._report_maker(verdict.opened_by)
            self._excuse(self._take_waiting())

    def _blame(self, delivery: Delivery) -> None:
        """The failure counts: the message comes back after a backoff or, received often enough, is a dead letter."""
        charged, answer = delivery.receives.charged, delivery.answer
        if delivery.held.lost:
            return
        if charged >= self._settings.max_receives:
            self._bury(delivery, answer.reason)
            return
        delay = max(self._backoff(charged, LONGEST_BACKOFF_S), answer.retry_after_s or 0)
        self.totals["retried"] += 1
        log.warning("failed, comes back", **delivery.fields(), reason=answer.reason, backoff_s=round(delay, 1))
        self._keeper.give_back(delivery.held, delay=delay)

    def _bury(self, delivery: Delivery, reason: str) -> None:
        """Make the message a dead letter."""
        log.error("dead letter", **delivery.fields(), outcome="failed", reason=reason)
        letter = delivery.dead_letter(self._settings.request_queue, reason)
        self._settle(delivery, "failed", reason, Post(self._settings.dead_letter_queue, letter), fenced=True)

    def _excuse(self, deliveries: Collection[Delivery], *, longest_backoff_s: float = 0) -> None:
        """Give the messages back, by default at once; this receive does not count against them."""
        if not deliveries:
            return
        self.totals["excused"] += len(deliveries)
        with self._counts_written():
            self._counts.excuse([delivery.id for delivery in deliveries if not delivery.on_trial])
        for delivery in deliveries:
            self._keeper.give_back(delivery.held, delay=self._backoff(delivery.receives.count, longest_backoff_s))

    def _backoff(self, attempt: int, longest_s: float) -> float:
        return backoff(attempt, base_s=BACKOFF_BASE_S, longest_s=longest_s, uniform=self._uniform)

    @contextmanager
    def _counts_written(self) -> Iterator[None]:
        """A file that is locked makes the counts less exact, no more; a damaged one ends the consumer in good order."""
        try:
            yield
        except QueueUnavailable as error:
            log.warning("receive counts not written", reason=str(error))
        except QueuesError as error:
            self._end_with(error)

    def _take_waiting(self) -> list[Delivery]:
        waiting = [*self._trials, *self._waiting]
        self._trials.clear()
        self._waiting.clear()
        return waiting

    def _report_maker(self, delivery: Delivery) -> None:
        """One line when the maker goes, and when what is wrong with it changes."""
        misconfigured = delivery.failure is Failure.MISCONFIGURED
        event = "the maker is unavailable: probing until it is back"
        if misconfigured:
            event = REFUSED_BY_MAKER if delivery.answer.refused else NOT_OUR_MAKER
        if event != self._reported:
            say = log.error if misconfigured else log.warning
            say(event, url=self._maker.url, reason=delivery.answer.reason)
        self._reported, self._maker_said = event, delivery.answer.reason

    # What was received often is POSTed by itself

    def _put_on_trial(self) -> None:
        """Charge what was received often only when its POST starts, and POST such messages one at a time.

        A message that kills its consumer takes the others along that are claimed, or being POSTed, time after time;
        only its own POSTs must count.
        """
        often = self._settings.max_receives // 2
        tried = [found for found in self._waiting if found.receives.charged > often and not found.on_trial]
        if tried:
            with self._counts_written():
                self._counts.excuse([delivery.id for delivery in tried])
        for delivery in tried:
            delivery.on_trial = True
            if often:  # else all would be POSTed one at a time
                self._waiting.remove(delivery)
                self._trials.append(delivery)

    def _end_trial(self, ended: Collection[Held]) -> None:
        """Let the next one on trial be POSTed: until then, the death of this process would count against both."""
        if self._tried is not None:
            with self._lock:
                if self._tried is not None and self._tried.held in ended:
                    self._tried = None
                    self._has_work.notify()

    # What the keeper tells (KeeperEvents)

    def messages_ended(self, ended: list[Held], end: End) -> None:
        self._end_trial(ended)
        if self._clogged:
            with self._lock:
                self._has_room.notify()
        ids = [held.message.id for held in ended]
        if end is End.SETTLED:
            with self._counts_written():
                self._counts.forget(ids)
        elif end is End.LOST:
            self.totals["lost"] += len(ids)
            for id_ in ids:
                log.warning("claim lost: another consumer gets the message", message=id_)

    def message_refused(self, held: Held, error: MessageRefused) -> None:
        self._end_trial([held])
        log.error("no queue takes the outcome: the message stays queued", message=held.message.id, reason=str(error))

    def service_failed(self, error: Exception) -> None:
        self._service_fails("settle", error)

    def service_answered(self) -> None:
        self._service_answers("settle")

    def keeper_died(self, error: Exception) -> None:
        self._end_with(error)

    # What fails

    def _service_fails(self, doing: str, error: Exception) -> None:
        """One line when the queue service stops doing something or for another reason, not one for each attempt.

        A queue that is gone is made anew with --create. Without, somebody has to; only a drain does not wait for that.
        """
        if isinstance(error, QueueNotFound):
            try:
                self._require_queues()
            except QueueNotFound as missing:
                error = missing
                if self._settings.drain:
                    self._end_with(error)
                    return
            except QueueError as other:
                error = other
        kind = QueueUnavailable if isinstance(error, QueueUnavailable) else type(error)
        if self._failing.get(doing) is not kind:
            self._failing[doing] = kind
            log.warning("the queue service fails: trying again", doing=doing, reason=str(error))

    def _service_answers(self, doing: str) -> None:
        if doing in self._failing:
            del self._failing[doing]
            log.info("the queue service is back", doing=doing)

    def _require_queues(self) -> None:
        require_queues(self._queues, self._settings.queues, create=self._settings.create)

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; whatever it raises ends the consumer in good order."""
        try:
            work()
        except Exception as error:
            self._end_with(error)

    def _end_with(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
            self.stop()


@click.command(context_settings=SETTINGS)
@queue_options("request", "response", "dead-letter")
@option("--maker-url", default="http://127.0.0.1:5000/widgets", help="Where requests are POSTed.")
@option("--allow-plain-http", is_flag=True, help="POST over http:// to other machines too.")
@signing_options
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
    "--post-batch",
    type=WholeNumber(1, 20, "requests"),
    default=1,
    help="Requests of one claim that go into one POST, for makers that take batches.",
)
@option(
    "--deadline", type=Number(0.1, 43_190, "seconds"), default=20.0, help="Seconds for one POST, by the wall clock."
)
@option(
    "--max-receives", type=WholeNumber(1, 1000, "receives"), default=5, help="Receives that count before a dead letter."
)
@option("--poll-interval", type=Number(0.1, 20, "seconds"), default=2.0, help="Longest idle wait, in seconds.")
@option("--response-ttl", type=WholeNumber(60, 1_209_600, "seconds"), default=86_400, help="Seconds a response lives.")
@option("--drain", is_flag=True, help="Exit once nothing is left, messages claimed by others included.")
@option(
    "--receive-counts",
    metavar="FILE",
    help="Where receives are counted; `none`: in memory alone.  [default: one file per user]",
)
@option(
    "--metrics-port", type=WholeNumber(1, 65_535), help="Serve metrics, health and a status page on this loopback port."
)
@option("--log-format", type=click.Choice(["text", "json"]), default="text", help="Form of the log on stderr.")
@option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", help="Least level logged."
)
@option("--check", is_flag=True, help="Check queues, maker and options, say what is wrong with them, and exit.")
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> int:
    """Claim requests, POST each to the widget maker, and settle each by its answer.

    Runs until SIGTERM or Ctrl-C: then it finishes what is in flight, gives the rest back, and exits 0.
    Exit codes: 0 stopped or drained, 1 failed, 2 usage, 4 credentials, 5 a local file cannot be used.
    """
    configure_logging(given["log_format"], given["log_level"])
    if given["check"]:
        return _check(ctx, given)
    if given["deadline"] > given["claim_ttl"] - 10:
        raise ConfigError(f"--deadline {given['deadline']:g}: must be at most --claim-ttl less 10 seconds")
    distinct(given["request_queue"], given["response_queue"], given["dead_letter_queue"])
    maker = _maker(given)
    with open_queues(given["queue_url"]) as queues:
        settings = _settings(ctx, queues, given)
        require_queues(queues, settings.queues, create=settings.create)
        counts = _open_counts(queues, settings, given)
        consumer = Consumer(queues, maker, counts, settings)

        def stop() -> None:
            log.info("stopping: finishing what is in flight; a second signal ends at once")
            consumer.stop()

        stay_on_one_core()
        with _watched(consumer, maker, given):
            run_until_signal(consumer.run, stop=stop)
        counts.close()
    return 0


def _check(ctx: click.Context, given: dict[str, Any]) -> int:
    """Print what would keep a consumer with these options from its work; gives the exit code."""
    report = Report()
    maker = _maker(given)
    if trouble := maker.trouble():
        report.failure(f"maker {maker.url}: {trouble}")
    elif not maker.is_healthy():
        report.warning(f"maker {maker.url}: its /healthz does not answer: a bad message alone is tried for ever")
    else:
        report.ok(f"maker {maker.url}: answers as the widget maker does")
    with open_queues(given["queue_url"]) as queues:
        settings = _settings(ctx, queues, given)
        options = {name: given[name] for name in ("claim_ttl", "grace", "deadline", "create")}
        check_queues(report, queues, settings.queues, **options)
        _open_counts(queues, settings, given).close()
    report.ok("the other options fit, and receives can be counted")
    return report.exit_code


@contextmanager
def _watched(consumer: Consumer, maker: Maker, given: dict[str, Any]) -> Iterator[None]:
    """Show the consumer's numbers until the block ends: on a terminal, and where --metrics-port asks for it."""
    port = given["metrics_port"]
    if not port and not (is_terminal(sys.stderr) and given["log_format"] == "text"):
        yield
        return
    from monitoring import Monitor, serve

    with open_queues(given["queue_url"]) as queues:  # its own: what it asks must not hold up claims
        names = {kind: given[f"{kind}_queue"] for kind in ("request", "dead_letter")}
        monitor = Monitor(consumer, maker, queues, names)
        with live_line(monitor.status_line), serve(monitor, port) if port else nullcontext():
            yield


def _settings(ctx: click.Context, queues: Queues, given: dict[str, Any]) -> Settings:
    """The options as this service can honour them; an option that it cannot is refused."""
    limits = queues.limits
    require_grace(ctx, limits)
    values = {name: given[name] for name in Settings.__dataclass_fields__}
    values["claim_limit"] = given["claim_limit"] or limits.claim_limit
    values["response_ttl"] = message_ttl(ctx, limits, "response_ttl")
    limits.check_claim(ttl=values["claim_ttl"], grace=values["grace"], limit=values["claim_limit"])
    limits.check_message_ttl(values["response_ttl"])
    return Settings(**values)


def _maker(given: dict[str, Any]) -> Maker:
    return Maker(
        given["maker_url"],
        deadline_s=given["deadline"],
        signer=load_signer(given["signing_secret_file"], given["signing_secret_keyring"]),
        allow_plain_http=given["allow_plain_http"],
    )


def _open_counts(queues: Queues, settings: Settings, given: dict[str, Any]) -> ReceiveCounts:
    path, name = None, given["receive_counts"]
    if name != "none":
        path = Path(name).absolute() if name else state_path("receive-counts.sqlite3")
    source = f"{queues.address} {settings.request_queue}"
    return ReceiveCounts(path, source, counted_by_service=queues.limits.counts_receives)


def main() -> None:
    """Entry point of the command `widget-consumer`."""
    end_at_interrupt()
    run(cli)


if __name__ == "__main__":
    main()
