"""Open a local SQLite file so that what is committed survives a power cut, and say plainly when it cannot be.

The library's own SQLite is used (through apsw): 3.7.0 to 3.51.2 can damage a write-ahead log that several
processes share (https://sqlite.org/wal.html#walresetbug, read 2026-11-23).
"""

import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import apsw
import platformdirs

from .errors import ConfigError, QueueUnavailable, StoreError, SyncFailed

APPLICATION = "itchy-octo-chainsaw"
BUSY_TIMEOUT_S = 5.0
BUSY_PAUSE_S = 0.0001
"""SQLite's own pauses grow to 100 ms, many times what a transaction takes."""
LONG_LOG = 2000
"""Pages, 4 KiB each, after which a log is worth its transfer into the file."""
LOG_PATIENCE_S = 0.005
"""How long that may wait for others at the file."""
FRAME_BYTES = 4096 + 24
"""What a page takes in the log."""
SHORT_LOG, GROWTH = 16, 64
"""Pages: a log that has so many, or so few left, grows by so many at once."""
ZEROS = bytes(GROWTH * FRAME_BYTES)
FIRST_SOUND_SQLITE = 3_051_003
SYNCHRONOUS_FULL = 2
SYNC = getattr(os, "fdatasync", os.fsync)


def state_path(name: str) -> Path:
    """Where the file of that name lies for this user, whatever the working directory; makes the directory."""
    try:
        directory = platformdirs.user_state_path(APPLICATION, appauthor=False)
    except RuntimeError as error:  # a user without an entry in the password file
        raise ConfigError(f"this user has no home directory: set HOME, or name {name} by its option") from error
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{directory}: the directory cannot be made: {error.strerror}") from error
    return directory / name


def open_store(path: Path, *, application_id: int, version: int, schema: str, upgrade: str = "") -> apsw.Connection:
    """Open the file, or make it with the schema, in WAL mode with every commit synced.

    application_id: marks the file as ours. version: of the schema; a newer file is refused. upgrade: what makes one of
    the version before.
    Raises StoreError, and leaves the file untouched, where it is not a file, not ours, damaged, not writable or
    newer. Raises QueueUnavailable where another process keeps it locked for 5 seconds.
    """
    if apsw.SQLITE_VERSION_NUMBER < FIRST_SOUND_SQLITE:
        raise StoreError(f"SQLite {apsw.sqlite_lib_version()} can damage files that processes share: upgrade apsw")
    _create_private(path)
    with store_errors(path):
        connection = apsw.Connection(str(path.absolute()), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            # SQLite built with STAT4 would plan most statements anew each time their values change.
            connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
            connection.set_busy_handler(_lock_waiter(BUSY_TIMEOUT_S))
            _refuse_foreign(connection, path, application_id, version)
            _make_durable(connection, path)
            _migrate(connection, application_id, version, schema, upgrade)
        except BaseException:
            # The last to close a file writes its log into it; but what is refused stays as it is.
            log = Path(connection.filename_wal)
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, log.exists() and log.stat().st_size > 0)
            connection.close()
            raise
    return connection


def _lock_waiter(patience_s: float) -> Callable[[int], bool]:
    began = 0.0

    def wait(attempt: int) -> bool:
        nonlocal began
        if attempt == 0:
            began = time.monotonic()
        time.sleep(BUSY_PAUSE_S)
        return time.monotonic() - began < patience_s

    return wait


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into StoreError, or into QueueUnavailable for a locked file."""
    try:
        yield
    except (apsw.BusyError, apsw.LockedError) as error:
        raise QueueUnavailable(f"{path}: another process kept the file locked for {BUSY_TIMEOUT_S:.0f} s") from error
    except apsw.FullError as error:
        raise StoreError(f"{path}: no space is left on the disk: make room and start again") from error
    except (apsw.ReadOnlyError, apsw.PermissionsError, apsw.CantOpenError) as error:
        raise StoreError(f"{path}: cannot be opened for writing: check the file and its directory") from error
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise StoreError(
            f"{path}: is damaged or no SQLite file: it was left as it is; restore a copy, or move it away"
        ) from error
    except apsw.Error as error:
        raise StoreError(f"{path}: {error}") from error


@contextmanager
def transaction(connection: apsw.Connection) -> Iterator[None]:
    """A write transaction. IMMEDIATE: a read that turns into a write fails at once, whatever the busy timeout."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


class Log:
    """The write-ahead log of a connection. commits_sync: if not, a commit returns before it is synced.

    Nobody has to wait for the disk with the file locked then, and one sync makes all durable that was committed before
    it, by whatever process. What was not synced may be gone after a power cut, in the order of the commits, as if it
    had never been; a crash of the process alone loses nothing.
    """

    def __init__(self, connection: apsw.Connection, path: Path, *, commits_sync: bool = False) -> None:
        self._path = path
        self._pages = 0
        self._size = 0
        if not commits_sync:
            connection.pragma("synchronous", "NORMAL")  # checkpoints still sync: the file itself cannot be damaged
        connection.set_wal_hook(self._shorten)
        connection.execute("SELECT count(*) FROM sqlite_schema").get  # noqa: B018 the first look makes the log
        self.name = connection.filename_wal  # SQLite never locks it, so it may be opened and closed; not so the file
        self._file = os.open(self.name, os.O_RDWR)
        self._finish = weakref.finalize(self, os.close, self._file)
        self._finish.atexit = False

    def close(self) -> None:
        self._finish()
        self._file = -1  # the number may soon be another file's

    def sync(self) -> None:
        """Return once all that was committed to the file survives a power cut; raise SyncFailed where it may not."""
        try:
            SYNC(self._file)
        except OSError as error:
            what = f"the disk failed ({error.strerror}): what was just written may be lost in a power cut"
            raise SyncFailed(f"{self._path}: {what}") from error

    def lengthen(self) -> None:
        """Inside a write transaction: let the log grow by many pages at once: each time its sync takes twice as long.

        Nobody else writes to it now, and SQLite takes zeros for its end.
        """
        if self._pages >= SHORT_LOG and (self._pages + SHORT_LOG) * FRAME_BYTES > self._size:
            with suppress(OSError):  # SQLite will say what is wrong
                self._size = os.fstat(self._file).st_size
                if (self._pages + SHORT_LOG) * FRAME_BYTES > self._size:
                    self._size += os.pwrite(self._file, ZEROS, self._size)

    def _shorten(self, connection: apsw.Connection, database: str, pages: int) -> int:
        """After a commit: move a long log into the file, so that it starts anew.

        SQLite itself does the first half, and lets others write on. Where they always do, the log only grows, and to
        sync one that grows takes twice as long as to sync one that is written again. So what they wrote meanwhile is
        moved too, while nobody writes.
        """
        self._pages = pages
        if pages >= LONG_LOG:
            connection.set_busy_handler(_lock_waiter(LOG_PATIENCE_S))
            with suppress(apsw.Error):  # the commit itself is done; the next one tries again
                for mode in (apsw.SQLITE_CHECKPOINT_PASSIVE, apsw.SQLITE_CHECKPOINT_RESTART):
                    connection.wal_checkpoint(database, mode)
            connection.set_busy_handler(_lock_waiter(BUSY_TIMEOUT_S))
        return apsw.SQLITE_OK


def _create_private(path: Path) -> None:
    """Make an empty file that only its owner reads; anything there already but a regular file is refused."""
    try:
        str(path).encode()
        if _has_log(path) and not path.exists():  # SQLite would throw the log away
            raise StoreError(f"{path}: is missing beside its log: put it back, or move the log ({path}-wal) away too")
        # Closing a descriptor of a file that SQLite has open drops its locks: only a new file is opened here.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except UnicodeEncodeError as error:
        raise StoreError(f"{str(path)!a}: SQLite takes only file names in UTF-8") from error
    except FileExistsError:
        _refuse_irregular(path)
    except OSError as error:
        raise StoreError(f"{path}: the file cannot be made: {error.strerror}") from error


def _refuse_irregular(path: Path) -> None:
    try:
        has_log = _has_log(path)  # before the look at the file: it may just be being made
        found = path.stat()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"{path}: is no regular file: name a file")
    if found.st_size == 0 and has_log:  # SQLite would throw the log away
        raise StoreError(f"{path}: is damaged, all but its log is missing: restore a copy, or move both away")
    if found.st_size == 1:  # SQLite would take it for an empty file
        raise StoreError(f"{path}: is no SQLite file: it was left as it is; name another file")


def _has_log(path: Path) -> bool:
    try:
        return Path(f"{path.resolve()}-wal").stat().st_size > 0
    except FileNotFoundError:
        return False


def _refuse_foreign(connection: apsw.Connection, path: Path, application_id: int, version: int) -> None:
    if connection.readonly("main"):
        raise StoreError(f"{path}: is not writable: check the file's permissions")
    with connection:  # one look: another process may be making the same file
        found_id, found_version = connection.pragma("application_id"), connection.pragma("user_version")
        is_new = connection.execute("SELECT count(*) FROM sqlite_schema").get == 0
        is_cut = not _holds_whole_pages(connection)
    if not is_new and found_id != application_id:
        raise StoreError(f"{path}: belongs to another program: name another file")
    if found_version > version:
        raise StoreError(f"{path}: was made by a newer version of this program ({found_version}): upgrade")
    if is_cut:
        raise StoreError(
            f"{path}: is damaged, its end is missing: it was left as it is; restore a copy, or move it away"
        )


def _holds_whole_pages(connection: apsw.Connection) -> bool:
    """Whether the file ends with a page, or may do without: a log may hold what it has not."""
    log = Path(connection.filename_wal)
    if log.exists() and log.stat().st_size:
        return True
    return bool(Path(connection.filename).stat().st_size % connection.pragma("page_size") == 0)


def _make_durable(connection: apsw.Connection, path: Path) -> None:
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            mode = connection.pragma("journal_mode", "wal")
            break
        except apsw.BusyError:  # SQLite does not wait here, and two processes may open a new file at once
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.pragma("synchronous", "FULL")
    if (mode, connection.pragma("synchronous")) != ("wal", SYNCHRONOUS_FULL):
        raise StoreError(f"{path}: commits cannot be made durable there: name a file on a local disk")


def _migrate(connection: apsw.Connection, application_id: int, version: int, schema: str, upgrade: str) -> None:
    if connection.pragma("user_version") == version:
        return
    with transaction(connection):
        found = connection.pragma("user_version")
        if found != version:
            connection.execute(upgrade if found else schema)
            connection.pragma("application_id", application_id)
            connection.pragma("user_version", version)
