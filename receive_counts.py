"""The dict of receive counts, kept on disk: how often each message was received, and what it was charged for that.

Just before a POST, the receive is counted, charged in full and marked open. When the POST has ended, its own charge
replaces that one; an answer also closes the message. So a message that kills its consumer stays charged and open, and
one that kills the maker stays open. Charges are counted in fifths of a receive.
"""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from claim_queues import QueueUnavailable
from claim_queues.sqlite import Store

RECEIVE = 5
"""A receive, in fifths."""
KEEP_S = 15 * 86_400
"""A message not received for this long no longer exists: it lives 14 days at most, plus a claim and its grace."""
APPLICATION_ID = 0x51C1A138
SCHEMA = """
CREATE TABLE receives (
    source TEXT,
    id TEXT,
    receives INTEGER NOT NULL,
    charged INTEGER NOT NULL,
    open INTEGER NOT NULL,
    first_at REAL NOT NULL,
    last_at REAL NOT NULL,
    PRIMARY KEY (source, id)
) STRICT, WITHOUT ROWID
"""
COLUMNS = "receives, charged, open, first_at, last_at"
FIND = f"SELECT id, {COLUMNS} FROM receives WHERE source = ? AND id IN (SELECT value FROM json_each(?))"
BEGIN = f"""
INSERT INTO receives VALUES (?1, ?2, 1, {RECEIVE}, 1, ?3, ?3) ON CONFLICT DO UPDATE
SET receives = receives + 1, charged = charged + {RECEIVE}, open = open + 1, last_at = ?3 RETURNING {COLUMNS}
"""
CHARGE = """
UPDATE receives SET charged = max(0, charged + ?), open = coalesce(?, open) WHERE source = ? AND id = ?
RETURNING id, charged
"""

log = structlog.get_logger()


class Receives(NamedTuple):
    """The counts of one message. charged: in fifths. open: how many POSTs in a row ended because their consumer or the
    maker died, or are still running. first_at, last_at: UTC seconds."""

    receives: int = 0
    charged: int = 0
    open: int = 0
    first_at: float = 0.0
    last_at: float = 0.0


class ReceiveCounts:
    """The counts of one queue. source: names the queue among those that share the file. Thread-safe.

    Raises StoreError where the file cannot be used. While it is locked, `of` and `begin` raise QueueUnavailable: the
    message must not be POSTed. `charge` and `forget` then lose their change, which only makes counts less exact.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._source = source
        self._store = Store(path, APPLICATION_ID, SCHEMA)
        self.close = self._store.close
        self._write("DELETE FROM receives WHERE last_at < ?", [(time.time() - KEEP_S,)])

    def of(self, ids: Iterable[str]) -> dict[str, Receives]:
        """The counts of those of these messages that the file knows, by id. Raises QueueUnavailable."""
        self._store.check()
        with self._store.reading() as file:
            rows: Any = file.execute(FIND, (self._source, json.dumps([*ids]))).fetchall()
        return {id_: Receives(*values) for id_, *values in rows}

    def begin(self, ids: Iterable[str]) -> list[Receives]:
        """Count one more receive of each message, charge it and mark it open; returns the new counts, in order."""
        now = time.time()
        with self._store.writing(synced=False) as file:
            rows: Any = [file.execute(BEGIN, (self._source, id_, now)).fetchall()[0] for id_ in ids]
        return [Receives(*row) for row in rows]

    def charge(self, charges: Mapping[str, int], left_open: int | None) -> dict[str, int]:
        """Add fifths to the charges of messages, or subtract them, by id; returns the new charges of known messages.

        left_open: how many of their POSTs in a row have ended without an answer; None: unchanged.
        """
        return dict(self._write(CHARGE, [(fifths, left_open, self._source, id_) for id_, fifths in charges.items()]))

    def forget(self, ids: Iterable[str]) -> None:
        """Drop messages that are settled."""
        self._write("DELETE FROM receives WHERE source = ? AND id = ?", [(self._source, id_) for id_ in ids])

    def _write(self, statement: str, rows: list[tuple[Any, ...]]) -> list[Any]:
        try:
            if rows:
                with self._store.writing(synced=False) as file:
                    return file.executemany(statement, rows).fetchall()
        except QueueUnavailable as error:
            log.warning("receive counts not written", reason=str(error))
        return []
