"""A holder gives back what it will not settle."""

from backends import bodies, skip_unless

from claim_queues import Settlement


def test_what_is_left_of_a_released_claim_is_free_at_once_at_its_old_place(queues, rival, queue, claim):
    queues.post(queue, [1, "settled", 2, 3])
    held = claim(queues, 3)
    queues.settle(held, [Settlement(held.messages[1])])

    queues.release(held)

    assert bodies(claim(rival, 4)) == [1, 2, 3]


def test_to_release_a_claim_twice_is_no_error(queues, queue, claim):
    queues.post(queue, ["given back"])
    held = claim(queues)

    queues.release(held)
    queues.release(held)

    assert claim(queues)


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
    service.advance(95)
    now = claim(queues, 2)
    assert bodies(now) == [2]
    queues.release(now)
    service.advance(6)
    assert bodies(claim(queues, 2)) == [1, 2]


def test_a_message_that_would_expire_in_a_delay_lives_on_until_the_grace_after_it(
    service, queues, queue, limits, claim
):
    skip_unless(limits.release_delay and limits.has_grace, "cannot delay a release, or lets messages expire meanwhile")
    queues.post(queue, ["short-lived"], ttl=60)
    queues.release(claim(queues), delay=200)

    service.advance(201)
    assert queues.stats(queue).free == 1
    service.advance(60)
    assert claim(queues) is None
