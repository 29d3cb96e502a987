"""The breaker: whether the maker itself fails, rather than single messages.

The *row* holds the different messages that failed since the last one that passed. When it reaches ten, the maker is at
fault: the breaker opens, and what the row's members were charged is taken back.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from .delivery import Answer, Failure
from .trouble import Pause

MOST_IN_A_ROW = 10

log = structlog.get_logger()


class Breaker:
    """While it is open, one claim at a time is tried. It closes when a POST that began after it opened passes.

    failure, reason: why it is open. tries_at: when the next claim is tried (monotonic).
    hopeless_since: since when (monotonic) it is open although the maker is well or another server answers. Thread-safe.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.failure: Failure | None = None
        self.tries_at = 0.0
        self.hopeless_since: float | None = None
        self._tried: str | None = None  # the claim that is tried; "": it is still asked for
        self._opened_at, self._passed_at = 0.0, 0.0
        self._row: dict[str, int] = {}  # what each id was charged since the last pass
        self._silent = set[str]()  # ids without an answer in the lane since the last pass
        self._pause, self._must_pause = Pause(), False
        self._lock = threading.Condition()

    @property
    def is_open(self) -> bool:
        return self.failure is not None

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """While it is open, wait until no other claim is tried; gives whether it is open."""
        with self._lock:
            self._lock.wait_for(lambda: self._tried is None or not self.is_open)
            is_try = self.is_open
            if is_try:
                self._tried = ""
        try:
            yield is_try
        finally:
            if is_try:
                with self._lock:
                    self._tried = None
                    self._lock.notify_all()

    def tries(self, claim: str) -> None:
        """Note which claim is tried."""
        self._tried = claim

    def lets(self, claim: str) -> bool:
        """Whether messages of that claim may be POSTed now."""
        return not self.is_open or self._tried == claim

    def next_pause(self) -> float:
        """Seconds to wait before the next claim is tried; none where the maker is well and only messages fail."""
        with self._lock:
            pause = self._pause.next() if self._must_pause else 0.0
            self.tries_at = time.monotonic() + pause
            return pause

    def passed(self, posted_at: float) -> None:
        """A POST that began at that monotonic time had an outcome."""
        with self._lock:
            self._passed_at = time.monotonic()
            if self.is_open and posted_at < self._opened_at:
                return
            if self.is_open:
                log.info("the maker is back", seconds=round(self._passed_at - self._opened_at, 1))
            self.failure, self.reason = None, ""
            self._must_pause, self.hopeless_since = False, None
            self._pause.reset()
            self._row.clear()
            self._silent.clear()
            self._lock.notify_all()

    def has_passed_since(self, posted_at: float) -> bool:
        """Whether a message passed after that monotonic time."""
        return self._passed_at > posted_at

    def silent(self, id_: str) -> bool:
        """Note a message that was POSTed alone without an answer. False, for no charge, from the tenth in a row on."""
        with self._lock:
            self._silent.add(id_)
            return len(self._silent) < MOST_IN_A_ROW

    def failed(self, id_: str, answer: Answer, charge: int, *, is_well: bool) -> tuple[int, dict[str, int]]:
        """Note a failed message, to be charged `charge` fifths unless the row is full.

        Returns its charge, and by id what to add to the charges of others: negative, to take theirs back.
        """
        is_misconfigured = answer.failure is Failure.MISCONFIGURED
        with self._lock:
            if len(self._row) < MOST_IN_A_ROW:
                self._row.setdefault(id_, 0)
            is_row = len(self._row) >= MOST_IN_A_ROW
            if is_row or (is_misconfigured and not self._passed_at):
                self._open(answer)
            self._must_pause = is_misconfigured or not is_well
            is_hopeless = self.is_open and (is_well or is_misconfigured)
            self.hopeless_since = (self.hopeless_since or time.monotonic()) if is_hopeless else None
            if is_row:
                back, self._row = self._row, dict.fromkeys(self._row, 0)
                return 0, {other: -charged for other, charged in back.items() if charged}
            self._row[id_] += charge
            return charge, {}

    def _open(self, answer: Answer) -> None:
        if not self.is_open:
            say = log.error if answer.failure is Failure.MISCONFIGURED else log.warning
            say("the maker fails: trying it with one claim at a time", reason=answer.reason)
            self._opened_at = time.monotonic()
        self.failure, self.reason = answer.failure, answer.reason
