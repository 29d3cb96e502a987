"""A claim takes free messages for its claim TTL; what is not settled by then is free again."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from backends import bodies, skip_unless


def test_a_claim_takes_the_oldest_free_messages_of_its_queue_and_hides_them_from_all(
    queues, rival, queue, other_queue, claim
):
    queues.post(other_queue, ["elsewhere"])
    assert claim(queues) is None
    queues.post(queue, [1, 2])
    queues.post(queue, [3, 4])

    assert bodies(claim(queues, 3)) == [1, 2, 3]
    assert bodies(claim(rival, 3)) == [4]
    assert claim(rival) is None


def test_a_claim_says_what_it_was_asked_for_and_is_trusted_for_2_s_less_than_its_ttl(queues, queue):
    queues.post(queue, [1, 2])
    before = time.monotonic()
    first, second = (queues.claim(queue, ttl=60, grace=90, limit=1) for _ in range(2))
    after = time.monotonic()

    assert (first.queue, first.ttl, first.grace) == (queue, 60, 90)
    assert first.id != second.id
    assert before + 58 <= first.expires_at <= second.expires_at <= after + 58


def test_a_claim_passes_over_claimed_messages_anywhere_in_the_queue(queues, queue, claim):
    queues.post(queue, [1, 2, 3, 4])
    claims = [claim(queues) for _ in range(3)]
    queues.release(claims[0])
    queues.release(claims[2])

    assert bodies(claim(queues, 4)) == [1, 3, 4]


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "an object each"])
def test_claims_at_the_same_time_never_share_a_message(service, queues, queue, claim, shared):
    for first in range(0, 60, 10):
        queues.post(queue, list(range(first, first + 10)))
    consumers = [queues if shared else service.another() for _ in range(4)]

    def claim_all(consumer):
        return [body for found in iter(lambda: claim(consumer, 3), None) for body in bodies(found)]

    with ThreadPoolExecutor(len(consumers)) as pool:
        claimed = [body for found in pool.map(claim_all, consumers) for body in found]

    assert sorted(claimed) == list(range(60))


def test_a_message_is_free_again_at_its_old_place_when_the_claim_ttl_ends(service, queues, rival, queue, claim):
    ids = queues.post(queue, [1, 2, 3])
    claim(queues, 2)

    service.advance(30)
    taken = claim(rival, 3)
    assert bodies(taken) == [3]
    rival.release(taken)
    service.advance(31)

    assert [(message.id, message.body) for message in claim(rival, 3).messages] == list(
        zip(ids, [1, 2, 3], strict=True)
    )


def test_a_message_has_its_age_since_its_post_and_its_receive_count_where_the_service_counts(service, queue, claim):
    service.queues.post(queue, ["again"])
    service.advance(3)
    received = []
    for _ in range(3):
        received += claim(service.another()).messages
        service.advance(61)

    first, second, third = (message.age for message in received)
    assert 2 <= first < 30
    assert first + 60 <= second < first + 90
    assert second + 60 <= third < second + 90
    assert [message.receive_count for message in received] in ([None, None, None], [1, 2, 3])


def test_a_message_that_would_expire_in_a_claim_lives_on_until_the_grace_after_it(
    service, queues, rival, queue, limits, claim
):
    skip_unless(limits.has_grace, "lets messages expire while they are claimed")
    queues.post(queue, ["short-lived"], ttl=60)
    service.advance(30)
    claim(queues)

    service.advance(100)
    assert bodies(rival.browse(queue)[0]) == ["short-lived"]
    service.advance(21)
    assert claim(rival) is None


def test_a_message_that_would_not_expire_in_its_claim_keeps_its_own_ttl(service, queues, queue, limits, claim):
    skip_unless(limits.has_message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["long enough"], ttl=120)
    service.advance(30)
    claim(queues)

    service.advance(70)
    assert bodies(queues.browse(queue)[0]) == ["long enough"]
    service.advance(21)
    assert claim(queues) is None
