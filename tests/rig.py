"""Consumers between the embedded queue and a maker that does as a test says."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
from doubles.scripted_maker import ScriptedMaker
from support import LETTERS as DEAD_LETTERS
from support import REQUESTS, RESPONSES, Script, script, wait_until

from claim_queues.sqlite import SqliteQueues
from widget_consumer import Consumer

OPTIONS = SimpleNamespace(
    request_queue="requests",
    queues=["requests", "responses", "letters"],
    create=False,
    claim_ttl=60,
    grace=60,
    poll_interval=0.05,
    claim_limit=20,
    slots=2,
    post_batch=1,
    max_receives=5,
    response_ttl=3600,
    drain=False,
    drain_timeout=None,
)
"""Of a consumer in the test's own process, for `working`."""


class Rig:
    """A queue file, a maker, and consumers with short waits. Their logs are JSON: see Script.events."""

    def __init__(self, directory: Path, maker: ScriptedMaker, queues: SqliteQueues) -> None:
        self.directory = directory
        self.maker = maker
        self.queues = queues
        self.file = directory / "q.sqlite3"
        self.counts_file = directory / "counts.sqlite3"

    def post(self, *widget_ids: str) -> list[str]:
        """Requests for these widgets; gives their message ids."""
        return self.post_bodies(*({"widget_id": id_} for id_ in widget_ids))

    def post_bodies(self, *bodies: Any) -> list[str]:
        return self.queues.post(REQUESTS, bodies)

    def post_text(self, text: str) -> None:
        """A body as a program stores it that does not write JSON as the others do."""
        [id_] = self.post_bodies(None)
        execute(self.file, "UPDATE messages SET body = ? WHERE id = ?", text.encode(), int(id_.rpartition("-")[2]))

    def consumer(self, *options: object, **how: Any) -> AbstractContextManager[Script]:
        usual: list[object] = ["--queue-url", f"sqlite:///{self.file}", "--maker-url", self.maker.url]
        usual += ["--receive-counts", self.counts_file, "--log-format", "json", "--log-level", "debug"]
        return script("widget_consumer.py", *usual, *options, cwd=self.directory, **how)

    def drain(self, *options: object, code: int = 0, hurry: bool = True) -> Script:
        """Run a consumer until nothing is left. hurry: what stays away for a backoff comes back at once."""
        with self.consumer("--drain", "--poll-interval", 0.1, *options) as running:
            self.wait(lambda: running.process.poll() is not None, hurry=hurry)
            assert running.exit_code() == code, running.err
        return running

    def wait(self, condition: Any, *, hurry: bool = True) -> None:
        """Until it is true."""

        def look() -> Any:
            if hurry:
                execute(self.file, "UPDATE messages SET held_until = 0 WHERE claim IS NULL AND held_until > 0")
            return condition()

        wait_until(look, 60)

    def end_claims(self) -> None:
        """As if the claim TTL of every claim had passed."""
        execute(self.file, "UPDATE messages SET held_until = 1 WHERE claim IS NOT NULL")

    def left(self) -> int:
        """Requests that are left, claimed ones included."""
        return self.queues.stats(REQUESTS).total

    def responses(self) -> list[dict[str, Any]]:
        return [message.body for message in self.queues.browse(RESPONSES, limit=10_000)[0]]

    def outcomes(self) -> dict[str, str]:
        """By widget id. Each request has one response."""
        found = self.responses()
        assert len({response["request_id"] for response in found}) == len(found), found
        return {response["widget_id"]: response["outcome"] for response in found}

    def letters(self) -> list[dict[str, Any]]:
        return [message.body for message in self.queues.browse(DEAD_LETTERS, limit=10_000)[0]]

    def dead(self) -> list[str]:
        """The widget ids of all dead letters."""
        return [letter["body"]["widget_id"] for letter in self.letters()]

    def counted(self) -> int:
        """Messages of which receives are still kept."""
        with closing(apsw.Connection(str(self.counts_file))) as file:
            return int(file.execute("SELECT count(*) FROM receives").get)


def execute(path: Path, statement: str, *values: Any) -> None:
    """Change a queue's file as time or another process would."""
    with closing(apsw.Connection(str(path))) as file:
        file.set_busy_timeout(10_000)
        file.execute(statement, values)


def numbered(prefix: str, count: int) -> list[str]:
    """Widget ids."""
    return [f"{prefix}{number}" for number in range(count)]


@contextmanager
def working(consumer: Consumer) -> Iterator[Future[None]]:
    """The consumer at work in a thread until it is stopped at the end of the block; then what it raised is raised."""
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(consumer.run)
        try:
            yield work
        finally:
            consumer.stop()
            work.result(30)
