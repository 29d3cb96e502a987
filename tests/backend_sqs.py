"""Amazon SQS under the contract's tests: moto's server, one for each test process."""

import atexit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import queue_servers
from backends import Service

from claim_queues import Claim, Queues

SqsQueues = pytest.importorskip("claim_queues.sqs").SqsQueues  # needs boto3
REGION = "eu-west-1"


class AgeingQueues(SqsQueues):
    """Queues whose claims a test can make older: what is trusted on SQS is the holder's own clock."""

    ready_after_s = 0

    def __init__(self, endpoint: str) -> None:
        super().__init__(REGION, endpoint=endpoint)
        self._claims: list[Claim] = []

    def claim(self, queue: str, **terms: Any) -> Claim | None:
        claim = super().claim(queue, **terms)
        self._claims += [claim] if claim else []
        return claim

    def age(self, seconds: float) -> None:
        for claim in self._claims:
            claim.expires_at -= seconds


class SqsService:
    """Queues at moto's server; what is made there stays for the other tests of the process."""

    def __init__(self, endpoint: str, closing: ExitStack) -> None:
        self._endpoint = endpoint
        self._closing = closing
        self._opened: list[AgeingQueues] = []
        self.queues = self.another()

    def another(self) -> Queues:
        self._opened.append(self._closing.enter_context(AgeingQueues(self._endpoint)))
        return self._opened[-1]

    def advance(self, seconds: float) -> None:
        queue_servers.advance(self._endpoint, seconds)
        for queues in self._opened:
            queues.age(seconds)


@contextmanager
def sqs(directory: Path) -> Iterator[Service]:
    with credentials(), ExitStack() as closing:
        yield SqsService(server(), closing)


@cache
def server() -> str:
    """The URL of this process's server, which ends with the process."""
    with ExitStack() as started:
        directory = started.enter_context(TemporaryDirectory())
        url = started.enter_context(queue_servers.sqs(Path(directory) / "moto.log"))
        atexit.register(started.pop_all().close)
    return url


@contextmanager
def credentials() -> Iterator[None]:
    """What moto's server takes as credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-no-one")
        yield
