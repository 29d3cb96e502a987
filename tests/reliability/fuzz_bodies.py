"""What atheris runs: one queue body through the consumer to the maker, or one answer of a maker back, per input.

`python -m reliability.fuzz_bodies CORPUS -runs=N` with atheris on the path; reliability.fuzz starts it so. Prints what
became of the inputs as JSON once N are through; anything broken is a traceback and another exit code than 0.
"""

import io
import json
import logging
import re
import sys
from collections import Counter
from typing import Any
from unittest.mock import Mock, patch

import atheris

with atheris.instrument_imports(
    include=["delivery", "widget_consumer", "widget_maker", "receive_counts", "claim_queues.base"]
):
    import delivery
    import widget_consumer
    import widget_maker
    from claim_queues import base

from claim_queues import Claim, Message, MessageRefused
from claim_queues.command_line import _TextFormatter
from claim_queues.keeper import Held, HeldClaim
from claim_queues.sqlite import LIMITS
from receive_counts import ReceiveCounts

ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
CANONICAL = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-1[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
HEAD = b"POST /widgets HTTP/1.1\r\nHost: 127.0.0.1:5000\r\n"
LINE_ENDS = 11
STATUSES = (200, 201, 400, 413, 415, 422, 401, 421, 500, 503, 302)
SETTINGS = widget_consumer.Settings(
    request_queue="requests",
    response_queue="responses",
    dead_letter_queue="dead-letters",
    create=False,
    claim_ttl=60,
    grace=60,
    claim_limit=10,
    slots=1,
    post_batch=1,
    max_receives=5,
    poll_interval=1.0,
    response_ttl=60,
    drain=False,
)


class Keeper:
    """Remembers how messages ended, in place of a queue."""

    def __init__(self, *_: object, **__: object) -> None:
        self.settled: list[list[Any]] = []

    def settle(self, held: Held, posts: Any, *, fenced: bool) -> None:
        self.settled.append(list(posts))


class Socket:
    """Gives these pieces, one a call."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.left = iter(pieces)

    def recv(self, _: int) -> bytes:
        return next(self.left, b"")


class Answered(delivery.Connection):
    """A connection whose every answer consists of these bytes, in these pieces."""

    pieces: list[bytes]

    def _exchange(self, request: bytes, *, most_bytes: int = delivery.MOST_ANSWER_BYTES, **_: Any) -> Any:
        return self._read_answer(Socket(self.pieces), most_bytes)  # type: ignore[arg-type]


class Target:
    """The consumer and the maker, without threads and without a network."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.log = io.StringIO()
        handler = logging.StreamHandler(self.log)
        handler.setFormatter(_TextFormatter())
        logging.basicConfig(level="INFO", handlers=[handler], force=True)
        self.maker = delivery.Maker("http://127.0.0.1:5000/widgets", deadline_s=20)
        self.connection = Answered(self.maker, None)
        self.connection.close = lambda: None  # type: ignore[method-assign]
        with patch.object(widget_consumer, "Keeper", Keeper):
            counts = ReceiveCounts(None, "", counted_by_service=False)
            self.consumer = widget_consumer.Consumer(Mock(), self.maker, counts, SETTINGS)
        self.number = 0
        messages = tuple(Message(id=id_, body={"widget_id": ID}, age=1.0, ttl=60) for id_ in ("m1", "m2"))
        self.claim = HeldClaim(Claim("c", "requests", messages, 60), until=0.0)
        self.batch = [
            delivery.Delivery(Held(message, self.claim), receives)
            for message, receives in zip(messages, counts.received(messages), strict=True)
        ]

    def take(self, data: bytes) -> None:
        """One input: its first byte says what it is, and how much of a right body or answer is around it."""
        self.number += 1
        kind, data = data[:1], data[1:]
        if kind < b"\x20":
            self.body(b'{"widget_id": "%b", "x": %b}' % (ID.encode(), data))
        elif kind < b"\x40":
            self.body(b'{"widget_id": "%b"}' % data)
        elif kind < b"\x80":
            self.body(data)
        elif kind < b"\xc0":
            status = STATUSES[data[0] % len(STATUSES)] if data else 200
            self.answer(b"\xff" + b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data[1:]), data[1:]))
        else:
            self.answer(data)

    def body(self, data: bytes) -> None:
        body = base.decode(data.decode(errors="surrogateescape" if data[:1] == b"\xff" else "replace"))
        message = Message(id=f"m{self.number}", body=body, age=1.0, ttl=3600)
        held = Held(message, self.claim)
        self.log.seek(0)
        self.log.truncate()
        self.consumer._admit([held], probe=False)
        waiting = self.consumer._take_waiting()
        settled = self.consumer._keeper.settled
        assert len(waiting) + len(settled) == 1, "a message must go to the maker or end here, never both or neither"
        if waiting:
            self.posted(waiting[0])
        else:
            (letter, response) = settled.pop()
            self.seen["dead letter"] += 1
            assert self.log.getvalue().count("\n") == len(self.log.getvalue().splitlines()) == 1
            assert (letter.queue, response.queue) == ("dead-letters", "responses")
            assert (letter.body["request_id"], response.body["outcome"]) == (message.id, "failed")
            self.kept(letter.body, body)

    def kept(self, letter: Any, body: Any) -> None:
        try:
            text = LIMITS.encode(letter)
        except MessageRefused:
            self.seen["dead letter refused"] += 1
            return
        assert base.decode(text)["body"] == body, "a dead letter must keep its body"

    def posted(self, found: delivery.Delivery) -> None:
        try:
            sent = self.maker.request(found.held.message.body, found.headers("requests"))
        except (ValueError, RecursionError):
            self.seen["not sent"] += 1
            return
        head, _, content = sent.partition(b"\r\n\r\n")
        assert head.startswith(HEAD), "no body may choose where it is posted"
        assert head.count(b"\r\n") == head.count(b"\n") == LINE_ENDS
        assert json.loads(content) == found.held.message.body
        try:
            widget_id = widget_maker.parse_request(widget_maker.parse_json(content))
        except widget_maker.Refused as refused:
            found.answer = self.refused(refused)
        else:
            self.seen["made"] += 1
            assert CANONICAL.fullmatch(widget_id)
            assert widget_id == str(found.widget_id).lower()
            found.answer = delivery.Answer("created", None, 201)
        response = found.response(str(found.answer.outcome), found.answer.reason)
        assert base.decode(LIMITS.encode(response))["widget_id"] == found.widget_id

    def refused(self, refused: widget_maker.Refused) -> delivery.Answer:
        self.seen[f"refused {refused.code}"] += 1
        assert refused.code in delivery.REJECTING
        assert str(refused.description).isprintable()
        return delivery.Answer("rejected", None, refused.code, str(refused.description))

    def answer(self, data: bytes) -> None:
        size = 1 + 8 * data[0] if data else 1
        self.connection.pieces = [data[i : i + size] for i in range(1, len(data), size)]
        found = self.connection.post({"widget_id": ID}, {})
        self.seen[f"answer {found.outcome or found.failure}"] += 1
        assert (found.outcome is None) != (found.failure is None)
        if found.outcome == "created":
            assert found.status in {200, 201}
            assert ID.encode() in data.lower() or b"\\u" in data
        elif found.outcome == "rejected":
            assert found.status in delivery.REJECTING
            assert b"error" in data or b"\\u" in data
        if b"answers" not in data:
            return
        for one in self.batch:
            one.answer = delivery.NO_ANSWER
        whole = self.connection.post_batch(self.batch)
        if whole is None:
            self.seen["batch answered"] += 1
            assert all(one.answer.outcome or one.answer.failure for one in self.batch)


def main() -> None:
    target = Target()
    runs = int(next(word for word in sys.argv if word.startswith("-runs=")).removeprefix("-runs="))

    def take(data: bytes) -> None:
        target.take(data)
        if target.number == runs:
            print(json.dumps(target.seen), flush=True)

    atheris.Setup(sys.argv, take)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
