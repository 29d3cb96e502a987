"""A holder renews its claim while work goes on."""

import time

import pytest
from backends import bodies, skip_unless

from claim_queues import ClaimLost, Settlement


def test_a_renewed_claim_holds_for_its_ttl_from_the_renewal(service, queues, rival, queue, claim):
    queues.post(queue, ["held"])
    held = claim(queues)
    service.advance(30)

    before = time.monotonic()
    queues.renew(held)
    after = time.monotonic()

    assert before + 58 <= held.expires_at <= after + 58
    service.advance(45)
    assert claim(rival) is None
    service.advance(16)
    assert bodies(claim(rival)) == ["held"]


def test_a_claim_is_renewed_for_the_messages_that_it_still_holds(service, queues, queue, claim):
    queues.post(queue, ["settled", "open"])
    held = claim(queues, 2)
    settled, still_open = held.messages
    queues.settle(held, [Settlement(settled)])
    service.advance(30)

    queues.renew(held)

    assert held.messages == (still_open,)
    service.advance(45)
    assert claim(queues, 2) is None
    assert queues.settle(held, [Settlement(still_open)]).deleted == {still_open.id}


def test_a_lapsed_claim_cannot_be_renewed_whoever_has_its_message(service, queues, rival, queue, claim):
    queues.post(queue, ["taken over", "free again"])
    first, second = (queues.claim(queue, ttl=120, grace=60, limit=1) for _ in range(2))
    service.advance(121)

    with pytest.raises(ClaimLost):
        queues.renew(second)
    assert bodies(claim(rival)) == ["taken over"]
    with pytest.raises(ClaimLost):
        queues.renew(first)

    assert bodies(claim(queues, 2)) == ["free again"]
    service.advance(61)
    assert bodies(claim(queues, 2)) == ["taken over", "free again"]


def test_a_message_that_would_expire_in_a_renewed_claim_lives_on_until_the_grace_after_it(
    service, queues, rival, queue, limits, claim
):
    skip_unless(limits.has_grace, "lets messages expire while they are claimed")
    queues.post(queue, ["short-lived"], ttl=80)
    held = claim(queues)
    service.advance(30)

    queues.renew(held)

    service.advance(61)
    assert claim(rival)
