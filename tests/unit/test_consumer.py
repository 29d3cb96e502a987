"""A consumer on queues that fail and on claims that end, with a maker that answers as a test says."""

import threading
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import pytest
from doubles.troubled_queues import TroubledQueues, times
from rig import OPTIONS, execute, working
from structlog.testing import capture_logs
from support import wait_until

from claim_queues import ClaimLost, QueueForbidden, QueueNotFound, QueueUnavailable, StoreError
from claim_queues.sqlite import SqliteQueues
from receive_counts import ReceiveCounts, Receives
from widget_consumer import Consumer
from widgets.delivery import Answer, Failure

CREATED = Answer("created", status=201)
FAILED = Answer(failure=Failure.FAILED, status=500, reason="HTTP 500")
CUT = Answer(failure=Failure.CUT, reason="connection reset")


class FakeMaker:
    """Creates each widget, unless `answers` has another answer for it; an Event among them is waited for first, and a
    function is asked. asked: how often for its health."""

    takes_batches = True

    def __init__(self, deadline):
        self.deadline = deadline
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


class Rig:
    """A consumer that runs in a thread, and what it works with. more: options other than usual, and limits.

    deadline: the maker's.
    """

    def __init__(self, directory, closing, *, limits=None, deadline=5, **more):
        self.file = directory / "queues.sqlite3"
        self.real = closing.enter_context(SqliteQueues(self.file))
        self.queues = TroubledQueues(self.real, replace(self.real.limits, **limits or {}))
        self.maker = FakeMaker(deadline)
        self.counts = ReceiveCounts(directory / "counts.sqlite3", "requests")
        closing.callback(self.counts.close)
        self.options = SimpleNamespace(**vars(OPTIONS) | more)

    def running(self):
        self.consumer = Consumer(self.queues, self.maker, self.counts, self.options)
        return working(self.consumer)

    def post(self, *ids, died=0):
        """died: as if their consumer had died so often at each."""
        posted = self.real.post("requests", [{"widget_id": id_} for id_ in ids])
        for _ in range(died):
            self.counts.begin(posted)
        return posted

    def received(self, id_):
        """What the file has of the message."""
        return self.counts.of([id_]).get(id_, Receives())

    def hurry(self):
        """Let what stays away for a backoff come back at once."""
        execute(self.file, "UPDATE messages SET held_until = 0 WHERE claim IS NULL")

    def outcomes(self):
        return sorted((m.body["widget_id"], m.body["outcome"]) for m in self.real.browse("responses", limit=1000)[0])

    def left(self):
        return self.real.stats("requests")


@pytest.fixture
def make_rig(tmp_path):
    with ExitStack() as closing:
        yield partial(Rig, tmp_path, closing)


def test_what_fails_each_time_is_a_dead_letter_after_max_receives_and_the_counts_of_all_are_forgotten(make_rig):
    rig = make_rig(max_receives=2)
    rig.maker.answers |= {"bad": Answer("rejected", status=422), "fails": FAILED}
    ids = rig.post("a", "bad", "fails")
    with rig.running():
        wait_until(lambda: rig.left().total == 0)

    assert rig.maker.posted.count("fails") == 2
    assert rig.outcomes() == [("a", "created"), ("bad", "rejected"), ("fails", "failed")]
    assert [rig.received(id_).receives for id_ in ids] == [0, 0, 0]


@pytest.mark.parametrize("operation", ["claim", "settle", "release"])
def test_a_service_that_fails_for_a_time_is_asked_again_and_said_once(make_rig, operation):
    rig = make_rig()
    rig.maker.answers["fails"] = FAILED
    rig.queues.fails[operation] = times(3, QueueUnavailable("no route to it"))
    rig.post("a", "fails")
    released = 4 if operation == "release" else 1
    with capture_logs() as logs, rig.running():
        wait_until(lambda: ("a", "created") in rig.outcomes() and rig.queues.calls["release"] >= released)
        wait_until(lambda: operation not in rig.consumer.trouble.reasons)

    events = [entry["event"] for entry in logs if entry.get("what") == operation]
    assert events == ["the queue service fails: trying again", "the queue service is back"]


@pytest.mark.parametrize(
    ("operation", "error", "is_drain"),
    [
        ("claim", QueueForbidden("ReceiveMessage denied"), False),
        ("claim", QueueNotFound("requests is gone"), True),
        ("settle", StoreError("disk full"), False),
    ],
)
def test_an_error_that_does_not_pass_ends_the_consumer(make_rig, operation, error, is_drain):
    rig = make_rig(drain=is_drain)
    rig.queues.fails[operation] = lambda: error
    rig.post("a")
    with pytest.raises(type(error)), rig.running() as work:
        wait([work], 30)

    assert rig.left().total == 1


def test_queues_that_are_gone_are_looked_for_and_the_work_goes_on(make_rig):
    rig = make_rig(create=True)
    rig.queues.fails["claim"] = times(1, QueueNotFound("requests is gone"))
    rig.post("a")
    with rig.running():
        wait_until(lambda: rig.outcomes() == [("a", "created")])

    assert rig.queues.calls["exists"] == 3


def test_a_drain_waits_for_what_others_hold(make_rig):
    rig = make_rig(drain=True)
    rig.post("held")
    others = rig.real.claim("requests", ttl=60, grace=60, limit=1)
    with capture_logs() as logs, rig.running() as work:
        wait_until(lambda: any("waiting" in entry["event"] for entry in logs))
        assert not work.done()
        rig.real.release(others)
        work.result(30)

    assert rig.outcomes() == [("held", "created")]


def test_a_lost_claim_takes_its_charges_back_and_what_failed_for_it_is_no_trouble_any_more(make_rig):
    rig = make_rig(claim_ttl=55, deadline=45)  # the claim hardly outlasts a POST: renewed at every look
    hanging, lost = threading.Event(), threading.Event()
    rig.maker.answers["slow"] = hanging
    rig.queues.fails["settle"] = rig.queues.fails["renew"] = lambda: QueueUnavailable("down")
    ids = rig.post("a", "slow")
    with capture_logs() as logs, rig.running():
        wait_until(lambda: rig.consumer.trouble.reasons.keys() == {"settle", "renew"})
        rig.queues.fails["claim"] = lambda: QueueUnavailable("down")
        rig.queues.fails["renew"] = lambda: lost.set() or ClaimLost("expired")
        assert lost.wait(30)
        del rig.queues.fails["settle"]
        hanging.set()
        wait_until(lambda: rig.consumer.trouble.reasons.keys() <= {"claim"})

    assert [entry["messages"] for entry in logs if "claim lost" in entry["event"]] == [ids]
    assert [entry for entry in logs if "is back" in entry["event"]] == []
    assert [rig.received(id_).charged for id_ in ids] == [0, 0]
    assert rig.outcomes() == []


def test_a_claim_that_is_lost_while_a_post_is_in_flight_is_not_settled(make_rig):
    rig = make_rig(claim_ttl=55, deadline=45)  # renewed at every look
    hanging, lost = threading.Event(), threading.Event()
    rig.maker.answers["slow"] = hanging
    rig.post("slow")
    with rig.running():
        wait_until(lambda: rig.maker.posted)
        rig.queues.fails["renew"] = lambda: lost.set() or ClaimLost("expired")
        assert lost.wait(30)
        hanging.set()

    assert (rig.outcomes(), rig.queues.calls["settle"]) == ([], 0)


def test_a_slow_message_holds_up_no_other_outcome_of_its_claim(make_rig):
    rig = make_rig()
    hanging = rig.maker.answers["slow"] = threading.Event()
    rig.post("slow", "fast")
    with rig.running():
        wait_until(lambda: rig.outcomes() == [("fast", "created")])
        hanging.set()
        wait_until(lambda: rig.outcomes() == [("fast", "created"), ("slow", "created")])


def test_a_stop_finishes_what_is_in_flight_and_frees_what_was_claimed_and_not_posted_at_once(make_rig):
    rig = make_rig(slots=1)
    hanging = rig.maker.answers["slow"] = threading.Event()
    rig.post("warm")  # how long a POST takes is known then, and more is claimed
    with rig.running() as work:
        wait_until(rig.outcomes)
        rig.post("slow", "b", "c", "d")
        wait_until(lambda: "slow" in rig.maker.posted and rig.left().claimed > 1)
        rig.consumer.stop()
        rig.post("late")
        hanging.set()
        work.result(30)

    assert rig.maker.posted == ["warm", "slow"]
    assert rig.outcomes() == [("slow", "created"), ("warm", "created")]
    assert rig.left()[:3] == (4, 0, 0)


def test_an_idle_consumer_stops_at_once(make_rig):
    rig = make_rig(poll_interval=60)
    with rig.running():
        wait_until(lambda: rig.queues.calls["claim"])


def test_a_failure_after_a_stop_is_charged_to_nobody_and_asks_for_no_health(make_rig):
    rig = make_rig()
    hanging = threading.Event()
    rig.maker.answers["a"] = lambda: hanging.wait(30) and FAILED
    (id_,) = rig.post("a")
    with rig.running():
        wait_until(lambda: rig.maker.posted)
        rig.consumer.stop()
        hanging.set()

    assert (rig.received(id_).receives, rig.received(id_).charged, rig.maker.asked) == (1, 0, 0)


@pytest.mark.parametrize("died", [0, 2], ids=["in_a_slot", "before_a_post_in_the_lane"])
def test_no_post_begins_in_a_claim_that_may_not_outlast_it_by_5_seconds(make_rig, died):
    rig = make_rig(claim_ttl=11)  # trusted for 9 s; a POST takes up to 5
    rig.post("a", died=died)
    with rig.running():
        wait_until(lambda: rig.queues.calls["release"])

    assert rig.queues.calls["renew"]
    assert not rig.maker.posted


def test_what_has_left_the_claim_is_not_posted(make_rig):
    rig = make_rig(slots=1, claim_ttl=55, deadline=45)  # renewed at every look
    hanging = rig.maker.answers["slow"] = threading.Event()
    rig.post("warm")
    with rig.running():
        wait_until(rig.outcomes)
        rig.post("slow", "gone", "c")
        wait_until(lambda: "slow" in rig.maker.posted and rig.left().claimed >= 2)
        execute(rig.file, """DELETE FROM messages WHERE CAST(body AS TEXT) LIKE '%"gone"%'""")
        before = rig.queues.calls["renew"]
        wait_until(lambda: rig.queues.calls["renew"] >= before + 2)  # so one of them is over that began after this
        hanging.set()
        wait_until(lambda: rig.left().total == 0)

    assert "gone" not in rig.maker.posted


def test_nothing_is_posted_while_its_receive_cannot_be_counted(make_rig):
    rig = make_rig()
    rig.counts.begin = Mock(side_effect=QueueUnavailable("locked"))
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


def test_a_batch_that_fails_as_a_whole_charges_no_message_and_each_is_posted_alone_under_the_same_claim(make_rig):
    rig = make_rig(post_batch=2)
    releases = []
    rig.maker.answers["a"] = Answer(failure=Failure.UNAVAILABLE, status=429)
    rig.maker.answers["b"] = lambda: releases.append(rig.queues.calls["release"]) or CREATED
    id_, _ = rig.post("a", "b")
    with rig.running():
        wait_until(lambda: rig.outcomes() == [("b", "created")])

    assert releases == [0]
    assert rig.received(id_).charged == 0


def test_what_was_left_open_twice_waits_in_the_lane_for_a_maker_that_is_well_and_is_charged_there(make_rig):
    rig = make_rig()
    rig.maker.answers["killer"] = CUT
    rig.maker.well = False
    rig.post("killer", died=2)
    rig.post("other")
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
    rig.post("k1", "k2", died=2)
    with rig.running():
        wait_until(lambda: rig.queues.calls["release"])
        assert len(rig.maker.posted) == 1
        hanging.set()
        wait_until(lambda: rig.hurry() or rig.left().total == 0)

    assert rig.outcomes() == [("k1", "created"), ("k2", "created")]


def test_settling_is_given_up_ten_seconds_after_a_stop_and_charges_nothing(make_rig, now):
    rig = make_rig()
    rig.queues.fails["settle"] = lambda: QueueUnavailable("gone")
    (id_,) = rig.post("a")
    with rig.running() as work:
        wait_until(lambda: rig.consumer.trouble.reasons.get("settle"))
        rig.consumer.stop()
        for seconds in (0, 9):
            now[0] += seconds
            enough = rig.queues.calls["settle"] + 2
            wait_until(lambda enough=enough: rig.queues.calls["settle"] >= enough or work.done())
        assert not work.done()
        now[0] += 2
        work.result(30)

    assert rig.received(id_).charged == 0
    assert rig.left().total == 1


def test_where_the_service_cannot_delay_a_release_claims_are_kept_until_they_are_due_and_freed_by_a_stop(make_rig):
    rig = make_rig(limits={"release_delay": 0})
    rig.maker.answers = {"a": FAILED, "b": FAILED}
    rig.post("a", "b")
    with rig.running():
        wait_until(lambda: len(rig.maker.posted) >= 3)
        assert rig.left().delayed == 0
        wait_until(lambda: rig.left().claimed == 2)
        rig.queues.fails["release"] = times(1, QueueUnavailable("down"))

    assert rig.left()[:3] == (2, 0, 0)


def test_an_outcome_that_no_queue_accepts_leaves_its_message_queued_and_charged_no_more(make_rig):
    rig = make_rig(max_receives=2)
    (id_,) = rig.real.post("requests", [{"widget_id": "x", "more": "y" * 262_100}])  # a dead letter is too large
    rig.maker.answers["x"] = FAILED
    with capture_logs() as logs, rig.running():
        wait_until(lambda: any("no queue accepts" in entry["event"] for entry in logs))

    assert rig.left().total == 1
    assert rig.received(id_).charged == 5


def test_receive_counts_that_cannot_be_read_now_end_nothing(make_rig):
    rig = make_rig()
    errors = [QueueUnavailable("locked")] * 2
    rig.counts.of = Mock(wraps=rig.counts.of, side_effect=chain(errors, repeat(DEFAULT)))
    rig.post("a", "b")
    with rig.running():
        wait_until(lambda: rig.outcomes() == [("a", "created"), ("b", "created")])


def test_trouble_with_a_renewal_is_over_once_claims_end_well(make_rig):
    rig = make_rig(claim_ttl=55, deadline=45)  # renewed at every look
    rig.queues.fails["renew"] = times(1, QueueUnavailable("down"))
    go_on = rig.maker.answers["slow"] = threading.Event()
    rig.post("slow")
    with rig.running():
        wait_until(lambda: "renew" in rig.consumer.trouble.reasons)
        go_on.set()
        rig.post("quick")
        wait_until(lambda: len(rig.outcomes()) == 2)
        wait_until(lambda: not rig.consumer.trouble.reasons)
