"""The breaker tells a bad message from a bad maker, by the row of different messages that failed."""

import threading

import pytest

from widgets.breaker import Breaker
from widgets.delivery import Answer, Failure

FAILED = Answer(failure=Failure.FAILED, status=500, reason="HTTP 500")
REFUSED = Answer(failure=Failure.UNAVAILABLE, reason="connection refused")
WRONG = Answer(failure=Failure.MISCONFIGURED, status=404, reason="HTTP 404")


@pytest.fixture
def now(monkeypatch):
    """The monotonic clock, moved by hand."""
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    return clock


def fail(breaker, id_, answer=FAILED, *, charge=5, is_well=True):
    return breaker.failed(id_, answer, charge, is_well=is_well)


def test_ten_different_messages_in_a_row_open_it_and_take_back_what_they_were_charged(now):
    breaker = Breaker()
    for number in range(9):
        fail(breaker, f"m{number}")
    fail(breaker, "m0")
    assert not breaker.is_open

    charge, back = fail(breaker, "m9")

    assert breaker.is_open
    assert charge == 0
    assert back == {"m0": -10} | {f"m{number}": -5 for number in range(1, 9)}
    assert fail(breaker, "m1") == (0, {})


def test_one_message_that_fails_again_and_again_never_opens_it(now):
    breaker = Breaker()
    for _ in range(30):
        fail(breaker, "alone")

    assert not breaker.is_open


def test_a_pass_empties_the_row(now):
    breaker = Breaker()
    for number in range(9):
        fail(breaker, f"m{number}")
    breaker.passed(now[0])
    fail(breaker, "m9")

    assert not breaker.is_open


def test_a_wrong_answer_before_the_first_pass_opens_it_at_once(now):
    breaker = Breaker()
    fail(breaker, "a", WRONG)

    assert breaker.is_open
    assert "404" in breaker.reason


def test_only_a_post_that_began_after_it_opened_closes_it(now):
    breaker = Breaker()
    fail(breaker, "a", WRONG)
    breaker.passed(now[0] - 1)
    assert breaker.is_open

    now[0] += 1
    breaker.passed(now[0])
    assert not breaker.is_open


def test_there_is_a_pause_before_each_try_unless_only_messages_fail(now):
    breaker = Breaker()
    for number in range(10):
        fail(breaker, f"m{number}")
    assert breaker.next_pause() == 0

    fail(breaker, "m0", REFUSED, is_well=False)
    assert 0 < max(breaker.next_pause() for _ in range(50)) <= 10


def test_it_is_hopeless_while_it_is_open_and_waiting_does_not_help(now):
    breaker = Breaker()
    fail(breaker, "a", WRONG)
    since = now[0]
    now[0] += 30
    fail(breaker, "b", WRONG)
    assert breaker.hopeless_since == since

    fail(breaker, "b", REFUSED, is_well=False)
    assert breaker.hopeless_since is None


def test_while_it_is_open_one_claim_at_a_time_is_tried():
    breaker = Breaker()
    fail(breaker, "a", WRONG)
    order = []

    def try_another():
        with breaker.turn() as is_try:
            order.append(is_try)

    with breaker.turn() as is_try:
        breaker.tries("claim")
        assert is_try
        assert breaker.lets("claim")
        assert not breaker.lets("another")
        other = threading.Thread(target=try_another)
        other.start()
        other.join(0.2)
        assert order == []
    other.join(10)

    assert order == [True]


def test_others_go_on_as_soon_as_it_closes(now):
    breaker = Breaker()
    fail(breaker, "a", WRONG)
    now[0] += 1
    gone_on = threading.Event()

    def go_on():
        with breaker.turn() as is_try:
            assert not is_try
            gone_on.set()

    with breaker.turn():
        other = threading.Thread(target=go_on)
        other.start()
        breaker.passed(now[0])
        assert gone_on.wait(10)
        assert breaker.lets("any")
    other.join()
