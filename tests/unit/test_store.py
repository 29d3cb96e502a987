"""Opening a local file: durable, private, and never at the cost of a file that is not ours."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import apsw
import pytest
from doubles.disk import disk_double
from support import HERE, is_waiting

from claim_queues import QueueUnavailable, StoreError
from claim_queues.sqlite import Store

APPLICATION_ID = 77
SCHEMA = "CREATE TABLE things (name TEXT) STRICT"
OPENS = f"""
import sys
from pathlib import Path
from claim_queues import StoreError
from claim_queues.sqlite import Store
print("ready", flush=True)
sys.stdin.readline()
try:
    for path in sys.argv[1:]:
        with Store(Path(path), {APPLICATION_ID}, {SCHEMA!r}).writing() as file:
            file.execute("INSERT INTO things VALUES ('by a process')")
except StoreError as error:
    sys.exit(f"StoreError: {{error}}")
"""
ROOTS_POWERS = "-dac_override,-dac_read_search"
WITHOUT_THEM = ["setpriv", f"--bounding-set={ROOTS_POWERS}", f"--inh-caps={ROOTS_POWERS}"]


def opened(path):
    return closing(Store(path, APPLICATION_ID, SCHEMA))


def add(store, name):
    with store.writing() as file:
        file.execute("INSERT INTO things VALUES (?)", (name,))


def names(path):
    with opened(path) as store, store.reading() as file:
        return [name for (name,) in file.execute("SELECT name FROM things ORDER BY name")]


def opening_process(*paths):
    """A process, without root's power over permissions, that opens the files once it reads a line."""
    before = WITHOUT_THEM if os.geteuid() == 0 else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*before, sys.executable, "-c", OPENS, *map(str, paths)], cwd=HERE, **pipes)


def fingerprints(directory):
    """Of all files but the shared memory, which holds nothing of its own."""
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in directory.glob("*[!m]") if file.is_file()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite3"


@pytest.fixture
def refused(path):
    """Check that the file is refused for a reason that matches, and that it and its log stay as they are."""

    def check(reason):
        before = fingerprints(path.parent)
        with pytest.raises(StoreError, match=reason) as caught:
            Store(path, APPLICATION_ID, SCHEMA)
        assert str(path) in str(caught.value)
        assert fingerprints(path.parent) == before

    return check


def test_only_its_owner_can_read_the_file_and_its_log_which_goes_into_the_file_at_the_end(path):
    with opened(path) as store:
        add(store, "secret")

        assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {
            path.name: 0o600,
            f"{path.name}-wal": 0o600,
            f"{path.name}-shm": 0o600,
        }
    assert list(path.parent.iterdir()) == [path]
    assert names(path) == ["secret"]


def test_a_sync_reaches_the_disk_itself_where_the_system_must_be_asked_for_that(path):
    with opened(path) as store, store.reading() as file:
        assert (file.pragma("fullfsync"), file.pragma("checkpoint_fullfsync")) == (1, 1)


def test_a_place_where_no_log_can_be_is_refused(path):
    usual = apsw.vfs_names()[0]
    apsw.set_default_vfs("unix-dotfile")  # has no shared memory, as some network file systems
    try:
        with pytest.raises(StoreError, match="local disk"):
            opened(path)
    finally:
        apsw.set_default_vfs(usual)


def test_a_link_to_a_store_is_followed_and_one_to_nothing_is_refused(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path.name)
    with pytest.raises(StoreError, match="No such file"):
        opened(link)
    assert not path.exists()

    with opened(path) as store:
        add(store, "behind the link")
        assert names(link) == ["behind the link"]


def test_a_name_that_sqlite_would_take_for_something_else_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with opened(Path(":memory:")):
        assert (tmp_path / ":memory:").is_file()


def test_what_is_not_a_regular_file_is_refused_without_waiting_for_it(path, tmp_path):
    os.mkfifo(path)

    for other in (path, tmp_path):
        with pytest.raises(StoreError, match="no SQLite file"):
            opened(other)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/it", "make its directory"),
        ("x" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
        (os.fsdecode(b"\xff"), "surrogates"),
    ],
)
def test_a_place_where_no_file_can_be_made_is_named_with_the_reason(tmp_path, name, reason):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match=f"{tmp_path}/{name}: .*{reason}"):
        opened(tmp_path / name)


@pytest.mark.parametrize("content", [b"x", b"x" * 4_096, bytes(4_096)], ids=len)
def test_a_file_that_is_no_database_is_refused(path, refused, content):
    path.write_bytes(content)

    refused("no SQLite file|not a database")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
def test_a_database_of_another_program_is_refused(path, refused, journal_mode):
    with closing(apsw.Connection(str(path))) as theirs:
        theirs.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        theirs.pragma("journal_mode", journal_mode)
        theirs.execute("CREATE TABLE things (x)")

    refused("another program")


def test_a_file_from_a_newer_version_is_refused(path, refused):
    with opened(path) as store, store.reading() as file:
        file.execute("PRAGMA user_version = 2")

    refused("newer version")


def test_a_damaged_file_is_refused(path, refused):
    with opened(path) as store:
        add(store, "kept")
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))

    refused("malformed")
    path.write_bytes(content[:-1_000])
    refused("is damaged")


@pytest.mark.parametrize(("is_there", "log"), [(True, "-wal"), (False, "-wal"), (False, "-journal")])
def test_a_missing_or_empty_file_that_has_a_log_is_refused(path, refused, is_there, log):
    if is_there:
        path.touch()
    Path(f"{path}{log}").write_bytes(b"what was committed last")

    refused("is damaged" if is_there else "is missing, but its log is there")


def test_a_last_page_that_the_log_holds_may_be_cut(path):
    with opened(path) as store:
        add(store, "kept")
        with store.reading() as file:
            file.wal_checkpoint()
            file.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        add(store, "in the log")
    os.truncate(path, path.stat().st_size - 1_000)

    assert names(path) == ["in the log", "kept"]


@pytest.mark.parametrize("part", ["the file", "its directory"])
def test_what_may_not_be_written_is_refused(path, part):
    with opened(path):
        pass
    before = path.read_bytes()
    (path if part == "the file" else path.parent).chmod(0o500)

    _, err = (process := opening_process(path)).communicate("go\n", timeout=30)
    path.parent.chmod(0o700)

    assert process.returncode == 1
    assert err.startswith(f"StoreError: {path}: ")
    assert "check its permissions" in err
    assert path.read_bytes() == before


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_is_removed_or_replaced_while_it_is_open_takes_no_more_writes(path, is_replaced):
    with opened(path) as store:
        store.check()
        path.unlink()
        if is_replaced:
            path.touch()

        with pytest.raises(StoreError, match="removed or replaced"):
            store.check()
        with pytest.raises(StoreError, match="removed or replaced"):
            add(store, "into a file without a name")


def test_processes_that_open_a_new_file_at_once_share_one_store(tmp_path):
    paths = [tmp_path / f"{number}.sqlite3" for number in range(20)]
    processes = [opening_process(*paths) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()

    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 4
    assert [names(path) for path in paths] == [["by a process"] * 4] * len(paths)


@pytest.mark.parametrize("use", ["BEGIN; SELECT * FROM sqlite_schema", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_new_file_that_another_process_uses_for_a_moment_is_waited_for(path, use):
    with closing(apsw.Connection(str(path))) as other, ThreadPoolExecutor(1) as pool:
        other.execute(use)
        opening = pool.submit(names, path)
        assert is_waiting(opening)

        other.execute("COMMIT")

        assert opening.result(30) == []


@pytest.mark.slow
def test_a_new_file_that_another_process_does_not_leave_is_unavailable(path):
    with closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN; SELECT * FROM sqlite_schema")

        with pytest.raises(QueueUnavailable, match="locked"):
            opened(path)


@pytest.mark.parametrize("failure", [apsw.FullError, apsw.IOError])
def test_a_disk_that_is_full_or_fails_undoes_the_transaction_and_nothing_else(path, failure):
    with disk_double() as disk, opened(path) as store:
        add(store, "before")
        disk.failure = failure
        with pytest.raises(StoreError, match="it was left as it is: make room"):
            add(store, "lost")

        disk.failure = None
        add(store, "after")
    assert names(path) == ["after", "before"]


def test_two_writers_that_never_rest_have_a_log_of_bounded_size(path):
    def write(store):
        for _ in range(3_000):
            with store.writing(synced=False) as file:
                file.execute("INSERT INTO things VALUES (?)", ("x" * 4_000,))

    with opened(path) as first, opened(path) as second, ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, [first, second])) == [None, None]
        log_bytes = Path(f"{path}-wal").stat().st_size

    assert path.stat().st_size > 24_000_000
    assert log_bytes < 12_000_000


def test_a_file_that_is_in_use_can_be_copied_by_sqlites_own_backup(path, tmp_path):
    copy = tmp_path / "a copy"
    with opened(path) as store:
        add(store, "in the log")
        command = [sys.executable, "-m", "apsw", str(path), f".backup '{copy}'"]
        subprocess.run(command, check=True, capture_output=True)

    assert names(copy) == ["in the log"]
