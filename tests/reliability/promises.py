"""What the simulation holds the consumer to: observers beside the product's own classes, and checks at a seed's end."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from claim_queues import JSON
from claim_queues.breaker import Breaker, Failure, Verdict
from claim_queues.keeper import Held, HeldClaim, Keeper, Pause
from claim_queues.store import BUSY_TIMEOUT_S
from delivery import Answer, Connection, Delivery
from widget_consumer import POST_SPARE_S, STOP_PATIENCE_S, Consumer

from .scheduler import NEVER, Process, Task
from .world import REQUESTS, SLOWEST_CALL_S, World

EDGE_S = 3.0
"""A failure so shortly before an outage ends may look like the message's own: another passes soon."""
LATE_S = 2.0
"""Beyond a POST's deadline, a stop may take so long."""
HEALTH_S = 10.0
"""Two looks at a silent /healthz."""
SLOW = frozenset({"slow queue", "slow maker", "freeze", "queue errors", "queue outage", "locked counts"})
HIDING = SLOW | {"queue answers lost"}
"""With these a claim may be given up for lost while the service still keeps it."""
UNCLEAR = frozenset({"crash", "freeze", "queue answers lost", "queue errors", "queue outage", "duplicates"})
"""With these a receive can count against a message that was never POSTed in it."""


@dataclass(slots=True)
class Posting:
    """A POST in flight: its consumer, and the claim of each message in it."""

    process: Process
    start: float
    claims: dict[str, str]


class Promises:
    """Watches the consumers of a world; stands for the consumer's log too.

    posted: by message, when it was first POSTed under each claim. excuses: how often it was excused.
    kills: deaths by message. counts_missed: the counts file was locked, so that counts are less exact.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.counts_missed = False
        self.posted: dict[str, dict[str, float]] = {}
        self.excuses: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self._ready: dict[tuple[Task, str], str] = {}
        self._in_flight: dict[int, Posting] = {}
        self._stopping: dict[Process, float] = {}
        self._exited: set[Process] = set()
        self._left: set[Process] = set()

    # Beginnings and ends of consumers

    def stopping(self, process: Process) -> None:
        self._stopping.setdefault(process, self.world.now)
        if any(posting.process is process for posting in self._in_flight.values()):
            self.world.sometimes("stopped in mid-POST")

    def has_exited(self, process: Process) -> bool:
        return process in self._exited

    def longest_stop_s(self, *, calm: bool) -> float:
        """Seconds from stop() to the end. calm: nothing but the maker may be slow."""
        longest = self.world.plan.deadline + HEALTH_S + LATE_S
        return longest if calm else longest + STOP_PATIENCE_S + 2 * SLOWEST_CALL_S + 4 * self.world.plan.claim_ttl

    def exited(self, process: Process) -> None:
        """It stopped by itself or was stopped: then nothing that it held is still hidden."""
        world, faults = self.world, self.world.plan.faults
        self._exited.add(process)
        world.note("exits", process.name)
        store, now = world.store, world.service_time()
        if (since := self._stopping.get(process)) is not None:
            world.sometimes("stopped in good order")
            took, longest = world.now - since, self.longest_stop_s(calm=not faults & SLOW)
            if took > longest:
                world.broke(f"{process.name} took {took:.1f} s to stop, not {longest:.1f}")
        else:
            world.sometimes("drained by itself")
            old = [each for each in store.alive(REQUESTS) if each.posted < now - 300 and not world.wall_ahead]
            if any(stored.id not in store.came_again for stored in old) and world.now > world.plan.calm_at:
                world.broke(f"{process.name} says drained, but {old[0]} is left")
        held = [each for each in store.alive(REQUESTS) if each.held_until > now and each.claim]
        claims = [(each.id, store.claims[each.claim]) for each in held]
        mine = [id_ for id_, claim in claims if claim.process is process and claim.renewed >= world.jumped_at]
        if mine and process not in self._left and not faults & HIDING:
            world.broke(f"{process.name} stopped and still holds {mine}")

    # POSTs

    def holds(self, held: Held, seconds: float) -> None:
        """The keeper says so: the claim lasts that long by the service's clock too."""
        task = self.world.scheduler.task
        self._ready[task, held.message.id] = held.of.claim.id
        self._check_held(held.message.id, held.of.claim.id, seconds, "held")

    def _check_held(self, id_: str, claim: str, seconds: float, what: str) -> None:
        world, store = self.world, self.world.store
        stored = store.posted[id_]
        if id_ in store.shared or id_ in store.ended or id_ in store.came_again:
            return
        left = stored.held_until - world.service_time()
        if (stored.claim != claim or left < seconds) and store.claims[claim].renewed >= world.jumped_at:
            world.broke(f"{id_} is not {what} by {claim} for {seconds:g} s: {stored.claim} has it for {left:.2f} s")

    def post_starts(self, requests: Mapping[str, JSON], receives: Mapping[str, int]) -> Posting:
        world, task = self.world, self.world.scheduler.task
        process = task.process
        spare = world.plan.deadline + POST_SPARE_S
        if process.freezes_at != NEVER and process.steps >= process.freezes_at:
            spare -= process.frozen_s  # it may have happened between the look at the claim and now
        if "locked counts" in world.plan.faults:
            spare -= BUSY_TIMEOUT_S  # to charge a message that was received often
        posting = Posting(process, world.now, {id_: self._ready[task, id_] for id_ in requests})
        for id_, claim in posting.claims.items():
            if spare > 0:
                self._check_held(id_, claim, spare, "safe to POST")
            under = self.posted.setdefault(id_, {})
            under.setdefault(claim, world.now)
            least = 1 + sum(at < world.store.claims[claim].granted for at in under.values())
            if receives[id_] < least and id_ not in world.store.ended and id_ not in world.store.came_again:
                world.broke(f"{id_} is POSTed as received {receives[id_]} times, but it is {least}")
        world.note("POST", process.name, *posting.claims)
        for id_, request in requests.items():
            if world.maker.ills.get(request["widget_id"]) == "kills":
                self.kills[id_] += 1
                world.sometimes("crash by a message that kills")
                world.scheduler.kill(process)
        self._in_flight[id(posting)] = posting
        return posting

    def post_ends(self, posting: Posting, answers: Mapping[str, Answer]) -> None:
        world, process = self.world, posting.process
        del self._in_flight[id(posting)]
        took = world.now - posting.start
        frozen_s = process.frozen_s if process.freezes_at != NEVER else 0.0
        if took > world.plan.deadline + 1 + frozen_s:
            world.broke(f"a POST took {took:.2f} s")
        edge = EDGE_S + frozen_s
        in_outage = any(
            outage.start <= posting.start and world.now + edge <= outage.end for outage in world.plan.outages
        )
        for id_, answer in answers.items():
            world.note("answer", process.name, id_, answer.outcome, answer.reason)
            stored = world.store.posted[id_]
            if stored.claim != posting.claims[id_] or stored.held_until <= world.service_time():
                world.sometimes("claim ended in mid-POST")
            if answer.outcome is None and not in_outage:
                world.explain(id_, posting.claims[id_])

    # The consumer's log

    def info(self, event: str, **fields: object) -> None:
        self.world.note("log", event, fields)
        self.world.sometimes(event)
        if event == "not given back: free again when their claims end":
            self._left.add(self.world.scheduler.task.process)
        if event == "receive counts not written":
            self.counts_missed = True
        if event == "dead letter" and self.world.crashes:
            self.world.sometimes("dead letter after a crash")

    debug = warning = error = info

    # At the end

    def check(self, acknowledged: Sequence[str]) -> None:
        world, store, maker = self.world, self.world.store, self.world.maker
        requests = {id_: stored for id_, stored in store.posted.items() if stored.queue == REQUESTS}
        for id_ in acknowledged:
            if id_ not in requests:
                world.broke(f"{id_} was acknowledged, but never stored")
        for id_ in [*store.responses, *store.letters]:
            if id_ not in requests:
                world.broke(f"an outcome from nowhere: {id_}")
        asked = set()
        for id_, stored in requests.items():
            widget_id = store.widget_id(stored)
            asked.add(widget_id)
            self._check_request(id_, json.loads(stored.text), widget_id)
        if not maker.widgets.keys() <= asked:
            world.broke(f"widgets from nowhere: {maker.widgets.keys() - asked}")

    def _check_request(self, id_: str, body: Any, widget_id: str | None) -> None:
        world, store, plan = self.world, self.world.store, self.world.plan
        end, ill = store.ended.get(id_), self.world.maker.ills.get(widget_id or "")
        responses, letters = store.responses.get(id_, []), store.letters.get(id_, [])
        outcomes = {response["outcome"] for response in responses}
        if end is None and id_ not in store.queues[REQUESTS]:
            world.broke(f"{id_} is lost")
        if end == "expired" and "short ttl" not in plan.faults and not world.wall_ahead:
            world.broke(f"{id_} expired before its time")
        if "created" in outcomes and widget_id not in world.maker.widgets:
            world.broke(f"{id_}: created, but there is no such widget")
        if "rejected" in outcomes and ill != "invalid":
            world.broke(f"{id_}: rejected, but the maker would take it")
        if "created" in outcomes and ill in ("invalid", "fails", "hangs", "kills"):
            world.broke(f"{id_}: created, though it {ill}")
        if (
            plan.embedded
            and end == "deleted"
            and id_ not in store.came_again
            and max(len(responses), 1 + len(letters)) > 2
        ):
            world.broke(f"{id_}: {len(responses)} responses and {len(letters)} dead letters in one transaction")
        if any(letter["body"] != body for letter in letters):
            world.broke(f"{id_}: its dead letter has another body")
        if letters and widget_id is not None:
            self._check_blame(id_, ill)
        self._check_receives(id_, ill)

    def _check_blame(self, id_: str, ill: str | None) -> None:
        """A dead letter only after enough receives that an outage does not explain."""
        world, plan = self.world, self.world.plan
        if self.counts_missed or id_ in world.store.came_again or id_ in world.store.shared:
            return
        explained = world.explained.get(id_, set())
        most = plan.max_receives
        if not plan.faults & UNCLEAR:
            never_posted = explained - self.posted.get(id_, {}).keys()
            explained = explained & self.posted.get(id_, {}).keys() | set(sorted(never_posted)[: most // 2])
        if len(explained) < most:
            world.broke(f"{id_} ({ill}) is a dead letter after {len(explained)} receives of its own fault, not {most}")

    def _check_receives(self, id_: str, ill: str | None) -> None:
        """Each receive with a POST counts against the message, or was excused."""
        most, world = self.world.plan.max_receives, self.world
        if id_ in world.store.came_again or id_ in world.store.shared or self.counts_missed:
            return
        if self.kills[id_] > most:
            world.broke(f"{id_} killed {self.kills[id_]} consumers, not {most}")
        posted = len(self.posted.get(id_, {}))
        # What stood still, or lost its claim to a clock that jumped, may POST what another has received since.
        if posted > most + self.excuses[id_] and not world.plan.faults & {"freeze", "clock jumps"}:
            world.broke(f"{id_} ({ill}) was POSTed in {posted} receives, not {most}; {self.excuses[id_]} excused")
        if not world.plan.faults and posted > 1 and ill not in ("fails", "hangs", "kills", "fells"):
            world.broke(f"{id_} was received {posted} times without any fault")


class ObservedConnection(Connection):
    def __init__(self, promises: Promises, maker: Any, wire: Any) -> None:
        super().__init__(maker, wire)
        self._promises = promises

    def post(self, request: dict[str, JSON], headers: dict[str, str]) -> Answer:
        id_ = unquote(headers["Idempotency-Key"])
        posting = self._promises.post_starts({id_: request}, {id_: int(headers["X-Message-Receive-Count"])})
        answer = super().post(request, headers)
        self._promises.post_ends(posting, {id_: answer})
        return answer

    def post_batch(self, deliveries: Sequence[Delivery]) -> Answer | None:
        requests = {delivery.id: delivery.held.message.body for delivery in deliveries}
        posting = self._promises.post_starts(requests, {each.id: each.receives.count for each in deliveries})
        whole = super().post_batch(deliveries)
        self._promises.world.sometimes("a batch failed as a whole" if whole else "a batch was answered")
        self._promises.post_ends(posting, {delivery.id: whole or delivery.answer for delivery in deliveries})
        return whole


class ObservedConsumer(Consumer):
    def __init__(self, promises: Promises, *args: Any, **options: Any) -> None:
        self._promises = promises
        super().__init__(*args, **options)

    def _excuse(self, deliveries: Collection[Delivery], **options: Any) -> None:
        self._promises.excuses.update(delivery.id for delivery in deliveries)
        super()._excuse(deliveries, **options)


class ObservedKeeper(Keeper):
    def __init__(self, promises: Promises, *args: Any, **options: Any) -> None:
        self._promises = promises
        super().__init__(*args, clock=lambda: promises.world.now, **options)

    def holds(self, held: Held, seconds: float) -> bool:
        found = super().holds(held, seconds)
        if found:
            self._promises.holds(held, seconds)
        elif not held.lost:
            self._promises.world.sometimes("claim not surely held: no POST")
        return found

    def _ask(self, call: Callable[[HeldClaim], None], claim: HeldClaim, pause: Pause) -> None:
        refused = pause.seconds
        super()._ask(call, claim, pause)
        if refused and not pause.seconds:
            self._promises.world.sometimes(f"{call.__name__.strip('_')} refused, then done")


class ObservedBreaker(Breaker[Delivery]):
    def __init__(self, promises: Promises, **options: Any) -> None:
        super().__init__(clock=lambda: promises.world.now, **options)
        self._promises = promises

    def passed(self, *, probe: bool = False) -> Verdict[Delivery]:
        was_open = self.is_open
        verdict = super().passed(probe=probe)
        if was_open:
            self._mark("a probe passed: breaker closed" if probe else "a late answer while the breaker is open")
        if verdict.blamed:
            self._mark("blamed as the only one that failed")
        return self._seen(verdict)

    def failed(self, case: Delivery, *, probe: bool = False, guilty: bool = False) -> Verdict[Delivery]:
        was_open = self.is_open
        verdict = super().failed(case, probe=probe, guilty=guilty)
        if was_open and self.is_open:
            self._mark("a probe failed" if probe else "a late failure while the breaker is open")
        if guilty and verdict.blamed:
            self._mark("blamed alone with a healthy maker")
        return self._seen(verdict)

    def undecided(self) -> Verdict[Delivery]:
        return self._seen(super().undecided())

    def _seen(self, verdict: Verdict[Delivery]) -> Verdict[Delivery]:
        self._promises.excuses.update(verdict.pardoned)
        if verdict.opened_by:
            self._mark(f"breaker open: {verdict.opened_by.answer.failure}")
        if verdict.pardoned:
            self._mark("pardoned")
        if verdict.opened_by and any(case.failure is Failure.UNAVAILABLE for case in verdict.blamed):
            self._mark("blamed for failing with others too often")
        return verdict

    def _mark(self, name: str) -> None:
        self._promises.world.sometimes(name)
