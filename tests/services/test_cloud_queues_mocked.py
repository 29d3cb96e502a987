"""Rackspace Cloud Queues with pyrax mocked, its odd answers included; and queue URLs. No network, no account."""

import io
import json
import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import requests
from doubles.keyring_double import KEY, USER, Keyring, keyring_of

from claim_queues import (
    Claim,
    ClaimLost,
    ConfigError,
    CredentialsError,
    Message,
    Post,
    QueuesError,
    Settlement,
    open_queues,
)
from claim_queues.zaqar_api import HttpSession

CloudQueues = pytest.importorskip("claim_queues.cloud_queues").CloudQueues  # needs pyrax
QueueClient = pytest.importorskip("pyrax.queueing").QueueClient


def answered(status: int, content: Any = None) -> tuple[requests.Response, bytes]:
    """What a client's method_* gives: the response and its content."""
    response = requests.Response()
    response.status_code = status
    response.raw = io.BytesIO(json.dumps(content).encode())
    return response, response.content


@pytest.fixture
def pyrax_client() -> Mock:
    """A QueueClient shaped by the real one: a call that pyrax does not know fails here too."""
    return create_autospec(QueueClient, instance=True)


@pytest.fixture
def queues(pyrax_client: Mock) -> Iterator[CloudQueues]:
    http = HttpSession(trust_env=False)
    with CloudQueues(pyrax_client, http, "rackspace://tester@DFW", "the API key of tester") as queues:
        yield queues


@pytest.fixture
def claim() -> Claim:
    return Claim("c1", "q", 300, 60, tuple(Message(f"m{number}", number, 7.0) for number in range(20)), math.inf)


def test_a_settlement_posts_then_deletes_with_few_calls(queues: CloudQueues, pyrax_client: Mock, claim: Claim) -> None:
    pyrax_client.method_post.return_value = answered(201, {"resources": ["/messages/of-ten"] * 10})
    pyrax_client.method_delete.return_value = answered(204)
    settlements = [Settlement(each, (Post("answers", each.body),), fenced=each.body >= 17) for each in claim.messages]

    settled = queues.settle(claim, settlements)

    assert settled.deleted == {f"m{number}" for number in range(20)}
    assert claim.messages == ()
    assert [(call[0], call.args[0]) for call in pyrax_client.method_calls] == [
        *[("method_post", "/queues/answers/messages")] * 2,
        ("method_delete", f"/queues/q/messages?ids={','.join(f'm{n}' for n in range(17))}&claim_ids=c1"),
        *[("method_delete", f"/queues/q/messages/m{n}?claim_id=c1") for n in range(17, 20)],
    ]


FORBIDDEN = {"title": "Not authorized", "description": "You are not authorized to complete this action."}


@pytest.mark.parametrize("answer", [*map(answered, (401, 404, 429, 503)), answered(403, FORBIDDEN)])
def test_any_other_failure_of_a_delete_is_not_a_lost_claim(
    queues: CloudQueues, pyrax_client: Mock, claim: Claim, answer: Any
) -> None:
    pyrax_client.method_delete.return_value = answer
    with pytest.raises(QueuesError) as caught:
        queues.settle(claim, [Settlement(claim.messages[0])])
    assert not isinstance(caught.value, ClaimLost)


def test_only_ids_are_deleted_and_a_claimed_message_is_left_alone(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_delete.side_effect = [answered(403), answered(204)]
    queues.delete("q", ["m1", "", "a/b", "..", "../../claims/c1", "m1?ids=m2", "m1,m2", "ä", "m2"])
    assert [call.args for call in pyrax_client.method_delete.call_args_list] == [
        ("/queues/q/messages/m1",),
        ("/queues/q/messages/m2",),
    ]


@pytest.fixture(autouse=True)
def key() -> Iterator[None]:
    with keyring_of(Keyring()):
        yield


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("rackspace://tester@DFW", "rackspace://tester@DFW"),
        ("rackspace://tester@dfw/", "rackspace://tester@DFW"),
        ("rackspace://test%65r@LON", "rackspace://tester@LON"),
        ("rackspace://tester@DFW?identity=http://[::1]/v2.0", "rackspace://tester@DFW?identity=http://[::1]/v2.0"),
    ],
)
def test_a_url_names_user_region_and_perhaps_the_identity_service(url: str, address: str) -> None:
    with open_queues(url) as queues:
        assert queues.address == address
        assert queues.credentials == "the API key of tester, in keyring"


@pytest.mark.parametrize(
    "url",
    [
        "rackspace://tester@",
        f"rackspace://tester:{KEY}@DFW",
        f"rackspace://tester@DFW?api_key={KEY}",
        f"rackspace://tester@DFW?identity=https://a:{KEY}@id.example/v2.0",
        f"rackspace://tester@DFW/{KEY}",
        f"rackspace://tester@[{KEY}",
        "rackspace://tester@DFW:443",
        "rackspace://tester@D F W",
        "rackspace://tester@DFW?identity=http://id.example/v2.0",
    ],
)
def test_any_other_url_is_refused_and_what_may_be_a_key_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_queues(url)
    assert caught.value.exit_code == 2
    assert KEY not in str(caught.value)


def test_the_user_and_the_identity_service_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CredentialsError, match="CLOUD_KEYRING_USER"):
        open_queues("rackspace://DFW")

    monkeypatch.setenv("CLOUD_KEYRING_USER", USER)
    with open_queues("rackspace://DFW") as queues:
        assert queues.address == "rackspace://tester@DFW"

    monkeypatch.setenv("CLOUD_AUTH_ENDPOINT", "http://id.example/v2.0")
    with pytest.raises(ConfigError, match="only https is safe"):
        open_queues("rackspace://DFW")
