"""The producer: what it posts, what it prints, and how it waits."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from in_process import Ended, call
from support import HERE, Script, run_script, wait_until

import widget_producer
from claim_queues import JSON, Page, PostIncomplete, QueueUnavailable, open_queues
from claim_queues.sqlite import LIMITS, SqliteQueues

REQUESTS, RESPONSES = "itchy-octo-chainsaw-request", "itchy-octo-chainsaw-response"
KNOWN = "31f37378-54f4-11e5-ad75-3c970e65f731"


@pytest.fixture
def queues(tmp_path: Path) -> Iterator[SqliteQueues]:
    """The queue file of this user, which the scripts take when they are told nothing."""
    with open_queues() as found:
        assert isinstance(found, SqliteQueues)
        yield found


NOTHING = "the file holds no id: nothing submitted\n"


def produce(*options: object, stdin: bytes = b"") -> Ended:
    return call(widget_producer.main, *options, stdin=stdin)


def posted(queues: SqliteQueues, queue: str = REQUESTS) -> list[tuple[str, JSON]]:
    return [(message.id, message.body) for message in queues.browse(queue, limit=1_000_000).messages]


def answer(request_id: str, outcome: str = "created", **more: JSON) -> dict[str, JSON]:
    return {"version": 1, "request_id": request_id, "outcome": outcome, "reason": None, **more}


Respond = Callable[[SqliteQueues, Sequence[str]], Sequence[JSON]]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, queues: SqliteQueues) -> Callable[[Respond], None]:
    """Have responses on the queue as soon as requests are stored: those that the given function makes of their ids."""

    def install(respond: Respond) -> None:
        class Answering(SqliteQueues):
            def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
                ids = super().post(queue, bodies, ttl=ttl)
                super().post(RESPONSES, respond(self, ids))
                return ids

        use(monkeypatch, queues, Answering)

    return install


def use(monkeypatch: pytest.MonkeyPatch, queues: SqliteQueues, kind: type[SqliteQueues]) -> None:
    """Let the producer open the queue file as this kind of queues."""
    path = Path(queues.address.removeprefix("sqlite:///"))
    monkeypatch.setattr(widget_producer, "open_queues", lambda url: kind(path))


def small_batches(monkeypatch: pytest.MonkeyPatch, queues: SqliteQueues, size: int) -> None:
    class SmallBatches(SqliteQueues):
        limits = _limits(post_batch=size)

    use(monkeypatch, queues, SmallBatches)


def _limits(**changes: Any) -> Any:
    from dataclasses import replace

    return replace(LIMITS, **changes)


# What is posted and printed


def test_each_widget_id_becomes_a_request_and_a_line_with_its_message_id(queues: SqliteQueues) -> None:
    ended = produce("--widget-id", KNOWN, "--widget-id", "this_is_not_a_valid_widget_id")
    (first, first_body), (second, second_body) = posted(queues)
    assert ended == Ended(0, f"{first} {KNOWN}\n{second} this_is_not_a_valid_widget_id\n", "")
    assert (first_body, second_body) == ({"widget_id": KNOWN}, {"widget_id": "this_is_not_a_valid_widget_id"})


def test_without_an_id_a_random_version_1_uuid_is_requested(queues: SqliteQueues) -> None:
    _, widget_id = produce().out.split()
    assert uuid.UUID(widget_id).version == 1


def test_count_makes_so_many_different_ids_version_1(queues: SqliteQueues) -> None:
    ended = produce("--count", 2_345)
    ids = {body["widget_id"] for _, body in posted(queues)}
    assert len(ids) == 2_345
    assert {uuid.UUID(id_).version for id_ in ids} == {1}
    assert ended.lines == [f"{message_id} {body['widget_id']}" for message_id, body in posted(queues)]


def test_json_prints_one_object_a_line(queues: SqliteQueues) -> None:
    ended = produce("--json", "--widget-id", "ü\n")
    assert json.loads(ended.out) == {"message_id": posted(queues)[0][0], "widget_id": "ü\n"}


def test_an_id_cannot_break_its_line_or_steer_the_terminal(queues: SqliteQueues) -> None:
    ended = produce("--widget-id", "a\nb\x1b[31m\u202e")
    assert ended.lines == [f"{posted(queues)[0][0]} a\\nb\\x1b[31m\\u202e"]
    assert posted(queues)[0][1] == {"widget_id": "a\nb\x1b[31m\u202e"}


def test_ttl_is_the_life_of_the_request(queues: SqliteQueues) -> None:
    produce("--ttl", 60)
    produce()
    assert [message.ttl for message in queues.browse(REQUESTS).messages] == [60, 3600]


def test_ids_come_line_by_line_from_stdin(queues: SqliteQueues) -> None:
    ended = produce("--ids-file", "-", stdin="\ufeffone\r\n\n  \n two ü\nthree".encode())
    assert [body["widget_id"] for _, body in posted(queues)] == ["one", " two ü", "three"]
    assert ended.code == 0


def test_ids_come_from_a_file(queues: SqliteQueues, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("one\ntwo\n")
    assert produce("--ids-file", tmp_path / "ids").code == 0
    assert [body["widget_id"] for _, body in posted(queues)] == ["one", "two"]


def test_an_empty_file_posts_nothing_and_is_no_error(queues: SqliteQueues) -> None:
    assert produce("--ids-file", "-") == Ended(0, "", NOTHING)
    assert produce("--ids-file", "-", "--wait", stdin=b"\n\n") == Ended(0, "", NOTHING)
    assert posted(queues) == []


def test_options_come_from_the_environment_too(queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COUNT": "3", "TTL": "61", "JSON": "1", "REQUEST_QUEUE": "other"}.items():
        monkeypatch.setenv(f"WIDGET_{name}", value)
    ended = produce()
    assert [message.ttl for message in queues.browse("other").messages] == [61, 61, 61]
    assert [json.loads(line)["message_id"] for line in ended.lines] == [id_ for id_, _ in posted(queues, "other")]


# What cannot be sent


@pytest.mark.parametrize("stdin", [b"\xff\xfe", b"fine\n\xc3\n"])
def test_what_is_no_text_is_refused_with_its_line_and_nothing_is_posted(queues: SqliteQueues, stdin: bytes) -> None:
    ended = produce("--ids-file", "-", stdin=stdin)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: --ids-file, line {stdin.count(b'fine') + 1}: is no UTF-8 text\n"
    assert posted(queues) == []


def test_an_argument_that_is_no_utf_8_is_refused_and_shown_escaped(queues: SqliteQueues) -> None:
    ended = produce("--widget-id", "a\udcff")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        "error: widget id a\\udcff: is no UTF-8 text: set a locale of UTF-8, such as LC_ALL=C.UTF-8,"
        " or use --ids-file with a file in UTF-8\n"
    )
    assert posted(queues) == []


def test_the_largest_request_has_64_kibibytes(queues: SqliteQueues) -> None:
    room = 65_536 - len('{"widget_id": ""}')
    assert produce("--ids-file", "-", stdin=b"x" * room).code == 0
    ended = produce("--ids-file", "-", stdin=b"x" * (room + 1))
    assert ended.code == 2
    assert "over 65,536 bytes" in ended.err
    assert len(posted(queues)) == 1


def test_a_file_without_line_ends_is_not_read_to_its_end(queues: SqliteQueues) -> None:
    assert produce("--ids-file", "/dev/zero").code == 2


def test_unreadable_ids_after_the_first_batch_leave_a_partly_posted_input(
    queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch, queues, 2)
    ended = produce("--ids-file", "-", stdin=b"a\nb\nc\n\xff\n")
    assert [line.split()[1] for line in ended.lines] == ["a", "b"]
    assert ended.code == 6
    assert ended.err == "error: stored the first 2 requests and no more: --ids-file, line 4: is no UTF-8 text\n"
    assert len(posted(queues)) == 2


# A post that ends half way


class HalfWay(SqliteQueues):
    """Of four bodies the service takes the first, refuses the second, and says nothing of the others."""

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        (accepted,) = super().post(queue, bodies[:1], ttl=ttl)
        raise PostIncomplete("half way", accepted={0: accepted}, refused={1: "too odd"}, unknown=[2, 3])


FOUR = [word for id_ in "abcd" for word in ("--widget-id", id_)]


def test_an_incomplete_post_names_what_is_stored_what_is_not_and_what_nobody_knows(
    queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, queues, HalfWay)
    ended = produce(*FOUR)
    ((message_id, _),) = posted(queues)
    assert ended.code == 6
    assert ended.lines == [f"{message_id} a"]
    assert ended.err.splitlines() == [
        "not stored: b too odd",
        "perhaps stored: c",
        "perhaps stored: d",
        "error: half way",
    ]


def test_an_incomplete_post_with_wait_names_what_is_stored_on_stderr(
    queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, queues, HalfWay)
    ended = produce("--wait", *FOUR)
    ((message_id, _),) = posted(queues)
    assert (ended.code, ended.out) == (6, "")
    assert f"no response yet: {message_id} a" in ended.err.splitlines()
    assert "not stored: b too odd" in ended.err.splitlines()


def test_a_service_that_fails_after_the_first_batch_leaves_a_partly_posted_input(
    queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(SqliteQueues):
        limits = _limits(post_batch=2)

        def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
            if {"widget_id": "c"} in bodies:
                raise QueueUnavailable("gone away")
            return super().post(queue, bodies, ttl=ttl)

    use(monkeypatch, queues, Failing)
    ended = produce(*FOUR)
    assert [line.split()[1] for line in ended.lines] == ["a", "b"]
    assert (ended.code, ended.err) == (6, "error: stored the first 2 requests and no more: gone away\n")
    assert produce("--widget-id", "c") == Ended(1, "", "error: gone away\n")


# Waiting


def test_wait_prints_each_outcome_with_its_reason_and_deletes_only_these_responses(
    queues: SqliteQueues, answered: Callable[[Respond], None]
) -> None:
    strangers = [
        answer("another's"),
        "no object",
        {},
        {"request_id": ["a"], "outcome": "created"},
        {"request_id": "a", "outcome": 7},
    ]
    answered(lambda _, ids: [*strangers, answer(ids[1], "rejected", reason="bad\nid"), answer(ids[0])])
    ended = produce("--wait", "--widget-id", KNOWN, "--widget-id", "bad")
    assert ended == Ended(1, f"bad rejected bad\\nid\n{KNOWN} created\n", "")
    assert [body for _, body in posted(queues, RESPONSES)] == strangers


def test_wait_ends_with_0_when_all_are_created(queues: SqliteQueues, answered: Callable[[Respond], None]) -> None:
    answered(lambda _, ids: [answer(id_) for id_ in ids])
    ended = produce("--wait", "--count", 50)
    assert (ended.code, len(ended.lines), ended.err) == (0, 50, "")
    assert posted(queues, RESPONSES) == []


def test_wait_with_json_prints_the_responses(queues: SqliteQueues, answered: Callable[[Respond], None]) -> None:
    answered(lambda _, ids: [answer(ids[0], "failed", status=500)])
    ended = produce("--wait", "--json")
    assert ended.code == 1
    assert json.loads(ended.out) == answer(posted(queues)[0][0], "failed", status=500)


def test_a_repeated_response_is_printed_once_and_deleted(
    queues: SqliteQueues, answered: Callable[[Respond], None]
) -> None:
    answered(lambda _, ids: [*[answer(ids[0])] * 30, answer(ids[1])])
    ended = produce("--wait", "--widget-id", "a", "--widget-id", "b")
    assert ended == Ended(0, "a created\nb created\n", "")
    assert posted(queues, RESPONSES) == []


def test_an_unknown_outcome_is_no_success(queues: SqliteQueues, answered: Callable[[Respond], None]) -> None:
    answered(lambda _, ids: [answer(ids[0], "lost-in-space")])
    assert produce("--wait", "--widget-id", "a") == Ended(1, "a lost-in-space\n", "")


def test_older_responses_are_not_looked_at(queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch) -> None:
    queues.post(RESPONSES, [answer("another's")] * 5)
    browsed: list[str] = []

    class Watched(SqliteQueues):
        def browse(self, queue: str, **options: Any) -> Page:
            page = super().browse(queue, **options)
            browsed.extend(message.id for message in page.messages)
            return page

        def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
            ids = super().post(queue, bodies, ttl=ttl)
            super().post(RESPONSES, [answer(ids[0])])
            return ids

    use(monkeypatch, queues, Watched)
    assert produce("--wait").code == 0
    assert len(browsed) == 1


def test_a_timeout_is_exit_3_and_names_what_has_no_response(
    queues: SqliteQueues, answered: Callable[[Respond], None]
) -> None:
    answered(lambda _, ids: [answer(ids[0])])
    ended = produce("--wait", "--timeout", 0.1, "--widget-id", "a", "--widget-id", "b")
    assert (ended.code, ended.out) == (3, "a created\n")
    assert ended.err.splitlines() == [
        f"no response yet: {posted(queues)[1][0]} b",
        "error: 1 without a response after 0.1 s",
    ]


def test_the_wait_outlives_a_queue_service_that_is_away_for_a_moment(
    queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([QueueUnavailable("away")] * 2)

    class Shaky(SqliteQueues):
        def browse(self, queue: str, **options: Any) -> Page:
            for failure in failures:
                raise failure
            return super().browse(queue, **options)

        def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
            ids = super().post(queue, bodies, ttl=ttl)
            super().post(RESPONSES, [answer(ids[0])])
            return ids

        def delete(self, queue: str, ids: Sequence[str]) -> None:
            raise QueueUnavailable("away again")

    use(monkeypatch, queues, Shaky)
    monkeypatch.setattr(widget_producer, "RETRY_LOOK_S", 0.001)
    assert produce("--wait", "--widget-id", "a") == Ended(0, "a created\n", "")


def test_a_request_that_is_posted_twice_waits_for_both(
    queues: SqliteQueues, answered: Callable[[Respond], None]
) -> None:
    answered(lambda _, ids: [answer(id_) for id_ in ids])
    assert produce("--wait", "--widget-id", "a", "--widget-id", "a") == Ended(0, "a created\na created\n", "")


# What this service or this command line cannot do


def test_wait_is_refused_where_the_service_cannot_browse(queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(SqliteQueues):
        limits = _limits(can_browse=False, service="Blind")

    use(monkeypatch, queues, Blind)
    assert produce("--wait") == Ended(2, "", "error: --wait: Blind cannot look for one response among others\n")
    assert posted(queues) == []


def test_a_ttl_that_the_service_cannot_honour_is_refused_unless_it_is_the_default(
    queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneLife(SqliteQueues):
        limits = _limits(message_ttl=None, service="OneLife")

    use(monkeypatch, queues, OneLife)
    refusal = "error: --ttl: OneLife has one message TTL for the whole queue\n"
    assert produce("--ttl", 3600) == Ended(2, "", refusal)
    assert produce().code == 0
    monkeypatch.setenv("WIDGET_TTL", "3600")
    assert produce().err == refusal
    assert [message.ttl for message in queues.browse(REQUESTS).messages] == [None]


def test_a_missing_queue_is_an_error_unless_create_is_given(
    queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    class Strict(SqliteQueues):
        def exists(self, queue: str) -> bool:
            return queue in made

        def create(self, queue: str) -> None:
            made.append(queue)

    use(monkeypatch, queues, Strict)
    ended = produce()
    assert ended.code == 1
    assert ended.err == f"error: queue {REQUESTS} does not exist at {queues.address}: create it with --create\n"
    assert produce("--create").code == 0
    assert made == [REQUESTS]
    assert produce("--create", "--wait", "--timeout", 0.1).code == 3
    assert made[-1] == RESPONSES


# The terminal, a broken stdout, Ctrl-C: real processes


def test_a_full_stdout_is_exit_1_and_what_is_stored_stands_on_stderr(queues: SqliteQueues, tmp_path: Path) -> None:
    code, err = produce_into("/dev/full", tmp_path, "--count", 2_500)
    assert code == 1
    stored = [f"{message_id} {body['widget_id']}" for message_id, body in posted(queues)]
    assert err.splitlines() == [*stored, "error: stdout: No space left on device: stopped after what stands above"]


def test_a_pipe_that_is_closed_early_loses_no_id_and_prints_no_traceback(queues: SqliteQueues, tmp_path: Path) -> None:
    shell = f'"{sys.executable}" "{HERE}/widget_producer.py" --count 5000 2>errors | head -1'
    out = subprocess.run(["/bin/sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    errors = (tmp_path / "errors").read_text().splitlines()
    ids = [message_id for message_id, _ in posted(queues)]
    assert out.split()[0] == ids[0]
    assert errors.pop() == "error: stdout: Broken pipe: stopped after what stands above"
    assert [line.split()[0] for line in errors] == ids[-len(errors) :]


def test_a_closed_stdin_is_an_empty_one(queues: SqliteQueues, tmp_path: Path) -> None:
    shell = f'"{sys.executable}" "{HERE}/widget_producer.py" --ids-file - <&-'
    ended = subprocess.run(["/bin/sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", NOTHING)


def test_ctrl_c_while_waiting_is_one_line_and_130(queues: SqliteQueues, tmp_path: Path) -> None:
    running = Script("widget_producer.py", "--wait", "--widget-id", "a", cwd=tmp_path)
    ((message_id, _),) = wait_until(lambda: posted(queues))
    running.signal(signal.SIGINT)
    assert running.exit_code() == 130
    assert running.err.split("\n") == [f"no response yet: {message_id} a", "", "error: interrupted", ""]


def test_ctrl_c_while_posting_waits_until_what_is_stored_is_printed(
    queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(SqliteQueues):
        limits = _limits(post_batch=2)

        def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
            ids = super().post(queue, bodies, ttl=ttl)
            signal.raise_signal(signal.SIGINT)
            return ids

    use(monkeypatch, queues, Interrupted)
    ended = produce("--count", 4)
    assert [line.split()[0] for line in ended.lines] == [message_id for message_id, _ in posted(queues)]
    assert len(ended.lines) == 2
    assert (ended.code, ended.err.strip()) == (130, "error: interrupted")


def test_a_second_ctrl_c_does_not_wait_for_a_post(queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(SqliteQueues):
        def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second signal did not end the post")

    use(monkeypatch, queues, Impatient)
    assert produce().code == 130


def test_a_terminal_shows_a_bar_with_rate_and_time_left_and_a_file_does_not(
    queues: SqliteQueues, tmp_path: Path
) -> None:
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    running = subprocess.Popen(
        [sys.executable, str(HERE / "widget_producer.py"), "--count", "20000"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=side,
    )
    os.close(side)
    shown = read_all(terminal)
    assert running.wait() == 0
    assert "/20000 [" in shown
    assert " requests/s]" in shown
    assert run_script("widget_producer.py", "--count", 1_500, cwd=tmp_path).stderr == ""


def produce_into(stdout: str, cwd: Path, *options: object) -> tuple[int, str]:
    with Path(stdout).open("wb") as out:
        ended = subprocess.run(
            [sys.executable, str(HERE / "widget_producer.py"), *map(str, options)],
            cwd=cwd,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    return ended.returncode, ended.stderr


def read_all(terminal: int) -> str:
    """Everything written to a terminal until its other side is closed."""
    found = b""
    try:
        while chunk := os.read(terminal, 65_536):
            found += chunk
    except OSError:  # so Linux says that nobody holds the other side any more
        pass
    os.close(terminal)
    return found.decode()


def test_a_timeout_without_wait_is_refused(queues: SqliteQueues) -> None:
    ended = produce("--timeout", 5)
    assert (ended.code, "--timeout" in ended.err) == (2, True)
    assert posted(queues) == []
