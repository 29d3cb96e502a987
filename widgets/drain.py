"""When a consumer that drains the queue may end."""

import time

import structlog

from claim_queues import Queues, QueuesError

from .breaker import Breaker

HOPELESS_S = 60.0

log = structlog.get_logger()


class NothingPasses(QueuesError):
    """The breaker stays open though the maker is well, or another server answers: waiting does not help."""


class DrainTimedOut(QueuesError):
    """--drain-timeout is over."""

    exit_code = 3


class Drain:
    """A drain of the request queue. timeout: seconds until it gives up, None for never."""

    def __init__(self, queues: Queues, request_queue: str, timeout: float | None) -> None:
        self._queues = queues
        self._request_queue = request_queue
        self._timeout = timeout
        self._began_at = time.monotonic()
        self._empty_since: float | None = None
        self._waits = False

    def check(self, breaker: Breaker) -> None:
        """Raise NothingPasses or DrainTimedOut where the drain cannot end."""
        now = time.monotonic()
        if breaker.hopeless_since is not None and now - breaker.hopeless_since > HOPELESS_S:
            raise NothingPasses(f"nothing passes ({breaker.reason}): the queue keeps what is left")
        if self._timeout and now - self._began_at > self._timeout:
            why = f" ({breaker.reason})" if breaker.reason else ""
            raise DrainTimedOut(f"not drained within {self._timeout:g} s{why}: the queue keeps what is left")

    def is_over(self, *, found: bool) -> bool:
        """Called after each claim: whether the queue has been empty long enough to believe the service's counts."""
        if found:
            self._empty_since = None
            return False
        stats = self._queues.stats(self._request_queue)
        if stats.total:
            self._empty_since = None
            if not self._waits and stats.total > stats.free:
                log.info("waiting: messages are claimed or delayed", claimed=stats.claimed, delayed=stats.delayed)
                self._waits = True
            return False
        now, seconds = time.monotonic(), self._queues.limits.approximate_s
        if self._empty_since is None and seconds:
            log.info("waiting: the service counts roughly, so the queue must stay empty", seconds=seconds)
        self._empty_since = self._empty_since or now
        return now - self._empty_since >= seconds
