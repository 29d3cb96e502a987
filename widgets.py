"""The widgets of one SQLite file: each is made once, and those asked for at one time in one commit."""

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw

from claim_queues.errors import QueueUnavailable
from claim_queues.store import BUSY_TIMEOUT_S, Log, open_store, store_errors, transaction

APPLICATION_ID, SCHEMA_VERSION = 0x57444754, 1
SCHEMA = "CREATE TABLE widget (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL) STRICT"
INSERT = "INSERT INTO widget (id, created_at) VALUES (?, ?) ON CONFLICT DO NOTHING RETURNING id, created_at"
SELECT = "SELECT id, created_at FROM widget WHERE id = ?"
SELECT_PAGE = "SELECT id, created_at, number FROM widget WHERE number < ? ORDER BY number DESC LIMIT ?"
SELECT_FOUND = "SELECT id, created_at FROM widget WHERE id > ? AND id < ? ORDER BY id LIMIT ?"
SELECT_TIME = "SELECT created_at FROM widget WHERE number >= ? ORDER BY number LIMIT 1"
NEWEST = 2**63 - 1


@dataclass(eq=False, slots=True)
class Wish:
    """Ids of widgets to make; made: what became of each, None until it is safe on disk."""

    widget_ids: Sequence[str]
    made: list[tuple[dict[str, Any], bool]] | None = None


class Widgets:
    """The widgets of one SQLite file, each a dict of `id` and `created_at` (ISO 8601, UTC); thread-safe.

    Every method raises StoreError or QueueUnavailable where the file cannot be used now.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wishes: deque[Wish] = deque()
        self._turn = threading.Condition()
        self._is_making = False
        # Two connections: one can look at the widgets while a POST waits for the disk or for another process.
        self._writer, self._reader = (
            (open_store(path, application_id=APPLICATION_ID, version=SCHEMA_VERSION, schema=SCHEMA), threading.Lock())
            for _ in range(2)
        )
        with store_errors(path):
            self._log = Log(self._writer[0], path, commits_sync=True)

    def make(self, widget_ids: Sequence[str]) -> list[tuple[dict[str, Any], bool]]:
        """For each id its widget, safe on disk, and whether it was made now.

        What others ask for while one waits for the disk goes into the next transaction together: one sync for all.
        """
        wish = Wish(widget_ids)
        self._wishes.append(wish)
        with self._turn:
            if not self._turn.wait_for(lambda: wish.made is not None or not self._is_making, BUSY_TIMEOUT_S):
                raise self._waited_too_long()
            if wish.made is not None:
                return wish.made
            self._is_making = True
        try:
            self._make_all(wish)
        finally:
            with self._turn:
                self._is_making = False
                self._turn.notify_all()  # whose wish has come true must not wait behind the next commit
        return wish.made or []

    def _make_all(self, wish: Wish) -> None:
        """Make what all wish for by now; the wish is one of them."""
        with self._using(*self._writer) as connection:
            wishes = [self._wishes.popleft() for _ in range(len(self._wishes))]
            try:
                with transaction(connection):
                    self._log.lengthen()
                    found = [[_make(connection, widget_id) for widget_id in each.widget_ids] for each in wishes]
            except BaseException:
                self._wishes.extend(each for each in wishes if each is not wish)  # each fails by itself
                raise
            for each, made in zip(wishes, found, strict=True):
                each.made = made

    def find(self, widget_id: str) -> dict[str, Any] | None:
        """The widget of that id, or None."""
        with self._using(*self._reader) as connection:
            found = connection.execute(SELECT, (widget_id,)).fetchall()
        return _widget(found[0]) if found else None

    def page(self, after: int, limit: int) -> tuple[list[dict[str, Any]], str | None]:
        """Up to `limit` widgets behind the marker `after`, newest first, and the next marker (None: no more)."""
        with self._using(*self._reader) as connection:
            rows = connection.execute(SELECT_PAGE, (after, limit + 1)).fetchall()
        return [_widget(row) for row in rows[:limit]], str(rows[limit - 1][2]) if len(rows) > limit else None

    def search(self, prefix: str, after: str, limit: int) -> tuple[list[dict[str, Any]], str | None]:
        """Up to `limit` widgets whose ids begin with `prefix`, behind the id `after`, and the next such id.

        The prefix is no whole id: that one `find` finds.
        """
        with self._using(*self._reader) as connection:
            found = connection.execute(SELECT_FOUND, (max(prefix, after), prefix + "g", limit + 1)).fetchall()
        return [_widget(row) for row in found[:limit]], str(found[limit - 1][0]) if len(found) > limit else None

    def made_before(self, moment: datetime) -> int:
        """How many widgets were made before a moment that is over.

        Times rise with the numbers (until a clock is set back), so it is found by bisection: an index of times would
        cost every POST.
        """
        with self._using(*self._reader) as connection:
            numbers = range(1, 1 + connection.execute("SELECT coalesce(max(number), 0) FROM widget").get)
            return bisect_left(numbers, _iso(moment), key=lambda n: connection.execute(SELECT_TIME, (n,)).get)

    def count(self) -> int:
        """How many there are."""
        with self._using(*self._reader) as connection:
            # None is ever deleted, so the last number is the count; counting would read all of them.
            return int(connection.execute("SELECT coalesce(max(number), 0) FROM widget").get)

    def check(self) -> None:
        """Write to the file and sync it: reading alone would work on a full disk too."""
        with self._using(*self._writer) as connection:
            connection.pragma("user_version", SCHEMA_VERSION)

    def close(self) -> None:
        for connection, _ in (self._writer, self._reader):
            connection.close()
        self._log.close()

    @contextmanager
    def _using(self, connection: apsw.Connection, lock: threading.Lock) -> Iterator[apsw.Connection]:
        if not lock.acquire(timeout=BUSY_TIMEOUT_S):
            raise self._waited_too_long()
        try:
            with store_errors(self._path):
                yield connection
        finally:
            lock.release()

    def _waited_too_long(self) -> QueueUnavailable:
        return QueueUnavailable(f"{self._path}: others waited for it for {BUSY_TIMEOUT_S:.0f} s")


def _make(connection: apsw.Connection, widget_id: str) -> tuple[dict[str, Any], bool]:
    new = connection.execute(INSERT, (widget_id, _iso(datetime.now(UTC)))).fetchall()
    found = new or connection.execute(SELECT, (widget_id,)).fetchall()
    return _widget(found[0]), bool(new)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _widget(row: Sequence[Any]) -> dict[str, Any]:
    return {"id": row[0], "created_at": row[1]}
