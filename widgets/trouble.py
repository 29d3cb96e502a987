"""Failures that pass: how long to pause before the next try, and a log line when they begin and when they end."""

import random
import threading

import structlog

from claim_queues import QueuesError

PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0

log = structlog.get_logger()


class Pause:
    """Seconds to wait before the next try: exponential, with full jitter."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._longest = 0.0

    def next(self) -> float:
        self._longest = min(LONGEST_PAUSE_S, max(PAUSE_S, 2 * self._longest))
        return random.uniform(0, self._longest)  # noqa: S311


class Trouble:
    """The operations that fail at the queue service now. reasons: by operation, such as claim. Thread-safe."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._pauses: dict[str, Pause] = {}
        self._lock = threading.Lock()

    def begins(self, what: str, error: QueuesError) -> float:
        """Note that it fails; returns the seconds to wait before the next try."""
        with self._lock:
            if what not in self.reasons:
                log.warning("the queue service fails: trying again", what=what, reason=str(error))
            self.reasons[what] = str(error)
            pause = self._pauses.setdefault(what, Pause()).next()
        return max(pause, getattr(error, "retry_after", 0))

    def ends(self, *operations: str, is_back: bool = True) -> None:
        """Note that they work again; is_back: False where they are only not tried any more."""
        for what in self.reasons.keys() & operations:
            with self._lock:
                self._pauses.pop(what, None)
                if self.reasons.pop(what, None) and is_back:
                    log.info("the queue service is back", what=what)
