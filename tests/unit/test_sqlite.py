"""What the embedded queue promises beyond the contract: exact times, one transaction each, its file, its waits."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import apsw
import pytest
import structlog.testing
from backends import bodies
from doubles.disk import disk_double
from rig import execute
from support import is_waiting

from claim_queues import ClaimLost, ConfigError, Post, QueueUnavailable, Settlement, Stats, StoreError, open_queues
from claim_queues.sqlite import SqliteQueues

HOLD = {"ttl": 60, "grace": 60}
NEVER_S, SOON_S = 40.0, 10.0


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
def background():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def settle_all(queues, claim, *posts):
    return queues.settle(claim, [Settlement(message, posts) for message in claim.messages])


class TestUrls:
    @pytest.mark.parametrize(
        ("path", "name"),
        [("q.db", "q.db"), ("ü%20blank%3F%23.db", "ü blank?#.db"), ("{absolute}/q.db", "q.db")],
    )
    def test_three_slashes_are_a_path_from_the_working_directory_and_four_an_absolute_one(
        self, tmp_path, monkeypatch, path, name
    ):
        monkeypatch.chdir(tmp_path)
        with open_queues(f"sqlite:///{path.format(absolute=tmp_path)}") as queues:
            monkeypatch.chdir("/")
            queues.create("requests")

        assert queues.address == f"sqlite:///{tmp_path}/{name}"
        assert (tmp_path / name).is_file()

    @pytest.mark.parametrize("rest", ["", "//", "///", "q.db", "//host/q.db", "///q?x=1", "///q#x", "///a%00b"])
    def test_any_other_form_is_refused(self, rest):
        with pytest.raises(ConfigError, match="write sqlite:///PATH"):
            open_queues(f"sqlite:{rest}")


class TestFile:
    def test_to_look_makes_no_file_and_every_queue_is_there_once_the_file_is(self, path, queues):
        assert not queues.exists("requests")
        assert queues.stats("requests") == Stats(0, 0, 0)
        assert queues.browse("requests", after="7", wait=0.1) == ([], "7")
        assert queues.inspect("requests") == []
        assert list(path.parent.iterdir()) == []

        queues.create("requests")
        assert queues.exists("never-used")

    @pytest.mark.parametrize("name", ["x" * 300, "loop", "a file/it"])
    def test_a_place_where_no_file_can_be_is_not_an_empty_queue(self, tmp_path, name):
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "a file").touch()
        with SqliteQueues(tmp_path / name) as queues, pytest.raises(StoreError, match="name another file"):
            queues.stats("requests")

    def test_a_file_that_was_removed_is_no_empty_queue(self, path, queues):
        queues.create("requests")
        path.unlink()

        for look in (queues.exists, queues.create, queues.stats, queues.browse, partial(queues.post, bodies=["lost"])):
            with pytest.raises(StoreError, match="removed or replaced"):
                look("requests")

    @pytest.mark.slow
    def test_a_file_that_another_process_keeps_locked_is_unavailable_for_writes_only(self, path, queues):
        queues.post("requests", ["kept"])
        with closing(apsw.Connection(str(path))) as other:
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

    def test_an_id_is_never_given_twice(self, queues):
        first = queues.post("requests", ["newest"])
        queues.delete("requests", first)

        assert queues.post("requests", ["next"]) != first


class TestTimes:
    def test_claims_delays_and_messages_end_when_their_time_has_passed_and_not_a_moment_before(self, queues, clock):
        queues.post("requests", ["settled", "claimed", "delayed"])
        queues.post("requests", ["expires with its claim", "expires"], ttl=60)
        settled, lapsed, delayed, _ = (queues.claim("requests", **HOLD, limit=1) for _ in range(4))
        queues.release(delayed, delay=60)

        clock.advance(59.875)
        assert queues.stats("requests")[:3] == (1, 3, 1)
        assert settle_all(queues, settled).deleted
        clock.advance(0.125)
        assert queues.stats("requests")[:3] == (2, 0, 0)
        assert not settle_all(queues, lapsed).deleted
        assert bodies(queues.claim("requests", **HOLD, limit=5)) == ["claimed", "delayed"]

    def test_a_delayed_message_is_held_by_no_claim_and_lives_on_until_the_grace_after_its_delay(self, queues, clock):
        ids = queues.post("requests", ["delayed", "deleted"], ttl=60)
        queues.release(queues.claim("requests", **HOLD, limit=2), delay=200)
        queues.delete("requests", ids[1:])

        clock.advance(200)
        assert queues.stats("requests").free == 1
        clock.advance(60)
        assert queues.stats("requests").total == 0

    def test_the_longest_claim_holds_until_the_clock_is_set_back_and_then_no_age_is_negative(self, queues, clock):
        ids = queues.post("requests", ["held", "deleted"])
        for _ in ids:
            queues.claim("requests", ttl=43_200, grace=60, limit=1)
        assert queues.stats("requests").claimed == 2
        assert queues.claim("requests", **HOLD, limit=1) is None

        clock.advance(-1)
        assert queues.stats("requests") == Stats(2, 0, 0, oldest_age=0)
        queues.delete("requests", ids[1:])
        (message,) = queues.claim("requests", ttl=43_200, grace=60, limit=2).messages
        assert (message.id, message.age) == (ids[0], 0)
        assert queues.stats("requests")[:3] == (0, 1, 0)

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
        with closing(apsw.Connection(str(path))) as connection:
            assert connection.execute("SELECT count(*) FROM messages").get == 1


class TestTransactions:
    def test_what_must_survive_a_power_cut_is_synced_before_it_returns_and_nothing_else(self, path):
        with disk_double() as disk, SqliteQueues(path) as queues:
            ids = queues.post("requests", [1, 2, 3, 4])
            claim = queues.claim("requests", **HOLD, limit=1)
            for operation, is_synced in (
                (lambda: queues.post("requests", [5]), True),
                (lambda: queues.renew(claim), False),
                (lambda: settle_all(queues, claim), True),
                (lambda: queues.release(queues.claim("requests", **HOLD, limit=1)), False),
                (lambda: queues.delete("requests", ids), True),
                (lambda: queues.purge("requests"), True),
            ):
                disk.synced.clear()
                operation()

                assert disk.synced == ([f"{path}-wal"] if is_synced else [])

    def test_a_settlement_that_fails_half_way_deletes_and_posts_nothing(self, path, queues):
        queues.post("requests", [1, 2])
        claim = queues.claim("requests", **HOLD, limit=2)
        with closing(apsw.Connection(str(path))) as connection:
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

    def test_nothing_is_posted_for_a_message_that_is_lost_nor_twice_for_one_that_is_settled_twice(self, queues, clock):
        queues.post("requests", ["settled", "lost"])
        claim, lapsed = (queues.claim("requests", **HOLD, limit=1) for _ in range(2))
        posts = (Post("responses", "made"),)

        settled = queues.settle(claim, [Settlement(claim.messages[0], posts)] * 2)
        clock.advance(60)
        settle_all(queues, lapsed, *posts)

        assert len(settled.deleted) == queues.stats("responses").total == 1

    def test_a_renewal_lets_what_was_purged_leave_the_claim(self, queues):
        queues.post("requests", ["purged"])
        claim = queues.claim("requests", **HOLD, limit=1)
        queues.purge("requests")

        with pytest.raises(ClaimLost, match="expired or was released"):
            queues.renew(claim)
        assert claim.messages == ()

    def test_a_claim_does_not_read_through_what_others_hold_nor_through_all_that_wait(self, path):
        with SqliteQueues(path) as queues:
            for _ in range(6):
                queues.post("requests", ["x" * 500] * 1_000)
            for _ in range(150):
                queues.claim("requests", ttl=43_200, grace=60, limit=20)
        with disk_double() as disk, SqliteQueues(path) as queues:
            queues.create("requests")
            disk.reads = 0

            assert len(queues.claim("requests", **HOLD, limit=10).messages) == 10

            assert 0 < disk.reads < 60  # pages; the messages take 900


class TestBodies:
    @pytest.mark.parametrize(("stored", "body"), [(b"NaN", "NaN"), (b"", ""), (b"{\xff}", "{\ufffd}")])
    def test_what_another_program_or_a_fault_wrote_is_delivered_and_holds_up_nothing(self, path, queues, stored, body):
        queues.post("requests", ["placeholder"])
        execute(path, "UPDATE messages SET body = ?", stored)

        claim = queues.claim("requests", **HOLD, limit=1)

        assert bodies(claim) == bodies(queues.browse("requests")[0]) == [body]
        assert settle_all(queues, claim, Post("dead-letters", {"body": body})).deleted


class TestWaiting:
    @pytest.mark.parametrize("poster", ["this object", "another process"])
    def test_a_post_is_noticed_long_before_the_next_look_for_what_time_has_freed(
        self, path, background, poster, monkeypatch
    ):
        monkeypatch.setattr("claim_queues.sqlite.LOOK_AGAIN_S", NEVER_S)
        with SqliteQueues(path) as queues, SqliteQueues(path) as other:
            queues.create("requests")
            for number in range(60):
                looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
                assert is_waiting(looking, 0.01)
                (queues if poster == "this object" else other).post("requests", [number])
                assert bodies(looking.result(SOON_S)) == [number]

    def test_a_browser_that_waits_for_a_missing_file_sees_what_is_posted_to_it(self, path, background):
        with SqliteQueues(path) as queues, SqliteQueues(path) as other:
            looking = background.submit(queues.browse, "responses", wait=NEVER_S)
            assert is_waiting(looking)

            other.post("responses", ["made"])

            assert bodies(looking.result(SOON_S)[0]) == ["made"]

    def test_a_consumer_notices_a_file_that_is_removed_while_it_waits(self, path, queues, background):
        queues.create("requests")
        looking = background.submit(queues.claim, "requests", **HOLD, limit=1, wait=NEVER_S)
        assert is_waiting(looking)

        path.unlink()

        with pytest.raises(StoreError, match="removed or replaced"):
            looking.result(SOON_S)

    def test_an_idle_wait_takes_little_time_of_the_processor(self, queues):
        queues.create("requests")
        started = time.thread_time()

        assert queues.claim("requests", **HOLD, limit=1, wait=2) is None

        assert time.thread_time() - started < 0.4
