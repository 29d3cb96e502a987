"""A trial: one queue file with the scripts as real processes around it, and the evidence that they leave.

Consumers and producers are forked off a process that has imported them already (multiprocessing's forkserver), so
that a campaign can afford thousands; the maker is started as a user would start it.
"""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import apsw
from support import Script, free_port, is_healthy, wait_until

from claim_queues.sqlite import SqliteQueues

from . import recorded
from .checker import Evidence, check, read_history
from .recorded import Plan

REQUESTS, RESPONSES = "itchy-octo-chainsaw-request", "itchy-octo-chainsaw-response"
DEAD_LETTERS = "itchy-octo-chainsaw-dead-letter"
MEMORY = Path("/dev/shm")
"""A file system without a disk, where it does not matter that nothing is written to one."""
CLAIM_TTL = 2
"""Seconds; the scripts take no less than 60, too long to wait for after each of a thousand kills."""
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([recorded.__name__])
_STARTING = threading.Lock()


def start_forks(**environment: str) -> None:
    """Start the process that all others are forked off anew, with these variables in its environment."""
    forkserver._forkserver._stop()
    kept = dict(os.environ)
    for measured in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        os.environ.pop(measured, None)  # what is killed reports nothing
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(sys.path))  # or it could not import beforehand
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def require_forks() -> None:
    """Start the process that all others are forked off, unless it runs."""
    if forkserver._forkserver._forkserver_pid is None:
        start_forks()


class Run:
    """One script as a process.

    out, err, history: files of what it wrote, and of its events. seconds: how long it ran, once waited for.
    """

    def __init__(self, script: str, options: Sequence[object], plan: Plan, out: Path, err: Path) -> None:
        self.out, self.err = out, err
        self.history = plan.history or out.with_suffix(".jsonl")
        self.seconds = 0.0
        for path in (out, err):
            path.touch()
        self.process = _FORKS.Process(target=recorded.run, args=(script, options, plan, out, err), daemon=True)
        with _STARTING:
            require_forks()
            self.process.start()
            multiprocessing.process._children.discard(self.process)  # or a start in another thread would reap it
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def wait_for_events(self) -> None:
        """Wait until it is about to claim, or has ended."""
        wait_until(lambda: (self.history.exists() and self.history.stat().st_size) or not self.is_running)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join()

    def wait(self, seconds: float = 60) -> int:
        """The exit code, negative for a signal; an AssertionError with its log where it does not end in time."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"still running after {seconds:g} s:\n{self.err.read_text()[-2000:]}")
        self.seconds = time.monotonic() - self.started
        return code


class Trial:
    """A directory with a queue file; deaths counts the processes that were killed in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.queue = directory / "q.sqlite3"
        self.database = directory / "widgets.sqlite3"
        self.maker_url = f"http://127.0.0.1:{free_port()}"
        self.deaths = 0
        self.attempted: list[Any] = []
        self.acknowledged: dict[str, Any] = {}
        self.cuts: list[int] = []
        self._producers: list[tuple[Run, list[str]]] = []
        self._runs: list[Run] = []
        self.resumed: list[int] = []
        self._numbers = itertools.count(1)

    def path(self, kind: str) -> Path:
        """A new file name in the trial's directory."""
        return self.directory / f"{next(self._numbers):05d}.{kind}"

    def post(self, bodies: Sequence[Any], *, ttl: int | None = None) -> list[str]:
        """Post bodies that no producer would."""
        with SqliteQueues(self.queue) as queues:
            ids = queues.post(REQUESTS, bodies, ttl=ttl)
        self.attempted += bodies
        self.acknowledged.update(zip(ids, bodies, strict=True))
        return ids

    def producer(self, ids: list[str], plan: Plan = Plan()) -> Run:  # noqa: B008 it is frozen
        """A producer that submits these ids. What it reports counts as acknowledged."""
        given = self.path("ids")
        given.write_text("".join(f"{id_}\n" for id_ in ids))
        run = self.run("widget_producer", "--ids-file", given, plan=plan)
        self._producers.append((run, ids))
        return run

    def consumer(self, *options: object, plan: Plan = Plan(claim_ttl=CLAIM_TTL), drain: bool = False) -> Run:  # noqa: B008
        """A consumer whose claim TTL is short, with an own history."""
        words = ["--maker-url", f"{self.maker_url}/widgets", "--receive-counts", self.directory / "counts.sqlite3"]
        words += ["--claim-ttl", 60, "--deadline", 1, "--max-receives", 1000, "--log-level", "warning", *options]
        words += ["--drain"] if drain else []
        words += (
            ["--poll-interval", 0.2] if drain or plan.claim_ttl else []
        )  # a short claim must outlast the wait for it
        return self.run("widget_consumer", *words, plan=replace(plan, history=self.path("jsonl")))

    def run(self, script: str, *options: object, plan: Plan = Plan()) -> Run:  # noqa: B008
        return self.run_plain(script, "--queue-url", f"sqlite:///{self.queue}", *options, plan=plan)

    def run_plain(self, script: str, *options: object, plan: Plan = Plan()) -> Run:  # noqa: B008
        """The script with these options alone."""
        run = Run(script, options, plan, self.path("out"), self.path("err"))
        self._runs.append(run)
        return run

    def drain(self, *options: object, seconds: float = 120) -> None:
        """Let a consumer work off what is left, messages of dead consumers included."""
        run = self.consumer(*options, drain=True)
        code = run.wait(seconds)
        assert code == 0, f"the drain exited {code}:\n{run.err.read_text()[-2000:]}"

    @contextmanager
    def maker(self, *options: object, env: dict[str, str] | None = None) -> Iterator[Script]:
        """The maker, answering, always at the same URL; killed at the end of the block."""
        port = self.maker_url.rpartition(":")[2]
        words = ["--port", port, "--database", self.database, "--log-level", "warning", *options]
        maker = Script("widget_maker.py", *words, cwd=self.directory, env=env)
        try:
            wait_until(lambda: is_healthy(self.maker_url) or maker.process.poll() is not None)
            assert maker.process.poll() is None, maker.err
            yield maker
        finally:
            processes = [maker.process.pid, *_children(maker.process.pid)]
            maker.kill()
            wait_until(lambda: not any(map(_is_alive, processes)))

    def kill_all(self) -> None:
        for run in self._runs:
            run.kill()

    def read_producers(self) -> None:
        """Take over what the producers reported; a line without an end was cut off by the kill."""
        for run, ids in self._producers:
            self.attempted += [{"widget_id": id_} for id_ in ids]
            for line in run.out.read_bytes().split(b"\n")[:-1]:
                message_id, _, widget_id = line.decode().partition(" ")
                self.acknowledged[message_id] = {"widget_id": widget_id}
        self._producers.clear()

    def evidence(self, **more: Any) -> Evidence:
        """All that the trial left behind. more: other fields of Evidence."""
        self.read_producers()
        histories = [read_history(path) for path in sorted(self.directory.glob("*.jsonl"))]
        with SqliteQueues(self.queue) as queues:
            found = {queue: _all_messages(queues, queue) for queue in (REQUESTS, RESPONSES, DEAD_LETTERS)}
        return Evidence(
            attempted=self.attempted,
            acknowledged=self.acknowledged,
            histories=histories,
            queued=found[REQUESTS],
            responses=found[RESPONSES],
            dead_letters=found[DEAD_LETTERS],
            cuts=self.cuts,
            resumed=self.resumed,
            **({"widgets": self.widgets(), "deaths": self.deaths} | more),
        )

    def check(self, **more: Any) -> tuple[dict[str, int], list[str]]:
        """What the checker says, and whether both files are sound."""
        counts, violations = check(self.evidence(**more))
        return counts, violations + self.damage()

    def damage(self) -> list[str]:
        return [f"{path.name}: damaged: {found}" for path in (self.queue, self.database) if (found := integrity(path))]

    def widgets(self) -> list[str]:
        if not self.database.exists():
            return []
        with closing(apsw.Connection(str(self.database))) as file:
            return [id_ for (id_,) in file.execute("SELECT id FROM widget")]


def own_widgets(made: Trial, of: Trial) -> list[str]:
    """The widgets of this trial's requests, where the maker is another trial's."""
    own = {body["widget_id"] for body in made.acknowledged.values() if isinstance(body, dict)}
    return [id_ for id_ in of.widgets() if id_ in own]


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _all_messages(queues: SqliteQueues, queue: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    marker = ""
    while (page := queues.browse(queue, after=marker, limit=5_000, claimed=True)).messages:
        found.update((message.id, message.body) for message in page.messages)
        marker = page.marker
    return found


def integrity(path: Path) -> str:
    """What SQLite finds wrong with the file; empty when it is sound, or not there."""
    if not path.exists():
        return ""
    with closing(apsw.Connection(str(path))) as file:
        found = str(file.execute("PRAGMA integrity_check(1)").get)
    return "" if found == "ok" else found


@contextmanager
def trial(*, on_disk: bool = False) -> Iterator[Trial]:
    """A trial in a new directory, in memory where the machine has such a file system; removed afterwards."""
    where = MEMORY if MEMORY.is_dir() and not on_disk else None
    with tempfile.TemporaryDirectory(prefix="reliability-", dir=where) as directory:
        made = Trial(Path(directory))
        try:
            yield made
        finally:
            made.kill_all()


def widget_ids(count: int) -> list[str]:
    """So many valid widget ids."""
    return [str(uuid.uuid1()) for _ in range(count)]


def mixed_bodies(count: int, seed: int = 1) -> list[Any]:
    """Requests of all kinds: most are made, some rejected, and some are no requests at all."""
    kinds = random.Random(seed)
    made = widget_ids(count)
    for number, id_ in enumerate(made):
        kind = kinds.random()
        if kind < 0.1:
            yield_ = {"widget_id": f"no-uuid-{number}-{id_}"}
        elif kind < 0.2:
            yield_ = [number, id_]
        else:
            yield_ = {"widget_id": id_, "note": number}
        made[number] = yield_
    return made


def scaled(full: int, scale: float, least: int = 1) -> int:
    return max(least, round(full * scale))


def side_by_side(work: Callable[[Any], Any], cases: Sequence[Any], lanes: int) -> list[Any]:
    """The results of work(case) for each case, so many at a time; they mostly wait."""
    require_forks()  # it changes os.environ, which no thread may read meanwhile
    with ThreadPoolExecutor(lanes) as pool:
        return list(pool.map(work, cases))


def add(total: dict[str, int], counts: dict[str, int]) -> None:
    for key, value in counts.items():
        total[key] = total.get(key, 0) + value
