"""The consumer in a thread of the test, between a real queue file and a maker whose every answer a test decides."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import pytest
from scripted_maker import Raw, Reply, Request, ScriptedMaker
from support import PATIENCE_S, free_port, wait_until

import widget_consumer
from claim_queues import (
    JSON,
    Claim,
    ConfigError,
    Message,
    QueueUnavailable,
    Range,
    Settled,
    Stats,
    StoreError,
    breaker,
    keeper,
)
from claim_queues.sqlite import LIMITS, SqliteQueues
from delivery import RESPONSE_IDS, Connection, Maker, MakerMisconfigured
from receive_counts import ReceiveCounts
from widget_consumer import Consumer, Settings

REQUESTS, RESPONSES, DEAD_LETTERS = "requests", "responses", "dead-letters"
SETTINGS = Settings(
    request_queue=REQUESTS,
    response_queue=RESPONSES,
    dead_letter_queue=DEAD_LETTERS,
    create=False,
    claim_ttl=300,
    grace=60,
    claim_limit=20,
    slots=8,
    post_batch=1,
    max_receives=3,
    poll_interval=0.05,
    response_ttl=86_400,
    drain=False,
)
HTML = {"Content-Type": "text/html"}
OUR_ERROR = {"error": {"code": "invalid_widget_id", "message": "that is no id"}}
DOWN = Reply(503)


def widget_id(number: int) -> str:
    return f"{number:08x}-54f4-11e5-ad75-3c970e65f731"


A, B, C = widget_id(1), widget_id(2), widget_id(3)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, seconds in [
        (widget_consumer, "BACKOFF_BASE_S", 0.01),
        (widget_consumer, "LONGEST_BACKOFF_S", 0.1),
        (widget_consumer, "LONGEST_PAUSE_S", 0.05),
        (widget_consumer, "CLAIM_PAUSE_S", 0.01),
        (widget_consumer, "LOOK_AGAIN_S", 0.01),
        (widget_consumer, "LONGEST_CLAIM_PAUSE_S", 0.02),
        (breaker, "FIRST_PAUSE_S", 0.01),
        (breaker, "LONGEST_PAUSE_S", 0.02),
        (breaker, "UNDECIDED_S", 0.05),
        (keeper, "FIRST_PAUSE_S", 0.01),
    ]:
        monkeypatch.setattr(module, name, seconds)


class Running:
    """A consumer at work in a thread. error: what ended it."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.consumer.run()
        except Exception as error:
            self.error = error


class Bench:
    """A queue file, a maker, and consumers between them. ahead_s: how far the file's clock runs ahead."""

    def __init__(self, path: Path, maker: ScriptedMaker) -> None:
        self.path = path
        self.maker = maker
        self.maker_url = maker.url
        self.ahead_s = 0.0
        self.counts = ReceiveCounts(None, "", counted_by_service=True)
        self.queues = self.open()

    def open(self, kind: type[SqliteQueues] = SqliteQueues) -> SqliteQueues:
        return kind(self.path, clock=lambda: time.time() + self.ahead_s)

    def post(self, *widget_ids: str) -> list[str]:
        return self.queues.post(REQUESTS, [{"widget_id": id_} for id_ in widget_ids])

    def post_raw(self, body: bytes) -> str:
        """A body that this project's own producer cannot send, but another might."""
        (message_id,) = self.queues.post(REQUESTS, ["placeholder"])
        connection = apsw.Connection(str(self.path))
        connection.execute(
            "UPDATE messages SET body = ?, checksum = NULL WHERE place = (SELECT max(place) FROM messages)", (body,)
        )
        connection.close()
        return message_id

    @contextmanager
    def consumer(
        self, queues: SqliteQueues | None = None, *, deadline: float = 10.0, **options: Any
    ) -> Iterator[Consumer]:
        with queues or self.open() as used:
            maker = Maker(self.maker_url, deadline_s=deadline)
            yield Consumer(used, maker, self.counts, replace(SETTINGS, **options), uniform=lambda _low, high: high)

    @contextmanager
    def consuming(self, queues: SqliteQueues | None = None, **options: Any) -> Iterator[Running]:
        """Consume until the block ends."""
        with self.consumer(queues, **options) as consumer:
            running = Running(consumer)
            try:
                yield running
            finally:
                consumer.stop()
                self.maker.release()
                wait_until(lambda: running.ended)

    def drain(self, queues: SqliteQueues | None = None, **options: Any) -> None:
        """Consume until nothing is left."""
        with self.consumer(queues, drain=True, **options) as consumer:
            consumer.run()

    def bodies(self, queue: str) -> list[Any]:
        return [message.body for message in self.queues.browse(queue, limit=1000, claimed=True).messages]

    @property
    def responses(self) -> list[Any]:
        return self.bodies(RESPONSES)

    @property
    def dead_letters(self) -> list[Any]:
        return self.bodies(DEAD_LETTERS)

    @property
    def left(self) -> Stats:
        return self.queues.stats(REQUESTS)

    def charged(self, message_ids: Collection[str]) -> int:
        """Receives that count against these messages; those that were never received have none."""
        charged = 0
        for message_id in message_ids:
            with suppress(KeyError):
                charged += self.counts[message_id].charged
        return charged

    def outcomes(self) -> dict[str, str]:
        return {response["widget_id"]: response["outcome"] for response in self.responses}


@pytest.fixture
def maker() -> Iterator[ScriptedMaker]:
    with ScriptedMaker() as running:
        yield running


@pytest.fixture
def bench(tmp_path: Path, maker: ScriptedMaker) -> Iterator[Bench]:
    made = Bench(tmp_path / "queues.sqlite3", maker)
    with made.queues:
        yield made


def in_turn(maker: ScriptedMaker, *answers: Reply | Raw) -> Callable[[Request], Reply | Raw]:
    """These answers to the first requests, then the real ones."""
    left = iter(answers)
    return lambda request: next(left, None) or maker.real(request)


def only_for(maker: ScriptedMaker, bad: Collection[str], answer: Reply | Raw) -> Callable[[Request], Reply | Raw]:
    """This answer to requests for the bad ids, the real ones to all others."""
    return lambda request: answer if request.widget_id in bad else maker.real(request)


# Each row of the outcome table


def test_a_new_widget_is_answered_created_and_its_request_deleted(bench: Bench) -> None:
    (message_id,) = bench.post(A)

    bench.drain()

    assert bench.responses == [
        {
            "version": 1,
            "response_id": str(uuid.uuid5(RESPONSE_IDS, f"{message_id} created")),
            "request_id": message_id,
            "widget_id": A,
            "outcome": "created",
            "reason": "",
            "status": 201,
            "receive_count": 1,
        }
    ]
    assert (bench.left.total, bench.dead_letters, len(bench.maker.requests)) == (0, [], 1)


def test_a_widget_that_is_already_there_is_answered_created(bench: Bench) -> None:
    bench.post(A, A)

    bench.drain(slots=1)

    assert [(response["outcome"], response["status"]) for response in bench.responses] == [
        ("created", 201),
        ("created", 200),
    ]
    assert (bench.left.total, bench.dead_letters) == (0, [])


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_refusal_of_the_maker_is_answered_rejected_with_its_reason(bench: Bench, status: int) -> None:
    bench.post("this_is_not_a_valid_widget_id")
    bench.maker.answer = lambda request: Reply(status, OUR_ERROR)

    bench.drain()

    (response,) = bench.responses
    assert (response["outcome"], response["reason"], response["status"]) == ("rejected", "that is no id", status)
    assert (bench.left.total, bench.dead_letters, len(bench.maker.requests)) == (0, [], 1)


@pytest.mark.parametrize("status", [500, 507, 599])
def test_a_message_that_fails_is_a_dead_letter_after_exactly_max_receives(bench: Bench, status: int) -> None:
    (message_id,) = bench.post(A)
    bench.maker.answer = lambda request: Reply(status, {"error": {"code": "boom", "message": "out of wood"}})

    bench.drain(max_receives=3)

    assert [request.headers["X-Message-Receive-Count"] for request in bench.maker.requests] == ["1", "2", "3"]
    (letter,) = bench.dead_letters
    first, last = letter.pop("first_received_at"), letter.pop("last_received_at")
    assert first < last
    assert letter == {
        "version": 1,
        "request_id": message_id,
        "queue": REQUESTS,
        "body": {"widget_id": A},
        "reason": f"HTTP {status}: out of wood",
        "status": status,
        "receive_count": 3,
    }
    (response,) = bench.responses
    assert (response["outcome"], response["reason"]) == ("failed", f"HTTP {status}: out of wood")
    assert (response["request_id"], response["receive_count"], bench.left.total) == (message_id, 3, 0)


def test_a_message_that_fails_and_then_passes_is_created(bench: Bench) -> None:
    bench.post(A)
    bench.maker.answer = in_turn(bench.maker, Reply(500), Reply(500))

    bench.drain(max_receives=3)

    (response,) = bench.responses
    assert (response["outcome"], response["receive_count"], bench.dead_letters) == ("created", 3, [])


def test_a_failed_message_comes_back_only_after_its_backoff(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget_consumer, "BACKOFF_BASE_S", 60.0)
    monkeypatch.setattr(widget_consumer, "LONGEST_BACKOFF_S", 300.0)
    bench.post(A)
    bench.maker.answer = in_turn(bench.maker, Reply(500))
    with bench.consuming():
        wait_until(lambda: bench.left.delayed == 1)

        bench.ahead_s = 110  # the backoff is 60 s, doubled once
        bench.post(B)
        wait_until(lambda: bench.outcomes() == {B: "created"})
        assert bench.left.delayed == 1

        bench.ahead_s = 130
        wait_until(lambda: bench.outcomes() == {A: "created", B: "created"})


UNAVAILABLE = {
    **{str(status): Reply(status) for status in (408, 425, 429, 502, 503, 504)},
    "closed": Raw(),
    "reset": Raw(end="reset"),
    "half an answer": Raw([b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{"]),
    "no answer in time": Raw(end="hang"),
    "no HTTP": Raw([b"220 mail.example ESMTP\r\n"]),
}
MISCONFIGURED = {
    **{f"redirect {status}": Reply(status, headers={"Location": "/widgets/"}) for status in (301, 302, 303, 307, 308)},
    **{str(status): Reply(status) for status in (204, 401, 403, 404, 405, 407, 410)},
    "404 as JSON": Reply(404, {"error": {"code": "not_found", "message": "no such path"}}),
    "404 as HTML": Reply(404, "<h1>Not found</h1>", HTML),
    "200 as HTML": Reply(200, "<h1>Welcome</h1>", HTML),
    "200 as other JSON": Reply(200, {"status": "ok"}),
    "201 of another id": Reply(201, {"id": C}),
    "202": Reply(202, {"id": A}),
    "400 as HTML": Reply(400, "<h1>Bad request</h1>", HTML),
    "422 as other JSON": Reply(422, {"detail": "Unprocessable"}),
}


@pytest.mark.parametrize("answer", UNAVAILABLE.values(), ids=UNAVAILABLE)
def test_an_unavailable_maker_costs_a_message_nothing(bench: Bench, answer: Reply | Raw) -> None:
    (message_id,) = bench.post(A)
    bench.maker.answer, bench.maker.health = (lambda request: answer), DOWN

    with bench.consuming(max_receives=1, deadline=0.1):
        wait_until(lambda: len(bench.maker.requests) >= 4)

    assert (bench.left.free, bench.responses, bench.dead_letters) == (1, [], [])
    assert bench.counts[message_id].count >= 4
    assert bench.counts[message_id].charged == 0


@pytest.mark.parametrize("answer", MISCONFIGURED.values(), ids=MISCONFIGURED)
def test_a_wrong_maker_costs_a_message_nothing_and_says_what_to_mend(
    bench: Bench, answer: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    (message_id,) = bench.post(A)
    bench.maker.answer = lambda request: answer  # while its /healthz answers as ours does

    with bench.consuming(max_receives=1):
        wait_until(lambda: len(bench.maker.requests) >= 20)

    assert (bench.left.free, bench.responses, bench.dead_letters) == (1, [], [])
    assert bench.counts[message_id].charged == 0
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "this is not our widget maker: check --maker-url"
    ]


@pytest.mark.parametrize("status", [401, 403, 421])
def test_a_maker_that_refuses_us_is_told_of_in_its_own_words(
    bench: Bench, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(widget_consumer, "MISCONFIGURED_DRAIN_S", 0.3)
    (message_id,) = bench.post(A)
    bench.maker.answer = lambda request: Reply(status, {"error": {"code": "c", "message": "mend this"}})

    with pytest.raises(MakerMisconfigured, match="the maker refuses us"):
        bench.drain(max_receives=1)

    assert (bench.left.free, bench.responses, bench.dead_letters) == (1, [], [])
    assert bench.counts[message_id].charged == 0
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (record.getMessage(), record.fields["reason"]) == (
        "the maker refuses us: its reason says what to mend",
        f"HTTP {status}: mend this",
    )


def test_a_redirect_is_not_followed(bench: Bench) -> None:
    bench.post(A)
    with ScriptedMaker() as elsewhere:
        bench.maker.answer = lambda request: Reply(307, headers={"Location": elsewhere.url})
        with bench.consuming():
            wait_until(lambda: len(bench.maker.requests) >= 5)

        assert elsewhere.connections == 0
    assert bench.left.free == 1


TOO_LARGE = b"1" + b"0" * 30
MALFORMED: dict[str, tuple[bytes, JSON]] = {
    "dict without widget_id": (b'{"widget": 1}', {"widget": 1}),
    "widget_id is a number": (b'{"widget_id": 7}', {"widget_id": 7}),
    "widget_id is null": (b'{"widget_id": null}', {"widget_id": None}),
    "list": (b'["a"]', ["a"]),
    "number": (b"7", 7),
    "true": (b"true", True),
    "null": (b"null", None),
    "string": (b'"a"', "a"),
    "raw text": (b"create a widget", "create a widget"),
    "nothing": (b"", ""),
    "cut off": (b'{"widget_id": "', '{"widget_id": "'),
    "NaN": (b'{"widget_id": "a", "n": NaN}', '{"widget_id": "a", "n": NaN}'),
    "invalid UTF-8": (b"\xff\xfe", "\udcff\udcfe"),
    "5,000 digits": (b"9" * 5_000, "9" * 5_000),
    "nested too deeply": (b"[" * 5_000 + b"]" * 5_000, "[" * 5_000 + "]" * 5_000),
    "integer over 64 bits": (TOO_LARGE, TOO_LARGE.decode()),
    "integer over 64 bits in a request": (
        b'{"widget_id": "a", "n": %s}' % TOO_LARGE,
        f'{{"widget_id": "a", "n": {TOO_LARGE.decode()}}}',
    ),
    "infinity in a request": (b'{"widget_id": "a", "n": 1e999}', '{"widget_id": "a", "n": 1e999}'),
}


@pytest.mark.parametrize(("body", "kept"), MALFORMED.values(), ids=MALFORMED)
def test_a_body_that_is_no_request_is_a_dead_letter_at_once(bench: Bench, body: bytes, kept: JSON) -> None:
    message_id = bench.post_raw(body)

    bench.drain()

    reason = "the body is no request: a JSON object with a string widget_id"
    (letter,), (response,) = bench.dead_letters, bench.responses
    assert (letter["request_id"], letter["body"], letter["reason"]) == (message_id, kept, reason)
    assert (response["request_id"], response["outcome"], response["reason"]) == (message_id, "failed", reason)
    assert (response["widget_id"], response["status"], bench.left.total) == (None, None, 0)
    assert bench.maker.requests == []


def test_no_depth_of_nesting_ends_the_consumer(bench: Bench) -> None:
    for depth in range(900, 1_000):  # somewhere here the interpreter gives up
        bench.post_raw(b'{"widget_id": "%s", "n": %s}' % (A.encode(), b"[" * depth + b"]" * depth))
    bench.post(B)

    bench.drain(max_receives=1)

    outcomes = [response["outcome"] for response in bench.responses]
    assert sorted(set(outcomes)) == ["created", "failed"]
    assert len(outcomes) == 101


# Order


def test_a_receive_is_counted_durably_before_its_post(bench: Bench, tmp_path: Path) -> None:
    (message_id,) = bench.post(A)
    bench.counts = ReceiveCounts(tmp_path / "counts.sqlite3", "q", counted_by_service=False)
    stored = []

    def look(request: Request) -> Reply:
        connection = apsw.Connection(str(tmp_path / "counts.sqlite3"), flags=apsw.SQLITE_OPEN_READONLY)
        stored.extend(connection.execute("SELECT message_id, count FROM receives"))
        connection.close()
        return bench.maker.real(request)

    bench.maker.answer = look
    bench.drain()
    bench.counts.close()

    assert stored == [(message_id, 1)]


class FailsToSettle(SqliteQueues):
    """A queue whose first settlements fail after their posts, as services without transactions may."""

    failures = 2

    def settle(self, claim: Claim, settlements: Any) -> Settled:
        if self.failures:
            self.failures -= 1
            for settlement in settlements:
                assert self.stats(REQUESTS).claimed == 1
                for post in settlement.posts:
                    self.post(post.queue, [post.body], ttl=post.ttl)
            raise QueueUnavailable("the delete failed")
        return super().settle(claim, settlements)


@pytest.mark.parametrize("settling", ["fails", "is slow"])
def test_while_nothing_can_be_settled_only_so_much_is_claimed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, settling: str
) -> None:
    monkeypatch.setattr(widget_consumer, "STOP_PATIENCE_S", 0.01)
    monkeypatch.setattr(keeper, "LONGEST_PAUSE_S", 0.02)
    go_on = threading.Event()

    class NeverSettles(SqliteQueues):
        def settle(self, claim: Claim, settlements: Any) -> Settled:
            if settling == "is slow":
                go_on.wait(10)
            raise QueueUnavailable("the response queue is gone")

    asked = 0
    is_clogged = Consumer._is_clogged

    def watched(self: Consumer) -> bool:
        nonlocal asked
        clogged = is_clogged(self)
        asked += clogged
        return clogged

    monkeypatch.setattr(Consumer, "_is_clogged", watched)
    bench.post(*[widget_id(number) for number in range(200)])

    with bench.consuming(bench.open(NeverSettles), slots=1, claim_limit=5):
        wait_until(lambda: asked > 3)
        go_on.set()

    assert 20 < len(bench.maker.requests) <= 5 + 4 * 5 + 2 * 5 + 1


def test_claims_go_on_while_three_rounds_of_batches_are_being_settled(bench: Bench) -> None:
    settled = threading.Event()

    class SettlesLate(SqliteQueues):
        def settle(self, claim: Claim, settlements: Any) -> Settled:
            settled.wait(10)
            return super().settle(claim, settlements)

    bench.post(*[widget_id(number) for number in range(4 * 60)])  # three slots of twenty make rounds of sixty

    with bench.consuming(bench.open(SettlesLate), slots=3, claim_limit=20, post_batch=20):
        wait_until(lambda: bench.queues.stats(REQUESTS).free == 0)
        settled.set()
        wait_until(lambda: bench.queues.stats(REQUESTS).total == 0)


def test_claims_go_on_as_soon_as_enough_is_settled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget_consumer, "LOOK_AGAIN_S", 2 * PATIENCE_S)
    settled = threading.Event()

    class SettlesLate(SqliteQueues):
        def settle(self, claim: Claim, settlements: Any) -> Settled:
            settled.wait(10)
            return super().settle(claim, settlements)

    bench.post(*[widget_id(number) for number in range(200)])

    with bench.consuming(bench.open(SettlesLate), slots=1, claim_limit=5) as running:
        wait_until(lambda: running.consumer._clogged)
        settled.set()
        wait_until(lambda: bench.queues.stats(REQUESTS).total == 0)


def test_a_response_posted_again_has_the_same_response_id(bench: Bench) -> None:
    bench.post(A)

    bench.drain(bench.open(FailsToSettle))

    assert len(bench.responses) == 3
    assert len({response["response_id"] for response in bench.responses}) == 1
    assert len(bench.maker.requests) == 1


def test_a_dead_letter_comes_before_its_response_and_both_before_the_delete(bench: Bench) -> None:
    bench.post_raw(b"no request")
    order: list[tuple[str, ...]] = []

    class Watched(SqliteQueues):
        def settle(self, claim: Claim, settlements: Any) -> Settled:
            order.extend(tuple(post.queue for post in settlement.posts) for settlement in settlements)
            return super().settle(claim, settlements)

    bench.drain(bench.open(Watched))

    assert order == [(DEAD_LETTERS, RESPONSES)]


def test_requests_are_posted_in_the_order_of_the_queue(bench: Bench) -> None:
    ids = [widget_id(number) for number in range(50)]
    bench.post(*ids)

    bench.drain(slots=1)

    assert [request.widget_id for request in bench.maker.requests] == ids


# What the maker and the producer are told


def test_every_post_says_which_message_it_is_of(bench: Bench) -> None:
    (message_id,) = bench.post(A)
    bench.ahead_s = 42
    bench.maker.answer = in_turn(bench.maker, Reply(500))

    bench.drain()

    for number, request in enumerate(bench.maker.requests, 1):
        assert request.headers["Idempotency-Key"] == request.headers["webhook-id"] == message_id
        assert request.headers["X-Message-Receive-Count"] == str(number)
        assert request.headers["X-Message-Queue"] == REQUESTS
        assert request.headers["X-Message-Age"] == "42"
        assert request.headers["Content-Type"] == "application/json"
    assert len(bench.maker.requests) == 2


def test_the_other_keys_of_a_request_are_passed_on(bench: Bench) -> None:
    body = {"widget_id": A, "colour": "grün", "sizes": [1, 2.5, None], "url": "http://127.0.0.1:1/"}
    bench.queues.post(REQUESTS, [body])

    bench.drain()

    assert [request.json for request in bench.maker.requests] == [body]
    assert bench.outcomes() == {A: "created"}


def test_a_response_carries_the_id_as_it_was_requested(bench: Bench) -> None:
    bench.post(A.upper())

    bench.drain()

    assert bench.outcomes() == {A.upper(): "created"}
    assert [request.widget_id for request in bench.maker.requests] == [A.upper()]


# One bad message never stops the others


def test_a_message_that_hangs_delays_no_other(bench: Bench) -> None:
    good = [widget_id(number) for number in range(10, 50)]
    bench.post(A, *good)
    bench.maker.answer = only_for(bench.maker, {A}, Raw(end="hang"))

    with bench.consuming():
        wait_until(lambda: bench.outcomes() == dict.fromkeys(good, "created"))
        assert [request.widget_id for request in bench.maker.requests].count(A) == 1
        assert bench.left.claimed == 1


def test_a_message_that_hangs_while_others_pass_is_a_dead_letter_after_max_receives(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "UNDECIDED_S", 5.0)
    bench.post(A)
    good = iter(range(10, 1000))

    def answer(request: Request) -> Reply | Raw:
        if request.widget_id != A:
            return bench.maker.real(request)
        threading.Timer(0.6, lambda: bench.post(widget_id(next(good)))).start()  # passes after the deadline
        return Raw(end="hang")

    bench.maker.answer = answer
    with bench.consuming(max_receives=3, deadline=0.3):
        wait_until(lambda: bench.dead_letters)

    (letter,) = bench.dead_letters
    assert (letter["body"], letter["reason"]) == ({"widget_id": A}, "no answer within 0.3 s")
    assert bench.outcomes().pop(A) == "failed"
    assert "unavailable" not in caplog.text


def test_a_message_that_hangs_alone_is_a_dead_letter_when_the_maker_is_well(bench: Bench) -> None:
    bench.post(A)
    bench.maker.answer = lambda request: Raw(end="hang")

    bench.drain(deadline=0.1, max_receives=2)

    (letter,) = bench.dead_letters
    assert (letter["body"], letter["reason"]) == ({"widget_id": A}, "no answer within 0.1 s")


def test_the_look_at_healthz_takes_nothing_from_the_time_that_the_claim_is_held_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take as long as a POST, so the claim is looked at after it."""
    bench.post(A)
    bench.maker.answer = lambda request: DOWN
    steps: list[str] = []
    is_healthy, holds, post = Maker.is_healthy, keeper.Keeper.holds, Connection.post
    monkeypatch.setattr(Maker, "is_healthy", lambda *args: steps.append("healthz") or is_healthy(*args))
    monkeypatch.setattr(keeper.Keeper, "holds", lambda *args: steps.append("holds") or holds(*args))
    monkeypatch.setattr(Connection, "post", lambda *args: steps.append("POST") or post(*args))
    bench.drain(max_receives=2)
    assert len(bench.dead_letters) == 1
    assert steps.count("healthz") >= 2
    assert all(before == "holds" for before, step in pairwise(steps) if step == "POST")


def test_a_stop_during_the_look_at_healthz_is_not_followed_by_a_post(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both may take their time, and a stop is promised within that of one POST."""
    (id_,) = bench.post(A)
    bench.maker.answer = lambda request: DOWN
    looking, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(Maker, "is_healthy", lambda *args: looking.set() or go_on.wait(30))
    with bench.consuming() as running:
        assert looking.wait(30)
        posted = len(bench.maker.requests)
        running.consumer.stop()
        go_on.set()
        wait_until(lambda: running.ended)

    assert len(bench.maker.requests) == posted
    assert (bench.left.free, bench.charged([id_])) == (1, 0)


def test_a_stop_during_a_post_is_not_followed_by_a_look_at_healthz(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (id_,) = bench.post(A)
    looks: list[None] = []
    monkeypatch.setattr(Maker, "is_healthy", lambda *args: looks.append(None) or True)
    posting, go_on = threading.Event(), threading.Event()

    def answer(request: Request) -> Reply:
        if looks:
            posting.set()
            go_on.wait(30)
        return DOWN

    bench.maker.answer = answer
    with bench.consuming() as running:
        assert posting.wait(30)
        running.consumer.stop()
        go_on.set()
        wait_until(lambda: running.ended)

    assert len(looks) == 1
    assert (bench.left.free, bench.charged([id_])) == (1, 0)


def test_two_bad_messages_at_the_head_do_not_starve_a_good_one(bench: Bench) -> None:
    bench.post(A, B, C)
    bench.maker.answer, bench.maker.health = only_for(bench.maker, {A, B}, DOWN), DOWN

    with bench.consuming(slots=1, claim_limit=1):
        wait_until(lambda: bench.outcomes().get(C) == "created")


def test_some_that_hang_at_the_head_do_not_starve_a_good_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each POST takes longer than the pauses, so that the first would be back before the last has failed."""
    monkeypatch.setattr(widget_consumer, "LONGEST_BACKOFF_S", 30.0)
    monkeypatch.setattr(widget_consumer, "BACKOFF_BASE_S", 1.0)
    bad = [widget_id(number) for number in range(10, 14)]
    bench.post(*bad, A)
    bench.maker.answer = only_for(bench.maker, bad, Raw(end="hang"))

    with bench.consuming(slots=1, claim_limit=1, deadline=0.2):
        wait_until(lambda: bench.outcomes().get(A) == "created")


def test_no_more_posts_run_at_once_than_there_are_slots(bench: Bench) -> None:
    bench.post(*[widget_id(number) for number in range(20)])
    gate = threading.Barrier(4)  # passes only when four are there at once
    running, most = 0, 0
    guard = threading.Lock()

    def answer(request: Request) -> Reply:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        gate.wait(10)
        with guard:
            running -= 1
        return bench.maker.real(request)

    bench.maker.answer = answer
    bench.drain(slots=4)

    assert most == 4


# The breaker


def test_an_open_breaker_claims_nothing_but_one_probe_at_a_time(bench: Bench) -> None:
    ids = bench.post(*[widget_id(number) for number in range(40)])
    bench.maker.health = DOWN
    probes: list[tuple[str, int]] = []

    def answer(request: Request) -> Reply:
        if running.consumer.maker_trouble and running.consumer.status()["posting"] == 1:
            wait_until(lambda: bench.left.claimed <= 2)  # the probe, and the one that failed last
            probes.append((request.widget_id, running.consumer.totals["received"]))
        return DOWN

    bench.maker.answer = answer
    with bench.consuming(max_receives=1) as running:
        wait_until(lambda: len(probes) >= 20)

    for (one, received), (following, received_then) in pairwise(probes):
        assert one != following
        assert received_then == received + 1
    assert (bench.left.total, bench.responses, bench.dead_letters) == (40, [], [])
    assert bench.charged(ids) == 0


def test_an_outage_is_one_line_when_the_maker_goes_and_one_when_it_is_back(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ids = [widget_id(number) for number in range(30)]
    bench.post(*ids)
    bench.maker.answer, bench.maker.health = (lambda request: DOWN), DOWN

    with bench.consuming():
        wait_until(lambda: len(bench.maker.requests) >= 30)
        bench.maker.answer = bench.maker.real
        wait_until(lambda: bench.outcomes() == dict.fromkeys(ids, "created"))

    said = [record.getMessage() for record in caplog.records if "the maker" in record.getMessage()]
    assert said == ["the maker is unavailable: probing until it is back", "the maker is back"]
    assert "failed, comes back" not in caplog.text


def test_a_maker_that_fails_everything_costs_only_its_probes(bench: Bench) -> None:
    ids = bench.post(*[widget_id(number) for number in range(40)])
    bench.maker.answer = lambda request: Reply(500)

    with bench.consuming(max_receives=2):
        wait_until(lambda: len(bench.maker.requests) >= 60)

    assert (bench.left.total, bench.responses, bench.dead_letters) == (40, [], [])
    assert bench.charged(ids) == 0


def test_the_pause_that_the_maker_asks_for_is_kept(bench: Bench) -> None:
    bench.post(A)
    bench.maker.health = DOWN
    asked_at: list[float] = []

    def answer(request: Request) -> Reply:
        asked_at.append(time.monotonic())
        return Reply(503, headers={"Retry-After": "1"}) if len(asked_at) == 1 else bench.maker.real(request)

    bench.maker.answer = answer
    bench.drain()

    assert asked_at[1] - asked_at[0] >= 1


def test_what_was_being_claimed_while_the_breaker_opened_goes_back_untried(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", 60.0)
    go_on = threading.Event()
    bench.post(A)

    def answer(request: Request) -> Reply:
        go_on.wait(10)
        return Reply(404)

    bench.maker.answer = answer
    with bench.consuming(poll_interval=20.0) as running:
        wait_until(lambda: bench.maker.requests)
        go_on.set()
        wait_until(lambda: running.consumer.maker_trouble)
        bench.post(B)
        wait_until(lambda: running.consumer.totals["received"] == 2)
        wait_until(lambda: bench.left.free == 1)

    assert [request.widget_id for request in bench.maker.requests] == [A]


# Drain


class Watched(SqliteQueues):
    """Counts how often somebody asks whether anything is left."""

    asked = 0

    def stats(self, queue: str) -> Stats:
        self.asked += 1
        return super().stats(queue)


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, int]]:
    """What drains said that they wait for."""
    return [record.fields for record in caplog.records if record.msg.startswith("waiting: ")]


def test_a_drain_waits_for_what_another_consumer_claims_and_says_so(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench.post(A)
    assert bench.queues.claim(REQUESTS, ttl=300, grace=60, limit=1)
    queues = bench.open(Watched)

    with bench.consuming(queues, drain=True) as running:
        wait_until(lambda: queues.asked >= 3)
        assert not running.ended

        bench.ahead_s = 301
        wait_until(lambda: running.ended)

    assert bench.outcomes() == {A: "created"}
    assert told(caplog) == [{"claimed": 1, "delayed": 0}]


def test_a_drain_says_again_what_it_waits_for_where_that_changes(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(widget_consumer, "BACKOFF_BASE_S", 1.0)
    monkeypatch.setattr(widget_consumer, "LONGEST_BACKOFF_S", 1.0)
    bench.post(A, B)
    assert bench.queues.claim(REQUESTS, ttl=300, grace=60, limit=1)
    bench.maker.answer = lambda request: Reply(500)

    with bench.consuming(drain=True, max_receives=2) as running:
        wait_until(lambda: bench.outcomes() == {B: "failed"} and len(told(caplog)) == 2)
        bench.ahead_s = 301
        wait_until(lambda: running.ended)

    assert told(caplog) == [{"claimed": 1, "delayed": 1}, {"claimed": 1, "delayed": 0}]


def test_a_drain_ends_with_a_line_that_sums_up(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.post(A, B, "this_is_not_a_valid_widget_id")
    bench.post_raw(b"no request")

    bench.drain()

    assert (caplog.records[-1].msg, caplog.records[-1].fields) == (
        "drained",
        {"queue": REQUESTS, "created": 2, "rejected": 1, "failed": 1},
    )


def test_a_drain_waits_for_an_unavailable_maker(bench: Bench) -> None:
    bench.post(A)
    port = free_port()
    bench.maker_url = f"http://127.0.0.1:{port}/widgets"

    with bench.consuming(drain=True) as running:
        wait_until(lambda: running.consumer.totals["excused"] >= 3)
        with ScriptedMaker(port=port):
            wait_until(lambda: running.ended)

    assert (running.error, bench.outcomes()) == (None, {A: "created"})


@pytest.mark.parametrize("pause_s", [0.01, 60.0])
def test_a_drain_ends_for_a_wrong_maker_however_long_its_pauses_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, pause_s: float
) -> None:
    monkeypatch.setattr(widget_consumer, "MISCONFIGURED_DRAIN_S", 0.3)
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", pause_s)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", pause_s)
    bench.post(A)
    bench.maker.answer = lambda request: Reply(404)

    with pytest.raises(MakerMisconfigured, match="check --maker-url") as raised:
        bench.drain()

    assert raised.value.exit_code == 1
    assert (bench.left.free, bench.responses, bench.dead_letters) == (1, [], [])


def test_a_drain_of_an_empty_queue_ends(bench: Bench) -> None:
    bench.drain()

    assert bench.maker.connections == 0


# Stop


def test_stop_finishes_posts_in_flight_and_gives_the_rest_back_at_once(bench: Bench) -> None:
    ids = bench.post(*[widget_id(number) for number in range(20)])
    go_on = threading.Event()

    def answer(request: Request) -> Reply:
        go_on.wait(10)
        return bench.maker.real(request)

    bench.maker.answer = answer
    with bench.consuming(slots=2) as running:
        wait_until(lambda: len(bench.maker.requests) == 2)
        running.consumer.stop()
        wait_until(lambda: bench.left.free == 18)
        assert bench.left.claimed == 2

        go_on.set()
        wait_until(lambda: running.ended)

    assert list(bench.outcomes().values()) == ["created", "created"]
    assert (bench.left.free, bench.left.total, len(bench.maker.requests)) == (18, 18, 2)
    assert bench.charged(ids[2:]) == 0


def test_a_post_that_fails_after_stop_gives_its_message_back_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (message_id,) = bench.post(A)
    go_on = threading.Event()
    stops: list[None] = []
    stop = Consumer.stop
    monkeypatch.setattr(Consumer, "stop", lambda consumer: stops.append(stop(consumer)))

    def answer(request: Request) -> Reply:
        go_on.wait(10)
        return DOWN

    bench.maker.answer = answer
    with bench.consuming() as running:
        wait_until(lambda: bench.maker.requests)
        running.consumer.stop()
        wait_until(lambda: len(stops) == 2)  # by its own thread too, once that has ended claiming
        go_on.set()
        wait_until(lambda: running.ended, seconds=3)

    assert (bench.left.free, bench.counts[message_id].charged) == (1, 0)


def test_stop_cuts_short_the_pause_before_a_probe(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", 60.0)
    bench.post(A)
    bench.maker.answer = lambda request: Reply(404)

    with bench.consuming() as running:
        wait_until(lambda: running.consumer.maker_trouble)
        running.consumer.stop()
        wait_until(lambda: running.ended, seconds=3)

    assert bench.left.free == 1


# Receive counts


def test_a_message_received_too_often_is_a_dead_letter_without_a_post(bench: Bench) -> None:
    """Its consumers died of it, or it would have had an outcome."""
    (message_id,) = bench.post(A)
    for _ in range(3):
        assert bench.queues.claim(REQUESTS, ttl=60, grace=60, limit=1)
        bench.ahead_s += 61

    bench.drain(max_receives=3)

    (letter,) = bench.dead_letters
    assert (letter["request_id"], letter["receive_count"]) == (message_id, 4)
    assert letter["reason"] == "received 4 times without an outcome"
    assert (bench.outcomes(), bench.maker.requests) == ({A: "failed"}, [])


def test_a_message_received_max_receives_times_is_still_posted(bench: Bench) -> None:
    bench.post(A)
    for _ in range(2):
        assert bench.queues.claim(REQUESTS, ttl=60, grace=60, limit=1)
        bench.ahead_s += 61

    bench.drain(max_receives=3)

    assert bench.outcomes() == {A: "created"}


def test_messages_whose_receives_cannot_be_counted_go_back(bench: Bench) -> None:
    bench.post(A, B)
    failures = iter([QueueUnavailable("locked")])

    class Locked(ReceiveCounts):
        def received(self, messages: Any) -> Any:
            if (error := next(failures, None)) is not None:
                raise error
            return super().received(messages)

    bench.counts = Locked(None, "", counted_by_service=True)
    bench.drain()

    assert bench.outcomes() == {A: "created", B: "created"}


@pytest.mark.parametrize("operation", ["excuse", "forget"])
def test_counts_that_are_locked_for_a_while_end_nothing(bench: Bench, operation: str) -> None:
    bench.post(A, B)
    bench.maker.answer = in_turn(bench.maker, DOWN, DOWN, DOWN)

    class Locked(ReceiveCounts):
        pass

    def fail(*_: object) -> None:
        raise QueueUnavailable("counts: another process kept the file locked")

    setattr(Locked, operation, fail)
    bench.counts = Locked(None, "", counted_by_service=True)
    bench.drain(max_receives=20)

    assert bench.outcomes() == {A: "created", B: "created"}


@pytest.mark.parametrize("operation", ["received", "excuse", "forget"])
def test_counts_that_cannot_be_kept_end_the_consumer_and_everything_goes_back(bench: Bench, operation: str) -> None:
    bench.post(*[widget_id(number) for number in range(40)])
    bench.maker.answer = lambda request: DOWN if operation == "excuse" else bench.maker.real(request)

    class Damaged(ReceiveCounts):
        pass

    def fail(*_: object) -> None:
        raise StoreError("counts: is damaged")

    setattr(Damaged, operation, fail)
    bench.counts = Damaged(None, "", counted_by_service=True)
    with bench.consumer() as consumer, pytest.raises(StoreError, match="counts: is damaged"):
        consumer.run()

    assert (bench.left.claimed, bench.left.total) == (0, 40 - len(bench.responses))


# The queue service


class Flaky(SqliteQueues):
    """Fails every claim but the tenth."""

    calls = 0

    def claim(self, queue: str, **options: Any) -> Claim | None:
        self.calls += 1
        if self.calls < 10:
            raise QueueUnavailable("no route to the queue")
        return super().claim(queue, **options)


def test_a_claim_that_never_returns_is_stuck_and_one_that_waits_is_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widget_consumer, "STUCK_AFTER_S", 0.2)
    hanging = threading.Event()

    class Hangs(SqliteQueues):
        def claim(self, queue: str, **options: Any) -> Claim | None:
            hanging.wait(30)
            return super().claim(queue, **options)

    with bench.consuming(bench.open(Hangs)) as running:
        wait_until(lambda: running.consumer.is_stuck)
        hanging.set()
        wait_until(lambda: not running.consumer.is_stuck)


def test_a_pause_that_the_service_asks_for_is_not_being_stuck(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget_consumer, "STUCK_AFTER_S", 0.0)
    monkeypatch.setattr(widget_consumer, "CLAIM_PAUSE_S", 30.0)
    failed = threading.Event()

    class Asks(SqliteQueues):
        def claim(self, queue: str, **options: Any) -> Claim | None:
            failed.set()
            raise QueueUnavailable("later", retry_after_s=30)

    with bench.consuming(bench.open(Asks)) as running:
        failed.wait(10)
        wait_until(lambda: not running.consumer.is_stuck)
        with running.consumer._lock:  # the claiming thread waits
            assert not running.consumer.is_stuck


def test_redeliveries_and_post_times_are_counted(bench: Bench) -> None:
    bench.post(A, B)
    bench.maker.answer = in_turn(bench.maker, Reply(500))

    with bench.consumer(drain=True, slots=1) as consumer:
        consumer.run()

    assert (consumer.totals["received"], consumer.totals["redelivered"]) == (3, 1)
    assert sum(consumer.post_times.counts) == 3
    assert 0 < consumer.post_times.seconds < 10


def test_the_status_counts_claims_messages_and_busy_slots(bench: Bench) -> None:
    bench.post(*(widget_id(number) for number in range(5)))
    bench.maker.answer = lambda request: Raw(end="hang")
    idle = {"claims": 0, "held": 0, "waiting": 0, "posting": 0, "busy_slots": 0}

    with bench.consuming(slots=2, claim_limit=3) as running:
        wait_until(lambda: running.consumer.status()["held"] == 5)
        wait_until(lambda: len(bench.maker.requests) == 2)
        busy = {"claims": 2, "held": 5, "waiting": 3, "posting": 2, "busy_slots": 2}
        assert running.consumer.status() == idle | busy
        bench.maker.answer = bench.maker.real
        bench.maker.release()
        wait_until(lambda: running.consumer.status() == idle)


def test_a_batch_is_one_post_and_one_busy_slot(bench: Bench) -> None:
    bench.post(A, B, C)
    bench.maker.answer = lambda request: Raw(end="hang")

    with bench.consuming(slots=2, post_batch=20) as running:
        wait_until(lambda: len(bench.maker.requests) == 1)
        status = running.consumer.status()
        assert (status["posting"], status["busy_slots"]) == (3, 1)
        bench.maker.answer = bench.maker.real
        bench.maker.release()
        wait_until(lambda: bench.left.total == 0)
    assert sum(running.consumer.post_times.counts) == len(bench.maker.requests)


def test_a_queue_service_that_fails_is_asked_again_with_one_line_in_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bench.post(A)

    bench.drain(bench.open(Flaky))

    assert bench.outcomes() == {A: "created"}
    assert [record.getMessage() for record in caplog.records] == [
        "consuming",
        "the queue service fails: trying again",
        "the queue service is back",
        "created",
        "drained",
    ]


def test_a_lost_claim_settles_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.post(A)
    go_on = threading.Event()

    def answer(request: Request) -> Reply:
        if len(bench.maker.requests) == 1:
            go_on.wait(10)
        return bench.maker.real(request)

    bench.maker.answer = answer
    with bench.consuming() as first:
        wait_until(lambda: bench.maker.requests)
        bench.ahead_s = 301  # as if the first consumer had been asleep for so long
        bench.drain()
        go_on.set()
        wait_until(lambda: first.consumer.totals["lost"] == 1)

    assert [response["outcome"] for response in bench.responses] == ["created"]
    assert "claim lost" in caplog.text


def test_a_dead_letter_that_no_queue_takes_leaves_its_message_queued(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"widget_id": A, "padding": "x" * (LIMITS.message_bytes - 100)}
    bench.queues.post(REQUESTS, [body])
    bench.maker.answer = lambda request: Reply(500)

    with bench.consuming(max_receives=1):
        wait_until(lambda: "no queue takes the outcome" in caplog.text)
        wait_until(lambda: bench.left.delayed == 1)

    assert bench.bodies(REQUESTS) == [body]
    assert (bench.responses, bench.dead_letters) == ([], [])


class WholeClaims(SqliteQueues):
    """A service that releases only whole claims, at once, and counts no receives."""

    limits = replace(LIMITS, releases_one_message=False, release_delay=0, counts_receives=False)

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        if messages is not None:
            raise ConfigError("one message cannot be released")
        super().release(claim, delay=delay)


def test_where_only_whole_claims_are_released_a_failed_message_comes_back_too(bench: Bench) -> None:
    ids = [widget_id(number) for number in range(20)]
    bench.post(*ids)
    bench.counts = ReceiveCounts(None, "", counted_by_service=False)
    bench.maker.answer = only_for(bench.maker, {ids[3]}, Reply(500))

    bench.drain(bench.open(WholeClaims), max_receives=3)

    assert bench.outcomes() == dict.fromkeys(ids, "created") | {ids[3]: "failed"}
    assert len(bench.maker.requests) == 22


def test_where_only_whole_claims_are_released_stop_gives_back_those_without_posts(bench: Bench) -> None:
    bench.post(*[widget_id(number) for number in range(8)])
    go_on = threading.Event()

    def answer(request: Request) -> Reply:
        go_on.wait(10)
        return bench.maker.real(request)

    bench.maker.answer = answer
    with bench.consuming(bench.open(WholeClaims), slots=2, claim_limit=2) as running:
        wait_until(lambda: len(bench.maker.requests) == 2 and bench.left.claimed == 4)
        running.consumer.stop()
        wait_until(lambda: bench.left.free == 6)
        go_on.set()
        wait_until(lambda: running.ended)

    assert (len(bench.responses), bench.left.free, bench.left.total) == (2, 6, 6)


def test_with_too_many_messages_in_backoff_nothing_is_claimed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget_consumer, "MOST_BACKOFFS_PER_SLOT", 1)
    monkeypatch.setattr(widget_consumer, "BACKOFF_BASE_S", 60.0)
    monkeypatch.setattr(widget_consumer, "LONGEST_BACKOFF_S", 60.0)
    bench.post(*[widget_id(number) for number in range(8)])
    bench.maker.answer = lambda request: Reply(500)
    asked: list[int] = []
    backing_off = keeper.Keeper.backing_off

    def watched(self: keeper.Keeper) -> int:
        asked.append(backing_off(self))
        return asked[-1]

    monkeypatch.setattr(keeper.Keeper, "backing_off", watched)
    with bench.consuming(bench.open(WholeClaims), slots=2, claim_limit=1):
        wait_until(lambda: asked.count(max(asked, default=0)) > 5 and max(asked) > 2)

    assert max(asked) <= 2 + 2 + 2  # backoffs up to the limit, POSTs in flight then, and messages waiting for a slot
    assert len(bench.maker.requests) == max(asked)


# Options that the service cannot honour


class CommandLine:
    """The consumer's command line on a service whose limits a test decides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(widget_consumer, "configure_logging", lambda form, level: None)
        monkeypatch.setattr(widget_consumer, "run_until_signal", lambda work, stop: work())
        monkeypatch.setattr(widget_consumer, "end_at_interrupt", lambda: None)

    def run(self, *arguments: str, **limits: Any) -> object:
        """Run it to its end; gives the exit code."""

        class Poorer(SqliteQueues):
            pass

        Poorer.limits = replace(LIMITS, **limits)
        self._monkeypatch.setattr(widget_consumer, "open_queues", lambda url: Poorer(Path("queues.sqlite3")))
        self._monkeypatch.setattr("sys.argv", ["widget_consumer.py", "--poll-interval", "0.1", *arguments])
        with pytest.raises(SystemExit) as ended:
            widget_consumer.main()
        return ended.value.code


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch)


@pytest.mark.parametrize(
    ("limits", "arguments", "said"),
    [
        ({"grace": None}, ["--grace", "60"], "--grace: the embedded queue has no such thing"),
        ({"message_ttl": None}, ["--response-ttl", "60"], "--response-ttl: the embedded queue has one message TTL"),
        ({"claim_limit": 10}, ["--claim-limit", "11"], "claim limit 11: the embedded queue takes 1 to 10 messages"),
        ({"claim_ttl": Range(60, 100)}, ["--claim-ttl", "101"], "claim TTL 101: the embedded queue takes 60 to 100"),
        ({"message_ttl": Range(60, 100)}, ["--response-ttl", "101"], "message TTL 101: the embedded queue takes 60"),
    ],
)
def test_an_option_that_the_service_cannot_honour_is_refused(
    command_line: CommandLine,
    capsys: pytest.CaptureFixture[str],
    limits: dict[str, Any],
    arguments: list[str],
    said: str,
) -> None:
    assert command_line.run(*arguments, **limits) == 2
    assert said in capsys.readouterr().err


def test_an_option_from_the_environment_is_refused_too(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WIDGET_GRACE", "60")

    assert command_line.run(grace=None) == 2
    assert "--grace: the embedded queue has no such thing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "limits", [{"grace": None}, {"message_ttl": None}, {"claim_limit": 10}, {"releases_one_message": False}]
)
def test_an_option_not_given_takes_what_the_service_has(command_line: CommandLine, limits: dict[str, Any]) -> None:
    assert command_line.run("--drain", **limits) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--deadline", "51", "--claim-ttl", "60"], "--deadline 51: must be at most --claim-ttl less 10 seconds"),
        (["--request-queue", "a", "--response-queue", "a"], "the queues must differ"),
        (["--request-queue", "a", "--dead-letter-queue", "A"], "the queues must differ"),
        (["--maker-url", "ftp://127.0.0.1/"], "maker URL ftp://127.0.0.1/: write http://HOST[:PORT]/PATH"),
    ],
)
def test_options_that_cannot_work_together_are_refused(
    command_line: CommandLine, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert command_line.run(*arguments) == 2
    assert said in capsys.readouterr().err


def test_a_deadline_that_just_fits_the_claim_ttl_is_taken(command_line: CommandLine) -> None:
    assert command_line.run("--drain", "--deadline", "50", "--claim-ttl", "60") == 0


# --check


@pytest.fixture
def check(command_line: CommandLine, bench: Bench, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run --check with these options: its exit code, and the lines that are not ok."""

    def run(*options: str) -> tuple[object, list[str]]:
        code = command_line.run("--check", "--maker-url", bench.maker_url, *options)
        lines = capsys.readouterr().out.splitlines()
        return code, [line for line in lines if not line.startswith("ok ")]

    return run


def test_check_says_that_all_is_well_and_changes_nothing(bench: Bench, check: Callable[..., Any]) -> None:
    with SqliteQueues(Path("queues.sqlite3")) as queues:
        queues.post("itchy-octo-chainsaw-request", [{"widget_id": A}])
        assert check() == (0, [])
        assert queues.stats("itchy-octo-chainsaw-request").free == 1
    assert bench.maker.widgets == {}


@pytest.mark.parametrize("answer", [Reply(404, HTML), Reply(200, HTML), Reply(307), Reply(401), DOWN, Raw()], ids=str)
def test_check_fails_where_the_maker_is_none(bench: Bench, check: Callable[..., Any], answer: Reply | Raw) -> None:
    bench.maker.answer = lambda request: answer
    code, (line,) = check()
    assert code == 1
    assert line.startswith(f"failure maker {bench.maker_url}: ")
    assert line.endswith(": start it, or mend --maker-url")


def test_check_warns_where_the_maker_tells_no_health(bench: Bench, check: Callable[..., Any]) -> None:
    bench.maker.health = Reply(404)
    code, (line,) = check()
    assert (code, line[:8], "/healthz does not answer" in line) == (0, "warning ", True)


def test_check_finds_a_receive_counts_file_that_cannot_be_used(check: Callable[..., Any]) -> None:
    Path("counts").mkdir()
    assert check("--receive-counts", "counts")[0] == 5


def test_check_finds_options_that_the_service_cannot_honour(
    command_line: CommandLine, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.run("--check", "--maker-url", bench.maker_url, "--grace", "60", grace=None) == 2
    assert "--grace: the embedded queue has no such thing" in capsys.readouterr().err


# Batches


def batch_of(bench: Bench) -> list[int]:
    """Sizes of the POSTs so far; 0 for one that is no batch."""
    return [len(request.json) if request.is_batch else 0 for request in bench.maker.requests]


def test_requests_of_one_claim_go_together_and_each_gets_its_own_outcome(bench: Bench) -> None:
    bench.post(A, "no id", B)

    bench.drain(post_batch=20, slots=1)

    assert batch_of(bench) == [3]
    assert bench.outcomes() == {A: "created", "no id": "rejected", B: "created"}
    assert (bench.left.total, bench.dead_letters) == (0, [])


def test_no_batch_is_larger_than_asked_for_or_holds_two_claims_messages(bench: Bench) -> None:
    bench.post(*(widget_id(number) for number in range(50)))

    bench.drain(post_batch=15, claim_limit=20, slots=1)

    sizes = batch_of(bench)
    assert sum(size or 1 for size in sizes) == 50
    assert max(sizes) == 15
    for request in bench.maker.requests:
        if request.is_batch:
            places = [bench_place(item["message_id"]) for item in request.json]
            assert len({(place - 1) // 20 for place in places}) == 1
    assert len(bench.maker.widgets) == 50


def bench_place(message_id: str) -> int:
    return int(message_id[-16:], 16)


@pytest.mark.parametrize(
    "failure", [Reply(500), Reply(503), Reply(413, OUR_ERROR), Raw(end="reset"), Reply(200, HTML)], ids=str
)
def test_a_batch_that_fails_as_a_whole_is_posted_one_by_one(bench: Bench, failure: Reply | Raw) -> None:
    bench.post(A, B, C)
    bench.maker.answer = lambda request: failure if request.is_batch else bench.maker.real(request)

    bench.drain(post_batch=20, slots=1)

    assert batch_of(bench) == [3, 0, 0, 0]
    assert bench.outcomes() == dict.fromkeys([A, B, C], "created")
    assert {response["receive_count"] for response in bench.responses} == {1}


def test_one_bad_message_that_breaks_every_batch_stops_no_other(bench: Bench) -> None:
    bench.post(A, B, C)

    def answer(request: Request) -> Reply | Raw:
        ids = [item["request"]["widget_id"] for item in request.json] if request.is_batch else [request.widget_id]
        return Reply(500) if B in ids else bench.maker.real(request)

    bench.maker.answer = answer
    bench.drain(post_batch=20, slots=1, max_receives=3)

    assert bench.outcomes() == {A: "created", B: "failed", C: "created"}
    assert [(letter["body"]["widget_id"], letter["receive_count"]) for letter in bench.dead_letters] == [(B, 3)]


def test_an_item_that_fails_comes_back_alone_and_counts_its_own_receives(bench: Bench) -> None:
    bench.post(A, B)
    lost = iter([B])

    def answer(request: Request) -> Reply | Raw:
        reply = bench.maker.real(request)
        if request.is_batch and (gone := next(lost, None)):
            reply.body["answers"] = [item for item in reply.body["answers"] if item["body"].get("id") != gone]
        return reply

    bench.maker.answer = answer
    bench.drain(post_batch=20, slots=1)

    assert {response["widget_id"]: response["receive_count"] for response in bench.responses} == {A: 1, B: 2}


def test_a_maker_that_takes_no_batches_is_told_of_once_and_gets_them_one_by_one(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.post(*(widget_id(number) for number in range(45)))
    bench.maker.answer = lambda request: Reply(404, HTML) if request.is_batch else bench.maker.real(request)

    bench.drain(post_batch=20, slots=1)

    assert [size for size in batch_of(bench) if size] == [20]
    assert len(bench.maker.widgets) == 45
    assert caplog.text.count("takes no batches") == 1


@pytest.mark.parametrize("wrong", [Reply(404, HTML), Reply(421), Reply(501)], ids=str)
def test_a_maker_that_was_wrong_for_everything_gets_batches_again_once_it_is_back(
    bench: Bench, caplog: pytest.LogCaptureFixture, wrong: Reply
) -> None:
    bench.post(*(widget_id(number) for number in range(20)))
    bench.maker.answer = lambda request: wrong
    with bench.consuming(post_batch=20, slots=1) as running:
        wait_until(lambda: running.consumer.maker_trouble and len(bench.maker.requests) > 3)
        assert batch_of(bench)[0] == 20
        bench.maker.answer = bench.maker.real
        wait_until(lambda: bench.left.total == 0)
        bench.post(*(widget_id(number) for number in range(20, 40)))
        wait_until(lambda: len(bench.maker.widgets) == 40)

    assert "takes no batches" not in caplog.text
    assert batch_of(bench)[-1] == 20


def test_a_maker_that_takes_no_batches_is_asked_again_after_it_was_gone(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    taking = threading.Event()

    def answer(request: Request) -> Reply | Raw:
        return Reply(404, HTML) if request.is_batch and not taking.is_set() else bench.maker.real(request)

    bench.maker.answer = answer
    bench.post(A, B)
    with bench.consuming(post_batch=20, slots=1) as running:
        wait_until(lambda: "takes no batches" in caplog.text and bench.left.total == 0)
        bench.maker.answer = lambda request: DOWN
        bench.post(C)
        wait_until(lambda: running.consumer.maker_trouble)
        taking.set()
        bench.maker.answer = answer
        wait_until(lambda: bench.left.total == 0)
        bench.post(*(widget_id(number) for number in range(20, 40)))
        wait_until(lambda: len(bench.maker.widgets) == 23)

    assert batch_of(bench)[-1] == 20


def test_an_outage_of_batches_charges_nobody_and_opens_the_breaker(bench: Bench) -> None:
    ids = bench.post(*(widget_id(number) for number in range(40)))
    bench.maker.answer = lambda request: DOWN
    bench.maker.health = DOWN  # else a probe that is alone while the others are in backoff would be guilty

    with bench.consuming(post_batch=20) as running:
        wait_until(lambda: running.consumer.maker_trouble)
        wait_until(lambda: bench.left.claimed <= 1)
        wait_until(lambda: bench.charged(ids) <= 1)  # of one after the other, while probes go on
        bench.maker.answer = bench.maker.real
        wait_until(lambda: len(bench.maker.widgets) == 40)
        wait_until(lambda: bench.left.total == 0)

    assert bench.dead_letters == []


def test_what_waits_in_a_failed_batch_is_free_at_once_after_a_stop(bench: Bench) -> None:
    bench.post(A, B, C)
    bench.maker.answer = lambda request: Raw(end="hang")
    with bench.consuming(post_batch=20, slots=1) as running:
        wait_until(lambda: len(bench.maker.requests) == 1)
        running.consumer.stop()
        bench.maker.release()
        wait_until(lambda: running.ended)
    assert (bench.left.free, running.error) == (3, None)
