"""Queues that fail when a test says so."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from claim_queues import Limits, Queues


class TroubledQueues:
    """Passes each operation on to real queues, unless `fails[operation]` gives an error to raise for it.

    fails: by operation, a function that is asked before each call. calls: how often each operation was asked for.
    """

    def __init__(self, queues: Queues, limits: Limits | None = None) -> None:
        self._queues = queues
        self.limits = limits or queues.limits
        self.address = queues.address
        self.fails: dict[str, Callable[[], Exception | None]] = {}
        self.calls: Counter[str] = Counter()

    def __getattr__(self, operation: str) -> Any:
        real = getattr(self._queues, operation)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[operation] += 1
            if error := self.fails.get(operation, lambda: None)():
                raise error
            return real(*args, **kwargs)

        return call


def times(number: int, error: Exception) -> Callable[[], Exception | None]:
    """Fail so often, and work then."""
    errors = [error] * number
    return lambda: errors.pop() if errors else None
