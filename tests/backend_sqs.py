"""Amazon SQS under the contract's tests: moto's server, one for each test process.

Its clock cannot be moved, so time is waited for: a claim TTL of 1 or 2 s is allowed.
"""

import atexit
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import processes
import pytest
from backends import Service

from claim_queues import Queues
from claim_queues.sqs import SqsQueues

REGION = "eu-west-1"


class LocalQueues(SqsQueues):
    ready_after_s = 0.0
    """A new queue of moto's is there at once."""


class SqsService:
    """Queues at moto's server; what is made there stays for the other tests of the process."""

    def __init__(self, endpoint: str, closing: ExitStack) -> None:
        self._endpoint = endpoint
        self._closing = closing
        self.queues = self.another()

    def another(self) -> Queues:
        return self._closing.enter_context(LocalQueues(REGION, endpoint=self._endpoint))

    def advance(self, seconds: float) -> None:
        threading.Event().wait(seconds)


@contextmanager
def sqs(directory: Path) -> Iterator[Service]:
    with credentials(), ExitStack() as closing:
        yield SqsService(server(), closing)


@cache
def server() -> str:
    """The URL of this process's server, which ends with the process."""
    with ExitStack() as started:
        directory = started.enter_context(TemporaryDirectory())
        url = started.enter_context(processes.sqs(Path(directory) / "moto.log"))
        atexit.register(started.pop_all().close)
    return url


@contextmanager
def credentials() -> Iterator[None]:
    """What moto's server takes as credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-no-one")
        yield
