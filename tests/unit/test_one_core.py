"""A process that keeps to one core, with real processes and the kernel's own word for where they may run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from claim_queues import one_core

ALLOWED = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="takes Linux and two cores")

PROGRAM = """
import threading, time
from claim_queues import one_core
from claim_queues.one_core import stay_on_one_core

def wait():
    while True:
        time.sleep(0.05)

threading.Thread(target=wait, daemon=True).start()
time.sleep(0.1)
{before}
stay_on_one_core()
threading.Thread(target=wait, daemon=True).start()
print("ready", flush=True)
wait()
"""
FIRST_IS_CROWDED = """
one_core._current_core = lambda: {first}
one_core._busy_s = lambda: {{core: time.monotonic() * (core == {first}) for core in {allowed}}}
""".format(first=ALLOWED[0] if ALLOWED else 0, allowed=ALLOWED)


@contextmanager
def running(before: str = "", *prefix: str) -> Iterator[int]:
    """The program, with something done before it chooses its core."""
    program = PROGRAM.format(before=before)
    with subprocess.Popen([*prefix, sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process.pid
        finally:
            process.send_signal(signal.SIGKILL)


def cores(pid: int) -> set[int]:
    """The cores that at least one of its threads may use."""
    return set().union(*(os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()))


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    give_up_at = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    return found


def test_all_threads_share_one_core_those_started_before_and_after() -> None:
    with running() as pid:
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 4
        assert len(cores(pid)) == 1


def test_it_makes_room_where_others_need_its_core() -> None:
    with running(FIRST_IS_CROWDED) as pid:
        assert wait_until(lambda: ALLOWED[0] not in cores(pid), 30)
        assert len(cores(pid)) == 1


def test_whoever_sets_the_cores_has_the_last_word() -> None:
    with running(f"{FIRST_IS_CROWDED}\none_core.LOOK_EVERY_S = 1") as pid:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), ALLOWED)
        time.sleep(3)
        assert cores(pid) == set(ALLOWED)


@pytest.mark.parametrize("trouble", ["{}", "open('/nowhere')"])
def test_where_it_cannot_be_told_any_more_who_is_busy_the_kernel_chooses_again(trouble: str) -> None:
    """A core that went offline, or a system that hides /proc/stat."""
    looks = f"one_core._busy_s = lambda: looks.append(1) or (first() if len(looks) < 4 else {trouble})"
    with running(f"first, looks = one_core._busy_s, []\n{looks}") as pid:
        assert wait_until(lambda: cores(pid) == set(ALLOWED), 30)


@pytest.mark.parametrize("name", ["_busy_s", "_move_to"])
def test_where_it_may_not_nothing_happens(name: str) -> None:
    with running(f"one_core.{name} = lambda *_: open('/nowhere')") as pid:
        assert cores(pid) == set(ALLOWED)


def test_where_there_is_no_choice_nothing_happens() -> None:
    with running("", "taskset", "-c", str(ALLOWED[1])) as pid:
        assert cores(pid) == {ALLOWED[1]}
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 3


class Machine:
    """Two cores and what is on them, second by second. own_s: what the process itself takes. goes: the coin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *looks: dict[int, float], own_s: float, goes: bool) -> None:
        self.looks, self.seconds, self.own_s, self.moves = list(looks), -1.0, own_s, list[set[int]]()
        self.busy_s = dict.fromkeys((0, 1), 0.0)
        monkeypatch.setattr(one_core, "_busy_s", lambda: dict(self.busy_s))
        monkeypatch.setattr(one_core, "_move_to", self.moves.append)
        monkeypatch.setattr(one_core, "time", self)
        monkeypatch.setattr(one_core.random, "choice", lambda _: goes)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: self.moves[-1] if self.moves else {0})

    def monotonic(self) -> float:
        return self.seconds

    def process_time(self) -> float:
        return self.own_s * self.seconds

    def sleep(self, _: float) -> None:
        assert self.looks, "it goes on"
        self.seconds += 1
        for core, share in self.looks.pop(0).items():
            self.busy_s[core] += share
        if not self.looks:
            self.moves.append({0, 1})  # somebody sets the cores, which ends it


@pytest.mark.parametrize(
    ("look", "own_s", "moves"),
    [
        ({0: 1.0, 1: 0.1}, 0.5, True),  # another takes half of its core
        ({0: 1.0, 1: 0.1}, 0.0, True),  # it gets nothing
        ({0: 1.0, 1: 0.0}, 1.0, False),  # all is its own
        ({0: 1.0, 1: 0.9}, 0.1, False),  # the other core is no better
        ({0: 0.4, 1: 0.0}, 0.2, False),  # there is room for both
    ],
)
def test_it_compares_what_others_take(
    monkeypatch: pytest.MonkeyPatch, look: dict[int, float], own_s: float, moves: bool
) -> None:
    machine = Machine(monkeypatch, look, {}, own_s=own_s, goes=True)
    one_core._follow_room({0, 1}, 0)
    assert machine.moves == [*([{1}] if moves else []), {0, 1}]


def test_of_two_that_share_a_core_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {0: 1.0}, {0: 1.0}, {}, own_s=0.5, goes=False)
    one_core._follow_room({0, 1}, 0)
    assert machine.moves == [{0, 1}]


def test_a_thread_that_is_started_meanwhile_is_moved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    over, moved, started = threading.Event(), list[int](), list[threading.Thread]()

    def move(thread: int, cores: set[int]) -> None:
        moved.append(thread)
        if not started:
            started.append(threading.Thread(target=over.wait))
            started[0].start()

    monkeypatch.setattr(os, "sched_setaffinity", move)
    one_core._move_to({0})
    over.set()
    started[0].join()
    assert started[0].native_id in moved
