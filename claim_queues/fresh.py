"""What another said lately, for those who must not wait for it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

KEEP_S = 5.0
"""How long an answer is given again before there is a new question."""

T = TypeVar("T")


class Fresh(Generic[T]):
    """What `ask` gave lately. It is asked in a thread of its own: one that hangs holds up nobody for long."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._asked_at = 0.0
        self._answer: Future[T] | None = None

    def get(self, patience_s: float) -> T:
        """Raises what `ask` raised, or TimeoutError where there is no answer within patience_s."""
        with self._lock:
            now = time.monotonic()
            if self._answer is None or (self._answer.done() and now - self._asked_at > KEEP_S):
                self._answer, self._asked_at = Future(), now
                threading.Thread(target=self._run, args=(self._answer,), name="look", daemon=True).start()
            answer = self._answer
        return answer.result(patience_s)

    def _run(self, answer: Future[T]) -> None:
        try:
            answer.set_result(self._ask())
        except Exception as error:
            answer.set_exception(error)
