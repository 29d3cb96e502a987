"""A holder says how each message ends: its outcome is posted, then the message is deleted."""

import pytest
from backends import bodies, skip_unless

from claim_queues import MessageRefused, Post, Settlement


@pytest.mark.parametrize("fenced", [True, False])
def test_a_full_claim_is_settled_at_once_and_none_of_it_comes_back(
    service, queues, queue, other_queue, limits, claim, fenced
):
    for body in range(limits.claim_limit):
        queues.post(queue, [body])
    held = claim(queues, limits.claim_limit)
    messages = held.messages

    settled = queues.settle(held, [Settlement(each, (Post(other_queue, each.body),), fenced) for each in messages])

    assert (settled.deleted, settled.refused, held.messages) == ({message.id for message in messages}, {}, ())
    assert sorted(bodies(claim(queues, limits.claim_limit, of=other_queue))) == list(range(limits.claim_limit))
    service.advance(61)
    assert claim(queues) is None


def test_outcomes_are_posted_in_order_wherever_they_belong(queues, queue, other_queue, claim):
    queues.post(queue, ["request"])
    held = claim(queues)
    posts = (Post(other_queue, "first"), Post(queue, "again"), Post(other_queue, "second"))

    queues.settle(held, [Settlement(held.messages[0], posts)])

    assert bodies(claim(queues, 3, of=other_queue)) == ["first", "second"]
    assert bodies(claim(queues, 3)) == ["again"]


def test_an_outcome_lives_for_the_ttl_that_it_names(service, queues, queue, other_queue, limits, claim):
    skip_unless(limits.has_message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["request"])
    held = claim(queues)
    queues.settle(held, [Settlement(held.messages[0], (Post(other_queue, "response", ttl=100),))])

    service.advance(80)
    assert bodies(queues.browse(other_queue)[0]) == ["response"]
    service.advance(21)
    assert queues.browse(other_queue)[0] == []


def test_a_claim_is_settled_message_by_message_and_what_is_left_comes_back_alone(service, queues, queue, claim):
    queues.post(queue, ["first", "second", "left"])
    held = claim(queues, 3)
    first, second, left = held.messages

    assert queues.settle(held, [Settlement(first)]).deleted == {first.id}
    assert queues.settle(held, []).deleted == frozenset()
    assert queues.settle(held, [Settlement(second)]).deleted == {second.id}
    again = queues.settle(held, [Settlement(first)])

    assert again.deleted <= {first.id}
    assert not again.refused
    assert held.messages == (left,)
    assert claim(queues, 3) is None
    service.advance(61)
    assert bodies(claim(queues, 3)) == ["left"]


def test_a_lapsed_claim_cannot_delete(service, queues, queue, claim):
    queues.post(queue, ["kept"])
    lapsed = claim(queues)
    service.advance(61)

    settled = queues.settle(lapsed, [Settlement(lapsed.messages[0])])

    assert (settled.deleted, settled.refused) == (frozenset(), {})
    assert bodies(claim(queues)) == ["kept"]


def test_a_lapsed_claim_cannot_delete_what_another_holds(service, queues, rival, queue, claim):
    ids = queues.post(queue, ["taken over"])
    lapsed = claim(queues)
    service.advance(61)
    held = claim(rival)

    assert not queues.settle(lapsed, [Settlement(lapsed.messages[0])]).deleted

    assert claim(queues) is None
    assert rival.settle(held, [Settlement(held.messages[0])]).deleted == {*ids}


def test_a_released_claim_and_another_one_of_the_same_holder_cannot_delete(queues, queue, claim):
    ids = queues.post(queue, [1, 2])
    released = claim(queues)
    (message,) = released.messages
    queues.release(released)
    holding, other = claim(queues), claim(queues)

    assert not queues.settle(released, [Settlement(message)]).deleted
    assert not queues.settle(other, [Settlement(holding.messages[0])]).deleted
    assert queues.settle(holding, [Settlement(holding.messages[0])]).deleted == {ids[0]}


def test_a_message_whose_outcome_no_queue_accepts_is_kept_and_the_others_are_settled(
    service, queues, queue, other_queue, limits, claim
):
    queues.post(queue, ["too large", "fits"])
    held = claim(queues, 2)
    large, fitting = held.messages
    posts = (Post(other_queue, "before"), Post(other_queue, "x" * limits.message_bytes))

    settled = queues.settle(held, [Settlement(large, posts), Settlement(fitting, (Post(other_queue, "response"),))])

    assert settled.deleted == {fitting.id}
    assert {id_: type(error) for id_, error in settled.refused.items()} == {large.id: MessageRefused}
    assert held.messages == (large,)
    assert bodies(claim(queues, 3, of=other_queue)) == ["response"]
    assert claim(queues) is None
    service.advance(61)
    assert bodies(claim(queues, 2)) == ["too large"]
