"""The messages of a queue are counted."""

import pytest
from backends import skip_unless

from claim_queues import Settlement


@pytest.fixture(autouse=True)
def _exact(limits):
    skip_unless(not limits.stats_settle, "counts only roughly")


def counts(stats):
    return stats.free, stats.claimed, stats.delayed, stats.total


def test_an_empty_queue_counts_nothing_and_has_no_oldest_message(queues, queue, other_queue):
    queues.post(other_queue, ["elsewhere"])

    stats = queues.stats(queue)

    assert counts(stats) == (0, 0, 0, 0)
    assert stats.oldest_age is None


def test_free_and_claimed_messages_are_counted_for_every_process(service, queue, terms):
    service.queues.post(queue, [1, 2, 3])
    service.queues.claim(queue, **terms, limit=1)

    assert counts(service.queues.stats(queue)) == (2, 1, 0, 3)
    assert counts(service.another().stats(queue)) == (2, 1, 0, 3)


def test_settled_deleted_and_purged_messages_are_not_counted(queues, queue, terms):
    *_, last = queues.post(queue, [1, 2, 3])
    claim = queues.claim(queue, **terms, limit=1)

    queues.settle(claim, [Settlement(claim.messages[0])])
    assert counts(queues.stats(queue)) == (2, 0, 0, 2)

    queues.delete(queue, [last])
    assert counts(queues.stats(queue)) == (1, 0, 0, 1)

    queues.purge(queue)
    assert counts(queues.stats(queue)) == (0, 0, 0, 0)


def test_released_messages_count_as_free(queues, queue, terms):
    queues.post(queue, [1, 2])
    queues.release(queues.claim(queue, **terms, limit=2))

    assert counts(queues.stats(queue)) == (2, 0, 0, 2)


def test_messages_whose_claim_lapsed_count_as_free(service, queues, queue, terms, ttl):
    queues.post(queue, [1, 2])
    queues.claim(queue, **terms, limit=1)

    service.advance(ttl + 1)

    assert counts(queues.stats(queue)) == (2, 0, 0, 2)


def test_messages_released_with_a_delay_count_as_delayed_until_it_ends(service, queues, queue, limits, terms):
    skip_unless(limits.release_delay, "cannot delay a release")
    queues.post(queue, [1, 2])
    queues.release(queues.claim(queue, **terms, limit=1), delay=10)

    assert counts(queues.stats(queue)) == (1, 0, 1, 2)
    service.advance(11)
    assert counts(queues.stats(queue)) == (2, 0, 0, 2)


def test_expired_messages_are_not_counted(service, queues, queue, limits):
    skip_unless(limits.message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["short-lived"], ttl=limits.message_ttl.low)
    queues.post(queue, ["long-lived"], ttl=limits.message_ttl.high)

    service.advance(limits.message_ttl.low + 1)

    assert counts(queues.stats(queue)) == (1, 0, 0, 1)


def test_the_oldest_age_is_that_of_the_oldest_message_claimed_or_not(service, queues, queue, terms):
    queues.post(queue, ["old"])
    service.advance(100)
    queues.post(queue, ["young"])
    assert 99 <= queues.stats(queue).oldest_age < 110

    claim = queues.claim(queue, **terms, limit=1)
    assert 99 <= queues.stats(queue).oldest_age < 110

    queues.settle(claim, [Settlement(claim.messages[0])])
    assert 0 <= queues.stats(queue).oldest_age < 10


def test_counting_changes_nothing(queues, queue, terms):
    queues.post(queue, ["counted"])

    assert queues.stats(queue).free == queues.stats(queue).free == 1

    assert queues.claim(queue, **terms, limit=1).messages[0].receive_count in (1, None)
