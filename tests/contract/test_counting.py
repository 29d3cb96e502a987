"""The messages of a queue are counted."""

import pytest
from backends import skip_unless

from claim_queues import QueueNotFound, Settlement


@pytest.fixture
def counts(rival, queue, limits):
    """Free, claimed, delayed and all messages, counted by another process; counting changes nothing."""
    skip_unless(not limits.approximate_s, "counts only roughly")

    def count():
        stats = rival.stats(queue)
        assert rival.stats(queue)[:3] == stats[:3]
        return stats.free, stats.claimed, stats.delayed, stats.total

    return count


def test_free_claimed_released_settled_deleted_and_purged_messages_are_told_apart(
    queues, queue, other_queue, claim, counts
):
    queues.post(other_queue, ["elsewhere"])
    assert counts() == (0, 0, 0, 0)
    *_, last = queues.post(queue, [1, 2, 3])
    released = claim(queues, 2)
    assert counts() == (1, 2, 0, 3)

    queues.release(released)
    assert counts() == (3, 0, 0, 3)

    held = claim(queues)
    queues.settle(held, [Settlement(held.messages[0])])
    assert counts() == (2, 0, 0, 2)
    queues.delete(queue, [last])
    assert counts() == (1, 0, 0, 1)
    queues.purge(queue)
    assert counts() == (0, 0, 0, 0)


def test_lapsed_messages_count_as_free_and_expired_ones_not_at_all(service, queues, queue, claim, counts):
    queues.post(queue, [1, 2], ttl=1_209_600)
    claim(queues)
    queues.post(queue, ["short-lived"], ttl=60)

    service.advance(61)

    assert counts() == (2, 0, 0, 2)


@pytest.mark.usefixtures("counts")
def test_the_oldest_age_is_that_of_the_oldest_message_claimed_or_not(service, queues, queue, claim):
    assert queues.stats(queue).oldest_age is None
    queues.post(queue, ["old"])
    service.advance(100)
    queues.post(queue, ["young"])
    assert 99 <= queues.stats(queue).oldest_age < 130

    held = claim(queues)
    assert 99 <= queues.stats(queue).oldest_age < 130
    queues.settle(held, [Settlement(held.messages[0])])
    assert 0 <= queues.stats(queue).oldest_age < 30


def test_a_missing_queue_is_not_an_empty_one(queues, limits):
    skip_unless(not limits.makes_queues, "makes queues at their first use")

    assert not queues.exists("missing")
    for operation in (queues.stats, queues.purge):
        with pytest.raises(QueueNotFound, match=r"missing at .*create it with --create"):
            operation("missing")
