"""Campaigns on consumers that end or stand still, on a maker that is away, and on requests that kill."""

import os
import random
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
from support import Script, wait_until

from claim_queues import Claim
from claim_queues.sqlite import SqliteQueues

from .campaign import Campaign, Result
from .checker import Event, check, read_history
from .kills import KINDS, maker_options, most_hits
from .recorded import POISON, STEPS, Plan
from .trial import (
    CLAIM_TTL,
    REQUESTS,
    Run,
    Trial,
    add,
    mixed_bodies,
    own_widgets,
    scaled,
    side_by_side,
    trial,
    widget_ids,
)

REAL_CLAIM_TTL = 60
OF_REQUESTS = "queue = (SELECT number FROM queues WHERE name = ?)"
SPARE_S = 2.0
"""A consumer ends within its deadline and so much more."""


def queued(made: Trial) -> int:
    return rows(made, f"SELECT count(*) FROM messages WHERE {OF_REQUESTS}", REQUESTS)[0][0]


def rows(made: Trial, sql: str, *values: object) -> list[Any]:
    with closing(apsw.Connection(str(made.queue))) as file:
        return list(file.execute(sql, values))


def history(run: Run) -> list[Event]:
    return read_history(run.history) if run.history.exists() else []


def received(run: Run) -> dict[str, Event]:
    """The first claim of each message."""
    found: dict[str, Event] = {}
    for event in history(run):
        if event["op"] == "claim":
            for id_, _ in event["received"]:
                found.setdefault(id_, event)
    return found


@contextmanager
def silent_maker(made: Trial) -> Iterator[None]:
    """Something at the trial's maker URL that takes all and never answers."""
    with socket.create_server(("127.0.0.1", int(made.maker_url.rpartition(":")[2])), backlog=128):
        yield


# SIGTERM

IN_TIME_S, HANGING_S = 5, 3
"""Deadlines of POSTs that are all answered in time, and of POSTs that no one answers."""


class Stops:
    """What became of each SIGTERM. seconds: from the signal to the exit. backoffs: whether messages may have them."""

    def __init__(self, *, backoffs: bool) -> None:
        self.backoffs = backoffs
        self.seconds: list[float] = []
        self.held = 0
        self.violations: list[str] = []

    def stop(self, made: Trial, run: Run, deadline: float) -> None:
        """SIGTERM, and whether it exits 0 in time and holds nothing any more."""
        started = time.monotonic()
        run.signal(signal.SIGTERM)
        run.process.join(deadline + SPARE_S)
        self.seconds.append(time.monotonic() - started)
        code = run.process.exitcode
        if code != 0:
            said = run.err.read_text()[-300:]
            self.violations.append(f"exit code {code} after {self.seconds[-1]:.1f} s: {said}")
            run.kill()
            return
        claims = {event["claim"] for event in history(run) if event["op"] == "claim"}
        found = rows(made, "SELECT claim, held_until FROM messages WHERE held_until > 0")
        now = time.time() * 1000  # after the look: what another consumer has just released is free
        hidden = [claim for claim, until in found if until > now]
        held, delayed = sum(claim in claims for claim in hidden), 0 if self.backoffs else hidden.count(None)
        self.held += held + delayed
        if held or delayed:
            self.violations.append(f"messages are not free at once: {held} held, {delayed} delayed")


def stop_consumers(scale: float) -> Result:
    """SIGTERM at random times: to consumers of a busy queue, and to consumers whose maker never answers."""
    busy, hanging = Stops(backoffs=False), Stops(backoffs=True)
    counts = stop_busy(busy, scaled(150, scale))
    longest = 15 if scale >= 1 else 5
    side_by_side(lambda number: stop_hanging(hanging, number, longest), range(scaled(50, scale)), 8)
    times = statistics.quantiles(busy.seconds, n=100, method="inclusive")
    figures: dict[str, Any] = {
        "n": len(busy.seconds) + len(hanging.seconds),
        "not free at once": busy.held + hanging.held,
        "POSTed twice": counts.pop("duplicated"),
        "exit p50 s": round(times[49], 2),
        "exit p99 s": round(times[98], 2),
        "exit p100 s": round(max(busy.seconds), 2),
        f"with a silent maker and a deadline of {HANGING_S} s n": len(hanging.seconds),
        "its exit p100 s": round(max(hanging.seconds), 2),
    }
    return Result(figures | counts, busy.violations + [f"silent maker: {line}" for line in hanging.violations])


def stop_busy(stops: Stops, each: int, bug: str = "") -> dict[str, int]:
    """Three consumers on one file, each stopped so many times, with the claim TTL and all waits as users have them."""
    with trial() as made:

        def lane(kind: Sequence[object]) -> None:
            chance = random.Random(str(kind))
            for _ in range(each):
                if kind == KINDS[0] and queued(made) < 1_000:
                    made.post(mixed_bodies(1_000, chance.randrange(10**6)))
                run = made.consumer("--deadline", IN_TIME_S, *kind, plan=Plan(bug=bug))
                run.wait_for_events()
                time.sleep(chance.uniform(0, 1))
                stops.stop(made, run, IN_TIME_S)

        with made.maker("--latency", 0.2):
            made.post(mixed_bodies(1_000))
            side_by_side(lane, KINDS, len(KINDS))
        if not stops.violations:
            with made.maker():
                made.drain("--post-batch", 20, seconds=REAL_CLAIM_TTL)
        counts, violations = made.check()
        if again := counts["duplicated"]:
            violations.append(f"{again} messages POSTed again because of a stop")
        stops.violations += violations
        return counts


def stop_hanging(stops: Stops, number: int, longest: float, bug: str = "") -> None:
    """One message is tried again and again by itself, with looks at /healthz; of many, the next one each time.

    longest: seconds before the stop.
    """
    with trial() as made, silent_maker(made):
        made.post([{"widget_id": id_} for id_ in widget_ids(40 if number % 4 == 3 else 1)])
        run = made.consumer("--deadline", HANGING_S, plan=Plan(bug=bug))
        run.wait_for_events()
        time.sleep(random.Random(number).uniform(0, longest))
        stops.stop(made, run, HANGING_S)
        stops.violations += made.check()[1]


# SIGSTOP

STANDS = [step for step in STEPS if step not in ("k0", "k13")]
HOLDS_NOTHING = ["k9", "k12"]
"""Steps after which the consumer may hold nothing."""


def suspend_consumers(scale: float, steps: Sequence[str] = tuple(STANDS), bug: str = "") -> Result:
    """A consumer stands still past its claim TTL; its messages go to another holder; then it goes on."""
    each = scaled(10, scale)
    figures: Counter[str] = Counter()
    violations: list[str] = []
    for step, (counts, broken) in zip(
        steps, side_by_side(lambda step: _suspend_at(step, each, bug), steps, 6), strict=True
    ):
        figures.update(counts)
        violations += [f"{step} ({STEPS[step]}): {line}" for line in broken]
    return Result({"n": figures.pop("n"), "steps": len(steps), **figures}, violations)


def _suspend_at(step: str, times: int, bug: str) -> tuple[dict[str, int], list[str]]:
    chance = random.Random(step)
    with trial() as made, made.maker(*maker_options(step)):
        figures = Counter({"n": 0, "taken over": 0, "file locked": 0})
        violations: list[str] = []
        for number in range(times):
            made.post([*mixed_bodies(7, chance.randrange(10**6)), ["no request", len(made.attempted)]])
            plan = Plan(claim_ttl=CLAIM_TTL, kill=(step, chance.randint(1, most_hits(step))), stops=True, bug=bug)
            run = made.consumer("--slots", 3, plan=plan)
            try:
                taken, broken = _stand_still(made, run, step, lose_all_first=number % 2 == 1)
            except AssertionError as error:
                taken, broken = 0, [f"{error}: {run.err.read_text()[-300:]}"]
            if taken is None:
                figures["file locked"] += 1
            else:
                figures["taken over"] += taken
            violations += broken
            figures["n"] += 1
            if violations:
                break
        counts, broken = made.check()
        return {**figures, **counts}, violations + broken


def _stand_still(made: Trial, run: Run, step: str, *, lose_all_first: bool) -> tuple[int | None, list[str]]:
    """Gives the number of messages that others took over, None where they could not, and what was broken.

    lose_all_first: others have done all before it goes on; if not, they hold all while it does.
    """
    if not _is_still(made, run):
        return 0, [f"it did not stand still there: exit code {run.process.exitcode}"]
    time.sleep(CLAIM_TTL + 0.1)
    taken, broken = None, []
    if _is_locked(made):
        _go_on(made, run)
    else:
        taken, broken = (_lose_to_consumer if lose_all_first else _lose_to_holder)(made, run)
        if not taken and step not in HOLDS_NOTHING:
            broken.append("nothing was taken over")
    wait_until(lambda: queued(made) == 0)
    stops = Stops(backoffs=True)
    stops.stop(made, run, 1)
    return taken, broken + stops.violations


def _is_still(made: Trial, run: Run) -> bool:
    """Wait for that; a step that is not reached any more needs more messages."""
    stat = Path(f"/proc/{run.pid}/stat")
    for _ in range(20):
        until = time.monotonic() + 3
        while run.is_running and time.monotonic() < until:
            if stat.read_text().rpartition(")")[2].split()[0] == "T":
                return True
            time.sleep(0.01)
        if not run.is_running:
            return False
        made.post(mixed_bodies(8))
    return False


def _is_locked(made: Trial) -> bool:
    """Whether what stands still is within a transaction, by its step or by another of its threads."""
    for path in (made.queue, made.directory / "counts.sqlite3"):
        with closing(apsw.Connection(str(path))) as file:
            try:
                file.execute("BEGIN IMMEDIATE; ROLLBACK")
            except apsw.BusyError:
                return True
    return False


def _go_on(made: Trial, run: Run) -> list[str]:
    """Let it go on, with new messages; gives their ids. Once those are gone, it has seen to the old ones."""
    made.resumed.append(int(time.time() * 1000))
    run.signal(signal.SIGCONT)
    return made.post([{"widget_id": id_} for id_ in widget_ids(4)])


def _lose_to_consumer(made: Trial, run: Run) -> tuple[int, list[str]]:
    """Another consumer has done all by the time that it goes on."""
    other = made.consumer(drain=True)
    code = other.wait()
    _go_on(made, run)
    again = {id_ for id_, event in received(other).items() if dict(event["received"])[id_] > 1}
    return len(again), [f"the other exited {code}"] if code else []


def _lose_to_holder(made: Trial, run: Run) -> tuple[int, list[str]]:
    """Another holds all while it goes on, and keeps it."""
    with SqliteQueues(made.queue) as queues:
        claims: list[Claim] = []
        while claim := queues.claim(REQUESTS, ttl=REAL_CLAIM_TTL, grace=60, limit=20):
            claims.append(claim)
        made.deaths += len(claims)  # nobody reads of these receives either
        held = _held_by(made, claims)
        _go_on(made, run)
        wait_until(lambda: queues.stats(REQUESTS).total <= len(held))
        lost = held - _held_by(made, claims)
        for claim in claims:
            queues.release(claim)
    return len(held), [f"{len(lost)} of {len(held)} messages that another held were touched"] if lost else []


def _held_by(made: Trial, claims: list[Claim]) -> set[tuple[Any, ...]]:
    ids = {claim.id for claim in claims}
    return {row for row in rows(made, "SELECT place, claim, held_until, receives FROM messages") if row[1] in ids}


# Recovery

SHORT_TTL, SHORT_DEADLINE = 3, 2.5
RECOVERY_SPARE_S = 1.0


def recover(scale: float, bug: str = "") -> Result:
    """A consumer dies amid its POSTs, another waits for messages: how long until it has claimed them."""
    short = [(SHORT_TTL, SHORT_DEADLINE, bug, number) for number in range(scaled(80, scale, 2))]
    real = [(REAL_CLAIM_TTL, REAL_CLAIM_TTL - 10, bug, number) for number in range(int(20 * scale))]
    figures: dict[str, Any] = {"n": len(short) + len(real), "messages": 0}
    violations: list[str] = []
    done = side_by_side(lambda case: _recover(*case), real + short, len(real) + 8)
    for name, ttl, results in (("short", SHORT_TTL, done[len(real) :]), ("real", REAL_CLAIM_TTL, done[: len(real)])):
        seconds = [each for found, _ in results for each in found]
        violations += [f"claim TTL {ttl} s: {line}" for _, broken in results for line in broken]
        figures["messages"] += len(seconds)
        if seconds:
            figures[f"claim TTL {ttl} s: n"] = len(results)
            figures[f"{name} p50 s"] = round(statistics.median(seconds), 2)
            figures[f"{name} p100 s"] = round(max(seconds), 2)
    return Result(figures, violations)


def _recover(claim_ttl: int, deadline: float, bug: str, number: int) -> tuple[list[float], list[str]]:
    plan = Plan(claim_ttl=0 if claim_ttl == REAL_CLAIM_TTL else claim_ttl, bug=bug)
    options = ["--claim-limit", 5, "--deadline", deadline]
    with trial() as made, silent_maker(made):
        ids = made.post([{"widget_id": id_} for id_ in widget_ids(20)])
        first = made.consumer(*options, plan=plan)
        wait_until(lambda: len(received(first)) == len(ids))
        claimed_at = time.monotonic()
        second = made.consumer(*options, plan=plan)
        second.wait_for_events()
        # Before the first deadline passes; renewals come about the middle of a claim.
        wanted = claimed_at + random.Random(number).uniform(0, deadline * 0.9)
        time.sleep(max(0.0, wanted - time.monotonic()))
        first.kill()
        killed_at = time.time() * 1000
        try:
            wait_until(lambda: len(received(second)) == len(ids), claim_ttl + 10)
        except AssertionError:
            return [], [f"{len(ids) - len(received(second))} messages were not claimed again"]
        second.kill()
        made.deaths += 2
        violations = made.check()[1]
        seconds = [(event["at"] - killed_at) / 1000 for event in received(second).values()]
        if min(seconds) < 0:
            violations.append("some were given back before the kill")
        if max(seconds) > claim_ttl + RECOVERY_SPARE_S:
            violations.append(f"claimed again only after {max(seconds):.2f} s")
        return seconds, violations


# Outage

MOST_RECEIVES = 5


def outage(scale: float, ways: Sequence[str] = ("gone", "hanging"), bug: str = "") -> Result:
    """The maker is away for 10 claim TTLs, while consumers of each kind run and requests wait: gone, or hanging."""
    requests, ttls = scaled(10_000, scale, 100), scaled(10, scale, 2)
    figures: dict[str, Any] = {"n": 0, "claim TTLs": ttls}
    violations: list[str] = []
    for how in ways:
        counts, broken = _outage(how, requests, ttls, bug)
        add(figures, {"n": requests})
        for key, value in counts.items():
            figures[key] = max(figures.get(key, 0), value) if key.startswith("most") else figures.get(key, 0) + value
        violations += [f"{how}: {line}" for line in broken]
    return Result(figures, violations)


def _outage(how: str, requests: int, ttls: int, bug: str) -> tuple[dict[str, int], list[str]]:
    with trial() as made:
        options = ["--max-receives", MOST_RECEIVES]
        runs = [made.consumer(*options, *kind, plan=Plan(claim_ttl=CLAIM_TTL, bug=bug)) for kind in KINDS]
        with made.maker() as maker:
            made.post([{"widget_id": id_} for id_ in widget_ids(60)])
            wait_until(lambda: queued(made) == 0)
            if how == "hanging":
                os.killpg(maker.process.pid, signal.SIGSTOP)
                charged = _wait_in_vain(made, requests, ttls)
                os.killpg(maker.process.pid, signal.SIGCONT)
                stops = _return(made, runs, maker)
        if how == "gone":
            charged = _wait_in_vain(made, requests, ttls)
            with made.maker() as maker:
                stops = _return(made, runs, maker)
        evidence = made.evidence()
        counts, violations = check(evidence)
        posts = sum(event["op"] == "post" and event["phase"] == "invoke" for run in runs for event in history(run))
        more = {
            "dead letters": len(evidence.dead_letters),
            "most receives": max(body["receive_count"] for body in evidence.responses.values()),
            "most charged": max(charged, default=0),
            "POSTs": posts,
        }
        violations += stops.violations + made.damage()
        if evidence.dead_letters:
            violations.append(f"{len(evidence.dead_letters)} dead letters")
        if len(evidence.widgets) != requests + 60 or evidence.queued:
            violations.append(f"{len(evidence.widgets)} of {requests + 60} were made")
        if wrong := sum(each > 0 for each in charged):
            violations.append(f"receives count against {wrong} messages")
        return more | counts, violations


def _wait_in_vain(made: Trial, requests: int, ttls: int) -> list[int]:
    """Requests come while the maker is away. Gives the receives of each that count against it in the end."""
    producer = made.producer(widget_ids(requests), Plan())
    assert producer.wait() == 0
    time.sleep(ttls * CLAIM_TTL)
    # In this order: a receive is excused before its message is free.
    found = rows(
        made,
        "SELECT (SELECT id FROM store) || printf('%016x', place), receives - (claim IS NOT NULL) FROM messages"
        f" WHERE {OF_REQUESTS}",
        REQUESTS,
    )
    with closing(apsw.Connection(str(made.directory / "counts.sqlite3"))) as file:
        excused = dict(file.execute("SELECT message_id, excused FROM receives"))
    return [receives - excused.get(id_, 0) for id_, receives in found]


def _return(made: Trial, runs: list[Run], maker: Script) -> Stops:
    stops = Stops(backoffs=True)
    wait_until(lambda: queued(made) == 0 or maker.process.poll() is not None, 240)
    for run in runs:
        stops.stop(made, run, 1)
    return stops


# Poison

PLACES = ("POST", "answered")


def poison(scale: float, bug: str = "", most_receives: int = MOST_RECEIVES) -> Result:
    """A request that kills its consumer each time, among good ones; in some trials three such requests."""
    alone, together = scaled(100, scale), scaled(10, scale, 0)
    cases = [(number, 1) for number in range(alone)] + [(number, 3) for number in range(together)]
    figures: dict[str, Any] = {"n": alone, "exactly as often as allowed": 0, "trials with three": together}
    violations: list[str] = []
    with trial() as made, made.maker():
        for exact, counts, broken in side_by_side(
            lambda case: _poison(made, *case, bug=bug, most_receives=most_receives), cases, 3
        ):
            figures["exactly as often as allowed"] += exact
            add(figures, counts)
            violations += broken
    return Result(figures, violations)


def _poison(
    of: Trial, number: int, several: int, *, bug: str, most_receives: int
) -> tuple[bool, dict[str, int], list[str]]:
    chance = random.Random(number)
    kind, place = KINDS[number % len(KINDS)], PLACES[number % len(PLACES)]
    with trial() as made:
        made.maker_url = of.maker_url
        bodies: list[Any] = [{"widget_id": id_} for id_ in widget_ids(40)]
        for id_ in widget_ids(several):
            bodies.insert(chance.randrange(len(bodies)), {"widget_id": id_, "note": POISON})
        ids = made.post(bodies)
        bad = {id_ for id_, body in zip(ids, bodies, strict=True) if "note" in body}
        code = -signal.SIGKILL
        while code == -signal.SIGKILL and made.deaths <= several * most_receives:
            # Nobody has to wait for the end of a dead consumer's claim: the clock is put forward past it.
            plan = Plan(poison=place, clock_ahead=made.deaths * (REAL_CLAIM_TTL + 1), bug=bug)
            run = made.consumer("--deadline", 20, "--max-receives", most_receives, *kind, plan=plan, drain=True)
            code = run.wait()
            made.deaths += code == -signal.SIGKILL
        evidence = made.evidence(widgets=own_widgets(made, of))
        counts, violations = check(evidence)
        posts: Counter[str] = Counter()
        for event in (event for events in evidence.histories for event in events):
            if event["op"] == "post" and event["phase"] == "invoke":
                posts.update(id_ for id_, _ in event["requests"] if id_ in bad)
        letters = Counter(body["request_id"] for body in evidence.dead_letters.values())
        exact = several == 1 and set(posts.values()) == {most_receives}
        if code != 0:
            violations.append(f"exit code {code}")
        if (several == 1 and not exact) or max(posts.values()) > most_receives:
            violations.append(f"POSTed {sorted(posts.values())} times")
        if letters != Counter(bad):
            violations.append(f"{letters.total()} dead letters, {len(letters.keys() & bad)} of them poison")
        if evidence.queued or not {bodies[ids.index(id_)]["widget_id"] for id_ in ids if id_ not in bad} <= set(
            evidence.widgets
        ):
            violations.append("not all good ones were made")
        return exact, counts, [f"trial {number} ({place}): {line}" for line in violations + made.damage()]


CAMPAIGNS = [
    Campaign(
        "sigterm",
        "SIGTERM at a random time: exit code 0 within the deadline and 2 s, all is free at once, no second POST",
        stop_consumers,
    ),
    Campaign(
        "sigstop",
        "a consumer stands still past its claim TTL at each step: it deletes and POSTs nothing that it has lost",
        suspend_consumers,
    ),
    Campaign("recovery", "SIGKILL amid POSTs: others have the messages within the claim TTL and 1 s", recover),
    Campaign("outage", "the maker is gone, or hangs, for 10 claim TTLs: no dead letter, all made after it", outage),
    Campaign("poison", "a request that kills its consumer each time: one dead letter, the others are made", poison),
]
