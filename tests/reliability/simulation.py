"""The consumer's own code in a simulated world: one virtual clock, and a seed that decides every step and every fault.

python -m reliability.simulation --seeds 20000
python -m reliability.simulation --seed 17 --trace
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import apsw

import delivery
import receive_counts
import widget_consumer
from claim_queues import JSON, PostIncomplete, Queues, QueueUnavailable, keeper, zaqar_api
from claim_queues.base import Claim
from claim_queues.store import BUSY_TIMEOUT_S
from receive_counts import ReceiveCounts
from widget_consumer import Consumer, Settings

from .campaign import Campaign, Result
from .promises import ObservedBreaker, ObservedConnection, ObservedConsumer, ObservedKeeper, Promises
from .scheduler import Process, Scheduler, Stuck
from .world import (
    LETTERS,
    MOST_CRASHES,
    OUTAGES,
    REQUESTS,
    RESPONSES,
    EmbeddedDouble,
    Outage,
    Plan,
    Wire,
    World,
    ZaqarDouble,
)

FULL_SIZE = 20_000
SEEDS_A_PIECE = 500
"""So many go to one core at a time."""
FAULTS = (
    "crash", "freeze", "queue errors", "queue answers lost", "queue outage", "slow queue", "duplicates", "comes again",
    "outcomes refused", "short ttl", "outages", "failing maker", "lost requests", "lost answers", "slow maker",
    "poison", "killers", "fellers", "sigterm", "clock jumps", "locked counts",
)  # fmt: skip
LONGEST_DRAIN_S = 6_000.0
"""From the end of all faults to an empty queue: some deaths by poison, backoffs, refused outcomes of 600 s each."""
MARKS = (
    "a batch failed as a whole",
    "a batch was answered",
    "a late answer while the breaker is open",
    "a late failure while the breaker is open",
    "a post failed",
    "a probe failed",
    "a probe passed: breaker closed",
    "a request brings the maker down",
    "answer lost after the widget was made",
    "asked again for a widget that exists",
    "bad messages alone go round until a good one comes",
    "blamed alone with a healthy maker",
    "blamed as the only one that failed",
    "blamed for failing with others too often",
    "breaker open: Failure.FAILED",
    "breaker open: Failure.MISCONFIGURED",
    "breaker open: Failure.UNAVAILABLE",
    "claim ended in mid-POST",
    "claim lapsed and another took the message",
    "claim lost: another consumer gets the message",
    "claim not surely held: no POST",
    "claim: answer lost",
    "counts file locked",
    "crash at POST",
    "crash at POST answered",
    "crash at claim done",
    "crash at counts done",
    "crash between response and delete",
    "crash by a message that kills",
    "dead letter after a crash",
    "delete lost to the claim's end",
    "delete: answer lost",
    "drained by itself",
    "message expired",
    "message outlives its TTL in a claim",
    "no queue takes the outcome: the message stays queued",
    "one message in two claims",
    "pardoned",
    "post to responses: answer lost",
    "receive counts not written",
    "redelivered after its delete",
    "rejected",
    "release refused, then done",
    "release: answer lost",
    "renew refused, then done",
    "renewal of a lost claim",
    "settle refused, then done",
    "settle: answer lost",
    "stopped in good order",
    "stopped in mid-POST",
    "the maker is back",
    "wall clock jumped",
)
"""States that a campaign must have reached, or it shows less than it says."""
ALL_MARKS_WITHIN = 2_000
"""So many seeds reach every mark."""
COUNTS = apsw.Connection(":memory:")
COUNTS.execute(receive_counts.SCHEMA)


@dataclass(frozen=True)
class Outcome:
    """What came of a seed. digest: equal for two runs of it. seconds: virtual ones that passed."""

    digest: int
    seconds: float
    switches: int
    marks: Counter[str]
    violations: list[str]


def make_plan(random: Random) -> tuple[Plan, Settings]:
    quiet = random.random() < 0.1
    faults = frozenset(fault for fault in FAULTS if not quiet and random.random() < 0.25)
    calm_at = random.uniform(20, 120)
    claim_ttl = random.choice([60, 60, 90])
    plan = Plan(
        embedded=random.random() < 0.5,
        faults=faults,
        calm_at=calm_at,
        claim_ttl=claim_ttl,
        deadline=random.choice([2.0, 10.0, 20.0, claim_ttl - 10]),
        max_receives=random.randint(2, 5),
        crash_at=random.choice(CRASH_POINTS),
    )
    if "outages" in faults:
        start = random.uniform(0, 20)
        while start < calm_at:
            end = min(calm_at, start + random.choice([random.uniform(0.1, 5), random.uniform(5, 100)]))
            plan.outages.append(Outage(random.choice(OUTAGES), start, end))
            start = end + random.choice([random.uniform(0.1, 5), random.uniform(5, 100)])
    settings = Settings(
        request_queue=REQUESTS,
        response_queue=RESPONSES,
        dead_letter_queue=LETTERS,
        create=False,
        claim_ttl=claim_ttl,
        grace=60,
        claim_limit=random.choice([1, 4, 20]),
        slots=random.randint(1, 4),
        post_batch=random.choice([1, 1, 4]),
        max_receives=plan.max_receives,
        poll_interval=random.choice([5.0, 20.0]),
        response_ttl=86_400,
        drain=random.random() < 0.3,
    )
    return plan, settings


CRASH_POINTS = (
    "", "claim", "claim done", "renew", "settle", "settle done", "post to responses", "post to responses done",
    "delete", "delete done", "release", "release done", "POST", "POST answered", "counts", "counts done",
)  # fmt: skip


class Simulation:
    """One seed: starts processes, breaks things until the plan's calm, and sees that all comes to its end."""

    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        self.scheduler = Scheduler(seed)
        random = self.random = self.scheduler.random
        self.scheduler.restless = random.choice([0.02, 0.2, 0.7])
        self.scheduler.killed = self._killed
        self.plan, self.settings = make_plan(random)
        self.world = World(self.scheduler, self.plan, trace=trace)
        self.promises = Promises(self.world)
        self.consumers: dict[Process, Consumer] = {}
        self.acknowledged: list[str] = []
        self.started = 0
        self.posting = 0
        self.closing = False
        self.world.note("plan", sorted(self.plan.faults), replace(self.plan, faults=frozenset()), self.settings)

    def run(self) -> Outcome:
        world = self.world
        with patched(world, self.promises):
            self.scheduler.spawn(Process("director"), self._direct)
            try:
                self.scheduler.run()
            except Stuck as error:
                world.broke(f"stuck: {error}")
            self.scheduler.end()
        world.violations += self.scheduler.broken
        if self.scheduler.finished:
            self.promises.check(self.acknowledged)
        return Outcome(self.scheduler.digest, world.now, self.scheduler.switches, world.marks, world.violations)

    def _direct(self) -> None:
        self._begin()
        self._drain()
        self._end()
        self.scheduler.finished = True

    def _begin(self) -> None:
        random, scheduler, plan = self.random, self.scheduler, self.plan
        for _ in range(random.randint(1, 3)):
            self._start_consumer()
        for number in range(random.randint(1, 2)):
            self.posting += 1
            scheduler.spawn(Process(f"producer {number}"), self._produce, (number,))
        for fault, happens in [("clock jumps", self._jump), ("sigterm", self._signal)]:
            for _ in range(random.randint(1, 3) if fault in plan.faults else 0):
                scheduler.call_at(random.uniform(0, plan.calm_at), happens)
        for outage in plan.outages:
            if outage.kind == "down":
                scheduler.call_at(outage.start, self.world.maker.go_down)

    def _drain(self) -> None:
        """Wait until all faults are over and the queue is empty."""
        world, plan = self.world, self.plan
        while world.now < plan.calm_at or self.posting or world.store.alive(REQUESTS):
            if world.now > plan.calm_at + LONGEST_DRAIN_S:
                world.broke(f"not drained: {', '.join(map(str, world.store.alive(REQUESTS)))}")
                break
            self.scheduler.sleep(5.0)
            self._keep_flowing()

    def _end(self) -> None:
        """Stop all consumers."""
        world = self.world
        self.closing = True
        for process in list(self.consumers):
            self.scheduler.call_at(world.now + self.random.uniform(0, 1), self._stop, process)
        longest = self.promises.longest_stop_s(calm=False)
        end = world.now + longest
        while self.consumers and world.now < end:
            self.scheduler.sleep(1.0)
        for process in self.consumers:
            world.broke(f"{process.name} does not stop within {longest:g} s")

    def _keep_flowing(self) -> None:
        """Bad messages are found out beside good ones only: alone, some go round until their TTL ends."""
        world, store = self.world, self.world.store
        left = {world.maker.ills.get(store.widget_id(stored) or "") for stored in store.alive(REQUESTS)}
        if world.now > self.plan.calm_at + 60 and left & {"fails", "hangs", "fells"}:
            world.sometimes("bad messages alone go round until a good one comes")
            self.acknowledged.append(store.post(REQUESTS, f'{{"widget_id": "more {world.now:.0f}"}}', None))

    def _produce(self, number: int) -> None:
        world, random = self.world, self.random
        queues, faults = self._open(), self.plan.faults
        for batch in range(random.randint(1, 2)):
            world.scheduler.sleep(random.uniform(0, self.plan.calm_at / 2))
            bodies: list[JSON] = []
            for place in range(random.choice([1, 3, 6])):
                id_ = f"{number}{batch}{place:02}"
                ill = random.choice(self._ills)
                if ill == "malformed":
                    bodies.append(random.choice([[], "text", {"widget_id": 7}]))
                    continue
                if ill:
                    world.maker.ills[id_] = ill
                bodies.append({"widget_id": id_, "more": place})
                if random.random() < 0.05:
                    bodies.append({"widget_id": id_, "more": place})
            ttl = random.choice([60, 120]) if "short ttl" in faults else 1_000_000
            try:
                ids = queues.post(REQUESTS, bodies, ttl=ttl)
            except PostIncomplete as error:
                world.sometimes("a post ended half way")
                ids = list(error.accepted.values())
            except QueueUnavailable:
                world.sometimes("a post failed")
                ids = []
            self.acknowledged += ids
        self.posting -= 1

    @property
    def _ills(self) -> list[str]:
        ills = [""] * 12 + ["invalid", "malformed"]
        for fault, more in [("poison", ["fails", "hangs"]), ("killers", ["kills"]), ("fellers", ["fells"])]:
            if fault in self.plan.faults:
                ills += more
        return ills

    def _open(self) -> Queues:
        return EmbeddedDouble(self.world) if self.plan.embedded else ZaqarDouble(self.world)

    def _start_consumer(self) -> None:
        if self.closing:
            return
        self.started += 1
        process = Process(f"consumer {self.started}", mortal=True)
        random = self.random
        if "crash" in self.plan.faults and self.world.crashes < MOST_CRASHES and random.random() < 0.7:
            process.dies_at = int(math.exp(random.uniform(2, 8)))
        if "freeze" in self.plan.faults and random.random() < 0.7:
            process.freezes_at = int(math.exp(random.uniform(3, 8)))
            process.frozen_s = random.uniform(1, 2 * self.plan.claim_ttl)
        self.scheduler.spawn(process, self._consume, (process,))

    def _consume(self, process: Process) -> None:
        """What the command does."""
        world, queues = self.world, self._open()
        maker = delivery.Maker("http://maker/widgets", deadline_s=self.plan.deadline, allow_plain_http=True)
        counts = ReceiveCounts(
            Path("counts"), REQUESTS, counted_by_service=queues.limits.counts_receives, clock=world.wall
        )
        consumer = ObservedConsumer(self.promises, queues, maker, counts, self.settings, uniform=self.random.uniform)
        self.consumers[process] = consumer
        world.note("starts", process.name)
        try:
            consumer.run()
        except delivery.MakerMisconfigured:
            world.sometimes("a drain gave up on a misconfigured maker")
        counts.close()
        self.promises.exited(process)
        self.scheduler.kill(process)

    def _killed(self, process: Process) -> None:
        """The supervisor starts another."""
        self.consumers.pop(process, None)
        if not self.promises.has_exited(process):
            self.world.crashes += 1
            self.world.note("dies", process.name)
        self.scheduler.call_at(self.world.now + self.random.uniform(0.1, 20), self._start_consumer)

    def _signal(self) -> None:
        for process in list(self.consumers):
            if self.random.random() < 0.5:
                self._stop(process)

    def _stop(self, process: Process) -> None:
        if consumer := self.consumers.get(process):
            self.promises.stopping(process)
            self.world.note("stop", process.name)
            self.scheduler.spawn(process, consumer.stop)

    def _jump(self) -> None:
        most = 100.0 if self.plan.embedded else 40_000.0
        self.world.wall_ahead = self.random.uniform(-most, most)
        self.world.jumped_at = self.world.now
        self.world.note("clock jumps", self.world.wall_ahead)
        self.world.sometimes("wall clock jumped")


@contextmanager
def patched(world: World, promises: Promises) -> Iterator[None]:
    """The product's modules with virtual threads, time and sockets, and the observers of the promises."""
    threading, virtual_time = world.scheduler.threading(), world.scheduler.time(world.wall)

    def held_claim(claim: Claim, until: float) -> keeper.HeldClaim:
        return HELD_CLAIM(claim, until, calling=threading.RLock())

    @contextmanager
    def transaction(connection: apsw.Connection) -> Iterator[None]:
        world.point("counts")
        if world.chance("locked counts", 0.1):
            promises.counts_missed = True
            world.sometimes("counts file locked")
            world.scheduler.sleep(BUSY_TIMEOUT_S)
            raise apsw.BusyError
        with TRANSACTION(connection):
            yield
        world.point("counts done")

    shutdown: Any = lambda wire, how: wire.end()  # noqa: E731
    changes: list[tuple[Any, str, Any]] = [
        (keeper, "HeldClaim", held_claim),
        (widget_consumer, "Keeper", lambda *args, **options: ObservedKeeper(promises, *args, **options)),
        (widget_consumer, "Breaker", lambda **options: ObservedBreaker(promises, **options)),
        (widget_consumer, "log", promises),
        (delivery, "Connection", lambda maker, wire: ObservedConnection(promises, maker, wire)),
        (delivery, "_reach", lambda url: (SimpleNamespace(_new_conn=lambda: Wire(world)), "/widgets", "maker")),
        (delivery, "socket", SimpleNamespace(socket=SimpleNamespace(shutdown=shutdown), SHUT_RDWR=2)),
        (zaqar_api, "FIRST_PAUSE_S", 1.0),  # the looks of an idle consumer find nothing, and cost the most
        (zaqar_api, "LONGEST_PAUSE_S", 10.0),
        (receive_counts, "open_store", lambda *args, **options: SharedCounts()),
        (receive_counts, "transaction", transaction),
    ]
    for module in (widget_consumer, keeper, delivery, receive_counts, zaqar_api):
        changes += [(module, "threading", threading), (module, "time", virtual_time)]
    before = [(module, name, getattr(module, name, None)) for module, name, _ in changes]
    COUNTS.execute("DELETE FROM receives")
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


HELD_CLAIM, TRANSACTION = keeper.HeldClaim, receive_counts.transaction


class SharedCounts:
    """The file of receive counts, which outlives the processes that use it."""

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(COUNTS, name)


def simulate(seed: int, *, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run a seed to its end."""
    return Simulation(seed, trace=trace).run()


def run(scale: float, *, first: int = 0) -> Result:
    """Run the campaign's seeds, on all cores where they are many."""
    seeds = range(first, first + max(1, round(FULL_SIZE * scale)))
    started = time.monotonic()
    if len(seeds) < SEEDS_A_PIECE:
        pieces = [_run_piece(seeds)]
    else:
        starts = range(seeds.start, seeds.stop, SEEDS_A_PIECE)
        with ProcessPoolExecutor() as pool:
            pieces = list(pool.map(_run_piece, [seeds[at - first : at - first + SEEDS_A_PIECE] for at in starts]))
    marks: Counter[str] = sum((piece.marks for piece in pieces), Counter())
    violations = [violation for piece in pieces for violation in piece.violations]
    if len(seeds) >= ALL_MARKS_WITHIN:
        violations += [f"never reached in {len(seeds)} seeds: {mark}" for mark in MARKS if not marks[mark]]
    figures: dict[str, int | float | str] = {
        "n": len(seeds),
        "virtual hours": round(sum(piece.seconds for piece in pieces) / 3600, 1),
        "thread switches": sum(piece.switches for piece in pieces),
        "crashes": sum(marks[mark] for mark in marks if mark.startswith("crash") and "between" not in mark),
        "marks reached": sum(bool(marks[mark]) for mark in MARKS),
        "seconds": round(time.monotonic() - started),
        "seeds a CPU second": round(len(seeds) / sum(piece.cpu_seconds for piece in pieces), 1),
    }
    return Result(figures | {f"mark: {mark}": marks[mark] for mark in sorted(marks)}, violations)


@dataclass
class Piece:
    """What came of some seeds. seconds: virtual ones."""

    cpu_seconds: float = 0.0
    seconds: float = 0.0
    switches: int = 0
    marks: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def _run_piece(seeds: range) -> Piece:
    piece, started = Piece(), time.process_time()
    for seed in seeds:
        outcome = simulate(seed)
        piece.seconds += outcome.seconds
        piece.switches += outcome.switches
        piece.marks += outcome.marks
        piece.violations += [f"seed {seed}: {violation}" for violation in outcome.violations]
    piece.cpu_seconds = time.process_time() - started
    return piece


CAMPAIGNS = [
    Campaign(
        "simulation",
        "every interleaving and fault that a seed can think of: nothing is lost, and all comes to its end",
        run,
    )
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1_000, help="how many to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--trace", action="store_true", help="print what happens in it")
    given = parser.parse_args()
    if given.seed is not None:
        outcome = simulate(given.seed, trace=print if given.trace else None)
        print(f"digest {outcome.digest:x}, {outcome.seconds:.0f} virtual seconds, {outcome.switches} switches")
        found = outcome.violations
    else:
        result = run(given.seeds / FULL_SIZE, first=given.first)
        for name, figure in result.figures.items():
            print(f"{name}: {figure}")
        found = result.violations
    for violation in found:
        print(violation, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
