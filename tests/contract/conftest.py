"""What every test of the contract starts from: a service, an object for its queues, and queues without messages."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from backend_cloud_queues import cloud_queues
from backend_sqs import sqs
from backend_zaqar import MONGODB_DEFECTS, REDIS_DEFECTS, zaqar_mongodb, zaqar_redis
from backends import Service, embedded

from claim_queues import Claim, Limits, Queues

SERVICES: dict[str, Callable[[Path], AbstractContextManager[Service]]] = {
    "embedded": embedded,
    "cloud-queues": cloud_queues,
    "zaqar-mongodb": zaqar_mongodb,
    "zaqar-redis": zaqar_redis,
    "sqs": sqs,
}
"""By the name that test ids show. Each is given a directory of its own."""
DEFECTS = {"cloud-queues": MONGODB_DEFECTS, "zaqar-mongodb": MONGODB_DEFECTS, "zaqar-redis": REDIS_DEFECTS}
"""Tests that a service's own defect makes fail, by service and name."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect the defects to show, and run each service's tests in one process, which starts its server once."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("service")
        if name in SERVICES:
            item.add_marker(pytest.mark.xdist_group(name))
        if reason := DEFECTS.get(name, {}).get(item.originalname):
            item.add_marker(pytest.mark.xfail(reason=reason))


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with SERVICES[request.param](tmp_path) as service:
        yield service


@pytest.fixture
def queues(service: Service) -> Queues:
    return service.queues


@pytest.fixture
def rival(service: Service) -> Queues:
    """The queues as another process has them."""
    return service.another()


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
def claim(queue: str) -> Callable[..., Claim | None]:
    """Claim for the shortest claim TTL and grace: claim(queues, limit) from `queue`, or from another one."""

    def claim(queues: Queues, limit: int = 1, *, of: str = queue, wait: float = 0) -> Claim | None:
        return queues.claim(of, ttl=60, grace=60, limit=limit, wait=wait)

    return claim


def new_queue(queues: Queues) -> str:
    name = f"contract-{uuid.uuid4().hex}"
    queues.create(name)
    return name
