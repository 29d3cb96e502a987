"""A campaign of endurance: one consumer process works off a million messages, and is none the worse for it.

The maker is a stand-in that answers at once, so that the consumer is what is measured.
"""

import json
import os
import signal
import socket
import socketserver
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import wait_until

from claim_queues.sqlite import SqliteQueues

from .campaign import Campaign, Result
from .recorded import Plan
from .trial import _FORKS, REQUESTS, RESPONSES, Run, scaled, trial, widget_ids

MESSAGES, PARTS = 1_000_000, 10
MOST_GROWTH_MB = 20.0
LEAST_RATE = 0.95
LEAST_IN_A_PART = 50_000
"""A rate measured over fewer messages tells nothing."""
PORTION = 1_000
FEWEST_QUEUED = 5_000
LOOK_EVERY_S = 0.1
LONGEST_SILENCE_S = 60.0


@dataclass(frozen=True)
class Sample:
    """The consumer after so many messages. seconds: of the clock. cpu_s: its own. rss_mb: in memory, in MB (1e6 bytes).

    descriptors: open files and sockets.
    """

    messages: int
    seconds: float
    cpu_s: float
    rss_mb: float
    descriptors: int


def soak(scale: float, bug: str = "") -> Result:
    """A million messages go through one consumer, which is measured after each tenth of them."""
    count = scaled(MESSAGES, scale)
    with trial() as made, ExitStack() as stack:
        listener = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0), backlog=64)))
        maker = _FORKS.Process(target=_make, args=(listener,), daemon=True)
        queues = stack.enter_context(SqliteQueues(made.queue))
        flow = _Flow(queues, count)
        maker.start()
        stack.callback(maker.join)
        stack.callback(maker.kill)
        options: list[object] = ["--maker-url", f"http://127.0.0.1:{listener.getsockname()[1]}/widgets"]
        options += ["--receive-counts", made.directory / "counts.sqlite3", "--log-level", "warning"]
        consumer = made.run("widget_consumer", *options, "--post-batch", 20, plan=Plan(bug=bug))
        wait_until(lambda: _waits(consumer) or not consumer.is_running)  # what it opens for that, it keeps
        flow.fill()
        samples = _measure(consumer, flow, count)
        consumer.signal(signal.SIGTERM)
        code = consumer.wait()
        violations = flow.violations + _judge(samples)
        if code or consumer.err.read_text():
            violations.append(f"the consumer exited {code}: {consumer.err.read_text()[-500:]}")
    return Result({"n": count, "lost": len(flow.open), "twice": flow.twice, **_figures(samples)}, violations)


class _Flow:
    """Keeps the request queue filled, so that it never grows large, and takes the responses off theirs.

    open: widget ids whose response has not come. answered: responses taken. twice: those of ids that had one already.
    """

    def __init__(self, queues: SqliteQueues, count: int) -> None:
        self._queues = queues
        self._left = count
        self.open: set[str] = set()
        self.answered = self.twice = 0
        self.violations: list[str] = []

    def fill(self) -> None:
        while self._left and len(self.open) < 2 * FEWEST_QUEUED:
            ids = widget_ids(min(PORTION, self._left))
            self._queues.post(REQUESTS, [{"widget_id": id_} for id_ in ids])
            self.open.update(ids)
            self._left -= len(ids)

    def go_on(self) -> int:
        """Take what responses there are, and post more where the queue runs low; gives how many were taken."""
        time.sleep(LOOK_EVERY_S)  # many at once: this is not to be in the consumer's way
        page = self._queues.browse(RESPONSES, limit=PORTION)
        for message in page.messages:
            self._take(message.body)
        self._queues.delete(RESPONSES, [message.id for message in page.messages])
        if len(self.open) < FEWEST_QUEUED:
            self.fill()
        return len(page.messages)

    def _take(self, response: Any) -> None:
        self.answered += 1
        if response["outcome"] != "created":
            self.violations.append(f"{response['outcome']}: {response['reason']}")
        if response["widget_id"] in self.open:
            self.open.remove(response["widget_id"])
        else:
            self.twice += 1


def _measure(consumer: Run, flow: _Flow, count: int) -> list[Sample]:
    """Samples at the first response, and after each part of the messages."""
    wait_until(lambda: flow.go_on() or not consumer.is_running)
    samples = [_sample(consumer, flow)]
    heard_at = time.monotonic()
    while flow.open:
        if flow.go_on():
            heard_at = time.monotonic()
        if flow.answered >= len(samples) * count // PARTS:
            samples.append(_sample(consumer, flow))
        assert consumer.is_running, consumer.err.read_text()[-2000:]
        assert time.monotonic() - heard_at < LONGEST_SILENCE_S, "the consumer has stopped working"
    return samples


def _waits(consumer: Run) -> bool:
    """Whether the consumer watches its queue's file: it does so from the first time that it finds nothing."""
    with suppress(FileNotFoundError):  # one that has just been closed
        return any("inotify" in str(found.readlink()) for found in Path(f"/proc/{consumer.pid}/fd").iterdir())
    return False


def _sample(consumer: Run, flow: _Flow) -> Sample:
    process = Path(f"/proc/{consumer.pid}")
    pages = int((process / "statm").read_text().split()[1])
    user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
    return Sample(
        flow.answered,
        time.monotonic(),
        (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"),
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(list((process / "fd").iterdir())),
    )


def _per_message(samples: list[Sample], part: int, measure: str) -> float:
    """Microseconds for a message of that part."""
    before, after = samples[part], samples[part + 1]
    spent: float = getattr(after, measure) - getattr(before, measure)
    return spent / (after.messages - before.messages) * 1e6


def _figures(samples: list[Sample]) -> dict[str, Any]:
    first, last = 0, len(samples) - 2
    return {
        "RSS in MB after a tenth": round(samples[1].rss_mb, 1),
        "RSS in MB at the end": round(samples[-1].rss_mb, 1),
        "descriptors": "-".join(map(str, sorted({sample.descriptors for sample in samples[1:]}))),
        "messages/s in the first tenth": round(1e6 / _per_message(samples, first, "seconds")),
        "messages/s in the last tenth": round(1e6 / _per_message(samples, last, "seconds")),
        "CPU µs per message in the first tenth": round(_per_message(samples, first, "cpu_s"), 1),
        "in the last tenth": round(_per_message(samples, last, "cpu_s"), 1),
    }


def _judge(samples: list[Sample]) -> list[str]:
    """By the CPU time per message: messages per second change with whatever else the machine does."""
    first, last = samples[1], samples[-1]
    violations = []
    if last.rss_mb - first.rss_mb > MOST_GROWTH_MB:
        violations.append(f"memory grew from {first.rss_mb:.1f} to {last.rss_mb:.1f} MB")
    if last.descriptors > first.descriptors:
        violations.append(f"open descriptors grew from {first.descriptors} to {last.descriptors}")
    spent, later = _per_message(samples, 0, "cpu_s"), _per_message(samples, len(samples) - 2, "cpu_s")
    if first.messages >= LEAST_IN_A_PART and spent < LEAST_RATE * later:
        violations.append(f"a message took {spent:.1f} µs of CPU in the first tenth, {later:.1f} in the last")
    return violations


# The stand-in for the maker


def _make(listener: socket.socket) -> None:
    with socketserver.ThreadingTCPServer(("", 0), _Answers, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = listener
        server.serve_forever()


class _Answers(socketserver.StreamRequestHandler):
    """Answers each request on a kept-alive connection: all is made."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        while request_line := self.rfile.readline():
            length = 0
            while (header := self.rfile.readline().strip()) != b"":
                if header.lower().startswith(b"content-length:"):
                    length = int(header.partition(b":")[2])
            content = json.loads(self.rfile.read(length))
            if b"/batch" in request_line:
                items = [
                    {"message_id": item["message_id"], "status": 201, "body": _widget(item["request"])}
                    for item in content
                ]
                self._send(b"200 OK", {"answers": items})
            else:
                self._send(b"201 Created", _widget(content))

    def _send(self, status: bytes, content: Any) -> None:
        body = json.dumps(content).encode()
        self.wfile.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))


def _widget(request: Any) -> dict[str, str]:
    return {"id": request["widget_id"], "created_at": "2026-01-02T03:04:05.678Z"}


CAMPAIGNS = [
    Campaign(
        "soak",
        "a million messages through one consumer: memory grows by at most 20 MB after the first tenth, descriptors do"
        " not, and the last tenth runs at 95 % of the first's speed or more, by CPU time per message",
        soak,
    )
]
