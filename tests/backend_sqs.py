"""Amazon SQS under the contract's tests: moto's server, one for each test process."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import queue_servers
from backends import Service, until_exit

from claim_queues import Claim

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


@contextmanager
def sqs(directory: Path) -> Iterator[Service]:
    """Queues at moto's server; what is made there stays for the other tests of the process."""
    opened: list[AgeingQueues] = []

    def open_one() -> AgeingQueues:
        opened.append(AgeingQueues(server()))
        return opened[-1]

    def advance(seconds: float) -> None:
        queue_servers.advance(server(), seconds)
        for queues in opened:
            queues.age(seconds)

    with credentials(), Service(open_one, advance) as service:
        yield service


@cache
def server() -> str:
    """The URL of this process's server."""
    return until_exit(queue_servers.sqs)


@contextmanager
def credentials() -> Iterator[None]:
    """What moto's server takes as credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-no-one")
        yield
