"""Releases: claims that come back later, also where the service cannot delay."""

from contextlib import suppress
from dataclasses import replace

import pytest
from doubles.troubled_queues import TroubledQueues, times

from claim_queues import QueueForbidden, QueueUnavailable
from claim_queues.releases import Releases
from claim_queues.sqlite import SqliteQueues


@pytest.fixture
def queues(tmp_path):
    with SqliteQueues(tmp_path / "q.sqlite3") as real:
        real.post("q", ["a", "b"])
        yield TroubledQueues(real, replace(real.limits, release_delay=0))


def claim(queues):
    return queues.claim("q", ttl=60, grace=60, limit=1)


def test_a_claim_is_kept_until_it_is_due(queues, now):
    releases = Releases(queues)
    releases.add(claim(queues), 30)
    releases.due()
    assert queues.stats("q")[:3] == (1, 1, 0)

    now[0] += 31
    releases.due()
    assert queues.stats("q")[:3] == (2, 0, 0)


def test_all_that_wait_can_be_released_at_once_and_what_its_claim_does_not_outlive_is_left_to_expire(queues):
    releases = Releases(queues)
    waits = claim(queues)
    releases.add(waits, 30)
    releases.add(claim(queues), 61)

    assert releases.all() == [waits]
    queues.release(waits)
    assert queues.stats("q")[:3] == (1, 1, 0)


@pytest.mark.parametrize(("error", "left"), [(QueueUnavailable("gone"), 1), (QueueForbidden("no"), 0)])
def test_what_cannot_be_released_now_is_tried_again_and_what_may_not_be_is_left_to_expire(queues, now, error, left):
    releases = Releases(queues)
    releases.add(claim(queues), 10)
    now[0] += 10
    queues.fails["release"] = times(1, error)
    with suppress(QueueUnavailable):
        releases.due()

    assert len(releases.all()) == left
