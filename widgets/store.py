"""The widgets of one SQLite file: each is created once, and none is ever deleted."""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw

from claim_queues.sqlite import Store

APPLICATION_ID = 0x57444754
SCHEMA = "CREATE TABLE widget (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL) STRICT"
INSERT = "INSERT INTO widget (id, created_at) VALUES (?, ?) ON CONFLICT DO NOTHING RETURNING id, created_at"
SELECT = "SELECT id, created_at FROM widget WHERE id = ?"
SELECT_PAGE = "SELECT id, created_at, number FROM widget WHERE number < ? ORDER BY number DESC LIMIT ?"
SELECT_FOUND = "SELECT id, created_at, id FROM widget WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"
SELECT_COUNT = "SELECT coalesce(max(number), 0) FROM widget"
"""Numbers have no gaps, so the last one is the count; counting would read all rows."""
NEWEST = 2**63 - 1
BAR_S, BARS = 5, 60

Widget = dict[str, Any]
"""`id`, and `created_at` in ISO 8601, UTC."""


class Widgets:
    """The widgets of that file, for all threads of a process.

    Every method raises StoreError or QueueUnavailable where the file cannot be used now. check: raises StoreError
    where it was removed or replaced since it was opened.
    """

    def __init__(self, path: Path) -> None:
        self._store = Store(path, APPLICATION_ID, SCHEMA)
        self.check, self.close = self._store.check, self._store.close
        self._created = Counter[int]()  # how many widgets in which BAR_S

    def create(self, ids: Sequence[str]) -> list[tuple[Widget, bool]]:
        """For each id its widget, safe on disk, and whether it is new."""
        bar, now = int(time.monotonic() / BAR_S), datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._store.writing() as file:
            found = [_create(file, id_, now.replace("+00:00", "Z")) for id_ in ids]
            self._created[bar] += sum(is_new for _, is_new in found)
            if len(self._created) > BARS + 1:
                del self._created[min(self._created)]
        self.check()  # a file that was removed before the commit has not kept them
        return found

    def find(self, id_: str) -> Widget | None:
        """The widget of that id."""
        return next(map(_widget, self._read(SELECT, id_)), None)

    def page(self, after: int, limit: int) -> tuple[list[Widget], Any]:
        """Up to `limit` widgets behind the number `after`, newest first, and the last one's; None: no more."""
        return _page(self._read(SELECT_PAGE, after, limit + 1), limit)

    def search(self, prefix: str, after: str) -> tuple[list[Widget], Any]:
        """Up to 20 widgets whose ids begin with `prefix`, behind the id `after`; and the last id."""
        return _page(self._read(SELECT_FOUND, max(prefix, after and f"{after}g"), f"{prefix}g", 21), 20)

    def count(self) -> int:
        return int(self._read(SELECT_COUNT)[0][0])

    def rates(self) -> list[float]:
        """Widgets per second that were created here in each of the last BARS times BAR_S, the oldest first."""
        now = int(time.monotonic() / BAR_S)
        return [self._created[now - ago] / BAR_S for ago in range(BARS, 0, -1)]

    def check_writing(self) -> None:
        """Write to the file and sync it: reading alone would work on a full disk too."""
        with self._store.writing() as file:
            file.pragma("user_version", 1)

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._store.reading() as file:
            return file.execute(query, values).fetchall()


def _create(file: apsw.Connection, id_: str, now: str) -> tuple[Widget, bool]:
    rows = file.execute(INSERT, (id_, now)).fetchall()
    return _widget((rows or file.execute(SELECT, (id_,)).fetchall())[0]), bool(rows)


def _widget(row: Sequence[Any]) -> Widget:
    return {"id": row[0], "created_at": row[1]}


def _page(rows: Sequence[Sequence[Any]], limit: int) -> tuple[list[Widget], Any]:
    return [_widget(row) for row in rows[:limit]], rows[limit - 1][2] if len(rows) > limit else None
