"""What the contract's tests need of a queue service, and the embedded queue as one."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from claim_queues import Claim, Message, Queues
from claim_queues.sqlite import SqliteQueues


class Service(Protocol):
    """A queue service under test. queues: the object that tests use first."""

    queues: Queues

    def another(self) -> Queues:
        """A further object for the same queues, as another process would have; closed with the service."""

    def advance(self, seconds: float) -> None:
        """Let that much time pass for the service: its clock is moved, or waited for where it cannot be."""


class EmbeddedService:
    """The embedded queue in one file; all its objects share a clock that runs, and that a test moves forward."""

    def __init__(self, path: Path, closing: ExitStack) -> None:
        self._path = path
        self._closing = closing
        self._ahead_s = 0.0
        self.queues = self.another()

    def another(self) -> Queues:
        return self._closing.enter_context(SqliteQueues(self._path, clock=lambda: time.time() + self._ahead_s))

    def advance(self, seconds: float) -> None:
        self._ahead_s += seconds


@contextmanager
def embedded(directory: Path) -> Iterator[Service]:
    with ExitStack() as closing:
        yield EmbeddedService(directory / "queues.sqlite3", closing)


def skip_unless(capability: object, missing: str) -> None:
    """Skip the test where the service's Limits lack a capability; `missing` says what it cannot do."""
    if not capability:
        pytest.skip(f"the service {missing}")


def bodies(found: Claim | Sequence[Message] | None) -> list[Any]:
    """The bodies of a claim's messages, or of those browsed, in their order."""
    messages = found.messages if isinstance(found, Claim) else found
    return [message.body for message in messages or ()]
