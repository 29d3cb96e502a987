"""Claims and looks wait for a first message; the wait ends with a message, with its time, or on request."""

import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from backends import skip_unless

LONG_S = 40
SOON_S = 20
"""Long before LONG_S, and long enough for a busy machine."""


@pytest.fixture
def background():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(params=["claim", "browse"])
def look(request, service, queue, terms):
    """Look for a message in one of the two ways that can wait; gives the messages."""

    def claim(seconds):
        claim = service.queues.claim(queue, **terms, limit=2, wait=seconds)
        return claim.messages if claim else ()

    def browse(seconds):
        return service.queues.browse(queue, wait=seconds).messages

    skip_unless(request.param == "claim" or service.queues.limits.can_browse, "cannot look without claiming")
    return claim if request.param == "claim" else browse


def is_waiting(looking):
    return not wait([looking], timeout=0.2).done


def test_what_is_there_ends_a_wait_before_it_begins(service, queue, look):
    service.queues.post(queue, ["there"])
    started = time.monotonic()

    assert [m.body for m in look(LONG_S)] == ["there"]
    assert time.monotonic() - started < SOON_S


def test_a_post_by_another_process_ends_a_wait(service, queue, look, background):
    looking = background.submit(look, LONG_S)
    assert is_waiting(looking)

    service.another().post(queue, ["new"])

    assert [m.body for m in looking.result(SOON_S)] == ["new"]


def test_a_release_by_another_process_ends_a_wait(service, queue, terms, look, background):
    other = service.another()
    other.post(queue, ["given back"])
    claim = other.claim(queue, **{**terms, "ttl": max(terms["ttl"], LONG_S)}, limit=1)
    looking = background.submit(look, LONG_S)
    assert is_waiting(looking)

    other.release(claim)

    assert [m.body for m in looking.result(SOON_S)] == ["given back"]


def test_the_end_of_a_claim_ends_a_wait(service, queue, terms, look, background):
    service.another().post(queue, ["lapsed"])
    service.another().claim(queue, **terms, limit=1)
    looking = background.submit(look, LONG_S)
    assert is_waiting(looking)

    service.advance(terms["ttl"] + 1)

    assert [m.body for m in looking.result(SOON_S)] == ["lapsed"]


def test_a_wait_that_nothing_ends_takes_its_time_and_finds_nothing(look):
    started = time.monotonic()

    assert look(1) == ()
    assert 0.9 <= time.monotonic() - started < SOON_S


def test_a_post_to_another_queue_does_not_end_a_wait(service, other_queue, look, background):
    looking = background.submit(look, 1)

    service.another().post(other_queue, ["elsewhere"])

    assert looking.result(SOON_S) == ()


def test_stop_waiting_ends_a_wait(service, look, background):
    looking = background.submit(look, LONG_S)
    assert is_waiting(looking)

    service.queues.stop_waiting()

    assert looking.result(SOON_S) == ()


def test_stop_waiting_ends_every_later_wait_and_nothing_else(service, queue, look):
    service.queues.stop_waiting()
    started = time.monotonic()

    assert look(LONG_S) == ()
    service.queues.post(queue, ["there"])
    assert [m.body for m in look(LONG_S)] == ["there"]
    assert time.monotonic() - started < SOON_S


def test_stop_waiting_leaves_other_objects_waiting(service, queue, terms, background):
    service.queues.stop_waiting()
    other = service.another()

    looking = background.submit(other.claim, queue, **terms, limit=1, wait=LONG_S)

    assert is_waiting(looking)
    other.stop_waiting()
    assert looking.result(SOON_S) is None


def test_other_threads_use_the_object_while_one_waits(service, queue, other_queue, look, background):
    looking = background.submit(look, LONG_S)
    assert is_waiting(looking)

    service.queues.post(other_queue, ["elsewhere"])
    assert is_waiting(looking)
    service.queues.post(queue, ["new"])

    assert [m.body for m in looking.result(SOON_S)] == ["new"]
