"""What the embedded queue promises beyond the contract: exact times, one transaction each, its file, its waits."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager

import apsw
import pytest
import structlog.testing
from backends import bodies
from doubles.disk import disk_double
from support import HERE

from claim_queues import ConfigError, Post, QueueUnavailable, Settlement, Stats, StoreError, open_queues
from claim_queues.sqlite import SqliteQueues

HOLD = {"ttl": 60, "grace": 60}
NEVER_S, SOON_S = 40.0, 10.0
CLAIMS_ALL = """
import sys
from claim_queues import Settlement, open_queues
with open_queues(sys.argv[1]) as queues:
    while claim := queues.claim("requests", ttl=60, grace=60, limit=7):
        print(*(message.body for message in claim.messages))
        assert len(queues.settle(claim, [Settlement(message) for message in claim.messages]).deleted) > 0
"""


class Clock:
    """Stands still until it is moved. Eighths of a second are exact as floats."""

    def __init__(self):
        self.now_s = 1_800_000_000.0
        self.asked_at = []

    def __call__(self):
        self.asked_at.append(time.monotonic())
        return self.now_s

    def advance(self, seconds):
        self.now_s += seconds


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


@contextmanager
def direct(path):
    """The file as another program would write to it."""
    with closing(apsw.Connection(str(path))) as connection:
        yield connection


def settle_all(queues, claim, *posts):
    return queues.settle(claim, [Settlement(message, posts) for message in claim.messages])


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "name"),
        [
            ("sqlite:///q.db", "q.db"),
            ("sqlite:///sub/../q.db", "q.db"),
            ("sqlite:///with%20blank%3F%23.db", "with blank?#.db"),
            ("sqlite:///ü.db", "ü.db"),
        ],
    )
    def test_three_slashes_are_a_path_from_the_working_directory(self, tmp_path, monkeypatch, url, name):
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path)
        with open_queues(url) as queues:
            monkeypatch.chdir("/")
            queues.create("requests")

        assert (tmp_path / name).is_file()

    def test_four_slashes_are_an_absolute_path(self, path):
        with open_queues(f"sqlite:///{path}") as queues:
            queues.create("requests")

            assert queues.address == f"sqlite:///{path}"
            assert path.is_file()

    @pytest.mark.parametrize("rest", ["", "//", "///", "q.db", "//host/q.db", "///q?x=1", "///q#x", "///a%00b"])
    def test_any_other_form_is_refused(self, rest):
        with pytest.raises(ConfigError, match="write sqlite:///PATH"):
            open_queues(f"sqlite:{rest}")


class TestFile:
    def test_to_look_makes_no_file(self, path, queues):
        assert not queues.exists("requests")
        assert queues.stats("requests") == Stats(0, 0, 0)
        assert queues.browse("requests", after="7", wait=0.1) == ([], "7")
        assert queues.inspect("requests") == []
        assert list(path.parent.iterdir()) == []

    def test_every_queue_is_there_once_the_file_is(self, queues, other):
        queues.create("requests")

        assert other.exists("never-used")
        assert other.claim("never-used", **HOLD, limit=1) is None

    def test_a_directory_that_is_missing_is_named_with_what_to_do(self, tmp_path):
        with (
            SqliteQueues(tmp_path / "missing" / "queues.sqlite3") as queues,
            pytest.raises(StoreError, match=r"missing/queues\.sqlite3.*make its directory"),
        ):
            queues.create("requests")

    @pytest.mark.parametrize(
        "look",
        [
            lambda queues: queues.exists("requests"),
            lambda queues: queues.create("requests"),
            lambda queues: queues.stats("requests"),
            lambda queues: queues.claim("requests", **HOLD, limit=1),
            lambda queues: queues.claim("requests", **HOLD, limit=1, wait=NEVER_S),
            lambda queues: queues.post("requests", ["lost"]),
        ],
    )
    def test_a_file_that_was_removed_is_no_empty_queue(self, path, queues, look):
        queues.create("requests")
        path.unlink()

        with pytest.raises(StoreError, match="removed or replaced"):
            look(queues)

    @pytest.mark.slow
    def test_a_file_that_another_process_keeps_locked_is_unavailable_for_writes_only(self, path, queues):
        queues.post("requests", ["kept"])
        with direct(path) as other:
            other.execute("BEGIN IMMEDIATE")

            assert queues.claim("empty", **HOLD, limit=1) is None
            with pytest.raises(QueueUnavailable, match="locked"):
                queues.claim("requests", **HOLD, limit=1)
            assert queues.stats("requests").free == 1

        assert bodies(queues.claim("requests", **HOLD, limit=2)) == ["kept"]

    def test_ids_of_another_file_mean_nothing(self, tmp_path, queues):
        queues.post("requests", ["ours"])
        with SqliteQueues(tmp_path / "elsewhere.sqlite3") as elsewhere:
            ids = elsewhere.post("requests", ["theirs"])
            claim = elsewhere.claim("requests", **HOLD, limit=1)

        queues.delete("requests", ids)
        assert not settle_all(queues, claim).deleted
        assert bodies(queues.claim("requests", **HOLD, limit=1)) == ["ours"]

    def test_a_delayed_message_is_held_by_no_claim_and_can_be_deleted(self, queues):
        ids = queues.post("requests", ["delayed"])
        queues.release(queues.claim("requests", **HOLD, limit=1), delay=100)

        queues.delete("requests", ids)

        assert queues.stats("requests").total == 0

    def test_an_id_is_never_given_twice(self, queues):
        first = queues.post("requests", ["newest"])
        queues.delete("requests", first)

        assert queues.post("requests", ["next"]) != first


class TestTimes:
    def test_a_claim_ends_when_its_ttl_has_passed_and_not_a_moment_before(self, queues, clock):
        queues.post("requests", ["settled", "lapsed"])
        claim, lapsed = (queues.claim("requests", **HOLD, limit=1) for _ in range(2))

        clock.advance(59.875)
        assert settle_all(queues, claim).deleted
        assert queues.claim("requests", **HOLD, limit=1) is None
        clock.advance(0.125)
        assert not settle_all(queues, lapsed).deleted
        assert bodies(queues.claim("requests", **HOLD, limit=1)) == ["lapsed"]

    def test_a_message_is_gone_when_its_ttl_has_passed_and_not_a_moment_before(self, queues, clock):
        queues.post("requests", ["short-lived"], ttl=60)

        clock.advance(59.875)
        assert queues.stats("requests").free == 1
        clock.advance(0.125)
        assert queues.stats("requests").total == 0
        assert queues.claim("requests", **HOLD, limit=1) is None

    def test_a_message_that_expires_with_its_claim_is_never_free_again(self, queues, clock):
        queues.post("requests", ["short-lived"], ttl=60)
        queues.claim("requests", **HOLD, limit=1)

        clock.advance(60)

        assert queues.claim("requests", **HOLD, limit=1) is None

    def test_a_delay_ends_to_the_millisecond(self, queues, clock):
        queues.post("requests", ["later"])
        queues.release(queues.claim("requests", **HOLD, limit=1), delay=0.25)

        clock.advance(0.125)
        assert queues.stats("requests").delayed == 1
        clock.advance(0.125)
        assert queues.stats("requests").free == 1

    @pytest.mark.parametrize("held", ["claimed", "delayed"])
    def test_a_hold_from_before_the_clock_was_set_back_by_a_day_is_over(self, queues, clock, held):
        ids = queues.post("requests", ["held", "deleted"])
        for _ in ids:
            claim = queues.claim("requests", ttl=43_200, grace=60, limit=1)
            if held == "delayed":
                queues.release(claim, delay=43_200)
        clock.advance(-1)
        assert queues.stats("requests").free == 2

        queues.delete("requests", ids[1:])
        assert queues.claim("requests", ttl=43_200, grace=60, limit=2).messages[0].id == ids[0]
        assert queues.stats("requests")[:3] == (0, 1, 0)

    def test_the_longest_claim_holds(self, queues, clock):
        queues.post("requests", ["held"])
        queues.claim("requests", ttl=43_200, grace=60, limit=1)

        assert queues.stats("requests").claimed == 1
        assert queues.claim("requests", **HOLD, limit=1) is None

    def test_a_clock_set_back_makes_no_age_negative(self, queues, clock):
        queues.post("requests", ["from the future"])

        clock.advance(-100)

        assert queues.stats("requests").oldest_age == 0
        assert queues.claim("requests", **HOLD, limit=1).messages[0].age == 0

    def test_a_claim_and_a_renewal_are_trusted_from_before_they_were_asked_for(self, queues, clock):
        queues.post("requests", ["held"])
        clock.asked_at.clear()
        claim = queues.claim("requests", **HOLD, limit=1)
        assert claim.expires_at <= clock.asked_at[0] + 58

        clock.asked_at.clear()
        queues.renew(claim)
        assert claim.expires_at <= clock.asked_at[0] + 58

    def test_what_expires_unclaimed_is_counted_and_removed_by_the_next_claim_even_an_idle_one(
        self, path, queues, clock
    ):
        queues.post("requests", [1, 2], ttl=60)
        queues.post("responses", [3], ttl=60)
        queues.post("responses", ["kept"], ttl=120)
        clock.advance(60)

        with structlog.testing.capture_logs() as logs:
            assert queues.claim("idle", **HOLD, limit=1) is None

        assert {(line["event"], line["queue"], line["number"]) for line in logs} == {
            ("messages expired unclaimed", "requests", 2),
            ("messages expired unclaimed", "responses", 1),
        }
        with direct(path) as connection:
            assert connection.execute("SELECT count(*) FROM messages").get == 1


class TestTransactions:
    @pytest.mark.parametrize(
        ("operation", "is_synced"),
        {"post": True, "settle": True, "delete": True, "purge": True, "claim": False, "renew": False, "release": False}
        .items(),
    )  # fmt: skip
    def test_what_must_survive_a_power_cut_is_synced_before_it_returns(self, path, operation, is_synced):
        with disk_double() as disk, SqliteQueues(path) as queues:
            ids = queues.post("requests", [1, 2, 3, 4])
            claim = queues.claim("requests", **HOLD, limit=2)
            operations = {
                "post": lambda: queues.post("requests", [5]),
                "claim": lambda: queues.claim("requests", **HOLD, limit=2),
                "renew": lambda: queues.renew(claim),
                "settle": lambda: settle_all(queues, claim),
                "release": lambda: queues.release(claim),
                "delete": lambda: queues.delete("requests", ids),
                "purge": lambda: queues.purge("requests"),
            }
            disk.synced.clear()

            operations[operation]()

            assert disk.synced == [f"{path}-wal"] * is_synced

    @pytest.mark.parametrize("failure", [apsw.FullError, apsw.IOError])
    def test_a_disk_that_is_full_or_fails_does_nothing_by_halves(self, path, failure):
        with disk_double() as disk, SqliteQueues(path) as queues:
            queues.post("requests", [1, 2, 3])
            claim = queues.claim("requests", **HOLD, limit=1)
            disk.failure = failure
            for operation in (
                lambda: queues.post("requests", [4, 5]),
                lambda: settle_all(queues, claim, Post("responses", "made")),
                lambda: queues.claim("requests", **HOLD, limit=2),
                lambda: queues.purge("requests"),
            ):
                with pytest.raises(StoreError):
                    operation()

            disk.failure = None
            assert queues.stats("requests")[:3] == (2, 1, 0)
            assert settle_all(queues, claim, Post("responses", "made")).deleted
            assert bodies(queues.claim("responses", **HOLD, limit=2)) == ["made"]

    def test_a_settlement_that_fails_half_way_deletes_and_posts_nothing(self, path, queues):
        queues.post("requests", [1, 2])
        claim = queues.claim("requests", **HOLD, limit=2)
        with direct(path) as connection:
            connection.execute(
                "CREATE TRIGGER fails BEFORE INSERT ON messages WHEN EXISTS (SELECT 1 FROM messages"
                " WHERE queue = 'responses') BEGIN SELECT RAISE(ABORT, 'on purpose'); END"
            )
            with pytest.raises(StoreError, match="on purpose"):
                settle_all(queues, claim, Post("responses", "made"))
            connection.execute("DROP TRIGGER fails")

        assert (queues.stats("requests").claimed, queues.stats("responses").total) == (2, 0)
        assert len(settle_all(queues, claim, Post("responses", "made")).deleted) == 2
        assert queues.stats("responses").free == 2

    def test_nothing_is_posted_for_a_message_that_is_lost(self, queues, clock):
        queues.post("requests", ["lost"])
        lapsed = queues.claim("requests", **HOLD, limit=1)
        clock.advance(60)

        settle_all(queues, lapsed, Post("responses", "made"))

        assert queues.stats("responses").total == 0

    def test_a_message_settled_twice_at_once_is_settled_once(self, queues):
        queues.post("requests", ["one"])
        claim = queues.claim("requests", **HOLD, limit=1)

        settled = queues.settle(claim, [Settlement(claim.messages[0], (Post("responses", "made"),))] * 2)

        assert len(settled.deleted) == queues.stats("responses").total == 1

    def test_a_renewal_lets_what_others_purged_leave_the_claim(self, queues, other):
        queues.post("requests", ["purged"])
        claim = queues.claim("requests", **HOLD, limit=1)
        other.purge("requests")

        with pytest.raises(Exception, match="expired or was released"):
            queues.renew(claim)
        assert claim.messages == ()

    def test_processes_never_claim_the_same_message(self, path):
        with SqliteQueues(path) as queues:
            for first in range(0, 4_000, 1_000):
                queues.post("requests", list(range(first, first + 1_000)))
        command = [sys.executable, "-c", CLAIMS_ALL, f"sqlite:///{path}"]
        running = [subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        claimed = "".join(process.communicate(timeout=60)[0] for process in running).split()

        assert [process.returncode for process in running] == [0, 0, 0]
        assert sorted(map(int, claimed)) == list(range(4_000))

    @pytest.mark.parametrize("held", ["claimed", "delayed"])
    def test_a_claim_does_not_read_through_what_others_hold_nor_through_all_that_wait(self, path, held):
        with SqliteQueues(path) as queues:
            for _ in range(6):
                queues.post("requests", ["x" * 500] * 1_000)
            for _ in range(150):
                claim = queues.claim("requests", ttl=43_200, grace=60, limit=20)
                if held == "delayed":
                    queues.release(claim, delay=43_200)
        with disk_double() as disk, SqliteQueues(path) as queues:
            queues.create("requests")
            disk.reads = 0

            assert len(queues.claim("requests", **HOLD, limit=10).messages) == 10

            assert 0 < disk.reads < 60  # pages; the messages take 900


class TestBodies:
    @pytest.mark.parametrize(
        ("stored", "body"),
        [(b"plain text", "plain text"), (b"", ""), (b"NaN", "NaN"), (b'{"a": 1}', {"a": 1}), (b"{\xff}", "{\ufffd}")],
        ids=repr,
    )
    def test_what_another_program_or_a_fault_wrote_is_delivered_and_holds_up_nothing(self, path, queues, stored, body):
        queues.post("requests", ["placeholder"])
        with direct(path) as connection:
            connection.execute("UPDATE messages SET body = ?", (stored,))

        claim = queues.claim("requests", **HOLD, limit=1)

        assert bodies(claim) == bodies(queues.browse("requests")[0]) == [body]
        assert settle_all(queues, claim, Post("dead-letters", {"body": body})).deleted


class TestWaiting:
    @staticmethod
    def is_waiting(looking):
        return not wait([looking], timeout=0.2).done

    @pytest.mark.parametrize("poster", ["this object", "another process"])
    def test_a_post_is_noticed_long_before_the_next_look_for_what_time_has_freed(self, path, background, poster):
        with SqliteQueues(path) as queues, SqliteQueues(path) as other:
            queues.create("requests")
            started = time.monotonic()
            for number in range(60):
                looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
                assert not wait([looking], timeout=0.01).done
                (queues if poster == "this object" else other).post("requests", [number])
                assert bodies(looking.result(SOON_S)) == [number]

            assert time.monotonic() - started < 10  # 15 s, if each waited for that look; 1 s otherwise

    def test_a_release_with_a_delay_is_seen_by_a_consumer_that_already_waits(self, path, background):
        with SqliteQueues(path) as queues, SqliteQueues(path) as other:
            other.post("requests", ["soon"])
            claim = other.claim("requests", **HOLD, limit=1)
            looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
            assert self.is_waiting(looking)

            other.release(claim, delay=0.3)

            assert bodies(looking.result(SOON_S)) == ["soon"]

    def test_a_browser_that_waits_for_a_missing_file_sees_what_is_posted_to_it(self, path, background):
        with SqliteQueues(path) as queues, SqliteQueues(path) as other:
            looking = background.submit(queues.browse, "responses", wait=NEVER_S)
            assert self.is_waiting(looking)

            other.post("responses", ["made"])

            assert bodies(looking.result(SOON_S)[0]) == ["made"]

    def test_a_consumer_notices_a_file_that_is_removed_while_it_waits(self, path, queues, background):
        queues.create("requests")
        looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
        assert self.is_waiting(looking)

        path.unlink()

        with pytest.raises(StoreError, match="removed or replaced"):
            looking.result(SOON_S)

    def test_an_idle_wait_takes_little_time_of_the_processor(self, queues):
        queues.create("requests")
        started = time.process_time()

        assert queues.claim("requests", **HOLD, limit=1, wait=2) is None

        assert time.process_time() - started < 0.4
