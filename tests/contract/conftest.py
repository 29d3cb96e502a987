"""What every test of the contract starts from: a service, an object for its queues, and queues without messages."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from backends import SERVICES, Service

from claim_queues import Limits, Queues


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with SERVICES[request.param](tmp_path) as service:
        yield service


@pytest.fixture
def queues(service: Service) -> Queues:
    return service.queues


@pytest.fixture
def limits(queues: Queues) -> Limits:
    return queues.limits


@pytest.fixture
def queue(queues: Queues) -> str:
    return new_queue(queues)


@pytest.fixture
def other_queue(queues: Queues) -> str:
    return new_queue(queues)


@pytest.fixture
def ttl(limits: Limits) -> int:
    """A claim TTL: the shortest, but with room for half of it on services that count whole seconds."""
    return max(limits.claim_ttl.low, 2)


@pytest.fixture
def terms(limits: Limits, ttl: int) -> dict[str, int]:
    """What every claim asks for: the claim TTL above, and the shortest grace."""
    return {"ttl": ttl, "grace": limits.grace.low if limits.grace else 0}


def new_queue(queues: Queues) -> str:
    name = f"contract-{uuid.uuid4().hex}"
    queues.create(name)
    return name
