"""The operator's tool: stats, peek, dead-letters, redrive, purge and check."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import Ended, call
from support import HERE

import claim_queues.__main__
from claim_queues import (
    JSON,
    Claim,
    CredentialsError,
    Message,
    PostIncomplete,
    Queues,
    QueueUnavailable,
    Settled,
    Settlement,
    StoreError,
    open_queues,
)
from claim_queues.sqlite import LIMITS, SqliteQueues

REQUESTS, RESPONSES, LETTERS = (f"itchy-octo-chainsaw-{kind}" for kind in ("request", "response", "dead-letter"))


@pytest.fixture
def queues() -> Iterator[Queues]:
    """The queue file of this user, which the tool takes when it is told nothing."""
    with open_queues() as found:
        yield found


@pytest.fixture
def use(queues: Queues, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the tool open the queue file as another kind of queues, or with other limits."""

    def install(kind: type[SqliteQueues] = SqliteQueues, **limits: Any) -> None:
        path = Path(queues.address.removeprefix("sqlite:///"))
        kind = type("Other", (kind,), {"limits": replace(LIMITS, **limits)})
        monkeypatch.setattr(claim_queues.__main__, "open_queues", lambda url: kind(path))

    return install


def tool(*options: object) -> Ended:
    return call(claim_queues.__main__.main, *options)


def letter(number: int) -> dict[str, JSON]:
    return {
        "version": 1,
        "request_id": f"old-{number}",
        "body": {"widget_id": f"w{number}", "colour": "red"},
        "reason": "HTTP 500",
        "receive_count": 5,
    }


def bodies(queues: Queues, queue: str) -> list[JSON]:
    return [message.body for message in queues.browse(queue, limit=1_000_000, claimed=True).messages]


def take(queues: Queues, queue: str, limit: int = 1) -> Claim:
    claim = queues.claim(queue, ttl=60, grace=60, limit=limit)
    assert claim
    return claim


# stats


def test_stats_counts_free_claimed_and_delayed_messages(queues: Queues) -> None:
    queues.post(REQUESTS, [1, 2, 3, 4])
    take(queues, REQUESTS, 2)
    queues.release(take(queues, REQUESTS), delay=60)
    ended = tool("stats")
    assert ended.code == 0
    heading, requests, responses, letters = (line.split() for line in ended.lines)
    assert heading == ["queue", "free", "claimed", "delayed", "total", "oldest"]
    assert requests[:5] == [REQUESTS, "1", "2", "1", "4"]
    assert responses == [RESPONSES, "0", "0", "0", "0", "-"]
    assert letters[0] == LETTERS


def test_stats_as_json_has_a_line_for_each_queue(queues: Queues) -> None:
    queues.post(REQUESTS, [1])
    lines = [json.loads(line) for line in tool("stats", "--json").lines]
    assert [(line["queue"], line["total"], line["free"]) for line in lines] == [
        (REQUESTS, 1, 1),
        (RESPONSES, 0, 0),
        (LETTERS, 0, 0),
    ]
    assert lines[1]["oldest_age"] is None


# peek


def test_peek_shows_the_oldest_ten_without_claiming_them(queues: Queues) -> None:
    ids = queues.post(REQUESTS, [{"widget_id": str(number)} for number in range(12)])
    take(queues, REQUESTS)
    ended = tool("peek")
    assert [line.split()[0] for line in ended.lines] == ids[:10]
    assert ended.lines[0] == f'{ids[0]} 0s 1 {{"widget_id": "0"}}'
    assert queues.stats(REQUESTS).claimed == 1


def test_peek_shows_as_many_as_asked_for_of_the_queue_asked_for(queues: Queues) -> None:
    queues.post(RESPONSES, list(range(50)))
    assert [line.split()[3] for line in tool("peek", "response", "--limit", 30).lines] == list(map(str, range(30)))
    assert len(tool("peek", "response", "--limit", 99).lines) == 50
    assert tool("peek", "dead-letter").out == ""


def test_peek_as_json_shows_the_whole_message(queues: Queues) -> None:
    (id_,) = queues.post(REQUESTS, [{"widget_id": "x" * 1000}], ttl=60)
    (line,) = tool("peek", "--json").lines
    shown = json.loads(line)
    assert shown.pop("age") < 60
    assert shown == {"id": id_, "body": {"widget_id": "x" * 1000}, "ttl": 60, "receive_count": 0}


def test_peek_says_when_the_service_does_not_count_receives(queues: Queues, use: Callable[..., None]) -> None:
    class Uncounted(SqliteQueues):
        def browse(self, queue: str, **options: Any) -> Any:
            page = super().browse(queue, **options)
            return replace(page, messages=tuple(message._replace(receive_count=None) for message in page.messages))

    queues.post(REQUESTS, [1])
    use(Uncounted)
    assert tool("peek").out.split()[2] == "-"


@pytest.mark.parametrize("command", [["peek"], ["dead-letters"], ["redrive", "--dry-run"]])
def test_looking_is_refused_with_the_reason_where_the_service_cannot(
    command: list[str], use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(can_browse=False, service="Blind")
    monkeypatch.setattr(SqliteQueues, "exists", lambda self, queue: False)  # nobody makes a queue for this in vain
    assert tool(*command) == Ended(2, "", "error: Blind cannot show messages without claiming them\n")


# dead-letters


def test_dead_letters_shows_request_widget_receives_and_reason(queues: Queues) -> None:
    queues.post(LETTERS, [letter(1), letter(2) | {"body": "no request", "reason": "two\nlines"}, {"odd": 1}])
    assert tool("dead-letters").lines == [
        "old-1 w1 5 HTTP 500",
        "old-2 - 5 two\\nlines",
        '- - - no dead letter: {"odd": 1}',
    ]


def test_dead_letters_as_json_shows_all_that_is_known(queues: Queues) -> None:
    id_, _ = queues.post(LETTERS, [letter(1), letter(2)])
    assert [json.loads(line) for line in tool("dead-letters", "--json", "--limit", 1).lines] == [
        letter(1) | {"message_id": id_}
    ]


# redrive


def test_redrive_posts_the_original_bodies_in_order_and_deletes_the_letters(queues: Queues) -> None:
    queues.post(LETTERS, [letter(number) for number in range(45)])
    ended = tool("redrive")
    page = queues.browse(REQUESTS, limit=100)
    assert [message.body for message in page.messages] == [letter(number)["body"] for number in range(45)]
    assert ended.lines == [f"old-{number} {message.id}" for number, message in enumerate(page.messages)]
    assert (ended.code, queues.stats(LETTERS).total) == (0, 0)


def test_a_redriven_request_has_the_given_ttl_and_is_counted_anew(queues: Queues) -> None:
    queues.post(LETTERS, [letter(1)])
    tool("redrive", "--ttl", 61)
    (message,) = take(queues, REQUESTS).messages
    assert (message.ttl, message.receive_count) == (61, 1)


def test_redrive_takes_the_oldest_up_to_the_limit(queues: Queues) -> None:
    queues.post(LETTERS, [letter(number) for number in range(30)])
    assert [line.split()[0] for line in tool("redrive", "--limit", 25).lines] == [f"old-{n}" for n in range(25)]
    assert bodies(queues, LETTERS) == [letter(number) for number in range(25, 30)]


def test_a_dry_run_shows_what_would_be_brought_back_and_changes_nothing(queues: Queues) -> None:
    queues.post(LETTERS, [letter(0), {"odd": 1}, letter(1), letter(2)])
    take(queues, LETTERS)
    assert tool("redrive", "--dry-run", "--limit", 1) == Ended(0, "old-1 -\n", "")
    assert tool("redrive", "--dry-run") == Ended(0, "old-1 -\nold-2 -\n", "")
    assert queues.stats(REQUESTS).total == 0
    assert queues.stats(LETTERS).free == 3


def test_what_is_no_dead_letter_stays_and_is_free_again_afterwards(queues: Queues) -> None:
    strange = ["text", {"request_id": "x"}, {"body": 1}, {"body": 1, "request_id": 2}]
    queues.post(LETTERS, [*strange, letter(1), "more", letter(2)])
    ended = tool("redrive", "--limit", 2)
    assert [line.split()[0] for line in ended.lines] == ["old-1", "old-2"]
    assert ended.code == 1
    assert ended.err == "error: 5 messages are no dead letters of the consumer: left as they are\n"
    assert bodies(queues, LETTERS) == [*strange, "more"]
    assert queues.stats(LETTERS).free == 5


def test_a_letter_that_fails_again_meanwhile_does_not_go_round(queues: Queues, use: Callable[..., None]) -> None:
    class FailingAtOnce(SqliteQueues):
        def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
            super().post(LETTERS, [letter(9)] * len(bodies))
            return super().post(queue, bodies, ttl=ttl)

    queues.post(LETTERS, [letter(1), letter(2)])
    use(FailingAtOnce)
    assert [line.split()[0] for line in tool("redrive").lines] == ["old-1", "old-2"]


def test_a_redrive_that_outlasts_its_claims_brings_each_letter_back_once(
    queues: Queues, use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(SqliteQueues):
        """Half a claim's life lies between two claims."""

        ahead_s = 0

        def claim(self, queue: str, **options: Any) -> Claim | None:
            type(self).ahead_s += 30
            self._clock = lambda: 2_000_000_000 + self.ahead_s
            return super().claim(queue, **options)

    monkeypatch.setattr(claim_queues.__main__, "RENEW_EVERY_S", 0)
    queues.post(LETTERS, ["strange", *map(letter, range(100))])
    use(Slow)
    ended = tool("redrive")
    assert [line.split()[0] for line in ended.lines] == [f"old-{number}" for number in range(100)]
    assert ended.err.startswith("error: 1 messages are no dead letters")
    assert bodies(queues, REQUESTS) == [letter(number)["body"] for number in range(100)]
    assert bodies(queues, LETTERS) == ["strange"]


def test_a_letter_is_deleted_only_after_its_request_is_stored(queues: Queues, use: Callable[..., None]) -> None:
    class Full(SqliteQueues):
        def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
            raise StoreError("no space is left")

    queues.post(LETTERS, [letter(1), letter(2)])
    use(Full)
    assert tool("redrive") == Ended(5, "", "error: no space is left\n")
    assert bodies(queues, LETTERS) == [letter(1), letter(2)]
    assert queues.stats(LETTERS).free == 2


def test_a_redrive_that_breaks_between_post_and_delete_repeats_but_loses_nothing(
    queues: Queues, use: Callable[..., None]
) -> None:
    class Breaking(SqliteQueues):
        def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
            raise QueueUnavailable("gone")

    queues.post(LETTERS, [letter(1)])
    use(Breaking)
    assert tool("redrive").code == 1
    assert bodies(queues, LETTERS) == [letter(1)]
    assert bodies(queues, REQUESTS) == [letter(1)["body"]]


def test_a_post_that_ends_half_way_deletes_only_the_letters_whose_requests_are_stored(
    queues: Queues, use: Callable[..., None]
) -> None:
    class HalfWay(SqliteQueues):
        def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
            (accepted,) = super().post(queue, bodies[1:2], ttl=ttl)
            raise PostIncomplete("half way", accepted={1: accepted}, refused={0: "odd"}, unknown=[2])

    queues.post(LETTERS, [letter(0), letter(1), letter(2)])
    use(HalfWay)
    ended = tool("redrive")
    assert (ended.code, ended.err) == (6, "error: half way\n")
    assert [line.split()[0] for line in ended.lines] == ["old-1"]
    assert bodies(queues, LETTERS) == [letter(0), letter(2)]


def test_a_letter_that_another_took_meanwhile_is_told(queues: Queues, use: Callable[..., None]) -> None:
    class Late(SqliteQueues):
        def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
            self.release(claim)
            return super().settle(claim, settlements)

    queues.post(LETTERS, [letter(1)])
    use(Late)
    ended = tool("redrive")
    assert ended.code == 1
    assert ended.err == "error: 1 dead letters were brought back but not deleted: the claim had ended\n"
    assert bodies(queues, LETTERS) == [letter(1)]


def test_redrive_needs_two_queues(queues: Queues) -> None:
    assert tool("redrive", "--dead-letter-queue", REQUESTS).code == 2


def test_redrive_refuses_a_ttl_that_the_service_cannot_honour(queues: Queues, use: Callable[..., None]) -> None:
    use(message_ttl=None, service="OneLife")
    assert tool("redrive", "--ttl", 60).err == "error: --ttl: OneLife has one message TTL for the whole queue\n"
    assert tool("redrive").code == 0


def test_redrive_finds_what_a_claim_without_a_wait_overlooks(queues: Queues, use: Callable[..., None]) -> None:
    class Overlooking(SqliteQueues):
        def claim(self, queue: str, *, wait: float = 0, **options: Any) -> Claim | None:
            return super().claim(queue, wait=wait, **options) if wait else None

    queues.post(LETTERS, [letter(number) for number in range(45)])
    use(Overlooking)
    assert len(tool("redrive").lines) == 45


def test_redrive_waits_in_vain_once_at_most(queues: Queues, use: Callable[..., None]) -> None:
    in_vain = []

    class TakenMeanwhile(SqliteQueues):
        """Of four letters that stats saw another takes two."""

        def claim(self, queue: str, **options: Any) -> Claim | None:
            if self.stats(queue).free == 4:
                super().claim(queue, **options | {"limit": 2})
            found = super().claim(queue, **options | {"limit": 1, "wait": 0})
            in_vain.extend([options["wait"]] if found is None else [])
            return found

    queues.post(LETTERS, [letter(number) for number in range(4)])
    use(TakenMeanwhile)
    assert [line.split()[0] for line in tool("redrive").lines] == ["old-2", "old-3"]
    assert in_vain == [claim_queues.__main__.REDRIVE_WAIT_S]


def test_redrive_stops_when_others_take_the_letters(queues: Queues, use: Callable[..., None]) -> None:
    class Empty(SqliteQueues):
        def claim(self, queue: str, **options: Any) -> None:
            return None

    queues.post(LETTERS, [letter(1)])
    use(Empty)
    assert tool("redrive") == Ended(0, "", "")


# purge


def test_purge_removes_all_messages_of_one_queue(queues: Queues) -> None:
    queues.post(REQUESTS, [1, 2])
    queues.post(RESPONSES, [3])
    take(queues, REQUESTS)
    assert tool("purge", "request", "--yes") == Ended(0, f"{REQUESTS}: 2 messages removed\n", "")
    assert (queues.stats(REQUESTS).total, queues.stats(RESPONSES).total) == (0, 1)


def test_purge_without_a_terminal_to_ask_at_is_refused(queues: Queues) -> None:
    queues.post(REQUESTS, [1])
    ended = tool("purge", "request")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: purge of {REQUESTS}: there is no terminal to ask at; add --yes\n"
    assert queues.stats(REQUESTS).total == 1


@pytest.mark.parametrize(("reply", "code", "left"), [("n", 1, 1), ("", 1, 1), ("y", 0, 0)])
def test_purge_asks_at_a_terminal(queues: Queues, tmp_path: Path, reply: str, code: int, left: int) -> None:
    queues.post(REQUESTS, [1])
    terminal, side = pty.openpty()
    os.write(terminal, f"{reply}\n".encode())
    ended = subprocess.run(
        [sys.executable, "-m", "claim_queues", "purge", "request"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        stdin=side,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(side)
    os.close(terminal)
    assert ended.returncode == code
    assert f"Remove 1 messages from {REQUESTS}" in ended.stdout + ended.stderr
    assert queues.stats(REQUESTS).total == left


# check


def test_check_says_that_all_is_well(queues: Queues) -> None:
    ended = tool("check")
    assert ended.code == 0
    assert {line.split()[0] for line in ended.lines} == {"ok"}
    assert f"ok      the embedded queue opened: {queues.address}" in ended.lines
    assert "ok      credentials: none are needed" in ended.lines


@pytest.mark.parametrize(
    ("options", "failure"),
    [
        (["--deadline", "51", "--claim-ttl", "60"], "deadline 51 s: must be at most the claim TTL less 10 s"),
        (["--response-queue", REQUESTS], "the queues must differ"),
    ],
)
def test_check_fails_where_the_options_do_not_fit(queues: Queues, options: list[str], failure: str) -> None:
    ended = tool("check", *options)
    assert ended.code == 1
    assert any(line.startswith("failure") and failure in line for line in ended.lines)


def test_the_longest_deadline_is_the_claim_ttl_less_10_seconds(queues: Queues) -> None:
    assert tool("check", "--deadline", 50, "--claim-ttl", 60).code == 0


def test_check_asks_the_service_for_its_ranges(queues: Queues, use: Callable[..., None]) -> None:
    use(claim_ttl=claim_queues.Range(60, 100))
    assert "failure claim TTL 300: the embedded queue takes 60 to 100 seconds" in tool("check").lines


def test_check_says_what_the_service_cannot_do_and_what_would_surprise(
    queues: Queues, use: Callable[..., None]
) -> None:
    class Surprising(SqliteQueues):
        def inspect(self, queue: str) -> list[str]:
            return [f"{queue} has a receive limit"]

    lacking = dict.fromkeys(
        ["can_browse", "counts_receives", "releases_one_message", "fenced_delete", "atomic_settle"], False
    )
    use(Surprising, **lacking, grace=None, message_ttl=None)
    ended = tool("check")
    assert ended.code == 0
    warnings = [line for line in ended.lines if line.startswith("warning")]
    assert len(warnings) == 3 + 7
    assert f"warning {REQUESTS} has a receive limit" in warnings


def test_check_knows_no_grace_where_the_service_has_none(queues: Queues, use: Callable[..., None]) -> None:
    assert "ok      claim TTL 300 s and grace 60 s are in range" in tool("check").lines
    use(grace=None)
    assert "ok      claim TTL 300 s is in range" in tool("check").lines
    refused = tool("check", "--grace", 60)
    assert (refused.code, refused.err) == (2, "error: --grace: the embedded queue has no such thing\n")


@pytest.mark.parametrize(
    ("ahead_s", "line"),
    [
        (90.0, "warning this machine's clock is 90 s ahead of the service's: set it, by NTP for example"),
        (-90.0, "warning this machine's clock is 90 s behind the service's: set it, by NTP for example"),
        (1.2, "ok      this machine's clock and the service's agree"),
    ],
)
def test_check_compares_the_clocks_where_the_service_tells_its_own(
    queues: Queues, use: Callable[..., None], ahead_s: float, line: str
) -> None:
    assert "machine's clock" not in tool("check").out

    class Telling(SqliteQueues):
        def clock_ahead(self, queue: str) -> float:
            return ahead_s

    use(Telling)
    ended = tool("check")
    assert (ended.code, line in ended.lines) == (0, True)


def test_refused_credentials_are_exit_code_4(use: Callable[..., None]) -> None:
    class Refused(SqliteQueues):
        def exists(self, queue: str) -> bool:
            raise CredentialsError("who are you")

    use(Refused)
    ended = tool("check")
    assert (ended.code, ended.lines.count("failure who are you")) == (4, 3)


def test_check_goes_on_after_a_failure(queues: Queues, use: Callable[..., None]) -> None:
    class Damaged(SqliteQueues):
        def inspect(self, queue: str) -> list[str]:
            raise StoreError("is damaged")

    use(Damaged)
    ended = tool("check")
    assert ended.code == 1
    assert [line for line in ended.lines if line.startswith("failure")] == ["failure is damaged"] * 3
    assert any("deadline" in line for line in ended.lines)


# every command


@pytest.mark.parametrize(
    "command", [["stats"], ["peek"], ["dead-letters"], ["redrive"], ["purge", "dead-letter", "--yes"]]
)
def test_a_missing_queue_is_an_error_not_an_empty_queue(command: list[str], use: Callable[..., None]) -> None:
    class Missing(SqliteQueues):
        def exists(self, queue: str) -> bool:
            return False

    use(Missing)
    ended = tool(*command)
    assert (ended.code, ended.out.count("\n")) == (1, 0)
    assert "create it with --create" in ended.err
    assert tool(*command, "--create").code == 0


def test_without_a_command_the_help_is_shown_on_stderr() -> None:
    ended = tool()
    assert (ended.code, ended.out) == (2, "")
    assert "redrive" in ended.err


def test_a_message_is_not_changed_by_being_looked_at(queues: Queues) -> None:
    queues.post(LETTERS, [letter(1)])
    before: tuple[Message, ...] = queues.browse(LETTERS).messages
    for command in (["stats"], ["peek", "dead-letter"], ["dead-letters"], ["redrive", "--dry-run"], ["check"]):
        assert tool(*command).code == 0
    (after,) = queues.browse(LETTERS).messages
    assert after._replace(age=before[0].age) == before[0]
