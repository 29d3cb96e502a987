"""What the embedded queue promises beyond the contract: exact times, one transaction each, waiting without polling."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import pytest
from support import HERE

from claim_queues import ConfigError, Post, PostIncomplete, QueueUnavailable, Settlement, StoreError, sqlite, store
from claim_queues.sqlite import SqliteQueues

HOLD = {"ttl": 60, "grace": 60}
NEVER_S = 40.0
SOON_S = 10.0
"""Long before NEVER_S, and long enough for a busy machine."""

VERSION_1 = sqlite.SCHEMA.replace(",\n    checksum INTEGER", "")

POSTS_ON_DEMAND = """
import sys
from pathlib import Path
from claim_queues.sqlite import SqliteQueues
with SqliteQueues(Path(sys.argv[1])) as queues:
    print("ready", flush=True)
    for line in sys.stdin:
        queues.post("requests", [line.strip()])
"""
CLAIMS_ALL = """
import sys
from pathlib import Path
from claim_queues import Settlement
from claim_queues.sqlite import SqliteQueues
with SqliteQueues(Path(sys.argv[1])) as queues:
    print("ready", flush=True)
    sys.stdin.readline()
    while claim := queues.claim("requests", ttl=60, grace=60, limit=7):
        settled = queues.settle(claim, [Settlement(message) for message in claim.messages])
        assert len(settled.deleted) == len(claim.messages)
        for message in claim.messages:
            print(message.body, message.receive_count)
"""


class Clock:
    """Stands still until it is moved. Eighths of a second are exact as floats."""

    def __init__(self):
        self.now_s = 1_800_000_000.0

    def __call__(self):
        return self.now_s

    def advance(self, seconds):
        self.now_s += seconds


class NoInstances(sqlite.INotify):
    """What the kernel says when the user has no instances of inotify left."""

    def __init__(self, **options):
        raise OSError(24, "Too many open files")


class NoWatches(sqlite.INotify):
    """What the kernel says when the user has no watches left."""

    def add_watch(self, path, mask):
        raise OSError(28, "No space left on device")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "queues.sqlite3"


@pytest.fixture
def queues(path, clock):
    with SqliteQueues(path, clock=clock) as queues:
        yield queues


@pytest.fixture
def other(path, clock):
    with SqliteQueues(path, clock=clock) as queues:
        yield queues


@pytest.fixture
def background():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def only_the_kernel(monkeypatch):
    """A waiting consumer that looks again only when something wakes it."""
    monkeypatch.setattr(sqlite, "RECHECK_S", NEVER_S)


@contextmanager
def python(code, path):
    """A process of its own that runs the code on the file, and is ready."""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


@contextmanager
def direct(path):
    """The file as another program would write to it."""
    with closing(apsw.Connection(str(path))) as connection:
        connection.set_busy_timeout(5_000)
        yield connection


def bodies(claim):
    return [message.body for message in claim.messages] if claim else []


def is_waiting(looking):
    return not wait([looking], timeout=0.2).done


@contextmanager
def statements_of(queues):
    seen = []
    queues._connection.exec_trace = lambda cursor, sql, bindings: seen.append((" ".join(sql.split()), bindings)) or True
    yield seen
    queues._connection.exec_trace = None


class TestTimes:
    def test_a_claim_ends_when_its_ttl_has_passed_and_not_a_moment_before(self, queues, clock):
        queues.post("requests", ["held"])
        claim = queues.claim("requests", **HOLD, limit=1)

        clock.advance(59.875)
        assert queues.claim("requests", **HOLD, limit=1) is None
        queues.post("requests", ["free"])
        assert bodies(queues.claim("requests", **HOLD, limit=2)) == ["free"]
        clock.advance(0.125)
        assert queues.settle(claim, [Settlement(claim.messages[0])]).lost
        assert bodies(queues.claim("requests", **HOLD, limit=2)) == ["held"]

    def test_a_claim_can_settle_until_its_ttl_has_passed(self, queues, clock):
        queues.post("requests", ["held"])
        claim = queues.claim("requests", **HOLD, limit=1)

        clock.advance(59.875)

        assert queues.settle(claim, [Settlement(claim.messages[0])]).deleted

    def test_a_message_is_gone_when_its_ttl_has_passed_and_not_a_moment_before(self, queues, clock):
        queues.post("requests", ["short-lived"], ttl=60)

        clock.advance(59.875)
        assert queues.stats("requests").free == 1
        clock.advance(0.125)
        assert queues.stats("requests").total == 0
        assert queues.claim("requests", **HOLD, limit=1) is None

    def test_a_message_that_expires_with_its_claim_is_not_extended_and_never_free(self, queues, clock):
        queues.post("requests", ["short-lived"], ttl=60)
        assert queues.claim("requests", **HOLD, limit=1).messages[0].ttl == 60

        clock.advance(60)

        assert queues.claim("requests", **HOLD, limit=1) is None

    def test_a_delay_ends_to_the_millisecond(self, queues, clock):
        queues.post("requests", ["later"])
        queues.release(queues.claim("requests", **HOLD, limit=1), delay=0.25)

        clock.advance(0.125)
        assert queues.stats("requests").delayed == 1
        clock.advance(0.125)
        assert queues.stats("requests").free == 1

    def test_a_clock_set_back_makes_no_age_negative(self, queues, clock):
        queues.post("requests", ["from the future"])

        clock.advance(-100)

        assert queues.stats("requests").oldest_age == 0
        assert queues.claim("requests", **HOLD, limit=1).messages[0].age == 0

    def test_the_age_of_the_oldest_counts_the_delayed_and_the_lapsed(self, queues, clock):
        queues.post("requests", ["oldest"])
        clock.advance(10)
        queues.post("requests", ["young"])
        claim = queues.claim("requests", **HOLD, limit=1)
        clock.advance(60)
        assert queues.stats("requests").oldest_age == 70

        queues.release(queues.claim("requests", **HOLD, limit=1), delay=100)
        assert queues.stats("requests").oldest_age == 70
        assert bodies(claim) == ["oldest"]


class TestQueuesAndIds:
    def test_a_queue_is_there_before_its_first_use(self, queues):
        assert queues.exists("never-used")
        assert queues.claim("never-used", **HOLD, limit=1) is None
        assert queues.browse("never-used").messages == ()
        assert queues.stats("never-used").total == 0

    def test_an_id_is_never_given_twice(self, queues):
        (first,) = queues.post("requests", ["newest"])
        queues.delete("requests", [first])

        assert queues.post("requests", ["next"]) != [first]

    def test_ids_of_another_file_mean_nothing(self, tmp_path, queues):
        queues.post("requests", ["ours"])
        with SqliteQueues(tmp_path / "elsewhere.sqlite3") as elsewhere:
            ids = elsewhere.post("requests", ["theirs"])
            claim = elsewhere.claim("requests", **HOLD, limit=1)

        queues.delete("requests", ids)
        assert queues.settle(claim, [Settlement(claim.messages[0])]).lost == set(ids)
        assert bodies(queues.claim("requests", **HOLD, limit=1)) == ["ours"]

    def test_a_delayed_message_is_held_by_no_claim_and_can_be_deleted(self, queues):
        ids = queues.post("requests", ["delayed"])
        queues.release(queues.claim("requests", **HOLD, limit=1), delay=100)

        queues.delete("requests", ids)

        assert queues.stats("requests").total == 0

    @pytest.mark.parametrize("marker", ["x", "-1", "1.5", "9" * 30, "٣", " 1", "1\n"])
    def test_a_marker_that_was_never_given_is_refused(self, queues, marker):
        with pytest.raises(ConfigError, match="is no marker"):
            queues.browse("requests", after=marker)

    def test_the_address_is_the_same_from_every_directory(self, path, queues, monkeypatch):
        monkeypatch.chdir(path.parent)
        with SqliteQueues(Path(path.name)) as relative:
            assert relative.address == queues.address == f"sqlite:///{path}"

    def test_a_renewal_of_some_messages_lets_the_others_lapse(self, queues, clock):
        queues.post("requests", ["renewed", "lapsed"])
        claim = queues.claim("requests", **HOLD, limit=2)
        queues.renew(claim, ttl=120, messages=claim.messages[:1])

        clock.advance(60)

        assert bodies(queues.claim("requests", **HOLD, limit=2)) == ["lapsed"]

    def test_a_busy_consumer_takes_what_lapsed_at_its_old_place(self, queues, clock):
        queues.post("requests", ["lapsed", "busy", "next"])
        queues.claim("requests", **HOLD, limit=1)
        clock.advance(30)
        assert bodies(queues.claim("requests", **HOLD, limit=1)) == ["busy"]

        clock.advance(30)

        assert bodies(queues.claim("requests", **HOLD, limit=2)) == ["lapsed", "next"]

    def test_a_busy_consumer_finds_within_100_ms_what_lapsed(self, queues, clock):
        queues.post("requests", ["lapsed", "busy", "busier", "next"])
        queues.claim("requests", **HOLD, limit=1)
        clock.advance(59.9375)
        assert bodies(queues.claim("requests", **HOLD, limit=1)) == ["busy"]

        clock.advance(0.0625)
        assert bodies(queues.claim("requests", **HOLD, limit=1)) == ["busier"]
        clock.advance(0.0625)
        assert bodies(queues.claim("requests", **HOLD, limit=2)) == ["lapsed", "next"]

    def test_what_lapsed_is_claimed_at_once_when_nothing_else_is_free(self, queues, clock):
        queues.post("requests", ["lapsed", "busy"])
        queues.claim("requests", **HOLD, limit=1)
        clock.advance(59.9375)
        assert bodies(queues.claim("requests", **HOLD, limit=1)) == ["busy"]

        clock.advance(0.0625)
        assert bodies(queues.claim("requests", **HOLD, limit=1)) == ["lapsed"]

    @pytest.mark.parametrize("delay", [0, 0.0001])
    def test_a_busy_consumer_gets_what_was_released_at_its_old_place(self, queues, delay):
        queues.post("requests", ["one", "two", "three"])
        claim = queues.claim("requests", **HOLD, limit=1)
        queues.claim("requests", **HOLD, limit=1)

        queues.release(claim, delay=delay)

        assert bodies(queues.claim("requests", **HOLD, limit=2)) == ["one", "three"]

    def test_a_busy_consumer_removes_all_that_has_expired(self, path, queues, clock, monkeypatch):
        monkeypatch.setattr(sqlite, "PURGE_BATCH", 2)
        queues.post("requests", ["expires"] * 5, ttl=60)
        queues.post("requests", ["one", "two", "three"])
        clock.advance(60)

        for body in "one", "two", "three":
            assert bodies(queues.claim("requests", **HOLD, limit=1)) == [body]

        with direct(path) as connection:
            assert connection.execute("SELECT count(*) FROM messages").get == 3

    def test_a_queue_whose_first_post_failed_shares_nothing_with_the_next(self, queues):
        queues.post("requests", ["one"])
        file = queues._connection
        file.pragma("max_page_count", file.pragma("page_count"))
        with pytest.raises(StoreError):
            queues.post("alpha", ["x" * 100_000] * 2)
        file.pragma("max_page_count", 2**30)
        queues.create("beta")

        queues.post("alpha", ["for alpha"])

        assert queues.claim("beta", **HOLD, limit=1) is None
        assert bodies(queues.claim("alpha", **HOLD, limit=1)) == ["for alpha"]

    def test_a_settlement_of_another_files_message_is_lost_and_posts_nothing(self, queues, tmp_path):
        with SqliteQueues(tmp_path / "other.sqlite3") as foreign:
            for each in (queues, foreign):
                each.post("requests", ["one"])
            own, others = (each.claim("requests", **HOLD, limit=1) for each in (queues, foreign))

            settled = queues.settle(
                own, [Settlement(found.messages[0], (Post("responses", "made"),)) for found in (own, others)]
            )

        assert (settled.deleted, settled.lost) == ({own.messages[0].id}, {others.messages[0].id})
        assert queues.stats("responses").total == 1

    def test_what_lapsed_is_not_passed_over_by_who_settles_and_claims_by_turns(self, queues, clock):
        queues.post("requests", ["lapsed"])
        queues.claim("requests", ttl=60, grace=60, limit=1)
        queues.post("requests", ["first"])
        claim = queues.claim("requests", **HOLD, limit=1)
        found = []
        for number in range(20):
            clock.now_s += 5
            queues.post("requests", [number, number])
            _, claim = queues.settle_and_claim(claim, [Settlement(claim.messages[0])], **HOLD, limit=1)
            found += bodies(claim)

        assert "lapsed" in found

    def test_a_message_settled_twice_at_once_is_deleted_and_not_lost(self, queues):
        queues.post("requests", ["one"])
        claim = queues.claim("requests", **HOLD, limit=1)

        settled = queues.settle(claim, [Settlement(claim.messages[0])] * 2)

        assert (settled.deleted, settled.lost) == ({claim.messages[0].id}, set())

    @pytest.mark.parametrize(("passes", "looks"), [(0, 1), (0.125, 3), (-100, 3)])
    def test_a_busy_consumer_does_without_most_looks(self, queues, clock, passes, looks):
        queues.post("requests", ["one", "two", "three"])

        with statements_of(queues) as seen:
            for body in "one", "two", "three":
                assert bodies(queues.claim("requests", **HOLD, limit=1)) == [body]
                clock.advance(passes)

        assert len([sql for sql, _ in seen if "EXISTS" in sql]) == looks


class TestBodies:
    @pytest.mark.parametrize(
        ("stored", "body"),
        [
            (b"plain text", "plain text"),
            (b"", ""),
            (b"{\xff}", "{\udcff}"),
            (b'"\xc3\xa9\xff"', "é\udcff"),
            ('"é"'.encode("utf-16"), "\udcff\udcfe\"\0\udce9\0\"\0"),
            ("1".encode("utf-16-le"), "1\0"),
            ("\ufeff1".encode(), "\ufeff1"),
            (b"NaN", "NaN"),
            (b'{"a": 1}', {"a": 1}),
        ],
        ids=repr,
    )  # fmt: skip
    def test_bytes_that_another_program_wrote_are_delivered_and_survive(self, path, queues, stored, body):
        queues.post("requests", ["placeholder"])
        with direct(path) as connection:
            connection.execute("UPDATE messages SET body = ?, checksum = NULL", (stored,))

        assert queues.browse("requests").messages[0].body == body
        claim = queues.claim("requests", **HOLD, limit=1)
        assert bodies(claim) == [body]

        queues.settle(claim, [Settlement(claim.messages[0], (Post("dead-letters", {"body": body}),))])
        assert bodies(queues.claim("dead-letters", **HOLD, limit=1)) == [{"body": body}]

    @pytest.mark.parametrize(
        ("stored", "text"),
        [(b'{"a": 2}', '{"a": 2}'), (b'{"a": \xff}', '{"a": \udcff}'), (b"", ""), (b'{"a": 1} ', '{"a": 1} ')],
        ids=repr,
    )
    def test_a_body_that_has_changed_since_it_was_posted_is_no_request(self, path, queues, stored, text):
        queues.post("requests", [{"a": 1}, {"b": 1}])
        with direct(path) as connection:
            connection.execute("UPDATE messages SET body = ? WHERE place = 1", (stored,))

        expected = [f"damaged in the queue file: {text}", {"b": 1}]
        assert [message.body for message in queues.browse("requests").messages] == expected
        assert bodies(queues.claim("requests", **HOLD, limit=2)) == expected

    def test_a_file_of_version_1_is_upgraded_with_what_it_holds(self, path):
        with closing(store.open_store(path, application_id=sqlite.APPLICATION_ID, version=1, schema=VERSION_1)) as old:
            old.execute("INSERT INTO queues (name) VALUES ('requests')")
            old.execute("INSERT INTO messages (queue, posted, body) VALUES (1, 0, ?)", (b'{"a": 1}',))

        with SqliteQueues(path) as queues, SqliteQueues(path) as again:
            queues.post("requests", [{"b": 1}])
            assert bodies(again.claim("requests", **HOLD, limit=2)) == [{"a": 1}, {"b": 1}]


class TestSyncing:
    @pytest.mark.parametrize(
        ("operation", "is_synced"),
        {
            "create": True,
            "post": True,
            "claim": False,
            "claim of what was posted since": True,
            "renew": False,
            "settle": True,
            "release": False,
            "delete": True,
            "purge": True,
        }.items(),
    )
    def test_what_must_survive_a_power_cut_is_synced_before_it_returns(
        self, path, queues, monkeypatch, operation, is_synced
    ):
        ids = queues.post("requests", [1, 2, 3, 4])
        claim = queues.claim("requests", **HOLD, limit=2)
        queues.post("later", [5])
        operations = {
            "create": lambda: queues.create("new"),
            "post": lambda: queues.post("requests", [5]),
            "claim": lambda: queues.claim("requests", **HOLD, limit=2),
            "claim of what was posted since": lambda: queues.claim("later", **HOLD, limit=2),
            "renew": lambda: queues.renew(claim, ttl=60),
            "settle": lambda: queues.settle(claim, [Settlement(message) for message in claim.messages]),
            "release": lambda: queues.release(claim),
            "delete": lambda: queues.delete("requests", ids),
            "purge": lambda: queues.purge("requests"),
        }
        synced = []

        def sync(descriptor):
            assert os.path.samestat(os.fstat(descriptor), Path(f"{path}-wal").stat())
            with direct(path) as connection:
                connection.execute("BEGIN IMMEDIATE; COMMIT")  # nobody waits for the disk with the file locked
            queues.stats("requests")
            synced.append(descriptor)

        monkeypatch.setattr(store, "SYNC", sync)
        with direct(path) as connection:
            before = connection.execute("PRAGMA data_version").get
            operations[operation]()
            assert connection.execute("PRAGMA data_version").get != before

        assert len(synced) == is_synced

    def test_what_a_failing_disk_did_not_keep_is_not_reported_as_stored(self, queues, monkeypatch):
        def fail(descriptor):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(store, "SYNC", fail)

        with pytest.raises(PostIncomplete, match=r"the disk failed \(Input/output error\).* may be lost") as caught:
            queues.post("requests", [1, 2])
        assert caught.value.unknown == (0, 1)

    def test_what_follows_a_failed_sync_is_not_reported_as_stored_either(self, queues, monkeypatch):
        queues.post("requests", ["claimed"])
        claim = queues.claim("requests", **HOLD, limit=1)

        def fail(descriptor):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as failing:
            failing.setattr(store, "SYNC", fail)
            with pytest.raises(StoreError, match="the disk failed"):
                queues.settle(claim, [Settlement(claim.messages[0])])

        for go_on in (
            lambda: queues.post("requests", ["new"]),
            lambda: queues.claim("requests", **HOLD, limit=1),
            lambda: queues.settle(claim, [Settlement(claim.messages[0])]),
        ):
            with pytest.raises(StoreError, match="the disk failed"):
                go_on()

    def test_closing_waits_for_a_sync(self, queues, monkeypatch):
        is_syncing, go_on, synced = threading.Event(), threading.Event(), []

        def sync(descriptor):
            is_syncing.set()
            assert go_on.wait(10)
            os.fsync(descriptor)
            synced.append(descriptor)

        monkeypatch.setattr(store, "SYNC", sync)
        with ThreadPoolExecutor(2) as pool:
            posting = pool.submit(queues.post, "requests", [1])
            assert is_syncing.wait(10)
            closing = pool.submit(queues.close)
            assert not wait([closing], 0.1).done
            go_on.set()
            assert len(posting.result(10)) == 1
            closing.result(10)

        assert synced


class TestTransactions:
    @pytest.mark.parametrize("operation", ["create", "post", "claim", "renew", "settle", "release", "delete", "purge"])
    def test_every_change_is_one_transaction_that_takes_its_place_before_it_reads(self, queues, operation):
        ids = queues.post("requests", [1, 2, 3, 4])
        claim = queues.claim("requests", **HOLD, limit=2)
        posts = (Post("responses", "one"), Post("dead-letters", "two"))
        operations = {
            "create": lambda: queues.create("new"),
            "post": lambda: queues.post("new", [1, 2]),
            "claim": lambda: queues.claim("requests", **HOLD, limit=2),
            "renew": lambda: queues.renew(claim, ttl=60),
            "settle": lambda: queues.settle(claim, [Settlement(message, posts) for message in claim.messages]),
            "release": lambda: queues.release(claim),
            "delete": lambda: queues.delete("requests", ids),
            "purge": lambda: queues.purge("requests"),
        }

        with statements_of(queues) as seen:
            operations[operation]()

        texts = [sql for sql, _ in seen if not sql.startswith("SELECT")]
        assert (texts[0], texts[-1]) == ("BEGIN IMMEDIATE", "COMMIT")
        assert Counter(texts)["BEGIN IMMEDIATE"] == Counter(texts)["COMMIT"] == 1

    def test_a_post_that_fails_half_way_stores_nothing(self, path, queues):
        with direct(path) as connection:
            connection.execute(
                "CREATE TRIGGER fails BEFORE INSERT ON messages WHEN NEW.body = CAST('3' AS BLOB)"
                " BEGIN SELECT RAISE(ABORT, 'on purpose'); END"
            )

        with pytest.raises(StoreError, match="on purpose"):
            queues.post("requests", [1, 2, 3, 4])

        assert queues.stats("requests").total == 0

    def test_a_queue_whose_first_post_failed_can_be_used_later(self, path, queues, other):
        with direct(path) as connection:
            connection.execute(
                "CREATE TRIGGER fails BEFORE INSERT ON messages BEGIN SELECT RAISE(ABORT, 'on purpose'); END"
            )
            with pytest.raises(StoreError, match="on purpose"):
                queues.post("first", ["lost"])
            connection.execute("DROP TRIGGER fails")

        other.post("second", ["another queue"])
        queues.post("first", ["stored"])

        assert bodies(other.claim("first", **HOLD, limit=2)) == ["stored"]

    def test_a_settlement_that_fails_half_way_deletes_and_posts_nothing(self, path, queues):
        queues.post("requests", ["request", "request"])
        claim = queues.claim("requests", **HOLD, limit=2)
        settlements = [Settlement(message, (Post("responses", "response"),)) for message in claim.messages]
        with direct(path) as connection:
            connection.execute(
                "CREATE TRIGGER fails BEFORE INSERT ON messages WHEN (SELECT max(place) FROM messages) > 0"
                " BEGIN SELECT RAISE(ABORT, 'on purpose'); END"
            )
            with pytest.raises(StoreError, match="on purpose"):
                queues.settle(claim, settlements)
            connection.execute("DROP TRIGGER fails")

        assert (queues.stats("requests").claimed, queues.stats("responses").total) == (2, 0)
        assert len(queues.settle(claim, settlements).deleted) == 2
        assert queues.stats("responses").free == 2

    def test_a_claim_that_fails_half_way_claims_and_counts_nothing(self, path, queues):
        queues.post("requests", [1, 2])
        with direct(path) as connection:
            connection.execute(
                "CREATE TRIGGER fails AFTER UPDATE OF receives ON messages WHEN NEW.place > 1"
                " BEGIN SELECT RAISE(ABORT, 'on purpose'); END"
            )
            with pytest.raises(StoreError, match="on purpose"):
                queues.claim("requests", **HOLD, limit=2)
            connection.execute("DROP TRIGGER fails")

        assert queues.stats("requests").free == 2
        assert [message.receive_count for message in queues.claim("requests", **HOLD, limit=2).messages] == [1, 1]

    def test_a_full_disk_loses_nothing_and_is_over_when_there_is_room(self, queues):
        queues.post("requests", ["kept"])
        pages = queues._connection.pragma("page_count")
        queues._connection.pragma("max_page_count", pages)
        with pytest.raises(StoreError, match="no space"):
            queues.post("requests", ["x" * 100_000])

        queues._connection.pragma("max_page_count", pages + 1_000)
        queues.post("requests", ["new"])

        assert bodies(queues.claim("requests", **HOLD, limit=3)) == ["kept", "new"]

    def test_a_file_that_another_process_keeps_locked_is_unavailable_for_writes_only(self, path, clock, monkeypatch):
        monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.1)
        with SqliteQueues(path, clock=clock) as queues, direct(path) as other:
            queues.post("requests", ["kept"])
            other.execute("BEGIN IMMEDIATE")

            with pytest.raises(QueueUnavailable, match="locked"):
                queues.post("requests", ["lost"])
            with pytest.raises(QueueUnavailable, match="locked"):
                queues.claim("requests", **HOLD, limit=1)
            assert queues.stats("requests").free == 1

            other.execute("ROLLBACK")
            assert bodies(queues.claim("requests", **HOLD, limit=2)) == ["kept"]

    def test_an_idle_consumer_does_not_wait_for_a_busy_one(self, path, queues):
        with direct(path) as other:
            other.execute("BEGIN IMMEDIATE")

            assert queues.claim("requests", **HOLD, limit=1) is None
            assert queues.claim("requests", **HOLD, limit=1, wait=0.1) is None

    def test_processes_never_claim_the_same_message(self, path, queues):
        queues.post("requests", list(range(4_000)))

        with ThreadPoolExecutor(4) as pool:
            output = "".join(pool.map(lambda _: self._claim_all(path), range(4)))

        received = [tuple(map(int, line.split())) for line in output.splitlines()]
        assert sorted(received) == [(number, 1) for number in range(4_000)]

    @staticmethod
    def _claim_all(path):
        with python(CLAIMS_ALL, path) as process:
            out, _ = process.communicate("go\n", timeout=60)
            assert process.returncode == 0
            return out


class TestQueryPlans:
    def test_no_operation_reads_through_all_messages(self, path, queues):
        (id_,) = queues.post("other", ["deleted"])
        queues.post("requests", list(range(100)), ttl=60)
        with statements_of(queues) as seen:
            claim = queues.claim("requests", **HOLD, limit=20)
            queues.claim("empty", **HOLD, limit=20, wait=0.01)
            queues.renew(claim, ttl=60)
            queues.settle(claim, [Settlement(claim.messages[0], (Post("responses", "response"),))])
            queues.release(claim)
            queues.browse("requests", after="20")
            queues.browse("requests", claimed=True)
            queues.end_marker("requests")
            queues.delete("other", [id_])
            queues.stats("requests")
            queues.purge("requests")

        with direct(path) as connection:
            plans = {sql: self._plan(connection, sql, bindings) for sql, bindings in seen if "messages" in sql}
        assert len(plans) > 10
        assert {sql: plan for sql, plan in plans.items() if "SCAN messages" in plan} == {}

    def test_a_claim_finds_the_oldest_without_sorting(self, path, queues):
        queues.post("requests", list(range(100)))
        with statements_of(queues) as seen:
            queues.claim("requests", **HOLD, limit=20)

        ((sql, bindings),) = [(sql, bindings) for sql, bindings in seen if "ORDER BY place LIMIT" in sql]
        with direct(path) as connection:
            plan = self._plan(connection, sql, bindings)
        assert "USING COVERING INDEX by_hold" in plan or "USING INDEX by_hold (queue=? AND held_until=?)" in plan
        assert "ORDER BY" not in plan

    @staticmethod
    def _plan(connection, sql, bindings):
        return "\n".join(row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", bindings))


class TestExpired:
    def test_expired_messages_are_removed_from_the_file_by_the_next_claim(self, path, queues, clock):
        queues.post("requests", [1, 2], ttl=60)
        queues.post("requests", ["kept"], ttl=120)
        queues.post("responses", [3], ttl=60)
        clock.advance(60)

        assert bodies(queues.claim("requests", **HOLD, limit=3)) == ["kept"]

        assert self._rows(path) == 1

    def test_an_idle_consumer_removes_them_too(self, path, queues, clock):
        queues.post("responses", [1, 2], ttl=60)
        clock.advance(60)

        assert queues.claim("requests", **HOLD, limit=1) is None

        assert self._rows(path) == 0

    def test_a_claim_removes_only_so_many_that_nobody_waits_for_long(self, path, queues, clock, monkeypatch):
        monkeypatch.setattr(sqlite, "PURGE_BATCH", 2)
        queues.post("requests", [1, 2, 3], ttl=60)
        clock.advance(60)

        assert queues.claim("requests", **HOLD, limit=1) is None
        assert self._rows(path) == 1
        assert queues.claim("requests", **HOLD, limit=1) is None
        assert self._rows(path) == 0

    @staticmethod
    def _rows(path):
        with direct(path) as connection:
            return connection.execute("SELECT count(*) FROM messages").get


class TestInspection:
    def test_a_sound_file_has_no_surprises(self, queues):
        queues.post("requests", list(range(1_000)))

        assert queues.inspect("requests") == []

    def test_a_damaged_page_is_found(self, path, clock):
        with SqliteQueues(path, clock=clock) as queues:
            queues.post("requests", ["x" * 1_000] * 500)
        content = path.read_bytes()
        path.write_bytes(content[: -100 * 4_096] + b"\xff" * 4_096 + content[-99 * 4_096 :])
        damaged = path.read_bytes()

        with SqliteQueues(path, clock=clock) as queues, pytest.raises(StoreError, match="is damaged"):
            queues.inspect("requests")
        assert path.read_bytes() == damaged

    def test_a_file_that_was_cut_off_is_refused(self, path, clock):
        with SqliteQueues(path, clock=clock) as queues:
            queues.post("requests", ["x" * 1_000] * 500)
        path.write_bytes(path.read_bytes()[: 50 * 4_096])

        with pytest.raises(StoreError, match="is damaged"), SqliteQueues(path, clock=clock) as queues:
            queues.inspect("requests")


class TestWaiting:
    def test_a_post_by_another_process_wakes_a_consumer_through_the_kernel(
        self, path, queues, background, only_the_kernel
    ):
        with python(POSTS_ON_DEMAND, path) as poster:
            looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
            assert is_waiting(looking)

            poster.stdin.write("new\n")
            poster.stdin.flush()

            assert bodies(looking.result(SOON_S)) == ["new"]
            poster.stdin.close()

    @pytest.mark.usefixtures("only_the_kernel")
    def test_a_post_wakes_a_consumer_from_whatever_directory(self, path, queues, background, monkeypatch):
        looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
        assert is_waiting(looking)
        monkeypatch.chdir(path.parent)
        with SqliteQueues(Path(path.name)) as poster:
            monkeypatch.chdir("/")
            poster.post("requests", ["new"])

        assert bodies(looking.result(SOON_S)) == ["new"]

    def test_a_response_wakes_whoever_waits_for_it(self, queues, other, background, only_the_kernel):
        other.post("requests", ["request"])
        claim = other.claim("requests", **HOLD, limit=1)
        looking = background.submit(queues.browse, "responses", wait=NEVER_S)
        assert is_waiting(looking)

        other.settle(claim, [Settlement(claim.messages[0], (Post("responses", "response"),))])

        assert [message.body for message in looking.result(SOON_S).messages] == ["response"]

    def test_one_post_of_several_messages_wakes_several_consumers(self, path, clock, only_the_kernel):
        consumers = [SqliteQueues(path, clock=clock) for _ in range(2)]
        with consumers[0], consumers[1], ThreadPoolExecutor(2) as pool:
            looking = [pool.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S) for queues in consumers]
            assert all(map(is_waiting, looking))

            consumers[0].post("requests", [1, 2])

            assert sorted(bodies(found.result(SOON_S))[0] for found in looking) == [1, 2]

    def test_what_is_posted_just_before_the_wait_begins_is_not_missed(
        self, queues, other, background, only_the_kernel, monkeypatch
    ):
        sleep = queues._sleep

        def post_and_sleep(*args):
            other.post("requests", ["in between"])
            return sleep(*args)

        monkeypatch.setattr(queues, "_sleep", post_and_sleep)

        looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
        assert bodies(looking.result(SOON_S)) == ["in between"]

    @pytest.mark.parametrize("held", ["claimed", "delayed"])
    def test_the_end_of_a_claim_or_delay_wakes_a_consumer_in_time(self, path, background, only_the_kernel, held):
        ahead_s = [0.0]
        with SqliteQueues(path, clock=lambda: time.time() + ahead_s[0]) as queues:
            queues.post("requests", [held])
            claim = queues.claim("requests", **HOLD, limit=1)
            if held == "delayed":
                queues.release(claim, delay=60)
            ahead_s[0] = 59.5
            started = time.monotonic()

            claim = queues.claim("requests", **HOLD, limit=1, wait=NEVER_S)

            assert bodies(claim) == [held]
            assert 0.3 < time.monotonic() - started < SOON_S

    def test_a_release_with_a_delay_is_seen_by_a_consumer_that_already_waits(self, path, background, only_the_kernel):
        with SqliteQueues(path) as queues, SqliteQueues(path) as other:
            other.post("requests", ["soon"])
            claim = other.claim("requests", **HOLD, limit=1)
            looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
            assert is_waiting(looking)

            other.release(claim, delay=0.3)

            assert bodies(looking.result(SOON_S)) == ["soon"]

    def test_an_idle_wait_looks_only_a_few_times(self, queues):
        with statements_of(queues) as seen:
            assert queues.claim("requests", **HOLD, limit=1, wait=1.5) is None

        looks = [sql for sql, _ in seen if "EXISTS" in sql]
        assert 2 <= len(looks) <= 4
        assert len(seen) <= 4 * len(looks)

    def test_a_post_to_another_queue_costs_a_waiting_consumer_one_look(self, queues, other, background):
        with statements_of(queues) as seen:
            looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=0.8)
            assert is_waiting(looking)
            other.post("elsewhere", ["new"])
            assert looking.result(SOON_S) is None

        # At once, once it watches the file, when it is woken, and at the end.
        assert len([sql for sql, _ in seen if "EXISTS" in sql]) <= 4

    def test_a_post_whose_poster_died_before_it_woke_anybody_is_found_by_a_slow_look(
        self, queues, other, background, monkeypatch
    ):
        monkeypatch.setattr(other, "_wake_others", lambda: None)
        looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
        assert is_waiting(looking)

        other.post("requests", ["unannounced"])

        assert bodies(looking.result(SOON_S)) == ["unannounced"]

    def test_stop_waiting_ends_a_wait_at_once(self, queues, background, only_the_kernel):
        looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
        assert is_waiting(looking)

        queues.stop_waiting()

        assert looking.result(SOON_S) is None

    @pytest.mark.usefixtures("only_the_kernel")
    @pytest.mark.parametrize("watches", [None, NoInstances, NoWatches])
    def test_a_consumer_that_the_kernel_cannot_wake_looks_regularly(
        self, queues, other, background, monkeypatch, watches
    ):
        monkeypatch.setattr(sqlite, "INotify", watches)
        looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
        assert is_waiting(looking)

        other.post("requests", ["new"])

        assert bodies(looking.result(SOON_S)) == ["new"]

    def test_a_wait_leaves_no_descriptor_open(self, queues):
        queues.claim("requests", **HOLD, limit=1, wait=0.01)
        before = len(list(Path("/dev/fd").iterdir()))

        for _ in range(5):
            queues.claim("requests", **HOLD, limit=1, wait=0.01)

        assert len(list(Path("/dev/fd").iterdir())) == before


class TestClosing:
    def test_closing_ends_a_wait_and_waits_for_its_end(self, path, background, only_the_kernel):
        queues = SqliteQueues(path)
        looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
        assert is_waiting(looking)

        queues.close()

        assert looking.result(SOON_S) is None

    def test_closing_waits_for_a_wait_that_has_not_ended(self, path, monkeypatch):
        queues, go_on = SqliteQueues(path), threading.Event()
        monkeypatch.setattr(queues, "_sleep", lambda *_: not go_on.wait(SOON_S))
        with ThreadPoolExecutor(2) as pool:
            looking = pool.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
            assert is_waiting(looking)
            closing = pool.submit(queues.close)
            assert is_waiting(closing)

            go_on.set()

            assert looking.result(SOON_S) is None
            closing.result(SOON_S)

    def test_closing_twice_closes_nothing_of_others(self, path, tmp_path):
        queues = SqliteQueues(path)
        queues.close()
        with (tmp_path / "other").open("w") as other:
            queues.stop_waiting()
            queues.close()
            assert other.write("still open") == 10

    def test_a_closed_file_is_alone_and_has_no_log_beside_it(self, path):
        with SqliteQueues(path) as queues:
            queues.post("requests", ["kept"])

        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_a_file_that_cannot_be_opened_leaves_no_descriptor_open(self, path):
        path.write_text("no database")
        before = len(list(Path("/dev/fd").iterdir()))

        for _ in range(5):
            with pytest.raises(StoreError):
                SqliteQueues(path)

        assert len(list(Path("/dev/fd").iterdir())) == before
