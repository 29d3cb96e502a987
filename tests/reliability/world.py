"""Where a campaign's processes work: a queue, a maker's database, receive counts, and what was posted there."""

import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import apsw
from doubles.scripted_maker import ScriptedMaker
from rig import DEAD_LETTERS, REQUESTS, RESPONSES, execute
from support import Script, free_port, status, wait_until

from claim_queues import Queues
from claim_queues.sqlite import SqliteQueues

from .checker import Evidence, check
from .frame import Result

QUEUES = (REQUESTS, RESPONSES, DEAD_LETTERS)
CLAIM_TTL = 12
"""Seconds: the shortest for a deadline of 1 s."""
MEMORY = Path("/dev/shm")
DRIVE = (sys.executable, str(Path(__file__).parent / "drive.py"))


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
        self._producers: list[Script] = []
        self._scripted: ScriptedMaker | None = None

    @property
    def url(self) -> str:
        return f"sqlite:///{self.queue}"

    @property
    def killed(self) -> int:
        """The scripts that ended by SIGKILL, not by themselves."""
        return sum(run.process.returncode == -signal.SIGKILL for run in self.scripts)

    def post(self, bodies: Sequence[Any], queues: Queues | None = None) -> None:
        """Store these requests, in the own queue if no other is given."""
        self.attempted += bodies
        with nullcontext(queues) if queues else SqliteQueues(self.queue) as into:
            for start in range(0, len(bodies), into.limits.post_limit):
                batch = bodies[start : start + into.limits.post_limit]
                self.posted.update(zip(into.post(REQUESTS, batch), batch, strict=True))

    def post_ids(self, count: int, queues: Queues | None = None) -> list[str]:
        """Store so many good requests; gives their widget ids."""
        ids = widget_ids(count)
        self.post([{"widget_id": id_} for id_ in ids], queues)
        return ids

    def start(self, name: str, *options: object, prefix: tuple[str, ...] = DRIVE, **how: Any) -> Script:
        """A script, killed with the world."""
        self.scripts.append(Script(name, *options, cwd=self.directory, prefix=prefix, **how))
        return self.scripts[-1]

    def consumer(self, *options: object, url: str = "", **how: Any) -> Script:
        """One whose claims are short; its log is JSON. It gives nothing up before 1,000 receives unless told to."""
        words: list[object] = ["--queue-url", url or self.url, "--maker-url", f"{self.maker_url}/widgets"]
        words += ["--receive-counts", "counts.sqlite3", "--claim-ttl", CLAIM_TTL, "--deadline", 1]
        words += ["--max-receives", 1000, "--log-format", "json"]
        return self.start("widget_consumer.py", *words, *options, **how)

    def producer(self, ids: list[str], **how: Any) -> Script:
        """One that submits these ids. What it prints counts as posted once `read_producers` was called."""
        file = self.directory / f"{len(self.scripts)}.ids"
        file.write_text("".join(f"{id_}\n" for id_ in ids))
        self.attempted += [{"widget_id": id_} for id_ in ids]
        self._producers.append(self.start("widget_producer.py", "--queue-url", self.url, "--ids-file", file, **how))
        return self._producers[-1]

    def read_producers(self) -> None:
        """Take over what producers that have ended reported; a line without an end was cut off by a kill."""
        for producer in self._producers:
            lines = (line.split() for line in producer.out.split("\n")[:-1])
            self.posted.update({message_id: {"widget_id": widget_id} for message_id, widget_id in lines})

    @contextmanager
    def maker(self, *options: object, **how: Any) -> Iterator[Script]:
        """The maker, answering; killed at the end of the block."""
        words = ("--port", self.port, "--database", self.database, "--log-level", "warning", *options)
        maker = self.start("widget_maker.py", *words, prefix=(), **how)
        wait_until(lambda: status(f"{self.maker_url}/healthz") or maker.process.poll() is not None)
        assert how or maker.process.poll() is None, maker.err
        yield maker
        maker.kill()

    def scripted(self) -> ScriptedMaker:
        """A maker that does as it is told, at the same place; to be entered."""
        self._scripted = ScriptedMaker(port=self.port)
        return self._scripted

    def drain(self, *options: object, seconds: float = 400, hurry: bool = True) -> Script:
        """Let a consumer work off what is left. hurry: what dead consumers hold, and what waits, is free at once."""
        if hurry:
            self.free()
        consumer = self.consumer("--drain", *options)
        wait_until(lambda: consumer.process.poll() is not None or (hurry and self.free("claim IS NULL")), seconds)
        assert consumer.exit_code() == 0, f"the drain failed:\n{consumer.err[-2000:]}"
        return consumer

    def stats(self, queue: str = REQUESTS) -> Any:
        with SqliteQueues(self.queue) as queues:
            return queues.stats(queue)

    def check(self, left: Sequence[dict[str, Any]] = (), **how: Any) -> Result:
        """What the checker says, whether all files are sound, and whether any script ended in a traceback.

        left: the bodies that are left in each of the QUEUES, by message id, if these are not the own ones.
        """
        self.read_producers()
        if not left:
            with SqliteQueues(self.queue) as queues:
                left = [{each.id: each.body for each in queues.browse(queue, limit=10**7)[0]} for queue in QUEUES]
        figures, broken = check(Evidence(self.attempted, self.posted, self.widgets(), *left), **how)
        for path in sorted(self.directory.rglob("*.sqlite3")):
            with closing(apsw.Connection(str(path))) as file:
                found = file.execute("PRAGMA integrity_check(1)").get
            broken += [f"{path.name} is damaged: {found}"] if found != "ok" else []
        broken += [f"a traceback: {run.err[-300:]}" for run in self.scripts if "Traceback" in run.err]
        return Result(figures, broken)

    def widgets(self) -> list[str]:
        """The ids of what was made, by the scripted maker if there was one."""
        if self._scripted or not self.database.exists():
            return list(self._scripted.made) if self._scripted else []
        with closing(apsw.Connection(str(self.database))) as file:
            return [id_ for (id_,) in file.execute("SELECT id FROM widget")]

    def free(self, which: str = "TRUE") -> None:
        """As if the time of all claims and delays, or of these, were over."""
        execute(self.queue, f"UPDATE messages SET held_until = 1 WHERE held_until > 1 AND {which}")


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


def begun(consumer: Script) -> Script:
    """The same, once it claims."""
    wait_until(lambda: consumer.events("consuming") or consumer.process.poll() is not None, 60)
    assert consumer.events("consuming"), consumer.err[-2000:]
    return consumer


def stop(consumer: Script) -> str:
    """SIGTERM; a line where it does not end well."""
    consumer.signal(signal.SIGTERM)
    return expect(consumer, 0, what="after SIGTERM")


def expect(run: Script, *codes: int, what: str, seconds: float = 60) -> str:
    """A line where it does not end with one of these exit codes."""
    code = run.exit_code(seconds)
    return "" if code in codes else f"{what}: exit code {code}: {run.err[-300:]}"


def seconds_until(condition: Callable[[], Any], most: float) -> float:
    """How long it takes; fails after so many."""
    started = time.monotonic()
    wait_until(condition, most)
    return round(time.monotonic() - started, 1)


def widget_ids(count: int) -> list[str]:
    """So many valid ones."""
    return [str(uuid.uuid1()) for _ in range(count)]
