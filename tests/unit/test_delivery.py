"""What each answer of the maker means, through real HTTP, and that no answer and no message can break a POST."""

import gzip
import ipaddress
import json
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from scripted_maker import Raw, Reply, Request, ScriptedMaker
from signing_double import KEY, OLD_KEY, OLD_SECRET, SECRET, sign
from support import free_port, wait_until

import delivery as delivery_module
from claim_queues import Claim, ConfigError, Message
from claim_queues.breaker import Failure
from claim_queues.keeper import Held, HeldClaim
from claim_queues.signing import Signer
from delivery import MOST_REASON, NO_ANSWER, Answer, Connection, Delivery, Maker
from receive_counts import Receives

WIDGET_ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
OTHER_WIDGET_ID = "41f37378-54f4-11e5-ad75-3c970e65f731"
NAMED = {"id": WIDGET_ID, "created_at": "2026-01-02T03:04:05.678Z"}
OWN_ERROR = {"error": {"code": "invalid_widget_id", "message": "no version 1 UUID"}}
HTML = "<html><body>It works!</body></html>"

CREATED, REJECTED = "created", "rejected"
FAILED, UNAVAILABLE, MISCONFIGURED = Failure

DEADLINE_S = 0.5


@pytest.fixture
def maker() -> Iterator[ScriptedMaker]:
    with ScriptedMaker() as maker:
        yield maker


@pytest.fixture
def other() -> Iterator[ScriptedMaker]:
    """A server that nothing may ask for anything."""
    with ScriptedMaker() as other:
        yield other
        assert other.connections == 0


@pytest.fixture
def connection(maker: ScriptedMaker) -> Iterator[Connection]:
    connection = Maker(maker.url, deadline_s=20).connect()
    yield connection
    connection.close()


@pytest.fixture
def hasty(maker: ScriptedMaker) -> Iterator[Connection]:
    """A connection whose POSTs end after half a second."""
    connection = Maker(maker.url, deadline_s=DEADLINE_S).connect()
    yield connection
    connection.close()


def post(connection: Connection, widget_id: str = WIDGET_ID, **more: Any) -> Answer:
    return connection.post({"widget_id": widget_id} | more, {"Idempotency-Key": "m1"})


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def delivery(message_id: str = "m1", body: Any = None, **given: Any) -> Delivery:
    message = Message(id=message_id, body={"widget_id": WIDGET_ID} if body is None else body, age=61.9, ttl=3600)
    held = Held(message, HeldClaim(Claim("c1", "requests", (message,), 60), until=0.0))
    return Delivery(held, Receives(3, 1, 1_000.0, 1_000_000.5, 2_000_000.0), **given)


# The outcome table


def outcomes() -> Iterator[tuple[int, Any, str | Failure]]:
    """Status, body, and what that means."""
    for status in (200, 201):
        yield status, NAMED, CREATED
    for status in (400, 413, 415, 422):
        yield status, OWN_ERROR, REJECTED
        yield status, HTML, MISCONFIGURED
        yield status, NAMED, MISCONFIGURED
    for status in (408, 425, 429, 502, 503, 504):
        yield from ((status, body, UNAVAILABLE) for body in (OWN_ERROR, HTML, NAMED))
    for status in (500, 507, 511, 599):
        yield from ((status, body, FAILED) for body in (OWN_ERROR, HTML, NAMED))
    for status in (202, 203, 204, 205, 206, 226, 299):
        yield from ((status, body, MISCONFIGURED) for body in (OWN_ERROR, HTML, NAMED))
    for status in (300, 301, 302, 303, 304, 305, 307, 308, 399):
        yield from ((status, body, MISCONFIGURED) for body in (OWN_ERROR, HTML, NAMED))
    for status in (401, 402, 403, 404, 405, 406, 407, 409, 410, 411, 412, 414, 416, 418, 421, 423, 428, 431, 451, 499):
        yield from ((status, body, MISCONFIGURED) for body in (OWN_ERROR, HTML, NAMED))
    for status in (501, 505, 600, 999):
        yield from ((status, body, MISCONFIGURED) for body in (OWN_ERROR, HTML, NAMED))
    yield 200, HTML, MISCONFIGURED
    yield 201, OWN_ERROR, MISCONFIGURED


def kind(body: Any) -> str:
    return {id(NAMED): "naming the id", id(OWN_ERROR): "its own error"}.get(id(body), "html")


@pytest.mark.parametrize(
    ("status", "body", "expected"), [pytest.param(*row, id=f"{row[0]} {kind(row[1])}") for row in outcomes()]
)
def test_the_outcome_table(
    maker: ScriptedMaker, connection: Connection, status: int, body: Any, expected: str | Failure
) -> None:
    maker.answer = lambda _: Reply(status, body)
    answer = post(connection)
    assert (answer.outcome or answer.failure) == expected
    assert answer.outcome is None or answer.failure is None
    assert answer.status == status


def test_a_new_widget_and_one_that_is_there_are_created(connection: Connection) -> None:
    assert [post(connection).status, post(connection).status] == [201, 200]


@pytest.mark.parametrize(("asked", "named"), [(WIDGET_ID.upper(), WIDGET_ID), (WIDGET_ID, WIDGET_ID.upper())])
def test_the_case_of_an_id_does_not_matter(
    maker: ScriptedMaker, connection: Connection, asked: str, named: str
) -> None:
    maker.answer = lambda _: Reply(201, {"id": named})
    assert post(connection, asked).outcome == CREATED


@pytest.mark.parametrize(
    "body",
    [
        {"id": WIDGET_ID.replace("3", "4")},
        {"id": None},
        {"id": [WIDGET_ID]},
        {"widget_id": WIDGET_ID},
        [NAMED],
        WIDGET_ID,
        f'"{WIDGET_ID}"',
        "",
        "null",
        json.dumps(NAMED)[:-1],
        json.dumps(NAMED) + "x",
        b"\xff\xfe" + json.dumps(NAMED).encode(),
        "[" * 60_000,
        "9" * 60_000,
    ],
    ids=lambda body: str(body)[:30],
)
def test_an_answer_that_does_not_name_the_widget_is_not_our_makers(
    maker: ScriptedMaker, connection: Connection, body: Any
) -> None:
    maker.answer = lambda _: Reply(200, body)
    assert post(connection).failure is MISCONFIGURED


@pytest.mark.parametrize("widget_id", ["None", "5", "true"])
def test_an_id_that_is_no_text_names_no_widget(maker: ScriptedMaker, connection: Connection, widget_id: str) -> None:
    maker.answer = lambda _: Reply(200, {"id": {"None": None, "5": 5, "true": True}[widget_id]})
    assert post(connection, widget_id).failure is MISCONFIGURED


@pytest.mark.parametrize(
    "body",
    [
        {"error": "no"},
        {"error": {"message": "no code"}},
        {"error": {"code": "no_message"}},
        {"error": {"code": 422, "message": "the code is a number"}},
        {"error": {"code": "x", "message": ["a list"]}},
        {"error": None},
        {"detail": "another framework's"},
    ],
    ids=str,
)
def test_an_error_that_is_not_the_makers_own_rejects_nothing(
    maker: ScriptedMaker, connection: Connection, body: Any
) -> None:
    maker.answer = lambda _: Reply(422, body)
    assert post(connection).failure is MISCONFIGURED


@pytest.mark.parametrize("status", [401, 403, 421])
def test_why_the_maker_will_not_be_asked_is_told_in_its_own_words(
    maker: ScriptedMaker, connection: Connection, status: int
) -> None:
    maker.answer = lambda _: Reply(status, {"error": {"code": "c", "message": "start it with --allowed-host"}})
    assert post(connection) == Answer(
        None, MISCONFIGURED, status, f"HTTP {status}: start it with --allowed-host", refused=True
    )


def test_a_rejection_carries_the_makers_reason(connection: Connection) -> None:
    answer = post(connection, "this_is_not_a_valid_widget_id")
    assert (answer.outcome, answer.status, answer.reason) == (REJECTED, 422, "widget_id must be a version 1 UUID")


@pytest.mark.parametrize("status", [422, 500, 503])
def test_a_reason_of_any_length_fits_into_a_response(maker: ScriptedMaker, connection: Connection, status: int) -> None:
    maker.answer = lambda _: Reply(status, {"error": {"code": "long", "message": "\x00" * 10_000}})
    assert len(post(connection).reason) <= MOST_REASON + len("HTTP 500: ")


def test_a_failure_carries_the_makers_reason_and_its_patience(maker: ScriptedMaker, connection: Connection) -> None:
    error = {"error": {"code": "busy", "message": "come back later"}}
    maker.answer = lambda _: Reply(503, error, {"Retry-After": "7"})
    assert post(connection) == Answer(None, UNAVAILABLE, 503, "HTTP 503: come back later", 7.0)


# Answers that are none, or too much


def head(*headers: str, status: str = "201 Created") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


NAMED_TEXT = json.dumps(NAMED).encode()
LENGTH = f"Content-Length: {len(NAMED_TEXT)}"


@pytest.mark.parametrize(
    "raw",
    [
        Raw(end="close"),
        Raw(end="reset"),
        Raw([b"SSH-2.0-OpenSSH_9.6\r\n"]),
        Raw([b"\x00\xff\x16\x03" * 10]),
        Raw([b"HTTP/1.1 abc Created\r\n\r\n"]),
        Raw([b"HTTP/1.1 99 Odd\r\n\r\n"]),
        Raw([b"<html>\r\n\r\n"]),
        Raw([head()[:9]]),
        Raw([head(LENGTH), NAMED_TEXT[:-1]]),
        Raw([head(LENGTH), NAMED_TEXT[:-1]], end="reset"),
        Raw([head("Transfer-Encoding: chunked"), b"5\r\nab"]),
        Raw([head("Transfer-Encoding: chunked"), b"-5\r\nab\r\n"]),
        Raw([head("Transfer-Encoding: chunked"), b"nonsense\r\n"]),
        Raw([head("Content-Length: 3, 4"), b"abc"]),
        Raw([head("X: " + "y" * 140_000, LENGTH), NAMED_TEXT]),
        Raw([head("Content-Length: abc"), NAMED_TEXT]),
        Raw([head("Content-Length: -1"), NAMED_TEXT]),
        Raw([head("Content-Length: " + "9" * 5_000), NAMED_TEXT]),
        Raw([head("\x1b[2J: odd", LENGTH), NAMED_TEXT], end="keep"),
        Raw([head("X-Odd: \x1b[2J", LENGTH), NAMED_TEXT], end="keep"),
    ],
    ids=lambda raw: f"{b''.join(raw.chunks)[:40]!r} {raw.end}",
)
def test_half_an_answer_is_none(maker: ScriptedMaker, connection: Connection, raw: Raw) -> None:
    maker.answer = lambda _: raw
    answer = post(connection)
    assert (answer.failure, answer.status) == (UNAVAILABLE, None)
    maker.answer = maker.real
    assert post(connection).outcome == CREATED


@pytest.mark.parametrize(
    "raw",
    [
        Raw([head(), NAMED_TEXT]),
        Raw([head(*(f"X-{number}: y" for number in range(101)), LENGTH), NAMED_TEXT], end="keep"),
        Raw(
            [head("Transfer-Encoding: chunked"), b"%x\r\n" % len(NAMED_TEXT), NAMED_TEXT, b"\r\n0\r\n\r\n"], end="keep"
        ),
        Raw([head(LENGTH, "Retry-After: never", "Location: \xe9"), NAMED_TEXT], end="keep"),
        Raw([head("Connection: close", LENGTH), NAMED_TEXT]),
        Raw([b"HTTP/1.0 201 Created\r\n\r\n", NAMED_TEXT]),
        Raw([b"HTTP/1.1 100 Continue\r\n\r\n", head(LENGTH), NAMED_TEXT], end="keep"),
    ],
    ids=lambda raw: f"{b''.join(raw.chunks)[:40]!r} {raw.end}",
)
def test_a_whole_answer_in_an_odd_form_is_taken(maker: ScriptedMaker, connection: Connection, raw: Raw) -> None:
    maker.answer = lambda _: raw
    assert [post(connection).outcome for _ in range(3)] == [CREATED] * 3


CHUNK = b"400\r\n" + b" " * 1024 + b"\r\n"


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (Reply(201, json.dumps(NAMED) + " " * 70_000), MISCONFIGURED),
        (Reply(422, json.dumps(OWN_ERROR) + " " * 70_000), MISCONFIGURED),
        (Reply(201, gzip.compress(NAMED_TEXT), {"Content-Encoding": "gzip"}), MISCONFIGURED),
        (Reply(201, gzip.compress(b" " * 50_000_000), {"Content-Encoding": "gzip"}), MISCONFIGURED),
        (Reply(201, json.dumps(NAMED), {"Content-Length": "20"}), MISCONFIGURED),
        (Raw(chain([head("Transfer-Encoding: chunked")], repeat(CHUNK))), MISCONFIGURED),
        (Raw(chain([head("Transfer-Encoding: chunked", status="500 Oh")], repeat(CHUNK))), FAILED),
        (Raw([head("Upgrade: x", status="101 Switching Protocols")], end="keep"), MISCONFIGURED),
        (Raw([head(status="103 Early Hints")], end="keep"), MISCONFIGURED),
    ],
    ids=["70 KB", "70 KB of error", "gzip", "gzip bomb", "cut", "endless", "endless 500", "101", "103"],
)
def test_an_answer_as_our_maker_never_gives_it_spoils_only_its_own_post(
    maker: ScriptedMaker, connection: Connection, answer: Reply | Raw, failure: Failure
) -> None:
    maker.answer = lambda _: answer
    assert post(connection).failure is failure
    maker.answer = maker.real
    assert [post(connection).status, post(connection).status] == [201, 200]


def test_an_answer_that_comes_after_an_early_hint_is_not_taken_for_the_next_post(
    maker: ScriptedMaker, connection: Connection
) -> None:
    rejection = json.dumps(OWN_ERROR).encode()
    late = [
        head(status="103 Early Hints"),
        head(f"Content-Length: {len(rejection)}", status="422 No") + rejection,
    ]
    maker.answer = lambda _: Raw(late, every=0.05, end="keep")
    post(connection)
    maker.answer = maker.real
    assert post(connection).outcome == CREATED
    assert maker.connections == 2


@pytest.fixture(scope="module")
def babbler() -> Iterator[tuple[ScriptedMaker, Connection]]:
    with ScriptedMaker() as maker:
        connection = Maker(maker.url, deadline_s=20).connect()
        yield maker, connection
        connection.close()


@given(
    start=st.sampled_from([b"", b"HTTP/1.1 ", head(), head()[:-2], head("Transfer-Encoding: chunked")]),
    rest=st.binary(max_size=100) | st.text(alphabet="0123456789abcdefX:;, \r\n", max_size=60).map(str.encode),
)
def test_no_answer_makes_a_post_raise(babbler: tuple[ScriptedMaker, Connection], start: bytes, rest: bytes) -> None:
    maker, connection = babbler
    maker.answer = lambda _: Raw([start + rest])
    assert post(connection).outcome is None


# Batches


def post_two(connection: Connection) -> tuple[Answer | None, list[Answer]]:
    both = [delivery("m1"), delivery("m2", {"widget_id": OTHER_WIDGET_ID})]
    return connection.post_batch(both), [found.answer for found in both]


def answered(*items: Any) -> Callable[[Request], Reply]:
    return lambda _: Reply(200, {"answers": list(items)})


def test_a_batch_is_one_post_that_tells_of_each_message(maker: ScriptedMaker, connection: Connection) -> None:
    whole, answers = post_two(connection)
    assert (whole, [answer.outcome for answer in answers]) == (None, [CREATED, CREATED])
    (request,) = maker.requests
    assert request.path == "/widgets/batch"
    assert request.json == [
        {"message_id": "m1", "receive_count": 3, "age": 61, "request": {"widget_id": WIDGET_ID}},
        {"message_id": "m2", "receive_count": 3, "age": 61, "request": {"widget_id": OTHER_WIDGET_ID}},
    ]


def test_answers_to_a_batch_belong_to_messages_and_not_to_places(maker: ScriptedMaker, connection: Connection) -> None:
    second = {"message_id": "m2", "status": 422, "body": OWN_ERROR}
    maker.answer = answered({"message_id": "m3"}, second, {"message_id": "m1", "status": 201, "body": NAMED})
    _, answers = post_two(connection)
    assert [answer.outcome for answer in answers] == [CREATED, REJECTED]


@pytest.mark.parametrize(
    "bad",
    [
        None,
        1,
        {},
        {"message_id": 2},
        {"message_id": []},
        {"message_id": "m2"},
        {"message_id": "m2", "status": 201},
        {"message_id": "m2", "status": 201, "body": "x"},
        {"message_id": "m2", "status": "201", "body": NAMED},
        {"message_id": "m2", "status": True, "body": NAMED},
        {"message_id": "m2", "status": 10**40, "body": NAMED},
    ],
    ids=str,
)
def test_an_item_answer_that_is_missing_or_none_is_that_items_failure(
    maker: ScriptedMaker, connection: Connection, bad: Any
) -> None:
    maker.answer = answered(bad, {"message_id": "m1", "status": 201, "body": NAMED})
    whole, answers = post_two(connection)
    assert whole is None
    assert (answers[0].outcome, answers[1].failure) == (CREATED, FAILED)


def test_an_item_answer_that_names_another_widget_is_not_our_makers(
    maker: ScriptedMaker, connection: Connection
) -> None:
    maker.answer = answered(*({"message_id": id_, "status": 201, "body": NAMED} for id_ in ("m1", "m2")))
    _, answers = post_two(connection)
    assert [answer.outcome or answer.failure for answer in answers] == [CREATED, MISCONFIGURED]


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (Reply(404, HTML), MISCONFIGURED),
        (Reply(200, HTML), MISCONFIGURED),
        (Reply(200, {"answers": {}}), MISCONFIGURED),
        (Reply(500, OWN_ERROR), FAILED),
        (Reply(503), UNAVAILABLE),
        (Reply(413, OWN_ERROR), None),
        (Raw(end="reset"), UNAVAILABLE),
        (Reply(200, {"answers": [], "filling": "x" * 140_000}), MISCONFIGURED),
    ],
    ids=["404", "page", "no array", "500", "503", "413", "reset", "long"],
)
def test_a_batch_that_is_not_answered_item_by_item_has_one_answer(
    maker: ScriptedMaker, connection: Connection, answer: Reply | Raw, failure: Failure | None
) -> None:
    maker.answer = lambda _: answer
    whole, answers = post_two(connection)
    assert whole is not None
    assert whole.failure is failure
    assert answers == [NO_ANSWER, NO_ANSWER]


@pytest.mark.parametrize(
    ("path", "target"), [("/w?a=1", "/w/batch?a=1"), ("/w/", "/w/batch"), ("/", "/batch"), ("", "/batch")]
)
def test_a_batch_goes_to_the_path_below_the_urls(maker: ScriptedMaker, path: str, target: str) -> None:
    connection = Maker(maker.url.removesuffix("/widgets") + path, deadline_s=20).connect()
    post_two(connection)
    connection.close()
    assert maker.requests[0].path == target


# Deadline


@pytest.mark.parametrize(
    "raw",
    [
        Raw(end="hang"),
        Raw([head()[:-2]], end="hang"),
        Raw([head(LENGTH), NAMED_TEXT[:-1]], end="hang"),
        Raw(chain([head()[:-2]], repeat(b"X: y\r\n")), every=0.05),
        Raw(chain([head("Content-Length: 60000")], repeat(b" ")), every=0.05),
        Raw(chain([head("Content-Length: 60000", "Connection: close")], repeat(b" ")), every=0.05),
        Raw(chain([head()], repeat(b" ")), every=0.05),
        Raw(chain([head("Transfer-Encoding: chunked")], repeat(b"1\r\n \r\n")), every=0.05),
        Raw(chain([NAMED_TEXT and head("Connection: close"), NAMED_TEXT], repeat(b" ")), every=0.05),
        Raw(repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), every=0.05),
    ],
    ids=[
        "silence",
        "half a head",
        "half a body",
        "trickled head",
        "trickled body",
        "trickled body, closing",
        "trickled body without length",
        "trickled chunks",
        "the whole answer, then more",
        "continue for ever",
    ],
)
def test_a_post_ends_at_its_deadline(maker: ScriptedMaker, hasty: Connection, raw: Raw) -> None:
    maker.answer = lambda _: raw
    started = time.monotonic()
    answer = post(hasty)
    assert DEADLINE_S <= time.monotonic() - started < DEADLINE_S + 1
    assert answer == Answer(None, UNAVAILABLE, None, "no answer within 0.5 s")
    maker.answer = maker.real
    assert post(hasty).outcome == CREATED


def test_a_post_that_starts_between_two_looks_at_the_clock_ends_no_later(maker: ScriptedMaker) -> None:
    connection = Maker(maker.url, deadline_s=1).connect()
    maker.answer = lambda _: Raw(chain([head()], repeat(b" ")), every=0.05)
    started = time.monotonic()
    assert post(connection).failure is UNAVAILABLE
    assert time.monotonic() - started < 1.8
    connection.close()


def test_each_post_has_its_own_deadline(maker: ScriptedMaker) -> None:
    shared = Maker(maker.url, deadline_s=DEADLINE_S)
    slow, quick = shared.connect(), shared.connect()
    maker.answer = lambda request: Raw(end="hang") if request.connection == 1 else maker.real(request)
    assert post(slow).failure is UNAVAILABLE
    started = time.monotonic()
    while time.monotonic() - started < 2 * DEADLINE_S:
        assert post(quick).outcome == CREATED
    slow.close()
    quick.close()


# Connections


@pytest.fixture(params=["told by the kernel", "told otherwise", "not told"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a connection is looked at before a POST: a kernel that is not Linux's may tell nothing, or something else."""
    if request.param == "told otherwise":
        monkeypatch.setattr(delivery_module, "TCP_ESTABLISHED", 4)
    if request.param == "not told":
        monkeypatch.setattr(socket, "TCP_INFO", 10_000)


@pytest.mark.usefixtures("looks")
def test_many_posts_share_one_connection(maker: ScriptedMaker, connection: Connection) -> None:
    for _ in range(50):
        assert post(connection, str(uuid.uuid1())).outcome == CREATED
    for status in (422, 500, 503, 404, 302):
        maker.answer = lambda _, status=status: Reply(status, OWN_ERROR)
        post(connection)
    assert maker.connections == 1


@pytest.mark.usefixtures("looks")
def test_a_connection_closed_while_idle_is_opened_again_without_a_failed_post(
    maker: ScriptedMaker, connection: Connection
) -> None:
    maker.answer = lambda _: Raw([head(LENGTH), NAMED_TEXT], end="close")
    answers = []
    for _ in range(5):
        answers.append(post(connection).outcome)
        wait_until(lambda: not connection._transport.is_connected)
    assert answers == [CREATED] * 5
    assert maker.connections == 5


@pytest.mark.usefixtures("looks")
def test_what_comes_unasked_is_no_answer_to_the_next_post(maker: ScriptedMaker, connection: Connection) -> None:
    unasked = json.dumps(OWN_ERROR).encode()
    refusal = head(f"Content-Length: {len(unasked)}", status="422 Unprocessable Content") + unasked
    maker.answer = lambda _: Raw([head(LENGTH) + NAMED_TEXT, refusal], every=0.05, end="keep")
    answers = []
    for _ in range(3):
        answers.append(post(connection).outcome)
        wait_until(lambda: not connection._transport.is_connected)
    assert answers == [CREATED] * 3
    assert maker.connections == 3


def test_a_maker_that_is_not_there_is_unavailable() -> None:
    connection = Maker(f"http://127.0.0.1:{free_port()}/widgets", deadline_s=20).connect()
    assert post(connection) == Answer(None, UNAVAILABLE, None, "ConnectionRefusedError: Connection refused")


def test_a_name_that_is_not_known_is_unavailable() -> None:
    connection = Maker("http://maker.invalid/widgets", deadline_s=20, allow_plain_http=True).connect()
    assert post(connection).failure is UNAVAILABLE


def test_posts_that_fail_leave_no_file_descriptor_open(maker: ScriptedMaker, hasty: Connection) -> None:
    post(hasty)
    before = open_files()
    for raw in (Raw(end="reset"), Raw(), Raw([b"x"]), Raw(chain([head()], repeat(CHUNK))), Raw([head()], end="hang")):
        maker.answer = lambda _, raw=raw: raw
        for _ in range(2):
            post(hasty)
    maker.release()
    hasty.close()
    wait_until(lambda: open_files() < before)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(
    maker: ScriptedMaker, other: ScriptedMaker, connection: Connection, status: int
) -> None:
    maker.answer = lambda _: Reply(status, "", {"Location": other.url})
    answer = post(connection)
    assert answer.failure is MISCONFIGURED
    assert other.url in answer.reason


def test_a_redirect_to_nowhere_is_told_as_such(maker: ScriptedMaker, connection: Connection) -> None:
    maker.answer = lambda _: Reply(302)
    assert post(connection).reason == "redirected (HTTP 302) to nowhere: not followed"


def test_neither_proxies_nor_netrc_of_the_environment_are_used(
    maker: ScriptedMaker, other: ScriptedMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, other.url)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login widget password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    reached = Maker(maker.url, deadline_s=20)
    connection = reached.connect()
    assert post(connection).outcome == CREATED
    assert reached.is_healthy()
    assert [request.headers.get("Authorization") for request in maker.requests + maker.others] == [None, None]
    connection.close()


# What is sent


def test_the_post_is_the_request_as_json_with_its_other_keys(maker: ScriptedMaker, connection: Connection) -> None:
    more = {
        "note": "Grüße \u2028 \U0001f600 \ud800",
        "n": [1, 2.5, None, True, {"deep": {}}],
        "url": "http://elsewhere/",
    }
    post(connection, **more)
    (request,) = maker.requests
    assert request.json == {"widget_id": WIDGET_ID} | more
    assert request.body.decode("ascii")
    assert (request.method, request.path) == ("POST", "/widgets")
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Accept-Encoding"] == "identity"


def test_a_post_tells_of_its_message(maker: ScriptedMaker, connection: Connection) -> None:
    sent = delivery("5f3c0a-b==")
    connection.post(sent.held.message.body, sent.headers("requests"))
    found = {name: maker.requests[0].headers[name] for name in sent.headers("requests")}
    assert found == {
        "Idempotency-Key": "5f3c0a-b==",
        "webhook-id": "5f3c0a-b==",
        "X-Message-Receive-Count": "3",
        "X-Message-Queue": "requests",
        "X-Message-Age": "61",
    }


@pytest.mark.parametrize("message_id", ["", "a b", "a\r\nX-Evil: 1", "\u20ac", "\x00", "\ud800", "é", "%41"])
def test_no_message_id_breaks_a_post(maker: ScriptedMaker, connection: Connection, message_id: str) -> None:
    sent = delivery(message_id)
    assert connection.post(sent.held.message.body, sent.headers("requests")).outcome == CREATED
    assert maker.requests[0].headers["X-Evil"] is None


@given(st.text(), st.text())
def test_message_ids_that_differ_differ_in_the_headers(one: str, another: str) -> None:
    keys = {delivery(message_id).headers("requests")["Idempotency-Key"] for message_id in (one, another)}
    assert len(keys) == len({one, another})
    assert all(key.isascii() and (key == "" or key.isprintable()) and " " not in key for key in keys)


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "make_odd",
    [lambda: float("nan"), lambda: float("inf"), lambda: -float("inf"), lambda: nested(100_000)],
    ids=["nan", "inf", "-inf", "too deep"],
)
def test_what_is_no_json_is_never_sent_and_is_the_messages_own_failure(
    maker: ScriptedMaker, connection: Connection, make_odd: Callable[[], Any]
) -> None:
    answer = post(connection, odd=make_odd())
    assert (answer.failure, answer.status) == (FAILED, None)
    assert maker.requests == []
    assert post(connection).outcome == CREATED


def test_a_header_that_cannot_be_sent_fails_the_post_and_not_the_caller(
    maker: ScriptedMaker, connection: Connection
) -> None:
    for value in ("a\nb", "\u20ac"):
        assert connection.post({"widget_id": WIDGET_ID}, {"X-Odd": value}).failure is FAILED
    assert maker.requests == []
    assert post(connection).outcome == CREATED


# Signatures


@pytest.fixture
def signing(maker: ScriptedMaker) -> Iterator[Connection]:
    """A connection that signs its POSTs with two secrets."""
    connection = Maker(maker.url, deadline_s=20, signer=Signer([SECRET, OLD_SECRET])).connect()
    yield connection
    connection.close()


def assert_signed(request: Request, message_id: str) -> None:
    timestamp = request.headers["webhook-timestamp"]
    assert abs(int(timestamp) - time.time()) < 5
    assert request.headers["webhook-id"] == message_id
    signatures = request.headers["webhook-signature"].split()
    assert signatures == [sign(key, message_id, timestamp, request.body) for key in (KEY, OLD_KEY)]


def test_a_post_is_signed_with_each_secret(maker: ScriptedMaker, signing: Connection) -> None:
    sent = delivery("5f3c0a-b==\u20ac")
    assert signing.post(sent.held.message.body | {"note": "\u00e9\u2028"}, sent.headers("requests")).outcome == CREATED
    assert_signed(maker.requests[0], "5f3c0a-b==%E2%82%AC")


def test_a_batch_is_signed_as_a_whole_and_has_an_id_of_its_own(maker: ScriptedMaker, signing: Connection) -> None:
    post_two(signing)
    post_two(signing)
    signing.post_batch([delivery("m3"), delivery("\ud800")])
    ids = [request.headers["webhook-id"] for request in maker.requests]
    assert ids[0] == ids[1] != ids[2]
    for request, id_ in zip(maker.requests, ids, strict=True):
        assert_signed(request, id_)


def test_without_a_secret_nothing_is_signed(maker: ScriptedMaker, connection: Connection) -> None:
    post(connection)
    assert not {"webhook-signature", "webhook-timestamp"} & {name.lower() for name in maker.requests[0].headers}


def test_without_a_message_id_a_post_is_signed_for_none(maker: ScriptedMaker, signing: Connection) -> None:
    assert post(signing).outcome == CREATED
    assert_signed(maker.requests[0], "")


# URLs


@pytest.mark.parametrize(
    "url",
    [
        *("http://maker.example/", "http://192.0.2.7/", "http://[2001:db8::1]/", "http://0.0.0.0/", "http://[::]/"),
        *("http://localhost.example/", "http://10.0.0.1/", "http://2130706433/", "HTTP://maker.example/"),
    ],
)
def test_plain_http_to_another_machine_must_be_allowed(url: str) -> None:
    with pytest.raises(ConfigError, match="--allow-plain-http"):
        Maker(url, deadline_s=20)
    Maker(url, deadline_s=20, allow_plain_http=True)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/", "http://127.9.9.9:5000/", "http://localhost/", "http://LOCALHOST:1/", "http://[::1]/"),
        *("http://[::ffff:127.0.0.1]/", "https://maker.example/", "https://192.0.2.7/"),
    ],
)
def test_plain_http_to_this_machine_and_https_need_no_leave(url: str) -> None:
    Maker(url, deadline_s=20)


FORBIDDEN = [
    *("169.254.169.254", "[::ffff:169.254.169.254]", "[fe80::1]", "[fe80::1%25eth0]", "[fd00:ec2::254]"),
    *("100.100.100.200", "224.0.0.1", "239.255.255.250", "[ff02::1]"),
]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", FORBIDDEN)
def test_an_address_where_no_maker_can_be_is_refused(scheme: str, host: str) -> None:
    with pytest.raises(ConfigError, match="no maker can be"):
        Maker(f"{scheme}://{host}/widgets", deadline_s=20, allow_plain_http=True)


def test_a_name_that_leads_to_such_an_address_is_not_posted_to(
    maker: ScriptedMaker, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not delivery_module.is_forbidden("127.0.0.1")
    monkeypatch.setattr(delivery_module, "is_forbidden", lambda address: address == "127.0.0.1")
    answer = post(connection)
    assert (answer.failure, maker.requests) == (MISCONFIGURED, [])
    assert "127.0.0.1" in answer.reason
    monkeypatch.undo()
    assert post(connection).outcome == CREATED


@pytest.mark.parametrize(
    "url",
    [
        "",
        "widgets",
        "/widgets",
        "//host/widgets",
        "ftp://host/widgets",
        "file:///widgets",
        "http:",
        "http:///widgets",
        "http:/host/widgets",
        "http://:80/widgets",
        "http://host:0/",
        "http://host:99999/",
        "http://host:-1/",
        "http://host:abc/",
        "http://exa mple/",
        "http://host/a b",
        "http://host/\r\nX-Evil: 1",
        " http://host/",
        "http://host/\x00",
        "http://host\\@evil/",
        "http://[::1/",
        "http://[nonsense]/",
        "http://*.example/",
        "http://.example/",
        "http://a..b/",
        f"http://{'a' * 64}/",
        "http://host/#fragment",
    ],
)
def test_a_url_that_cannot_be_posted_to_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="maker URL"):
        Maker(url, deadline_s=20, allow_plain_http=True)


@pytest.mark.parametrize(
    "url", ["http://user:secret@host/", "http://:secret@host:0/", "http://u:secret@[x/", "http://@host/secret"]
)
def test_a_url_with_credentials_is_refused_without_showing_them(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Maker(url, deadline_s=20)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("", "/"),
        ("/", "/"),
        ("/a/b?c=d&e", "/a/b?c=d&e"),
        ("?q", "/?q"),
        ("/wïdgets", "/w%C3%AFdgets"),
        ("/%41%2f", "/A%2F"),
        ("//elsewhere/x", "//elsewhere/x"),
    ],
)
def test_a_post_goes_to_the_path_and_query_of_the_url(maker: ScriptedMaker, path: str, target: str) -> None:
    connection = Maker(f"http://127.0.0.1:{maker.port}{path}", deadline_s=20).connect()
    assert post(connection).outcome == CREATED
    assert maker.requests[0].path in (target, target.replace("//", "/"))  # http.server itself folds slashes
    connection.close()


def test_the_schemes_case_does_not_matter(maker: ScriptedMaker) -> None:
    connection = Maker(maker.url.replace("http:", "HTTP:"), deadline_s=20).connect()
    assert post(connection).outcome == CREATED
    connection.close()


# Health


@pytest.mark.parametrize(
    ("health", "is_healthy"),
    [
        (Reply(200, {"status": "ok"}), True),
        (Reply(200, {"status": "ok", "version": "1"}), True),
        (Reply(200, {"status": "bad"}), False),
        (Reply(200, HTML), False),
        (Reply(200, '["ok"]'), False),
        (Reply(201, {"status": "ok"}), False),
        (Reply(302, {"status": "ok"}, {"Location": "/healthz"}), False),
        (Reply(503, {"status": "ok"}), False),
        (Raw(end="reset"), False),
        (Raw(end="hang"), False),
        (Raw(repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), every=0.05), False),
        (Raw(chain([head("Connection: close", status="200 OK")], repeat(b" ")), every=0.05), False),
    ],
    ids=[
        "ok",
        "ok and more",
        "bad",
        "html",
        "list",
        "201",
        "redirect",
        "503",
        "reset",
        "silence",
        "continue for ever",
        "trickled body, closing",
    ],
)
def test_the_maker_is_healthy_only_when_it_says_so_in_time(
    maker: ScriptedMaker, health: Reply | Raw, is_healthy: bool
) -> None:
    maker.health = health
    started = time.monotonic()
    assert Maker(maker.url, deadline_s=DEADLINE_S).is_healthy() is is_healthy
    assert time.monotonic() - started < DEADLINE_S + 1
    assert [request.path for request in maker.others] == ["/healthz"]


def test_a_silent_maker_is_not_waited_for_as_long_as_a_post(
    maker: ScriptedMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "CONNECT_TIMEOUT_S", 0.1)
    maker.health = Raw(end="hang")
    started = time.monotonic()
    assert not Maker(maker.url, deadline_s=20).is_healthy()
    assert time.monotonic() - started < 10


def test_a_maker_that_is_not_there_is_not_healthy() -> None:
    assert not Maker(f"http://127.0.0.1:{free_port()}/widgets", deadline_s=20).is_healthy()


# TLS


@dataclass(frozen=True)
class Certificate:
    path: Path
    context: ssl.SSLContext


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Certificate]:
    """Makes a self-signed certificate for an address."""

    def make(address: str) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "widget maker")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        path = tmp_path_factory.mktemp("tls") / "certificate.pem"
        path.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return Certificate(path, context)

    return make


def test_a_certificate_that_nobody_vouches_for_is_refused_before_the_request_is_sent(
    certified: Callable[[str], Certificate],
) -> None:
    with ScriptedMaker(tls=certified("127.0.0.1").context) as maker:
        reached = Maker(maker.url, deadline_s=20)
        answer = post(reached.connect())
        assert (answer.failure, answer.status) == (UNAVAILABLE, None)
        assert "CERTIFICATE_VERIFY_FAILED" in answer.reason
        assert not reached.is_healthy()
        assert maker.connections == 2
    assert maker.requests + maker.others == []


def test_a_certificate_for_another_host_is_refused(
    certified: Callable[[str], Certificate], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = certified("127.0.0.2")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.path))
    with ScriptedMaker(tls=certificate.context) as maker:
        assert post(Maker(maker.url, deadline_s=20).connect()).failure is UNAVAILABLE
    assert maker.requests == []


@pytest.fixture
def encrypted(certified: Callable[[str], Certificate], monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedMaker]:
    """A maker behind TLS, its certificate trusted."""
    certificate = certified("127.0.0.1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.path))
    with ScriptedMaker(tls=certificate.context) as maker:
        yield maker


def test_an_authority_of_the_environments_is_trusted(encrypted: ScriptedMaker) -> None:
    reached = Maker(encrypted.url, deadline_s=20)
    connection = reached.connect()
    assert [post(connection).status for _ in range(3)] == [201, 200, 200]
    assert encrypted.connections == 1
    assert reached.is_healthy()
    connection.close()


@pytest.mark.parametrize(
    "raw",
    [
        Raw(end="hang"),
        Raw(chain([head("Content-Length: 60000")], repeat(b" ")), every=0.05),
        Raw(chain([head("Connection: close")], repeat(b" ")), every=0.05),
    ],
    ids=["silence", "trickled body", "trickled body, closing"],
)
def test_a_post_over_tls_ends_at_its_deadline(encrypted: ScriptedMaker, raw: Raw) -> None:
    encrypted.answer = lambda _: raw
    connection = Maker(encrypted.url, deadline_s=DEADLINE_S).connect()
    started = time.monotonic()
    assert post(connection).reason == "no answer within 0.5 s"
    assert time.monotonic() - started < DEADLINE_S + 1
    encrypted.answer = encrypted.real
    assert post(connection).outcome == CREATED
    connection.close()


def test_a_tls_server_that_only_listens_ends_at_the_deadline(maker: ScriptedMaker) -> None:
    started = time.monotonic()
    connection = Maker(maker.url.replace("http:", "https:"), deadline_s=DEADLINE_S).connect()
    assert post(connection).failure is UNAVAILABLE
    assert time.monotonic() - started < DEADLINE_S + 1


def test_an_authority_that_is_no_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        Maker("https://host/widgets", deadline_s=20)


# What is written of a delivery


def test_a_response_has_the_same_id_when_it_is_repeated_and_another_for_another_outcome() -> None:
    first, again = delivery(answer=Answer(CREATED, None, 201)), delivery(answer=Answer(CREATED, None, 200))
    assert first.response(CREATED, "")["response_id"] == again.response(CREATED, "")["response_id"]
    assert first.response(CREATED, "")["response_id"] != first.response(REJECTED, "")["response_id"]


def test_a_response_says_what_became_of_the_request() -> None:
    response = delivery(answer=Answer(REJECTED, None, 422, "no")).response(REJECTED, "no")
    assert uuid.UUID(response.pop("response_id")).version == 5
    assert response == {
        "version": 1,
        "request_id": "m1",
        "widget_id": WIDGET_ID,
        "outcome": REJECTED,
        "reason": "no",
        "status": 422,
        "receive_count": 3,
    }


def test_a_dead_letter_holds_the_body_as_it_was_and_all_that_is_known() -> None:
    body = ["no request", {"at": "all"}]
    assert delivery(body=body, answer=Answer(None, FAILED, 500)).dead_letter("requests", "why") == {
        "version": 1,
        "request_id": "m1",
        "queue": "requests",
        "body": body,
        "reason": "why",
        "status": 500,
        "receive_count": 3,
        "first_received_at": "1970-01-01T00:16:40.000Z",
        "last_received_at": "1970-01-12T13:46:40.500Z",
    }


@pytest.mark.parametrize(
    ("body", "widget_id"),
    [
        ({"widget_id": "x"}, "x"),
        ({"widget_id": ""}, ""),
        ({"widget_id": 5}, None),
        ({"widget_id": None}, None),
        ({}, None),
        (["widget_id"], None),
        ("widget_id", None),
        (5, None),
        (False, None),
    ],
)
def test_a_request_is_an_object_with_a_widget_id_of_text(body: Any, widget_id: str | None) -> None:
    assert delivery(body=body).widget_id == widget_id


def test_a_log_line_tells_message_widget_receives_and_status() -> None:
    fields = delivery(answer=Answer(None, FAILED, 500)).fields()
    assert fields == {"message": "m1", "widget": WIDGET_ID, "receives": 3, "status": 500, "ms": None}


def test_a_recorded_request_knows_its_connection(maker: ScriptedMaker, connection: Connection) -> None:
    post(connection)
    post(connection)
    seen: list[Request] = maker.requests
    assert [request.connection for request in seen] == [1, 1]
