"""A process that keeps to one core, with real processes and the kernel's own word for where they may run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ALLOWED = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="takes Linux and two cores")

BUSY = """
import threading, time
from claim_queues.one_core import stay_on_one_core

def spin():
    while True:
        sum(range(10_000))

threading.Thread(target=spin, daemon=True).start()
time.sleep(0.1)
stay_on_one_core()
threading.Thread(target=spin, daemon=True).start()
print("ready", flush=True)
spin()
"""
HALF_BUSY = BUSY.replace("sum(range(10_000))", "sum(range(10_000)); time.sleep(0.001)")
HOG = "print('ready', flush=True)\nwhile True: pass"


@contextmanager
def running(program: str, *prefix: str) -> Iterator[int]:
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
    with running(BUSY) as pid:
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 4
        assert len(cores(pid)) == 1


def test_it_makes_room_for_who_cannot_move() -> None:
    with running(BUSY) as pid:
        (core,) = cores(pid)
        with running(HOG, "taskset", "-c", str(core)):
            assert wait_until(lambda: core not in cores(pid), 30)
            assert len(cores(pid)) == 1


def test_a_process_that_gets_nothing_of_its_core_makes_room_too() -> None:
    with running(BUSY, "nice", "-n", "15") as pid:
        (core,) = cores(pid)
        with running(HOG, "taskset", "-c", str(core)):
            assert wait_until(lambda: core not in cores(pid), 30)


@pytest.mark.parametrize("trouble", ["{}", "open('/nowhere')"])
def test_where_it_cannot_be_told_any_more_who_is_busy_the_kernel_chooses_again(trouble: str) -> None:
    """A core that went offline, or a system that hides /proc/stat."""
    looks = f"one_core._busy_s = lambda: looks.append(1) or (first() if len(looks) < 4 else {trouble})"
    start = "from claim_queues import one_core\nfirst, looks = one_core._busy_s, []\n" + BUSY
    later = start.replace("stay_on_one_core()\n", f"{looks}\nstay_on_one_core()\n")
    with running(later) as pid:
        assert len(cores(pid)) == 1
        assert wait_until(lambda: cores(pid) == set(ALLOWED), 10)


@pytest.mark.parametrize("name", ["_busy_s", "_move_to"])
def test_where_it_may_not_nothing_happens(name: str) -> None:
    refusing = f"from claim_queues import one_core\none_core.{name} = lambda *_: open('/nowhere')\n" + BUSY
    with running(refusing) as pid:
        assert cores(pid) == set(ALLOWED)


def test_two_that_begin_on_the_same_core_end_on_one_each() -> None:
    same = BUSY.replace("stay_on_one_core()\n", f"one_core._current_core = lambda: {ALLOWED[0]}\nstay_on_one_core()\n")
    same = "from claim_queues import one_core\n" + same
    with running(same) as first, running(same) as second:
        assert wait_until(lambda: cores(first) != cores(second), 30)
        time.sleep(1)
        assert cores(first) != cores(second)


def test_whoever_sets_the_cores_has_the_last_word() -> None:
    with running(HALF_BUSY) as pid:
        (core,) = cores(pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), ALLOWED)
        with running(HOG, "taskset", "-c", str(core)):
            time.sleep(3)
            assert cores(pid) == set(ALLOWED)


def test_where_there_is_no_choice_nothing_happens() -> None:
    with running(BUSY, "taskset", "-c", str(ALLOWED[1])) as pid:
        assert cores(pid) == {ALLOWED[1]}
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 3
