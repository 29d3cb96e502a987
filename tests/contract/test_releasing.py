"""A holder gives back what it will not settle."""

import pytest
from backends import skip_unless

from claim_queues import ConfigError, Settlement


def test_released_messages_are_free_at_once_at_their_old_place(service, queue, terms):
    service.queues.post(queue, [1, 2, 3])
    claim = service.queues.claim(queue, **terms, limit=2)

    service.queues.release(claim)

    assert [m.body for m in service.another().claim(queue, **terms, limit=3).messages] == [1, 2, 3]


def test_what_was_settled_before_does_not_come_back_with_a_release(queues, queue, terms):
    queues.post(queue, ["settled", "left"])
    claim = queues.claim(queue, **terms, limit=2)
    queues.settle(claim, [Settlement(claim.messages[0])])

    queues.release(claim)

    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == ["left"]


def test_a_release_keeps_the_receive_count(queues, queue, limits, terms):
    skip_unless(limits.counts_receives, "does not count receives")
    queues.post(queue, ["given back"])
    queues.release(queues.claim(queue, **terms, limit=1))

    assert queues.claim(queue, **terms, limit=1).messages[0].receive_count == 2


def test_releasing_twice_is_no_error(queues, queue, terms):
    queues.post(queue, ["given back"])
    claim = queues.claim(queue, **terms, limit=1)

    queues.release(claim)
    queues.release(claim)

    assert queues.claim(queue, **terms, limit=1)


def test_releasing_too_late_leaves_alone_what_another_holds(service, queue, terms, ttl):
    holder, rival = service.queues, service.another()
    holder.post(queue, ["taken over"])
    lapsed = holder.claim(queue, **terms, limit=1)
    service.advance(ttl + 1)
    held = rival.claim(queue, **terms, limit=1)

    holder.release(lapsed)

    assert holder.claim(queue, **terms, limit=1) is None
    assert rival.settle(held, [Settlement(held.messages[0])]).deleted == {held.messages[0].id}


def test_a_claim_may_give_back_some_of_its_messages(queues, queue, limits, terms):
    skip_unless(limits.releases_one_message, "releases only whole claims")
    queues.post(queue, ["kept", "given back"])
    claim = queues.claim(queue, **terms, limit=2)
    kept, given_back = claim.messages

    queues.release(claim, [given_back])

    assert [m.id for m in queues.claim(queue, **terms, limit=2).messages] == [given_back.id]
    assert queues.settle(claim, [Settlement(kept)]).deleted == {kept.id}


def test_releasing_no_message_keeps_the_claim(queues, queue, limits, terms):
    skip_unless(limits.releases_one_message, "releases only whole claims")
    queues.post(queue, ["kept"])
    claim = queues.claim(queue, **terms, limit=1)

    queues.release(claim, [])

    assert queues.claim(queue, **terms, limit=1) is None


def test_some_of_a_claim_is_refused_where_only_whole_claims_are_released(queues, queue, limits, terms):
    skip_unless(not limits.releases_one_message, "can release one message")
    queues.post(queue, [1, 2])
    claim = queues.claim(queue, **terms, limit=2)

    with pytest.raises(ConfigError):
        queues.release(claim, claim.messages[:1])

    assert queues.claim(queue, **terms, limit=2) is None


def test_a_message_released_with_a_delay_is_free_when_the_delay_ends(service, queues, queue, limits, terms):
    skip_unless(limits.release_delay, "cannot delay a release")
    queues.post(queue, ["later", "now"])
    claim = queues.claim(queue, **terms, limit=1)

    queues.release(claim, delay=4)

    longer = terms | {"ttl": max(terms["ttl"], 60)}
    assert [m.body for m in queues.claim(queue, **longer, limit=2).messages] == ["now"]
    service.advance(2)
    assert queues.claim(queue, **terms, limit=2) is None
    service.advance(3)
    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == ["later"]


def test_a_delayed_message_is_at_its_old_place_when_the_delay_ends(service, queues, queue, limits, terms):
    skip_unless(limits.release_delay, "cannot delay a release")
    queues.post(queue, [1, 2])
    queues.release(queues.claim(queue, **terms, limit=1), delay=4)

    service.advance(5)

    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == [1, 2]


def test_a_delay_may_outlast_the_claim(service, queues, queue, terms, ttl):
    skip_unless(queues.limits.release_delay > ttl + 2, "cannot delay a release for longer than a claim")
    queues.post(queue, ["later"])
    queues.release(queues.claim(queue, **terms, limit=1), delay=ttl + 2)

    service.advance(ttl + 1)

    assert queues.claim(queue, **terms, limit=1) is None


def test_the_former_holder_has_lost_a_delayed_message(queues, queue, limits, terms):
    skip_unless(limits.release_delay, "cannot delay a release")
    skip_unless(limits.fenced_delete, "does not notice that a claim is lost")
    (id_,) = queues.post(queue, ["later"])
    claim = queues.claim(queue, **terms, limit=1)
    queues.release(claim, delay=4)

    assert queues.settle(claim, [Settlement(claim.messages[0])]).lost == {id_}


def test_a_message_that_would_expire_in_a_delay_lives_on_until_the_grace_after_it(service, queues, queue, terms, ttl):
    skip_unless(
        queues.limits.grace and queues.limits.release_delay, "cannot delay a release, or lets messages expire meanwhile"
    )
    delay, grace = queues.limits.message_ttl.low + ttl + queues.limits.grace.low + 10, queues.limits.grace.low
    queues.post(queue, ["short-lived"], ttl=queues.limits.message_ttl.low)
    queues.release(queues.claim(queue, **terms, limit=1), delay=delay)

    service.advance(delay + 1)
    assert [m.body for m in queues.browse(queue).messages] == ["short-lived"]

    service.advance(grace)
    assert queues.claim(queue, **terms, limit=1) is None


def test_a_delay_out_of_range_is_refused_and_the_claim_stays(queues, queue, limits, terms):
    queues.post(queue, ["kept"])
    claim = queues.claim(queue, **terms, limit=1)

    for wrong in (-1, limits.release_delay + 1, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            queues.release(claim, delay=wrong)

    assert queues.claim(queue, **terms, limit=1) is None
