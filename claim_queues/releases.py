"""Claims that come back later, also where the service cannot delay a release."""

import threading
import time
from contextlib import suppress

from .base import Claim, Queues
from .errors import QueueForbidden


class Releases:
    """Gives claims back after a delay. If the service cannot delay, they wait in a list until `due` releases them.

    A claim whose delay is longer than its life is left to expire. Thread-safe.
    """

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._waiting: list[tuple[float, Claim]] = []
        self._working = threading.Lock()

    def add(self, claim: Claim, delay: float) -> None:
        """Release the claim in `delay` seconds."""
        if not delay or self._queues.limits.release_delay:
            self._queues.release(claim, delay=min(delay, self._queues.limits.release_delay))
        elif claim.holds(delay):
            self._waiting.append((time.monotonic() + delay, claim))

    def due(self) -> None:
        """Release the claims whose time has come, unless another thread does. After QueueUnavailable call it again."""
        if self._working.acquire(blocking=False):
            try:
                for entry in self._waiting.copy():
                    if entry[0] <= time.monotonic():
                        with suppress(QueueForbidden):  # then it expires
                            if entry[1].holds(0):
                                self._queues.release(entry[1])
                        self._waiting.remove(entry)
            finally:
                self._working.release()

    def all(self) -> list[Claim]:
        """The claims that wait, so that they can be released at once."""
        return [claim for _, claim in self._waiting if claim.holds(0)]
