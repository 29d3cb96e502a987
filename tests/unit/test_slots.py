"""Slots: as many messages are claimed as there will soon be slots for, and a maker that asks for patience gets it."""

import threading
from concurrent.futures import Future, wait

import pytest
from support import is_waiting

from widgets.delivery import Answer
from widgets.slots import Slots

TOO_MANY = Answer(status=429)


def asking(slots, most):
    """What another thread gets that asks for messages now: a future."""
    answer = Future()
    threading.Thread(target=lambda: answer.set_result(slots.reserve(most)), daemon=True).start()
    return answer


@pytest.mark.parametrize(
    ("count", "batch", "took", "wanted"),
    [
        (8, 1, None, 8),  # until it is known how long a POST takes
        (8, 1, 5.0, 8),
        (2, 1, 0.25, 10),  # each slot finishes four in a second
        (2, 5, None, 10),
    ],
)
def test_what_slots_will_soon_be_free_for_is_claimed(count, batch, took, wanted):
    slots = Slots(count, batch)
    if took:
        slots.took(took)

    assert slots.reserve(20) == wanted


def test_what_is_asked_for_counts_as_held():
    slots = Slots(8, 1)
    slots.reserve(20)
    slots.claimed(8, 8)
    slots.ended(3)

    assert slots.reserve(20) == 3


def test_one_thread_asks_at_a_time_and_one_more_for_each_full_claim():
    slots = Slots(8, 1)
    slots.took(0.01)
    assert slots.reserve(5) == 5
    second = asking(slots, 5)
    assert is_waiting(second)

    slots.claimed(5, 5)
    assert second.result(30) == 5
    assert asking(slots, 5).result(30) == 5  # two may ask now


def test_nobody_waits_after_a_stop():
    slots = Slots(1, 1)
    slots.reserve(1)
    waiting = asking(slots, 1)
    assert is_waiting(waiting)
    slots.stop()

    assert waiting.result(30) == 0
    with slots.turn():
        pass


def test_one_message_that_is_answered_429_stops_nothing_nor_do_two_with_a_pass_between(now):
    slots = Slots(4, 1)
    for _ in range(3):
        slots.busy("alone", TOO_MANY, now[0])
    slots.passed()
    slots.busy("another", TOO_MANY, now[0])

    assert slots.reserve(20) == 4


def test_two_different_messages_in_a_row_pause_all_claims(now):
    slots = Slots(4, 1)
    slots.busy("a", Answer(status=429, retry_after=7), now[0])
    slots.busy("b", Answer(status=429, retry_after=7), now[0])
    answer = asking(slots, 20)
    for seconds in (0, 6):
        now[0] += seconds
        slots.ended(0)  # anything that changes
        assert is_waiting(answer)

    now[0] += 2
    slots.ended(0)  # anything that changes
    assert answer.result(30) == 4


def test_the_number_of_posts_at_once_is_halved_once_and_grows_again_with_passes(now):
    slots = Slots(8, 1)
    began_at = now[0]
    for id_ in "abcdef":
        slots.busy(id_, Answer(status=429, retry_after=1), began_at)
    now[0] += 100

    assert are_at_once(4, slots)
    for _ in range(5):
        slots.passed()
    assert are_at_once(5, slots)


def are_at_once(wanted, slots):
    """Whether so many of eight POSTs get a turn at once, and no more."""
    begun, end = threading.Semaphore(0), threading.Event()

    def post():
        with slots.turn():
            begun.release()
            end.wait(60)

    posts = [slots.submit(post, 0) for _ in range(8)]
    try:
        return all(begun.acquire(timeout=30) for _ in range(wanted)) and not begun.acquire(timeout=0.3)
    finally:
        end.set()
        wait(posts)
