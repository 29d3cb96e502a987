"""What a message is charged for a failure, whether it is left open, and how long it stays away.

| failure                                               | charged                                                   |
| ----------------------------------------------------- | --------------------------------------------------------- |
| any after a stop or while the row is full; HTTP 429   | nothing                                                   |
| any other, while the maker is not well                | nothing                                                   |
| failed                                                | one receive                                               |
| unavailable, late                                     | a fifth of one                                            |
| misconfigured                                         | a fifth, if another message passed since this POST began  |
| cut off after it was sent                             | nothing                                                   |
| no answer to a POST of the lane                       | one receive, but nothing from the tenth in a row on       |

A POST that was cut off, or got no answer while the maker is not well, leaves its message *open*: this may be the one
that kills the maker (see receive_counts.py). A message left open twice in a row goes through the lane.
"""

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import structlog

from claim_queues import Claim, Message, QueueUnavailable, Settled
from receive_counts import RECEIVE, ReceiveCounts, Receives

from .breaker import Breaker
from .delivery import Answer, Delivery, Failure, Maker
from .monitoring import Metrics
from .slots import Slots

BACKOFF_S, LONGEST_BACKOFF_S, SHORT_BACKOFF_S = 0.5, 300.0, 10.0
MANY = 10
"""An uncharged message stays away for up to this many times its POST's duration, so that slow ones delay no others."""
FIFTHS: dict[Failure | None, int] = {Failure.FAILED: RECEIVE, Failure.UNAVAILABLE: 1, Failure.LATE: 1, Failure.CUT: 0}
FRESH_S = 1.0
"""A health answer may be this much older than the failure that it judges."""

log = structlog.get_logger()


class Charges:
    """Judges the answers of a maker. most: receives before a message is a dead letter, at least 2."""

    def __init__(
        self, counts: ReceiveCounts, maker: Maker, breaker: Breaker, slots: Slots, metrics: Metrics, *, most: int
    ) -> None:
        self._counts = counts
        self._metrics = metrics
        self._maker = maker
        self._breaker = breaker
        self._slots = slots
        self._most = most * RECEIVE
        self._most_open = 1 if most < 3 else 2

    def deliveries(self, messages: Sequence[Message]) -> list[Delivery]:
        """The messages that were claimed just now, with what is known of them."""
        before = self._counts.of(message.id for message in messages)
        found = [Delivery(message, before.get(message.id, Receives())) for message in messages]
        self._metrics.claimed(found)
        return found

    def plan(self, deliveries: Sequence[Delivery], batch: int) -> tuple[list[list[Delivery]], list[Delivery]]:
        """The groups to POST, fresh messages in batches of up to `batch`; and the messages to POST in the lane."""
        lane = [delivery for delivery in deliveries if self._is_for_lane(delivery)]
        others = [delivery for delivery in deliveries if delivery not in lane]
        fresh = [each for each in others if batch > 1 and each.widget_id is not None and not each.before.receives]
        alone = [[delivery] for delivery in others if delivery not in fresh]
        return [fresh[n : n + batch] for n in range(0, len(fresh), batch)] + alone, lane

    def ends_unposted(self, delivery: Delivery) -> bool:
        """Whether it is a dead letter without another POST; its answer says why."""
        if delivery.widget_id is None:
            delivery.answer = Answer("failed", reason="the body is not a request")
        elif self._is_spent(delivery):
            delivery.answer = Answer("failed", reason=f"received {delivery.receive_count} times without an outcome")
        return delivery.answer.outcome is not None

    def begin(self, deliveries: Sequence[Delivery]) -> bool:
        """Just before a POST, count one more receive of each message, charge it and mark it open.

        False where that cannot be stored now: then there must be no POST.
        """
        try:
            begun = self._counts.begin([delivery.id for delivery in deliveries])
        except QueueUnavailable as error:
            log.warning("receives not counted: no POST", reason=str(error))
            self.postpone(deliveries)
            return False
        for delivery, receives in zip(deliveries, begun, strict=True):
            delivery.receives, delivery.charged = receives, RECEIVE
        return True

    def judge(self, deliveries: Sequence[Delivery], posted_at: float, *, is_alone: bool = False) -> None:
        """Tell the breaker of each answer; after a failure charge the message, and decide how long it stays away.

        is_alone: it was the only POST in the lane, so that only its message can be blamed for a missing answer.
        """
        took = time.monotonic() - posted_at
        for delivery in deliveries:
            delivery.took = took
            if delivery.answer.outcome:
                self._pass(delivery, posted_at)
            else:
                self._fail(delivery, posted_at, is_alone=is_alone)
            self._metrics.posted(delivery)
        if any(delivery.answer.status or delivery.answer.failure is Failure.LATE for delivery in deliveries):
            self._slots.took(took)

    def postpone(self, deliveries: Iterable[Delivery]) -> None:
        """Let them stay away for a while, though they were not POSTed."""
        for delivery in deliveries:
            delivery.backoff = SHORT_BACKOFF_S

    def take_back(self, claim: Claim, deliveries: Iterable[Delivery]) -> None:
        """Undo the charge of each POST whose outcome was not stored.

        The charge stays where the dead letter is stored already: another POST could only contradict it.
        """
        for delivery in deliveries:
            if delivery.is_done or not delivery.charged or not delivery.answer.outcome:
                continue
            if delivery.answer.outcome != "failed":
                self._charge(delivery, 0, 0)
            elif delivery.id not in dict(claim.posted):
                self._charge(delivery, 0, None)

    def take_back_batch(self, deliveries: Sequence[Delivery], whole: Answer, posted_at: float) -> None:
        """After a batch failed as a whole: charge none of its messages, because they are now POSTed one by one."""
        log.warning("a batch failed: POSTing its messages one by one", reason=whole.reason)
        if whole.asks_for_patience:
            self._slots.busy(deliveries[0].id, whole, posted_at)
        for delivery in deliveries:
            self._charge(delivery, 0, 0)

    def end(self, claim: Claim, deliveries: Sequence[Delivery], settled: Settled) -> None:
        """Forget what is settled, and log the end of each of these messages."""
        self._counts.forget(settled.deleted)
        for delivery in deliveries:
            answer, error = delivery.answer, settled.refused.get(delivery.id)
            if error:
                delivery.backoff = LONGEST_BACKOFF_S
                log.error("no queue accepts the outcome: message stays queued", **delivery.fields(), reason=str(error))
            elif delivery.id not in settled.deleted:
                self.take_back(claim, [delivery])
                delivery.is_done = True
                self._metrics.lost.inc()
                log.warning("claim lost: another consumer gets the message", **delivery.fields())
            else:
                delivery.is_done = True
                self._metrics.outcomes.labels(answer.outcome).inc()
                event, say = ("dead letter", log.error) if answer.outcome == "failed" else (answer.outcome, log.info)
                say(event, **delivery.fields(), outcome=answer.outcome, reason=answer.reason or None)

    def _is_for_lane(self, delivery: Delivery) -> bool:
        """Whether its last POSTs ended with the death of their consumer or of the maker."""
        is_killer = delivery.before.open >= self._most_open
        return is_killer and delivery.widget_id is not None and not self._is_spent(delivery)

    def _is_spent(self, delivery: Delivery) -> bool:
        return delivery.before.charged >= self._most

    def _pass(self, delivery: Delivery, posted_at: float) -> None:
        if delivery.answer.status:  # else the body could not be sent
            self._slots.passed()
            self._breaker.passed(posted_at)
        if delivery.before.open:  # else it stays charged if its consumer dies before it is settled
            self._charge(delivery, 0, 0)

    def _fail(self, delivery: Delivery, posted_at: float, *, is_alone: bool) -> None:
        """Charge a failure by the table above; its message stays away for a time, or becomes a dead letter."""
        answer, is_stopping = delivery.answer, self._slots.is_stopping
        if answer.asks_for_patience:
            self._slots.busy(delivery.id, answer, posted_at)
        is_well = not is_stopping and self._maker.is_well(time.monotonic() - FRESH_S)
        charge = 0
        if answer.status != 429 and not is_stopping:
            if is_alone and answer.is_silent:
                charge = RECEIVE if self._breaker.silent(delivery.id) else 0
            else:
                has_passed = self._breaker.has_passed_since(posted_at)
                weight = int(has_passed) if answer.failure is Failure.MISCONFIGURED else FIFTHS[answer.failure]
                charge, back = self._breaker.failed(delivery.id, answer, weight if is_well else 0, is_well=is_well)
                self._counts.charge(back, None)
        if answer.failure is Failure.CUT or (answer.is_silent and not is_well and not is_stopping):
            left_open = delivery.before.open + 1
        elif answer.status or (is_well and answer.failure is Failure.LATE):
            left_open = 0
        else:  # nothing was sent, or that is unknown
            left_open = delivery.before.open
        charged = self._charge(delivery, charge, left_open)
        delivery.backoff = backoff(delivery, is_charged=charge > 0, is_well=is_well)
        if charged >= self._most:
            delivery.answer = replace(answer, outcome="failed")
        else:
            say = log.warning if charge else log.debug  # in an outage, not a line for each message
            say("failed, comes back", **delivery.fields(), reason=answer.reason, charged=charge / RECEIVE)

    def _charge(self, delivery: Delivery, fifths: int, left_open: int | None) -> int:
        """Set the charge of its last receive; returns all that the message is charged, 0 where that is unknown."""
        charged = self._counts.charge({delivery.id: fifths - delivery.charged}, left_open)
        delivery.charged = fifths
        return charged.get(delivery.id, 0)


def backoff(delivery: Delivery, *, is_charged: bool, is_well: bool) -> float:
    """The longest that a failed message may stay away, in seconds: doubled at each receive."""
    longest = LONGEST_BACKOFF_S if is_charged else max(SHORT_BACKOFF_S, MANY * delivery.took)
    if not is_well:
        longest = SHORT_BACKOFF_S
    doubled = max(BACKOFF_S, delivery.took) * 2.0 ** min(delivery.receives.receives, 20)
    return min(LONGEST_BACKOFF_S, longest, doubled)


def release_delay(deliveries: Sequence[Delivery]) -> float:
    """Seconds until the unfinished ones come back together, with full jitter: up to their longest backoff, but no more
    than their shortest one or 10 s, whichever is longer; and not before a Retry-After within that."""
    left = [delivery for delivery in deliveries if not delivery.is_done]
    waits = [max(delivery.backoff, delivery.answer.retry_after) for delivery in left] or [0]
    longest = min(max(waits), max(SHORT_BACKOFF_S, min(waits)))
    asked = max((delivery.answer.retry_after for delivery in left), default=0)
    return max(random.uniform(0, longest), min(asked, longest))  # noqa: S311
