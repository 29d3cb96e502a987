"""A holder says how each message ends: what became of it is posted, then the message is deleted."""

import pytest
from backends import skip_unless

from claim_queues import ConfigError, MessageRefused, Post, Settlement


def test_a_settled_message_never_comes_back(service, queues, queue, terms, ttl):
    queues.post(queue, ["done"])
    claim = queues.claim(queue, **terms, limit=1)

    settled = queues.settle(claim, [Settlement(claim.messages[0])])

    assert settled.deleted == {claim.messages[0].id}
    assert not settled.lost
    assert not settled.refused
    service.advance(ttl + 1)
    assert queues.claim(queue, **terms, limit=1) is None


def test_a_message_may_be_settled_without_the_fence(service, queues, queue, terms, ttl):
    queues.post(queue, ["done"])
    claim = queues.claim(queue, **terms, limit=1)

    settled = queues.settle(claim, [Settlement(claim.messages[0], fenced=False)])

    assert settled.deleted == {claim.messages[0].id}
    service.advance(ttl + 1)
    assert queues.claim(queue, **terms, limit=1) is None


def test_what_became_of_a_message_is_posted_in_order_wherever_it_belongs(queues, queue, other_queue, terms):
    queues.post(queue, ["request"])
    claim = queues.claim(queue, **terms, limit=1)
    posts = (Post(other_queue, "first"), Post(queue, "again"), Post(other_queue, "second"))

    queues.settle(claim, [Settlement(claim.messages[0], posts)])

    assert [m.body for m in queues.claim(other_queue, **terms, limit=3).messages] == ["first", "second"]
    assert [m.body for m in queues.claim(queue, **terms, limit=3).messages] == ["again"]


def test_a_settlement_posts_with_the_ttl_that_it_names(queues, queue, other_queue, terms, ttl):
    skip_unless(queues.limits.message_ttl, "gives all messages of a queue one TTL")
    life = queues.limits.message_ttl.low + ttl + 100
    queues.post(queue, ["request"])
    claim = queues.claim(queue, **terms, limit=1)

    queues.settle(claim, [Settlement(claim.messages[0], (Post(other_queue, "response", ttl=life),))])

    assert queues.claim(other_queue, **terms, limit=1).messages[0].ttl == life


def test_a_full_claim_is_settled_at_once(service, queues, queue, other_queue, terms):
    bodies = list(range(queues.limits.claim_limit))
    queues.post(queue, bodies)
    claim = queues.claim(queue, **terms, limit=queues.limits.claim_limit)

    settled = queues.settle(
        claim, [Settlement(message, (Post(other_queue, message.body),)) for message in claim.messages]
    )

    assert settled.deleted == {message.id for message in claim.messages}
    responses = queues.claim(other_queue, **terms, limit=queues.limits.claim_limit)
    assert sorted(message.body for message in responses.messages) == bodies


def test_settling_nothing_changes_nothing(queues, queue, terms):
    queues.post(queue, ["held"])
    claim = queues.claim(queue, **terms, limit=1)

    assert not queues.settle(claim, []).deleted

    assert queues.settle(claim, [Settlement(claim.messages[0])]).deleted


def test_what_is_not_settled_stays_claimed_and_comes_back_alone(service, queues, queue, terms, ttl):
    queues.post(queue, ["settled", "left"])
    claim = queues.claim(queue, **terms, limit=2)

    queues.settle(claim, [Settlement(claim.messages[0])])

    assert queues.claim(queue, **terms, limit=2) is None
    service.advance(ttl + 1)
    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == ["left"]


def test_a_settlement_may_be_repeated_and_each_message_is_deleted_or_lost(queues, queue, terms):
    queues.post(queue, ["done"])
    claim = queues.claim(queue, **terms, limit=1)
    queues.settle(claim, [Settlement(claim.messages[0])])

    again = queues.settle(claim, [Settlement(claim.messages[0])])

    assert again.deleted | again.lost == {claim.messages[0].id}
    assert not again.refused


def test_a_lapsed_claim_cannot_delete(service, queues, queue, terms, ttl):
    skip_unless(queues.limits.fenced_delete, "does not notice that a claim is lost")
    (id_,) = queues.post(queue, ["kept"])
    lapsed = queues.claim(queue, **terms, limit=1)
    service.advance(ttl + 1)

    settled = queues.settle(lapsed, [Settlement(lapsed.messages[0])])

    assert (settled.deleted, settled.lost) == (frozenset(), {id_})
    assert queues.claim(queue, **terms, limit=1).messages[0].id == id_


def test_a_released_claim_cannot_delete(queues, queue, limits, terms):
    skip_unless(limits.fenced_delete, "does not notice that a claim is lost")
    (id_,) = queues.post(queue, ["kept"])
    released = queues.claim(queue, **terms, limit=1)
    queues.release(released)

    assert queues.settle(released, [Settlement(released.messages[0])]).lost == {id_}
    assert queues.claim(queue, **terms, limit=1).messages[0].id == id_


def test_a_lapsed_claim_cannot_delete_what_another_holds(service, queue, limits, terms, ttl):
    skip_unless(limits.fenced_delete, "does not notice that a claim is lost")
    holder, rival = service.queues, service.another()
    (id_,) = holder.post(queue, ["taken over"])
    lapsed = holder.claim(queue, **terms, limit=1)
    service.advance(ttl + 1)
    held = rival.claim(queue, **terms, limit=1)

    assert holder.settle(lapsed, [Settlement(lapsed.messages[0])]).lost == {id_}

    assert holder.claim(queue, **terms, limit=1) is None
    assert rival.settle(held, [Settlement(held.messages[0])]).deleted == {id_}


def test_another_claim_of_the_same_holder_cannot_delete(queues, queue, limits, terms):
    skip_unless(limits.fenced_delete, "does not notice that a claim is lost")
    queues.post(queue, [1, 2])
    first = queues.claim(queue, **terms, limit=1)
    second = queues.claim(queue, **terms, limit=1)

    assert queues.settle(second, [Settlement(first.messages[0])]).lost == {first.messages[0].id}
    assert queues.settle(first, [Settlement(first.messages[0])]).deleted == {first.messages[0].id}


def test_nothing_is_posted_for_a_message_that_is_lost(service, queues, queue, other_queue, terms):
    skip_unless(queues.limits.atomic_settle, "posts before it knows whether the claim is lost")
    queues.post(queue, ["lost"])
    lapsed = queues.claim(queue, **terms, limit=1)
    service.advance(terms["ttl"] + 1)

    queues.settle(lapsed, [Settlement(lapsed.messages[0], (Post(other_queue, "response"),))])

    assert queues.claim(other_queue, **terms, limit=1) is None


def test_a_message_whose_post_no_queue_takes_is_kept_and_the_others_are_settled(
    service, queues, queue, other_queue, terms
):
    queues.post(queue, ["too large", "fits"])
    claim = queues.claim(queue, **terms, limit=2)
    large, fitting = claim.messages

    settled = queues.settle(
        claim,
        [
            Settlement(large, (Post(other_queue, "before"), Post(other_queue, "x" * queues.limits.message_bytes))),
            Settlement(fitting, (Post(other_queue, "response"),)),
        ],
    )

    assert settled.deleted == {fitting.id}
    assert list(settled.refused) == [large.id]
    assert isinstance(settled.refused[large.id], MessageRefused)
    assert [m.body for m in queues.claim(other_queue, **terms, limit=3).messages] == ["response"]
    assert queues.claim(queue, **terms, limit=1) is None
    service.advance(terms["ttl"] + 1)
    assert [m.id for m in queues.claim(queue, **terms, limit=2).messages] == [large.id]


def test_a_post_out_of_range_is_refused_and_nothing_is_settled(service, queues, queue, other_queue, terms):
    queues.post(queue, [1, 2])
    claim = queues.claim(queue, **terms, limit=2)
    wrong = [Post("no such name", "response")]
    if queues.limits.message_ttl:
        wrong.append(Post(other_queue, "response", ttl=queues.limits.message_ttl.high + 1))

    for post in wrong:
        with pytest.raises(ConfigError):
            queues.settle(
                claim,
                [
                    Settlement(claim.messages[0], (Post(other_queue, "response"),)),
                    Settlement(claim.messages[1], (post,)),
                ],
            )

    assert queues.claim(other_queue, **terms, limit=1) is None
    service.advance(terms["ttl"] + 1)
    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == [1, 2]


def test_the_next_messages_can_be_claimed_with_a_settlement(queues, queue, other_queue, terms):
    queues.post(queue, [1, 2, 3, 4, 5])
    claim, claimed = queues.claim(queue, **terms, limit=1), []

    while claim:
        claimed += [message.body for message in claim.messages]
        settlements = [Settlement(each, (Post(other_queue, f"made {each.body}"),)) for each in claim.messages]
        settled, following = queues.settle_and_claim(claim, settlements, **terms, limit=2)
        assert settled.deleted == {message.id for message in claim.messages}
        assert following is None or following.id != claim.id
        claim = following

    assert claimed == [1, 2, 3, 4, 5]
    assert queues.stats(queue).total == 0
    assert [m.body for m in queues.claim(other_queue, **terms, limit=5).messages] == [f"made {n}" for n in claimed]


def test_what_was_given_back_is_claimed_anew_with_its_late_settlement(queues, queue, limits, terms):
    skip_unless(limits.fenced_delete, "does not notice that a claim is lost")
    queues.post(queue, ["given back", "next"])
    released = queues.claim(queue, **terms, limit=1)
    queues.release(released)

    settled, following = queues.settle_and_claim(released, [Settlement(released.messages[0])], **terms, limit=2)

    assert settled.lost == {released.messages[0].id}
    assert [message.body for message in following.messages] == ["given back", "next"]


@pytest.mark.parametrize("limit", [0, 1_000])
def test_a_claim_that_the_service_does_not_grant_settles_nothing(queues, queue, terms, limit):
    queues.post(queue, ["kept"])
    claim = queues.claim(queue, **terms, limit=1)

    with pytest.raises(ConfigError):
        queues.settle_and_claim(claim, [Settlement(claim.messages[0])], **terms, limit=limit)

    assert queues.settle(claim, [Settlement(claim.messages[0])]).deleted
