"""Claims and looks wait for a first message; the wait ends with a message, with its time, or on request."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from backends import bodies, skip_unless
from support import is_waiting

LONG_S, SOON_S = 40, 20
"""The second is long before the first, and long enough for a busy machine."""


@pytest.fixture
def background():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(params=["claim", "browse"])
def look(request, queues, queue, limits, claim):
    """Look for a message in one of the two ways that can wait; gives the bodies."""
    if request.param == "claim":
        return lambda seconds: bodies(claim(queues, 2, wait=seconds))
    skip_unless(limits.can_browse, "cannot look without claiming")
    return lambda seconds: bodies(queues.browse(queue, wait=seconds)[0])


def test_a_post_by_another_process_ends_a_wait_in_which_other_threads_use_the_object(
    queues, rival, queue, other_queue, look, background
):
    looking = background.submit(look, LONG_S)
    assert is_waiting(looking)

    queues.post(other_queue, ["elsewhere"])
    assert is_waiting(looking)
    rival.post(queue, ["new"])

    assert looking.result(SOON_S) == ["new"]


@pytest.mark.parametrize("end", ["a release", "its claim TTL"])
def test_the_end_of_another_claim_ends_a_wait(service, queues, rival, queue, claim, background, end):
    rival.post(queue, ["free again"])
    held = claim(rival)
    looking = background.submit(claim, queues, wait=LONG_S)
    assert is_waiting(looking)

    if end == "a release":
        rival.release(held)
    else:
        service.advance(61)

    assert bodies(looking.result(SOON_S)) == ["free again"]


def test_a_wait_that_nothing_ends_takes_its_time_and_finds_nothing(look):
    started = time.monotonic()

    assert look(1) == []
    assert 0.9 <= time.monotonic() - started < SOON_S


def test_stop_waiting_ends_this_wait_and_every_later_one_and_nothing_else(
    queues, rival, queue, look, claim, background
):
    looking = background.submit(look, LONG_S)
    assert is_waiting(looking)

    queues.stop_waiting()

    assert looking.result(SOON_S) == []
    started = time.monotonic()
    assert look(LONG_S) == []
    assert time.monotonic() - started < SOON_S
    looking = background.submit(claim, rival, wait=LONG_S)
    assert is_waiting(looking)
    rival.stop_waiting()
    assert looking.result(SOON_S) is None
    queues.post(queue, ["there"])
    assert look(LONG_S) == ["there"]
