"""The world around the simulated consumers: two kinds of queue service, the widget maker, and what goes wrong there.

The queue doubles keep Zaqar's semantics (`claim_queues/sqlite.py` says them). One is called as the embedded queue is,
the other through what the product itself knows of Zaqar's API, request by request.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar
from zlib import crc32

from claim_queues import sqlite, zaqar_api
from claim_queues.base import JSON, Claim, Message, Queues, Settled, Settlement, Stats, decode
from claim_queues.errors import AnswerLost, ClaimLost, MessageRefused, QueueUnavailable

from .scheduler import Process, Scheduler, Ticket

REQUESTS, RESPONSES, LETTERS = "requests", "responses", "dead-letters"
EPOCH_S = 1_800_000_000.0
MOST_CRASHES = 6
SLOWEST_CALL_S = 40.0
"""Of the queue service, where its calls may be slow."""
FELLED_S = 2.0
"""How long the maker is down after a request that brings it down."""
OUTAGES = ("down", "silent", "busy", "elsewhere", "wrong")
"""Refuses connections; never answers; answers 503; another server answers 404, or redirects."""

T = TypeVar("T")


@dataclass(slots=True)
class Stored:
    """A message on a queue. claim: the last that took it, empty once it was released. Times are the service's."""

    id: str
    queue: str
    text: str
    posted: float
    expires: float
    claim: str = ""
    held_until: float = 0.0
    receives: int = 0


@dataclass(slots=True)
class Granted:
    """A claim: whose it is, and the virtual times of its grant and of the last renewal."""

    process: Process
    granted: float
    renewed: float


@dataclass(frozen=True, slots=True)
class Outage:
    kind: str
    start: float
    end: float


@dataclass(slots=True)
class Plan:
    """What a seed decides at its start; times in virtual seconds.

    faults: kinds of them that happen, until `calm_at`. crash_at: the point at which a consumer is likeliest to die.
    """

    embedded: bool
    faults: frozenset[str]
    calm_at: float
    claim_ttl: int
    deadline: float
    max_receives: int
    crash_at: str
    outages: list[Outage] = field(default_factory=list)


class World:
    """marks: how often each interesting state was reached. violations: broken promises, in words.

    explained: by message, the receives that rightly count against it, named by their claims.
    """

    def __init__(self, scheduler: Scheduler, plan: Plan, *, trace: Callable[[str], None] | None = None) -> None:
        self.scheduler = scheduler
        self.random = scheduler.random
        self.plan = plan
        self.trace = trace
        self.marks: Counter[str] = Counter()
        self.violations: list[str] = []
        self.explained: dict[str, set[str]] = {}
        self.crashes = 0
        self.wall_ahead = 0.0
        self.jumped_at = -math.inf
        self.store = Store(self)
        self.maker = MakerDouble(self)

    @property
    def now(self) -> float:
        return self.scheduler.now

    def wall(self) -> float:
        """The consumers' wall clock."""
        return EPOCH_S + self.scheduler.now + self.wall_ahead

    def service_time(self) -> float:
        """The queue service's clock: the embedded queue has that of its machine."""
        return self.wall() if self.plan.embedded else EPOCH_S + self.scheduler.now

    def sometimes(self, name: str) -> None:
        self.marks[name] += 1

    def broke(self, promise: str) -> None:
        self.violations.append(f"at {self.now:.3f} s: {promise}")

    def note(self, event: str, *what: object) -> None:
        line = f"{self.now:.6f} {event} {' '.join(map(str, what))}"
        self.scheduler.digest = crc32(line.encode(), self.scheduler.digest & 0xFFFF_FFFF)
        if self.trace:
            self.trace(line)

    def chance(self, fault: str, likely: float) -> bool:
        """Whether the fault happens now."""
        plan = self.plan
        return fault in plan.faults and self.scheduler.now < plan.calm_at and self.random.random() < likely

    def point(self, name: str) -> None:
        """A named step: consumers like to die there."""
        process = self.scheduler.task.process
        likely = 0.2 if name == self.plan.crash_at else 0.002
        if process.mortal and self.crashes < MOST_CRASHES and self.chance("crash", likely):
            self.sometimes(f"crash at {name}")
            if name in ("post to responses done", "delete"):
                self.sometimes("crash between response and delete")
            self.scheduler.kill(process)
        self.scheduler.step()

    def explain(self, message_id: str, claim: str) -> None:
        self.explained.setdefault(message_id, set()).add(claim)

    def refuse_outcome(self, message_id: str, claim: str) -> None:
        self.sometimes("outcome refused")
        self.explain(message_id, claim)

    def call(self, name: str, effect: Callable[[], T]) -> T:
        """A call of the queue service: it may fail before or after its effect, and takes its time."""
        uniform = self.random.uniform
        self.point(name)
        self.scheduler.sleep(uniform(0.001, 0.02))
        if self.chance("slow queue", 0.05):
            self.scheduler.sleep(uniform(0, SLOWEST_CALL_S))
        fails = self.chance("queue outage", 1) and self.now % 100 > 60  # longer than some claims have left
        if fails or self.chance("queue errors", 0.1):
            self.sometimes(f"{name} refused")
            raise QueueUnavailable("no", retry_after_s=self.random.choice([None, None, 3.0]))
        found = effect()
        self.point(f"{name} done")
        if self.random.random() < 0.3:
            self.scheduler.sleep(uniform(0.001, 0.02))
        if self.chance("queue answers lost", 0.05):
            self.sometimes(f"{name}: answer lost")
            raise AnswerLost("who knows")
        return found


class Store:
    """What the queue service keeps. responses, letters: what was ever posted there, by request id.

    ended: how each message left the request queue (`deleted` or `expired`). claims: all that were ever granted.
    shared: ids that two claims held at once. came_again: those redelivered after their delete.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.queues: dict[str, dict[str, Stored]] = {REQUESTS: {}, RESPONSES: {}, LETTERS: {}}
        self.responses: dict[str, list[dict[str, Any]]] = {}
        self.letters: dict[str, list[dict[str, Any]]] = {}
        self.posted: dict[str, Stored] = {}
        self.ended: dict[str, str] = {}
        self.claims: dict[str, Granted] = {}
        self.shared: set[str] = set()
        self.came_again: set[str] = set()
        self.looking: list[Ticket] = []

    def post(self, queue: str, text: str, ttl: int | None) -> str:
        now = self.world.service_time()
        id_ = f"{queue[0]}{len(self.posted)}"
        stored = self.posted[id_] = Stored(id_, queue, text, now, now + ttl if ttl else math.inf)
        self.queues[queue][id_] = stored
        if queue != REQUESTS:
            body = json.loads(text)
            kept = self.responses if queue == RESPONSES else self.letters
            kept.setdefault(body["request_id"], []).append(body)
        self.world.note("stored", id_, text)
        self.wake()
        return id_

    def wake(self) -> None:
        for ticket in self.looking:
            self.world.scheduler.wake(ticket)
        self.looking.clear()

    def alive(self, queue: str) -> list[Stored]:
        """The messages in order; what has expired goes first. None expires while it is held."""
        found, now = self.queues[queue], self.world.service_time()
        for stored in [each for each in found.values() if each.expires <= now]:
            if stored.held_until <= now:
                del found[stored.id]
                self.ended[stored.id] = "expired"
                self.world.sometimes("message expired")
                self.world.note("expired", stored.id)
        return list(found.values())

    def claim(self, queue: str, ttl: int, grace: int, limit: int, *, counted: bool) -> tuple[str, tuple[Message, ...]]:
        world, now = self.world, self.world.service_time()
        alive = self.alive(queue)
        taken = [stored for stored in alive if stored.held_until <= now][:limit]
        held = [stored for stored in alive if stored.held_until > now and stored.claim]
        if held and len(taken) < limit and world.chance("duplicates", 0.05):
            world.sometimes("one message in two claims")
            taken.append(world.random.choice(held))
            self.shared.add(taken[-1].id)
        process, id_ = world.scheduler.task.process, f"c{len(self.claims)}"
        # Zaqar floors to whole seconds.
        until = now + ttl if world.plan.embedded else math.floor(now) + ttl
        if taken:
            self.claims[id_] = Granted(process, world.now, world.now)
            world.note("claimed", process.name, id_, *[stored.id for stored in taken])
        for stored in taken:
            if stored.claim:
                world.sometimes("claim lapsed and another took the message")
                world.explain(stored.id, stored.claim)
            stored.claim, stored.held_until = id_, until
            stored.receives += 1
            if stored.expires < until:
                stored.expires = until + grace
                world.sometimes("message outlives its TTL in a claim")
        return id_, tuple(self.message(stored, counted=counted) for stored in taken)

    def held(self, claim_id: str) -> list[Stored]:
        now = self.world.service_time()
        return [
            stored for stored in self.queues[REQUESTS].values() if stored.claim == claim_id and stored.held_until > now
        ]

    def renew(self, claim_id: str, ttl: int, grace: int) -> bool:
        held, until = self.held(claim_id), self.world.service_time() + ttl
        for stored in held:
            stored.held_until = until if self.world.plan.embedded else math.floor(until)
            if stored.expires < until:
                stored.expires = until + grace
        if held:
            self.claims[claim_id].renewed = self.world.now
        return bool(held)

    def release(self, stored: Stored, delay: float = 0) -> None:
        self.world.note("released", stored.id, round(delay, 3))
        stored.claim, stored.held_until = "", self.world.service_time() + delay if delay else 0.0
        self.wake()

    def delete(self, stored: Stored) -> None:
        """Delete a request; its outcome must be durable by now."""
        world, id_ = self.world, stored.id
        del self.queues[REQUESTS][id_]
        self.ended[id_] = "deleted"
        world.note("deleted", id_)
        outcomes = {response["outcome"] for response in self.responses.get(id_, [])}
        if not outcomes or (outcomes == {"failed"} and id_ not in self.letters):
            world.broke(f"{id_} deleted before its outcome was stored")
        if world.chance("comes again", 0.05) and id_ not in self.came_again:
            self.came_again.add(id_)
            world.scheduler.call_at(world.now + world.random.uniform(0, 30), self._come_again, stored)

    def _come_again(self, stored: Stored) -> None:
        self.world.sometimes("redelivered after its delete")
        self.world.note("comes again", stored.id)
        self.queues[REQUESTS][stored.id] = stored
        stored.claim, stored.held_until, stored.expires = "", 0.0, math.inf
        del self.ended[stored.id]
        self.wake()

    def widget_id(self, stored: Stored) -> str | None:
        """What the request asks for; None where it is none."""
        body = json.loads(stored.text)
        found = body.get("widget_id") if isinstance(body, dict) else None
        return found if isinstance(found, str) else None

    def message(self, stored: Stored, *, counted: bool) -> Message:
        ttl = None if stored.expires == math.inf else int(stored.expires - stored.posted)
        age = max(0.0, self.world.service_time() - stored.posted)
        return Message(stored.id, decode(stored.text), age, ttl, stored.receives if counted else None)


class EmbeddedDouble(Queues):
    """Called as the embedded queue is: each call is one transaction."""

    limits = sqlite.LIMITS
    address = "simulated"

    def __init__(self, world: World) -> None:
        self._world = world
        self._store = world.store
        self._stopped = False

    def create(self, queue: str) -> None:
        raise NotImplementedError

    browse = end_marker = delete = purge = create  # type: ignore[assignment]

    def exists(self, queue: str) -> bool:
        return True

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        texts = [self.limits.encode(body) for body in bodies]
        return self._world.call("post", lambda: [self._store.post(queue, text, ttl) for text in texts])

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        scheduler, end = self._world.scheduler, self._world.now + wait
        while True:
            id_, taken = self._world.call("claim", lambda: self._store.claim(queue, ttl, grace, limit, counted=True))
            if taken:
                return Claim(id_, queue, taken, grace)
            if scheduler.now >= end or self._stopped:
                return None
            self._store.looking.append(scheduler.ticket())
            wall = self._world.service_time()
            due = [each.held_until - wall for each in self._store.alive(queue) if each.held_until > wall]
            scheduler.park(min(end, scheduler.now + min([*due, 10.0]) + 0.001))

    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        if not self._world.call("renew", lambda: self._store.renew(claim.id, ttl, claim.grace)):
            self._world.sometimes("renewal of a lost claim")
            raise ClaimLost(claim.id)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        return self._world.call("settle", lambda: self._settle(claim, settlements))

    def _settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        held = {stored.id: stored for stored in self._store.held(claim.id)}
        deleted, refused = set(), {}
        for settlement in settlements:
            id_ = settlement.message.id
            if self._world.chance("outcomes refused", 0.1):
                self._world.refuse_outcome(id_, claim.id)
                refused[id_] = MessageRefused("too large")
            elif id_ in held:
                for post in settlement.posts:
                    self._store.post(post.queue, self.limits.encode(post.body), post.ttl)
                self._store.delete(held[id_])
                deleted.add(id_)
        lost = {settlement.message.id for settlement in settlements} - deleted - refused.keys()
        if lost:
            self._world.sometimes("delete lost to the claim's end")
        return Settled(frozenset(deleted), frozenset(lost), refused)

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        self.limits.check_release(delay=delay)
        ids = {message.id for message in (claim.messages if messages is None else messages)}
        self._world.call("release", lambda: self._release(claim, ids, delay))

    def _release(self, claim: Claim, ids: set[str], delay: float) -> None:
        for stored in self._store.held(claim.id):
            if stored.id in ids:
                self._store.release(stored, delay)

    def stats(self, queue: str) -> Stats:
        return self._world.call("stats", lambda: Stats(len(self._store.alive(queue)), 0, 0, None))

    def stop_waiting(self) -> None:
        self._stopped = True
        self._store.wake()

    def close(self) -> None:
        pass


class ZaqarDouble(zaqar_api.ZaqarApi):
    """The product's own ZaqarApi over a server that is simulated."""

    limits = zaqar_api.limits_of("simulated Zaqar", post_batch=10, around_a_body='{"ttl":1209600,"body":}')
    refusals = zaqar_api.REFUSALS
    other_refusals = (QueueUnavailable, "")
    wraps_messages = True

    def __init__(self, world: World) -> None:
        super().__init__("simulated")
        self._world = world
        self._store = world.store

    def exists(self, queue: str) -> bool:
        return True

    def close(self) -> None:
        pass

    def _life(self, message: Message, claim_ttl: int, grace: int) -> int:
        return message.ttl or 0

    def _send(self, what: str, method: str, path: str, instead: zaqar_api.Refusals, **options: Any) -> zaqar_api.Answer:
        status, headers, found = self._world.call(_name(method, path), lambda: self._act(method, path, options))
        if status >= 300:
            raise self._refused(what, status, f"HTTP {status}", None, instead)
        answer: Any = SimpleNamespace(status_code=status, headers=headers)
        return answer, found

    def _act(self, method: str, path: str, options: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        store, (_, _, queue, what, *more) = self._store, path.split("/")
        asked, query = json.loads(options.get("data") or "{}"), options.get("params") or {}
        if method == "POST":
            return self._post_to(queue, asked) if what == "messages" else self._claim_from(queue, asked, query["limit"])
        if method == "PATCH":
            return (204 if store.renew(more[0], asked["ttl"], asked["grace"]) else 404), {}, None
        if what == "stats":
            return 200, {}, {"messages": {"free": len(store.alive(queue)), "claimed": 0}}
        if what != "claims":
            return self._delete(queue, more, what, query.get("claim_id")), {}, None
        for stored in store.held(more[0]):
            store.release(stored)
        return 204, {}, None

    def _post_to(self, queue: str, asked: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        store = self._store
        if queue != REQUESTS and self._world.chance("outcomes refused", 0.1):
            for each in asked["messages"]:
                request_id = each["body"]["request_id"]
                self._world.refuse_outcome(request_id, store.posted[request_id].claim)
            return 400, {}, {}
        posts = [(json.dumps(each["body"]), each["ttl"]) for each in asked["messages"]]
        return 201, {}, {"resources": [f"/{store.post(queue, text, ttl)}" for text, ttl in posts]}

    def _claim_from(self, queue: str, asked: dict[str, Any], limit: int) -> tuple[int, dict[str, str], Any]:
        id_, taken = self._store.claim(queue, asked["ttl"], asked["grace"], limit, counted=False)
        found = [
            {"body": each.body, "href": f"/{each.id}", "age": each.age, "ttl": each.ttl or 1_209_600} for each in taken
        ]
        return (201, {"Location": f"/{id_}"}, {"messages": found}) if taken else (204, {}, None)

    def _delete(self, queue: str, one: list[str], many: str, claim: str | None) -> int:
        """Delete one, fenced, or many, which is not."""
        ids = one or many.partition("ids=")[2].split(",")
        for stored in [stored for stored in self._store.alive(queue) if stored.id in ids]:
            if one and (stored.claim != claim or stored.held_until <= self._world.service_time()):
                self._world.sometimes("delete lost to the claim's end")
                return 403
            self._store.delete(stored)
        return 204


def _name(method: str, path: str) -> str:
    """An API request in the words of the contract."""
    _, _, queue, what, *_ = path.split("/")
    if what.startswith("messages"):
        return f"post to {queue}" if method == "POST" else "delete"
    return (
        {"POST": "claim", "PATCH": "renew", "DELETE": "release"}.get(method, "stats") if what == "claims" else "stats"
    )


class Wire:
    """A connection to the maker: what urllib3 gives the product, and its socket."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._reader: Ticket | None = None
        self._received: list[bytes] = []
        self._ended: bytes | OSError | None = None
        self.is_connected = False
        self.timeout: float | None = None
        self.sock = self
        self.opened = 0

    def connect(self) -> None:
        world = self._world
        world.scheduler.sleep(world.random.uniform(0.0001, 0.01))
        outage = world.maker.outage()
        if outage and outage.kind == "silent":
            world.scheduler.sleep(self.timeout or 0)
            raise TimeoutError
        if outage and outage.kind == "down":
            raise ConnectionRefusedError(111, "Connection refused")
        self.opened += 1
        self._received, self._ended, self.is_connected = [], None, True

    def close(self) -> None:
        self.is_connected = False

    def settimeout(self, seconds: float | None) -> None:
        self.timeout = seconds

    def getpeername(self) -> tuple[str, int]:
        return "192.0.2.1", 80

    def sendall(self, data: bytes) -> None:
        self._world.point("POST")
        if self._ended is None:
            self._world.maker.asked(self, data)

    def recv(self, most: int) -> bytes:
        scheduler = self._world.scheduler
        end = math.inf if self.timeout is None else scheduler.now + self.timeout
        while not self._received and self._ended is None:
            self._reader = scheduler.ticket()
            if not scheduler.park(end):
                raise TimeoutError
        self._world.point("POST answered")
        if self._received:
            return self._received.pop(0)
        if isinstance(self._ended, OSError):
            raise self._ended
        return b""

    def arrive(self, opened: int, *data: bytes) -> None:
        """Data from the maker, on the connection that was opened so many times."""
        if opened == self.opened:
            self._received += data
            self._wake()

    def end(self, how: bytes | OSError = b"") -> None:
        self._ended, self.is_connected = how, False
        self._wake()

    def _wake(self) -> None:
        if self._reader:
            self._world.scheduler.wake(self._reader)


class MakerDouble:
    """The widget maker. widgets: times of creation by id. ills: what is wrong with requests for an id, always.

    ills: `invalid`, `fails` (500), `hangs`, `fells` (the maker goes down); `kills` is the consumer's business.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.widgets: dict[str, float] = {}
        self.ills: dict[str, str] = {}
        self.down_until = 0.0
        self.wires: list[Wire] = []

    def outage(self) -> Outage | None:
        now = self.world.now
        if now < self.down_until:
            return Outage("down", self.down_until - FELLED_S, self.down_until)
        return next((each for each in self.world.plan.outages if each.start <= now < each.end), None)

    def go_down(self) -> None:
        for wire in self.wires:
            wire.end(ConnectionResetError(104, "Connection reset by peer"))
        self.wires.clear()

    def asked(self, wire: Wire, data: bytes) -> None:
        world, random, scheduler = self.world, self.world.random, self.world.scheduler
        head, _, body = data.partition(b"\r\n\r\n")
        target, opened = head.split(b" ", 2)[1], wire.opened
        outage = self.outage()
        if wire not in self.wires:
            self.wires.append(wire)
        if outage and outage.kind == "down":
            wire.end(ConnectionResetError(104, "Connection reset by peer"))
        elif outage and outage.kind != "silent":
            after = random.choice([b"", b"Retry-After: 5\r\n"])
            answer = {
                "busy": _http(b"503 Busy", {}, after),
                "elsewhere": _http(b"404 Not Found", {"detail": "what?"}),
                "wrong": _http(b"302 Found", {}, b"Location: /login\r\n"),
            }[outage.kind]
            scheduler.call_at(world.now + random.uniform(0.001, 0.05), wire.arrive, opened, answer)
        elif not outage and target == b"/healthz":
            late = random.uniform(0, 10) if world.chance("slow maker", 0.2) else 0.001
            scheduler.call_at(world.now + late, wire.arrive, opened, _http(b"200 OK", {"status": "ok"}))
        elif not outage:
            scheduler.call_at(world.now + random.uniform(0.002, 0.1), self._act, wire, opened, json.loads(body))

    def _act(self, wire: Wire, opened: int, content: Any) -> None:
        """Do what the request asks, unless the maker has gone down since."""
        world, random = self.world, self.world.random
        if self.outage():
            return
        items = content if isinstance(content, list) else [{"request": content}]
        ills = {self.ills.get(item["request"]["widget_id"]) for item in items}
        if "fells" in ills:
            self.down_until = world.now + FELLED_S
            self.go_down()
            world.sometimes("a request brings the maker down")
            return
        if world.chance("lost requests", 0.05):
            wire.end(ConnectionResetError(104, "Connection reset by peer"))
            return
        answers = [self._make(item["request"]["widget_id"]) for item in items]
        if "hangs" in ills:
            return
        if world.chance("lost answers", 0.1):
            world.sometimes("answer lost after the widget was made")
            wire.end(b"")
            return
        status, answer = answers[0]
        if isinstance(content, list):
            told = [
                {"message_id": item["message_id"], "status": int(status[:3]), "body": body}
                for item, (status, body) in zip(items, answers, strict=True)
                if not world.chance("lost answers", 0.05)
            ]
            status, answer = b"200 OK", {"answers": told}
        late = 0.001
        if world.chance("slow maker", 0.1):
            late = random.uniform(0, 1.5 * world.plan.claim_ttl)
        data = _http(status, answer)
        cut = random.randrange(len(data)) if random.random() < 0.1 else len(data)
        parts = [part for part in (data[:cut], data[cut:]) if part]
        world.scheduler.call_at(world.now + late, wire.arrive, opened, *parts)

    def _make(self, widget_id: str) -> tuple[bytes, dict[str, Any]]:
        ill = self.ills.get(widget_id)
        if ill == "invalid":
            return b"422 No", {"error": {"code": "invalid_widget_id", "message": "that is no id"}}
        if ill == "fails" or self.world.chance("failing maker", 0.2):
            return b"500 Oh", {"error": {"code": "internal", "message": "oh"}}
        if ill != "hangs":
            self.world.note("made" if widget_id not in self.widgets else "exists", widget_id)
            if widget_id in self.widgets:
                self.world.sometimes("asked again for a widget that exists")
                return b"200 OK", {"id": widget_id}
            self.widgets[widget_id] = self.world.now
        return b"201 Created", {"id": widget_id}


def _http(status: bytes, content: dict[str, Any], more: bytes = b"") -> bytes:
    body = json.dumps(content).encode()
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, more, len(body), body)
