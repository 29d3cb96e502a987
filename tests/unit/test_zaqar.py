"""OpenStack Zaqar through openstacksdk: a real server behind a proxy that fails as each test decides."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import backend_zaqar
import keystoneauth1.exceptions
import openstack.exceptions
import pytest
import requests
from fault_proxy import FaultProxy, Raw, Reply, Request
from keystone_double import SECRET as CANARY
from keystone_double import KeystoneDouble
from keystoneauth1.identity.base import BaseIdentityPlugin

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
)
from claim_queues.zaqar import ERRORS, LIMITS, ZaqarQueues

PROJECT = "unit"
TERMS = {"ttl": 60, "grace": 60}

later, ours, credentials = QueueUnavailable, ConfigError, CredentialsError
KEYSTONEAUTH_ERRORS = {
    "AuthPluginException": credentials,
    "AuthorizationFailure": credentials,
    "BadGateway": later,
    "BadRequest": ours,
    "CatalogException": ours,
    "ClientException": ours,
    "Conflict": ours,
    "ConnectFailure": later,
    "ConnectTimeout": later,
    "ConnectionError": later,
    "DiscoveryFailure": later,
    "EmptyCatalog": ours,
    "EndpointNotFound": ours,
    "ExpectationFailed": ours,
    "Forbidden": credentials,
    "GatewayTimeout": later,
    "Gone": ours,
    "HTTPClientError": ours,
    "HttpError": ours,
    "HttpNotImplemented": later,
    "HttpServerError": later,
    "HttpVersionNotSupported": later,
    "ImpliedMaxVersionMismatch": ours,
    "ImpliedMinVersionMismatch": ours,
    "ImpliedVersionMismatch": ours,
    "InternalServerError": later,
    "InvalidDiscoveryEndpoint": credentials,
    "InvalidOidcDiscoveryDocument": credentials,
    "InvalidResponse": later,
    "LengthRequired": ours,
    "MethodNotAllowed": ours,
    "MissingAuthMethods": credentials,
    "MissingAuthPlugin": credentials,
    "MissingRequiredOptions": credentials,
    "NoMatchingPlugin": credentials,
    "NotAcceptable": ours,
    "NotFound": ours,
    "OidcAccessTokenEndpointNotFound": credentials,
    "OidcAuthorizationEndpointNotFound": credentials,
    "OidcInvalidCodeChallengeMethod": credentials,
    "OidcPluginNotSupported": credentials,
    "OptionError": credentials,
    "PaymentRequired": ours,
    "PreconditionFailed": ours,
    "ProxyAuthenticationRequired": ours,
    "RequestEntityTooLarge": ours,
    "RequestTimeout": later,
    "RequestUriTooLong": ours,
    "RequestedRangeNotSatisfiable": ours,
    "RetriableConnectionFailure": later,
    "SSLError": later,
    "ServiceProviderNotFound": ours,
    "ServiceUnavailable": later,
    "TooManyRequests": later,
    "Unauthorized": credentials,
    "UnknownConnectionError": later,
    "UnprocessableEntity": ours,
    "UnsupportedMediaType": ours,
    "UnsupportedParameters": credentials,
    "VersionNotAvailable": ours,
}
OPENSTACKSDK_ERRORS = {
    "BadRequestException": ours,
    "ConfigException": ours,
    "ConflictException": ours,
    "DuplicateResource": ours,
    "EndpointNotFound": ours,
    "ForbiddenException": ours,
    "HttpException": ours,
    "InvalidRequest": ours,
    "InvalidResourceQuery": ours,
    "InvalidResponse": ours,
    "MethodNotSupported": ours,
    "NotFoundException": ours,
    "NotSupported": later,
    "PreconditionFailedException": ours,
    "ResourceFailure": ours,
    "ResourceTimeout": ours,
    "SDKException": ours,
    "ServiceDisabledException": ours,
    "ServiceDiscoveryException": later,
    "ValidationException": ours,
}


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    with FaultProxy(backend_zaqar.mongodb_server()) as proxy:
        yield proxy


@pytest.fixture
def queues(proxy: FaultProxy) -> Iterator[ZaqarQueues]:
    with open_at(proxy.url) as queues:
        yield queues


@pytest.fixture
def queue(queues: ZaqarQueues, proxy: FaultProxy) -> str:
    """A new queue; what was asked to make it is forgotten."""
    queues.create(name := new_name())
    proxy.requests.clear()
    return name


@pytest.fixture(params=["mongodb", "redis"])
def either(request: pytest.FixtureRequest) -> Iterator[tuple[ZaqarQueues, FaultProxy]]:
    url = backend_zaqar.mongodb_server() if request.param == "mongodb" else backend_zaqar.redis_server()[0]
    with FaultProxy(url) as proxy, open_at(proxy.url) as queues:
        yield queues, proxy


def open_at(url: str) -> ZaqarQueues:
    return ZaqarQueues.from_url(f"zaqar://?endpoint={url}&project={PROJECT}")


def new_name() -> str:
    return f"unit-{uuid.uuid4().hex}"


def asked(proxy: FaultProxy) -> list[str]:
    """The requests so far, without the queue's name and ids."""
    return [f"{request.method} {urlsplit(request.path).path.split('/', 4)[4]}" for request in proxy.requests]


def query(request: Request) -> dict[str, list[str]]:
    return parse_qs(urlsplit(request.path).query)


def claim_of(queues: ZaqarQueues, queue: str, limit: int = 20) -> Claim:
    claim = queues.claim(queue, **TERMS, limit=limit)
    assert claim
    return claim


def fail(proxy: FaultProxy, times: int, part: str, answer: Callable[[Request], Reply | Raw]) -> None:
    """Let so many requests whose method and path have that part be answered by `answer`."""
    left = [times]

    def decide(request: Request) -> Reply | Raw:
        if part not in f"{request.method} {request.path}" or not left[0]:
            return proxy.forward(request)
        left[0] -= 1
        return answer(request)

    proxy.answer = decide


def lose_answer(proxy: FaultProxy) -> Callable[[Request], Raw]:
    return lambda request: (proxy.forward(request), Raw(end="reset"))[1]


# What an operator asks


def test_it_tells_its_clock_its_credentials_and_what_it_was_asked(queues: ZaqarQueues, queue: str) -> None:
    assert queues.credentials == "none: a Zaqar without Keystone"
    assert abs(queues.clock_ahead(queue) or 99) < 5
    assert queues.claim(queue, **TERMS, limit=1) is None
    assert queues.exists(queue)
    assert queues.requests == {"create": 1, "count": 1, "claim": 1, "look": 1}


# Opening


@pytest.mark.parametrize(
    "url",
    [
        "zaqar:",
        "zaqar://",
        "zaqar:///path",
        "zaqar://cloud/path",
        "zaqar://cloud#part",
        "zaqar://[",
        "zaqar://?endpoint=http://127.0.0.1:1",
        "zaqar://?endpoint=http://127.0.0.1:1&project=",
        "zaqar://?endpoint=127.0.0.1:1&project=p",
        "zaqar://?project=p",
        "zaqar://cloud?endpoint=http://127.0.0.1:1&project=p",
        "zaqar://cloud?endpoint",
        "zaqar://cloud?colour=red",
    ],
)
def test_a_url_that_names_no_zaqar_is_refused_with_what_would(url):
    with pytest.raises(ConfigError, match="write zaqar://CLOUD"):
        ZaqarQueues.from_url(url)


@pytest.mark.parametrize(
    "url",
    [
        f"zaqar://user:{CANARY}@cloud",
        f"zaqar://cloud:{CANARY}",
        f"zaqar://cloud?password={CANARY}",
        f"zaqar://cloud?token={CANARY}",
        f"zaqar://?endpoint=http://u:{CANARY}@127.0.0.1:1&project=p",
        f"zaqar://?endpoint=http://127.0.0.1:1&project=p&application_credential_secret={CANARY}",
    ],
)
def test_a_secret_in_the_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as refusal:
        ZaqarQueues.from_url(url)
    assert CANARY not in str(refusal.value)


def test_the_address_is_the_same_in_all_processes(queues, proxy):
    with ZaqarQueues.from_url(f"zaqar://?project={PROJECT}&endpoint={proxy.url.replace(':', '%3A')}") as other:
        assert other.address == queues.address == f"zaqar://?endpoint={proxy.url}&project={PROJECT}"


def test_opening_asks_nothing_of_the_service():
    open_at("http://127.0.0.1:1").close()


def test_a_service_that_is_down_at_first_is_used_once_it_is_up(queues, queue, proxy):
    with FaultProxy(proxy.target) as later, open_at(later.url) as waiting:
        later.answer = lambda request: Raw(end="reset")
        with pytest.raises(QueueUnavailable):
            waiting.exists(queue)
        later.answer = later.forward
        assert waiting.exists(queue)


def test_a_hundred_requests_take_one_connection(queues, queue, proxy):
    for number in range(100):
        queues.post(queue, [number])

    assert proxy.connections == 1


def test_each_object_has_a_client_id_of_its_own_and_keeps_it(queues, queue, proxy):
    with open_at(proxy.url) as other:
        for opened in (queues, queues, other):
            opened.post(queue, [1])

    posts = [request for request in proxy.requests if request.method == "POST"]
    first, second, third = (str(uuid.UUID(request.headers["Client-ID"])) for request in posts)
    assert first == second != third


def test_every_request_has_time_limits(queues):
    assert queues._connection.session.timeout == (5, 30)


# Errors


@pytest.mark.parametrize(
    ("module", "expected"),
    [(keystoneauth1.exceptions, KEYSTONEAUTH_ERRORS), (openstack.exceptions, OPENSTACKSDK_ERRORS)],
    ids=["keystoneauth1", "openstacksdk"],
)
def test_every_error_of_the_sdk_becomes_one_of_ours(module, expected):
    kinds = {
        kind.__name__: kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Exception)
    }

    found = {name: next(ours for theirs, ours, _ in ERRORS if issubclass(kind, theirs)) for name, kind in kinds.items()}

    assert found == expected


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (302, QueueError),
        (400, ConfigError),
        (401, CredentialsError),
        (403, QueueForbidden),
        (404, QueueNotFound),
        (405, QueueError),
        (408, QueueUnavailable),
        (429, QueueUnavailable),
        (500, QueueUnavailable),
        (502, QueueUnavailable),
        (503, QueueUnavailable),
        (504, QueueUnavailable),
    ],
)
def test_every_refusal_by_the_service_becomes_one_of_our_errors(queues, queue, proxy, status, error):
    proxy.answer = lambda request: Reply(status, {"title": "No", "description": "not today"}, {"Location": "/"})

    for operation in (
        lambda: queues.create(queue),
        lambda: queues.exists(queue),
        lambda: queues.claim(queue, **TERMS, limit=1),
        lambda: queues.release(Claim("c", queue, (), 60)),
        lambda: queues.browse(queue),
        lambda: queues.stats(queue),
        lambda: queues.inspect(queue),
        lambda: queues.purge(queue),
        lambda: queues.end_marker(queue),
    ):
        with pytest.raises(error, match=f"{queue} at zaqar.*HTTP {status} No: not today") as raised:
            operation()
        assert type(raised.value) is error or error is QueueUnavailable


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), ("9" * 9, 3600), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("soon", None), (None, None)],
)
def test_the_wait_that_the_service_asks_for_is_told(queues, queue, proxy, header, seconds):
    proxy.answer = lambda request: Reply(429, "", {"Retry-After": header})

    with pytest.raises(QueueUnavailable) as refusal:
        queues.claim(queue, **TERMS, limit=1)

    assert refusal.value.retry_after_s == seconds


@pytest.mark.parametrize("page", ["<html>", "{}", "[]", '{"messages": [{}], "links": []}', '{"queues": 1}'])
def test_what_is_no_answer_of_zaqar_s_is_an_error_and_never_empty(queues, queue, proxy, page):
    proxy.answer = lambda request: Reply(200, page)

    for operation in (
        lambda: queues.exists(queue),
        lambda: queues.claim(queue, **TERMS, limit=1),
        lambda: queues.browse(queue),
        lambda: queues.stats(queue),
        lambda: queues.post(queue, [1]),
    ):
        with pytest.raises(QueueError):
            operation()


def test_a_server_that_is_gone_is_unavailable(queue, queues, proxy):
    proxy.answer = lambda request: Raw(end="reset")

    with pytest.raises(QueueUnavailable):
        queues.claim(queue, **TERMS, limit=1)


def test_a_server_that_was_never_there_is_told_in_one_short_sentence():
    with (
        ZaqarQueues.from_url("zaqar://?endpoint=http://127.0.0.1:9&project=x") as queues,
        pytest.raises(QueueUnavailable) as unavailable,
    ):
        queues.exists("queue")

    said = str(unavailable.value).removeprefix("look for queue at zaqar://?endpoint=http://127.0.0.1:9&project=x: ")
    assert said == (
        "Unable to find a version discovery document at http://127.0.0.1:9, the service is unavailable or"
        " misconfigured; is the service up, and a Zaqar with API v2?"
    )


# Posting


def test_bodies_are_posted_in_as_few_requests_as_their_bytes_allow(queues, queue, proxy):
    ids = queues.post(queue, ["x" * 100_000] * 3)

    assert asked(proxy) == ["POST messages", "POST messages"]
    assert len(set(ids)) == 3


def test_a_post_without_an_answer_is_sent_once_more(queues, queue, proxy):
    fail(proxy, 1, "POST", lose_answer(proxy))

    ids = queues.post(queue, ["perhaps twice"])

    found = {message.id: message.body for message in claim_of(queues, queue).messages}
    assert set(ids) < set(found)
    assert list(found.values()) == ["perhaps twice"] * 2


def test_a_post_that_stays_without_an_answer_is_reported_as_unknown(queues, queue, proxy):
    fail(proxy, 2, "POST", lose_answer(proxy))

    with pytest.raises(PostIncomplete) as incomplete:
        queues.post(queue, ["perhaps", "x" * 262_100])

    assert (incomplete.value.accepted, incomplete.value.unknown) == ({}, (0,))
    assert list(incomplete.value.refused) == [1]
    assert len(proxy.requests) == 2


def test_a_post_that_never_arrived_is_not_reported_as_unknown():
    with open_at("http://127.0.0.1:1") as queues, pytest.raises(QueueUnavailable):
        queues.post(new_name(), ["not sent"])


def test_a_post_refused_half_way_tells_what_was_accepted(queues, queue, proxy):
    batches = [0]

    def refuse_second(request: Request) -> Reply:
        batches[0] += 1
        return proxy.forward(request) if batches[0] == 1 else Reply(503)

    proxy.answer = refuse_second
    with pytest.raises(PostIncomplete, match="100 of 101 were accepted") as incomplete:
        queues.post(queue, list(range(101)))

    assert len(incomplete.value.accepted) == 100
    assert list(incomplete.value.refused) == [100]
    assert incomplete.value.unknown == ()


def test_a_first_request_that_is_refused_leaves_nothing_to_tell(queues, queue, proxy):
    fail(proxy, 1, "POST", lambda request: Reply(503))

    with pytest.raises(QueueUnavailable):
        queues.post(queue, [1, 2])


# Claiming and looking


def test_a_claim_is_one_request_with_its_limit_in_the_query(queues, queue, proxy):
    queues.post(queue, list(range(20)))
    proxy.requests.clear()

    claim = claim_of(queues, queue, limit=13)

    (request,) = proxy.requests
    assert query(request) == {"limit": ["13"]}
    assert request.json == TERMS
    assert len(claim.messages) == 13


def test_a_claim_without_an_answer_is_not_made_again(queues, queue, proxy):
    queues.post(queue, [1, 2])
    fail(proxy, 1, "claims", lose_answer(proxy))

    with pytest.raises(QueueUnavailable):
        queues.claim(queue, **TERMS, limit=1)

    assert [m.body for m in claim_of(queues, queue).messages] == [2]


def test_a_body_that_could_not_be_posted_again_is_given_as_text(queues, queue, proxy):
    requests.post(
        f"{proxy.target}/v2/queues/{queue}/messages",
        data='{"messages":[{"ttl":60,"body":{"widget_id":NaN}},{"ttl":60,"body":"good"}]}',
        headers={"Client-ID": str(uuid.uuid4()), "X-Project-Id": PROJECT},
        timeout=10,
    ).raise_for_status()

    assert [m.body for m in claim_of(queues, queue).messages] == ['{"widget_id": NaN}', "good"]


def test_the_pauses_of_a_wait_grow(queues, queue, proxy):
    assert queues.claim(queue, **TERMS, limit=1, wait=1) is None

    assert 3 <= len(proxy.requests) <= 6  # at 0, 0.1, 0.3, 0.7 and 1 s


@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_the_end_of_a_queue_is_found_without_reading_it(either, count):
    queues, proxy = either
    queues.create(queue := new_name())
    queues.post(queue, list(range(count)))
    proxy.requests.clear()

    marker = queues.end_marker(queue)

    assert len(proxy.requests) <= 20
    assert queues.browse(queue, after=marker, claimed=True).messages == ()
    queues.post(queue, ["new"])
    assert [m.body for m in queues.browse(queue, after=marker).messages] == ["new"]


def test_the_end_of_a_queue_with_gaps_is_found(either):
    queues, _ = either
    queues.create(queue := new_name())
    ids = queues.post(queue, list(range(60)))
    queues.delete(queue, ids[3:40] + ids[41:59])

    marker = queues.end_marker(queue)

    assert queues.browse(queue, after=marker, claimed=True).messages == ()
    before = queues.browse(queue, limit=20).messages
    assert [m.body for m in before] == [0, 1, 2, 40, 59]


# Renewing, settling, releasing


def test_a_renewal_names_ttl_and_grace(queues, queue, proxy):
    queues.post(queue, [1])
    claim = queues.claim(queue, ttl=60, grace=77, limit=1)
    queues.renew(claim, ttl=90)

    assert proxy.requests[-1].json == {"ttl": 90, "grace": 77}


def test_only_a_refusal_that_speaks_of_the_claim_makes_it_lost(queues, queue, proxy):
    queues.post(queue, [1])
    claim = claim_of(queues, queue)
    for status, error in ((404, QueueNotFound), (503, QueueUnavailable)):
        proxy.answer = lambda request, status=status: Reply(status, "not found")
        with pytest.raises(error):
            queues.renew(claim, ttl=60)
    proxy.answer = proxy.forward
    queues.release(claim)
    with pytest.raises(ClaimLost):
        queues.renew(claim, ttl=60)


def test_a_settlement_without_the_fence_takes_a_request_for_all_posts_and_one_for_all_deletes(queues, queue, proxy):
    queues.create(responses := new_name())
    queues.post(queue, list(range(20)))
    claim = claim_of(queues, queue)
    proxy.requests.clear()

    settled = queues.settle(
        claim, [Settlement(message, (Post(responses, message.body),), fenced=False) for message in claim.messages]
    )

    assert len(settled.deleted) == 20
    assert asked(proxy) == ["POST messages", "DELETE messages"]
    assert query(proxy.requests[1]) == {
        "ids": [",".join(message.id for message in claim.messages)],
        "claim_ids": [claim.id],
    }


def test_a_fenced_delete_names_its_claim(queues, queue, proxy):
    queues.post(queue, [1, 2])
    claim = claim_of(queues, queue)
    proxy.requests.clear()

    queues.settle(claim, [Settlement(message) for message in claim.messages])

    assert asked(proxy) == [f"DELETE messages/{message.id}" for message in claim.messages]
    assert [query(request) for request in proxy.requests] == [{"claim_id": [claim.id]}] * 2


@pytest.mark.parametrize("fenced", [True, False])
def test_nothing_is_deleted_when_its_posts_fail(queues, queue, proxy, fenced):
    queues.post(queue, [1])
    claim = claim_of(queues, queue)
    proxy.requests.clear()
    fail(proxy, 1, "POST", lambda request: Reply(503, "", {"Retry-After": "3"}))

    with pytest.raises(QueueUnavailable) as unavailable:
        queues.settle(claim, [Settlement(claim.messages[0], (Post(queue, "response"),), fenced=fenced)])

    assert unavailable.value.retry_after_s == 3
    assert asked(proxy) == ["POST messages"]


def test_a_settlement_may_be_repeated_when_its_answer_was_lost(queues, queue, proxy):
    queues.post(queue, [1, 2])
    claim = claim_of(queues, queue)
    settlements = [Settlement(claim.messages[0]), Settlement(claim.messages[1], fenced=False)]
    fail(proxy, 1, "DELETE", lose_answer(proxy))
    with pytest.raises(QueueUnavailable):
        queues.settle(claim, settlements)

    assert len(queues.settle(claim, settlements).deleted) == 2


def test_an_outcome_that_the_queue_s_own_limit_refuses_is_found_among_others(queues, queue, proxy):
    put_metadata(proxy, responses := new_name(), {"_max_messages_post_size": 200})
    queues.post(queue, [1, 2, 3])
    claim = claim_of(queues, queue)
    bodies = ["fits", "x" * 200, "fits too"]

    settled = queues.settle(
        claim,
        [
            Settlement(message, (Post(responses, body),), fenced=False)
            for message, body in zip(claim.messages, bodies, strict=True)
        ],
    )

    assert list(settled.refused) == [claim.messages[1].id]
    assert isinstance(settled.refused[claim.messages[1].id], MessageRefused)
    assert settled.deleted == {claim.messages[0].id, claim.messages[2].id}
    assert [m.body for m in claim_of(queues, responses).messages] == ["fits", "fits too"]


def test_a_thousand_requests_cost_at_most_035_requests_of_the_service_each(queues, queue, proxy):
    queues.create(responses := new_name())
    queues.post(queue, list(range(1_000)))
    proxy.requests.clear()
    made = 0

    while claim := queues.claim(queue, **TERMS, limit=LIMITS.claim_limit):
        settled = queues.settle(
            claim, [Settlement(message, (Post(responses, message.body),), fenced=False) for message in claim.messages]
        )
        made += len(settled.deleted)

    assert made == 1_000
    assert len(proxy.requests) / made <= 0.35


# Queues


def test_a_queue_exists_only_under_its_very_name(either):
    queues, proxy = either
    stem = new_name()
    for name in (f"{stem}b", f"{stem}d", "A" * 64):
        queues.create(name)
    proxy.requests.clear()

    names = [f"{stem}{end}" for end in ("", "a", "b", "b0", "c", "d", "e", "-", "D")]
    assert [name for name in names if queues.exists(name)] == [f"{stem}b", f"{stem}d"]
    assert queues.exists("A" * 64)
    assert not queues.exists("A" * 63)
    assert not queues.exists("-")
    assert not queues.exists("z" * 64)
    assert len(proxy.requests) <= 2 * 13


def test_a_missing_queue_has_no_stats_and_no_end(either):
    queues, _ = either
    for operation in (queues.stats, queues.end_marker):
        with pytest.raises(QueueNotFound, match="create it with --create"):
            operation(new_name())


def put_metadata(proxy: FaultProxy, queue: str, metadata: dict[str, object]) -> None:
    requests.put(
        f"{proxy.target}/v2/queues/{queue}",
        json=metadata,
        headers={"Client-ID": str(uuid.uuid4()), "X-Project-Id": PROJECT},
        timeout=10,
    ).raise_for_status()


def test_a_queue_that_moves_or_hides_messages_is_named(queues, queue, proxy):
    assert queues.inspect(queue) == []

    put_metadata(
        proxy,
        strange := new_name(),
        {"_max_claim_count": 3, "_dead_letter_queue": "letters", "_default_message_delay": 9},
    )

    moves, hides = queues.inspect(strange)
    assert "after 3 claims a message moves to letters" in moves
    assert "for its first 9 seconds" in hides


def test_a_driver_whose_claims_take_what_others_hold_is_named(either):
    queues, proxy = either
    queues.create(queue := new_name())

    found = queues.inspect(queue)

    assert ["use --claim-limit 1" in sentence for sentence in found] == [True] * (
        proxy.target != backend_zaqar.mongodb_server()
    )


# Keystone

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for InfluxDB"  # openstacksdk 4.22 warns of it at every clouds.yaml
)


@pytest.fixture
def keystone(proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeystoneDouble]:
    """A Keystone, a Zaqar behind the proxy that takes its tokens, and a cloud `mine` that names both."""
    with KeystoneDouble(proxy.url, project=PROJECT) as keystone:

        def take_its_tokens(request: Request) -> Reply:
            admitted = keystone.admit(request)
            return proxy.forward(admitted) if admitted else Reply(401, "Authentication required")

        proxy.answer = take_its_tokens
        keystone.write_clouds(tmp_path / "clouds.yaml")
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
        yield keystone


def test_a_cloud_of_clouds_yaml_is_used_with_its_application_credential(keystone, proxy):
    with ZaqarQueues.from_url("zaqar://mine") as queues:
        queues.create(queue := new_name())
        assert queues.exists(queue)

    assert queues.address == "zaqar://mine"
    assert queues.credentials == f"those of mine in {os.environ['OS_CLIENT_CONFIG_FILE']}"
    assert len(keystone.tokens) == 1


def test_a_token_that_is_no_longer_taken_is_replaced_once(keystone, proxy):
    with ZaqarQueues.from_url("zaqar://mine") as queues:
        queues.create(queue := new_name())
        keystone.tokens.clear()
        assert queues.exists(queue)

    assert len(keystone.tokens) == 1


def test_a_token_that_another_thread_is_just_replacing_is_no_credentials_error(keystone, proxy, monkeypatch):
    def is_taken_by_another(self):
        self.auth_ref = None
        return False  # nothing was left to invalidate: keystoneauth takes the refusal for final

    with ZaqarQueues.from_url("zaqar://mine") as queues:
        queues.create(queue := new_name())
        keystone.tokens.clear()
        monkeypatch.setattr(BaseIdentityPlugin, "invalidate", is_taken_by_another)
        assert queues.exists(queue)


def test_a_token_that_is_refused_for_ever_is_a_credentials_error(keystone, proxy):
    with ZaqarQueues.from_url("zaqar://mine") as queues:
        queues.create(new_name())
        proxy.answer = lambda request: Reply(401, "Authentication required")
        with pytest.raises(CredentialsError, match="does not take the token"):
            queues.create(new_name())

    assert len(keystone.tokens) == 3


def test_credentials_that_keystone_refuses_are_a_credentials_error(keystone):
    keystone.refuse = Reply(401, {"error": {"code": 401, "message": "no", "title": "Unauthorized"}})

    with ZaqarQueues.from_url("zaqar://mine") as queues, pytest.raises(CredentialsError, match=r"clouds\.yaml"):
        queues.create(new_name())


def test_a_keystone_that_asks_for_patience_is_unavailable_and_used_again_later(keystone):
    keystone.refuse = Reply(429, "", {"Retry-After": "7"})
    with ZaqarQueues.from_url("zaqar://mine") as queues:
        with pytest.raises(QueueUnavailable) as refusal:
            queues.create(new_name())
        assert refusal.value.retry_after_s == 7

        keystone.refuse = None
        queues.create(new_name())


def test_no_secret_is_shown_anywhere(keystone, proxy, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "keystoneauth")  # a command that ran in this process quiets it
    with ZaqarQueues.from_url("zaqar://mine") as queues:
        queues.create(new_name())
        proxy.answer = lambda request: Reply(401)
        with pytest.raises(CredentialsError) as refusal:
            queues.create(new_name())
        shown = f"{refusal.value!r} {queues!r} {queues.address} {caplog.text} {capfd.readouterr()}"

    assert "/v3/auth/tokens" in caplog.text
    assert CANARY not in shown


@pytest.mark.parametrize(
    ("clouds", "error"),
    [
        ("clouds: {}", ConfigError),
        (f"clouds: {{mine: {{auth: {{password: {CANARY}}}}}}}", CredentialsError),
        (f"clouds: {{mine: {{auth: {{password: {CANARY}", ConfigError),
        (f"clouds: {{mine: {{auth_type: none-such, auth: {{password: {CANARY}}}}}}}", ConfigError),
    ],
    ids=["no such cloud", "incomplete", "no YAML", "no such plugin"],
)
def test_a_cloud_that_cannot_be_used_is_refused_without_its_secrets(tmp_path, monkeypatch, clouds, error):
    (tmp_path / "clouds.yaml").write_text(clouds)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))

    with pytest.raises(error) as refusal:
        ZaqarQueues.from_url("zaqar://mine")

    assert str(refusal.value).startswith("zaqar://mine: ")
    assert CANARY not in str(refusal.value)
