"""The producer and the operator's tool as processes: streams that fail or cannot hold an id, signals, terminals."""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support import HERE, LETTERS, REQUESTS, RESPONSES, run, script, wait_until
from terminal import Terminal

from claim_queues.sqlite import SqliteQueues

PRODUCER, TOOL = "widget_producer.py", "-m claim_queues"
STOPPED = "stopped after the lines above"


@pytest.fixture
def queues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteQueues]:
    """The queues that the commands of the test take."""
    monkeypatch.setenv("WIDGET_QUEUE_URL", f"sqlite:///{tmp_path}/q")
    with SqliteQueues(tmp_path / "q") as found:
        found.create(REQUESTS)
        yield found


def ids(queues: SqliteQueues, queue: str = REQUESTS) -> list[str]:
    return [message.id for message in queues.browse(queue, limit=1_000_000)[0]]


def shell(line: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Run a line with the project's commands in it. encoding: of its streams."""
    for command in (PRODUCER, TOOL):
        line = line.replace(command, f"{shlex.quote(sys.executable)} {command}")
    return run("/bin/sh", "-c", line, cwd=HERE, encoding=encoding)


@pytest.mark.parametrize(
    ("redirection", "number", "reason"),
    [(">/dev/full", 28, "No space left on device"), (">&-", 9, "Bad file descriptor")],
)
def test_a_stdout_that_takes_nothing_is_exit_1_and_what_is_stored_stands_on_stderr(
    redirection: str, number: int, reason: str, queues: SqliteQueues
) -> None:
    ended = shell(f"{PRODUCER} --help {redirection}")
    assert (ended.returncode, ended.stderr) == (1, f"error: [Errno {number}] {reason}\n")
    ended = shell(f"{PRODUCER} --count 2500 {redirection}")
    *stored, error = ended.stderr.splitlines()
    assert (ended.returncode, error) == (1, f"error: stdout: {reason}: {STOPPED}")
    assert [line.split()[0] for line in stored] == ids(queues)
    assert len(stored) == 1000  # a batch of the embedded queue


def test_a_pipe_that_is_closed_early_loses_no_id_and_prints_no_traceback(queues: SqliteQueues) -> None:
    ended = shell(f"{PRODUCER} --count 5000 | head -1")
    *stored, error = ended.stderr.splitlines()
    assert error == f"error: stdout: Broken pipe: {STOPPED}"
    assert ended.stdout.split()[0] == ids(queues)[0]
    assert [line.split()[0] for line in stored] == ids(queues)[-len(stored) :]


def test_a_redrive_into_a_full_disk_tells_on_stderr_what_came_back(queues: SqliteQueues) -> None:
    queues.post(LETTERS, [{"request_id": "old", "body": {"widget_id": "a"}}])
    ended = shell(f"{TOOL} redrive >/dev/full")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[0] == f"old {ids(queues)[0]}"
    assert len(ids(queues, LETTERS)) == 1  # twice, never lost


@pytest.mark.parametrize(
    ("encoding", "shown"), [("latin-1", "ü \\u6f22 \\U0001f600"), ("ascii", "\\xfc \\u6f22 \\U0001f600")]
)
def test_what_stdout_cannot_encode_is_escaped_in_every_line_for_programs(
    encoding: str, shown: str, queues: SqliteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    widget_id = "ü 漢 😀"
    queues.post(LETTERS, [{"request_id": widget_id, "body": {"widget_id": widget_id}}])
    assert shell(f"{TOOL} dead-letters", encoding).stdout == f"{shown} {shown} - -\n"
    assert shell(f"{TOOL} redrive --dry-run", encoding).stdout == f"{shown} -\n"
    assert shell(f"{TOOL} redrive", encoding).stdout == f"{shown} {ids(queues)[0]}\n"
    assert shell(f"{PRODUCER} --widget-id '{widget_id}'", encoding).stdout == f"{ids(queues)[1]} {shown}\n"


def test_without_stdin_everything_works(queues: SqliteQueues) -> None:
    ended = shell(f"{PRODUCER} --ids-file - <&-")
    assert (ended.returncode, ended.stderr, ids(queues)) == (0, "", [])
    queues.post(REQUESTS, [1])
    ended = shell(f"{TOOL} purge request <&- 2>&- >&-")
    assert (ended.returncode, len(ids(queues))) == (1, 1)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_stderr_that_takes_nothing_changes_no_result(redirection: str, tmp_path: Path) -> None:
    url = f"--queue-url sqlite:///{tmp_path}/new"  # so that it has something to log
    ended = shell(f"{PRODUCER} {url} --widget-id a {redirection}")
    assert (ended.returncode, ended.stdout.split()[1:]) == (0, ["a"])
    assert shell(f"{PRODUCER} --no-such-option {redirection}").returncode == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_waiting_is_an_exit_code_and_reports_what_is_stored(
    number: int, code: int, queues: SqliteQueues, tmp_path: Path
) -> None:
    with script(PRODUCER, "--wait", "--widget-id", "a", "--widget-id", "b", cwd=tmp_path) as running:
        first, second = wait_until(lambda: ids(queues))
        queues.post(RESPONSES, [{"request_id": first, "outcome": "created"}])
        wait_until(lambda: running.out)  # it waits for responses
        running.signal(number)
        assert running.exit_code() == code
    told = [line for line in running.err.splitlines() if line and not line.endswith(queues.address)]
    assert told == [f"no response yet: {second} b", *(["error: interrupted"] if code == 130 else [])]
    assert running.out == "a created\n"


# At a terminal of 80 columns


def show(*words: object, **how: Any) -> tuple[int, str]:
    """Run a script at a terminal to its end: its exit code, and all that it wrote there. how: see Terminal."""
    with closing(Terminal(*words, **how)) as running:
        return running.exit_code(), running.shown


@pytest.mark.parametrize(("term", "is_shown"), [("xterm-256color", True), ("dumb", False)])
def test_a_bar_shows_progress_where_a_terminal_can_and_lines_go_to_their_file(
    term: str, is_shown: bool, queues: SqliteQueues, tmp_path: Path
) -> None:
    code, shown = show("widget_producer.py", "--count", 20_000, term=term, stdout=tmp_path / "ids")
    lines = (tmp_path / "ids").read_text().splitlines()
    assert (code, len(lines)) == (0, 20_000)
    assert all(re.fullmatch(r"\S+ [0-9a-f-]{36}", line) for line in lines)
    assert bool(re.search(r"requests .*━.* \d+%", shown)) == is_shown
    assert is_shown or shown == ""


def test_lines_on_the_terminal_stay_whole_above_the_bar(queues: SqliteQueues) -> None:
    code, shown = show("widget_producer.py", "--count", 3_000)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert code == 0
    assert [line.split()[0] for line in plain if re.fullmatch(r"\S+-\d+ [0-9a-f-]{36}\s*", line)] == ids(queues)


def test_one_request_needs_no_bar(queues: SqliteQueues) -> None:
    code, shown = show("widget_producer.py", "--widget-id", "31f37378")
    assert (code, shown) == (0, f"{ids(queues)[0]} 31f37378\n")


@pytest.mark.parametrize(("reply", "code", "left"), [("n\n", 1, 1), ("\n", 1, 1), ("y\n", 0, 0), ("\x04", 130, 1)])
def test_purge_asks_at_a_terminal(queues: SqliteQueues, reply: str, code: int, left: int) -> None:
    queues.post(REQUESTS, [1])
    ended, shown = show("-m", "claim_queues", "purge", "request", typed=reply)
    assert ended == code
    assert f"Remove 1 messages from {REQUESTS} at {queues.address} for good?" in " ".join(shown.split())
    assert queues.stats(REQUESTS).total == left
