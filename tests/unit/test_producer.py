"""The producer: what it posts, what it prints, and how it waits."""

import json
import re
import signal
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from in_process import Ended, failing, noted_posts, run_command
from support import REQUESTS, RESPONSES

from claim_queues import JSON, Message, PostIncomplete, QueueUnavailable
from claim_queues.sqlite import SqliteQueues
from widget_producer import cli, random_ids

Use = Callable[..., None]
KNOWN = "31f37378-54f4-11e5-ad75-3c970e65f731"


def produce(*options: object, stdin: bytes = b"") -> Ended:
    return run_command(cli, *options, stdin=stdin)


def posted(queues: SqliteQueues, queue: str = REQUESTS) -> list[tuple[str, JSON]]:
    return [(message.id, message.body) for message in queues.browse(queue, limit=1_000_000)[0]]


def ids_of(ended: Ended) -> list[str]:
    """The widget ids in the lines for programs."""
    return [line.split()[1] for line in ended.lines]


def answer(request_id: str, outcome: str = "created", **more: JSON) -> dict[str, JSON]:
    return {"version": 1, "request_id": request_id, "outcome": outcome, "reason": None, **more}


def created(ids: Sequence[str]) -> list[JSON]:
    return [answer(id_) for id_ in ids]


def answering(respond: Callable[[Sequence[str]], Sequence[JSON]] = created) -> type[SqliteQueues]:
    """Queues that have these responses as soon as requests are stored. respond: makes them of the requests' ids."""

    class Answering(SqliteQueues):
        def post(self, queue: str, bodies: Any, **options: Any) -> list[str]:
            ids = super().post(queue, bodies, **options)
            super().post(RESPONSES, respond(ids))
            return ids

    return Answering


# Random ids


def test_random_ids_are_different_within_a_burst_and_tell_nothing_of_this_machine() -> None:
    found = [uuid.UUID(text) for text in [*random_ids(50_000), *random_ids(50_000)]]
    assert len(set(found)) == 100_000
    assert {(id_.version, id_.variant) for id_ in found} == {(1, uuid.RFC_4122)}
    assert len({id_.node for id_ in found}) == 2  # two processes have different ones
    assert all(id_.node >> 40 & 1 for id_ in found)  # RFC 9562, 6.10: no network card has this bit


# What is posted and printed


def test_each_widget_id_becomes_a_request_and_a_line_with_its_message_id(queues: SqliteQueues) -> None:
    ended = produce("--widget-id", KNOWN, "--widget-id", "this_is_not_a_valid_widget_id")
    (first, first_body), (second, second_body) = posted(queues)
    assert ended == Ended(0, f"{first} {KNOWN}\n{second} this_is_not_a_valid_widget_id\n", "")
    assert (first_body, second_body) == ({"widget_id": KNOWN}, {"widget_id": "this_is_not_a_valid_widget_id"})


def test_count_posts_so_many_random_ids_in_batches_that_the_service_takes(queues: SqliteQueues, use: Use) -> None:
    use(post_limit=10)
    with noted_posts() as post:
        ended = produce("--count", 25)
    assert [len(call.args[2]) for call in post.call_args_list] == [10, 10, 5]
    assert ended.lines == [f"{message_id} {body['widget_id']}" for message_id, body in posted(queues)]
    assert {uuid.UUID(body["widget_id"]).version for _, body in posted(queues)} == {1}


def test_without_an_id_one_random_one_is_requested(queues: SqliteQueues) -> None:
    _, widget_id = produce().out.split()
    assert [body for _, body in posted(queues)] == [{"widget_id": str(uuid.UUID(widget_id))}]


def test_json_prints_one_object_a_line(queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDGET_JSON", "1")
    ended = produce("--widget-id", "ü\n")
    assert json.loads(ended.out) == {"message_id": posted(queues)[0][0], "widget_id": "ü\n"}


def test_no_id_can_break_its_line_or_steer_the_terminal(queues: SqliteQueues, use: Use) -> None:
    class Odd(SqliteQueues):
        def post(self, queue: str, bodies: Any, **options: Any) -> list[str]:
            return [f"m\n{id_}" for id_ in super().post(queue, bodies, **options)]

    use(Odd)
    ended = produce("--widget-id", "a\nb\x1b[31m\u202e")
    assert ended.lines == [f"m\\n{posted(queues)[0][0]} a\\nb\\x1b[31m\\u202e"]
    assert posted(queues)[0][1] == {"widget_id": "a\nb\x1b[31m\u202e"}


def test_a_request_lives_for_its_ttl_or_an_hour_where_the_service_has_one_for_each_message(use: Use) -> None:
    with noted_posts() as post:
        produce("--ttl", 60)
        produce()
        use(has_message_ttl=False)
        produce()
    assert [call.kwargs["ttl"] for call in post.call_args_list] == [60, 3600, None]


def test_ids_come_line_by_line_from_stdin_or_a_file(queues: SqliteQueues, tmp_path: Path) -> None:
    text = "\ufeffone\r\n\n  \n two ü\nthree".encode()
    (tmp_path / "ids").write_bytes(text)
    assert (produce("--ids-file", "-", stdin=text).code, produce("--ids-file", tmp_path / "ids").code) == (0, 0)
    assert [body["widget_id"] for _, body in posted(queues)] == ["one", " two ü", "three"] * 2


@pytest.mark.parametrize(("stdin", "number"), [(b"\x00\x80", 1), (b"fine\nfine\ncaf\xe9\n", 3)])
def test_what_is_no_text_is_refused_with_its_line_and_nothing_is_posted(
    queues: SqliteQueues, stdin: bytes, number: int
) -> None:
    refused = Ended(2, "", f"error: --ids-file, line {number}: is not UTF-8 text\n")
    assert produce("--ids-file", "-", stdin=stdin) == refused
    assert posted(queues) == []


def test_the_largest_request_has_64_kibibytes_and_an_endless_line_is_not_read_to_its_end(queues: SqliteQueues) -> None:
    room = 65_536 - len('{"widget_id": ""}')
    assert produce("--ids-file", "-", stdin=b"x" * room).code == 0
    ended = produce("--ids-file", "-", stdin=b"x" * (room + 1))
    assert (ended.code, "over 65,536 bytes" in ended.err, len(posted(queues))) == (2, True, 1)
    assert produce("--ids-file", "/dev/zero").code == 2


def test_the_first_request_makes_the_file_of_the_embedded_queue_and_says_so() -> None:
    assert f"created missing queue queue={REQUESTS} at=sqlite:///" in produce("--count", 2).err
    assert produce("--count", 2).err == ""


# A post that ends half way

FOUR = [word for id_ in "abcd" for word in ("--widget-id", id_)]


class HalfWay(SqliteQueues):
    """Of four bodies the service takes the first, refuses the second, and says nothing of the others."""

    def post(self, queue: str, bodies: Any, **options: Any) -> list[str]:
        (accepted,) = super().post(queue, bodies[:1], **options)
        raise PostIncomplete("half way", accepted={0: accepted}, refused={1: "too odd"}, unknown=[2, 3])


@pytest.mark.parametrize("is_waiting", [False, True])
def test_an_incomplete_post_names_what_is_stored_what_is_not_and_what_nobody_knows(
    queues: SqliteQueues, use: Use, is_waiting: bool
) -> None:
    use(HalfWay)
    ended = produce(*FOUR, *(["--wait"] if is_waiting else []))
    ((message_id, _),) = posted(queues)
    told = [f"no response yet: {message_id} a"] if is_waiting else []
    assert (ended.code, ended.lines) == (6, [] if is_waiting else [f"{message_id} a"])
    assert ended.err.splitlines() == [
        "not stored: b too odd",
        "perhaps stored: c",
        "perhaps stored: d",
        *told,
        "error: half way",
    ]


@pytest.mark.parametrize(
    ("stdin", "reason"),
    [(b"a\nb\nc\n", "gone away"), (b"a\nb\n\xff\n", "--ids-file, line 3: is not UTF-8 text")],
)
def test_a_failure_after_the_first_batch_leaves_a_partly_posted_input(
    queues: SqliteQueues, use: Use, stdin: bytes, reason: str
) -> None:
    class Failing(SqliteQueues):
        def post(self, queue: str, bodies: Any, **options: Any) -> list[str]:
            if {"widget_id": "c"} in bodies:
                raise QueueUnavailable("gone away")
            return super().post(queue, bodies, **options)

    use(Failing, post_limit=2)
    ended = produce("--ids-file", "-", stdin=stdin)
    assert ids_of(ended) == ["a", "b"]
    assert (ended.code, ended.err) == (6, f"error: stored the first 2 requests and no more: {reason}\n")
    assert len(posted(queues)) == 2


def test_a_service_that_fails_at_once_is_exit_1(queues: SqliteQueues, use: Use) -> None:
    use(failing(post=QueueUnavailable("gone away")))
    assert produce() == Ended(1, "", "error: gone away\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_posting_names_what_is_perhaps_stored(
    queues: SqliteQueues, use: Use, number: int, code: int
) -> None:
    class Interrupted(SqliteQueues):
        def post(self, queue: str, bodies: Any, **options: Any) -> list[str]:
            ids = super().post(queue, bodies, **options)
            if {"widget_id": "c"} in bodies:
                signal.raise_signal(number)
            return ids

    use(Interrupted, post_limit=2)
    ended = produce(*FOUR)
    assert ids_of(ended) == ["a", "b"]
    assert ended.code == code
    assert ended.err.split("\n")[:2] == ["perhaps stored: c", "perhaps stored: d"]


# Waiting


def test_wait_prints_each_outcome_with_its_reason_and_deletes_only_these_responses(
    queues: SqliteQueues, use: Use
) -> None:
    strangers = [
        answer("another's"),
        "no object",
        {},
        {"request_id": ["a"], "outcome": "created"},
        {"request_id": "a", "outcome": 7},
    ]
    use(answering(lambda ids: [*strangers, answer(ids[1], "rejected", reason="bad\nid"), answer(ids[0])]))
    ended = produce("--wait", "--widget-id", KNOWN, "--widget-id", "bad")
    assert ended == Ended(1, f"bad rejected bad\\nid\n{KNOWN} created\n", "")
    assert [body for _, body in posted(queues, RESPONSES)] == strangers


def test_wait_finds_its_responses_behind_many_others_and_ends_with_0_when_all_are_created(
    queues: SqliteQueues, use: Use
) -> None:
    for _ in range(3):
        queues.post(RESPONSES, [answer("another's")] * 1000)
    use(answering())
    ended = produce("--wait", "--count", 50)
    assert (ended.code, len(ended.lines), ended.err) == (0, 50, "")
    assert len(posted(queues, RESPONSES)) == 3000


def test_wait_with_json_prints_the_responses(queues: SqliteQueues, use: Use) -> None:
    use(answering(lambda ids: [answer(ids[0], "failed", status=500)]))
    ended = produce("--wait", "--json")
    assert ended.code == 1
    assert json.loads(ended.out) == answer(posted(queues)[0][0], "failed", status=500)


def test_a_repeated_response_is_printed_once_and_deleted(queues: SqliteQueues, use: Use) -> None:
    use(answering(lambda ids: [*[answer(ids[0])] * 30, answer(ids[1])]))
    assert produce("--wait", "--widget-id", "", "--widget-id", "b") == Ended(0, " created\nb created\n", "")
    assert posted(queues, RESPONSES) == []


def test_an_unknown_outcome_is_no_success(queues: SqliteQueues, use: Use) -> None:
    use(answering(lambda ids: [answer(ids[0], "lost-in-space")]))
    assert produce("--wait", "--widget-id", "a") == Ended(1, "a lost-in-space\n", "")


def test_a_timeout_is_exit_3_and_names_what_has_no_response(queues: SqliteQueues, use: Use) -> None:
    use(answering(lambda ids: [answer(ids[0])]))
    ended = produce("--wait", "--timeout", 0.1, "--widget-id", "a", "--widget-id", "b")
    assert (ended.code, ended.out) == (3, "a created\n")
    assert ended.err.splitlines() == [
        f"no response yet: {posted(queues)[1][0]} b",
        "error: 1 without a response after 0.1 s, still queued: is a consumer running?",
    ]


def test_a_wait_in_vain_says_once_what_it_waits_for(queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widget_producer.HINT_AFTER_S", 0)
    ended = produce("--wait", "--timeout", 2, "--widget-id", "a", "--widget-id", "b")
    first, *rest = ended.err.splitlines()
    assert re.fullmatch(f"no response yet in {RESPONSES}: is a consumer running\\? Waiting up to \\d s more", first)
    assert [line for line in rest if "Waiting" in line] == []


def test_the_wait_outlives_a_queue_service_that_is_away_for_a_moment(queues: SqliteQueues, use: Use) -> None:
    failures = iter([QueueUnavailable("away")])

    class Shaky(answering()):
        def browse(self, queue: str, **options: Any) -> tuple[list[Message], str]:
            for failure in failures:
                raise failure
            return super().browse(queue, **options)

        def delete(self, queue: str, ids: Sequence[str]) -> None:
            raise QueueUnavailable("away again")

    use(Shaky)
    assert produce("--wait", "--widget-id", "a") == Ended(0, "a created\n", "")
