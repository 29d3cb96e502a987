"""Virtual threads, locks and time: a seed decides every interleaving, and a thread can be stopped where it stands.

Each virtual thread is a greenlet. One runs at a time, until it waits or comes to a step; then the seeded random picks
the next. Time stands still while any can run, and jumps to the next timer when none can.
"""

import heapq
import itertools
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from threading import get_ident
from types import SimpleNamespace
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

MOST_SWITCHES = 300_000
"""More in one seed is a livelock."""
NEVER = -1


class Stuck(Exception):
    """Nothing can run any more, or threads run for ever without an end."""


class Process:
    """What dies as one. mortal: whether a fault may kill it. steps: taken so far.

    dies_at, freezes_at: the step at which it does, or NEVER.
    frozen_s: seconds it then stands still. frozen_until: virtual time before which none of its threads runs.
    """

    def __init__(self, name: str, *, mortal: bool = False) -> None:
        self.name = name
        self.mortal = mortal
        self.alive = True
        self.steps = 0
        self.dies_at = self.freezes_at = NEVER
        self.frozen_s = self.frozen_until = 0.0


class Task(greenlet):
    """A virtual thread. wakes: how often it was parked, so that a timer knows whether it is still meant."""

    def __init__(self, number: int, process: Process, run: Callable[[], None], hub: greenlet) -> None:
        super().__init__(run, hub)
        self.number = number
        self.process = process
        self.parked = self.woken = False
        self.wakes = 0
        self.joining: list[Ticket] = []


Ticket = tuple[Task, int]


class Scheduler:
    """random: decides everything. now: virtual seconds. restless: how likely a step lets another thread run.

    digest: of all that was decided; equal for two runs of a seed. broken: tracebacks of threads that raised.
    finished: set by a thread to end run(). over: the threads are being thrown away. killed: called with a process that
    dies.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.restless = 1.0
        self.digest = seed
        self.switches = 0
        self.finished = False
        self.broken: list[str] = []
        self.killed: Callable[[Process], None] = lambda process: None
        self._hub = getcurrent()
        self._ready: list[Task] = []
        self._timers: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._tasks: list[Task] = []  # a killed one must stay referenced: collected, it would run its `finally`
        self.over = False
        self.task: Task

    def spawn(self, process: Process, target: Callable[..., object], args: Iterable[Any] = ()) -> Task:
        def run() -> None:
            try:
                target(*args)
            except Exception:
                self.broken.append(f"{process.name}: {traceback.format_exc()}")
            if not self.over:
                for ticket in task.joining:
                    self.wake(ticket)

        task = Task(len(self._tasks), process, run, self._hub)
        self._tasks.append(task)
        self._ready.append(task)
        return task

    def call_at(self, when: float, function: Callable[..., None], *args: Any) -> None:
        """Call from no thread; the function must not wait."""
        heapq.heappush(self._timers, (when, next(self._numbers), function, args))

    def step(self) -> None:
        """A point at which another thread may run, and the process may die or freeze."""
        if self.over:
            return
        task = self.task
        process = task.process
        process.steps += 1
        if process.steps == process.dies_at:
            self.kill(process)
        if process.steps == process.freezes_at:
            process.frozen_until = self.now + process.frozen_s
        if process.frozen_until > self.now or (self._ready and self.random.random() < self.restless):
            self._ready.append(task)
            self._hub.switch()

    def park(self, until: float | None = None) -> bool:
        """Wait until another thread wakes this one, at most until that time. Says whether it was woken."""
        if self.over:
            raise GreenletExit
        task = self.task
        task.wakes += 1
        task.parked, task.woken = True, False
        if until is not None:
            self.call_at(until, self._time_out, task, task.wakes)
        self._hub.switch()
        return task.woken

    def ticket(self) -> Ticket:
        """For others to wake this thread from its next park(), and from no other."""
        return self.task, self.task.wakes + 1

    def wake(self, ticket: Ticket) -> None:
        task, wakes = ticket
        if task.parked and task.wakes == wakes:
            task.parked, task.woken = False, True
            self._ready.append(task)

    def _time_out(self, task: Task, wakes: int) -> None:
        if task.parked and task.wakes == wakes:
            task.parked = False
            self._ready.append(task)

    def sleep(self, seconds: float) -> None:
        self.park(self.now + seconds)

    def pick(self, among: list[Any]) -> Any:
        """Take one out of the list, whichever."""
        index = int(self.random.random() * len(among))
        among[index], among[-1] = among[-1], among[index]
        return among.pop()

    def kill(self, process: Process) -> None:
        """Stop all its threads where they stand; does not return to a thread of it."""
        if process.alive:
            process.alive = False
            self.killed(process)
        if getcurrent() is not self._hub and self.task.process is process:
            self._hub.switch()

    def run(self) -> None:
        """Run the threads until one sets `finished`. Raises Stuck."""
        ready = self._ready
        while not self.finished:
            if ready:
                task = self.pick(ready)
                process = task.process
                if process.alive and process.frozen_until <= self.now:
                    self.task = task
                    self.switches += 1
                    self.digest = (self.digest * 1_000_003 + task.number) & 0xFFFF_FFFF_FFFF
                    task.switch()
                elif process.alive:
                    self.call_at(process.frozen_until, ready.append, task)
            elif self._timers:
                when, _, function, args = heapq.heappop(self._timers)
                self.now = max(self.now, when)
                function(*args)
            else:
                raise Stuck("no thread can run, and no timer is set")
            if self.switches > MOST_SWITCHES:
                raise Stuck(f"{self.switches} switches and no end")

    def end(self) -> None:
        """Throw the threads away; what they still run changes nothing."""
        self.over = True
        for task in self._tasks:
            if not task.dead:
                task.throw()
        self._tasks.clear()

    def threading(self) -> SimpleNamespace:
        """What takes the place of the module `threading`."""
        return SimpleNamespace(
            Thread=partial(Thread, self),
            Lock=partial(Lock, self),
            RLock=partial(Lock, self),
            Condition=partial(Condition, self),
            Event=partial(Event, self),
        )

    def time(self, wall: Callable[[], float]) -> SimpleNamespace:
        """What takes the place of the module `time`, but for real threads that another test has left behind."""
        here = get_ident()

        def virtual(function: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any) -> Any:
                return function(*args) if get_ident() == here else real(*args)

            return called

        return SimpleNamespace(
            monotonic=virtual(lambda: self.now, time.monotonic),
            time=virtual(wall, time.time),
            sleep=virtual(self.sleep, time.sleep),
        )


class Lock:
    """Any lock: all are reentrant. Who waits gets it in no certain order."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owner: Task | None = None
        self._waiting: list[Ticket] = []
        self.depth = 0

    def acquire(self) -> bool:
        scheduler = self._scheduler
        if scheduler.over:
            return True
        scheduler.step()
        task = scheduler.task
        if self._owner is not task:
            while self._owner is not None:
                self._waiting.append(scheduler.ticket())
                scheduler.park()
            self._owner = task
        self.depth += 1
        return True

    def release(self) -> None:
        if self._scheduler.over:
            return
        if self._owner is not self._scheduler.task:
            raise RuntimeError("released by another than its owner")
        self.depth -= 1
        if not self.depth:
            self._owner = None
            if self._waiting:
                self._scheduler.wake(self._scheduler.pick(self._waiting))

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class Condition:
    """As threading.Condition; notify() wakes whichever."""

    def __init__(self, scheduler: Scheduler, lock: Lock | None = None) -> None:
        self._scheduler = scheduler
        self._lock = lock or Lock(scheduler)
        self._waiting: list[Ticket] = []

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        scheduler, lock = self._scheduler, self._lock
        if scheduler.over:
            raise GreenletExit
        ticket, depth = scheduler.ticket(), lock.depth
        lock.depth = 1
        lock.release()
        self._waiting.append(ticket)
        woken = scheduler.park(None if timeout is None else scheduler.now + timeout)
        if ticket in self._waiting:  # a notify() may meet one whose time is up already
            self._waiting.remove(ticket)
        lock.acquire()
        lock.depth = depth
        return woken

    def wait_for(self, condition: Callable[[], Any], timeout: float | None = None) -> Any:
        end = None if timeout is None else self._scheduler.now + timeout
        while not (found := condition()):
            if end is not None and self._scheduler.now >= end:
                break
            self.wait(None if end is None else end - self._scheduler.now)
        return found

    def notify(self, number: int = 1) -> None:
        for _ in range(min(number, len(self._waiting))):
            self._scheduler.wake(self._scheduler.pick(self._waiting))

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class Event:
    """As threading.Event."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._changed = Condition(scheduler)
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        with self._changed:
            self._is_set = True
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_set, timeout)
        return self._is_set


class Thread:
    """As threading.Thread, in the process of the thread that starts it."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        target: Callable[..., object],
        args: Iterable[Any] = (),
        name: str = "",
        daemon: bool = False,
    ) -> None:
        self._scheduler = scheduler
        self._work = target, args
        self._task: Task

    def start(self) -> None:
        self._task = self._scheduler.spawn(self._scheduler.task.process, *self._work)
        self._scheduler.step()

    def join(self, timeout: float | None = None) -> None:
        scheduler = self._scheduler
        end = None if timeout is None else scheduler.now + timeout
        while not self._task.dead and (end is None or scheduler.now < end):
            self._task.joining.append(scheduler.ticket())
            scheduler.park(end)
