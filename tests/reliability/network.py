"""Network faults between consumer and maker, at every byte."""

import os
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from scripted_maker import Raw, Reply, Request
from service_scripts import SERVICES, Service
from support import HERE, widget_maker, widgets
from tcp_proxy import NO_FAULT, Fault, TcpProxy

import widget_consumer
from claim_queues import (
    Claim,
    ClaimLost,
    Message,
    QueueError,
    Queues,
    Settlement,
    breaker,
    keeper,
    open_queues,
)
from claim_queues.breaker import Failure
from claim_queues.sqlite import SqliteQueues
from delivery import Answer, Maker
from receive_counts import ReceiveCounts
from widget_consumer import Consumer, Settings

from .campaign import Campaign, Result

DEADLINE_S = 0.3
LATE_S = 1.0
"""No POST may last longer than its deadline and this."""
AT_ONCE = 8
MESSAGES = 2_000
ENDS = ("close", "reset", "hang")
HEADERS = {
    "Idempotency-Key": "m",
    "webhook-id": "m",
    "X-Message-Receive-Count": "1",
    "X-Message-Queue": "requests",
    "X-Message-Age": "0",
}


def widget_id(number: int) -> str:
    return f"{number:08x}-54f4-11e5-ad75-3c970e65f731"


@contextmanager
def real_maker() -> Iterator[tuple[str, int]]:
    """The maker as a process, its file in memory where there is such a place: its URL and port."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory,
        widget_maker(Path(directory)) as (url, maker),
    ):
        yield url, int(url.rpartition(":")[2])
        assert "Traceback" not in maker.err, maker.err


def some(everything: range, scale: float) -> list[int]:
    """All of them at full scale, else a sample that keeps both ends."""
    step = max(1, round(1 / max(scale, 1e-6)))
    return sorted({*everything[::step], everything[0], everything[-1]})


# Cut at every byte


@dataclass(frozen=True)
class Posted:
    """One POST through a fault: what it was answered, how long it took, and what the same POST is answered without."""

    name: str
    answer: Answer
    seconds: float
    again: Answer


def post_through(port: int, number: int, fault: Fault, name: str) -> Posted:
    content = {"widget_id": widget_id(number)}
    with TcpProxy("127.0.0.1", port, lambda _: fault) as proxy:
        connection = Maker(f"http://127.0.0.1:{proxy.port}/widgets", deadline_s=DEADLINE_S).connect()
        started = time.monotonic()
        answer = connection.post(content, HEADERS)
        seconds = time.monotonic() - started
        connection.close()
    straight = Maker(f"http://127.0.0.1:{port}/widgets", deadline_s=20).connect()
    again = straight.post(content, HEADERS)
    straight.close()
    return Posted(name, answer, seconds, again)


def problems(posted: Posted) -> list[str]:
    """What of a POST through a fault breaks a promise."""
    answer, found = posted.answer, []
    if answer.outcome == "rejected" or (answer.outcome is None and answer.failure is not Failure.UNAVAILABLE):
        found.append(f"{posted.name}: taken for {answer}")
    if answer.outcome == "created" and posted.again.status == 201:
        found.append(f"{posted.name}: created was believed, and no widget was there")
    if posted.again.outcome != "created":
        found.append(f"{posted.name}: the same POST again: {posted.again}")
    if posted.seconds > DEADLINE_S + LATE_S:
        found.append(f"{posted.name}: lasted {posted.seconds:.2f} s")
    return found


def sizes(url: str, port: int) -> tuple[int, int]:
    """How many bytes one POST and its answer have on the wire."""
    maker = Maker(f"http://127.0.0.1:{port}/widgets", deadline_s=20)
    sent = maker.request({"widget_id": widget_id(0)}, HEADERS)
    with socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall(sent.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        answer = b""
        while data := wire.recv(65_536):
            answer += data
    return len(sent), len(answer) - len(b"connection: close\r\n")


def cut_everywhere(scale: float) -> Result:
    """A POST whose request or answer ends after byte N, for every N: closed, reset, and silent."""
    with real_maker() as (url, port), ThreadPoolExecutor(AT_ONCE) as pool:
        request_size, answer_size = sizes(url, port)
        faults = [
            *(Fault(request_bytes=n, end=end) for end in ENDS for n in some(range(request_size), scale)),
            *(Fault(answer_bytes=n, end=end) for end in ENDS for n in some(range(answer_size + 1), scale)),
        ]
        done = list(pool.map(lambda each: post_through(port, *each, str(each[1])), enumerate(faults, 1)))
        made = widgets(url)
    violations = [problem for posted in done for problem in problems(posted)]
    if len(made) != len(set(made)) or len(made) != len(faults) + 1:
        violations.append(f"{len(made)} widgets of {len(faults) + 1} requests")
    outcomes = Counter(posted.answer.outcome or str(posted.answer.failure) for posted in done)
    return Result(
        {
            "n": len(done),
            "request bytes": request_size,
            "answer bytes": answer_size,
            **outcomes,
            "longest POST, s": round(max(posted.seconds for posted in done), 2),
        },
        violations,
    )


# Slow, and not there


def slow_network(scale: float) -> Result:
    """Latency and trickles below and above the deadline, and a host that answers no SYN."""
    slow = [
        ("latency 0.1 s", Fault(latency_s=0.1), "created"),
        ("latency 0.5 s", Fault(latency_s=0.5), None),
        ("64 bytes every 10 ms", Fault(piece=64, every_s=0.01), "created"),
        ("1 byte every 10 ms", Fault(piece=1, every_s=0.01), None),
        ("1 byte of the answer every 10 ms", Fault(piece=1, every_s=0.01, answers_alone=True), None),
        ("16 bytes every 50 ms", Fault(piece=16, every_s=0.05), None),
    ]
    times = max(1, round(20 * scale))
    violations: list[str] = []
    longest = 0.0
    numbers = iter(range(1, 1_000_000))
    with real_maker() as (url, port), ThreadPoolExecutor(4) as pool:
        trials = [(next(numbers), fault, name, expected) for name, fault, expected in slow for _ in range(times)]
        for posted, expected in pool.map(lambda each: (post_through(port, *each[:3]), each[3]), trials):
            violations += problems(posted)
            longest = max(longest, posted.seconds)
            if expected is None and posted.answer.outcome:
                violations.append(f"{posted.name}: {posted.answer} after {posted.seconds:.2f} s")
        if len(widgets(url)) != len(trials):
            violations.append(f"{len(widgets(url))} widgets of {len(trials)} requests")
    with blackhole() as port:
        for _ in range(times):
            connection = Maker(f"http://127.0.0.1:{port}/widgets", deadline_s=DEADLINE_S).connect()
            started = time.monotonic()
            answer = connection.post({"widget_id": widget_id(0)}, HEADERS)
            seconds = time.monotonic() - started
            longest = max(longest, seconds)
            if answer.failure is not Failure.UNAVAILABLE or seconds > DEADLINE_S + LATE_S:
                violations.append(f"no answer to SYN: {answer} after {seconds:.2f} s")
    return Result({"n": len(trials) + times, "longest POST, s": round(longest, 2)}, violations)


@contextmanager
def blackhole() -> Iterator[int]:
    """A port whose queue of connections is full: the kernel drops every further SYN."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# The consumer over a network that fails at random


@contextmanager
def short_pauses() -> Iterator[None]:
    """Let a consumer of this process not wait as long as it would."""
    with ExitStack() as stack:
        for module, name, seconds in [
            (widget_consumer, "BACKOFF_BASE_S", 0.01),
            (widget_consumer, "LONGEST_BACKOFF_S", 0.05),
            (widget_consumer, "LONGEST_PAUSE_S", 0.05),
            (widget_consumer, "CLAIM_PAUSE_S", 0.01),
            (breaker, "FIRST_PAUSE_S", 0.01),
            (breaker, "LONGEST_PAUSE_S", 0.02),
            (breaker, "UNDECIDED_S", 0.05),
            (keeper, "FIRST_PAUSE_S", 0.01),
        ]:
            stack.enter_context(patch.object(module, name, seconds))
        yield


def random_fault(dice: random.Random) -> Callable[[int], Fault]:
    """Three connections of four fail somewhere in their first dozen POSTs."""
    lock = threading.Lock()

    def fault(_: int) -> Fault:
        with lock:
            kind, size, end = dice.randrange(8), dice.randrange(6_000), dice.choice(ENDS)
        if kind < 3:
            return Fault(request_bytes=size, end=end)
        if kind < 6:
            return Fault(answer_bytes=size, end=end)
        return Fault(latency_s=0.02) if kind == 6 else NO_FAULT

    return fault


def consumer_over_faults(scale: float) -> Result:
    """A consumer that drains a queue over connections most of which break: every request is made, once."""
    count = max(20, round(MESSAGES * scale))
    ids = [widget_id(number) for number in range(count)]
    faulty: list[int] = []
    fault = random_fault(random.Random(7))
    totals: Counter[str] = Counter()

    def noted(number: int) -> Fault:
        found = fault(number)
        if found.request_bytes is not None or found.answer_bytes is not None:
            faulty.append(number)
        return found

    with (
        short_pauses(),
        real_maker() as (url, port),
        tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory,
        SqliteQueues(Path(directory) / "queues.sqlite3") as queues,
        TcpProxy("127.0.0.1", port, noted) as proxy,
    ):
        queues.post("requests", [{"widget_id": id_} for id_ in ids])
        for batch in (1, 5):
            settings = Settings(
                request_queue="requests",
                response_queue="responses",
                dead_letter_queue="dead-letters",
                create=False,
                claim_ttl=60,
                grace=60,
                claim_limit=20,
                slots=8,
                post_batch=batch,
                max_receives=1_000,
                poll_interval=0.1,
                response_ttl=None,
                drain=True,
            )
            maker = Maker(f"http://127.0.0.1:{proxy.port}/widgets", deadline_s=DEADLINE_S)
            counts = ReceiveCounts(None, "", counted_by_service=True)
            consumer = Consumer(queues, maker, counts, settings)
            consumer.run()
            totals += consumer.totals
            if batch == 1:
                queues.post("requests", [{"widget_id": id_} for id_ in ids])
        responses = [message.body for message in browse(queues, "responses")]
        made, letters = widgets(url), queues.stats("dead-letters").total
    answered = Counter((body["widget_id"], body["outcome"]) for body in responses if isinstance(body, dict))
    violations = []
    if answered != Counter({(id_, "created"): 2 for id_ in ids}):
        violations.append(f"{len(responses)} responses for {2 * count} requests: {answered.most_common(3)}")
    if sorted(made) != ids:
        violations.append(f"{len(made)} widgets for {count} ids, {len(set(made))} of them different")
    if letters:
        violations.append(f"{letters} dead letters")
    figures = {"n": 2 * count, "faulty connections": len(faulty), "receives": totals["received"]}
    return Result({**figures, "excused": totals["excused"], "retried": totals["retried"]}, violations)


def browse(queues: SqliteQueues, queue: str) -> Iterator[Message]:
    after = ""
    while (page := queues.browse(queue, after=after, limit=1_000, claimed=True)).messages:
        yield from page.messages
        after = page.marker


# Answers of queue services, cut at every byte

KINDS = ("post", "claim", "renew", "delete", "release", "look")
SERVERS = {"cloud-queues": "zaqar18", "zaqar-mongodb": "zaqar23", "sqs": "sqs"}
"""Each service with the environment that its server runs in."""


def servers_installed() -> bool:
    return all((HERE / ".venvs" / name / "installed").exists() for name in SERVERS.values())


class CutService:
    """A queue service whose answers of one kind end after some bytes, and what must hold all the same."""

    def __init__(self, service: Service, queues: Queues) -> None:
        self.service = service
        self.queues = queues
        self.queue = service.request_queue
        self.terms = {"grace": 60 if queues.limits.grace else 0, "limit": 1}
        self.size = 0

    def answer(self, number: int | None, end: str) -> Callable[[Request], Reply | Raw]:
        """The server's own answer, cut after so many bytes; None: whole."""

        def cut(request: Request) -> Reply | Raw:
            reply = self.service.serve(request)
            body = reply.body if isinstance(reply.body, bytes) else str(reply.body).encode()
            headers = {"Content-Length": str(len(body))} | dict(reply.headers)
            lines = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in headers.items())]
            whole = "\r\n".join([*lines, "", ""]).encode() + body
            self.size = len(whole)
            return Raw([whole if number is None else whole[:number]], end="keep" if number is None else end)

        return cut

    def trial(self, kind: str, number: int | None, end: str) -> str:
        """What a call came to; raises AssertionError where that is none of what it may come to."""
        # A claim whose answer is lost is asked for once more on SQS: either takes a message.
        message_id, *_ = self.service.queues.post(self.queue, ["x"] * (2 if kind == "claim" else 1))
        held = None if kind in {"post", "claim", "look"} else self.queues.claim(self.queue, ttl=60, **self.terms)
        before = self.service.queues.stats(self.queue).total
        self.service.fail({kind}, self.answer(number, end))
        try:
            said = self.ask(kind, held, before)
        except ClaimLost as error:
            raise AssertionError("a claim that is held was called lost") from error
        except QueueError as error:
            return type(error).__name__
        finally:
            self.service.mend()
            # moto counts messages in no state while their holds end; what is lost is missing from every count.
            after = max(self.service.queues.stats(self.queue).total for _ in range(3))
            assert after >= before - (kind == "delete"), f"{before - after} messages are gone, {message_id} among them?"
        return said

    def ask(self, kind: str, held: Claim | None, before: int) -> str:
        if kind == "post":
            assert len(self.queues.post(self.queue, ["x"])) == 1
            assert self.service.queues.stats(self.queue).total > before, "what was reported as posted is not there"
        elif kind == "claim":
            found = self.queues.claim(self.queue, ttl=60, **self.terms)
            assert found, "a queue with messages looked empty"
        elif kind == "look":
            assert self.queues.stats(self.queue).total == before, "a wrong number of messages"
        elif held is not None:
            if kind == "renew":
                self.queues.renew(held, ttl=60)
            elif kind == "release":
                self.queues.release(held)
            else:
                settled = self.queues.settle(held, [Settlement(message) for message in held.messages])
                assert not settled.lost, "a message that is held was called lost"
        return "done"


def cut_answers_of_services(scale: float) -> Result:
    """Each kind of call to each service, its answer closed or reset after byte N: an error, or done, never a lie.

    All kinds at once, each on a queue of its own: most of the time goes into pauses before second attempts.
    """
    with ExitStack() as stack:
        parts = [(stack.enter_context(cut_service(name)), name, kind) for name in SERVERS for kind in KINDS]
        with ThreadPoolExecutor(len(parts)) as pool:
            results = list(pool.map(lambda part: cut_answers(*part, scale), parts))
    seen = sum((found for found, _ in results), Counter[str]())
    return Result({"n": seen.total(), **seen}, [line for _, lines in results for line in lines])


@contextmanager
def cut_service(name: str) -> Iterator[CutService]:
    with tempfile.TemporaryDirectory() as directory, SERVICES[name](Path(directory)) as service:
        service.create()
        with patch.dict(os.environ, service.env):
            queues = open_queues(service.url)
        with queues:
            yield CutService(service, queues)


def cut_answers(cut: CutService, name: str, kind: str, scale: float) -> tuple[Counter[str], list[str]]:
    """How many calls of that kind came to what, and what was broken."""
    seen: Counter[str] = Counter()
    violations: list[str] = []
    assert cut.trial(kind, None, "close") == "done", (name, kind)
    for end in ("close", "reset"):
        for number in some(range(cut.size), scale):
            try:
                seen[cut.trial(kind, number, end)] += 1
            except Exception as error:
                violations.append(f"{name} {kind}, {end} after byte {number}: {error!r}")
    cut.trial(kind, None, "close")
    return seen, violations


CAMPAIGNS = [
    Campaign(
        "cut-at-every-byte", "a POST cut after any byte, either way, loses nothing and ends in time", cut_everywhere
    ),
    Campaign(
        "cut-service-answers",
        "no answer of a queue service that is cut short is taken for another",
        cut_answers_of_services,
    ),
    Campaign("slow-network", "latency, trickles and a host that is not there end a POST at its deadline", slow_network),
    Campaign("broken-connections", "a consumer whose connections break makes every widget once", consumer_over_faults),
]
