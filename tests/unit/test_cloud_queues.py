"""Rackspace Cloud Queues against a real Zaqar, API v1, behind a proxy that counts, refuses and loses answers."""

import email.utils
import itertools
import json
import logging
import os
import ssl
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from backend_cloud_queues import zaqar_url
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fault_proxy import FaultProxy
from identity_double import REGION, IdentityDouble
from keyring_double import KEY, USER, Keyring, keyring_of
from processes import advance
from scripted_maker import Raw, Reply, Request
from support import HERE, free_port, wait_until

from claim_queues import (
    Claim,
    ClaimLost,
    ConfigError,
    CredentialsError,
    MessageRefused,
    Post,
    PostIncomplete,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    QueueUnavailable,
    Settlement,
    pyrax_client,
)
from claim_queues.cloud_queues import CloudQueues

TERMS = {"ttl": 60, "grace": 60}


class World:
    """Cloud Queues as Rackspace has them: an identity service, and a queue service that wants its tokens."""

    def __init__(self, closing: ExitStack, tls: ssl.SSLContext | None = None) -> None:
        closing.enter_context(keyring_of(Keyring()))
        self.proxy = closing.enter_context(FaultProxy(zaqar_url(), tls=tls))
        self.proxy.answer = self.serve
        self.identity = closing.enter_context(IdentityDouble(f"{self.proxy.url}/v1", tls=tls))
        self.url = f"rackspace://{USER}@{REGION}?identity={self.identity.url}"
        self.queues = closing.enter_context(CloudQueues.from_url(self.url))

    def serve(self, request: Request) -> Reply:
        return self.proxy.forward(request) if self.identity.holds(request) else Reply(401)

    def answer(self, part: str, answer: Reply | Raw | Callable[[Request], Reply | Raw], *, times: int = 10**6) -> None:
        """Answer so often the requests whose line holds `part` in this way; serve all others."""
        left = iter(range(times))

        def decide(request: Request) -> Reply | Raw:
            if part not in f"{request.method} {request.path}" or next(left, None) is None:
                return self.serve(request)
            return answer(request) if callable(answer) else answer

        self.proxy.answer = decide

    def lose(self, request: Request) -> Raw:
        """Do what is asked, and lose the answer."""
        self.serve(request)
        return Raw(end="reset")

    def asked(self) -> list[str]:
        """The requests since the last time: method, and path below the queue without its query."""
        found = [
            f"{each.method} {'/'.join(each.path.partition('?')[0].split('/')[4:])}" for each in self.proxy.requests
        ]
        self.proxy.requests.clear()
        return found


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as closing:
        yield World(closing)


@pytest.fixture
def queues(world: World) -> CloudQueues:
    return world.queues


@pytest.fixture
def queue(world: World) -> str:
    return new_queue(world)


@pytest.fixture
def responses(world: World) -> str:
    return new_queue(world)


def new_queue(world: World) -> str:
    name = f"unit-{uuid.uuid4().hex}"
    world.queues.create(name)
    world.proxy.requests.clear()
    return name


def claim(queues: CloudQueues, queue: str, limit: int = 20) -> Claim:
    found = queues.claim(queue, **TERMS, limit=limit)
    assert found is not None
    return found


def bodies(queues: CloudQueues, queue: str, after: str = "") -> list[Any]:
    return [message.body for message in queues.browse(queue, limit=1000, claimed=True, after=after).messages]


# Requests on the wire


def test_a_claim_is_one_request(world: World, queues: CloudQueues, queue: str) -> None:
    queues.post(queue, [1, 2])
    world.asked()

    assert len(claim(queues, queue).messages) == 2
    assert world.asked() == ["POST claims"]


def test_each_request_names_this_client_and_its_account(world: World, queues: CloudQueues, queue: str) -> None:
    queues.post(queue, [1])
    claim(queues, queue)

    clients = {request.headers["Client-ID"] for request in world.proxy.requests}
    assert [str(uuid.UUID(client)) for client in clients] == list(clients)
    assert {request.headers["X-Auth-Project-Id"] for request in world.proxy.requests} == {"123"}


def settle_all(queues: CloudQueues, queue: str, responses: str, *, fenced: bool) -> None:
    while found := queues.claim(queue, **TERMS, limit=queues.limits.claim_limit):
        made = [Settlement(each, (Post(responses, "created", 600),), fenced=fenced) for each in found.messages]
        assert len(queues.settle(found, made).deleted) == len(made)


@pytest.mark.parametrize(("fenced", "most"), [(False, 0.35), (True, 1.35)])
def test_a_widget_costs_few_requests(world: World, queue: str, responses: str, fenced: bool, most: float) -> None:
    world.queues.post(queue, list(range(100)))
    world.asked()

    settle_all(world.queues, queue, responses, fenced=fenced)

    asked = Counter(world.asked())
    assert (asked["POST claims"], asked["POST messages"]) == (6, 10)  # one claim finds the queue empty
    assert asked.total() / 100 <= most
    assert bodies(world.queues, responses) == ["created"] * 100


def test_a_post_of_many_sends_ten_in_a_request(world: World, queues: CloudQueues, queue: str) -> None:
    queues.post(queue, list(range(25)))

    assert [len(request.json) for request in world.proxy.requests] == [10, 10, 5]


def test_large_bodies_share_a_request_only_as_far_as_they_fit(world: World, queues: CloudQueues, queue: str) -> None:
    large = "x" * 100_000

    assert len(queues.post(queue, [large] * 5)) == 5
    assert [len(request.json) for request in world.proxy.requests] == [2, 2, 1]


def test_an_idle_wait_looks_ever_less_often(world: World, queues: CloudQueues, queue: str) -> None:
    assert queues.claim(queue, **TERMS, limit=1, wait=1) is None
    assert 3 <= len(world.asked()) <= 5


# The end of a queue


def test_the_end_of_500_messages_is_found_in_few_requests(world: World, queues: CloudQueues, queue: str) -> None:
    ids = queues.post(queue, list(range(500)))
    world.asked()
    marker = queues.end_marker(queue)
    assert len(world.asked()) <= 4

    for number in [*range(100, 400), *range(410, 499)]:
        queues.delete(queue, [ids[number]])
    world.asked()
    assert queues.end_marker(queue) == marker
    assert len(world.asked()) <= 25

    queues.post(queue, ["new"])
    assert bodies(queues, queue, after=marker) == ["new"]


@pytest.mark.parametrize("left", [[], [0], [3], [1, 2], [0, 1, 2, 3]])
def test_the_end_is_behind_the_newest_message_whatever_is_gone(
    queues: CloudQueues, queue: str, left: list[int]
) -> None:
    ids = queues.post(queue, list(range(4)))
    queues.delete(queue, [id_ for number, id_ in enumerate(ids) if number not in left])

    marker = queues.end_marker(queue)

    assert bodies(queues, queue, after=marker) == []
    queues.post(queue, ["new"])
    assert bodies(queues, queue, after=marker) == ["new"]


# Connections, timeouts, TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cloud queues")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(
        signed.public_bytes(pem)
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def tls_world(certificate: Path) -> Iterator[World]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ExitStack() as closing:
        yield World(closing, context)


def test_a_hundred_requests_share_one_tls_connection(
    tls_world: World, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    queue = new_queue(tls_world)
    queues = tls_world.queues

    for _ in range(25):
        queues.post(queue, [1])
        queues.settle(found := claim(queues, queue), [Settlement(found.messages[0])])
        queues.stats(queue)

    assert len(tls_world.proxy.requests) == 100
    assert (tls_world.proxy.connections, tls_world.identity.connections) == (1, 1)
    assert queues._client.times == []


def test_a_certificate_that_nobody_vouches_for_gets_no_key(tls_world: World) -> None:
    with pytest.raises(QueueUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        tls_world.queues.exists("requests")
    assert tls_world.identity.requests == []


def test_a_bundle_of_authorities_that_is_not_there_is_named(tls_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "no-such-file.pem")
    with pytest.raises(ConfigError, match="no-such-file"):
        tls_world.queues.exists("requests")


@pytest.mark.parametrize("slow", ["identity", "queues"])
def test_every_call_has_a_timeout(world: World, queue: str, slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyrax_client, "TIMEOUT_S", (0.2, 0.2))
    world.proxy.answer = lambda request: Raw(end="hang") if slow == "queues" else Reply(401)
    world.identity.answer = lambda request: Raw(end="hang") if slow == "identity" else world.identity.sign_in(request)

    with pytest.raises(QueueUnavailable, match=r"(?i)timed out"):
        world.queues.stats(queue)


def test_a_redirect_is_not_followed(world: World, queues: CloudQueues, queue: str) -> None:
    with FaultProxy(zaqar_url()) as elsewhere:
        world.answer("GET", Reply(307, headers={"Location": f"{elsewhere.url}/v1/queues/{queue}/stats"}))
        with pytest.raises(QueueUnavailable, match="HTTP 307"):
            queues.stats(queue)
        assert elsewhere.requests == []


# Sign-in


def test_nothing_is_asked_before_the_first_operation(world: World) -> None:
    assert world.identity.requests + world.proxy.requests == []


def test_a_refused_token_is_renewed_unseen(world: World, queues: CloudQueues, queue: str) -> None:
    world.identity.tokens.clear()  # no longer ours

    assert queues.exists(queue)
    assert world.asked() == ["HEAD ", "HEAD "]
    assert len(world.identity.requests) == 2


def test_threads_whose_token_was_refused_share_one_sign_in(world: World, queues: CloudQueues, queue: str) -> None:
    world.identity.tokens.clear()
    all_refused = threading.Barrier(4, timeout=20)

    def answer(request: Request) -> Reply:
        if world.identity.holds(request):
            return world.proxy.forward(request)
        all_refused.wait()
        return Reply(401)

    world.proxy.answer = answer
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(queues.exists, [queue] * 4))

    assert len(world.identity.requests) == 2


def test_a_token_refused_for_ever_is_an_error_of_the_credentials(world: World, queues: CloudQueues, queue: str) -> None:
    world.answer("", Reply(401))

    with pytest.raises(CredentialsError, match="does not take the token"):
        claim(queues, queue)
    assert len(world.identity.requests) == 2


def test_a_refused_key_says_how_to_store_another(world: World) -> None:
    world.identity.key = "another"

    with pytest.raises(CredentialsError, match=f"keyring set pyrax {USER}"):
        world.queues.exists("requests")
    assert len(world.identity.requests) == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Reply(429, headers={"Retry-After": "7"}), QueueUnavailable),
        (Reply(503), QueueUnavailable),
        (Reply(500, {"identityFault": {"code": 500, "message": "oops"}}), QueueUnavailable),
        (Reply(200, "<html>welcome to our hotel</html>"), QueueUnavailable),
        (Reply(200, {"access": {"token": {"id": "t"}}}), QueueUnavailable),
        (Raw(end="reset"), QueueUnavailable),
        (Reply(403, {"userDisabled": {"message": "User disabled"}}), CredentialsError),
        (Reply(400, {"badRequest": {"message": "Invalid request body"}}), CredentialsError),
        (Reply(404), ConfigError),
    ],
    ids=repr,
)
def test_no_answer_of_the_identity_service_breaks_later_sign_ins(
    world: World, queues: CloudQueues, queue: str, answer: Reply | Raw, error: type[Exception]
) -> None:
    world.identity.answer = lambda request: answer
    world.identity.tokens.clear()
    for _ in range(2):
        with pytest.raises(error) as caught:
            queues.stats(queue)
        assert type(caught.value) is error
        assert getattr(caught.value, "retry_after_s", None) == (7 if "Retry-After" in repr(answer) else None)

    world.identity.answer = world.identity.sign_in
    assert queues.stats(queue).total == 0
    assert {next(iter(request.json["auth"])) for request in world.identity.requests} == {"RAX-KSKEY:apiKeyCredentials"}


def test_half_an_answer_of_the_identity_service_is_no_sign_in(world: World, queues: CloudQueues) -> None:
    token = {"id": "half", "expires": "2099-12-01T00:00:00Z", "tenant": {"id": "123", "name": "123"}}
    world.identity.answer = lambda request: Reply(200, {"access": {"token": token}})
    with pytest.raises(QueueUnavailable, match="none of identity service"):
        queues.exists("requests")

    world.identity.answer = world.identity.sign_in
    assert not queues.exists("requests")


def test_an_identity_service_that_is_down_is_unavailable(world: World) -> None:
    with (
        CloudQueues.from_url(f"rackspace://{USER}@{REGION}?identity=http://127.0.0.1:{free_port()}/v2.0") as queues,
        pytest.raises(QueueUnavailable, match="Connection refused"),
    ):
        queues.exists("requests")


def test_a_region_without_cloud_queues_is_named_with_those_that_have_them(world: World) -> None:
    with (
        CloudQueues.from_url(world.url.replace(REGION, "LON")) as queues,
        pytest.raises(ConfigError, match=f"region LON; regions that have: {REGION}"),
    ):
        queues.exists("requests")


def test_a_catalog_that_would_send_tokens_in_plain_text_is_refused(world: World) -> None:
    world.identity.queues_url = "http://queues.example/v1"
    with pytest.raises(ConfigError, match="only https is safe"):
        world.queues.exists("requests")


# Errors of the service


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, ConfigError),
        (403, QueueForbidden),
        (404, QueueNotFound),
        (405, QueueUnavailable),
        (409, QueueUnavailable),
        (413, QueueUnavailable),
        (429, QueueUnavailable),
        (500, QueueUnavailable),
        (501, QueueError),
        (502, QueueUnavailable),
        (503, QueueUnavailable),
        (504, QueueUnavailable),
    ],
)
def test_each_status_is_one_error_that_says_what_where_and_why(
    world: World, queues: CloudQueues, queue: str, status: int, error: type[Exception]
) -> None:
    world.answer("GET", Reply(status, {"title": "No.", "description": "Because."}))

    with pytest.raises(error) as caught:
        queues.stats(queue)
    assert f"count {queue} at {queues.address}: No.: Because. (HTTP {status})" in str(caught.value)
    assert type(caught.value) is error or (error is QueueUnavailable and isinstance(caught.value, error))
    assert caught.value.__cause__ is not None


def in_ten_seconds() -> str:
    return email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)


@pytest.mark.parametrize("status", [413, 429, 503])
@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), (in_ten_seconds, 10), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("9" * 9, 3600)],
    ids=["seconds", "date", "past", "too long"],
)
def test_the_wait_that_the_service_asks_for_is_passed_on(
    world: World, queue: str, status: int, header: Any, seconds: float
) -> None:
    world.answer("GET", Reply(status, headers={"Retry-After": header() if callable(header) else header}))
    with pytest.raises(QueueUnavailable) as caught:
        world.queues.stats(queue)
    assert caught.value.retry_after_s == pytest.approx(seconds, abs=5 if callable(header) else 0)


@pytest.mark.parametrize("header", ["soon", "nan GMT", "99999999999999999999999999 GMT", ""])
def test_a_wait_that_is_nonsense_is_none(world: World, queues: CloudQueues, queue: str, header: str) -> None:
    world.answer("GET", Reply(503, headers={"Retry-After": header}))
    with pytest.raises(QueueUnavailable) as caught:
        queues.stats(queue)
    assert caught.value.retry_after_s is None


@pytest.mark.parametrize(
    "fault", [Reply(200, "<html>"), Reply(200, "[]"), Reply(200, "{}"), Raw(end="reset")], ids=repr
)
def test_what_is_no_answer_of_cloud_queues_is_unavailable(
    world: World, queues: CloudQueues, queue: str, fault: Reply | Raw
) -> None:
    queues.post(queue, [1])
    found = claim(queues, queue)
    world.answer(queue, fault)
    for operation in (
        lambda: queues.claim(queue, **TERMS, limit=1),
        lambda: queues.browse(queue),
        lambda: queues.stats(queue),
        lambda: queues.settle(found, [Settlement(found.messages[0], (Post(queue, 1),))]),
    ):
        with pytest.raises(QueueUnavailable):
            operation()


def test_a_service_that_is_down_is_unavailable_and_a_post_to_it_surely_not_stored(
    world: World, queues: CloudQueues, queue: str
) -> None:
    queues._client.management_url = f"http://127.0.0.1:{free_port()}/v1"
    for operation in (lambda: queues.post(queue, [1]), lambda: queues.stats(queue), lambda: queues.exists(queue)):
        with pytest.raises(QueueUnavailable, match="Connection refused"):
            operation()


def test_a_missing_queue_is_never_an_empty_one(world: World, queues: CloudQueues) -> None:
    missing = f"unit-{uuid.uuid4().hex}"

    assert not queues.exists(missing)
    for operation in (lambda: queues.post(missing, [1]), lambda: queues.stats(missing)):
        with pytest.raises(QueueNotFound, match=f"{missing} at .*create it"):
            operation()
    for operation in (lambda: queues.end_marker(missing), lambda: queues.purge(missing)):
        with pytest.raises(QueueNotFound):
            operation()


# Posts half done


def test_a_post_whose_answer_is_lost_is_repeated_once(world: World, queues: CloudQueues, queue: str) -> None:
    world.answer("POST", world.lose, times=1)

    ids = queues.post(queue, ["a", "b"])

    assert bodies(queues, queue) == ["a", "b", "a", "b"]
    assert ids == [message.id for message in queues.browse(queue).messages][2:]


@pytest.mark.parametrize("fault", [Raw(end="reset"), Reply(502), Reply(201, "<html>")], ids=repr)
def test_a_post_whose_answers_are_all_lost_is_reported_as_unknown(
    world: World, queues: CloudQueues, queue: str, fault: Reply | Raw
) -> None:
    world.answer("POST", lambda request: fault if len(world.proxy.requests) > 1 else world.serve(request))

    with pytest.raises(PostIncomplete, match="10 of 25 were accepted") as caught:
        queues.post(queue, list(range(25)))

    assert list(caught.value.accepted) == list(range(10))
    assert caught.value.unknown == tuple(range(10, 20))
    assert list(caught.value.refused) == list(range(20, 25))
    assert world.asked() == ["POST messages"] * 3
    stored = [message.id for message in queues.browse(queue).messages]
    assert list(caught.value.accepted.values()) == stored


def test_a_post_that_is_lost_and_then_finds_the_service_down_is_unknown(
    world: World, queues: CloudQueues, queue: str
) -> None:
    world.answer("POST", lambda request: Reply(503) if len(world.proxy.requests) > 1 else world.lose(request))

    with pytest.raises(PostIncomplete) as caught:
        queues.post(queue, [1])
    assert (caught.value.accepted, caught.value.refused, caught.value.unknown) == ({}, {}, (0,))


def test_a_post_that_the_service_refuses_half_way_says_what_was_stored(
    world: World, queues: CloudQueues, queue: str
) -> None:
    world.answer("POST", lambda request: Reply(503) if len(world.proxy.requests) > 1 else world.serve(request))

    with pytest.raises(PostIncomplete) as caught:
        queues.post(queue, list(range(12)))
    assert list(caught.value.accepted) == list(range(10))
    assert list(caught.value.refused) == [10, 11]
    assert caught.value.unknown == ()


def test_a_post_that_the_service_refuses_whole_is_no_half_post(world: World, queues: CloudQueues, queue: str) -> None:
    world.answer("POST", Reply(503))
    with pytest.raises(QueueUnavailable):
        queues.post(queue, [1])
    assert world.asked() == ["POST messages"]

    world.answer("POST", Reply(400, {"title": "Invalid API request", "description": "Too deep."}))
    with pytest.raises(MessageRefused, match="Too deep"):
        queues.post(queue, [1])


def partly(world: World, count: int) -> Callable[[Request], Reply]:
    """Accept the first `count` bodies only, as Rackspace's documentation describes `partial`."""

    def answer(request: Request) -> Reply:
        first = Request(request.method, request.path, request.headers, json.dumps(request.json[:count]).encode(), 0)
        stored = world.serve(first)
        return Reply(201, json.loads(stored.body) | {"partial": True})

    return answer


def test_what_a_partial_post_left_out_is_posted_next(world: World, queues: CloudQueues, queue: str) -> None:
    world.answer("POST", partly(world, 3), times=1)

    ids = queues.post(queue, list(range(8)))

    assert [(message.id, message.body) for message in queues.browse(queue).messages] == list(
        zip(ids, range(8), strict=True)
    )


# Settlements


def test_nothing_is_deleted_when_a_post_fails(world: World, queues: CloudQueues, queue: str, responses: str) -> None:
    queues.post(queue, [1, 2])
    found = claim(queues, queue)
    made = [Settlement(each, (Post(responses, "created"),), fenced=False) for each in found.messages]
    world.asked()
    for fault in (Reply(503), Raw(end="reset")):
        world.answer("POST", fault)
        with pytest.raises(QueueUnavailable):
            queues.settle(found, made)
    assert not any(asked.startswith("DELETE") for asked in world.asked())

    world.proxy.answer = world.serve
    assert len(queues.settle(found, made).deleted) == 2
    assert bodies(queues, responses) == ["created", "created"]


@pytest.mark.parametrize("fenced", [True, False])
def test_a_delete_that_fails_is_repeated_with_the_settlement_and_its_posts_are_not(
    world: World, queues: CloudQueues, queue: str, responses: str, fenced: bool
) -> None:
    queues.post(queue, [1, 2])
    found = claim(queues, queue)
    made = [
        Settlement(each, (Post(responses, "created"), Post(responses, "created")), fenced=fenced)
        for each in found.messages
    ]
    world.answer("DELETE", Reply(503), times=1)
    with pytest.raises(QueueUnavailable):
        queues.settle(found, made)

    assert queues.settle(found, made).deleted == {each.id for each in found.messages}
    assert queues.stats(queue).total == 0
    assert bodies(queues, responses) == ["created"] * 4


def test_of_posts_that_were_accepted_half_only_the_others_are_repeated(
    world: World, queues: CloudQueues, queue: str, responses: str
) -> None:
    batch = queues.limits.post_batch
    queues.post(queue, list(range(2 * batch)))
    found = claim(queues, queue)
    assert len(found.messages) == 2 * batch
    made = [Settlement(each, (Post(responses, each.body),), fenced=False) for each in found.messages]
    first = iter([world.serve])

    def fail_after_the_first(request: Request) -> Reply:
        return next(first, lambda _: Reply(503))(request)

    world.answer("POST", fail_after_the_first)
    with pytest.raises(QueueUnavailable):
        queues.settle(found, made)
    world.proxy.answer = world.serve

    assert len(queues.settle(found, made).deleted) == len(made)
    assert sorted(bodies(queues, responses)) == sorted(each.body for each in found.messages)


def test_a_message_whose_first_post_is_refused_gets_no_second(
    world: World, queues: CloudQueues, queue: str, responses: str
) -> None:
    queues.post(queue, [1])
    found = claim(queues, queue)
    world.answer("POST", lambda request: Reply(400) if b"letter" in request.body else world.serve(request))

    settled = queues.settle(found, [Settlement(found.messages[0], (Post(queue, "letter"), Post(responses, "failed")))])

    assert list(settled.refused) == [found.messages[0].id]
    assert queues.stats(responses).total == 0


def test_a_body_that_the_service_refuses_stops_no_other(
    world: World, queues: CloudQueues, queue: str, responses: str
) -> None:
    queues.post(queue, list(range(13)))
    found = claim(queues, queue)
    world.answer("POST", lambda request: Reply(400) if b"poison" in request.body else world.serve(request))

    settled = queues.settle(
        found, [Settlement(each, (Post(responses, "poison" if each.body == 11 else "ok"),)) for each in found.messages]
    )

    assert list(settled.refused) == [found.messages[11].id]
    assert len(settled.deleted) == 12
    assert bodies(queues, responses) == ["ok"] * 12


def test_an_unfenced_delete_removes_what_another_holds_and_a_fenced_one_does_not(
    queues: CloudQueues, queue: str
) -> None:
    ids = queues.post(queue, ["unfenced", "fenced"])
    lapsed = claim(queues, queue)
    advance(zaqar_url(), 61)
    taken = claim(queues, queue)

    settled = queues.settle(lapsed, [Settlement(each, fenced=each.body == "fenced") for each in lapsed.messages])

    assert (settled.deleted, settled.lost) == ({ids[0]}, {ids[1]})
    assert queues.settle(taken, [Settlement(taken.messages[1])]).deleted == {ids[1]}


def test_a_refusal_of_the_credentials_is_no_lost_claim(world: World, queues: CloudQueues, queue: str) -> None:
    queues.post(queue, [1])
    found = claim(queues, queue)
    world.answer("DELETE", Reply(401))

    with pytest.raises(CredentialsError):
        queues.settle(found, [Settlement(found.messages[0])])


def test_a_renewal_that_is_refused_is_a_lost_claim(world: World, queues: CloudQueues, queue: str) -> None:
    queues.post(queue, [1])
    found = claim(queues, queue)
    advance(zaqar_url(), 61)

    with pytest.raises(ClaimLost, match=found.id):
        queues.renew(found, ttl=60)


def test_messages_of_a_claim_whose_answer_was_lost_are_free_after_the_claim_ttl(
    world: World, queues: CloudQueues, queue: str
) -> None:
    queues.post(queue, ["hidden"])
    world.answer("POST", world.lose, times=1)
    with pytest.raises(QueueUnavailable):
        claim(queues, queue)
    assert len(world.asked()) == 2
    assert queues.claim(queue, **TERMS, limit=1) is None

    advance(zaqar_url(), 61)
    assert claim(queues, queue).messages[0].body == "hidden"


def test_a_body_that_holds_nan_is_given_as_text(world: World, queues: CloudQueues, queue: str) -> None:
    queues.post(queue, [1])
    request = world.proxy.requests[-1]
    body = b'[{"ttl":60,"body":{"n":NaN}},{"ttl":60,"body":"fine"}]'
    world.serve(Request("POST", request.path, request.headers, body, 0))

    assert [message.body for message in claim(queues, queue).messages] == [1, '{"n": NaN}', "fine"]


# Secrets

PROGRAM = """
import logging, sys, traceback, warnings
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from claim_queues import QueuesError
from claim_queues.cloud_queues import CloudQueues
import pyrax
assert pyrax.get_setting("verify_ssl") is False and not pyrax.get_http_debug()
with CloudQueues.from_url(sys.argv[1]) as queues:
    print(queues, vars(queues), repr(queues._client.identity), queues.address)
    for queue in sys.argv[2:]:
        try:
            queues.create(queue)
            queues.post(queue, [1])
            print(queues.claim(queue, ttl=60, grace=60, limit=1))
        except QueuesError:
            traceback.print_exc(file=sys.stdout)
print("ready", flush=True)
sys.stdin.read()
"""
SLIPS = "[settings]\nhttp_debug = True\nverify_ssl = true\nkeyring_username = tester\n"
"""What pyrax takes from the file: it prints what it sends, keys included, and verifies no certificate."""


def start(home: Path, *words: str, settings: str = SLIPS) -> subprocess.Popen[str]:
    """That program in a process of its own, with the double for a keyring, and these settings in ~/.pyrax.cfg."""
    (home / ".pyrax.cfg").write_text(settings)
    paths = os.pathsep.join(map(str, (HERE, HERE / "tests")))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=home,
        env=os.environ | {"PYTHONPATH": paths, "PYTHON_KEYRING_BACKEND": "keyring_double.Keyring", "HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def process_list() -> str:
    return "".join(path.read_text(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())


def test_no_secret_is_shown_by_any_log_error_repr_or_process_list(world: World, queue: str, tmp_path: Path) -> None:
    world.answer("POST", lambda request: Reply(403) if "forbidden" in request.path else world.serve(request))
    with start(tmp_path, world.url.replace(f"{USER}@", ""), queue, "forbidden", "bad name") as process:
        assert process.stdout is not None
        out = "".join(itertools.takewhile(lambda line: line != "ready\n", process.stdout))
        seen = process_list()
        out += process.communicate()[0]

    assert (process.returncode, "Claim(id=" in out, "QueueForbidden" in out, "urllib3" in out) == (0, True, True, True)
    assert world.identity.requests[-1].json["auth"]["RAX-KSKEY:apiKeyCredentials"]["apiKey"] == KEY
    assert f"identity={world.identity.url}" in seen
    assert "canary" not in seen + out


def test_a_slip_in_the_settings_of_pyrax_turns_no_verification_off(tls_world: World, tmp_path: Path) -> None:
    with start(tmp_path, tls_world.url, "requests") as process:
        out = process.communicate()[0]

    assert (process.returncode, "CERTIFICATE_VERIFY_FAILED" in out) == (0, True), out
    assert tls_world.identity.requests == []


@pytest.mark.parametrize("settings", [f"api_key = {KEY}\n", f"[settings]\n{KEY}\n", f"[settings]\nregion = %{KEY}\n"])
def test_settings_of_pyrax_that_cannot_be_read_are_named_and_not_shown(tmp_path: Path, settings: str) -> None:
    with start(tmp_path, "rackspace://DFW", settings=settings) as process:
        out = process.communicate()[0]

    assert "ConfigError: ~/.pyrax.cfg cannot be read" in out
    assert KEY not in out


def test_no_secret_is_in_an_error_or_its_causes(
    world: World, queue: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    shown = []
    for answer in (Reply(401), Reply(503), Raw(end="reset"), Reply(200, "<html>")):
        world.answer("", answer)
        try:
            world.queues.stats(queue)
        except QueueError as error:
            shown += traceback.format_exception(error)
        except CredentialsError as error:
            shown += traceback.format_exception(error)

    assert "Traceback" in shown[0]
    assert "canary" not in "".join(shown) + caplog.text


def test_a_password_for_the_host_in_netrc_is_not_sent(
    world: World, queue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    world.identity.tokens.clear()

    world.queues.stats(queue)

    assert all("Authorization" not in each.headers for each in world.proxy.requests + world.identity.requests)


def test_closing_ends_waits_and_connections(world: World, queues: CloudQueues, queue: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queues.claim, queue, **TERMS, limit=1, wait=60)
        wait_until(lambda: world.proxy.requests)
        started = time.monotonic()
        queues.close()
        assert waiting.result(30) is None
        assert time.monotonic() - started < 20
