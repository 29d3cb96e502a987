"""A consumer on queues that fail and on claims that end, with a maker that answers as a test says."""

import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import apsw
import pytest
from doubles.troubled_queues import TroubledQueues, times
from structlog.testing import capture_logs
from support import wait_until

from claim_queues import ClaimLost, QueueForbidden, QueueNotFound, QueueUnavailable, StoreError
from claim_queues.sqlite import SqliteQueues
from receive_counts import ReceiveCounts, Receives
from widget_consumer import Consumer
from widgets.delivery import Answer, Failure

OPTIONS = SimpleNamespace(
    request_queue="requests",
    queues=["requests", "responses", "letters"],
    create=False,
    claim_ttl=60,
    grace=60,
    poll_interval=0.05,
    claim_limit=20,
    slots=2,
    post_batch=1,
    max_receives=5,
    response_ttl=3600,
    drain=False,
    drain_timeout=None,
)
CREATED = Answer("created", status=201)
FAILED = Answer(failure=Failure.FAILED, status=500, reason="HTTP 500")
CUT = Answer(failure=Failure.CUT, reason="connection reset")


class FakeMaker:
    """Creates each widget, unless `answers` has another answer for it; an Event among them is waited for first, and a
    function is asked. asked: how often for its health."""

    deadline = 5.0
    takes_batches = True

    def __init__(self):
        self.answers = {}
        self.posted = []
        self.well, self.asked = True, 0

    def post(self, delivery, queue):
        self.posted.append(delivery.widget_id)
        answer = self.answers.get(delivery.widget_id, CREATED)
        if isinstance(answer, threading.Event):
            assert answer.wait(30)
            return CREATED
        return answer() if callable(answer) else answer

    def post_batch(self, group):
        return FAILED

    def is_well(self, since):
        self.asked += 1
        return self.well


class LockedCounts(ReceiveCounts):
    """Another process keeps the file locked whenever a receive is to be counted."""

    def begin(self, ids):
        raise QueueUnavailable("locked")


class Rig:
    """A consumer that runs in a thread, and what it works with."""

    def __init__(self, directory, options=OPTIONS, limits=None):
        self.clock_ahead = 0.0
        self.file = directory / "queues.sqlite3"
        self.real = SqliteQueues(self.file, clock=lambda: time.time() + self.clock_ahead)
        self.queues = TroubledQueues(self.real, limits and replace(self.real.limits, **limits))
        self.maker = FakeMaker()
        self.counts = ReceiveCounts(directory / "counts.sqlite3", "requests")
        self.options = options
        self.error = None

    def post(self, *ids):
        return self.real.post("requests", [{"widget_id": id_} for id_ in ids])

    def open_twice(self, id_):
        """Count two receives of a message as if its consumer had died at each."""
        self.counts.begin([id_])
        self.counts.begin([id_])

    def received(self, id_):
        """What the file has of the message."""
        return self.counts.of([id_]).get(id_, Receives())

    def execute(self, statement):
        """Change the queue's file as time or another process would."""
        with closing(apsw.Connection(str(self.file))) as file:
            file.set_busy_timeout(10_000)
            file.execute(statement)

    def hurry(self):
        """Let what stays away for a backoff come back at once."""
        self.execute("UPDATE messages SET held_until = 0 WHERE claim IS NULL")

    def outcomes(self):
        return sorted((m.body["widget_id"], m.body["outcome"]) for m in self.real.browse("responses", limit=1000)[0])

    def left(self):
        return self.real.stats("requests")

    @contextmanager
    def running(self):
        self.consumer = Consumer(self.queues, self.maker, self.counts, self.options)

        def run():
            try:
                self.consumer.run()
            except Exception as error:
                self.error = error

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield thread
        finally:
            self.consumer.stop()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def make_rig(tmp_path):
    made = []

    def make(**changes):
        limits = changes.pop("limits", None)
        made.append(Rig(tmp_path, SimpleNamespace(**vars(OPTIONS) | changes), limits))
        return made[-1]

    yield make
    for rig in made:
        rig.real.close()
        rig.counts.close()


def test_every_message_gets_its_outcome_and_its_count_is_forgotten(make_rig):
    rig = make_rig()
    rig.maker.answers["bad"] = Answer("rejected", status=422, reason="no")
    ids = rig.post("a", "bad", "c")
    with rig.running():
        wait_until(lambda: rig.left().total == 0)

    assert rig.outcomes() == [("a", "created"), ("bad", "rejected"), ("c", "created")]
    assert [rig.received(id_).receives for id_ in ids] == [0, 0, 0]


def test_what_is_not_a_request_is_a_dead_letter_without_a_post(make_rig):
    rig = make_rig()
    rig.real.post("requests", [["no", "request"]])
    with rig.running():
        wait_until(lambda: rig.left().total == 0)

    (letter,) = rig.real.browse("letters")[0]
    assert letter.body["body"] == ["no", "request"]
    assert "not a request" in letter.body["reason"]
    assert not rig.maker.posted


@pytest.mark.parametrize("operation", ["claim", "settle", "release"])
def test_a_service_that_fails_for_a_time_is_asked_again_and_said_once(make_rig, operation):
    rig = make_rig()
    rig.maker.answers["fails"] = FAILED
    rig.queues.fails[operation] = times(3, QueueUnavailable("no route to it"))
    rig.post("a", "fails")
    with capture_logs() as logs, rig.running():
        wait_until(
            lambda: (
                rig.outcomes() == [("a", "created")] and rig.queues.calls["release"] >= 1 + (operation == "release") * 3
            )
        )
        wait_until(lambda: operation not in rig.consumer.trouble.reasons)

    events = [entry["event"] for entry in logs if entry.get("what") == operation]
    assert events == ["the queue service fails: trying again", "the queue service is back"]


def test_responses_that_are_denied_are_tried_again_and_the_reason_can_be_seen(make_rig):
    rig = make_rig()
    denied = [True]
    rig.queues.fails["settle"] = lambda: QueueForbidden("SendMessage denied") if denied[0] else None
    rig.post("a")
    with rig.running():
        wait_until(lambda: "SendMessage denied" in rig.consumer.trouble.reasons.get("settle", ""))
        assert rig.left().claimed == 1
        denied[0] = False
        wait_until(lambda: rig.outcomes() == [("a", "created")])


def test_a_claim_that_is_refused_ends_the_consumer(make_rig):
    rig = make_rig()
    rig.queues.fails["claim"] = lambda: QueueForbidden("ReceiveMessage denied")
    with rig.running() as thread:
        thread.join(30)

    assert isinstance(rig.error, QueueForbidden)


def test_queues_that_are_gone_are_looked_for_and_the_work_goes_on(make_rig):
    rig = make_rig(create=True)
    rig.queues.fails["claim"] = times(1, QueueNotFound("requests is gone"))
    rig.post("a")
    with rig.running():
        wait_until(lambda: rig.outcomes() == [("a", "created")])

    assert rig.queues.calls["exists"] == 3


def test_a_drain_ends_where_its_queue_is_missing(make_rig):
    rig = make_rig(drain=True)
    rig.queues.fails["claim"] = lambda: QueueNotFound("requests is gone")
    with rig.running() as thread:
        thread.join(30)

    assert isinstance(rig.error, QueueNotFound)


def test_a_drain_ends_when_nothing_is_left(make_rig):
    rig = make_rig(drain=True)
    rig.post(*"abcdef")
    with rig.running() as thread:
        thread.join(30)
        assert not thread.is_alive()

    assert rig.left().total == 0
    assert rig.error is None


def test_a_drain_waits_for_what_others_hold(make_rig):
    rig = make_rig(drain=True)
    rig.post("held")
    others = rig.real.claim("requests", ttl=60, grace=60, limit=1)
    with capture_logs() as logs, rig.running() as thread:
        wait_until(lambda: any("waiting" in entry["event"] for entry in logs))
        assert thread.is_alive()
        rig.real.release(others)
        thread.join(30)

    assert rig.outcomes() == [("held", "created")]


def test_a_claim_whose_renewal_is_refused_is_lost_and_takes_its_charges_back(make_rig):
    rig = make_rig(claim_ttl=15)  # less than twice the deadline and its margin: renewed at every look
    hanging = rig.maker.answers["slow"] = threading.Event()
    rig.queues.fails["renew"] = lambda: ClaimLost("expired")
    (id_,) = rig.post("slow")
    with capture_logs() as logs, rig.running():
        wait_until(lambda: rig.maker.posted)
        rig.clock_ahead = 10.0
        wait_until(lambda: rig.queues.calls["renew"])
        hanging.set()
        wait_until(lambda: any("claim lost" in entry["event"] for entry in logs))
        rig.consumer.stop()

    assert rig.outcomes() == []
    assert rig.received(id_).charged == 0


def test_what_failed_for_a_claim_that_is_lost_is_no_trouble_any_more_and_is_not_said_to_be_back(make_rig):
    rig = make_rig(claim_ttl=15)  # less than twice the deadline and its margin: renewed at every look
    is_lost = threading.Event()
    for operation in ("settle", "renew"):
        rig.queues.fails[operation] = lambda: ClaimLost("expired") if is_lost.is_set() else QueueUnavailable("down")
    rig.post("a")
    with capture_logs() as logs, rig.running():
        wait_until(lambda: rig.consumer.trouble.reasons.keys() == {"settle", "renew"})
        rig.queues.fails["claim"] = lambda: QueueUnavailable("down")
        is_lost.set()
        wait_until(lambda: rig.consumer.trouble.reasons.keys() <= {"claim"})

    assert [entry for entry in logs if "is back" in entry["event"]] == []


def test_a_slow_message_holds_up_no_other_outcome_of_its_claim(make_rig):
    rig = make_rig()
    hanging = rig.maker.answers["slow"] = threading.Event()
    rig.post("slow", "fast")
    with rig.running():
        wait_until(lambda: rig.outcomes() == [("fast", "created")])
        hanging.set()
        wait_until(lambda: rig.outcomes() == [("fast", "created"), ("slow", "created")])


def test_a_stop_finishes_what_is_in_flight_and_frees_the_rest_at_once(make_rig):
    rig = make_rig(claim_limit=4)
    hanging = rig.maker.answers["a"] = rig.maker.answers["b"] = threading.Event()
    rig.post("a", "b")
    with rig.running() as thread:
        wait_until(lambda: len(rig.maker.posted) == 2)
        rig.post("c")
        rig.consumer.stop()
        hanging.set()
        thread.join(30)

    assert rig.outcomes() == [("a", "created"), ("b", "created")]
    assert rig.left()[:3] == (1, 0, 0)


def test_a_stop_frees_what_was_claimed_and_not_posted_at_once(make_rig):
    rig = make_rig(slots=1)
    hanging = rig.maker.answers["slow"] = threading.Event()
    rig.post("warm")  # how long a POST takes is known then, and more is claimed
    with rig.running() as thread:
        wait_until(rig.outcomes)
        rig.post("slow", "b", "c", "d")
        wait_until(lambda: "slow" in rig.maker.posted and rig.left().claimed == 4)
        rig.consumer.stop()
        hanging.set()
        thread.join(30)

    assert "b" not in rig.maker.posted
    assert rig.left()[:3] == (3, 0, 0)


def test_an_idle_consumer_stops_at_once(make_rig):
    rig = make_rig(poll_interval=20)
    with rig.running() as thread:
        wait_until(lambda: rig.queues.calls["claim"])
        rig.consumer.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_a_failure_after_a_stop_is_charged_to_nobody_and_asks_for_no_health(make_rig):
    rig = make_rig()
    hanging = threading.Event()
    rig.maker.answers["a"] = lambda: hanging.wait(30) and FAILED
    (id_,) = rig.post("a")
    with rig.running() as thread:
        wait_until(lambda: rig.maker.posted)
        rig.consumer.stop()
        hanging.set()
        thread.join(30)

    assert (rig.received(id_).receives, rig.received(id_).charged, rig.maker.asked) == (1, 0, 0)


def test_no_post_begins_in_a_claim_that_may_not_outlast_it_by_5_seconds(make_rig):
    rig = make_rig(claim_ttl=11)  # trusted for 9 s; a POST takes up to 5
    rig.post("a")
    with rig.running():
        wait_until(lambda: rig.queues.calls["release"])

    assert not rig.maker.posted


def test_what_has_left_the_claim_is_not_posted(make_rig):
    rig = make_rig(slots=1, claim_ttl=15)  # renewed at the first look
    hanging = rig.maker.answers["slow"] = threading.Event()
    rig.post("warm")
    with rig.running():
        wait_until(rig.outcomes)
        rig.post("slow", "gone", "c")
        wait_until(lambda: "slow" in rig.maker.posted and rig.left().claimed == 3)
        rig.execute("""DELETE FROM messages WHERE CAST(body AS TEXT) LIKE '%"gone"%'""")
        before = rig.queues.calls["renew"]
        wait_until(lambda: rig.queues.calls["renew"] >= before + 2)  # so one of them is over that began after this
        hanging.set()
        wait_until(lambda: rig.left().total == 0)

    assert "gone" not in rig.maker.posted


def test_nothing_is_posted_while_its_receive_cannot_be_counted(make_rig):
    rig = make_rig()
    rig.counts = LockedCounts(rig.file.with_name("locked.sqlite3"), "requests")
    rig.post("a")
    with rig.running():
        wait_until(lambda: rig.queues.calls["release"])

    assert not rig.maker.posted
    assert rig.left().total == 1


def test_a_failed_message_stays_away_for_a_backoff(make_rig):
    rig = make_rig()
    rig.maker.answers["fails"] = FAILED
    rig.post("fails")
    with rig.running():
        wait_until(lambda: rig.left().delayed)


def test_a_batch_that_fails_as_a_whole_charges_no_message(make_rig):
    rig = make_rig(post_batch=2)
    too_many = Answer(failure=Failure.UNAVAILABLE, status=429)
    rig.maker.answers |= {"a": too_many, "b": too_many}
    ids = rig.post("a", "b")
    with rig.running():
        wait_until(lambda: rig.queues.calls["release"])
        rig.consumer.stop()

    assert [rig.received(id_).charged for id_ in ids] == [0, 0]
    assert all(rig.received(id_).receives >= 2 for id_ in ids)  # in the batch, and alone


def test_what_was_left_open_twice_waits_in_the_lane_for_a_maker_that_is_well_and_is_charged_there(make_rig):
    rig = make_rig()
    rig.maker.answers["killer"] = CUT
    rig.maker.well = False
    killer, _ = rig.post("killer", "other")
    rig.open_twice(killer)
    with rig.running():
        wait_until(lambda: rig.queues.calls["release"])
        assert rig.maker.posted == ["other"]
        rig.maker.well = True
        wait_until(lambda: rig.hurry() or rig.left().total == 0)

    assert rig.maker.posted.count("killer") == 3  # the two before were charged to it as well
    assert rig.outcomes() == [("killer", "failed"), ("other", "created")]


def test_one_post_at_a_time_goes_through_the_lane(make_rig):
    rig = make_rig(claim_limit=1)
    hanging = rig.maker.answers["k1"] = rig.maker.answers["k2"] = threading.Event()
    for id_ in rig.post("k1", "k2"):
        rig.open_twice(id_)
    with rig.running():
        wait_until(lambda: rig.queues.calls["release"])
        assert len(rig.maker.posted) == 1
        hanging.set()
        wait_until(lambda: rig.hurry() or rig.left().total == 0)

    assert rig.outcomes() == [("k1", "created"), ("k2", "created")]


def test_a_claim_is_looked_at_once_more_before_a_post_in_the_lane(make_rig):
    rig = make_rig(claim_ttl=11)
    (id_,) = rig.post("killer")
    rig.open_twice(id_)
    with rig.running():
        wait_until(lambda: rig.queues.calls["release"])

    assert rig.queues.calls["renew"]
    assert not rig.maker.posted


@pytest.mark.slow
def test_settling_is_given_up_ten_seconds_after_a_stop_and_charges_nothing(make_rig, monkeypatch):
    rig = make_rig()
    rig.queues.fails["settle"] = lambda: QueueUnavailable("gone")
    (id_,) = rig.post("a")
    with rig.running() as thread:
        wait_until(lambda: rig.consumer.trouble.reasons.get("settle"))
        rig.consumer.stop()
        thread.join(30)
        assert not thread.is_alive()

    assert rig.received(id_).charged == 0
    assert rig.left().total == 1


def test_where_the_service_cannot_delay_a_release_the_claim_is_kept_until_it_is_due(make_rig):
    rig = make_rig(limits={"release_delay": 0})
    rig.maker.answers["fails"] = FAILED
    rig.post("fails")
    with rig.running():
        wait_until(lambda: len(rig.maker.posted) >= 3)
        assert rig.left().delayed == 0

    assert rig.left()[:3] == (1, 0, 0)


def test_a_message_that_fails_each_time_is_a_dead_letter_after_max_receives(make_rig):
    rig = make_rig(max_receives=2)
    rig.maker.answers["fails"] = FAILED
    rig.post("fails", "a")
    with rig.running():
        wait_until(lambda: rig.left().total == 0)

    assert rig.maker.posted.count("fails") == 2
    assert rig.outcomes() == [("a", "created"), ("fails", "failed")]


def test_an_outcome_that_no_queue_accepts_leaves_its_message_queued(make_rig):
    rig = make_rig(max_receives=2)
    rig.real.post("requests", [{"widget_id": "x", "more": "y" * 262_100}])  # a dead letter of it is too large
    rig.maker.answers["x"] = FAILED
    with capture_logs() as logs, rig.running():
        wait_until(lambda: any("no queue accepts" in entry["event"] for entry in logs))

    assert rig.left().total == 1


def test_a_file_that_cannot_be_used_ends_the_consumer(make_rig):
    rig = make_rig()
    rig.queues.fails["settle"] = lambda: StoreError("disk full")
    rig.post("a")
    with rig.running() as thread:
        thread.join(30)

    assert isinstance(rig.error, StoreError)
    assert rig.left().total == 1


def test_receive_counts_that_cannot_be_read_now_end_nothing(make_rig):
    rig = make_rig()
    fails = times(2, QueueUnavailable("locked"))
    known = rig.counts.of

    def of(ids):
        if error := fails():
            raise error
        return known(ids)

    rig.counts.of = of
    rig.post("a", "b")
    with rig.running():
        wait_until(lambda: rig.outcomes() == [("a", "created"), ("b", "created")])
    assert rig.error is None


def test_trouble_with_a_renewal_is_over_once_claims_end_well(make_rig):
    rig = make_rig(claim_ttl=15)  # renewed at the first look
    rig.queues.fails["renew"] = times(1, QueueUnavailable("down"))
    go_on = rig.maker.answers["slow"] = threading.Event()
    rig.post("slow")
    with rig.running():
        wait_until(lambda: "renew" in rig.consumer.trouble.reasons)
        go_on.set()
        rig.post("quick")
        wait_until(lambda: len(rig.outcomes()) == 2)
        wait_until(lambda: not rig.consumer.trouble.reasons)


def test_claims_that_wait_for_their_release_are_free_after_a_stop_though_the_service_fails_once(make_rig):
    rig = make_rig(limits={"release_delay": 0})
    rig.maker.answers = {"a": FAILED, "b": FAILED}
    rig.post("a", "b")
    with rig.running():
        wait_until(lambda: len(rig.consumer._releases.all()) >= 1)
        rig.queues.fails["release"] = times(1, QueueUnavailable("down"))
    assert rig.left()[:3] == (2, 0, 0)
    assert rig.error is None
