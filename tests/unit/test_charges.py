"""Charges: what a failure is charged, and how long its message stays away."""

import statistics
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest

from claim_queues import Message
from receive_counts import ReceiveCounts, Receives
from widgets.breaker import Breaker
from widgets.charges import Charges, backoff, release_delay
from widgets.delivery import Answer, Delivery, Failure
from widgets.monitoring import Metrics
from widgets.slots import Slots

FAILED = Answer(failure=Failure.FAILED, status=500)
REFUSED = Answer(failure=Failure.UNAVAILABLE)
GATEWAY = Answer(failure=Failure.UNAVAILABLE, status=502)
LATE, CUT = Answer(failure=Failure.LATE), Answer(failure=Failure.CUT)
WRONG = Answer(failure=Failure.MISCONFIGURED, status=404)


@contextmanager
def judging(directory, *, is_healthy=True):
    """Charges, and the receive counts and the breaker that they work with."""
    maker = SimpleNamespace(is_well=lambda since: is_healthy)
    counts, breaker, slots = ReceiveCounts(directory / "counts.sqlite3", "q"), Breaker(), Slots(1, 1)
    with closing(counts), closing(slots):
        yield Charges(counts, maker, breaker, slots, Metrics(), most=5), counts, breaker


def judged(charges, counts, answer, *, id_="m", posted_at=0.0, is_alone=False):
    """What a message that was POSTed once, and answered so, is charged in fifths, and how often it was left open."""
    [delivery] = charges.deliveries([Message(id_, {"widget_id": "w"}, 0.0)])
    assert charges.begin([delivery])
    delivery.answer = answer
    charges.judge([delivery], posted_at, is_alone=is_alone)
    return counts.of([id_])[id_].charged, counts.of([id_])[id_].open


@pytest.mark.parametrize(
    ("answer", "is_healthy", "is_alone", "charged", "left_open"),
    [
        (FAILED, True, False, 5, 0),
        (REFUSED, True, False, 1, 0),
        (GATEWAY, True, False, 1, 0),
        (LATE, True, False, 1, 0),
        (CUT, True, False, 0, 1),
        (WRONG, True, False, 0, 0),
        (FAILED, False, False, 0, 0),
        (GATEWAY, False, False, 0, 1),
        (LATE, False, False, 0, 1),
        (CUT, True, True, 5, 1),
        (LATE, True, True, 5, 0),
        (GATEWAY, False, True, 5, 1),
        (REFUSED, True, True, 1, 0),
    ],
)
def test_a_failure_is_charged_by_its_class_and_leaves_open_what_may_kill_the_maker(
    tmp_path, answer, is_healthy, is_alone, charged, left_open
):
    with judging(tmp_path, is_healthy=is_healthy) as (charges, counts, _):
        assert judged(charges, counts, answer, is_alone=is_alone) == (charged, left_open)


def test_where_ten_different_messages_in_a_row_get_no_answer_in_the_lane_no_more_is_charged(tmp_path):
    with judging(tmp_path) as (charges, counts, breaker):
        found = [judged(charges, counts, CUT, id_=f"m{number}", is_alone=True) for number in range(12)]
        assert [charged for charged, _ in found] == [5] * 9 + [0] * 3

        breaker.passed(time.monotonic())
        assert judged(charges, counts, CUT, id_="another", is_alone=True) == (5, 1)


def test_a_wrong_answer_is_charged_a_fifth_where_another_message_passed_meanwhile(tmp_path):
    with judging(tmp_path) as (charges, counts, breaker):
        before = time.monotonic()
        breaker.passed(before)

        assert judged(charges, counts, WRONG, posted_at=time.monotonic()) == (0, 0)
        assert judged(charges, counts, WRONG, posted_at=before - 1) == (1, 0)


def delivery(*, took=0.0, receives=1, backoff=0.0, retry_after=0):
    message = Message("m", {"widget_id": "w"}, 0.0)
    answer = Answer(failure=Failure.UNAVAILABLE, retry_after=retry_after)
    return Delivery(message, Receives(), Receives(receives), answer, took=took, backoff=backoff)


@pytest.mark.parametrize(
    ("took", "receives", "is_charged", "is_well", "seconds"),
    [
        (0.0, 4, True, True, 8),  # half a second, doubled at each receive
        (3.0, 2, True, True, 12),  # what its POST took, where that is longer
        (0.0, 30, True, True, 300),
        (0.0, 30, False, True, 10),  # nothing charged: ten times what the POST took, at least 10 s
        (4.0, 30, False, True, 40),
        (90.0, 30, False, True, 300),
        (4.0, 30, False, False, 10),  # the maker is not well
    ],
)
def test_a_backoff_is_doubled_at_each_receive_up_to_a_limit(took, receives, is_charged, is_well, seconds):
    found = backoff(delivery(took=took, receives=receives), is_charged=is_charged, is_well=is_well)

    assert found == seconds


@pytest.mark.parametrize(
    ("backoffs", "longest"),
    [([4.0], 4), ([300.0], 300), ([2.0, 300.0], 10), ([0.0, 6.0], 6), ([60.0, 300.0], 60)],
)
def test_a_claim_comes_back_within_its_longest_backoff_but_keeps_no_short_one_over_10_seconds(backoffs, longest):
    found = [release_delay([delivery(backoff=seconds) for seconds in backoffs]) for _ in range(400)]

    assert 0 <= min(found) < longest / 4
    assert longest * 3 / 4 < max(found) <= longest
    assert statistics.mean(found) == pytest.approx(longest / 2, rel=0.25)


@pytest.mark.parametrize(
    ("asked", "others", "seconds"),
    [
        (delivery(backoff=2.0, retry_after=30), [], 30),
        (delivery(backoff=1.0, retry_after=200), [delivery(backoff=1.0)], 10),
    ],
)
def test_a_claim_does_not_come_back_before_its_retry_after_but_keeps_others_for_10_seconds_at_most(
    asked, others, seconds
):
    assert {release_delay([asked, *others]) for _ in range(50)} == {seconds}


def test_the_tenth_different_message_in_a_row_takes_back_what_the_others_were_charged(tmp_path):
    ids = [f"m{number}" for number in range(10)]
    with judging(tmp_path) as (charges, counts, _):
        found = [judged(charges, counts, FAILED, id_=id_) for id_ in ids]
        left = [receives.charged for receives in counts.of(ids).values()]

    assert found == [(5, 0)] * 9 + [(0, 0)]
    assert left == [0] * 10
