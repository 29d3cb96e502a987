"""Where a campaign's processes work: a queue, a maker's database, receive counts, and what was posted there."""

import random
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import requests
from doubles.scripted_maker import ScriptedMaker
from support import Script, free_port, script, wait_until

from claim_queues.sqlite import SqliteQueues

from .checker import Evidence, check

REQUESTS, RESPONSES, DEAD_LETTERS = (f"itchy-octo-chainsaw-{kind}" for kind in ("request", "response", "dead-letter"))
CLAIM_TTL = 12
"""Seconds: the shortest for a deadline of 1 s."""
MEMORY = Path("/dev/shm")
DRIVE = (sys.executable, str(Path(__file__).parent / "drive.py"))


class Result(NamedTuple):
    """What a campaign, or a part of it, found. broken: a line for each promise that was not kept."""

    figures: dict[str, Any]
    broken: list[str]

    def plus(self, *broken: str, **figures: Any) -> "Result":
        """With these lines, those that are not empty, and these figures: a low line in their names is a space."""
        named = {name.replace("_", " "): value for name, value in figures.items()}
        return Result(self.figures | named, [*self.broken, *filter(None, broken)])


class Campaign(NamedTuple):
    """run: takes the scale, of which 1 is full size."""

    name: str
    shows: str
    run: Callable[[float], Result]


class World:
    """The scripts as processes on files in one directory.

    attempted, posted: see Evidence. queue, database: files. maker_url: where makers listen, without a path.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.queue, self.database = directory / "q.sqlite3", directory / "widgets.sqlite3"
        self.port = free_port()
        self.maker_url = f"http://127.0.0.1:{self.port}"
        self.attempted: list[Any] = []
        self.posted: dict[str, Any] = {}
        self.scripts: list[Script] = []
        self._producers: list[tuple[Script, list[str]]] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"sqlite:///{self.queue}"

    def post(self, bodies: Sequence[Any]) -> None:
        """Store these requests."""
        self.attempted += bodies
        with SqliteQueues(self.queue) as queues:
            for start in range(0, len(bodies), 1000):
                ids = queues.post(REQUESTS, bodies[start : start + 1000])
                self.posted.update(zip(ids, bodies[start : start + 1000], strict=True))

    def post_ids(self, ids: Sequence[str]) -> None:
        self.post([{"widget_id": id_} for id_ in ids])

    def start(self, name: str, *options: object, **how: Any) -> Script:
        """A script, killed with the world."""
        with self._lock:  # Script names its files by its address
            self.scripts.append(Script(name, *options, cwd=self.directory, prefix=DRIVE, **how))
            return self.scripts[-1]

    def consumer(self, *options: object, url: str = "", **how: Any) -> Script:
        """One whose claims are short; its log is JSON. It gives nothing up before 1,000 receives unless told to."""
        words: list[object] = ["--queue-url", url or self.url, "--maker-url", f"{self.maker_url}/widgets"]
        words += ["--receive-counts", "counts.sqlite3", "--claim-ttl", CLAIM_TTL, "--deadline", 1]
        words += ["--max-receives", 1000, "--log-format", "json"]
        return self.start("widget_consumer.py", *words, *options, **how)

    def producer(self, ids: list[str], **how: Any) -> Script:
        """One that submits these ids. What it prints counts as posted once `read_producers` was called."""
        file = self.directory / f"{len(self._producers)}.ids"
        file.write_text("".join(f"{id_}\n" for id_ in ids))
        started = self.start("widget_producer.py", "--queue-url", self.url, "--ids-file", file, **how)
        self._producers.append((started, ids))
        return started

    def read_producers(self) -> None:
        """Take over what producers that have ended reported; a line without an end was cut off by a kill."""
        for producer, ids in self._producers:
            self.attempted += [{"widget_id": id_} for id_ in ids]
            lines = (line.split() for line in producer.out.split("\n")[:-1])
            self.posted.update({message_id: {"widget_id": widget_id} for message_id, widget_id in lines})
        self._producers.clear()

    @contextmanager
    def maker(self, *options: object, **how: Any) -> Iterator[Script]:
        """The maker, answering; killed at the end of the block."""
        words = ("--port", self.port, "--database", self.database, "--log-level", "warning", *options)
        with script("widget_maker.py", *words, cwd=self.directory, **how) as maker:
            wait_until(lambda: self._is_answering() or maker.process.poll() is not None)
            assert how or maker.process.poll() is None, maker.err
            yield maker

    def scripted(self) -> ScriptedMaker:
        """A maker that does as it is told, at the same place; to be entered."""
        return ScriptedMaker(port=self.port)

    def drain(self, *options: object, seconds: float = 400, hurry: bool = True) -> Script:
        """Let a consumer work off what is left. hurry: what dead consumers hold, and what waits, is free at once."""
        if hurry:
            self.free_all()
        consumer = self.consumer("--drain", *options)
        wait_until(lambda: consumer.process.poll() is not None or (hurry and self._free("claim IS NULL")), seconds)
        assert consumer.exit_code() == 0, f"the drain failed:\n{consumer.err[-2000:]}"
        return consumer

    def free_all(self) -> None:
        """As if the time of every claim and every delay were over."""
        self._free("TRUE")

    def stats(self, queue: str = REQUESTS) -> Any:
        with SqliteQueues(self.queue) as queues:
            return queues.stats(queue)

    def evidence(self, widgets: Collection[str] | None = None) -> Evidence:
        """What is left. widgets: the ids that another maker than the own one has made."""
        self.read_producers()
        with SqliteQueues(self.queue) as queues:
            left = [
                {message.id: message.body for message in queues.browse(queue, limit=10**7)[0]}
                for queue in (REQUESTS, RESPONSES, DEAD_LETTERS)
            ]
        return Evidence(self.attempted, self.posted, list(self.widgets() if widgets is None else widgets), *left)

    def check(self, widgets: Collection[str] | None = None, **how: Any) -> Result:
        """What the checker says, whether all files are sound, and whether any script ended in a traceback."""
        figures, broken = check(self.evidence(widgets), **how)
        files = [path for path in sorted(self.directory.rglob("*.sqlite3")) if path.is_file()]
        broken += [f"{path.name} is damaged: {found}" for path in files if (found := integrity(path))]
        broken += [f"a traceback: {run.err[-300:]}" for run in self.scripts if "Traceback" in run.err]
        return Result(figures, broken)

    def widgets(self) -> list[str]:
        with closing(apsw.Connection(str(self.database))) as file:
            return [id_ for (id_,) in file.execute("SELECT id FROM widget")]

    def _free(self, which: str) -> None:
        with closing(apsw.Connection(str(self.queue))) as file:
            file.set_busy_timeout(20_000)
            file.execute(f"UPDATE messages SET held_until = 1 WHERE held_until > 1 AND {which}")

    def _is_answering(self) -> bool:
        """Whether a server is there, well or not."""
        with suppress(requests.RequestException):
            return bool(requests.get(f"{self.maker_url}/healthz", timeout=5).status_code)
        return False


def integrity(path: Path) -> str:
    """What SQLite finds wrong with a file; empty when it is sound."""
    with closing(apsw.Connection(str(path))) as file:
        found = str(file.execute("PRAGMA integrity_check(1)").get)
    return "" if found == "ok" else found


@contextmanager
def world() -> Iterator[World]:
    """A new one, in memory where the machine has such a file system; its processes end with it."""
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=MEMORY if MEMORY.is_dir() else None) as directory:
        made = World(Path(directory))
        try:
            yield made
        finally:
            for running in made.scripts:
                running.kill()


def together(work: Callable[[Any], Result], cases: Iterable[Any], *, lanes: int = 1) -> Result:
    """What work(case) finds for each case, so many at a time: added up, but of what is called `most` the greatest."""
    with ThreadPoolExecutor(lanes) as pool:
        found = list(pool.map(work, cases))
    figures: dict[str, Any] = {"n": sum(each.figures.pop("n", 1) for each in found)}
    for each in found:
        for name, value in each.figures.items():
            if name.startswith("most "):
                figures[name] = max(value, figures.get(name, value))
            else:
                figures[name] = value + figures[name] if name in figures else value
    return Result(figures, [line for each in found for line in each.broken])


def wait_to_begin(*consumers: Script) -> None:
    """Until they claim."""
    for consumer in consumers:
        wait_until(lambda one=consumer: '"consuming"' in one.err or one.process.poll() is not None, 60)


def expect(run: Script, *codes: int, what: str, seconds: float = 60) -> str:
    """A line where it does not end with one of these exit codes."""
    code = run.exit_code(seconds)
    return "" if code in codes else f"{what}: exit code {code}: {run.err[-300:]}"


def widget_ids(count: int) -> list[str]:
    """So many valid ones."""
    return [str(uuid.uuid1()) for _ in range(count)]


def mixed_bodies(count: int) -> tuple[list[Any], set[str]]:
    """Requests of which most are made, some rejected, and some no requests at all; and the names of the last ones."""
    bodies: list[Any] = []
    for number, id_ in enumerate(widget_ids(count)):
        bodies.append(random.choice([{"widget_id": id_, "note": number}] * 8 + [{"widget_id": f"no-{id_}"}, [id_]]))
    return bodies, {f'["{body[0]}"]' for body in bodies if isinstance(body, list)}


def patience(scale: float) -> float:
    """Seconds more for what must be quick, where the scale is a test's: its machine may be busy."""
    return 0 if scale >= 0.05 else 30


def scaled(full: float, scale: float, least: int = 1) -> int:
    return max(least, round(full * scale))


def since(started: float) -> float:
    return round(time.monotonic() - started, 1)
