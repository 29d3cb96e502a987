"""Run one of the scripts in this process as a campaign wants it: what it does is written down, and it ends on cue.

The product knows nothing of this: its methods are wrapped from outside, before the script's own `main` is called.
An event is one JSON line, written by one write(2) into a file opened for appending, so that a SIGKILL tears at most
the last line of its own process: `{t, op, phase, ...}`, t in seconds of CLOCK_BOOTTIME. `at` and `until` are
milliseconds of the embedded queue's own clock, as its transaction read it.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import claim_queues.breaker
import claim_queues.keeper
import claim_queues.sqlite
import claim_queues.store
import delivery
import receive_counts
import widget_consumer
import widget_producer  # noqa: F401 what is imported here need not be imported by each forked process
from claim_queues.base import JSON, Claim, Message, Range, Settled, Settlement
from claim_queues.sqlite import SqliteQueues

STEPS = {
    "k0": "before the claim",
    "k1-open": "the claim is not committed yet",
    "k1": "the claim is committed, its answer not read",
    "k2": "the answer is read, the receive not counted",
    "k3-look": "counted, not looked yet whether the claim still holds",
    "k3": "the claim holds, the POST not begun",
    "k4": "half of the request is sent",
    "k5": "the request is sent, the maker has not committed",
    "k6": "the answer has come and is not read",
    "k7": "the answer is read, no response posted",
    "k8-asked": "the settlement is asked for, its transaction not begun",
    "k8": "the response is posted and the delete done, neither committed",
    "k9": "the settlement is committed, its answer not read",
    "k10": "the dead letter is posted, not committed",
    "k11-asked": "a renewal is asked for, its transaction not begun",
    "k11-open": "a renewal is not committed yet",
    "k11": "a renewal is committed, its answer not read",
    "k12-asked": "a release is asked for, its transaction not begun",
    "k12-open": "a release is not committed yet",
    "k12": "a release is committed, its answer not read",
    "k13": "while it gives back after SIGTERM",
}
SHORT_SAFETY_S, SHORT_SPARE_S = 0.1, 0.1
POISON = "kills its consumer"
"""The note of a request that does so."""


@dataclass(frozen=True)
class Plan:
    """What a process does beside its work.

    history: the file for its events; None: the script as it is, without any wrapping.
    claim_ttl: seconds, shorter than the script takes, with all that hangs on it as short; 0 leaves them alone.
    kill: a step of STEPS and the how many-th time it is reached. stops: it only stops there, until a SIGCONT.
    poison: where a request whose note is POISON kills its consumer: at its "POST", or once it is "answered".
    clock_ahead: seconds by which its queue's clock is ahead; claims of processes that died are over the sooner.
    bug: planted, to see that a campaign bites; see _plant() and RecordedQueues.
    post_batch: bodies in one transaction of the producer; 0 leaves it alone.
    gate: a pipe; before the queue is opened (gate_at "open") or once all threads stand and nothing is claimed yet
    ("claim"), (pid, thread ids by name) is sent through it and an answer waited for.
    """

    history: Path | None = None
    claim_ttl: int = 0
    kill: tuple[str, int] | None = None
    stops: bool = False
    poison: str = ""
    clock_ahead: int = 0
    bug: str = ""
    post_batch: int = 0
    gate: Any = None
    gate_at: str = "claim"


def digest(body: JSON) -> str:
    """The same for equal bodies alone."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def run(script: str, options: Sequence[object], plan: Plan, out: Path, err: Path) -> None:
    """Be that script, with these options, until it exits; stdout and stderr go into the files."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as for a script started by a shell
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    _plant(plan.bug)
    if plan.history is not None:
        _Recorder(plan, plan.history).wrap()
    sys.argv = [script, *map(str, options)]
    importlib.import_module(script).main()


def _plant(bug: str) -> None:
    consumer, counts = widget_consumer.Consumer, receive_counts.ReceiveCounts
    match bug:
        case "unsynced":
            claim_queues.store.SYNC = lambda descriptor: None
        case "leak":
            _leak()
        case "lingers":
            stop = consumer.stop
            consumer.stop = lambda self: (time.sleep(10), stop(self))
        case "abandons":
            consumer.stop = _abandon
        case "no-look":
            claim_queues.keeper.Keeper.holds = lambda *given: True
        case "no-fence":
            claim_queues.sqlite.HELD_BY_CLAIM = claim_queues.sqlite.IN_PLACES
            deleting = claim_queues.sqlite._deleting
            claim_queues.sqlite._deleting = lambda rows: deleting(rows).replace(
                "claim = ? AND held_until > ?", "? > '' AND ? > 0"
            )
        case "never-excuses":
            counts.excuse = lambda *given: None
        case "never-charges":
            counts.charge = lambda *given: None
        case "no-trial":
            consumer._put_on_trial = lambda self: None


def _abandon(consumer: Any) -> None:
    """Give all back at once, what is being POSTed too."""
    for held in list(consumer._keeper._claims.values()):
        consumer._queues.release(held.claim)
    os._exit(0)


def _leak() -> None:
    ended = widget_consumer.Consumer.messages_ended
    kept: list[object] = []

    def leaking(self: Any, held: Any, end: Any) -> None:
        kept.append(b"x" * 4096 * len(held))  # zeroes would take no memory until they are written to
        if len(kept) % 25 == 0:
            os.dup(0)
        ended(self, held, end)

    widget_consumer.Consumer.messages_ended = leaking


class _Recorder:
    def __init__(self, plan: Plan, history: Path) -> None:
        self.plan = plan
        self._file = os.open(history, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()
        self._left = plan.kill[1] if plan.kill else 0
        self._posted = 0
        self.stopping = False
        self.here = threading.local()

    def write(self, op: str, phase: str, **fields: object) -> None:
        event = {"t": time.clock_gettime(time.CLOCK_BOOTTIME), "op": op, "phase": phase, **fields}
        os.write(self._file, json.dumps(event).encode() + b"\n")

    def due(self, step: str) -> bool:
        """Whether this is the step, and the time, to die at."""
        if self.plan.kill is None or self.plan.kill[0] != step:
            return False
        with self._lock:
            self._left -= 1
            return self._left == 0

    def hit(self, step: str) -> None:
        if self.due(step):
            self.end()

    def end(self) -> None:
        """Die, or stand still until somebody lets this process go on."""
        if self.plan.stops:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread at once, and with it all others
        else:
            die()

    def wait_at(self, place: str) -> None:
        """Wait there for whoever holds the other end of the gate."""
        if self.plan.gate is not None and self.plan.gate_at == place:
            self.plan.gate.send((os.getpid(), {thread.name: thread.native_id for thread in threading.enumerate()}))
            self.plan.gate.recv()

    def clock(self) -> float:
        now = time.time() + self.plan.clock_ahead
        self.here.at = int(now * 1000)
        return now

    @property
    def at(self) -> int:
        """The time that this thread's last transaction read."""
        return self.here.at

    def now_ms(self) -> int:
        return int((time.time() + self.plan.clock_ahead) * 1000)

    def wrap(self) -> None:
        self._shorten()
        self._wrap_queues()
        self._wrap_transactions()
        self._wrap_looks()
        self._wrap_posts()
        self._wrap_consumer()

    def _shorten(self) -> None:
        ttl = self.plan.claim_ttl
        limits = SqliteQueues.limits
        if self.plan.post_batch:
            limits = replace(limits, post_batch=self.plan.post_batch)
        if ttl:
            limits = replace(limits, claim_ttl=Range(1, 43_200))
            claim_queues.keeper.SAFETY_S = SHORT_SAFETY_S
            claim_queues.breaker.LONGEST_PAUSE_S = claim_queues.breaker.FIRST_PAUSE_S = 0.2
            widget_consumer.POST_SPARE_S = SHORT_SPARE_S
            widget_consumer.BACKOFF_BASE_S, widget_consumer.LONGEST_BACKOFF_S = 0.05, 0.5
            settings = widget_consumer._settings
            widget_consumer._settings = lambda *given: replace(settings(*given), claim_ttl=ttl)
        SqliteQueues.limits = limits

    def _wrap_queues(self) -> None:
        recorder = self

        class RecordedQueues(SqliteQueues):
            def __init__(self, path: Path) -> None:
                recorder.wait_at("open")
                super().__init__(path, clock=recorder.clock)

            def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
                recorder.hit("k0")
                stretched = ttl * 2 if recorder.plan.bug == "long-claims" else ttl
                with recorder.doing("claim"):
                    claim = super().claim(queue, ttl=stretched, grace=grace, limit=limit, wait=wait)
                if claim is None:
                    return None
                at = recorder.at
                recorder.hit("k1")
                received = [[message.id, message.receive_count] for message in claim.messages]
                recorder.write("claim", "ok", claim=claim.id, at=at, until=at + ttl * 1000, received=received)
                if recorder.plan.bug == "delete-first":
                    super().settle(claim, [Settlement(message) for message in claim.messages])
                return claim

            def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
                recorder.hit("k11-asked")
                with recorder.doing("renew"):
                    super().renew(claim, ttl=ttl, messages=messages)
                at = recorder.at
                recorder.hit("k11")
                recorder.write(
                    "renew", "ok", claim=claim.id, at=at, until=at + ttl * 1000, messages=ids(claim, messages)
                )

            def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
                said = [[found.message.id, *outcome(found)] for found in settlements]
                recorder.write("settle", "invoke", claim=claim.id, at=recorder.now_ms(), messages=said)
                recorder.hit("k8-asked")
                with recorder.doing("settle", letters=any(dead for _, _, dead in said)):
                    settled = super().settle(claim, settlements)
                at = recorder.at
                recorder.hit("k9")
                recorder.write(
                    "settle", "ok", claim=claim.id, at=at, deleted=list(settled.deleted), lost=list(settled.lost)
                )
                return settled

            def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
                found = ids(claim, messages)
                recorder.write("release", "invoke", claim=claim.id, at=recorder.now_ms(), messages=found)
                recorder.hit("k12-asked")
                if recorder.plan.bug == "keeps":
                    return
                with recorder.doing("release"):
                    super().release(claim, messages, delay=delay)
                at = recorder.at
                recorder.hit("k12")
                recorder.write("release", "ok", claim=claim.id, at=at, messages=found)

        claim_queues.sqlite.SqliteQueues = RecordedQueues  # what open_queues() opens

    @contextmanager
    def doing(self, operation: str, *, letters: bool = False) -> Iterator[None]:
        self.here.operation, self.here.letters = operation, letters
        try:
            yield
        finally:
            self.here.operation = ""

    def _wrap_transactions(self) -> None:
        transaction = claim_queues.store.transaction

        @contextmanager
        def wrapped(connection: Any) -> Iterator[None]:
            with transaction(connection):
                yield
                self._before_commit(getattr(self.here, "operation", ""))

        claim_queues.sqlite.transaction = wrapped

    def _before_commit(self, operation: str) -> None:
        step = {"claim": "k1-open", "renew": "k11-open", "settle": "k8", "release": "k12-open"}.get(operation)
        if step is None:
            return
        self.hit(step)
        if operation == "settle" and self.here.letters:
            self.hit("k10")
        if self.stopping and operation in ("settle", "release"):
            self.hit("k13")

    def _wrap_looks(self) -> None:
        holds = claim_queues.keeper.Keeper.holds

        def recorded_holds(keeper: Any, held: Any, seconds: float) -> bool:
            self.hit("k3-look")
            at = self.now_ms()
            is_held = holds(keeper, held, seconds)
            if is_held and self.plan.stops:
                self.write("look", "ok", message=held.message.id, at=at)
            return is_held

        claim_queues.keeper.Keeper.holds = recorded_holds

    def _wrap_posts(self) -> None:
        connection = delivery.Connection
        post, post_batch, open_ = connection.post, connection.post_batch, connection._open
        received = receive_counts.ReceiveCounts.received

        def recorded_post(self: Any, request: dict[str, JSON], headers: dict[str, str]) -> Any:
            message = headers["Idempotency-Key"]
            recorder.before_post([(message, request)])
            answer = post(self, request, headers)
            recorder.die_of([request], "answered")
            recorder.hit("k7")
            recorder.write("post", "ok", answers=[[message, answer.outcome, answer.status]], at=recorder.now_ms())
            recorder.after_post()
            return answer

        def recorded_batch(self: Any, deliveries: Sequence[Any]) -> Any:
            recorder.before_post([(found.id, found.held.message.body) for found in deliveries])
            whole = post_batch(self, deliveries)
            recorder.die_of([found.held.message.body for found in deliveries], "answered")
            recorder.hit("k7")
            answers = [(found.id, whole or found.answer) for found in deliveries]
            told = [[id_, answer.outcome, answer.status] for id_, answer in answers]
            recorder.write("post", "ok", answers=told, at=recorder.now_ms())
            recorder.after_post()
            return whole

        def counted(self: Any, messages: Sequence[Message]) -> Any:
            recorder.hit("k2")
            return received(self, messages)

        recorder = self
        connection.post, connection.post_batch = recorded_post, recorded_batch
        receive_counts.ReceiveCounts.received = counted
        if self.plan.kill and self.plan.kill[0] in ("k4", "k5", "k6"):
            connection._open = lambda self: _CutSocket(open_(self), recorder)

    def before_post(self, requests: list[tuple[str, Any]]) -> None:
        self.hit("k3")
        self.write("post", "invoke", at=self.now_ms(), requests=[[id_, digest(body)] for id_, body in requests])
        self.die_of([body for _, body in requests], "POST")

    def die_of(self, requests: Sequence[Any], place: str) -> None:
        if self.plan.poison == place and any(request.get("note") == POISON for request in requests):
            die()

    def after_post(self) -> None:
        self._posted += 1
        if self.plan.kill and self.plan.kill[0] == "k13" and self._posted == self.plan.kill[1]:
            os.kill(os.getpid(), signal.SIGTERM)

    def _wrap_consumer(self) -> None:
        recorder = self
        stop, claiming = widget_consumer.Consumer.stop, widget_consumer.Consumer._claim_until_done

        def recorded_stop(self: Any) -> None:
            if recorder.plan.kill and recorder.plan.kill[0] == "k13" and not recorder.stopping:
                recorder.stopping, recorder._left = True, 1
            stop(self)

        def gated(self: Any) -> None:
            # The spare is for what may pass between the look at the claim and the POST.
            recorder.write("start", "ok", pid=os.getpid(), needs=round(self._maker.deadline_s * 1000))
            recorder.wait_at("claim")
            claiming(self)

        widget_consumer.Consumer.stop = recorded_stop
        widget_consumer.Consumer._claim_until_done = gated


class _CutSocket:
    """The socket to the maker, on which the process may die half way."""

    def __init__(self, real: Any, recorder: _Recorder) -> None:
        self._real = real
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def sendall(self, data: bytes) -> None:
        if self._recorder.due("k4"):
            half = len(data) // 2
            self._real.sendall(data[:half])
            self._recorder.end()
            data = data[half:]
        self._real.sendall(data)
        self._recorder.hit("k5")

    def recv(self, size: int) -> bytes:
        if self._recorder.due("k6"):
            select.select([self._real], [], [])
            self._recorder.end()
        return self._real.recv(size)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ids(claim: Claim, messages: Collection[Message] | None) -> list[str]:
    return [message.id for message in (claim.messages if messages is None else messages)]


def outcome(settlement: Settlement) -> tuple[str | None, bool]:
    """The outcome that a settlement's response tells, and whether it posts a dead letter."""
    found = [post.body.get("outcome") for post in settlement.posts if isinstance(post.body, dict)]
    return next((each for each in found if each), None), None in found
