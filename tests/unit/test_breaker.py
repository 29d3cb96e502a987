"""The breaker tells a bad message from a bad maker, by the row of different messages that failed."""

import threading
from concurrent.futures import Future

from support import is_waiting

from widgets.breaker import Breaker
from widgets.delivery import Answer, Failure

FAILED = Answer(failure=Failure.FAILED, status=500, reason="HTTP 500")
REFUSED = Answer(failure=Failure.UNAVAILABLE, reason="connection refused")
WRONG = Answer(failure=Failure.MISCONFIGURED, status=404, reason="HTTP 404")


def fail(breaker, id_, answer=FAILED, *, charge=5, is_well=True):
    return breaker.failed(id_, answer, charge, is_well=is_well)


def test_ten_different_messages_in_a_row_open_it_and_take_back_what_they_were_charged(now):
    breaker = Breaker()
    for number in range(9):
        fail(breaker, f"before{number}")
    breaker.passed(now[0])
    for number in range(9):
        fail(breaker, f"m{number}")
    fail(breaker, "m0")
    assert not breaker.is_open

    charge, back = fail(breaker, "m9")

    assert breaker.is_open
    assert charge == 0
    assert back == {"m0": -10} | {f"m{number}": -5 for number in range(1, 9)}
    assert fail(breaker, "m1") == (0, {})


def test_only_a_post_that_began_after_it_opened_closes_it(now):
    breaker = Breaker()
    fail(breaker, "a", WRONG)  # opens it at once, because nothing has passed yet
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


def next_turn(breaker):
    """Whether the turn that another thread now waits for is a try: a future."""
    found = Future()

    def take():
        with breaker.turn() as is_try:
            found.set_result(is_try)

    threading.Thread(target=take, daemon=True).start()
    return found


def test_while_it_is_open_one_claim_at_a_time_is_tried_and_others_go_on_as_soon_as_it_closes(now):
    breaker = Breaker()
    fail(breaker, "a", WRONG)

    with breaker.turn() as is_try:
        breaker.tries("claim")
        assert is_try
        assert breaker.lets("claim")
        assert not breaker.lets("another")
        second = next_turn(breaker)
        assert is_waiting(second)
    assert second.result(30) is True

    with breaker.turn():
        third = next_turn(breaker)
        assert is_waiting(third)
        breaker.passed(now[0])
        assert third.result(30) is False
        assert breaker.lets("any")
