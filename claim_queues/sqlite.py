"""The embedded queue: one SQLite file, shared by any number of processes on one machine.

A message is free while `held_until` is 0 or in the past. While that is in the future, the message is claimed if `claim`
is set, else delayed. More than 43,200 s in the future counts as past: the clock was set back. Times are UTC
milliseconds. Posts and deletes are synced; claims, renewals and releases are not: a power cut may undo them. A
message id is the file's own prefix and a number, so that it is unique among all files.
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
HELD = "held_until BETWEEN :now + 1 AND :now + 43200000"
FREE = f"SELECT id FROM messages WHERE queue = :queue AND held_until = 0 AND {ALIVE} ORDER BY id LIMIT :limit"
LAPSED = """SELECT id FROM messages WHERE queue = :queue AND held_until BETWEEN 1 AND :now
UNION ALL SELECT id FROM messages WHERE queue = :queue AND held_until > :now + 43200000"""
AMONG = "id IN (SELECT value FROM json_each(:ids))"
OURS = f"{AMONG} AND claim = :claim AND held_until > :now"
HOLD = "held_until = :until, expires = CASE WHEN expires < :until THEN :until + :grace ELSE expires END"
COLUMNS = "id, body, max(0, :now - posted) / 1000.0"
INSERT = "INSERT INTO messages (queue, body, posted, expires) VALUES (?2, CAST(?3 AS BLOB), ?1, ?1 + 1000 * ?4)"
LOOK = f"SELECT EXISTS ({FREE}), EXISTS ({LAPSED}), EXISTS (SELECT 1 FROM messages WHERE expires <= :now)"
EXPIRE = """DELETE FROM messages WHERE id IN (SELECT id FROM messages WHERE expires <= :now LIMIT 1000)
RETURNING queue"""
FREE_LAPSED = f"UPDATE messages SET held_until = 0, claim = NULL WHERE id IN ({LAPSED})"
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
    """A SQLite file, open for all threads of a process. A missing file is made, for its owner alone.

    application_id: marks the file as ours. Raises StoreError, and leaves the file as it is, where it is not ours,
    newer, damaged, not writable or without its log; also once it was removed or replaced, because what is written then
    is lost when the process ends. Raises QueueUnavailable where another process keeps it locked.
    """

    def __init__(self, path: Path, application_id: int, schema: str) -> None:
        self.path = path.absolute()
        self._lock = threading.Lock()
        with self._alone():
            has_log = self._prepare()
            self._connection = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            self._set_up(application_id, schema)
        except BaseException:
            # The last connection to close writes the log into the file, unless told not to.
            self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, has_log)
            self._connection.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[apsw.Connection]:
        """The file, for this thread alone."""
        with self._alone():
            yield self._connection

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
                if synced:
                    self.check()  # what was committed after it was removed is gone
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
        with self._lock, suppress(apsw.Error):  # the look that follows raises it
            return self._connection.execute("PRAGMA data_version").get, self._connection.total_changes()
        return None

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _prepare(self) -> bool:
        """Make a missing file, refuse what SQLite would overwrite or wait for. Returns whether the file has a log."""
        real = os.path.realpath(self.path)  # Path.resolve() raises RuntimeError where links go round in a circle
        log, journal = (Path(f"{real}{end}") for end in ("-wal", "-journal"))
        has_log = log.exists()
        if (has_log or journal.exists()) and not self.path.exists():
            raise StoreError(f"{self.path}: is missing, but its log is there: put it back, or move the log away too")
        with suppress(FileExistsError):  # opening and closing a file that is already open would drop its locks
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        found = self.path.stat()
        if not self.path.is_file() or (found.st_size == 0 if has_log else found.st_size % 4096):
            raise StoreError(f"{self.path}: is damaged, or no SQLite file: restore a copy, or name another file")
        self._identity = found.st_dev, found.st_ino
        return has_log

    def _set_up(self, application_id: int, schema: str) -> None:
        self._connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        self._connection.set_wal_hook(_start_log_again)
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
            file.execute("PRAGMA fullfsync = 1; PRAGMA checkpoint_fullfsync = 1")  # macOS: past the disk's cache
            for _ in range(BUSY_TIMEOUT_MS // 10):  # SQLite does not wait here, and two processes may make one file
                with suppress(apsw.BusyError):
                    if file.pragma("journal_mode", "wal") == "wal":
                        return
                    raise StoreError(f"{self.path}: cannot have a log there: name a file on a local disk")
                time.sleep(0.01)
            raise apsw.BusyError

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads from the file until the block ends; turn errors of SQLite and the system into ours."""
        if not self._lock.acquire(timeout=BUSY_TIMEOUT_MS / 1000):
            raise QueueUnavailable(f"{self.path}: locked: other threads wait for it")
        try:
            with _our_errors(self.path):
                yield
        finally:
            self._lock.release()


@contextmanager
def _our_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (apsw.BusyError, apsw.LockedError) as error:
        raise QueueUnavailable(f"{path}: locked by another process") from error
    except OSError as error:
        hint = "make its directory and give access to it, or name another file"
        raise StoreError(f"{path}: {error.strerror}: {hint}") from error
    except (apsw.Error, UnicodeError) as error:
        hint = "it was left as it is: make room, check its permissions, restore a copy or name another file"
        raise StoreError(f"{path}: {error}: {hint}") from error


def _start_log_again(file: apsw.Connection, name: str, pages: int) -> int:
    """Called after each commit. SQLite's own checkpoints do not wait: with constant writers the log would grow."""
    if pages >= LONG_LOG_PAGES:
        file.set_busy_timeout(20)
        with suppress(apsw.Error):  # the commit is done; the next one tries again
            file.wal_checkpoint(name, apsw.SQLITE_CHECKPOINT_RESTART)
        file.set_busy_timeout(BUSY_TIMEOUT_MS)
    return apsw.SQLITE_OK


class SqliteQueues(Queues):
    """Queues in one file, which is made at its first use; every queue exists once the file does.

    clock: seconds since the epoch, the same for all processes that share it.
    """

    limits = Limits(
        service="the embedded queue", claim_limit=20, post_limit=1000, release_delay=43_200, makes_queues=True
    )

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path.absolute()
        self.address = f"sqlite:///{self._path}"
        self._now: Callable[[], int] = lambda: int(clock() * 1000)
        self._stopping = threading.Event()
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._prefix = ""  # of the file's message ids

    @classmethod
    def from_url(cls, url: str) -> Self:
        """`sqlite:///PATH`, percent-encoded: relative to the working directory, or with a fourth slash absolute."""
        path = url.removeprefix("sqlite:///")
        if path in ("", url) or re.search(r"[?#\0]|%00", path):
            raise ConfigError(f"{url}: write sqlite:///PATH, or sqlite:////PATH for an absolute path")
        return cls(Path(unquote(path)))

    def create(self, queue: str) -> None:
        self._file(queue).check()

    def exists(self, queue: str) -> bool:
        return self._found(queue) is not None

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        rows = [(queue, self.limits.encode(body), ttl) for body in bodies]
        with self._file(queue).writing() as file:
            now = self._now()
            file.executemany(INSERT, [(now, *row) for row in rows])
            last = file.last_insert_rowid()
        return [f"{self._prefix}{number}" for number in range(last - len(rows) + 1, last + 1)]

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        for _ in self._looks(wait):
            store = self._file(queue)
            store.check()
            asked_at, now, claim_id = time.monotonic(), self._now(), os.urandom(12).hex()
            values = {"queue": queue, "now": now, "limit": limit, "claim": claim_id}
            with store.reading() as file:  # an idle consumer takes no write lock
                has_free, has_lapsed, has_expired = file.execute(LOOK, values).get
            if not (has_free or has_lapsed or has_expired):
                continue
            with store.writing(synced=False) as file:
                expired = file.execute(EXPIRE, values).fetchall() if has_expired else []
                if has_lapsed:
                    file.execute(FREE_LAPSED, values)
                values |= {"until": now + ttl * 1000, "grace": grace * 1000}
                rows = file.execute(CLAIM, values).fetchall()
            for (name,), number in Counter(expired).items():
                log.warning("messages expired unclaimed", queue=name, number=number)
            if rows:
                messages = tuple(self._messages(sorted(rows)))
                return Claim(claim_id, queue, ttl, grace, messages, expiry(asked_at, ttl))
        return None

    def renew(self, claim: Claim) -> None:
        asked_at = time.monotonic()
        held = self._hold(claim, claim.ttl, claim.id)
        claim.drop({message.id for message in claim.messages} - held)
        if not held:
            raise ClaimLost(f"claim {claim.id} on {claim.queue} expired or was released")
        claim.expires_at = expiry(asked_at, claim.ttl)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        """In one transaction: each outcome is stored exactly once."""
        rows, refused = {}, {}
        for message, posts, _ in settlements:
            try:
                rows[message.id] = [(check_queue(queue), self.limits.encode(body), ttl) for queue, body, ttl in posts]
            except MessageRefused as error:
                refused[message.id] = error
        with self._file(claim.queue).writing() as file:
            now = self._now()
            values = {"ids": self._numbers(rows), "claim": claim.id, "now": now}
            deleted = self._ids(file.execute(SETTLE, values))
            file.executemany(INSERT, [(now, *row) for id_ in rows if id_ in deleted for row in rows[id_]])
        claim.drop(deleted)
        return Settled(deleted, refused)

    def release(self, claim: Claim, *, delay: float = 0) -> None:
        self._hold(claim, delay, None)

    def browse(self, queue: str, *, after: str = "", limit: int = 20, wait: float = 0) -> tuple[list[Message], str]:
        values = {"queue": queue, "after": int(after or 0), "limit": limit}
        for _ in self._looks(wait):
            if store := self._found(queue):
                with store.reading() as file:
                    rows = file.execute(BROWSE, values | {"now": self._now()}).fetchall()
                if rows:
                    return self._messages(rows), str(rows[-1][0])
        return [], after

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        with self._file(queue).writing() as file:
            file.execute(DELETE, {"queue": queue, "ids": self._numbers(ids), "now": self._now()})

    def purge(self, queue: str) -> None:
        with self._file(queue).writing() as file:
            file.execute("DELETE FROM messages WHERE queue = ?", (queue,))

    def stats(self, queue: str) -> Stats:
        if not (store := self._found(queue)):
            return Stats(0, 0, 0)
        with store.reading() as file:
            return Stats(*file.execute(COUNT, {"queue": queue, "now": self._now()}).get)

    def stop_waiting(self) -> None:
        self._stopping.set()

    def close(self) -> None:
        self.stop_waiting()
        if self._store:
            self._store.close()

    def _hold(self, claim: Claim, seconds: float, claim_id: str | None) -> frozenset[str]:
        """Hide what the claim holds for that long, under that claim id, or under none to delay it; returns the ids."""
        with self._file(claim.queue).writing(synced=False) as file:
            now, ids = self._now(), self._numbers(message.id for message in claim.messages)
            until = now + round(seconds * 1000) if seconds else 0
            values = {"ids": ids, "claim": claim.id, "now": now, "until": until, "grace": claim.grace * 1000}
            return self._ids(file.execute(KEEP, values | {"for": claim_id}))

    def _looks(self, wait: float) -> Iterator[None]:
        """Yield once, then whenever there may be something new, until the wait is over or stopped."""
        started = again_at = now = time.monotonic()
        seen = None
        while True:
            version = self._store.version() if self._store and wait else None
            if version != seen or now >= again_at:
                seen, again_at = version, now + LOOK_AGAIN_S
                yield
            now = time.monotonic()
            pause = min(LOOK_EVERY_S, max(0.001, (now - started) / 10), started + wait - now)
            if pause <= 0 or self._stopping.wait(pause):
                return

    def _file(self, queue: str) -> Store:
        """The file, made if it is missing: every queue is in it."""
        check_queue(queue)
        with self._opening:
            if self._store is None:
                store = Store(self._path, APPLICATION_ID, SCHEMA)
                with store.reading() as file:
                    self._prefix = f"{file.execute('SELECT prefix FROM file').get}-"
                self._store = store
            return self._store

    def _found(self, queue: str) -> Store | None:
        """The file, or None while it does not exist: looking does not make it."""
        check_queue(queue)
        if self._store is None:
            with _our_errors(self._path):
                try:
                    self._path.stat()
                except FileNotFoundError:
                    return None
        store = self._file(queue)
        store.check()
        return store

    def _messages(self, rows: Iterable[tuple[Any, ...]]) -> list[Message]:
        return [Message(f"{self._prefix}{n}", decode(str(body, errors="replace")), age) for n, body, age in rows]

    def _ids(self, rows: Iterable[tuple[Any, ...]]) -> frozenset[str]:
        return frozenset(f"{self._prefix}{number}" for (number,) in rows)

    def _numbers(self, ids: Iterable[str]) -> str:
        """The numbers of these messages in the file, as a JSON array; ids of other files are left out."""
        return json.dumps([id_.removeprefix(self._prefix) for id_ in ids if id_.startswith(self._prefix)])
