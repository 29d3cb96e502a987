"""What a widget costs in requests to the queue service, counted on the wire."""

import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from identity_double import REGION
from keyring_double import KEY, USER
from scripted_maker import ScriptedMaker
from service_scripts import Service, over_a_wire, parameters
from support import wait_until

from claim_queues import Claim, Queues, Settled, Settlement, open_queues
from widget_consumer import Consumer

with warnings.catch_warnings():  # pyrax's dependencies warn when they are imported
    warnings.simplefilter("ignore")
    from pyrax.identity.rax_identity import RaxIdentity
    from pyrax.queueing import QueueClient

    from claim_queues import pyrax_client  # noqa: F401 makes pyrax work on this Python

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for InfluxDB"  # openstacksdk 4.22 warns of it at every clouds.yaml
)

PATIENCE_S = 120.0
COUNT = 300
"""Fewer than 1,000 waiting requests, which cost the same each, but for the first few of a consumer."""
MOST_REQUESTS = 0.35
openstack = pytest.mark.parametrize("service", parameters("cloud-queues", "zaqar-mongodb"), indirect=True)
rackspace = pytest.mark.parametrize("service", parameters("cloud-queues"), indirect=True)


@pytest.fixture(autouse=True)
def queues_exist(service: Service) -> None:
    service.create()


def drain(service: Service, count: int) -> Counter[str]:
    """Let a consumer as it is started by default work off so many waiting requests; what it asked for, by kind."""
    service.submit(count)
    with ScriptedMaker() as maker:
        with service.script("widget_consumer.py", "--maker-url", maker.url) as consumer:
            wait_until(lambda: consumer.err.count(" created ") == count, PATIENCE_S)
            wait_until(lambda: service.left() == (0, 0), PATIENCE_S)
            asked = Counter(map(service.kind, service.wire.requests))
        assert len(maker.widgets) == count
    assert service.count_responses() == count
    return asked


def drain_here(service: Service, count: int, queues: Any) -> Counter[str]:
    """Let a consumer that uses this object for the service do the same."""
    service.submit(count)
    with ScriptedMaker() as maker, service.consumer_here(maker.url, opened=queues) as consumer, running(consumer):
        wait_until(lambda: consumer.totals["created"] == count and not consumer.status()["held"], PATIENCE_S)
        return Counter(map(service.kind, service.wire.requests))


@contextmanager
def running(consumer: Consumer) -> Iterator[None]:
    with ThreadPoolExecutor() as pool:
        work = pool.submit(consumer.run)
        try:
            yield
        finally:
            consumer.stop()
        work.result(30)


def report(service: Service, way: str, count: int, asked: Counter[str]) -> float:
    """Print the figure; it is shown by `pytest -rP`."""
    cost = asked.total() / count
    print(f"{service.queues.limits.service}, {way}, {count:,} requests: {cost:.3f} a widget {dict(asked)}")
    return cost


@over_a_wire
def test_a_widget_costs_at_most_035_requests_to_the_queue_service(service: Service) -> None:
    assert report(service, "the consumer", COUNT, drain(service, COUNT)) <= MOST_REQUESTS


class Fenced:
    """Queues that delete each message only while its claim holds it, with a request for each."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        return self._queues.settle(claim, [settlement._replace(fenced=True) for settlement in settlements])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queues, name)

    def __enter__(self) -> "Fenced":
        return self

    def __exit__(self, *_: object) -> None:
        self._queues.close()


@openstack
def test_deletes_that_look_at_claims_cost_a_request_more_each(service: Service) -> None:
    asked = drain_here(service, 100, Fenced(open_queues(service.url)))
    assert report(service, "every delete fenced", 100, asked) > 1
    assert asked["delete"] == 100


@rackspace
@pytest.mark.parametrize(("limit", "least"), [(20, 3), (1, 6)])
def test_claim_get_post_and_delete_one_by_one_as_pyrax_alone_does_it_cost_many(
    service: Any, limit: int, least: int
) -> None:
    """The first proof of concept: each message of a claim is answered and deleted by itself, with calls by name."""
    count = 40
    service.submit(count)
    identity = RaxIdentity(username=USER, api_key=KEY, auth_endpoint=service.identity.url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        identity.authenticate()
        client = QueueClient(identity, region_name=REGION, management_url=f"{service.wire.url}/v1")
        client.client_id = str(uuid.uuid4())
        while claim := client.claim_messages(service.request_queue, 60, 60, limit):
            for message in claim.messages:
                client.post_message(service.response_queue, {"widget_id": message.body["widget_id"]}, 600)
                message.delete(claim_id=claim.id)
        asked = Counter(map(service.kind, service.wire.requests))

    assert service.left() == (0, 0)
    assert report(service, f"pyrax alone, claims of {limit}", count, asked) >= least
