"""The embedded queue: one SQLite file, shared by any number of processes on one machine.

A message is free while `held_until` is 0 or past, claimed while it lies ahead and `claim` is set, delayed while it
lies ahead and `claim` is not. What lies more than 43,200 s ahead is over too: the clock was set back. Times are UTC
milliseconds. Posts and deletes are synced; claims, renewals and releases are not: a power cut may undo them. A
message id is the file's own prefix and a number, so that it names one message among those of all files.
"""

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import apsw
import structlog

from .base import JSON, Claim, Limits, Message, Queues, Settled, Settlement, Stats, check_queue, decode, expiry
from .errors import ClaimLost, ConfigError, MessageRefused, QueueUnavailable, StoreError

BUSY_TIMEOUT_MS = 5000
LONG_LOG_PAGES = 2000
LOOK_EVERY_S = 0.007  # while waiting: whether anything was committed; at first more often
LOOK_AGAIN_S = 0.25  # while waiting: for what has become free by time alone
VERSION = 1
APPLICATION_ID = 0x51C1A137
SCHEMA = """
CREATE TABLE file (prefix TEXT NOT NULL) STRICT;
INSERT INTO file VALUES (lower(hex(randomblob(6))));
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, held_until INTEGER NOT NULL DEFAULT 0, claim TEXT,
    posted INTEGER NOT NULL, expires INTEGER, body BLOB NOT NULL
) STRICT;
CREATE INDEX by_hold ON messages (queue, held_until, id);
CREATE INDEX by_expiry ON messages (expires) WHERE expires IS NOT NULL;
"""
ALIVE = "(expires IS NULL OR expires > :now)"
FREE = f"SELECT id FROM messages WHERE queue = :queue AND held_until = 0 AND {ALIVE} ORDER BY id LIMIT :limit"
LAPSED = """SELECT id FROM messages WHERE queue = :queue AND held_until BETWEEN 1 AND :now
UNION ALL SELECT id FROM messages WHERE queue = :queue AND held_until > :now + 43200000"""
HELD = "held_until BETWEEN :now + 1 AND :now + 43200000"
AMONG = "id IN (SELECT value FROM json_each(:ids))"
OURS = f"{AMONG} AND claim = :claim AND held_until > :now"
HOLD = "held_until = :until, expires = CASE WHEN expires < :until THEN :until + :grace ELSE expires END"
LOOK = f"SELECT EXISTS ({FREE}), EXISTS ({LAPSED}), EXISTS (SELECT 1 FROM messages WHERE expires <= :now)"
FREE_LAPSED = f"UPDATE messages SET held_until = 0, claim = NULL WHERE id IN ({LAPSED})"
EXPIRE = "DELETE FROM messages WHERE expires <= :now RETURNING queue"
COLUMNS = "id, body, max(0, :now - posted)"
CLAIM = f"UPDATE messages SET claim = :claim, {HOLD} WHERE id IN ({FREE}) RETURNING {COLUMNS}"
KEEP = f"UPDATE messages SET claim = :for, {HOLD} WHERE {OURS} RETURNING id"
SETTLE = f"DELETE FROM messages WHERE {OURS} RETURNING id"
DELETE = f"DELETE FROM messages WHERE {AMONG} AND +queue = :queue AND (claim IS NULL OR NOT {HELD})"
PAGE = f"SELECT {COLUMNS} FROM messages WHERE queue = :queue AND id > :after AND {ALIVE}"
BROWSE = f"""
SELECT * FROM ({PAGE} AND held_until = 0 ORDER BY id LIMIT :limit)
UNION ALL {PAGE} AND held_until > 0 ORDER BY id LIMIT :limit
"""
COUNT = f"""
SELECT count(*) FILTER (WHERE NOT {HELD}), count(*) FILTER (WHERE {HELD} AND claim IS NOT NULL),
    count(*) FILTER (WHERE {HELD} AND claim IS NULL), max(0, :now - min(posted)) / 1000.0
FROM messages WHERE queue = :queue AND {ALIVE}
"""

log = structlog.get_logger()


class Store:
    """A SQLite file, open for all threads of a process; a missing one is made, for its owner alone.

    application_id: marks the file as ours. Raises StoreError, and leaves the file as it is, where it is not ours,
    newer, damaged, not writable or without its log, and once it was removed or replaced: what is written to a file
    without a name is gone with the process. Raises QueueUnavailable where another process keeps it locked.
    """

    def __init__(self, path: Path, application_id: int, schema: str) -> None:
        self.path = path.absolute()
        self._lock = threading.Lock()
        with self._errors():
            has_log = self._prepare()
            self._connection = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)
            try:
                self._set_up(application_id, schema)
            except BaseException:
                # The last to close a file writes its log into it, unless told not to.
                self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, has_log)
                self._connection.close()
                raise

    @contextmanager
    def reading(self) -> Iterator[apsw.Connection]:
        """The file, for this thread alone."""
        if not self._lock.acquire(timeout=BUSY_TIMEOUT_MS / 1000):
            raise QueueUnavailable(f"{self.path}: locked: other threads wait for it")
        try:
            with self._errors():
                yield self._connection
        finally:
            self._lock.release()

    @contextmanager
    def writing(self, *, synced: bool = True) -> Iterator[apsw.Connection]:
        """A transaction. synced: it outlives a power cut, not just this process."""
        with self.reading() as file:
            if synced:
                self.check()
            # Immediate: a transaction that reads first could not wait for the write lock.
            file.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}; BEGIN IMMEDIATE")
            try:
                yield file
                file.execute("COMMIT")
            except BaseException:
                if file.in_transaction:
                    file.execute("ROLLBACK")
                raise

    def check(self) -> None:
        """Raise StoreError where the file was removed or replaced since it was opened."""
        with suppress(OSError):
            found = self.path.stat()
            if (found.st_dev, found.st_ino) == self._identity:
                return
        raise StoreError(f"{self.path}: was removed or replaced while it was open: start again")

    def version(self) -> tuple[Any, int] | None:
        """Changes with each commit: the first number with those of other connections, the second with our own."""
        with self._lock, suppress(apsw.Error):  # who looks then will be told
            return self._connection.execute("PRAGMA data_version").get, self._connection.total_changes()
        return None

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _prepare(self) -> bool:
        """Make a missing file, refuse what SQLite would overwrite. Returns whether the file has a log."""
        log, journal = (Path(f"{self.path.resolve()}{end}") for end in ("-wal", "-journal"))
        has_log = log.exists()
        if (has_log or journal.exists()) and not self.path.exists():
            raise StoreError(f"{self.path}: is missing, but its log is there: put it back, or move the log away too")
        with suppress(FileExistsError):  # to open and close a file that is open already would drop its locks
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        found = self.path.stat()
        if not self.path.is_file():
            raise StoreError(f"{self.path}: is not a regular file: name another one")
        if found.st_size == 0 if has_log else found.st_size % 4096:
            raise StoreError(f"{self.path}: is damaged, or no SQLite file: restore a copy, or move it away")
        self._identity = found.st_dev, found.st_ino
        return has_log

    def _set_up(self, application_id: int, schema: str) -> None:
        self._connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        self._connection.set_wal_hook(self._start_log_again)
        self._connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)  # else STAT4 plans each claim again
        with self.writing() as file:
            found, version = file.pragma("application_id"), file.pragma("user_version")
            if found == 0 and not file.execute("SELECT 1 FROM sqlite_schema").get:
                file.execute(f"{schema}; PRAGMA application_id = {application_id}; PRAGMA user_version = {VERSION}")
            elif found != application_id:
                raise StoreError(f"{self.path}: belongs to another program: name another file")
            elif version > VERSION:
                raise StoreError(f"{self.path}: was made by a newer version of this program: upgrade")
        with self.reading() as file:
            file.execute("PRAGMA fullfsync = 1; PRAGMA checkpoint_fullfsync = 1")  # macOS: through the disk's cache
            for _ in range(BUSY_TIMEOUT_MS // 10):  # SQLite does not wait here, and two processes may make a file
                with suppress(apsw.BusyError):
                    if file.pragma("journal_mode", "wal") == "wal":
                        return
                    raise StoreError(f"{self.path}: cannot have a log there: name a file on a local disk")
                time.sleep(0.01)
            raise apsw.BusyError

    @staticmethod
    def _start_log_again(file: apsw.Connection, name: str, pages: int) -> int:
        """After a commit. SQLite's own checkpoints wait for nobody, so the log grows while there is always a writer."""
        if pages >= LONG_LOG_PAGES:
            file.set_busy_timeout(20)
            with suppress(apsw.Error):  # the commit is done; the next one tries again
                file.wal_checkpoint(name, apsw.SQLITE_CHECKPOINT_RESTART)
            file.set_busy_timeout(BUSY_TIMEOUT_MS)
        return apsw.SQLITE_OK

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (apsw.BusyError, apsw.LockedError) as error:
            raise QueueUnavailable(f"{self.path}: locked by another process") from error
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}: make its directory, or name another file") from error
        except (apsw.Error, UnicodeError) as error:
            hint = "it was left as it is: make room, check its permissions, restore a copy or name another file"
            raise StoreError(f"{self.path}: {error}: {hint}") from error


class SqliteQueues(Queues):
    """Queues in one file, made at its first use; every queue is there once the file is.

    clock: seconds since the epoch, the same for all processes that share it.
    """

    limits = Limits(
        service="the embedded queue", claim_limit=20, post_limit=1000, release_delay=43_200, makes_queues=True
    )

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path.absolute()
        self.address = f"sqlite:///{self._path}"
        self._clock = clock
        self._stopping = threading.Event()
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._prefix = ""

    @classmethod
    def from_url(cls, url: str) -> Self:
        """`sqlite:///PATH`, percent-encoded: relative to the working directory, or with a fourth slash absolute."""
        path = url.removeprefix("sqlite:///")
        if path in ("", url) or re.search(r"[?#\0]|%00", path):
            raise ConfigError(f"{url}: write sqlite:///PATH, or sqlite:////PATH for an absolute path")
        return cls(Path(unquote(path)))

    def create(self, queue: str) -> None:
        check_queue(queue)
        self._file().check()

    def exists(self, queue: str) -> bool:
        return bool(check_queue(queue) and self._found())

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        rows = [(check_queue(queue), self.limits.encode(body), ttl) for body in bodies]
        with self._file().writing() as file:
            self._insert(file, self._now(), rows)
            last = file.last_insert_rowid()
        return [f"{self._prefix}-{number}" for number in range(last - len(rows) + 1, last + 1)]

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        check_queue(queue)
        for _ in self._looks(wait):
            asked_at = time.monotonic()
            claim_id = os.urandom(12).hex()
            if messages := self._claim(queue, claim_id, ttl, grace, limit):
                return Claim(claim_id, queue, ttl, grace, messages, expiry(asked_at, ttl))
        return None

    def renew(self, claim: Claim) -> None:
        asked_at = time.monotonic()
        held = self._hold(claim, claim.ttl, claim.id)
        claim.drop({message.id for message in claim.messages} - held)
        if not held:
            raise ClaimLost(f"claim {claim.id} on {claim.queue} expired or was released")
        claim.renewed(asked_at)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        """In one transaction: each outcome is stored exactly once."""
        rows, refused = {}, {}
        for message, posts, _ in settlements:
            try:
                rows[message.id] = [(check_queue(queue), self.limits.encode(body), ttl) for queue, body, ttl in posts]
            except MessageRefused as error:
                refused[message.id] = error
        with self._file().writing() as file:
            now = self._now()
            ids = json.dumps([int(message.handle) for message, *_ in settlements if message.id in rows])
            deleted = self._ids(file.execute(SETTLE, {"ids": ids, "claim": claim.id, "now": now}))
            self._insert(file, now, [row for id_ in rows if id_ in deleted for row in rows[id_]])
        claim.drop(deleted)
        return Settled(deleted, refused)

    def release(self, claim: Claim, *, delay: float = 0) -> None:
        self._hold(claim, delay, None)

    def browse(self, queue: str, *, after: str = "", limit: int = 20, wait: float = 0) -> tuple[list[Message], str]:
        check_queue(queue)
        for _ in self._looks(wait):
            if store := self._found():
                with store.reading() as file:
                    values = {"queue": queue, "after": int(after or 0), "now": self._now(), "limit": limit}
                    rows = file.execute(BROWSE, values).fetchall()
                if rows:
                    return self._messages(rows), str(rows[-1][0])
        return [], after

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        check_queue(queue)
        with self._file().writing() as file:
            parts = (id_.rpartition("-") for id_ in ids)
            numbers = [int(n) for prefix, _, n in parts if prefix == self._prefix and re.fullmatch("[0-9]{1,18}", n)]
            values = {"queue": queue, "ids": json.dumps(numbers), "now": self._now()}
            file.execute(DELETE, values)

    def purge(self, queue: str) -> None:
        with self._file().writing() as file:
            file.execute("DELETE FROM messages WHERE queue = ?", (check_queue(queue),))

    def stats(self, queue: str) -> Stats:
        check_queue(queue)
        if (store := self._found()) is None:
            return Stats(0, 0, 0)
        with store.reading() as file:
            ((free, claimed, delayed, oldest_age),) = file.execute(COUNT, {"queue": queue, "now": self._now()})
        return Stats(free, claimed, delayed, oldest_age)

    def stop_waiting(self) -> None:
        self._stopping.set()

    def close(self) -> None:
        self.stop_waiting()
        if self._store:
            self._store.close()

    def _claim(self, queue: str, claim_id: str, ttl: int, grace: int, limit: int) -> tuple[Message, ...]:
        store = self._file()
        store.check()
        values: dict[str, Any] = {"queue": queue, "now": self._now(), "claim": claim_id, "limit": limit}
        with store.reading() as file:  # an idle consumer takes no write lock
            ((free, lapsed, expired),) = file.execute(LOOK, values)
        if not (free or lapsed or expired):
            return ()
        with store.writing(synced=False) as file:
            values["now"] = now = self._now()
            if lapsed:
                file.execute(FREE_LAPSED, values)  # to 0, so that the index gives the oldest first
            gone = Counter(name for (name,) in file.execute(EXPIRE, values)) if expired else {}
            rows = file.execute(CLAIM, values | {"until": now + ttl * 1000, "grace": grace * 1000}).fetchall()
        for name, number in gone.items():
            log.warning("messages expired unclaimed", queue=name, number=number)
        return tuple(self._messages(sorted(rows)))

    def _hold(self, claim: Claim, seconds: float, claim_id: str | None) -> frozenset[str]:
        """Keep what the claim holds from others for so long, for that claim or none; returns the ids."""
        with self._file().writing(synced=False) as file:
            now, ids = self._now(), json.dumps([int(message.handle) for message in claim.messages])
            until = now + round(seconds * 1000) if seconds else 0
            values = {"ids": ids, "claim": claim.id, "now": now, "until": until, "grace": claim.grace * 1000}
            return self._ids(file.execute(KEEP, values | {"for": claim_id}))

    def _looks(self, wait: float) -> Iterator[None]:
        """Once, then each time that there may be something new, until the time is over or waiting is stopped."""
        asked_at = time.monotonic()
        deadline = asked_at + wait
        while True:
            seen = self._store.version() if self._store and wait else None
            yield
            if (started := time.monotonic()) >= deadline or self._stopping.is_set():
                return
            again_at = min(deadline, started + LOOK_AGAIN_S)
            while (self._store and self._store.version()) == seen and (left := again_at - time.monotonic()) > 0:
                pause = min(LOOK_EVERY_S, max(0.001, (time.monotonic() - asked_at) / 10))
                if self._stopping.wait(min(pause, left)):
                    return

    def _file(self) -> Store:
        with self._opening:
            if self._store is None:
                store = Store(self._path, APPLICATION_ID, SCHEMA)
                with store.reading() as file:
                    self._prefix = str(file.execute("SELECT prefix FROM file").get)
                self._store = store
            return self._store

    def _found(self) -> Store | None:
        """The file, unless it is missing yet: to look makes none."""
        if self._store is None and not self._path.exists():
            return None
        store = self._file()
        store.check()
        return store

    def _messages(self, rows: Sequence[tuple[Any, ...]]) -> list[Message]:
        return [
            Message(f"{self._prefix}-{number}", decode(str(body, errors="replace")), age_ms / 1000, None, str(number))
            for number, body, age_ms in rows
        ]

    def _ids(self, rows: Iterable[tuple[Any, ...]]) -> frozenset[str]:
        return frozenset(f"{self._prefix}-{number}" for (number,) in rows)

    def _now(self) -> int:
        return int(self._clock() * 1000)

    @staticmethod
    def _insert(file: apsw.Connection, now: int, rows: Sequence[tuple[str, str, int | None]]) -> None:
        values = [(queue, text.encode(), now, ttl and now + ttl * 1000) for queue, text, ttl in rows]
        file.executemany("INSERT INTO messages (queue, body, posted, expires) VALUES (?, ?, ?, ?)", values)
