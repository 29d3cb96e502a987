"""How often each message was received: a dict of counts by message id.

Most claim-based services do not say how often a message was received, and a message that fails every time must
end somewhere, so the consumer counts. Two numbers: *receives*, never lowered, and those of them that are
*excused* because the message was not to blame (the maker was down, the consumer was stopped).
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from claim_queues.base import Message
from claim_queues.store import open_store, store_errors, transaction

MOST_IN_MEMORY = 100_000
"""Beyond this the ids that were received longest ago leave the dict, settled or not."""
LONGEST_HOLD_S = 86_400
"""A message outlives its TTL by at most the longest claim (43,200 s) and the longest grace (43,200 s)."""
LONGEST_TTL_S = 1_209_600
SWEEP_EVERY_S = 60

APPLICATION_ID = 0x51C1A136
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE receives (
    source TEXT NOT NULL,
    message_id TEXT NOT NULL,
    count INTEGER NOT NULL,
    excused INTEGER NOT NULL,
    first_at REAL NOT NULL,
    dies_at REAL NOT NULL,
    PRIMARY KEY (source, message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX by_death ON receives (dies_at);
"""


@dataclass(slots=True)
class Receives:
    """count: times received, never lowered. excused: those that do not count against the message.

    first_at, last_at: UTC seconds of the first and the last receive. dies_at: when the message is surely gone.
    stored: the file holds a row for it.
    """

    count: int
    excused: int
    first_at: float
    last_at: float
    dies_at: float
    stored: bool = False

    @property
    def charged(self) -> int:
        """The receives that count against the message; what --max-receives is compared with."""
        return self.count - self.excused


class ReceiveCounts:
    """Counts by message id. An id leaves when its message is settled, or older than its message can live.

    path: a file shared by this machine's consumers, or None for memory only. source: the queue, in that file.
    counted_by_service: the service's own count is exact, so that only excuses need the file.
    Thread-safe. Each call is at most one transaction. Raises StoreError where the file cannot be used, and
    QueueUnavailable where another process keeps it locked.
    """

    def __init__(
        self, path: Path | None, source: str, *, counted_by_service: bool, clock: Callable[[], float] = time.time
    ) -> None:
        self._counts: OrderedDict[str, Receives] = OrderedDict()  # in order of last receive
        self._path = path
        self._source = source
        self._counted_by_service = counted_by_service
        self._clock = clock
        self._lock = threading.Lock()
        self._swept_at = clock()
        self._file = path and open_store(path, application_id=APPLICATION_ID, version=SCHEMA_VERSION, schema=SCHEMA)

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, message_id: str) -> Receives:
        return self._counts[message_id]

    def received(self, messages: Sequence[Message]) -> list[Receives]:
        """Count one more receive of each message; never fewer than its service or the file knows of.

        Where the service does not count, the new counts are durable before this returns.
        """
        with self._lock, self._transaction(writes=self._is_sweep_due() or not self._counted_by_service) as file:
            now = self._clock()
            if self._is_sweep_due():
                self._sweep(file, now)
            if file:
                self._take_over(file, [message.id for message in messages])
            counted = {message.id: self._count(message, now) for message in messages}
            if file and not self._counted_by_service:
                self._store(file, counted, excuses=0)
            while len(self._counts) > MOST_IN_MEMORY:
                self._counts.popitem(last=False)
        return list(counted.values())

    def excuse(self, message_ids: Iterable[str]) -> None:
        """Take the last receive of each message off what counts against it."""
        self._adjust(message_ids, 1)

    def charge(self, message_ids: Iterable[str]) -> None:
        """Undo an excuse: the last receive of each message counts against it after all."""
        self._adjust(message_ids, -1)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop settled messages."""
        with self._lock:
            gone = [(id_, self._counts.pop(id_)) for id_ in message_ids if id_ in self._counts]
            stored = [(self._source, id_) for id_, entry in gone if entry.stored]
            if stored:
                with self._transaction() as file:
                    if file:
                        file.executemany("DELETE FROM receives WHERE source = ? AND message_id = ?", stored)

    def close(self) -> None:
        """Close the file; the counts in it stay for the next consumer."""
        if self._file:
            self._file.close()

    def _adjust(self, message_ids: Iterable[str], excuses: int) -> None:
        with self._lock:
            adjusted = {id_: self._counts[id_] for id_ in message_ids if id_ in self._counts}
            for entry in adjusted.values():
                entry.excused = max(0, min(entry.excused + excuses, entry.count))
            if adjusted:
                with self._transaction() as file:
                    if file:
                        self._store(file, adjusted, excuses=excuses)

    @contextmanager
    def _transaction(self, *, writes: bool = True) -> Iterator[apsw.Connection | None]:
        """Alone on the file, so that no other consumer counts between a look and its count; None without a file.

        writes: if not, there is only one look, and no other consumer has to wait for it.
        """
        if not self._file or not self._path:
            yield None
            return
        with store_errors(self._path), transaction(self._file) if writes else nullcontext():
            yield self._file

    def _is_sweep_due(self) -> bool:
        return self._clock() - self._swept_at >= SWEEP_EVERY_S

    def _count(self, message: Message, now: float) -> Receives:
        entry = self._counts.setdefault(message.id, Receives(0, 0, now, now, now))
        entry.count = max(entry.count + 1, message.receive_count or 0)
        entry.last_at = now
        life_left = LONGEST_TTL_S if message.ttl is None else max(0, message.ttl - message.age)
        entry.dies_at = now + life_left + LONGEST_HOLD_S
        self._counts.move_to_end(message.id)
        return entry

    def _take_over(self, file: apsw.Connection, ids: list[str]) -> None:
        """Learn what other consumers of this machine, or an earlier run, wrote; the numbers only ever grow."""
        rows: Any = file.execute(
            "SELECT message_id, count, excused, first_at, dies_at FROM receives"
            " WHERE source = ? AND message_id IN (SELECT value FROM json_each(?))",
            (self._source, json.dumps(ids)),
        )
        for id_, count, excused, first_at, dies_at in rows:
            known = self._counts.setdefault(id_, Receives(0, 0, first_at, first_at, dies_at))
            known.count, known.excused = max(known.count, count), max(known.excused, excused)
            known.first_at, known.stored = min(known.first_at, first_at), True

    def _store(self, file: apsw.Connection, entries: dict[str, Receives], *, excuses: int) -> None:
        """Write the entries; excuses are added to those of other consumers, who may have excused theirs meanwhile."""
        file.executemany(
            "INSERT INTO receives VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " count = max(count, excluded.count),"
            " excused = max(0, min(excused + ?, max(count, excluded.count))),"
            " dies_at = max(dies_at, excluded.dies_at)",
            [
                (self._source, id_, entry.count, entry.excused, entry.first_at, entry.dies_at, excuses)
                for id_, entry in entries.items()
            ],
        )
        for entry in entries.values():
            entry.stored = True

    def _sweep(self, file: apsw.Connection | None, now: float) -> None:
        """Drop what is older than its message can live."""
        self._swept_at = now
        for id_ in [id_ for id_, entry in self._counts.items() if entry.dies_at <= now]:
            del self._counts[id_]
        if file:
            file.execute("DELETE FROM receives WHERE dies_at <= ?", (now,))
