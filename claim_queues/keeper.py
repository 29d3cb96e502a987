"""Hold claimed messages until each is settled or given back: renew in time, settle in batches, release.

A consumer claims through the keeper, works on the messages in any order, and says how each ends. The keeper's own
thread does the rest, so that a slow settlement or renewal never holds up the consumer's work.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Protocol

from .base import Claim, Message, Post, Queues, Settlement
from .errors import ClaimLost, MessageRefused, QueueError

SAFETY_S = 2.0
"""Services floor a claim's end to whole seconds: a claim is trusted for this much less than its claim TTL."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Between attempts while the service refuses a settlement, renewal or release; doubled each time."""
REFUSED_DELAY_S = 600.0
"""A message whose outcome no queue takes comes back after so long; nothing of it is cut off or thrown away."""


class End(Enum):
    """How a message left the keeper."""

    SETTLED = "settled"
    RELEASED = "released"
    LOST = "lost"


@dataclass(eq=False, slots=True)
class HeldClaim:
    """A claim and what is still open of it. until: monotonic time up to which it is surely ours."""

    claim: Claim
    until: float
    open: dict[str, "Held"] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Held:
    """One claimed message. back_at: monotonic time at which it is to be free again, once it was given back."""

    message: Message
    of: HeldClaim
    settlement: Settlement | None = None
    back_at: float | None = None
    lost: bool = False


class KeeperEvents(Protocol):
    """What a keeper tells its owner, from the keeper's thread and without holding any lock."""

    def messages_ended(self, ended: list[Held], end: End) -> None:
        """The messages are no longer held."""

    def message_refused(self, held: Held, error: MessageRefused) -> None:
        """No queue takes the message's outcome; it stays queued and comes back in REFUSED_DELAY_S."""

    def service_failed(self, error: Exception) -> None:
        """The service failed and will be asked again; told for each attempt."""

    def service_answered(self) -> None:
        """The service did what it was asked."""

    def keeper_died(self, error: Exception) -> None:
        """Something that waiting cannot mend (a damaged file, refused credentials): nothing is held any more."""


class Keeper:
    """The claims that one process holds. Thread-safe. claim_ttl, grace: seconds, for each claim and renewal."""

    def __init__(
        self,
        queues: Queues,
        events: KeeperEvents,
        *,
        claim_ttl: int,
        grace: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queues = queues
        self._events = events
        self._claim_ttl = claim_ttl
        self._grace = grace
        self._clock = clock
        self._changed = threading.Condition()
        self._claims: dict[str, HeldClaim] = {}
        self._outbox: list[Held] = []
        self._outbox_due = 0.0
        self._pause = 0.0
        self._not_before = 0.0
        self._hurried = self._closing = False
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def claim(self, queue: str, *, limit: int, wait: float = 0) -> list[Held]:
        """Claim up to `limit` messages and hold them; empty when there is none. Raises as Queues.claim does."""
        asked_at = self._clock()
        claim = self._queues.claim(queue, ttl=self._claim_ttl, grace=self._grace, limit=limit, wait=wait)
        if claim is None:
            return []
        held_claim = HeldClaim(claim, asked_at + self._claim_ttl - SAFETY_S)
        held_claim.open = {message.id: Held(message, held_claim) for message in claim.messages}
        with self._changed:
            self._claims[claim.id] = held_claim
            self._changed.notify()
        return list(held_claim.open.values())

    def holds(self, held: Held, seconds: float) -> bool:
        """Say whether the message is surely ours for so long, after renewing its claim if need be."""
        if not held.lost and held.of.until - self._clock() < seconds:
            try:
                self._renew(held.of)
            except QueueError as error:
                self._events.service_failed(error)
        return not held.lost and held.of.until - self._clock() >= seconds

    def settle(self, held: Held, posts: Iterable[Post], *, fenced: bool) -> None:
        """Post what became of the message and delete it: soon, and together with others."""
        with self._changed:
            if held.lost:
                return
            held.settlement = Settlement(held.message, tuple(posts), fenced)
            self._outbox.append(held)
            if len(self._outbox) == 1:
                self._outbox_due = self._clock() + self._queues.limits.settle_linger
                self._changed.notify()
            elif len(self._outbox) == self._queues.limits.claim_limit:
                self._changed.notify()

    def give_back(self, held: Held, *, delay: float = 0) -> None:
        """Make the message free again after `delay` seconds, or as near to that as the service can."""
        with self._changed:
            held.back_at = self._clock() + delay
            self._changed.notify()

    def count(self) -> int:
        """Number of messages held, those that were given back but are not free yet included."""
        with self._changed:
            return sum(len(claim.open) for claim in self._claims.values())

    def backing_off(self) -> int:
        """Number of messages that were given back but are not free yet."""
        with self._changed:
            return sum(held.back_at is not None for claim in self._claims.values() for held in claim.open.values())

    def hurry(self) -> None:
        """From now on give back and settle without delay."""
        with self._changed:
            self._hurried = True
            self._changed.notify()

    def close(self, patience: float) -> int:
        """Give back and settle all; wait up to `patience` seconds for it. Returns how many are still held then."""
        with self._changed:
            self._hurried = self._closing = True
            self._changed.notify()
        self._thread.join(patience)
        return self.count()

    def _run(self) -> None:
        try:
            while (action := self._next_action()) is not None:
                try:
                    action()
                except QueueError as error:
                    self._pause = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause))
                    self._not_before = self._clock() + self._pause
                    self._events.service_failed(error)
                else:
                    if self._pause:
                        self._pause = 0.0
                        self._events.service_answered()
        except Exception as error:  # whatever it is, the owner must hear that nothing is held any more
            self._events.keeper_died(error)

    def _next_action(self) -> Callable[[], None] | None:
        """Wait for what is to be done next; None when the keeper is closed and holds nothing."""
        with self._changed:
            while self._claims or not self._closing:
                due, action = min(self._actions(), key=lambda found: found[0], default=(math.inf, None))
                now = self._clock()
                if action is not None and due <= now:
                    return action
                self._changed.wait(None if due == math.inf else due - now)
            return None

    def _actions(self) -> Iterable[tuple[float, Callable[[], None]]]:
        """What will have to be done, and when (monotonic)."""
        if self._outbox:
            hurry = self._hurried or len(self._outbox) >= self._queues.limits.claim_limit
            yield max(self._not_before, 0 if hurry else self._outbox_due), self._flush
        for claim in self._claims.values():
            yield claim.until, partial(self._lose, claim)
            yield max(self._not_before, claim.until - self._claim_ttl / 2), partial(self._renew, claim)
            if (release_at := self._release_at(claim)) is not None:
                yield max(self._not_before, release_at), partial(self._release, claim)

    def _release_at(self, claim: HeldClaim) -> float | None:
        """When to release: one by one at once (the service keeps the delay), else all at the latest backoff."""
        backs = [held.back_at for held in claim.open.values() if held.back_at is not None]
        if not backs or (len(backs) < len(claim.open) and not self._queues.limits.releases_one_message):
            return None
        return 0 if self._hurried or self._queues.limits.releases_one_message else max(backs)

    def _flush(self) -> None:
        """Settle the outbox, claim by claim; what was not reached when the service fails stays in it."""
        with self._changed:
            waiting, self._outbox = self._outbox, []
        batches: dict[HeldClaim, list[Held]] = {}
        for held in waiting:
            batches.setdefault(held.of, []).append(held)
        try:
            while batches:
                claim, batch = next(iter(batches.items()))
                self._settle(claim, [held for held in batch if not held.lost])
                del batches[claim]
        finally:
            with self._changed:
                self._outbox[:0] = [held for batch in batches.values() for held in batch if not held.lost]

    def _settle(self, claim: HeldClaim, batch: list[Held]) -> None:
        if claim.until <= self._clock() and not self._queues.limits.fenced_delete:
            self._lose(claim)  # the service would not notice
            return
        settled = self._queues.settle(claim.claim, [held.settlement for held in batch if held.settlement])
        self._end([held for held in batch if held.message.id in settled.deleted], End.SETTLED)
        self._end([held for held in batch if held.message.id in settled.lost], End.LOST)
        for held in batch:
            if (refused := settled.refused.get(held.message.id)) is not None:
                held.settlement = None
                self._events.message_refused(held, refused)
                self.give_back(held, delay=REFUSED_DELAY_S)

    def _renew(self, claim: HeldClaim) -> None:
        asked_at = self._clock()
        open_messages = [held.message for held in list(claim.open.values())]
        try:
            self._queues.renew(claim.claim, ttl=self._claim_ttl, messages=open_messages)
        except ClaimLost as error:
            self._lose(claim, error.ids)
        claim.until = asked_at + self._claim_ttl - SAFETY_S

    def _release(self, claim: HeldClaim) -> None:
        given_back = [held for held in list(claim.open.values()) if held.back_at is not None]
        if not self._queues.limits.releases_one_message:
            self._queues.release(claim.claim)
            self._end(given_back, End.RELEASED)
            return
        by_delay: dict[float, list[Held]] = {}
        for held in given_back:
            delay = max(0.0, (held.back_at or 0) - self._clock())
            by_delay.setdefault(min(delay, self._queues.limits.release_delay), []).append(held)
        for delay, batch in by_delay.items():
            self._queues.release(claim.claim, [held.message for held in batch], delay=delay)
            self._end(batch, End.RELEASED)

    def _lose(self, claim: HeldClaim, ids: frozenset[str] = frozenset()) -> None:
        self._end([held for id_, held in list(claim.open.items()) if not ids or id_ in ids], End.LOST)

    def _end(self, ended: Iterable[Held], end: End) -> None:
        ended = list(ended)
        with self._changed:
            for held in ended:
                held.lost = end is End.LOST
                held.of.open.pop(held.message.id, None)
                if not held.of.open:
                    self._claims.pop(held.of.claim.id, None)
        if ended:
            self._events.messages_ended(ended, end)
