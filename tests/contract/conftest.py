"""What every test of the contract starts from: a service, an object for its queues, and queues without messages."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest
from backends import Service, skip_unless

from claim_queues import Claim, Limits, Queues

SERVICES = {
    "embedded": "backends:embedded",
    "cloud-queues": "backend_cloud_queues:cloud_queues",
    "zaqar-mongodb": "backend_zaqar:zaqar_mongodb",
    "zaqar-redis": "backend_zaqar:zaqar_redis",
    "sqs": "backend_sqs:sqs",
}
"""What opens each one, by the name that test ids show; its module skips where the service's SDK is missing."""
MONGODB_DEFECTS = {
    "test_a_lapsed_claim_cannot_delete": "an expired claim deletes what nobody has claimed since",
}
REDIS_DEFECTS = {
    "test_a_claim_passes_over_claimed_messages_anywhere_in_the_queue": "hands out what others hold",
    "test_a_message_that_would_expire_in_a_claim_lives_on_until_the_grace_after_it": "ignores grace",
    "test_a_lapsed_claim_cannot_be_renewed_whoever_has_its_message": "renewing an expired claim is HTTP 503",
    "test_releasing_too_late_leaves_alone_what_another_holds": "releasing an expired claim is HTTP 503",
    "test_lapsed_messages_count_as_free_and_expired_ones_not_at_all": "stats are HTTP 503 once anything expired",
    "test_a_lapsed_claim_cannot_delete_what_another_holds": "deleting what another holds is HTTP 503",
    "test_a_delete_leaves_other_queues_alone": "a message is deleted through any queue",
}
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
    with resolve_name(SERVICES[request.param])(tmp_path) as service:
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
def browser(rival: Queues, limits: Limits) -> Queues:
    """Another process, which shows and deletes messages without claiming them."""
    skip_unless(limits.can_browse, "cannot look without claiming")
    return rival


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
