"""Rackspace Cloud Queues with pyrax mocked, its odd answers included; and queue URLs. No network, no account."""

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
    PostIncomplete,
    QueuesError,
    QueueUnavailable,
    Settlement,
    open_queues,
)
from claim_queues.zaqar_api import HttpSession

CloudQueues = pytest.importorskip("claim_queues.cloud_queues").CloudQueues  # needs pyrax
QueueClient = pytest.importorskip("pyrax.queueing").QueueClient


def answered(status: int, content: Any = b"", **headers: str) -> tuple[requests.Response, bytes]:
    """What a client's method_* gives: the response and its content."""
    response = requests.Response()
    response.status_code = status
    response._content = content if isinstance(content, bytes) else json.dumps(content).encode()
    response.headers.update(headers)
    return response, response.content


def stored(path: str, *, data: str) -> tuple[requests.Response, bytes]:
    """A post that is accepted: the answer names no ids, only paths."""
    paths = [f"/v1/queues/q/messages/id-of-{document['body']}" for document in json.loads(data)]
    return answered(201, {"partial": False, "resources": paths})


@pytest.fixture
def pyrax_client() -> Mock:
    """A QueueClient shaped by the real one: a call that pyrax does not know fails here too."""
    client = create_autospec(QueueClient, instance=True)
    for method in ("get", "put", "patch", "delete", "head"):
        getattr(client, f"method_{method}").return_value = answered(204)
    return client


@pytest.fixture
def queues(pyrax_client: Mock) -> Iterator[CloudQueues]:
    http = HttpSession(trust_env=False)
    with CloudQueues(pyrax_client, http, "rackspace://tester@DFW", "the API key of tester") as queues:
        yield queues


@pytest.fixture
def claim() -> Claim:
    return Claim("c1", "q", 300, 60, tuple(Message(f"m{number}", number, 7.0) for number in range(20)), math.inf)


@pytest.mark.parametrize("resources", [[], None, ["/m/1", "/m/2", "/m/3"], "/m/1", [1]], ids=repr)
def test_a_post_whose_ids_cannot_be_read_is_unknown(queues: CloudQueues, pyrax_client: Mock, resources: Any) -> None:
    pyrax_client.method_post.return_value = answered(201, {"resources": resources})
    with pytest.raises(PostIncomplete) as caught:
        queues.post("q", [1, 2])
    assert (caught.value.accepted, caught.value.unknown) == ({}, (0, 1))


def test_a_settlement_posts_then_deletes_with_few_calls(queues: CloudQueues, pyrax_client: Mock, claim: Claim) -> None:
    pyrax_client.method_post.side_effect = stored
    settlements = [Settlement(each, (Post("answers", each.body),), fenced=each.body >= 17) for each in claim.messages]

    settled = queues.settle(claim, settlements)

    assert settled.deleted == {f"m{number}" for number in range(20)}
    assert claim.messages == ()
    assert [(call[0], call.args[0]) for call in pyrax_client.method_calls] == [
        *[("method_post", "/queues/answers/messages")] * 2,
        ("method_delete", f"/queues/q/messages?ids={','.join(f'm{n}' for n in range(17))}&claim_ids=c1"),
        *[("method_delete", f"/queues/q/messages/m{n}?claim_id=c1") for n in range(17, 20)],
    ]


def test_of_posts_that_were_accepted_half_only_the_others_are_repeated(
    queues: CloudQueues, pyrax_client: Mock, claim: Claim
) -> None:
    two = [Settlement(each, (Post("letters", each.body), Post("answers", each.body))) for each in claim.messages[:2]]
    pyrax_client.method_post.side_effect = [stored("", data='[{"body":0},{"body":1}]'), answered(503)]
    with pytest.raises(QueueUnavailable):
        queues.settle(claim, two)
    pyrax_client.method_delete.assert_not_called()

    pyrax_client.method_post.side_effect = stored
    assert len(queues.settle(claim, two).deleted) == 2
    paths = [call.args[0] for call in pyrax_client.method_post.call_args_list]
    assert paths == ["/queues/letters/messages", *["/queues/answers/messages"] * 2]


@pytest.mark.parametrize("status", [400, 403])
def test_a_fenced_delete_that_is_refused_is_lost(
    queues: CloudQueues, pyrax_client: Mock, claim: Claim, status: int
) -> None:
    pyrax_client.method_delete.side_effect = [answered(204), answered(status), answered(204)]

    settled = queues.settle(claim, [Settlement(each) for each in claim.messages[:3]])

    assert (settled.deleted, settled.refused) == ({"m0", "m2"}, {})
    assert "m1" in {message.id for message in claim.messages}


FORBIDDEN = {"title": "Not authorized", "description": "You are not authorized to complete this action."}


@pytest.mark.parametrize("answer", [*map(answered, (401, 404, 429, 503)), answered(403, FORBIDDEN)])
def test_any_other_failure_of_a_delete_is_no_lost_claim(
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


@pytest.fixture
def key() -> Iterator[None]:
    with keyring_of(Keyring()):
        yield


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("rackspace://tester@DFW", "rackspace://tester@DFW"),
        ("rackspace://tester@dfw/", "rackspace://tester@DFW"),
        ("rackspace://test%65r@LON", "rackspace://tester@LON"),
        (
            "rackspace://tester@DFW?identity=http://[::1]:5000/v2.0",
            "rackspace://tester@DFW?identity=http://[::1]:5000/v2.0",
        ),
    ],
)
def test_a_url_names_user_region_and_perhaps_the_identity_service(url: str, address: str) -> None:
    with open_queues(url) as queues:
        assert queues.address == address
        assert queues.credentials == "the API key of tester, in keyring"


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    "url",
    [
        "rackspace://tester@",
        f"rackspace://tester:{KEY}@DFW",
        f"rackspace://tester@DFW?api_key={KEY}",
        f"rackspace://tester@DFW?identity=https://a:{KEY}@id.example/v2.0",
        f"rackspace://tester@DFW/{KEY}",
        f"rackspace://tester@DFW#{KEY}",
        f"rackspace://tester@DFW?{KEY}",
        f"rackspace://tester@[{KEY}",
        "rackspace://tester@DFW:443",
        "rackspace://tester@D F W",
        "rackspace://tester@DFW?identity=http://id.example/v2.0",
        "rackspace://tester@DFW?identity=http://127.0.0.1.example/v2.0",
        "rackspace://tester@DFW?identity=id.example",
        "rackspace://tester@DFW?identity=",
        "rackspace://tester@DFW?identity=https://[/v2.0",
        "rackspace://tester@DFW?identity=https://id.example/v2.0?a=b",
    ],
)
def test_any_other_url_is_refused_and_what_may_be_a_key_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_queues(url)
    assert caught.value.exit_code == 2
    assert KEY not in str(caught.value)


@pytest.mark.usefixtures("key")
def test_the_user_and_the_identity_service_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CredentialsError, match="CLOUD_KEYRING_USER"):
        open_queues("rackspace://DFW")

    monkeypatch.setenv("CLOUD_KEYRING_USER", USER)
    with open_queues("rackspace://DFW") as queues:
        assert queues.address == "rackspace://tester@DFW"

    monkeypatch.setenv("CLOUD_AUTH_ENDPOINT", "http://id.example/v2.0")
    with pytest.raises(ConfigError, match="only https is safe"):
        open_queues("rackspace://DFW")
