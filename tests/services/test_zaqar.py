"""OpenStack Zaqar through openstacksdk: a real server behind a proxy that fails as each test decides."""

import logging
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from urllib.parse import urlsplit

import backend_zaqar
import pytest
import requests
from backends import bodies
from doubles.http_double import LOST, FaultProxy, Reply, Request
from doubles.keystone_double import SECRET as CANARY
from doubles.keystone_double import KeystoneDouble

from claim_queues import (
    Claim,
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
    open_queues,
)
from claim_queues.zaqar import ZaqarQueues

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for InfluxDB"  # openstacksdk 4.22 warns of it at every clouds.yaml
)
PROJECT = "unit"
TERMS = {"ttl": 60, "grace": 60}


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    with FaultProxy(backend_zaqar.mongodb_server()) as proxy:
        yield proxy


@pytest.fixture
def queues(proxy: FaultProxy) -> Iterator[ZaqarQueues]:
    with open_at(proxy.url) as queues:
        yield queues


@pytest.fixture
def queue(proxy: FaultProxy) -> str:
    return new_queue(proxy)


@pytest.fixture
def responses(proxy: FaultProxy) -> str:
    return new_queue(proxy)


@pytest.fixture(params=["mongodb", "redis"])
def either(request: pytest.FixtureRequest) -> Iterator[tuple[ZaqarQueues, FaultProxy]]:
    url = backend_zaqar.mongodb_server() if request.param == "mongodb" else backend_zaqar.redis_server()
    with FaultProxy(url) as proxy, open_at(proxy.url) as queues:
        yield queues, proxy


def open_at(url: str) -> ZaqarQueues:
    return ZaqarQueues.from_url(f"zaqar://?endpoint={url}&project={PROJECT}")


def new_name() -> str:
    return f"unit-{uuid.uuid4().hex}"


def new_queue(proxy: FaultProxy, **metadata: object) -> str:
    """A new queue, made without the proxy. metadata: as its administrator may set it."""
    name = new_name()
    headers = {"Client-ID": str(uuid.uuid4()), "X-Project-Id": PROJECT}
    requests.put(f"{proxy.target}/v2/queues/{name}", json=metadata, headers=headers, timeout=10).raise_for_status()
    return name


def claim_of(queues: ZaqarQueues, queue: str) -> Claim:
    claim = queues.claim(queue, **TERMS, limit=20)
    assert claim
    return claim


def made(claim: Claim, responses: str, *, fenced: bool = False) -> list[Settlement]:
    return [Settlement(message, (Post(responses, message.body),), fenced) for message in claim.messages]


# Opening


@pytest.mark.parametrize(
    "url",
    [
        "zaqar://cloud/path",
        "zaqar://cloud#part",
        "zaqar://?endpoint=http://127.0.0.1:1",
        "zaqar://?endpoint=http://127.0.0.1:1&project=",
        "zaqar://cloud?endpoint=http://127.0.0.1:1&project=p",
        "zaqar://cloud?endpoint",
        f"zaqar://user:{CANARY}@cloud",
        "zaqar://[",
        f"zaqar://cloud:{CANARY}",
        f"zaqar://cloud?password={CANARY}",
        "zaqar://?endpoint=http://zaqar.example:8888&project=p",
        f"zaqar://?endpoint=http://u:{CANARY}@127.0.0.1:1&project=p",
    ],
)
def test_any_other_url_is_refused_with_what_would_do_and_without_its_secrets(url):
    with pytest.raises(ConfigError, match=r"write zaqar://CLOUD|only https is safe") as refusal:
        open_queues(url)
    assert CANARY not in str(refusal.value)


def test_the_address_is_the_same_in_all_processes_and_opening_asks_nothing(queues, proxy):
    with open_queues(f"zaqar://?project={PROJECT}&endpoint={proxy.url.replace(':', '%3A')}") as other:
        assert other.address == queues.address == f"zaqar://?endpoint={proxy.url}&project={PROJECT}"
        assert other.credentials == "none: a Zaqar without Keystone"
    assert proxy.requests == []


# Connections


def test_threads_that_ask_at_once_have_a_connection_each_and_keep_it(queues, queue, proxy):
    together = Barrier(40, timeout=30)

    def answer(request: Request) -> Reply:
        together.wait()
        return Reply(204)

    proxy.answer = answer
    with ThreadPoolExecutor(40) as pool:
        for _ in range(3):
            assert list(pool.map(lambda _: queues.claim(queue, **TERMS, limit=1), range(40))) == [None] * 40

    assert (len(proxy.requests), proxy.connections) == (120, 40)


def test_every_request_has_time_limits(queues, queue, keystone, monkeypatch):
    limits, unavailable = {}, requests.Response()
    unavailable.status_code = 503

    def send(self: Any, request: Any, **options: Any) -> Any:
        limits[urlsplit(request.url).path] = options["timeout"]
        return unavailable

    with open_queues("zaqar://mine") as signed_in:
        signed_in.exists(queue)
        monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
        with pytest.raises(QueueUnavailable):
            signed_in.exists(queue)
        with open_queues("zaqar://mine") as another, pytest.raises(QueueUnavailable):
            another.exists(queue)

    assert limits == {"/v2/queues": (5, 30), "/v3/auth/tokens": (5, 30)}


# Errors


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (302, QueueError),
        (400, ConfigError),
        (401, CredentialsError),
        (403, QueueForbidden),
        (404, QueueNotFound),
        (408, QueueUnavailable),
        (413, QueueUnavailable),
        (429, QueueUnavailable),
        (500, QueueUnavailable),
        (503, QueueUnavailable),
    ],
)
def test_each_status_is_one_error_that_says_what_where_and_why(queue, proxy, status, error):
    proxy.fail("", Reply(status, {"title": "No", "description": "not today"}, {"Location": "/"}))

    with open_at(proxy.url) as queues:
        for operation in (
            lambda: queues.create(queue),
            lambda: queues.exists(queue),
            lambda: queues.claim(queue, **TERMS, limit=1),
            lambda: queues.release(Claim("c", queue, 60, 60, (), 0)),
            lambda: queues.browse(queue),
            lambda: queues.stats(queue),
            lambda: queues.inspect(queue),
            lambda: queues.purge(queue),
        ):
            with pytest.raises(error, match=f"{queue} at zaqar.*HTTP {status} .*not today") as raised:
                operation()
            assert type(raised.value) is error or error is QueueUnavailable


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), (" 9 ", 9), ("9" * 9, 3600), ("soon", 0), ("", 0)])
def test_the_wait_that_the_service_asks_for_is_passed_on(queues, queue, proxy, header, seconds):
    proxy.fail("", Reply(429, "", {"Retry-After": header}))

    with pytest.raises(QueueUnavailable) as refusal:
        queues.claim(queue, **TERMS, limit=1)

    assert refusal.value.retry_after == seconds


@pytest.mark.parametrize("page", ["<html>", "{}", '{"messages": [{}], "links": []}', '{"queues": 1}'])
def test_what_is_not_an_answer_of_zaqar_s_is_unavailable_and_never_empty(queues, queue, proxy, page):
    proxy.fail("", Reply(200, page))

    for operation in (
        lambda: queues.exists(queue),
        lambda: queues.claim(queue, **TERMS, limit=1),
        lambda: queues.browse(queue),
        lambda: queues.stats(queue),
    ):
        with pytest.raises(QueueUnavailable, match="no answer of OpenStack Zaqar"):
            operation()


# Posting


def test_bodies_are_posted_in_as_few_requests_as_the_service_s_262144_bytes_allow(queues, queue, proxy):
    assert len(set(queues.post(queue, ["x" * 100_000] * 3))) == 3
    queues.post(queue, ["y" * (queues.limits.message_bytes - 2)])
    room = 262_144 - len('{"messages":[{"ttl":1209600,"body":"z"},{"ttl":1209600,"body":""}]}')
    queues.post(queue, ["z", "z" * room])
    queues.post(queue, ["z", "z" * (room + 1)])

    assert [len(request.json["messages"]) for request in proxy.requests] == [2, 1, 1, 2, 1, 1]
    assert len(proxy.requests[3].body) == 262_144


UNREADABLE = ["<html>", *({"resources": ids} for ids in ([], None, ["/m/1", "/m/2"], "/m/1", [1]))]


@pytest.mark.parametrize("fault", ["lost", Reply(502), *(Reply(201, page) for page in UNREADABLE)], ids=str)
def test_a_post_without_an_answer_is_reported_as_unknown(queues, queue, proxy, fault):
    proxy.fail("POST", proxy.lose if fault == "lost" else fault)

    with pytest.raises(PostIncomplete) as incomplete:
        queues.post(queue, ["perhaps", "x" * 262_090])

    assert (incomplete.value.accepted, incomplete.value.unknown) == ({}, (0,))
    assert list(incomplete.value.refused) == [1]
    assert len(proxy.requests) == 1


def test_a_post_that_never_arrived_is_not_reported_as_unknown(queues, queue, proxy):
    with open_at("http://127.0.0.1:1") as nowhere, pytest.raises(QueueUnavailable):
        nowhere.post(new_name(), ["not sent"])
    proxy.fail("POST", Reply(503))
    with pytest.raises(QueueUnavailable):
        queues.post(queue, [1, 2])


# Claiming and looking


def test_a_body_that_holds_nan_is_given_as_text(queues, queue, proxy):
    queues.post(queue, [1])
    request = proxy.requests[-1]
    body = b'{"messages":[{"ttl":60,"body":{"n":NaN}},{"ttl":60,"body":"good"}]}'
    proxy.serve(Request("POST", request.path, request.headers, body))

    assert bodies(claim_of(queues, queue)) == [1, '{"n": NaN}', "good"]


@pytest.mark.slow
def test_a_wait_looks_less_often_the_longer_nothing_comes(queues, queue, proxy):
    looks = []
    for _ in range(5):
        proxy.requests.clear()
        assert queues.claim(queue, **TERMS, limit=1, wait=2) is None
        looks.append(len(proxy.requests))
    assert looks[-1] <= 2 < looks[0] <= 12  # a first one expects ten messages a second


def test_a_wait_looks_more_often_the_more_came_but_not_at_once(queues, queue, proxy):
    looks = []
    for messages in (1, 19):
        queues.post(queue, [1] * messages)
        assert queues.claim(queue, **TERMS, limit=20, wait=2)
        proxy.requests.clear()
        assert queues.claim(queue, **TERMS, limit=20, wait=2) is None
        looks.append(len(proxy.requests))
    assert 1 <= looks[0] < looks[1] < 30


# Renewing, settling


@pytest.mark.parametrize(
    ("fenced", "fault", "retry_after"), [(True, Reply(503, "", {"Retry-After": "3"}), 3), (False, LOST, 0)]
)
def test_nothing_is_deleted_when_its_posts_fail_and_nothing_is_posted_twice(
    queues, queue, responses, proxy, fenced, fault, retry_after
):
    queues.post(queue, [1, 2])
    claim = claim_of(queues, queue)
    settlements = made(claim, responses, fenced=fenced)
    proxy.requests.clear()
    proxy.fail("POST", fault, times=1)
    with pytest.raises(QueueUnavailable) as unavailable:
        queues.settle(claim, settlements)
    assert unavailable.value.retry_after == retry_after
    assert [request.method for request in proxy.requests] == ["POST"]

    proxy.fail("DELETE", proxy.lose, times=1)
    with pytest.raises(QueueUnavailable):
        queues.settle(claim, settlements)
    assert len(queues.settle(claim, settlements).deleted) == 2
    assert bodies(queues.browse(responses)[0]) == [1, 2]


def test_an_outcome_that_the_queue_s_own_limit_refuses_is_found_among_others(queues, queue, proxy):
    small = new_queue(proxy, _max_messages_post_size=200)
    queues.post(queue, ["fits", "x" * 200, "fits too"])
    claim = claim_of(queues, queue)
    first, large, last = claim.messages

    settled = queues.settle(claim, made(claim, small))

    assert isinstance(settled.refused[large.id], MessageRefused)
    assert (list(settled.refused), settled.deleted) == ([large.id], {first.id, last.id})
    assert bodies(queues.browse(small)[0]) == ["fits", "fits too"]


# Queues


def test_a_queue_exists_only_under_its_very_name(either):
    queues, _ = either
    stem = new_name()
    before = [f"A{number}" for number in range(20)]  # a page of its list, which the Redis driver shows first
    for name in (*before, f"{stem}b", f"{stem}d", "A" * 64):
        queues.create(name)

    names = [f"{stem}{end}" for end in ("", "a", "b", "b0", "c", "d", "e", "-", "D")]
    assert [name for name in names if queues.exists(name)] == [f"{stem}b", f"{stem}d"]
    assert queues.exists("A" * 64)
    assert not any(map(queues.exists, ("A" * 63, "-", "z" * 64)))


def test_what_would_surprise_a_queue_s_users_is_named(either):
    queues, proxy = either

    found = queues.inspect(new_queue(proxy))
    moves, *_ = queues.inspect(new_queue(proxy, _max_claim_count=3, _dead_letter_queue="letters"))

    is_redis = proxy.target != backend_zaqar.mongodb_server()
    assert len(found) == is_redis
    assert all("use --claim-limit 1" in sentence for sentence in found)
    assert "moves messages to letters after 3 claims" in moves


# Keystone


@pytest.fixture
def keystone(proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeystoneDouble]:
    """A Keystone, a Zaqar behind the proxy that accepts its tokens, and a cloud `mine` that names both."""
    with KeystoneDouble(proxy.url, project=PROJECT) as keystone:

        def accept_its_tokens(request: Request) -> Reply:
            admitted = keystone.admitted(request)
            return proxy.serve(admitted) if admitted else Reply(401, "Authentication required")

        proxy.answer = accept_its_tokens
        keystone.write_clouds(tmp_path / "clouds.yaml")
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
        yield keystone


def test_a_cloud_of_clouds_yaml_is_used_with_its_application_credential(keystone):
    with open_queues("zaqar://mine") as queues:
        queues.create(queue := new_name())
        assert queues.exists(queue)

    assert queues.address == "zaqar://mine"
    assert queues.credentials == f"those of mine in {os.environ['OS_CLIENT_CONFIG_FILE']}"
    assert len(keystone.tokens) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_sign_in_that_is_refused_is_a_credentials_error_and_once_it_worked_a_failure_that_may_pass(keystone, status):
    refusal = Reply(status, {"error": {"code": status, "message": "no", "title": "No"}})
    keystone.refuse = refusal
    with open_queues("zaqar://mine") as queues:
        with pytest.raises(CredentialsError, match=r"clouds\.yaml"):
            queues.create(new_name())

        keystone.refuse = None
        queues.create(new_name())
        keystone.tokens.clear()
        keystone.refuse = refusal
        with pytest.raises(QueueUnavailable, match=r"clouds\.yaml"):
            queues.create(new_name())


@pytest.mark.parametrize(
    ("answer", "retry_after"),
    [(Reply(429, "", {"Retry-After": "7"}), 7), (Reply(503), 0), (Reply(200, "<html>"), 0), (LOST, 0)],
    ids=["429", "503", "page", "lost"],
)
def test_a_keystone_that_fails_is_unavailable_and_used_again_later(keystone, answer, retry_after):
    keystone.refuse = answer
    with open_queues("zaqar://mine") as queues:
        with pytest.raises(QueueUnavailable) as refusal:
            queues.create(new_name())
        assert refusal.value.retry_after == retry_after

        keystone.refuse = None
        queues.create(new_name())


def test_a_catalog_that_names_plain_http_elsewhere_or_nothing_is_refused(keystone):
    for url, says in (("http://zaqar.example:8888", "only https is safe"), ("", "offers no `messaging`")):
        keystone.zaqar_url = url
        with open_queues("zaqar://mine") as queues, pytest.raises(ConfigError, match=says):
            queues.create(new_name())


def test_no_secret_is_shown_anywhere(keystone, proxy, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with open_queues("zaqar://mine") as queues:
        queues.create(new_name())
        proxy.fail("", Reply(401))
        with pytest.raises(QueueUnavailable) as refusal:
            queues.create(new_name())
        shown = f"{refusal.value!r} {queues!r} {queues.address} {queues.credentials} {caplog.text} {capfd.readouterr()}"

    assert "/v3/auth/tokens" in caplog.text
    assert CANARY not in shown


@pytest.mark.parametrize(
    ("clouds", "error"),
    [
        ("clouds: {}", ConfigError),
        ("clouds: {mine: {auth: {auth_url: KEYSTONE/v3, username: u}}}", CredentialsError),
        (f"clouds: {{mine: {{auth: {{password: {CANARY}}}}}}}", CredentialsError),
        (f"clouds: {{mine: {{auth: {{password: {CANARY}", ConfigError),
        (f"clouds: {{mine: {{auth_type: none-such, auth: {{password: {CANARY}}}}}}}", CredentialsError),
    ],
    ids=["no such cloud", "no password", "no URL", "no YAML", "no such plugin"],
)
def test_a_cloud_that_cannot_be_used_is_refused_without_its_secrets(keystone, clouds, error):
    Path(os.environ["OS_CLIENT_CONFIG_FILE"]).write_text(clouds.replace("KEYSTONE", keystone.url))

    with pytest.raises(error) as refusal, open_queues("zaqar://mine") as queues:
        queues.exists("queue")

    assert type(refusal.value) is error
    assert "zaqar://mine: " in str(refusal.value)
    assert CANARY not in str(refusal.value)
