"""Opening a local file: durable, private, and never at the cost of a file that is not ours."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import apsw
import pytest
from support import HERE

from claim_queues import ConfigError, QueueUnavailable, StoreError, store

APPLICATION_ID = 77
SCHEMA = "CREATE TABLE things (name TEXT) STRICT;"

OPENS = f"""
import sys
import threading
from pathlib import Path
from claim_queues import StoreError
from claim_queues.store import open_store
print("ready", flush=True)
sys.stdin.readline()
try:
    for path in sys.argv[1:]:
        connection = open_store(Path(path), application_id={APPLICATION_ID}, version=1, schema={SCHEMA!r})
        connection.execute("INSERT INTO things VALUES ('by a process')")
except StoreError as error:
    sys.exit(f"StoreError: {{error}}")
"""
AS_ROOT_WITHOUT_ITS_POWERS = [
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
]


def open_store(path, version=1):
    return closing(store.open_store(path, application_id=APPLICATION_ID, version=version, schema=SCHEMA))


def opening_process(*paths):
    """A process, without root's power over permissions, that opens the files once it reads a line."""
    before = AS_ROOT_WITHOUT_ITS_POWERS if os.geteuid() == 0 else []
    return subprocess.Popen(
        [*before, sys.executable, "-c", OPENS, *map(str, paths)],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite3"


def names(path):
    with open_store(path) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM things ORDER BY name")]


def interrupt():
    raise KeyboardInterrupt


def fingerprints(directory):
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in directory.iterdir() if file.is_file()}


def test_every_commit_is_synced_to_a_write_ahead_log(path):
    with open_store(path) as connection:
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("synchronous") == store.SYNCHRONOUS_FULL


def test_the_settings_hold_for_a_file_that_is_opened_again(path):
    with open_store(path) as first, open_store(path) as second:
        assert first.pragma("synchronous") == second.pragma("synchronous") == store.SYNCHRONOUS_FULL
        assert second.pragma("journal_mode") == "wal"


def test_a_place_where_commits_cannot_be_made_durable_is_refused(path):
    usual = apsw.vfs_names()[0]
    apsw.set_default_vfs("unix-dotfile")  # has no shared memory, as some network file systems
    try:
        with pytest.raises(StoreError, match="local disk"):
            open_store(path)
    finally:
        apsw.set_default_vfs(usual)


def test_an_sqlite_that_damages_shared_files_is_refused_before_it_touches_one(path, monkeypatch):
    monkeypatch.setattr(apsw, "SQLITE_VERSION_NUMBER", 3_051_002)

    with pytest.raises(StoreError, match="upgrade apsw"):
        open_store(path)
    assert not path.exists()


def test_a_new_file_is_marked_as_ours(path):
    with open_store(path) as connection:
        assert connection.pragma("application_id") == APPLICATION_ID
        assert connection.pragma("user_version") == 1


def test_only_its_owner_can_read_the_file_and_what_lies_beside_it(path):
    with open_store(path) as connection:
        connection.execute("INSERT INTO things VALUES ('secret')")

        files = list(path.parent.iterdir())
        assert {file.name for file in files} == {path.name, f"{path.name}-wal", f"{path.name}-shm"}
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_what_was_stored_is_there_when_the_file_is_opened_again(path):
    with open_store(path) as connection:
        connection.execute("INSERT INTO things VALUES ('kept')")

    assert names(path) == ["kept"]


def test_an_empty_file_becomes_a_store(path):
    path.touch()

    assert names(path) == []


def test_a_link_to_a_store_is_followed(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path.name)
    with open_store(path) as connection:
        connection.execute("INSERT INTO things VALUES ('behind the link')")

        assert names(link) == ["behind the link"]


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("nothing")

    with pytest.raises(StoreError, match="No such file"):
        open_store(tmp_path / "link")
    assert not (tmp_path / "nothing").exists()


def test_a_name_that_sqlite_would_take_for_something_else_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with open_store(Path(":memory:")):
        assert (tmp_path / ":memory:").is_file()


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no regular file"):
        open_store(tmp_path)


@pytest.mark.timeout(10)
def test_a_fifo_is_refused_without_waiting_for_its_other_end(path):
    os.mkfifo(path)

    with pytest.raises(StoreError, match="no regular file"):
        open_store(path)


@pytest.mark.parametrize("name", ["missing/store.sqlite3", "file/store.sqlite3", "x" * 300])
def test_a_place_where_no_file_can_be_made_is_refused(tmp_path, name):
    (tmp_path / "file").touch()

    with pytest.raises(StoreError, match="cannot be made"):
        open_store(tmp_path / name)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(StoreError, match="UTF-8"):
        open_store(tmp_path / os.fsdecode(b"\xff"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"x", b"\0", b"text", b"x" * 100, b"x" * 5_000, bytes(4_096)], ids=repr)
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path, content):
    path.write_bytes(content)

    with pytest.raises(StoreError, match="no SQLite file"):
        open_store(path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_database_of_another_program_is_refused_and_left_as_it_is(path):
    with closing(apsw.Connection(str(path))) as theirs:
        theirs.execute("CREATE TABLE things (x)")
    before = fingerprints(path.parent)

    with pytest.raises(StoreError, match="another program"):
        open_store(path)
    assert fingerprints(path.parent) == before


def test_what_another_program_left_in_its_log_stays_there(path, tmp_path):
    with closing(apsw.Connection(str(tmp_path / "live"))) as theirs:
        theirs.pragma("journal_mode", "wal")
        theirs.execute("CREATE TABLE things (x)")
        shutil.copy(tmp_path / "live", path)
        shutil.copy(tmp_path / "live-wal", f"{path}-wal")
    before = fingerprints(path.parent)

    with pytest.raises(StoreError, match="another program"):
        open_store(path)
    assert fingerprints(path.parent).items() >= before.items()


def test_a_file_from_a_newer_version_is_refused_and_left_as_it_is(path):
    with open_store(path, version=2):
        pass
    before = fingerprints(path.parent)

    with pytest.raises(StoreError, match=r"newer version of this program \(2\)"):
        open_store(path, version=1)
    assert fingerprints(path.parent) == before


def test_a_damaged_file_is_refused_and_left_as_it_is(path):
    with open_store(path) as connection:
        connection.execute("INSERT INTO things VALUES ('kept')")
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * (path.stat().st_size - 100))
    before = fingerprints(path.parent)

    with pytest.raises(StoreError, match="is damaged"):
        open_store(path)
    assert fingerprints(path.parent) == before


@pytest.mark.parametrize("missing", [1, 1_000, 4_095])
def test_a_file_whose_last_page_is_cut_is_refused_and_left_as_it_is(path, missing):
    with open_store(path) as connection:
        connection.execute("INSERT INTO things VALUES ('kept')")
    os.truncate(path, path.stat().st_size - missing)
    before = fingerprints(path.parent)

    with pytest.raises(StoreError, match="its end is missing"):
        open_store(path)
    assert fingerprints(path.parent) == before


def test_an_empty_file_that_has_a_log_is_refused_and_left_as_it_is(path, tmp_path):
    with open_store(tmp_path / "live"):
        shutil.copy(tmp_path / "live-wal", f"{path}-wal")
    path.touch()
    before = fingerprints(path.parent)

    with pytest.raises(StoreError, match="all but its log"):
        open_store(path)
    assert fingerprints(path.parent) == before


def test_a_log_whose_file_was_moved_away_is_left_as_it_is_until_the_file_is_back(path, tmp_path):
    with open_store(path) as live:
        live.execute("INSERT INTO things VALUES ('in the log')")
        shutil.copy(path, tmp_path / "moved")
        shutil.copy(f"{path}-wal", tmp_path / "log")
    path.unlink()
    shutil.move(tmp_path / "log", f"{path}-wal")
    before = fingerprints(path.parent)

    with pytest.raises(StoreError, match="missing beside its log"):
        open_store(path)
    assert fingerprints(path.parent) == before

    shutil.move(tmp_path / "moved", path)
    with open_store(path):
        pass
    assert names(path) == ["in the log"]


def test_a_last_page_that_the_log_holds_whole_may_be_cut(path, tmp_path):
    with open_store(tmp_path / "live") as live:
        live.execute("INSERT INTO things VALUES ('kept')")
        live.pragma("wal_checkpoint(truncate)")
        live.execute("INSERT INTO things VALUES ('in the log')")
        shutil.copy(tmp_path / "live", path)
        shutil.copy(tmp_path / "live-wal", f"{path}-wal")
    os.truncate(path, path.stat().st_size - 1_000)

    with open_store(path):
        pass
    assert names(path) == ["in the log", "kept"]


@pytest.mark.parametrize("part", ["the file", "its directory"])
def test_what_may_not_be_written_is_refused_and_left_as_it_is(path, part):
    with open_store(path):
        pass
    before = fingerprints(path.parent)
    (path if part == "the file" else path.parent).chmod(0o500)

    process = opening_process(path)
    _, err = process.communicate("go\n", timeout=30)
    path.parent.chmod(0o700)

    assert process.returncode == 1
    assert err.startswith(f"StoreError: {path}: ")
    assert "writ" in err
    assert fingerprints(path.parent) == before


def test_processes_that_open_a_new_file_at_once_share_one_store(tmp_path):
    paths = [tmp_path / f"{number}.sqlite3" for number in range(20)]
    processes = [opening_process(*paths) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()

    assert [process.communicate(timeout=30)[1] for process in processes] == [""] * 4
    assert [names(path) for path in paths] == [["by a process"] * 4] * len(paths)


def test_a_file_that_another_process_makes_while_it_is_looked_at_is_ours(path, monkeypatch):
    with closing(apsw.Connection(str(path))) as first:
        first.pragma("journal_mode", "wal")
    finished = []

    def finish_before_the_tables_are_counted(cursor, sql, bindings):
        if "sqlite_schema" in sql and not finished:
            finished.append(sql)
            names(path)
        return True

    def look_on(connection):
        connection.exec_trace = finish_before_the_tables_are_counted

    monkeypatch.setattr(apsw, "connection_hooks", [*apsw.connection_hooks, look_on])

    assert names(path) == []
    assert finished


@pytest.mark.parametrize("use", ["BEGIN; SELECT * FROM sqlite_schema", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_new_file_that_another_process_uses_for_a_moment_is_waited_for(path, use):
    with closing(apsw.Connection(str(path))) as other, ThreadPoolExecutor(1) as pool:
        other.execute(use)
        opening = pool.submit(names, path)
        assert not wait([opening], timeout=0.2).done

        other.execute("COMMIT")

        assert opening.result(30) == []


@pytest.mark.parametrize("use", ["BEGIN; SELECT * FROM sqlite_schema", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_new_file_that_another_process_does_not_leave_is_unavailable(path, monkeypatch, use):
    monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.1)
    with closing(apsw.Connection(str(path))) as other:
        other.execute(use)

        with pytest.raises(QueueUnavailable, match="locked"):
            open_store(path)


def test_a_statement_is_planned_once_whatever_its_values(path):
    with open_store(path) as connection:
        assert connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, -1) == 1


def test_a_write_transaction_takes_its_place_before_it_reads(path):
    with open_store(path) as connection:
        statements = []
        connection.exec_trace = lambda cursor, sql, bindings: statements.append(sql) or True

        with store.transaction(connection):
            connection.execute("INSERT INTO things VALUES ('new')")

        assert (statements[0], statements[-1]) == ("BEGIN IMMEDIATE", "COMMIT")


def test_an_error_in_a_transaction_undoes_all_of_it(path):
    with open_store(path) as connection:
        connection.create_scalar_function("interrupt", interrupt)

        with pytest.raises(KeyboardInterrupt), store.transaction(connection):
            connection.execute("INSERT INTO things VALUES ('undone'); INSERT INTO things SELECT interrupt()")

        assert not connection.in_transaction
    assert names(path) == []


def test_a_full_disk_undoes_the_transaction_and_is_named(path):
    with open_store(path) as connection:
        connection.pragma("max_page_count", connection.pragma("page_count"))

        with (
            pytest.raises(StoreError, match="no space is left"),
            store.store_errors(path),
            store.transaction(connection),
        ):
            connection.execute("INSERT INTO things VALUES (hex(randomblob(100000)))")

        assert not connection.in_transaction
    assert names(path) == []


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (apsw.BusyError(), QueueUnavailable),
        (apsw.LockedError(), QueueUnavailable),
        (apsw.FullError(), StoreError),
        (apsw.ReadOnlyError(), StoreError),
        (apsw.PermissionsError(), StoreError),
        (apsw.CantOpenError(), StoreError),
        (apsw.CorruptError(), StoreError),
        (apsw.NotADBError(), StoreError),
        (apsw.IOError(), StoreError),
        (apsw.SQLError(), StoreError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_every_error_of_sqlite_names_the_file_and_keeps_its_cause(path, error, meaning):
    with pytest.raises(meaning, match=str(path)) as caught, store.store_errors(path):
        raise error

    assert caught.value.__cause__ is error


def test_a_user_without_a_home_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without an entry
    with pytest.raises(ConfigError, match="set HOME"):
        store.state_path("queues.sqlite3")


def test_the_state_file_is_the_same_from_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = store.state_path("queues.sqlite3")
    monkeypatch.chdir("/")

    assert store.state_path("queues.sqlite3") == first
    assert first.is_absolute()


def test_only_its_owner_enters_the_state_directory():
    assert store.state_path("queues.sqlite3").parent.stat().st_mode & 0o777 == 0o700


def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))

    with pytest.raises(StoreError, match="the directory cannot be made"):
        store.state_path("queues.sqlite3")


@contextmanager
def long_log(path: Path, pages: int) -> Iterator[apsw.Connection]:
    """A connection that syncs later, after so many pages were written one by one."""
    with open_store(path) as connection, closing(store.Log(connection, path)):
        write(connection, pages)
        yield connection


def write(connection: apsw.Connection, pages: int) -> None:
    for _ in range(pages):
        connection.execute("INSERT INTO things VALUES (hex(randomblob(1500)))")


def log_pages(connection: apsw.Connection) -> float:
    return Path(connection.filename_wal).stat().st_size / 4120


def test_a_long_log_is_begun_anew(path):
    with long_log(path, 5 * store.LONG_LOG) as connection:
        assert store.LONG_LOG <= log_pages(connection) < store.LONG_LOG + 20


def test_a_long_log_is_begun_anew_though_others_write_all_the_time(path):
    writing = threading.Event()

    def write_on() -> None:
        with open_store(path) as other, closing(store.Log(other, path)):
            while not writing.is_set():
                write(other, 1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write_on)
        with long_log(path, 5 * store.LONG_LOG) as connection:
            size = log_pages(connection)
        writing.set()
    assert size < 4 * store.LONG_LOG


def test_who_reads_is_not_waited_for_and_the_log_begins_anew_after(path):
    with long_log(path, 1) as connection, open_store(path) as reader:
        reader.execute("BEGIN; SELECT * FROM things")
        write(connection, 2 * store.LONG_LOG)
        assert log_pages(connection) > 2 * store.LONG_LOG
        grown = log_pages(connection)
        reader.execute("COMMIT")

        write(connection, store.LONG_LOG // 2)
        assert log_pages(connection) < grown + 20


def test_after_a_look_at_a_long_log_a_locked_file_is_waited_for_again(path):
    with long_log(path, store.LONG_LOG + 1) as connection, open_store(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(write, connection, 1)
            wait([written], timeout=0.1)
            assert not written.done()
            other.execute("COMMIT")
            written.result(5)


def write_with_log(connection: apsw.Connection, log: store.Log, pages: int) -> list[int]:
    """The sizes of the log after each page."""
    sizes = []
    for _ in range(pages):
        with store.transaction(connection):
            log.lengthen()
            write(connection, 1)
        sizes.append(Path(log.name).stat().st_size)
    return sizes


def test_a_log_grows_by_many_pages_at_once(path, tmp_path):
    with open_store(path) as connection, closing(store.Log(connection, path)) as log:
        sizes = write_with_log(connection, log, 300)
    with long_log(tmp_path / "plain.sqlite3", 300) as connection:
        needed = log_pages(connection)

    grown = sorted(set(sizes[100:]))
    assert len(grown) > 2
    assert {after - before for before, after in pairwise(grown)} == {store.GROWTH * store.FRAME_BYTES}
    assert needed <= max(sizes) / store.FRAME_BYTES < needed + store.GROWTH + store.SHORT_LOG


def test_a_short_log_is_not_lengthened(path):
    with open_store(path) as connection, closing(store.Log(connection, path)) as log:
        sizes = write_with_log(connection, log, 3)

    assert max(sizes) < store.SHORT_LOG * store.FRAME_BYTES


def test_zeros_ahead_of_the_log_end_it_for_who_opens_the_file_after_a_crash(path, tmp_path):
    copy = tmp_path / "copy.sqlite3"
    with open_store(path) as connection, closing(store.Log(connection, path)) as log:
        write_with_log(connection, log, 100)
        assert Path(log.name).read_bytes().endswith(bytes(10 * store.FRAME_BYTES))
        shutil.copy(path, copy)
        shutil.copy(log.name, f"{copy}-wal")

    with open_store(copy) as connection:
        assert connection.execute("SELECT count(*) FROM things").get == 100
        assert connection.pragma("integrity_check") == "ok"


def test_two_that_lengthen_one_log_write_over_nothing(path):
    def write_much() -> None:
        with open_store(path) as connection, closing(store.Log(connection, path)) as log:
            write_with_log(connection, log, 400)

    with open_store(path), ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write_much) for _ in range(2)]:
            done.result()

    with open_store(path) as connection:
        assert connection.execute("SELECT count(*) FROM things").get == 800
        assert connection.pragma("integrity_check") == "ok"


def test_a_disk_that_takes_no_more_zeros_is_left_to_the_commit(path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with open_store(path) as connection, closing(store.Log(connection, path)) as log:
        write_with_log(connection, log, 20)
        monkeypatch.setattr(store.os, "pwrite", refuse)
        write_with_log(connection, log, 200)
        assert connection.execute("SELECT count(*) FROM things").get == 220
