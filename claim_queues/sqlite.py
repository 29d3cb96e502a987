"""The embedded queues: one SQLite file, shared by any number of processes on one machine.

Semantics follow OpenStack Zaqar's. Times in the file are UTC milliseconds. A message is free while `held_until`
is 0 or past, claimed while it lies ahead and `claim` is set, delayed while it lies ahead and `claim` is not. None
expires before its `held_until`. Renewals and releases are not synced: after a power cut they may be as if they had
never been, and so may a claim of messages that were durable already. Everything else is.
"""

import json
import os
import re
import select
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from .base import JSON, Claim, Limits, Message, Page, Queues, Range, Settled, Settlement, Stats, decode
from .errors import ClaimLost, ConfigError, MessageRefused, PostIncomplete, StoreError, SyncFailed
from .store import Log, open_store, store_errors, transaction

try:
    from inotify_simple import INotify, flags
except ImportError:  # not Linux: the wait below looks every RECHECK_BLIND_S instead
    INotify = None

LIMITS = Limits(
    service="the embedded queue",
    claim_ttl=Range(60, 43_200),
    grace=Range(60, 43_200),
    message_ttl=Range(60, 1_209_600),
    keeps_for_ever=True,
    claim_limit=20,
    post_batch=1_000,
    message_bytes=262_144,
    can_browse=True,
    counts_receives=True,
    fenced_delete=True,
    atomic_settle=True,
    releases_one_message=True,
    release_delay=43_200,
    settle_linger=0.010,
)

RECHECK_S = 1.0
"""Longest sleep without a look, for a poster that died after its commit, before it woke others."""
RECHECK_BLIND_S = 0.05
LOOK_EVERY_MS = 100
"""While every claim is full, what has lapsed or expired, or whose delay has ended, may wait for so long."""
PURGE_BATCH = 10_000
NEVER_MS = 2**62

APPLICATION_ID = 0x51C1A135
SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE store (id TEXT NOT NULL) STRICT;
INSERT INTO store VALUES (lower(hex(randomblob(4))));
CREATE TABLE queues (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE messages (
    place INTEGER PRIMARY KEY AUTOINCREMENT,
    queue INTEGER NOT NULL,
    held_until INTEGER NOT NULL DEFAULT 0,
    claim TEXT,
    receives INTEGER NOT NULL DEFAULT 0,
    posted INTEGER NOT NULL,
    expires INTEGER,
    body BLOB NOT NULL,
    checksum INTEGER
) STRICT;
CREATE INDEX by_hold ON messages (queue, held_until, place);
CREATE INDEX by_expiry ON messages (expires) WHERE expires IS NOT NULL;
"""

UPGRADE = "ALTER TABLE messages ADD COLUMN checksum INTEGER"
"""From version 1. A message without a checksum was posted before, or by a process that still runs."""

PLACE = re.compile("([0-9a-f]{8})([0-9a-f]{16})")
"""A message id: of the file, and of the message in it."""
ALIVE = "(expires IS NULL OR expires > :now)"
IN_PLACES = "place IN (SELECT value FROM json_each(:places))"
MOST_ROWS = 20
"""Rows that one statement inserts, claims or deletes.

Each step of a statement lets go of the interpreter, and waits for its turn again with the file locked for all.
"""
HELD_BY_CLAIM = f"{IN_PLACES} AND claim = :claim AND held_until > :now"
LIVE_ON = f"UPDATE messages SET expires = :until + :grace WHERE {IN_PLACES} AND claim = :claim AND expires < :until"
COLUMNS = "place, body, posted, expires, receives, checksum"


Row = tuple[str, str, int | None]
"""What is to be posted: the queue, the body as JSON text, and how many seconds it may live."""


class _SomeLost(Exception):
    """Not all of the messages are held by the claim; or they are too many for one statement."""


class _Seen(NamedTuple):
    """What a look found: free messages, ones whose hold or delay has ended, and any in the file that have expired."""

    free: bool
    lapsed: bool
    expired: bool


class _Taken(NamedTuple):
    """What a transaction has claimed, and when. Messages are made of the rows once others may have the file."""

    claim_id: str
    now: int
    rows: list[Any]


FREE_ONLY = _Seen(free=True, lapsed=False, expired=False)
"""What a claim goes by after one that was full: a look would cost more than it saves."""


@dataclass(slots=True)
class _Write:
    """A transaction under way. now: when it began, in UTC milliseconds. synced: durable when the block has ended.

    newest: the last place given, where it is known.
    """

    now: int
    synced: bool
    newest: int = 0


class SqliteQueues(Queues):
    """Queues in one file. clock: the wall clock in seconds, the same for all processes on the file."""

    limits = LIMITS

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.address = f"sqlite:///{path.absolute()}"
        self._path = path.absolute()
        self.requests = Counter()
        self._clock = clock
        # One connection: threads queue here, only processes meet in SQLite.
        self._lock = threading.Lock()
        self._in_use = 0
        self._unused = threading.Condition(self._lock)
        self._watches: list[Any] = []
        self._numbers: dict[str, int] = {}
        self._synced_to = 0  # places are given in the order of commits: what lies before it is synced too
        self._failed_sync = ""
        self._full: dict[str, int] = {}  # queues whose last claim was full, and when they were last looked at
        self._connection = open_store(
            path, application_id=APPLICATION_ID, version=SCHEMA_VERSION, schema=SCHEMA, upgrade=UPGRADE
        )
        with store_errors(path):
            self._store_id: str = self._connection.execute("SELECT id FROM store").get
            self._log = Log(self._connection, path)
        self._stop_reader, self._stop_writer = socket.socketpair()

    def create(self, queue: str) -> None:
        with self._writing():
            self._number(queue)

    def exists(self, queue: str) -> bool:
        """True: a queue of the embedded service is made by its first use."""
        self.limits.check_queue(queue)
        return True

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        self.limits.check_message_ttl(ttl)
        texts = [self.limits.encode(body) for body in bodies]
        if not texts:
            return []
        try:
            with self._writing(wakes=True) as write:
                self._insert(write.now, [(queue, text, ttl) for text in texts])
                last = self._connection.last_insert_rowid()
        except SyncFailed as error:
            raise PostIncomplete(str(error), accepted={}, refused={}, unknown=range(len(texts))) from error
        return [self._id(place) for place in range(last - len(texts) + 1, last + 1)]

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        claim = self._claim(queue, ttl, grace, limit)
        if claim is None and wait > 0:
            with self._waiting(wait) as wait_for_post:
                while (claim := self._claim(queue, ttl, grace, limit)) is None and wait_for_post(queue):
                    pass
        return claim

    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        self.limits.check_claim(ttl=ttl, grace=claim.grace, limit=1)
        with self._writing(synced=False) as write:
            values = self._held(claim, messages, write.now)
            values |= {"until": write.now + ttl * 1000, "grace": claim.grace * 1000}
            self._connection.execute(f"UPDATE messages SET held_until = :until WHERE {HELD_BY_CLAIM}", values)
            if self._connection.changes() == 0:
                raise ClaimLost(f"claim {claim.id} on {claim.queue} lapsed or was released")
            self._connection.execute(LIVE_ON, values)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        return self._settle(claim, settlements, lambda _: None)[0]

    def settle_and_claim(
        self, claim: Claim, settlements: Sequence[Settlement], *, ttl: int, grace: int, limit: int
    ) -> tuple[Settled, Claim | None]:
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        if self._is_look_due(claim.queue):
            return super().settle_and_claim(claim, settlements, ttl=ttl, grace=grace, limit=limit)
        settled, taken = self._settle(
            claim, settlements, lambda write: self._take(write, claim.queue, ttl, grace, limit)
        )
        if taken is None or len(taken.rows) < limit:
            self._full.pop(claim.queue, None)  # there may be more than what was free at once
        if taken is None:
            return settled, self._claim_if_it_answers(claim.queue, ttl, grace, limit)
        return settled, self._claim_of(taken, claim.queue, grace)

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        self.limits.check_release(delay=delay)
        with self._writing(synced=False, wakes=True) as write:
            values = self._held(claim, messages, write.now)
            delay_ms = round(delay * 1000)
            values |= {"until": write.now + delay_ms if delay_ms else 0, "grace": claim.grace * 1000}
            # A delay must not be what ends a message's life.
            self._connection.execute(f"{LIVE_ON} AND held_until > :now", values)
            self._connection.execute(
                f"UPDATE messages SET claim = NULL, held_until = :until WHERE {HELD_BY_CLAIM}", values
            )

    def browse(self, queue: str, *, after: str = "", limit: int = 20, claimed: bool = False, wait: float = 0) -> Page:
        if not re.fullmatch("[0-9]{0,18}", after):
            raise ConfigError(f"{after!r} is no marker of {self.address}")
        look = partial(self._browse, queue, int(after or 0), limit, claimed)
        page = look()
        if not page.messages and wait > 0:
            with self._waiting(wait) as wait_for_post:
                while not (page := look()).messages and wait_for_post(queue):
                    pass
        return page

    def end_marker(self, queue: str) -> str:
        self.limits.check_queue(queue)
        with self._reading():
            return str(self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'messages'").get or 0)

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        # Callers may hand in any text; ids of other files have no place here.
        found = (PLACE.fullmatch(id_) for id_ in ids)
        places = [int(match[2], 16) for match in found if match and match[1] == self._store_id]
        with self._writing() as write:
            self._connection.execute(
                f"DELETE FROM messages WHERE {IN_PLACES} AND queue = :queue AND (claim IS NULL OR held_until <= :now)",
                {"places": json.dumps(places), "queue": self._number(queue), "now": write.now},
            )

    def purge(self, queue: str) -> None:
        with self._writing():
            self._connection.execute("DELETE FROM messages WHERE queue = ?", (self._number(queue),))

    def stats(self, queue: str) -> Stats:
        with self._reading() as now:
            free, claimed, delayed, oldest = self._connection.execute(
                f"""
                SELECT (SELECT count(*) FROM messages WHERE queue = :queue AND held_until <= :now)
                     - (SELECT count(*) FROM messages WHERE expires <= :now AND queue = :queue),
                    (SELECT count(*) FROM messages WHERE queue = :queue AND held_until > :now AND claim IS NOT NULL),
                    (SELECT count(*) FROM messages WHERE queue = :queue AND held_until > :now AND claim IS NULL),
                    (SELECT min(posted) FROM (
                        SELECT * FROM (SELECT posted FROM messages
                            WHERE queue = :queue AND held_until = 0 AND {ALIVE} ORDER BY place LIMIT 1)
                        UNION ALL
                        SELECT posted FROM messages WHERE queue = :queue AND held_until > 0 AND {ALIVE}))
                """,
                {"queue": self._known(queue), "now": now},
            ).get
        return Stats(free, claimed, delayed, None if oldest is None else max(0, now - oldest) / 1000)

    def stop_waiting(self) -> None:
        self._stop_writer.close()  # makes the other end readable, for ever

    def close(self) -> None:
        self.stop_waiting()
        with self._unused:
            self._unused.wait_for(lambda: not self._in_use)
            self._connection.close()
            self._log.close()
            self._stop_reader.close()
            for watch in self._watches:
                watch.close()

    def inspect(self, queue: str) -> list[str]:
        """Read the whole file and compare it with itself; raise StoreError where it is damaged."""
        with self._reading():
            problem = " ".join(self._connection.execute("PRAGMA quick_check(1)").get.split())
        if problem != "ok":
            raise StoreError(f"{self._path}: is damaged ({problem}): restore a copy, or move it away")
        return []

    def _claim(self, queue: str, ttl: int, grace: int, limit: int) -> Claim | None:
        """Claim in one transaction, after what is seen to have lapsed or expired is cleared away."""
        looked_at, seen = self._full.get(queue, 0), FREE_ONLY
        if self._is_look_due(queue):
            looked_at, seen = self._look(queue)
        if not any(seen):
            return None
        with self._writing(synced=False) as write:
            values = {"queue": self._number(queue), "now": write.now, "batch": PURGE_BATCH}
            if seen.expired:
                self._connection.execute(
                    "DELETE FROM messages"
                    " WHERE place IN (SELECT place FROM messages WHERE expires <= :now LIMIT :batch)",
                    values,
                )
            if seen.lapsed:
                self._connection.execute(
                    "UPDATE messages SET held_until = 0, claim = NULL"
                    " WHERE queue = :queue AND held_until BETWEEN 1 AND :now",
                    values,
                )
            taken = self._take(write, queue, ttl, grace, limit)
        if taken and len(taken.rows) == limit and not seen.expired:  # what has expired may be more than one batch
            self._full[queue] = looked_at
        else:
            self._full.pop(queue, None)
            if not taken and seen is FREE_ONLY:  # there may be more than what was free at once
                return self._claim(queue, ttl, grace, limit)
        return self._claim_of(taken, queue, grace) if taken else None

    def _is_look_due(self, queue: str) -> bool:
        looked_at = self._full.get(queue, -LOOK_EVERY_MS)
        return not looked_at <= self._now() < looked_at + LOOK_EVERY_MS

    def _take(self, write: _Write, queue: str, ttl: int, grace: int, limit: int) -> _Taken | None:
        """Claim what is free at once."""
        claim_id, until = os.urandom(12).hex(), write.now + ttl * 1000
        values: dict[str, Any] = {
            "queue": self._number(queue),
            "now": write.now,
            "claim": claim_id,
            "until": until,
            "grace": grace * 1000,
            "limit": limit,
        }
        rows: list[Any] = self._connection.execute(
            f"""
            SELECT place, body, posted,
                CASE WHEN expires < :until THEN :until + :grace ELSE expires END, receives + 1, checksum
            FROM messages WHERE queue = :queue AND held_until = 0 AND {ALIVE} ORDER BY place LIMIT :limit
            """,
            values,
        ).fetchall()
        if not rows:
            return None
        self._connection.execute(_claiming(len(rows)), (claim_id, until, *[row[0] for row in rows]))
        if until + values["grace"] in [row[3] for row in rows]:
            self._connection.execute(LIVE_ON, {**values, "places": json.dumps([row[0] for row in rows])})
        # A message that a power cut undoes would leave its id to another: it is synced before it is worked on.
        if rows[-1][0] > self._synced_to:
            write.synced = True
            write.newest = self._connection.execute("SELECT max(place) FROM messages").get
        return _Taken(claim_id, write.now, rows)

    def _claim_of(self, taken: _Taken, queue: str, grace: int) -> Claim:
        return Claim(taken.claim_id, queue, self._messages(taken.rows, taken.now), grace)

    def _settle(
        self, claim: Claim, settlements: Sequence[Settlement], then: Callable[[_Write], _Taken | None]
    ) -> tuple[Settled, _Taken | None]:
        """Settle, and do what is to be done `then`, in one transaction."""
        ids: dict[int, str] = {}
        outgoing: dict[int, list[Row]] = {}
        refused: dict[str, MessageRefused] = {}
        foreign: list[str] = []
        for message, posts, _ in settlements:
            id_, place = message.id, self._place(message)
            if not id_.startswith(self._store_id):
                foreign.append(id_)
            elif place not in ids:
                try:
                    outgoing[place] = [self._outgoing(*post) for post in posts] if posts else []
                    ids[place] = id_
                except MessageRefused as error:
                    refused[id_] = error
        try:
            gone, taken = self._settle_rows(claim, outgoing, self._delete_all, then)
        except _SomeLost:
            gone, taken = self._settle_rows(claim, outgoing, self._delete_each, then)
        deleted = frozenset([ids[place] for place in gone])
        lost = frozenset([ids[place] for place in ids.keys() - gone] + foreign)
        return Settled(deleted=deleted, lost=lost, refused=refused), taken

    def _settle_rows(
        self,
        claim: Claim,
        outgoing: dict[int, list[Row]],
        delete: Callable[[Collection[int], str, int], Collection[int]],
        then: Callable[[_Write], _Taken | None],
    ) -> tuple[set[int], _Taken | None]:
        """Posts and deletes become durable together, so their order here is free. Gives the places that are gone."""
        with self._writing(wakes=any(outgoing.values())) as write:
            gone = delete(outgoing, claim.id, write.now)
            self._insert(write.now, [row for place in gone for row in outgoing[place]])
            return set(gone), then(write)

    def _delete_all(self, places: Collection[int], claim_id: str, now: int) -> Collection[int]:
        if places:
            if len(places) > MOST_ROWS:
                raise _SomeLost
            self._connection.execute(_deleting(len(places)), (*places, claim_id, now))
            if self._connection.changes() < len(places):
                raise _SomeLost
        return places

    def _delete_each(self, places: Collection[int], claim_id: str, now: int) -> Collection[int]:
        gone = []
        for place in places:
            self._connection.execute(_deleting(1), (place, claim_id, now))
            if self._connection.changes():
                gone.append(place)
        return gone

    def _look(self, queue: str) -> tuple[int, _Seen]:
        """The time, and what a claim has to do.

        A look before the write lock is taken: an idle consumer must not stand in a busy one's way. What has expired is
        removed by claims only: left lying, each look would have to pass over it.
        """
        with self._reading() as now:
            ((free, lapsed, expired),) = self._connection.execute(
                f"""
                SELECT EXISTS (SELECT 1 FROM messages WHERE queue = :queue AND held_until = 0 AND {ALIVE}),
                    EXISTS (SELECT 1 FROM messages WHERE queue = :queue AND held_until BETWEEN 1 AND :now),
                    EXISTS (SELECT 1 FROM messages WHERE expires <= :now)
                """,
                {"queue": self._known(queue), "now": now},
            )
        return now, _Seen(free, lapsed, expired)

    def _browse(self, queue: str, after: int, limit: int, claimed: bool) -> Page:
        with self._reading() as now:
            rows = self._connection.execute(
                f"""
                SELECT * FROM (SELECT {COLUMNS} FROM messages
                    WHERE queue = :queue AND held_until = 0 AND place > :after AND {ALIVE} ORDER BY place LIMIT :limit)
                UNION ALL
                SELECT {COLUMNS} FROM messages
                    WHERE queue = :queue AND held_until BETWEEN 1 AND :until AND place > :after AND {ALIVE}
                ORDER BY place LIMIT :limit
                """,
                {
                    "queue": self._known(queue),
                    "now": now,
                    "after": after,
                    "until": NEVER_MS if claimed else now,
                    "limit": limit,
                },
            ).fetchall()
        return Page(self._messages(rows, now), str(rows[-1][0] if rows else after))

    def _insert(self, now: int, posts: Sequence[Row]) -> None:
        for batch in (posts[at : at + MOST_ROWS] for at in range(0, len(posts), MOST_ROWS)):
            values: list[Any] = [now]
            for queue, text, ttl in batch:
                body = text.encode()
                values += self._number(queue), None if ttl is None else now + ttl * 1000, body, zlib.crc32(body)
            self._connection.execute(_inserting(len(batch)), values)

    def _messages(self, rows: Iterable[tuple[Any, ...]], now: int) -> tuple[Message, ...]:
        store_id = self._store_id
        return tuple(
            [
                Message(
                    f"{store_id}{place:016x}",
                    _body(body, checksum),
                    (now - posted) / 1000 if now > posted else 0.0,
                    None if expires is None else (expires - posted) // 1000,
                    receives,
                )
                for place, body, posted, expires, receives, checksum in rows
            ]
        )

    def _outgoing(self, queue: str, body: JSON, ttl: int | None) -> Row:
        self.limits.check_message_ttl(ttl)
        return queue, self.limits.encode(body), ttl

    def _number(self, queue: str) -> int:
        """The queue's number, given to it at its first use; inside a write transaction."""
        if (number := self._known(queue)) == 0:
            self._connection.execute("INSERT INTO queues (name) VALUES (?)", (queue,))
            number = self._connection.last_insert_rowid()
        return number

    def _known(self, queue: str) -> int:
        """The queue's number, 0 when it was never used."""
        if (number := self._numbers.get(queue)) is None:
            self.limits.check_queue(queue)
            number = self._connection.execute("SELECT number FROM queues WHERE name = ?", (queue,)).get or 0
            if number:
                self._numbers[queue] = number
        return int(number)

    def _id(self, place: int) -> str:
        return f"{self._store_id}{place:016x}"

    def _place(self, message: Message) -> int:
        return int(message.id[-16:], 16)

    def _held(self, claim: Claim, messages: Collection[Message] | None, now: int) -> dict[str, Any]:
        places = list(map(self._place, claim.messages if messages is None else messages))
        return {"places": json.dumps(places), "claim": claim.id, "now": now}

    def _now(self) -> int:
        return int(self._clock() * 1000)

    @contextmanager
    def _reading(self) -> Iterator[int]:
        """Alone on the connection; gives the time in milliseconds."""
        with self._lock, store_errors(self._path):
            yield self._now()

    @contextmanager
    def _writing(self, *, synced: bool = True, wakes: bool = False) -> Iterator[_Write]:
        """Alone on the file, in a transaction.

        synced: durable when the block has ended. Others may see it before, and what they make of it is durable only
        with it. wakes: there may be something to claim or browse afterwards.
        """
        with store_errors(self._path), self._lock:
            if self._failed_sync:  # a system tells of it once; the next sync would succeed whatever was lost
                raise StoreError(self._failed_sync)
            try:
                with transaction(self._connection):
                    self._log.lengthen()
                    write = _Write(self._now(), synced)
                    yield write
            except BaseException:
                self._numbers.clear()  # a queue that was new is none again, and its number another's
                raise
            if not wakes and not write.synced:
                return
            self._in_use += 1
        try:
            if wakes:
                self._wake_others()
            if write.synced:
                self._log.sync()
                self._synced_to = max(self._synced_to, write.newest)
        except SyncFailed as error:
            self._failed_sync = str(error)
            raise
        finally:
            self._use(-1)

    def _wake_others(self) -> None:
        """Wake waiting processes by opening the log: an event after the commit, where its writes are events before it.

        A changed time stamp would do too, but makes the next sync a third longer. SQLite never locks the log itself, so
        closing it drops no lock.
        """
        with suppress(OSError):
            os.close(os.open(self._log.name, os.O_RDONLY))

    @contextmanager
    def _waiting(self, wait: float) -> Iterator[Callable[[str], bool]]:
        """Give a function that sleeps until a look is worthwhile, and answers False once the wait is over.

        Watching starts before the caller's next look, so nothing posted in between is missed.
        """
        deadline = time.monotonic() + wait
        with ExitStack() as stack:
            self._use(+1)
            stack.callback(self._use, -1)
            watch = self._take_watch()
            if watch is not None:
                stack.callback(self._watches.append, watch)
            yield lambda queue: self._sleep(queue, deadline, watch)

    def _take_watch(self) -> Any:
        """A watch on the file, None where the system has none; kept for the next wait, as closing one takes long."""
        if self._watches:
            watch = self._watches.pop()
            watch.read(timeout=0)
            return watch
        with suppress(OSError), ExitStack() as stack:  # the user's inotify instances or watches are used up
            if INotify is not None:
                watch = stack.enter_context(INotify(nonblocking=True))
                watch.add_watch(self._log.name, flags.OPEN)
                stack.pop_all()
                return watch
        return None

    def _use(self, change: int) -> None:
        """Count what close() has to wait for: waits and syncs, which do not hold the lock."""
        with self._lock:
            self._in_use += change
            if not self._in_use:
                self._unused.notify_all()

    def _sleep(self, queue: str, deadline: float, watch: Any) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        with self._reading() as now:
            due = self._connection.execute(
                "SELECT min(held_until) FROM messages WHERE queue = ? AND held_until > ?", (self._known(queue), now)
            ).get
        longest = min(left, RECHECK_BLIND_S if watch is None else RECHECK_S)
        if due is not None:
            longest = min(longest, max(0, due - now) / 1000 + 0.001)
        poll = select.poll()
        for source in (self._stop_reader, watch):
            if source is not None:
                poll.register(source, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(longest * 1000)]
        if watch is not None:
            watch.read(timeout=0)
        return self._stop_reader.fileno() not in ready


@cache
def _inserting(rows: int) -> str:
    values = ", ".join(["(?1, ?, ?, ?, ?)"] * rows)
    return f"INSERT INTO messages (posted, queue, expires, body, checksum) VALUES {values}"


@cache
def _claiming(rows: int) -> str:
    places = ", ".join("?" * rows)
    return f"UPDATE messages SET claim = ?, held_until = ?, receives = receives + 1 WHERE place IN ({places})"


@cache
def _deleting(rows: int) -> str:
    places = ", ".join("?" * rows)
    return f"DELETE FROM messages WHERE place IN ({places}) AND claim = ? AND held_until > ?"


def _body(stored: Any, checksum: Any) -> JSON:
    """The body as it was posted; text, which is no request, where it has changed since: SQLite's pages tell nothing."""
    if isinstance(stored, bytes) and (checksum == zlib.crc32(stored) or checksum is None):
        return decode(stored.decode("utf-8", "surrogateescape"))
    text = stored.decode("utf-8", "surrogateescape") if isinstance(stored, bytes) else str(stored)
    return f"damaged in the queue file: {text}"
