"""The widgets of one SQLite file: each is created once, and none is ever deleted."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from claim_queues.sqlite import VERSION, Store

APPLICATION_ID = 0x57444754
SCHEMA = "CREATE TABLE widget (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL) STRICT"
ORIGIN = """CREATE TABLE IF NOT EXISTS origin
(number INTEGER PRIMARY KEY, message TEXT, receives INTEGER, seconds INTEGER) STRICT"""
NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
INSERT = f"INSERT INTO widget (id, created_at) VALUES (?, {NOW}) ON CONFLICT DO NOTHING RETURNING id, created_at"
INSERT_ORIGIN = "INSERT OR REPLACE INTO origin VALUES (?, ?, ?, ?)"
SELECT_ORIGIN = """SELECT message, receives, seconds,
    (SELECT id FROM widget WHERE number = it.number - 1), (SELECT id FROM widget WHERE number = it.number + 1)
FROM widget AS it LEFT JOIN origin USING (number) WHERE id = ?"""
SELECT = "SELECT id, created_at FROM widget WHERE id = ?"
SELECT_PAGE = "SELECT id, created_at FROM widget WHERE number < ? ORDER BY number DESC LIMIT ?"
SELECT_FOUND = "SELECT id, created_at FROM widget WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"
SELECT_COUNT = "SELECT coalesce(max(number), 0) FROM widget"
BAR_S, BARS = 5, 60

Widget = dict[str, Any]
"""`id`, and `created_at` in ISO 8601, UTC."""


class Origin(NamedTuple):
    """What the POST that created a widget said about its message; None for what it did not say.

    seconds: how long the message had waited.
    """

    message: str | None = None
    receives: int | None = None
    seconds: int | None = None


class Widgets:
    """The widgets of that file, numbered from 1 without gaps, for all threads of a process.

    Every method raises StoreError where the file cannot be used, or was removed or replaced since it was opened;
    QueueUnavailable where it is locked. `check` only looks for such a problem.
    """

    def __init__(self, path: Path) -> None:
        self._store = Store(path, APPLICATION_ID, SCHEMA)
        with self._store.writing() as file:
            file.execute(ORIGIN)  # which files of version 0.1 lack
        self.check, self.close = self._store.check, self._store.close
        self._created = Counter[int]()  # widgets created, by the number of their BAR_S

    def create(self, requests: Sequence[tuple[str, Origin]]) -> list[tuple[Widget, bool]]:
        """For each id its widget, safe on disk, and whether it is new."""
        found, bar = [], int(time.monotonic() / BAR_S)
        with self._store.writing() as file:
            for id_, origin in requests:
                new = file.execute(INSERT, (id_,)).fetchall()
                ((_, created_at),) = new or file.execute(SELECT, (id_,))
                found.append(({"id": id_, "created_at": created_at}, bool(new)))
                self._created[bar] += len(new)
                if new and any(origin):
                    file.execute(INSERT_ORIGIN, (file.last_insert_rowid(), *origin))
            if len(self._created) > BARS + 1:
                del self._created[min(self._created)]
        return found

    def origin(self, id_: str) -> tuple[Origin, str | None, str | None]:
        """Where that widget came from, and the ids of the widgets before and after it."""
        with self._store.reading() as file:
            ((*origin, before, after),) = file.execute(SELECT_ORIGIN, (id_,))
        return Origin(*origin), before, after

    def find(self, id_: str) -> Widget | None:
        """The widget of that id."""
        return next(iter(self._read(SELECT, id_)), None)

    def page(self, before: int, limit: int) -> list[Widget]:
        """Up to `limit` widgets with numbers below `before`, newest first."""
        return self._read(SELECT_PAGE, before, limit)

    def search(self, prefix: str, after: str, limit: int) -> list[Widget]:
        """Up to `limit` widgets whose ids begin with `prefix`, behind the id `after`."""
        return self._read(SELECT_FOUND, max(prefix, after and f"{after}g"), f"{prefix}g", limit)

    def count(self) -> int:
        """How many there are: the last number, because counting would read all rows."""
        with self._store.reading() as file:
            return int(file.execute(SELECT_COUNT).get)

    def rates(self) -> list[float]:
        """Widgets per second made by this process, for the last BARS intervals, oldest first; the newest still runs."""
        now = int(time.monotonic() / BAR_S)
        return [self._created[now - ago] / BAR_S for ago in range(BARS - 1, -1, -1)]

    def check_writing(self) -> None:
        """Write to the file and sync it: reading alone would work on a full disk too."""
        with self._store.writing() as file:
            file.pragma("user_version", VERSION)

    def _read(self, query: str, *values: object) -> list[Widget]:
        with self._store.reading() as file:
            return [{"id": id_, "created_at": created_at} for id_, created_at in file.execute(query, values)]
