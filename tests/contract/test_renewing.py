"""A holder renews its claim while work goes on."""

import pytest
from backends import skip_unless

from claim_queues import ClaimLost, ConfigError, Settlement


def test_a_renewed_claim_holds_for_its_ttl_from_the_renewal(service, queue, terms, ttl):
    holder, rival = service.queues, service.another()
    holder.post(queue, ["held"])
    claim = holder.claim(queue, **terms, limit=1)
    service.advance(ttl / 2)

    holder.renew(claim, ttl=ttl)

    service.advance(ttl * 3 / 4)
    assert rival.claim(queue, **terms, limit=1) is None
    service.advance(ttl / 4 + 1)
    assert rival.claim(queue, **terms, limit=1)


def test_a_renewal_may_shorten_a_claim(service, queues, queue, terms, ttl):
    queues.post(queue, ["held"])
    claim = queues.claim(queue, **{**terms, "ttl": 10 * ttl}, limit=1)

    queues.renew(claim, ttl=ttl)

    service.advance(ttl + 1)
    assert queues.claim(queue, **terms, limit=1)


def test_a_renewed_claim_can_settle_after_its_first_ttl(service, queues, queue, terms, ttl):
    queues.post(queue, ["slow"])
    claim = queues.claim(queue, **terms, limit=1)
    service.advance(ttl / 2)
    queues.renew(claim, ttl=ttl)
    service.advance(ttl * 3 / 4)

    settled = queues.settle(claim, [Settlement(claim.messages[0])])

    assert settled.deleted == {claim.messages[0].id}


def test_a_lapsed_claim_cannot_be_renewed(service, queues, queue, terms, ttl):
    queues.post(queue, ["lapsed"])
    claim = queues.claim(queue, **terms, limit=1)

    service.advance(ttl + 1)

    with pytest.raises(ClaimLost):
        queues.renew(claim, ttl=ttl)
    assert queues.claim(queue, **terms, limit=1)


def test_a_released_claim_cannot_be_renewed(queues, queue, terms, ttl):
    queues.post(queue, ["given back"])
    claim = queues.claim(queue, **terms, limit=1)
    queues.release(claim)

    with pytest.raises(ClaimLost):
        queues.renew(claim, ttl=ttl)
    assert queues.claim(queue, **terms, limit=1)


def test_a_lapsed_claim_cannot_renew_what_another_holds(service, queue, terms, ttl):
    holder, rival = service.queues, service.another()
    holder.post(queue, ["taken over"])
    lapsed = holder.claim(queue, **terms, limit=1)
    service.advance(ttl + 1)
    rival.claim(queue, **terms, limit=1)

    with pytest.raises(ClaimLost):
        holder.renew(lapsed, ttl=10 * ttl)

    service.advance(ttl + 1)
    assert holder.claim(queue, **terms, limit=1)


def test_a_claim_is_renewed_for_the_messages_that_are_still_open(service, queues, queue, terms, ttl):
    queues.post(queue, ["settled", "open"])
    claim = queues.claim(queue, **terms, limit=2)
    settled, still_open = claim.messages
    queues.settle(claim, [Settlement(settled)])
    service.advance(ttl / 2)

    queues.renew(claim, ttl=ttl, messages=[still_open])

    service.advance(ttl * 3 / 4)
    assert queues.claim(queue, **terms, limit=2) is None
    assert queues.settle(claim, [Settlement(still_open)]).deleted == {still_open.id}


def test_a_renewal_does_not_count_as_a_receive(service, queues, queue, terms, ttl):
    skip_unless(queues.limits.counts_receives, "does not count receives")
    queues.post(queue, ["held"])
    queues.renew(queues.claim(queue, **terms, limit=1), ttl=ttl)
    service.advance(ttl + 1)

    assert queues.claim(queue, **terms, limit=1).messages[0].receive_count == 2


def test_a_message_that_would_expire_in_a_renewed_claim_lives_on_until_the_grace_after_it(
    service, queue, limits, terms, ttl
):
    skip_unless(limits.grace, "lets messages expire while they are claimed")
    holder, rival = service.queues, service.another()
    holder.post(queue, ["short-lived"], ttl=limits.message_ttl.low + ttl)
    claim = holder.claim(queue, **terms, limit=1)
    held_for = limits.message_ttl.low + 2 * ttl

    holder.renew(claim, ttl=held_for)

    service.advance(held_for + 1)
    assert rival.claim(queue, **terms, limit=1)


def test_a_renewal_out_of_range_is_refused_and_changes_nothing(service, queues, queue, terms, ttl):
    queues.post(queue, ["held"])
    claim = queues.claim(queue, **terms, limit=1)

    for wrong in (
        queues.limits.claim_ttl.low - 1,
        queues.limits.claim_ttl.high + 1,
        queues.limits.claim_ttl.low + 0.5,
        True,
    ):
        with pytest.raises(ConfigError):
            queues.renew(claim, ttl=wrong)

    assert queues.claim(queue, **terms, limit=1) is None
    service.advance(ttl + 1)
    assert queues.claim(queue, **terms, limit=1)
