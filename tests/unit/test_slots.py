"""Slots: as many messages are claimed as there will soon be slots for, and a maker that asks for patience gets it."""

import threading

import pytest

from widgets.delivery import Answer
from widgets.slots import Slots

TOO_MANY = Answer(status=429)


@pytest.fixture
def make_slots():
    made = []

    def make(count, batch=1):
        made.append(Slots(count, batch))
        return made[-1]

    yield make
    for slots in made:
        slots.stop()
        slots.close()


@pytest.fixture
def now(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    return clock


def test_as_many_messages_as_slots_are_wanted_until_it_is_known_how_long_a_post_takes(make_slots):
    slots = make_slots(8)

    assert slots.reserve(20) == 8


def test_what_is_asked_for_counts_as_held(make_slots):
    slots = make_slots(8)
    slots.reserve(20)
    slots.claimed(8, 8)
    slots.ended(3)

    assert slots.reserve(20) == 3


def test_a_slot_that_finishes_four_in_a_second_is_claimed_for_four_times_ahead(make_slots):
    slots = make_slots(2)
    slots.took(0.25)

    assert slots.reserve(20) == 2 * (1 + 4)


def test_slow_posts_are_not_claimed_for_ahead(make_slots):
    slots = make_slots(8)
    slots.took(5.0)

    assert slots.reserve(20) == 8


def test_batches_want_so_many_messages_for_each_slot(make_slots):
    assert make_slots(2, batch=5).reserve(20) == 10


def test_one_thread_asks_at_a_time_and_one_more_for_each_full_claim(make_slots):
    slots = make_slots(8)
    slots.took(0.01)
    second = threading.Event()

    def ask():
        slots.reserve(5)
        second.set()

    assert slots.reserve(5) == 5
    other = threading.Thread(target=ask)
    other.start()
    assert not second.wait(0.2)

    slots.claimed(5, 5)
    assert second.wait(10)
    assert slots.reserve(5) == 5  # two may ask now
    other.join()


def test_nobody_waits_after_a_stop(make_slots):
    slots = make_slots(1)
    slots.reserve(1)
    found = []
    waiting = threading.Thread(target=lambda: found.append(slots.reserve(1)))
    waiting.start()
    slots.stop()
    waiting.join(10)

    assert found == [0]
    with slots.turn():
        pass


def test_one_message_that_is_answered_429_stops_nothing(make_slots, now):
    slots = make_slots(4)
    for _ in range(3):
        slots.busy("alone", TOO_MANY, now[0])

    assert slots.reserve(20) == 4


def test_two_different_messages_in_a_row_pause_all_claims(make_slots, now):
    slots = make_slots(4)
    slots.busy("a", Answer(status=429, retry_after=7), now[0])
    slots.busy("b", Answer(status=429, retry_after=7), now[0])
    found = []
    asking = threading.Thread(target=lambda: found.append(slots.reserve(20)))
    asking.start()
    for seconds in (0, 6):
        now[0] += seconds
        slots.ended(0)  # anything that changes
        asking.join(0.2)
        assert not found

    now[0] += 2
    slots.ended(0)  # anything that changes
    asking.join(10)
    assert found == [4]


def test_a_pass_between_two_answers_429_means_no_pause(make_slots, now):
    slots = make_slots(4)
    slots.busy("a", TOO_MANY, now[0])
    slots.passed()
    slots.busy("b", TOO_MANY, now[0])

    assert slots.reserve(20) == 4


def test_the_number_of_posts_at_once_is_halved_once_and_grows_again_with_passes(make_slots, now):
    slots = make_slots(8)
    began_at = now[0]
    for id_ in "abcdef":
        slots.busy(id_, Answer(status=429, retry_after=1), began_at)
    now[0] += 100

    assert in_flight_at_most(slots, 8) == 4
    for _ in range(5):
        slots.passed()
    assert in_flight_at_most(slots, 8) == 5


def in_flight_at_most(slots, threads):
    """How many of the threads get a turn at once."""
    started, ends = threading.Semaphore(0), threading.Event()
    most = [0]

    def post():
        with slots.turn():
            most[0] = max(most[0], slots.running)
            started.release()
            ends.wait(10)

    running = [threading.Thread(target=post) for _ in range(threads)]
    for thread in running:
        thread.start()
    while started.acquire(timeout=0.3):
        pass
    ends.set()
    for thread in running:
        thread.join()
    return most[0]
