"""What the contract's tests need of a queue service, and the embedded queue as one."""

import atexit
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest

from claim_queues import Claim, Message, Queues
from claim_queues.sqlite import SqliteQueues

T = TypeVar("T")


class Service(ExitStack):
    """A queue service under test. queues: the object that tests use first. url: its server's root, where it has one.

    advance: lets that many seconds pass for the service.
    """

    def __init__(self, open_queues: Callable[[], Queues], advance: Callable[[float], None], *, url: str = "") -> None:
        super().__init__()
        self.advance = advance
        self.url = url
        self._open_queues = open_queues
        self.queues = self.another()

    def another(self) -> Queues:
        """A further object for the same queues, as another process would have; closed with the service."""
        return self.enter_context(self._open_queues())


def embedded(directory: Path) -> Service:
    """The embedded queue in one file; all its objects share a clock that runs, and that a test moves forward."""
    passed: list[float] = []
    file = directory / "queues.sqlite3"
    return Service(lambda: SqliteQueues(file, clock=lambda: time.time() + sum(passed)), passed.append)


def until_exit(started: Callable[[Path], AbstractContextManager[T]]) -> T:
    """What a server gives that is started with a log file, and runs until the test process ends."""
    closing = ExitStack()
    atexit.register(closing.close)
    return closing.enter_context(started(Path(closing.enter_context(TemporaryDirectory())) / "server.log"))


def skip_unless(capability: object, missing: str) -> None:
    """Skip the test where the service's Limits lack a capability; `missing` says what it cannot do."""
    if not capability:
        pytest.skip(f"the service {missing}")


def bodies(found: Claim | Sequence[Message] | None) -> list[Any]:
    """The bodies of a claim's messages, or of those browsed, in their order."""
    messages = found.messages if isinstance(found, Claim) else found
    return [message.body for message in messages or ()]
