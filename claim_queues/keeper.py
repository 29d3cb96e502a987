"""Hold claimed messages until each is settled or given back: renew in time, settle in batches, release.

A consumer claims through the keeper, works on the messages in any order, and says how each ends. The keeper's own
thread does the rest, so that a slow settlement or renewal never holds up the consumer's work.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from .base import Claim, Message, Post, Queues, Settlement
from .errors import ClaimLost, MessageRefused, QueueError, QueueUnavailable

SAFETY_S = 2.0
"""Services floor a claim's end to whole seconds: a claim is trusted for this much less than its claim TTL."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Between attempts while the service refuses a settlement, renewal or release; doubled each time."""
LONGEST_SLEEP = 0.25
"""Share of the claim TTL after which the keeper looks at the latest, so a new claim need not wake it."""
REFUSED_DELAY_S = 600.0
"""A message whose outcome no queue takes comes back after so long; nothing of it is cut off or thrown away."""


class End(Enum):
    """How a message left the keeper."""

    SETTLED = "settled"
    RELEASED = "released"
    LOST = "lost"


@dataclass(slots=True)
class Pause:
    """Between attempts at what the service refuses. seconds: 0 while nothing was refused. until: monotonic time."""

    seconds: float = 0.0
    until: float = 0.0

    def lengthen(self, now: float, asked_s: float) -> None:
        """asked_s: the pause that the service asked for."""
        self.seconds = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self.seconds))
        self.until = now + max(self.seconds, asked_s)

    def end(self) -> None:
        self.seconds = self.until = 0.0


@dataclass(eq=False, slots=True)
class HeldClaim:
    """A claim and what is still open of it. until: monotonic time up to which it is surely ours.

    settle_at: when its settlements have waited long enough for company. settling, keeping: apart, so that a service
    that refuses settlements still renews. calling: held during each call of the service that concerns the claim.
    """

    claim: Claim
    until: float
    open: dict[str, "Held"] = field(default_factory=dict)
    settle_at: float = 0.0
    settling: Pause = field(default_factory=Pause)
    keeping: Pause = field(default_factory=Pause)
    calling: threading.RLock = field(default_factory=threading.RLock)


@dataclass(eq=False, slots=True)
class Held:
    """One claimed message. back_at: monotonic time at which it is to be free again, once it was given back."""

    message: Message
    of: HeldClaim
    settlement: Settlement | None = None
    back_at: float | None = None
    lost: bool = False

    @property
    def is_over(self) -> bool:
        """Whether its owner has said how it ends."""
        return self.settlement is not None or self.back_at is not None


class KeeperEvents(Protocol):
    """What a keeper tells its owner, from the keeper's thread or that of a call of holds().

    They may call settle() and give_back(), and must not wait for a thread that calls holds().
    """

    def messages_ended(self, ended: list[Held], end: End) -> None:
        """The messages are no longer held."""

    def message_refused(self, held: Held, error: MessageRefused) -> None:
        """No queue takes the message's outcome; it stays queued and comes back in REFUSED_DELAY_S."""

    def service_failed(self, error: Exception) -> None:
        """The service failed and will be asked again; told for each attempt."""

    def service_answered(self) -> None:
        """The service does again all that it was asked."""

    def keeper_died(self, error: Exception) -> None:
        """Something that waiting cannot mend (a damaged file, refused credentials): nothing is held any more."""


class _Step(NamedTuple):
    """What to do next about a claim, and when. call None: nothing, it is lost. rank: among those that are due."""

    due: float
    rank: int
    claim: HeldClaim
    call: Callable[[HeldClaim], None] | None = None
    pause: Pause | None = None


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
        self._failing = self._hurried = self._closing = False
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
        found = list(held_claim.open.values())
        with self._changed:
            self._claims[claim.id] = held_claim
            if self._renew_at(held_claim) - self._clock() < self._claim_ttl * LONGEST_SLEEP:
                self._changed.notify()  # the answer was late; else the thread looks in time by itself
        return found

    def holds(self, held: Held, seconds: float) -> bool:
        """Say whether the message is surely ours for so long, after renewing its claim if need be."""
        claim = held.of
        if not held.lost and claim.until - self._clock() < seconds:
            with claim.calling:
                if not held.lost and claim.until - self._clock() < seconds:  # another thread may have renewed it
                    self._ask(self._renew, claim, claim.keeping)
        return not held.lost and claim.until - self._clock() >= seconds

    def settle(self, held: Held, posts: Iterable[Post], *, fenced: bool) -> None:
        """Post what became of the message and delete it: soon, and together with others."""
        with self._changed:
            claim = held.of
            is_first = all(other.settlement is None for other in claim.open.values())
            held.settlement = Settlement(held.message, tuple(posts), fenced)
            if is_first:
                claim.settle_at = self._clock() + self._queues.limits.settle_linger
            if is_first or all(other.is_over for other in claim.open.values()):
                self._changed.notify()  # the others only join

    def give_back(self, held: Held, *, delay: float = 0) -> None:
        """Make the message free again after `delay` seconds, or as near to that as the service can."""
        with self._changed:
            held.back_at = self._clock() + delay
            self._changed.notify()

    def count(self) -> int:
        """Number of messages held, those that were given back but are not free yet included."""
        with self._changed:
            return sum(len(claim.open) for claim in self._claims.values())

    def count_claims(self) -> int:
        """Number of claims held."""
        with self._changed:
            return len(self._claims)

    def backing_off(self) -> int:
        """Number of messages that were given back but are not free yet."""
        with self._changed:
            return sum(held.back_at is not None for claim in self._claims.values() for held in claim.open.values())

    def settling(self) -> int:
        """Number of messages whose settlement the service has not done yet."""
        with self._changed:
            return sum(held.settlement is not None for claim in self._claims.values() for held in claim.open.values())

    def hurry(self) -> None:
        """From now on settle at once and keep nothing back that is to be free later: only the service may delay it."""
        with self._changed:
            self._hurried = True
            self._changed.notify()

    def close(self, patience: float) -> int:
        """Give back and settle all; wait up to `patience` seconds for it. Returns how many are still held then."""
        with self._changed:
            self._hurried = self._closing = True
            self._changed.notify()
        self._thread.join(patience)
        with self._changed:
            left = self.count()
            self._claims.clear()  # nothing more is asked of the service
            self._changed.notify()
        return left

    def _run(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                claim = step.claim
                with claim.calling:
                    if claim.until <= self._clock():
                        self._end(claim.open.values(), End.LOST)
                    elif step.call is not None and step.pause is not None and claim.open:
                        self._ask(step.call, claim, step.pause)
        except Exception as error:  # whatever it is, the owner must hear that nothing is held any more
            self._events.keeper_died(error)

    def _ask(self, call: Callable[[HeldClaim], None], claim: HeldClaim, pause: Pause) -> None:
        """Ask the service; what it refuses is tried again after a pause."""
        try:
            call(claim)
        except QueueError as error:
            asked_s = error.retry_after_s if isinstance(error, QueueUnavailable) else None
            pause.lengthen(self._clock(), asked_s or 0)
            self._failing = True
            self._events.service_failed(error)
            return
        pause.end()
        if self._failing:
            with self._changed:
                self._failing = any(each.settling.seconds or each.keeping.seconds for each in self._claims.values())
            if not self._failing:
                self._events.service_answered()

    def _next_step(self) -> _Step | None:
        """Wait for what is to be done next; None when the keeper is closed and holds nothing."""
        with self._changed:
            while self._claims or not self._closing:
                now = self._clock()
                # A renewal that is due cannot wait behind settlements that never end.
                step = min(self._steps(), key=lambda step: (max(step.due, now), step.rank), default=None)
                if step is not None and step.due <= now:
                    return step
                self._changed.wait(min(self._claim_ttl * LONGEST_SLEEP, math.inf if step is None else step.due - now))
            return None

    def _steps(self) -> Iterator[_Step]:
        for claim in self._claims.values():
            yield _Step(claim.until, 0, claim)
            yield _Step(max(claim.keeping.until, self._renew_at(claim)), 1, claim, self._renew, claim.keeping)
            if (settle_at := self._settle_at(claim)) is not None:
                yield _Step(max(claim.settling.until, settle_at), 2, claim, self._settle, claim.settling)
            if (release_at := self._release_at(claim)) is not None:
                yield _Step(max(claim.keeping.until, release_at), 2, claim, self._release, claim.keeping)

    def _renew_at(self, claim: HeldClaim) -> float:
        return claim.until - self._claim_ttl / 2

    def _settle_at(self, claim: HeldClaim) -> float | None:
        """When to settle: at once when nothing of the claim can join, else after a short wait for company."""
        if all(held.settlement is None for held in claim.open.values()):
            return None
        alone = self._hurried or all(held.is_over for held in claim.open.values())
        return 0 if alone else claim.settle_at

    def _release_at(self, claim: HeldClaim) -> float | None:
        """When to release: one by one at once (the service keeps the delay), else all at the latest backoff."""
        backs = [held.back_at for held in claim.open.values() if held.back_at is not None]
        if not backs or (len(backs) < len(claim.open) and not self._queues.limits.releases_one_message):
            return None
        return 0 if self._hurried or self._queues.limits.releases_one_message else max(backs)

    def _settle(self, claim: HeldClaim) -> None:
        batch = [held for held in self._open(claim) if held.settlement is not None]
        settled = self._queues.settle(claim.claim, [held.settlement for held in batch if held.settlement])
        refused = [held for held in batch if held.message.id in settled.refused]
        with self._changed:
            for held in refused:
                held.settlement = None
                held.back_at = self._clock() + REFUSED_DELAY_S
        self._end([held for held in batch if held.message.id in settled.deleted], End.SETTLED)
        self._end([held for held in batch if held.message.id in settled.lost], End.LOST)
        for held in refused:
            self._events.message_refused(held, settled.refused[held.message.id])

    def _renew(self, claim: HeldClaim) -> None:
        asked_at = self._clock()
        try:
            self._queues.renew(claim.claim, ttl=self._claim_ttl, messages=[held.message for held in self._open(claim)])
        except ClaimLost as error:
            self._end([held for held in self._open(claim) if not error.ids or held.message.id in error.ids], End.LOST)
        with self._changed:
            claim.until = asked_at + self._claim_ttl - SAFETY_S

    def _release(self, claim: HeldClaim) -> None:
        given_back = [held for held in self._open(claim) if held.back_at is not None]
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

    def _open(self, claim: HeldClaim) -> list[Held]:
        with self._changed:
            return list(claim.open.values())

    def _end(self, ended: Iterable[Held], end: End) -> None:
        ended = list(ended)
        with self._changed:
            for held in ended:
                held.lost = end is End.LOST
                del held.of.open[held.message.id]
                if not held.of.open:
                    self._claims.pop(held.of.claim.id, None)
        if ended:
            self._events.messages_ended(ended, end)
