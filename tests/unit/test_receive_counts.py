"""The dict of receive counts: never too low, bounded, and shared by processes where it has a file."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest
from support import HERE

import receive_counts
from claim_queues import Message, StoreError
from receive_counts import LONGEST_HOLD_S, SWEEP_EVERY_S, ReceiveCounts

NOW = 2_000_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_counts(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., ReceiveCounts]]:
    """Counts of one queue in one file, as one more process has them; of a service that does not count."""
    opened: list[ReceiveCounts] = []

    def open_(source: str = "queue", *, counted_by_service: bool = False) -> ReceiveCounts:
        path = tmp_path / "counts.sqlite3"
        opened.append(ReceiveCounts(path, source, counted_by_service=counted_by_service, clock=clock))
        return opened[-1]

    yield open_
    for counts in opened:
        counts.close()


@pytest.fixture
def in_memory(clock: Clock) -> ReceiveCounts:
    return ReceiveCounts(None, "queue", counted_by_service=False, clock=clock)


def message(id_: str = "m", *, age: float = 0, ttl: int | None = 3600, receive_count: int | None = None) -> Message:
    return Message(id_, None, age, ttl, receive_count)


def count(counts: ReceiveCounts, id_: str = "m", **more: int) -> int:
    (receives,) = counts.received([message(id_, **more)])
    return receives.count


def rows(tmp_path: Path) -> list[str]:
    with sqlite(tmp_path) as connection:
        return [id_ for (id_,) in connection.execute("SELECT message_id FROM receives ORDER BY 1")]


@contextmanager
def sqlite(tmp_path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(tmp_path / "counts.sqlite3"))
    yield connection
    connection.close()


@contextmanager
def commits(tmp_path: Path) -> Iterator[list[int]]:
    """The number of commits of others within the block, at index 0."""
    with sqlite(tmp_path) as connection:
        number = [connection.pragma("data_version")]
        yield number
        number[0] = connection.pragma("data_version") - number[0]


# Counting


def test_each_receive_counts_one_for_its_own_message(in_memory: ReceiveCounts) -> None:
    assert [receives.count for receives in in_memory.received([message("a"), message("b")])] == [1, 1]
    assert [receives.count for receives in in_memory.received([message("b"), message("c")])] == [2, 1]


def test_the_count_is_never_below_that_of_the_service(in_memory: ReceiveCounts) -> None:
    assert count(in_memory, receive_count=7) == 7
    assert count(in_memory, receive_count=3) == 8
    assert count(in_memory) == 9


def test_first_and_last_receive_are_remembered(in_memory: ReceiveCounts, clock: Clock) -> None:
    count(in_memory)
    clock.now += 5
    count(in_memory)
    assert (in_memory["m"].first_at, in_memory["m"].last_at) == (NOW, NOW + 5)


def test_an_excused_receive_is_counted_but_not_charged(in_memory: ReceiveCounts) -> None:
    count(in_memory)
    in_memory.excuse(["m"])
    count(in_memory)
    assert (in_memory["m"].count, in_memory["m"].charged) == (2, 1)


def test_no_more_receives_are_excused_than_there_were(in_memory: ReceiveCounts) -> None:
    count(in_memory)
    in_memory.excuse(["m"])
    in_memory.excuse(["m", "unknown"])
    assert in_memory["m"].charged == 0
    assert len(in_memory) == 1


def test_a_settled_message_leaves(in_memory: ReceiveCounts) -> None:
    in_memory.received([message("a"), message("b"), message("c")])
    in_memory.forget(["a", "c", "unknown"])
    assert len(in_memory) == 1
    assert count(in_memory, "a") == 1


@pytest.mark.parametrize(
    ("ttl", "age", "life_left"), [(3600, 600, 3000), (60, 120, 0), (None, 600, receive_counts.LONGEST_TTL_S)]
)
def test_an_id_leaves_when_its_message_cannot_live_any_more_and_not_before(
    in_memory: ReceiveCounts, clock: Clock, ttl: int | None, age: float, life_left: int
) -> None:
    in_memory.received([message(ttl=ttl, age=age)])
    clock.now = NOW + life_left + LONGEST_HOLD_S - 1
    count(in_memory, "other")
    assert in_memory["m"].count == 1
    clock.now += SWEEP_EVERY_S
    count(in_memory, "other")
    assert len(in_memory) == 1


def test_a_message_that_is_received_again_stays(in_memory: ReceiveCounts, clock: Clock) -> None:
    for receives in range(1, 5):
        assert count(in_memory, ttl=60) == receives
        clock.now += LONGEST_HOLD_S


def test_memory_is_bounded_and_what_was_received_longest_ago_leaves_first(
    in_memory: ReceiveCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive_counts, "MOST_IN_MEMORY", 100)
    for number in range(100):
        count(in_memory, str(number))
    count(in_memory, "0")
    in_memory.received([message(str(number)) for number in range(100, 120)])
    assert len(in_memory) == 100
    assert count(in_memory, "0") == 3
    assert count(in_memory, "1") == 1


@pytest.mark.timeout(35)
def test_a_million_ids_cost_no_more_each_than_the_first_ones(in_memory: ReceiveCounts) -> None:
    for start in range(0, 1_000_000, 1_000):
        in_memory.received([message(str(number)) for number in range(start, start + 1_000)])
    assert len(in_memory) == receive_counts.MOST_IN_MEMORY


def test_threads_do_not_lose_counts(in_memory: ReceiveCounts) -> None:
    threads = [threading.Thread(target=lambda: [count(in_memory) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert in_memory["m"].count == 2_000


# On file


def test_counts_and_excuses_outlive_the_process(open_counts: Callable[..., ReceiveCounts], clock: Clock) -> None:
    first = open_counts()
    count(first)
    first.excuse(["m"])
    first.close()
    clock.now += 10
    second = open_counts()
    assert count(second) == 2
    assert (second["m"].charged, second["m"].first_at) == (1, NOW)


def test_a_count_is_on_file_when_received_returns(open_counts: Callable[..., ReceiveCounts], tmp_path: Path) -> None:
    count(open_counts())
    with sqlite(tmp_path) as connection:
        assert connection.execute("SELECT message_id, count FROM receives").get == ("m", 1)


def test_consumers_count_and_excuse_together(open_counts: Callable[..., ReceiveCounts]) -> None:
    one, other = open_counts(), open_counts()
    assert [count(one), count(other), count(one)] == [1, 2, 3]
    other.excuse(["m"])
    one.excuse(["m"])
    third = open_counts()
    assert count(third) == 4
    assert third["m"].charged == 2


def test_queues_do_not_share_counts(open_counts: Callable[..., ReceiveCounts]) -> None:
    assert count(open_counts("one")) == 1
    assert count(open_counts("other")) == 1


def test_what_is_settled_or_too_old_leaves_the_file(
    open_counts: Callable[..., ReceiveCounts], clock: Clock, tmp_path: Path
) -> None:
    counts = open_counts()
    counts.received([message("settled"), message("short", ttl=60), message("long", ttl=1_209_600)])
    counts.forget(["settled"])
    assert rows(tmp_path) == ["long", "short"]
    clock.now += LONGEST_HOLD_S + 60
    count(counts, "new")
    assert rows(tmp_path) == ["long", "new"]


def test_what_had_to_leave_memory_is_found_on_file(
    open_counts: Callable[..., ReceiveCounts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive_counts, "MOST_IN_MEMORY", 2)
    counts = open_counts()
    for id_ in "abcd":
        count(counts, id_)
    assert len(counts) == 2
    assert count(counts, "a") == 2


@pytest.mark.parametrize("call", ["received", "excuse", "forget"])
def test_each_call_is_one_transaction_however_many_ids(
    open_counts: Callable[..., ReceiveCounts], tmp_path: Path, clock: Clock, call: str
) -> None:
    counts = open_counts()
    messages = [message(str(number)) for number in range(20)]
    counts.received(messages)
    clock.now += SWEEP_EVERY_S
    with commits(tmp_path) as number:
        if call == "received":
            counts.received(messages)
        else:
            getattr(counts, call)(found.id for found in messages)
    assert number == [1]


def test_where_the_service_counts_only_excuses_touch_the_file(
    open_counts: Callable[..., ReceiveCounts], tmp_path: Path
) -> None:
    counts = open_counts(counted_by_service=True)
    with commits(tmp_path) as number:
        counts.received([message("a", receive_count=4), message("b", receive_count=1)])
        counts.forget(["b", "unknown"])
        counts.excuse(["unknown"])
    assert number == [0]
    counts.excuse(["a"])
    assert rows(tmp_path) == ["a"]
    after_restart = open_counts(counted_by_service=True)
    assert count(after_restart, "a", receive_count=5) == 5
    assert after_restart["a"].charged == 4
    after_restart.forget(["a"])
    assert rows(tmp_path) == []


def test_to_forget_what_is_not_on_file_does_not_wait_for_the_file(
    open_counts: Callable[..., ReceiveCounts], tmp_path: Path
) -> None:
    counts = open_counts(counted_by_service=True)
    count(counts, "a")
    with sqlite(tmp_path) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        counts.forget(["a", "unknown"])
        counts.excuse(["a"])
        connection.execute("ROLLBACK")
    assert len(counts) == 0


def test_processes_that_count_at_once_lose_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, receive_counts, pathlib\n"
        "from claim_queues import Message\n"
        "counts = receive_counts.ReceiveCounts(pathlib.Path(sys.argv[1]), 'q', counted_by_service=False)\n"
        "for _ in range(100):\n"
        "    counts.received([Message(id_, None, 0, 3600) for id_ in 'abc'])\n"
        "    counts.excuse('b')\n"
    )
    path = tmp_path / "counts.sqlite3"
    command = [sys.executable, "-c", program, str(path)]
    running = [subprocess.Popen(command, cwd=HERE) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    counts = ReceiveCounts(path, "q", counted_by_service=False)
    found = counts.received([message(id_) for id_ in "abc"])
    counts.close()
    assert [receives.count for receives in found] == [301, 301, 301]
    assert [receives.charged for receives in found] == [301, 1, 301]


def test_a_file_that_cannot_be_used_is_a_store_error_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "counts.sqlite3"
    path.write_bytes(b"not SQLite at all" * 100)
    with pytest.raises(StoreError, match="damaged or no SQLite file"):
        ReceiveCounts(path, "q", counted_by_service=True)
    assert path.read_bytes() == b"not SQLite at all" * 100
