"""The operator's tool: stats, peek, dead-letters, redrive, purge and check."""

import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from in_process import Ended, failing, noted_posts, run_command
from support import LETTERS, REQUESTS, RESPONSES, letter

from claim_queues import (
    JSON,
    Claim,
    ConfigError,
    CredentialsError,
    Message,
    PostIncomplete,
    Queues,
    QueueUnavailable,
    Settled,
    Settlement,
    StoreError,
)
from claim_queues.__main__ import cli
from claim_queues.checks import Report, check_descriptors, check_state
from claim_queues.sqlite import SqliteQueues

Use = Callable[..., None]


def tool(*options: object) -> Ended:
    return run_command(cli, *options)


def first_words(ended: Ended) -> list[str]:
    return [line.split()[0] for line in ended.lines]


def bodies(queues: Queues, queue: str) -> list[JSON]:
    return [message.body for message in queues.browse(queue, limit=1_000_000)[0]]


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
    first, *others = map(json.loads, tool("stats", "--json").lines)
    assert first.pop("oldest_age") < 60
    assert first == {"queue": REQUESTS, "free": 1, "claimed": 0, "delayed": 0, "total": 1}
    nothing = {"free": 0, "claimed": 0, "delayed": 0, "total": 0, "oldest_age": None}
    assert others == [{"queue": RESPONSES, **nothing}, {"queue": LETTERS, **nothing}]


# peek


def test_peek_shows_the_oldest_ten_claimed_ones_too_without_claiming_them(queues: Queues) -> None:
    ids = queues.post(REQUESTS, [{"widget_id": str(number)} for number in range(12)])
    take(queues, REQUESTS)
    ended = tool("peek")
    assert first_words(ended) == ids[:10]
    _, age, *rest = ended.lines[1].split(" ", 3)
    assert (age[-1], rest) == ("s", ["-", '{"widget_id": "1"}'])
    assert queues.stats(REQUESTS).claimed == 1


def test_peek_shows_as_many_as_asked_for_however_short_the_services_pages(queues: Queues, use: Use) -> None:
    class ShortPages(SqliteQueues):
        def browse(self, queue: str, *, limit: int = 20, **options: Any) -> tuple[list[Message], str]:
            return super().browse(queue, limit=min(limit, 3), **options)

    queues.post(RESPONSES, list(range(50)))
    use(ShortPages)
    assert [line.split()[3] for line in tool("peek", "response", "--limit", 30).lines] == list(map(str, range(30)))
    assert len(tool("peek", "response", "--limit", 99).lines) == 50


def test_peek_as_json_shows_the_whole_message_with_its_receives(queues: Queues, use: Use) -> None:
    class Counted(SqliteQueues):
        def browse(self, queue: str, **options: Any) -> tuple[list[Message], str]:
            found, marker = super().browse(queue, **options)
            return [message._replace(receive_count=3) for message in found], marker

    (id_,) = queues.post(REQUESTS, [{"widget_id": "x" * 1000}])
    use(Counted)
    assert tool("peek").lines[0].split()[2] == "3"
    (line,) = tool("peek", "--json").lines
    shown = json.loads(line)
    assert shown.pop("age") < 60
    assert shown == {"id": id_, "body": {"widget_id": "x" * 1000}, "receive_count": 3}


@pytest.mark.parametrize("command", ["peek", "dead-letters"])
def test_looking_is_refused_with_the_reason_where_the_service_cannot(command: str, use: Use) -> None:
    use(failing(browse=ConfigError("Blind cannot show messages without claiming them")))
    assert tool(command) == Ended(2, "", "error: Blind cannot show messages without claiming them\n")


# dead-letters


def test_dead_letters_shows_request_widget_receives_and_reason(queues: Queues) -> None:
    queues.post(LETTERS, [letter(1), letter(2) | {"body": "no request", "reason": "two\nlines"}, {"odd": 1}])
    assert tool("dead-letters").lines == [
        "old-1 w1 5 HTTP 501",
        "old-2 - 5 two\\nlines",
        '- - - not a dead letter: {"odd": 1}',
    ]


def test_dead_letters_as_json_shows_all_that_is_known(queues: Queues) -> None:
    id_, _ = queues.post(LETTERS, [letter(1), letter(2)])
    (line,) = tool("dead-letters", "--json", "--limit", 1).lines
    assert json.loads(line) == letter(1) | {"message_id": id_}


# redrive


def test_redrive_posts_the_original_bodies_in_order_and_deletes_the_letters(queues: Queues) -> None:
    odd = [{"widget_id": "a", "big": 2**64 + 1, "small": -(10**30)}, "gASV raw \ud800", 10**40, None]
    originals = [*odd, *({"widget_id": f"w{number}"} for number in range(41))]
    queues.post(LETTERS, [letter(number) | {"body": body} for number, body in enumerate(originals)])
    ended = tool("redrive")
    found, _ = queues.browse(REQUESTS, limit=100)
    assert [message.body for message in found] == originals
    assert ended == Ended(0, "".join(f"old-{number} {message.id}\n" for number, message in enumerate(found)), "")
    assert queues.stats(LETTERS).total == 0


def test_a_redriven_request_has_the_given_ttl_where_the_service_has_one_for_each(queues: Queues, use: Use) -> None:
    queues.post(LETTERS, [letter(1), letter(2)])
    with noted_posts() as post:
        assert tool("redrive", "--ttl", 61, "--limit", 1).code == 0
        use(has_message_ttl=False)
        assert tool("redrive").code == 0
    assert [call.kwargs["ttl"] for call in post.call_args_list] == [61, None]


def test_a_dry_run_shows_what_would_be_brought_back_and_changes_nothing(queues: Queues) -> None:
    queues.post(LETTERS, [{"odd": 1}, letter(1), letter(2)])
    assert tool("redrive", "--dry-run", "--limit", 1) == Ended(0, "old-1 -\n", "")
    assert tool("redrive", "--dry-run") == Ended(0, "old-1 -\nold-2 -\n", "")
    assert (queues.stats(REQUESTS).total, queues.stats(LETTERS).free) == (0, 3)


def test_what_is_no_dead_letter_stays_and_is_free_again_afterwards(queues: Queues) -> None:
    strange = ["text", {"request_id": "x"}, {"body": 1}, {"body": 1, "request_id": 2}]
    queues.post(LETTERS, [*strange, letter(1), "more", letter(2)])
    ended = tool("redrive", "--limit", 2)
    assert (ended.code, first_words(ended)) == (1, ["old-1", "old-2"])
    assert ended.err == "error: 5 messages stay: not dead letters, or taken by another meanwhile\n"
    assert bodies(queues, LETTERS) == [*strange, "more"]
    assert queues.stats(LETTERS).free == 5


def test_a_letter_that_fails_again_meanwhile_does_not_go_round(queues: Queues, use: Use) -> None:
    class FailingAtOnce(SqliteQueues):
        def post(self, queue: str, bodies: Any, **options: Any) -> list[str]:
            super().post(LETTERS, [letter(9)] * len(bodies))
            return super().post(queue, bodies, **options)

    queues.post(LETTERS, [letter(1), letter(2)])
    use(FailingAtOnce)
    assert first_words(tool("redrive")) == ["old-1", "old-2"]


def test_a_redrive_that_breaks_between_post_and_delete_repeats_but_loses_nothing(queues: Queues, use: Use) -> None:
    queues.post(LETTERS, [letter(1)])
    use(failing(settle=QueueUnavailable("gone")))
    ended = tool("redrive")
    ((request,), _) = queues.browse(REQUESTS)
    assert ended == Ended(1, f"old-1 {request.id}\n", "error: gone\n")
    assert bodies(queues, LETTERS) == [letter(1)]


def test_a_post_without_an_answer_leaves_its_letter_and_those_behind_it(queues: Queues, use: Use) -> None:
    class HalfWay(SqliteQueues):
        def post(self, queue: str, bodies: Any, **options: Any) -> list[str]:
            ids = super().post(queue, bodies, **options)
            if letter(1)["body"] in bodies:
                raise PostIncomplete("half way", accepted={}, refused={}, unknown=[0])
            return ids

    queues.post(LETTERS, [letter(0), letter(1), letter(2)])
    use(HalfWay)
    ended = tool("redrive")
    assert (ended.code, first_words(ended), ended.err) == (6, ["old-0"], "error: half way\n")
    assert bodies(queues, REQUESTS) == [letter(0)["body"], letter(1)["body"]]
    assert (bodies(queues, LETTERS), queues.stats(LETTERS).free) == ([letter(1), letter(2)], 2)


def test_a_letter_that_another_took_meanwhile_is_told(queues: Queues, use: Use) -> None:
    class Late(SqliteQueues):
        def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
            self.release(claim)
            return super().settle(claim, settlements)

    queues.post(LETTERS, [letter(1)])
    use(Late)
    ended = tool("redrive")
    assert ended.code == 1
    assert ended.err == "error: 1 messages stay: not dead letters, or taken by another meanwhile\n"
    assert bodies(queues, LETTERS) == [letter(1)]


def test_a_redrive_says_what_a_claim_holds(queues: Queues) -> None:
    queues.post(LETTERS, [letter(1), letter(2)])
    take(queues, LETTERS)
    ended = tool("redrive")
    assert (ended.code, first_words(ended)) == (0, ["old-2"])
    assert ended.err == f"{LETTERS}: 1 are claimed until their claims end, perhaps by another redrive\n"


def test_redrive_finds_what_a_claim_without_a_wait_overlooks(queues: Queues, use: Use) -> None:
    class Overlooking(SqliteQueues):
        def claim(self, queue: str, *, wait: float = 0, **options: Any) -> Claim | None:
            return super().claim(queue, wait=wait, **options) if wait else None

    queues.post(LETTERS, [letter(number) for number in range(45)])
    use(Overlooking)
    assert len(tool("redrive").lines) == 45


# purge


def test_purge_removes_all_messages_of_one_queue(queues: Queues) -> None:
    queues.post(REQUESTS, [1, 2])
    queues.post(RESPONSES, [3])
    take(queues, REQUESTS)
    assert tool("purge", "request", "--yes") == Ended(0, f"{REQUESTS}: 2 messages removed\n", "")
    assert (queues.stats(REQUESTS).total, queues.stats(RESPONSES).total) == (0, 1)


def test_purge_without_a_terminal_to_ask_at_is_refused_whatever_the_environment_says(
    queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIDGET_YES", "1")
    queues.post(REQUESTS, [1])
    refusal = f"error: {REQUESTS}: nothing removed: say y at a terminal, or add --yes\n"
    assert tool("purge", "request") == Ended(1, "", refusal)
    assert queues.stats(REQUESTS).total == 1


# check


def test_check_says_that_all_is_well(queues: Queues) -> None:
    ended = tool("check")
    assert (ended.code, set(first_words(ended))) == (0, {"ok"})
    assert f"ok      the embedded queue opened: {queues.address}" in ended.lines
    assert "ok      credentials: none are needed" in ended.lines
    assert f"ok      queue {LETTERS}: 0 messages" in ended.lines


def test_check_says_what_the_service_cannot_do_and_what_would_surprise(queues: Queues, use: Use) -> None:
    class Surprising(SqliteQueues):
        def inspect(self, queue: str, *, is_posted_to: bool = False) -> list[str]:
            return [f"{queue} has a receive limit"]

    use(Surprising, can_browse=False, release_delay=0, has_grace=False, has_message_ttl=False, service="Bare")
    ended = tool("check")
    assert (ended.code, first_words(ended).count("warning")) == (0, 3 + 4)
    assert f"warning {REQUESTS} has a receive limit" in ended.lines
    assert "warning Bare has no grace: a message can expire while it is claimed" in ended.lines


def test_check_goes_on_after_a_failure(use: Use) -> None:
    use(failing(inspect=CredentialsError("who are you")))
    ended = tool("check")
    assert (ended.code, ended.lines.count("failure who are you")) == (4, 3)


def test_an_early_refusal_of_credentials_outweighs_later_failures(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    for problem, code in ((StoreError("is damaged"), 1), (CredentialsError("who are you"), 4), ("words", 4)):
        report.failure(problem)
        assert report.exit_code == code
    assert capsys.readouterr().out.splitlines() == ["failure is damaged", "failure who are you", "failure words"]


def test_a_state_file_in_memory_is_a_warning_and_one_on_a_disk_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    check_state(report, Path("/dev/shm/directory/receive-counts.sqlite3"))
    check_state(report, Path("/proc/receive-counts.sqlite3"))
    assert report.exit_code == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning /dev/shm/directory/receive-counts.sqlite3: lies on tmpfs")


def test_more_slots_than_this_process_may_open_connections_are_refused() -> None:
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        check_descriptors(128)
        with pytest.raises(ConfigError, match=r"--slots 256 needs \d+ descriptors; this process may open 256"):
            check_descriptors(256)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# every command

LOOKS = [["stats"], ["peek"], ["dead-letters"], ["redrive", "--dry-run"]]


@pytest.mark.parametrize("command", [*LOOKS, ["check"]])
def test_looking_changes_no_message(command: list[str], queues: Queues) -> None:
    queues.post(LETTERS, [letter(1)])
    assert tool(*command).code == 0
    assert (bodies(queues, LETTERS), queues.stats(LETTERS).free) == ([letter(1)], 1)


@pytest.mark.parametrize("command", [*LOOKS, ["redrive"], ["purge", "dead-letter", "--yes"]])
def test_a_missing_queue_is_made_only_with_create(command: list[str], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/q"
    ended = tool(*command, "--queue-url", url)
    assert ended.code == 1
    assert "does not exist" in ended.err
    assert "create it with --create" in ended.err
    assert list(tmp_path.iterdir()) == []
    assert tool(*command, "--queue-url", url, "--create").code == 0


def test_check_takes_a_queue_that_will_be_made_for_a_good_one_and_makes_none(tmp_path: Path) -> None:
    ended = tool("check", "--queue-url", f"sqlite:///{tmp_path}/q")
    assert (ended.code, ended.out.count("is made at its first use")) == (0, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["peek"], f"{REQUESTS}: nothing to show"),
        (["dead-letters"], f"{LETTERS}: nothing to show"),
        (["redrive"], f"{LETTERS}: no dead letters to bring back"),
    ],
)
def test_an_empty_queue_is_said_on_stderr(queues: Queues, command: list[str], said: str) -> None:
    assert tool(*command) == Ended(0, "", f"{said}\n")
