"""Rackspace Cloud Queues with pyrax mocked, its odd answers included; keyring; queue URLs. No network, no account."""

import ast
import email.utils
import inspect
import itertools
import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import keyring
import pytest
import requests
from fake_pyrax import client_error, exceptions, pyrax_client, queueing
from keyring.backend import KeyringBackend
from keyring.backends import fail, null
from keyring_double import KEY, USER, Broken, Keyring, PlainText, chained, keyring_of
from pyrax import base_identity, manager
from pyrax import client as base_client
from pyrax.identity import rax_identity
from requests import exceptions as http
from urllib3.exceptions import MaxRetryError, NewConnectionError, ProtocolError

from claim_queues import (
    Claim,
    ClaimLost,
    ConfigError,
    CredentialsError,
    Message,
    MessageRefused,
    Page,
    Post,
    PostIncomplete,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    QueuesError,
    QueueUnavailable,
    Settlement,
    Stats,
    zaqar_api,
)
from claim_queues.cloud_queues import CloudQueues

__all__ = ["pyrax_client"]

TERMS = {"ttl": 300, "grace": 60}


def answered(status: int, content: Any = b"", **headers: str) -> tuple[requests.Response, Any]:
    """What a client's method_* gives: the response, and its content where that is JSON."""
    response = requests.Response()
    response.status_code = status
    response.headers.update(headers)
    return response, content


def entry(id_: str, body: Any = "body", *, ttl: int = 3600, age: int = 7) -> dict[str, Any]:
    """A message as claims and lists show it, under Rackspace's real base path."""
    return {"href": f"/v1/123/queues/q/messages/{id_}?claim_id=c1", "ttl": ttl, "age": age, "body": body}


def claimed(*entries: Any) -> tuple[requests.Response, Any]:
    return answered(201, list(entries), Location="/v1/123/queues/q/claims/c1")


def listed(marker: str, *entries: Any) -> tuple[requests.Response, Any]:
    links = [{"rel": "next", "href": f"/v1/queues/q/messages?marker={marker}&limit=20&echo=true"}]
    return answered(200, {"messages": list(entries), "links": links})


@pytest.fixture
def queues(pyrax_client: Mock) -> Iterator[CloudQueues]:
    with CloudQueues(pyrax_client, "rackspace://tester@DFW", requests.Session()) as queues:
        yield queues


@pytest.fixture
def claim() -> Claim:
    return Claim("c1", "q", tuple(Message(f"m{number}", number, 7, 3600) for number in range(30)), 60)


# Claims


def test_a_claim_holds_what_its_one_answer_says(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_post.return_value = claimed(entry("m1", {"widget_id": "x"}), entry("m2", None))

    found = queues.claim("q", **TERMS, limit=20)

    messages = tuple(
        Message(id_, body, 7.0, 3600, handle="c1") for id_, body in (("m1", {"widget_id": "x"}), ("m2", None))
    )
    assert found == Claim("c1", "q", messages, 60)
    pyrax_client.method_post.assert_called_once_with(
        "/queues/q/claims", params={"limit": 20}, data='{"ttl": 300, "grace": 60}'
    )
    assert [call[0] for call in pyrax_client.method_calls] == ["method_post"]


@pytest.mark.parametrize(
    "answer", [answered(204), answered(204, ""), answered(201, [], Location="/v1/queues/q/claims/c")]
)
def test_nothing_to_claim_is_no_claim(queues: CloudQueues, pyrax_client: Mock, answer: Any) -> None:
    pyrax_client.method_post.return_value = answer
    assert queues.claim("q", **TERMS, limit=20) is None


@pytest.mark.parametrize(
    "odd",
    [
        {"ttl": 60, "age": 0, "body": 1},
        {"href": "/v1/queues/q/messages/", "ttl": 60, "age": 0, "body": 1},
        {"href": "/v1/queues/q/messages/m9", "ttl": 60, "age": 0},
        {"href": "/v1/queues/q/messages/m9", "ttl": None, "age": 0, "body": 1},
        {"href": None, "ttl": 60, "age": 0, "body": 1},
        "message",
        None,
    ],
    ids=repr,
)
def test_what_is_no_message_is_left_out_and_named_in_the_log(
    queues: CloudQueues, pyrax_client: Mock, odd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pyrax_client.method_post.return_value = claimed(entry("m1"), odd, entry("m2"))

    found = queues.claim("q", **TERMS, limit=20)

    assert [message.id for message in found.messages] == ["m1", "m2"]
    assert len(caplog.messages) == 1


def test_a_message_given_twice_is_claimed_once_and_more_than_was_asked_for_is_taken(
    queues: CloudQueues, pyrax_client: Mock
) -> None:
    pyrax_client.method_post.return_value = claimed(entry("m1"), entry("m1"), entry("m2"))
    assert [message.id for message in queues.claim("q", **TERMS, limit=1).messages] == ["m1", "m2"]


@pytest.mark.parametrize(
    "answer",
    [
        answered(200, "<html>"),
        answered(201, b"\xff"),
        answered(201, None, Location="/c1"),
        answered(201, {}, Location="/c1"),
        answered(201, [entry("m1")]),
        claimed(None, {}),
    ],
)
def test_what_is_no_claim_is_unavailable(queues: CloudQueues, pyrax_client: Mock, answer: Any) -> None:
    pyrax_client.method_post.return_value = answer
    with pytest.raises(QueueUnavailable, match="none of Rackspace Cloud Queues"):
        queues.claim("q", **TERMS, limit=20)


@pytest.mark.parametrize(
    ("shown", "age", "life"),
    [(3600, 7, 3600), (120, 0, 360), (120, 30, 390), (3660, 3500, 3860), (90, 80, 90), (100_000, 99_700, 100_060)],
)
def test_the_ttl_of_a_claimed_message_covers_the_claim_and_its_grace(
    queues: CloudQueues, pyrax_client: Mock, shown: int, age: int, life: int
) -> None:
    pyrax_client.method_post.return_value = claimed(entry("m1", ttl=shown, age=age))
    assert queues.claim("q", **TERMS, limit=1).messages[0].ttl == life


def test_a_claim_that_is_gone_cannot_be_renewed(queues: CloudQueues, pyrax_client: Mock, claim: Claim) -> None:
    queues.renew(claim, ttl=90)
    pyrax_client.method_patch.assert_called_once_with("/queues/q/claims/c1", data='{"ttl": 90, "grace": 60}')

    pyrax_client.method_patch.side_effect = client_error(404)
    with pytest.raises(ClaimLost, match="renew claim c1 on q"):
        queues.renew(claim, ttl=90)


def test_a_release_is_of_the_whole_claim(queues: CloudQueues, pyrax_client: Mock, claim: Claim) -> None:
    for some in (claim.messages[:1], []):
        with pytest.raises(ConfigError, match="only whole claims"):
            queues.release(claim, some)
    assert pyrax_client.method_calls == []

    queues.release(claim, claim.messages)
    pyrax_client.method_delete.assert_called_once_with("/queues/q/claims/c1")


# Posts and settlements


def stored(path: str, *, data: str) -> tuple[requests.Response, Any]:
    """A post that is accepted: the answer names no ids, only paths."""
    ids = [f"/v1/queues/q/messages/id-of-{document['body']}" for document in json.loads(data)]
    return answered(201, {"partial": False, "resources": ids})


def test_a_post_gives_the_ids_in_its_paths(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_post.side_effect = stored

    assert queues.post("q", ["ä", 2], ttl=60) == ["id-of-ä", "id-of-2"]

    data = '[{"ttl":60,"body":"\\u00e4"},{"ttl":60,"body":2}]'
    pyrax_client.method_post.assert_called_once_with("/queues/q/messages", data=data)


@pytest.mark.parametrize("resources", [[], None, ["/m/1", "/m/2", "/m/3"], ["/m/"], "/m/1", [1]], ids=repr)
def test_a_post_whose_ids_cannot_be_read_is_unknown(queues: CloudQueues, pyrax_client: Mock, resources: Any) -> None:
    pyrax_client.method_post.return_value = answered(201, {"resources": resources})
    with pytest.raises(PostIncomplete) as caught:
        queues.post("q", [1, 2])
    assert (caught.value.accepted, caught.value.unknown) == ({}, (0, 1))
    assert pyrax_client.method_post.call_count == 2


def test_a_settlement_posts_then_deletes_with_few_calls(queues: CloudQueues, pyrax_client: Mock, claim: Claim) -> None:
    pyrax_client.method_post.side_effect = stored

    settled = queues.settle(
        claim,
        [Settlement(each, (Post("answers", each.body),), fenced=each.body >= 25) for each in claim.messages],
    )

    assert settled.deleted == {message.id for message in claim.messages}
    calls = [(call[0], call.args[0], call.kwargs.get("params")) for call in pyrax_client.method_calls]
    assert calls == [
        *[("method_post", "/queues/answers/messages", None)] * 3,
        ("method_delete", f"/queues/q/messages?ids={','.join(f'm{n}' for n in range(20))}", None),
        ("method_delete", f"/queues/q/messages?ids={','.join(f'm{n}' for n in range(20, 25))}", None),
        *[("method_delete", f"/queues/q/messages/m{n}", {"claim_id": "c1"}) for n in range(25, 30)],
    ]


@pytest.mark.parametrize("status", [400, 403])
def test_a_fenced_delete_that_is_refused_is_lost(
    queues: CloudQueues, pyrax_client: Mock, claim: Claim, status: int
) -> None:
    pyrax_client.method_delete.side_effect = [answered(204), client_error(status), answered(204)]

    settled = queues.settle(claim, [Settlement(each) for each in claim.messages[:3]])

    assert (settled.deleted, settled.lost) == ({"m0", "m2"}, {"m1"})


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_any_other_failure_of_a_delete_is_no_lost_claim(
    queues: CloudQueues, pyrax_client: Mock, claim: Claim, status: int
) -> None:
    pyrax_client.method_delete.side_effect = client_error(status)
    with pytest.raises(QueuesError) as caught:
        queues.settle(claim, [Settlement(claim.messages[0])])
    assert not isinstance(caught.value, ClaimLost)


def test_only_ids_are_deleted(queues: CloudQueues, pyrax_client: Mock) -> None:
    queues.delete("q", ["m1", "", "a/b", "../../claims/c1", "m1?ids=m2", "m1,m2", "ä"])
    pyrax_client.method_delete.assert_called_once_with("/queues/q/messages/m1")


def test_a_claimed_message_is_left_alone_by_a_delete(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_delete.side_effect = [client_error(403), answered(204)]
    queues.delete("q", ["m1", "m2"])
    assert pyrax_client.method_delete.call_count == 2


# Lists and counts


def test_a_page_goes_on_behind_the_marker_that_the_service_gives(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_get.return_value = listed("a%26b%3D5f", entry("m1"))

    page = queues.browse("q")
    queues.browse("q", after=page.marker, limit=5, claimed=True)

    assert page == Page((Message("m1", "body", 7.0, 3600, handle="c1"),), "a&b=5f")
    assert [call.kwargs["params"] for call in pyrax_client.method_get.call_args_list] == [
        {"limit": 20, "echo": "true", "include_claimed": "false", "marker": None},
        {"limit": 5, "echo": "true", "include_claimed": "true", "marker": "a&b=5f"},
    ]


def test_an_empty_page_keeps_the_marker(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_get.return_value = answered(204)
    assert queues.browse("q", after="17") == Page((), "17")


def test_the_end_is_behind_the_last_page_where_markers_are_no_numbers(queues: CloudQueues, pyrax_client: Mock) -> None:
    counts = {"messages": {"claimed": 0, "free": 3, "total": 3}}
    pages = [listed("9aa-", entry("m1")), listed("1bb-", entry("m2")), listed("c-", entry("m3")), answered(204)]
    pyrax_client.method_get.side_effect = [answered(200, counts), *pages]

    assert queues.end_marker("q") == "c-"
    assert [call.kwargs.get("params", {}).get("marker") for call in pyrax_client.method_get.call_args_list] == [
        None, None, "9aa-", "1bb-", "c-",
    ]  # fmt: skip


@pytest.mark.parametrize("count", range(1, 9))
def test_the_end_is_behind_the_newest_message_whatever_is_gone(
    queues: CloudQueues, pyrax_client: Mock, count: int
) -> None:
    def answer(path: str, *, params: dict[str, Any] | None = None) -> tuple[requests.Response, Any]:
        if params is None:
            return answered(200, {"messages": {"claimed": 0, "free": count, "total": count}})
        behind = [number for number in left if number > int(params["marker"] or 0)]
        return listed(str(behind[0]), entry("m")) if behind else answered(204)

    pyrax_client.method_get.side_effect = answer
    for left in itertools.combinations(range(1, 10), count):
        assert queues.end_marker("q") == str(left[-1])


def test_an_empty_queue_has_no_oldest_message(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_get.return_value = answered(200, {"messages": {"claimed": 0, "free": 0, "total": 0}})
    assert queues.stats("q") == Stats(0, 0, 0, None)
    assert queues.end_marker("q") == ""


@pytest.mark.parametrize("content", [b"", "<html>", [], {}, {"messages": None}, {"messages": {"free": 1}}], ids=repr)
def test_counts_that_cannot_be_read_never_look_like_an_empty_queue(
    queues: CloudQueues, pyrax_client: Mock, content: Any
) -> None:
    pyrax_client.method_get.return_value = answered(200, content)
    with pytest.raises(QueueUnavailable):
        queues.stats("q")


def test_whether_a_queue_exists_is_what_the_service_says(queues: CloudQueues, pyrax_client: Mock) -> None:
    assert queues.exists("q") is True
    pyrax_client.queue_exists.return_value = False
    assert queues.exists("q") is False
    pyrax_client.queue_exists.side_effect = client_error(503)
    with pytest.raises(QueueUnavailable):
        queues.exists("q")


# Errors

PYRAX_RAISES = {
    "AuthenticationFailed": CredentialsError,
    "AuthorizationFailure": CredentialsError,
    "BadRequest": ConfigError,
    "DuplicateQueue": ConfigError,
    "DuplicateUser": ConfigError,
    "FileNotFound": ConfigError,
    "InternalServerError": QueueUnavailable,
    "InvalidCredentialFile": ConfigError,
    "InvalidEmail": ConfigError,
    "InvalidQueueName": ConfigError,
    "KeyringModuleNotInstalled": ConfigError,
    "KeyringPasswordNotFound": ConfigError,
    "KeyringUsernameMissing": ConfigError,
    "MissingClaimParameters": ConfigError,
    "NoClientForService": ConfigError,
    "NoEndpointForRegion": ConfigError,
    "NoEndpointForService": ConfigError,
    "NoSuchClient": ConfigError,
    "NoUniqueMatch": ConfigError,
    "NotAuthenticated": CredentialsError,
    "NotFound": QueueNotFound,
    "QueueClientIDNotDefined": ConfigError,
    "ServiceNotAvailable": ConfigError,
    "TenantNotFound": ConfigError,
    "UserNotFound": ConfigError,
}
"""What the modules of pyrax that a queue client uses raise by name, and what becomes of it."""
BY_STATUS = {
    "BadRequest": ConfigError,
    "ClientException": QueueUnavailable,
    "Forbidden": QueueForbidden,
    "HTTPNotImplemented": QueueError,
    "NotFound": QueueNotFound,
    "OverLimit": QueueUnavailable,
    "Unauthorized": CredentialsError,
}
"""What pyrax makes of a status, and what becomes of it."""
OF_REQUESTS = {
    "ChunkedEncodingError": QueueUnavailable,
    "ConnectTimeout": QueueUnavailable,
    "ConnectionError": QueueUnavailable,
    "ContentDecodingError": QueueUnavailable,
    "HTTPError": QueueUnavailable,
    "InvalidHeader": ConfigError,
    "InvalidJSONError": QueueUnavailable,
    "InvalidProxyURL": ConfigError,
    "InvalidSchema": ConfigError,
    "InvalidURL": ConfigError,
    "JSONDecodeError": QueueUnavailable,
    "MissingSchema": ConfigError,
    "ProxyError": QueueUnavailable,
    "ReadTimeout": QueueUnavailable,
    "RequestException": QueueUnavailable,
    "RetryError": QueueUnavailable,
    "SSLError": QueueUnavailable,
    "StreamConsumedError": QueueUnavailable,
    "Timeout": QueueUnavailable,
    "TooManyRedirects": QueueUnavailable,
    "URLRequired": QueueUnavailable,
    "UnrewindableBodyError": QueueUnavailable,
}


def raised_by_name(module: Any) -> set[str]:
    calls = (node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call))
    attributes = (call.func for call in calls if isinstance(call.func, ast.Attribute))
    return {each.attr for each in attributes if isinstance(each.value, ast.Name) and each.value.id == "exc"}


def made(name: str) -> Exception:
    kind = getattr(exceptions, name, None) or getattr(http, name)
    if issubclass(kind, exceptions.ClientException):
        return kind(getattr(kind, "http_status", 418), "why")
    return kind("why", "", 0) if name == "JSONDecodeError" else kind("why")


def test_the_map_of_errors_knows_all_that_pyrax_and_requests_raise() -> None:
    modules = (base_client, base_identity, manager, queueing, rax_identity)
    by_name = set().union(*map(raised_by_name, modules)) - {"from_response"}
    assert by_name == set(PYRAX_RAISES)
    assert {kind.__name__ for kind in exceptions._code_map.values()} | {"ClientException"} == set(BY_STATUS)
    of_requests = inspect.getmembers(http, inspect.isclass)
    assert {
        name
        for name, kind in of_requests
        if issubclass(kind, http.RequestException) and kind.__module__ == http.__name__
    } == set(OF_REQUESTS)


@pytest.mark.parametrize(("name", "ours"), (PYRAX_RAISES | BY_STATUS | OF_REQUESTS).items())
def test_each_error_of_pyrax_and_requests_becomes_one_of_ours(
    queues: CloudQueues, pyrax_client: Mock, name: str, ours: type[Exception]
) -> None:
    pyrax_client.method_get.side_effect = made(name)
    with pytest.raises(ours, match="count q at rackspace://tester@DFW: ") as caught:
        queues.stats("q")
    assert caught.value.__cause__ is pyrax_client.method_get.side_effect
    assert type(caught.value) is ours or ours is QueueUnavailable


def test_every_other_error_of_pyrax_is_one_of_ours_too(queues: CloudQueues, pyrax_client: Mock) -> None:
    for name, kind in inspect.getmembers(exceptions, inspect.isclass):
        if issubclass(kind, exceptions.PyraxException):
            pyrax_client.method_get.side_effect = made(name)
            with pytest.raises(QueuesError):
                queues.stats("q")


NOT_CONNECTED = MaxRetryError(None, "/", NewConnectionError(None, "refused"))


@pytest.mark.parametrize(
    ("error", "is_unknown"),
    [
        (http.ConnectionError(NOT_CONNECTED), False),
        (http.ConnectTimeout(NOT_CONNECTED), False),
        (http.SSLError(NOT_CONNECTED), False),
        (client_error(429), False),
        (client_error(503), False),
        (http.ConnectionError(ProtocolError("closed")), True),
        (http.ReadTimeout("late"), True),
        (http.ChunkedEncodingError("cut"), True),
        (client_error(500), True),
        (client_error(502), True),
        (client_error(504), True),
    ],
    ids=repr,
)
def test_a_post_is_unknown_only_where_it_may_have_been_stored(
    queues: CloudQueues, pyrax_client: Mock, error: Exception, is_unknown: bool
) -> None:
    pyrax_client.method_post.side_effect = error
    with pytest.raises(PostIncomplete if is_unknown else QueueUnavailable):
        queues.post("q", [1])
    assert pyrax_client.method_post.call_count == 1 + is_unknown


def test_a_body_that_the_service_refuses_is_refused(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_post.side_effect = client_error(400)
    with pytest.raises(MessageRefused):
        queues.post("q", [1])


# Keyring and queue URLs


@pytest.fixture
def with_key() -> Iterator[None]:
    with keyring_of(Keyring()):
        yield


@pytest.mark.usefixtures("with_key")
@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("rackspace://tester@DFW", "rackspace://tester@DFW"),
        ("rackspace://tester@dfw/", "rackspace://tester@DFW"),
        ("rackspace://test%65r@LON", "rackspace://tester@LON"),
        (
            "rackspace://tester@lon?identity=https%3A%2F%2Fid.example/v2.0",
            "rackspace://tester@LON?identity=https://id.example/v2.0",
        ),
        ("rackspace://tester@DFW?identity=http://[::1]:5000/v2.0", None),
        ("rackspace://tester@DFW?identity=http://localhost:5000/v2.0", None),
    ],
)
def test_a_url_names_user_region_and_perhaps_the_identity_service(url: str, address: str | None) -> None:
    with CloudQueues.from_url(url) as queues:
        assert queues.address == address or url


@pytest.mark.usefixtures("with_key")
@pytest.mark.parametrize(
    "url",
    [
        "rackspace:",
        "rackspace://",
        "rackspace://tester@",
        f"rackspace://tester:{KEY}@DFW",
        f"rackspace://tester:{KEY}@",
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
        "rackspace://tester@DFW?identity=ftp://127.0.0.1/v2.0",
        "rackspace://tester@DFW?identity=id.example",
        "rackspace://tester@DFW?identity=",
        "rackspace://tester@DFW?identity=https://[/v2.0",
        "rackspace://tester@DFW?identity=https://id.example/v2.0?a=b",
    ],
)
def test_any_other_url_is_refused_and_what_may_be_a_key_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CloudQueues.from_url(url)
    assert caught.value.exit_code == 2
    assert KEY not in str(caught.value)


@pytest.mark.usefixtures("with_key")
def test_an_identity_service_of_the_environment_is_held_to_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_AUTH_ENDPOINT", "http://id.example/v2.0")
    with pytest.raises(ConfigError, match="only https is safe"):
        CloudQueues.from_url("rackspace://tester@DFW")


@pytest.mark.usefixtures("with_key")
def test_the_user_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CredentialsError, match="CLOUD_KEYRING_USER"):
        CloudQueues.from_url("rackspace://DFW")

    monkeypatch.setenv("CLOUD_KEYRING_USER", USER)
    with CloudQueues.from_url("rackspace://DFW") as queues:
        assert queues.address == "rackspace://tester@DFW"


class Empty(Keyring):
    def get_password(self, service: str, username: str) -> str | None:
        return ""


@pytest.mark.parametrize(
    ("backend", "user", "says"),
    [
        (fail.Keyring, USER, "no usable backend .keyring.backends.fail.: start"),
        (
            null.Keyring,
            USER,
            "no usable backend .keyring.backends.null.: start.* in PYTHON_KEYRING_BACKEND, then store",
        ),
        (chained, USER, "no usable backend .keyring_double.: start"),
        (lambda: chained(null.Keyring(), fail.Keyring()), USER, "no usable backend"),
        (PlainText, USER, "plain text .keyrings.alt.file.PlainText.: choose another"),
        (lambda: chained(Keyring(), PlainText()), USER, "plain text .keyrings.alt.file.PlainText.: choose another"),
        (Broken, USER, "keyring failed .RuntimeError: no D-Bus here.: mend"),
        (Keyring, "another", "no API key of another"),
        (Empty, USER, "no API key of tester"),
    ],
)
def test_a_key_that_keyring_does_not_keep_safely_is_asked_for(
    backend: Callable[[], KeyringBackend], user: str, says: str
) -> None:
    with keyring_of(backend()), pytest.raises(CredentialsError, match=f"{says}.*keyring set pyrax {user}") as caught:
        CloudQueues.from_url(f"rackspace://{user}@DFW")
    assert caught.value.exit_code == 4
    assert KEY not in str(caught.value)


def test_a_keyring_that_cannot_be_loaded_is_an_error_of_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring.core, "_keyring_backend", None)
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "no_such_module.Keyring")
    with pytest.raises(CredentialsError, match="ModuleNotFoundError"):
        CloudQueues.from_url("rackspace://tester@DFW")


def test_a_key_in_a_safe_backend_of_several_is_found() -> None:
    with keyring_of(chained(Keyring(), null.Keyring())), CloudQueues.from_url("rackspace://tester@DFW") as queues:
        assert queues.address == "rackspace://tester@DFW"


@pytest.fixture
def looks(queues: CloudQueues, pyrax_client: Mock, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the service was asked for a claim, in seconds of a clock that only waits move; it has nothing."""
    now, looks = [0.0], []

    def wait(seconds: float) -> bool:
        now[0] += seconds
        return False

    def look(*_: Any, **__: Any) -> Any:
        looks.append(round(now[0], 1))
        return answered(204)

    monkeypatch.setattr(zaqar_api, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(queues._stopped, "wait", wait)
    pyrax_client.method_post.side_effect = look
    return looks


def test_pauses_of_a_wait_double(queues: CloudQueues, looks: list[float]) -> None:
    assert queues.claim("q", **TERMS, limit=1, wait=5) is None
    assert looks == [0, 0.1, 0.3, 0.7, 1.5, 3.1, 5]


def test_pauses_grow_over_waits_in_vain_up_to_a_whole_wait(queues: CloudQueues, looks: list[float]) -> None:
    for _ in range(5):
        assert queues.claim("q", **TERMS, limit=1, wait=2) is None
        queues._stopped.wait(0.05)  # the caller does something else
    assert looks == [0, 0.1, 0.3, 0.7, 1.5, 2, 4, 6, 8, 10]


def test_pauses_begin_anew_after_a_message(queues: CloudQueues, pyrax_client: Mock, looks: list[float]) -> None:
    queues.claim("q", **TERMS, limit=1, wait=10)
    look = pyrax_client.method_post.side_effect
    pyrax_client.method_post.side_effect = [claimed(entry("m"))]
    assert queues.claim("q", **TERMS, limit=1, wait=10)

    pyrax_client.method_post.side_effect = look
    found_at = len(looks)
    queues.claim("q", **TERMS, limit=1, wait=1)
    first, *others = looks[found_at:]
    assert [round(at - first, 1) for at in others] == [0.1, 0.3, 0.7, 1]


def test_a_wait_that_is_ended_looks_no_more(
    queues: CloudQueues, looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    queues.claim("q", **TERMS, limit=1, wait=2)
    monkeypatch.setattr(queues._stopped, "wait", lambda _: True)
    assert queues.claim("q", **TERMS, limit=1, wait=2) is None
    assert looks == [0, 0.1, 0.3, 0.7, 1.5, 2]


def test_pauses_of_a_look_without_claiming_double_up_to_two_seconds(
    queues: CloudQueues, pyrax_client: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(queues._stopped, "wait", lambda pause: pauses.append(pause) or len(pauses) == 7)
    pyrax_client.method_get.side_effect = itertools.repeat(answered(204))

    assert not queues.browse("q", wait=1000).messages
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_a_claim_that_may_not_wait_looks_at_once(queues: CloudQueues, looks: list[float]) -> None:
    queues.claim("q", **TERMS, limit=1, wait=2)
    queues.claim("q", **TERMS, limit=1)
    assert looks[-2:] == [2, 2]


def test_waits_for_one_queue_do_not_delay_looks_at_another(queues: CloudQueues, looks: list[float]) -> None:
    queues.claim("q", **TERMS, limit=1, wait=2)
    queues.claim("other", **TERMS, limit=1, wait=2)
    assert looks[-6:] == [2, 2.1, 2.3, 2.7, 3.5, 4]


# What an operator asks


def test_the_clock_is_that_of_an_answer(queues: CloudQueues, pyrax_client: Mock) -> None:
    date = email.utils.formatdate(time.time() - 100, usegmt=True)
    counts = {"messages": {"claimed": 0, "free": 0, "total": 0}}
    pyrax_client.method_get.return_value = answered(200, counts, Date=date)
    assert 99 <= (queues.clock_ahead("q") or 0) < 120


def test_requests_are_counted_by_what_they_ask_for(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.method_post.return_value = answered(204)
    queues.claim("q", **TERMS, limit=20)
    queues.claim("q", **TERMS, limit=20)
    queues.exists("q")
    assert queues.requests == {"claim": 2, "look": 1}


def test_credentials_are_told_by_where_they_are(queues: CloudQueues, pyrax_client: Mock) -> None:
    pyrax_client.identity = Mock(username="tester")
    assert queues.credentials == "the API key of tester, in keyring"
