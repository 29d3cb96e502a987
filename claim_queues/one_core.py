"""Keep a process on one core, and move it to another where others need that one.

Python runs one thread at a time. With several cores to choose from, the kernel wakes each thread on an idle one, where
it finds the interpreter taken and sleeps again. What that costs: docs/design-decisions.md.
"""

import os
import random
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

LOOK_EVERY_S = 0.25
CROWDED = 0.25
"""Share of its core's time that others take more there than on the best other core before the process moves."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def stay_on_one_core() -> None:
    """Keep all threads of this process on one core from now on: at first the one that the kernel chose for it.

    Does nothing on other systems than Linux, where there is one core to choose from, and where the system does not
    tell how busy each is. Ends for good once somebody else gives the main thread other cores. Call it from there.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # no /proc to look at, or the call is not allowed
            allowed = os.sched_getaffinity(0)
            if len(allowed) > 1 and allowed <= _busy_s().keys():
                core = _current_core()
                _move_to({core})
                threading.Thread(target=_follow_room, args=(allowed, core), name="core", daemon=True).start()


def _follow_room(allowed: set[int], core: int) -> None:
    try:
        at, spent_s, busy_s = time.monotonic(), time.process_time(), _busy_s()
        while True:
            time.sleep(LOOK_EVERY_S)
            if os.sched_getaffinity(os.getpid()) != {core}:
                return
            before_at, before_spent_s, before_s = at, spent_s, busy_s
            at, spent_s, busy_s = time.monotonic(), time.process_time(), _busy_s()
            others_s = {each: busy_s[each] - before_s[each] for each in allowed}
            others_s[core] -= spent_s - before_spent_s
            best = min(allowed, key=others_s.__getitem__)
            is_crowded = others_s[core] - others_s[best] > CROWDED * (at - before_at)
            if is_crowded and random.choice((True, False)):  # noqa: S311 of two that share a core one is to stay
                _move_to({best})
                core = best
    except (OSError, KeyError):  # a core is gone, or no longer allowed: the kernel is to choose again
        with suppress(OSError):
            _move_to(allowed)


def _current_core() -> int:
    """The core that the main thread ran on last; see proc_pid_stat(5)."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36])


def _busy_s() -> dict[int, float]:
    """Seconds that each core was neither idle nor waiting for a disk, since the machine was started."""
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    cores = {int(name[3:]): list(map(int, ticks)) for name, *ticks in rows if name.startswith("cpu") and name != "cpu"}
    return {core: (sum(ticks[:8]) - ticks[3] - ticks[4]) * TICK_S for core, ticks in cores.items()}


def _move_to(cores: set[int]) -> None:
    """Move all threads; what they start stays with them, and what is started meanwhile is moved after them."""
    moved: set[str] = set()
    while found := {each.name for each in Path("/proc/self/task").iterdir()} - moved:
        for thread in found:
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread), cores)
        moved |= found
