"""The POSTs in flight: how many at once, how many messages wait for one, how many more to claim."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog

from .delivery import Answer
from .trouble import Pause

AHEAD_S = 1.0
"""A message is claimed when a slot will be free for it within about this time."""

T = TypeVar("T")
log = structlog.get_logger()


class Slots:
    """`count` threads that POST up to `batch` messages each; fewer at once after the maker has asked for patience.

    running: POSTs in flight. messages: those that are held, being asked for, or in flight. is_stopping: after stop().
    Thread-safe.
    """

    def __init__(self, count: int, batch: int) -> None:
        self.count = count
        self._capacity = count * batch
        self._pool = ThreadPoolExecutor(count, "post")
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)  # notified when messages are wanted
        self._free = threading.Condition(self._lock)  # notified when a turn is free
        self.is_stopping = False
        self._mean_s: float | None = None  # of a POST
        self.running = self.messages = 0
        self._most = float(count)
        self._asking, self._askers = 0, 1
        self._pause, self._paused_at, self._pause_ends = Pause(), 0.0, 0.0
        self._impatient: str | None = None  # the last message answered so; None after a pass

    @property
    def is_pausing(self) -> bool:
        """Whether a pause that the maker has asked for is not over yet."""
        return self._pause_ends > time.monotonic()

    def reserve(self, most: int) -> int:
        """Wait until messages are wanted and it is this thread's turn to claim; returns how many, 0 after a stop.

        One thread asks at a time, so that an idle consumer polls once; one more for each claim that comes back full.
        """
        with self._lock:
            while not self.is_stopping:
                room = self._room()
                if room and self._asking < self._askers:
                    room = min(most, room)
                    self._asking += 1
                    self.messages += room
                    self._ask_another()
                    return room
                pause = self._pause_ends - time.monotonic()
                self._wanted.wait(pause if pause > 0 else None)
            return 0

    def claimed(self, asked: int, messages: int) -> None:
        """Of the `asked` messages this many were claimed; a `submit` or `ended` must follow for each of them."""
        with self._lock:
            self._asking -= 1
            self._askers = min(self.count, self._askers + 1) if messages == asked else 1
            self.messages -= asked - messages
            self._ask_another()

    def submit(self, work: Callable[..., T], messages: int, *args: Any) -> Future[T]:
        """Do the work in a thread; it takes this many of the claimed messages."""
        future = self._pool.submit(work, *args)
        future.add_done_callback(lambda _: self.ended(messages))
        return future

    def ended(self, messages: int) -> None:
        """This many of the claimed messages are no longer held."""
        with self._lock:
            self.messages -= messages
            self._ask_another()

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Wait for a turn to POST, and take it; gives the time (monotonic)."""
        with self._lock:
            while not self.is_stopping:
                pause = self._pause_ends - time.monotonic()
                if pause <= 0 and self.running < int(self._most):
                    break
                self._free.wait(pause if pause > 0 else None)
            self.running += 1
        try:
            yield time.monotonic()
        finally:
            with self._lock:
                self.running -= 1
                self._free.notify()

    def took(self, seconds: float) -> None:
        """A POST was answered, or reached its deadline, after so long."""
        with self._lock:
            self._mean_s = seconds if self._mean_s is None else 0.9 * self._mean_s + 0.1 * seconds

    def passed(self) -> None:
        """A message passed. Where N may be POSTed at once, every N passes allow one more."""
        with self._lock:
            self._impatient = None
            self._pause.reset()
            if self._most < self.count:
                self._most = min(self.count, self._most + 1 / self._most)
                self._free.notify()

    def busy(self, id_: str, answer: Answer, posted_at: float) -> None:
        """The maker asks for patience. After two different messages in a row: pause, and halve the number of POSTs at
        once. The POSTs that were under way then do not halve it again."""
        with self._lock:
            first, self._impatient = self._impatient, id_
            now = time.monotonic()
            if posted_at <= self._paused_at:
                self._pause_ends = max(self._pause_ends, now + answer.retry_after)
            elif first not in (None, id_):
                before, self._paused_at, self._most = self._most, now, max(1.0, self._most / 2)
                self._pause_ends = now + (answer.retry_after or self._pause.next())
                say = log.warning if int(self._most) < int(before) else log.debug
                say("the maker asks for patience", reason=answer.reason, at_once=int(self._most))

    def stop(self) -> None:
        """End every wait."""
        with self._lock:
            self.is_stopping = True
            self._wanted.notify_all()
            self._free.notify_all()

    def close(self) -> None:
        """End the threads, once their work is done."""
        self._pool.shutdown()

    def _ask_another(self) -> None:
        """Wake a thread that waits to claim, unless nothing more is wanted: each wake-up costs more than a POST."""
        if self._asking < self._askers and self.messages < 2 * self._capacity:
            self._wanted.notify()

    def _room(self) -> int:
        if self.messages >= 2 * self._capacity or self.is_pausing:
            return 0
        rounds = int(AHEAD_S / max(self._mean_s, 0.001)) if self._mean_s else 0
        return max(0, self._capacity * (1 + rounds) - self.messages)
