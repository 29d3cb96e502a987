"""A holder gives back what it will not settle."""

import pytest
from backends import bodies, skip_unless

from claim_queues import ClaimLost, Settlement


def test_a_released_claim_is_over_and_what_is_left_of_it_is_free_at_its_old_place(queues, rival, queue, claim):
    queues.post(queue, [1, "settled", 2, 3])
    held = claim(queues, 3)
    queues.settle(held, [Settlement(held.messages[1])])

    queues.release(held)

    queues.release(held)  # again is no error
    with pytest.raises(ClaimLost):
        queues.renew(held)
    assert bodies(claim(rival, 4)) == [1, 2, 3]


def test_releasing_too_late_leaves_alone_what_another_holds(service, queues, rival, queue, claim):
    ids = queues.post(queue, ["taken over"])
    lapsed = claim(queues)
    service.advance(61)
    held = claim(rival)

    queues.release(lapsed)

    assert claim(queues) is None
    assert rival.settle(held, [Settlement(held.messages[0])]).deleted == {*ids}


def test_a_message_released_with_a_delay_is_free_at_its_old_place_when_that_ends(service, queues, queue, limits, claim):
    skip_unless(limits.release_delay, "cannot delay a release")
    queues.post(queue, [1, 2])
    held = claim(queues)
    (message,) = held.messages

    queues.release(held, delay=100)

    assert not queues.settle(held, [Settlement(message)]).deleted
    service.advance(80)
    now = claim(queues, 2)
    assert bodies(now) == [2]
    queues.release(now)
    service.advance(21)
    assert bodies(claim(queues, 2)) == [1, 2]
