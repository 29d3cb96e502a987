"""Releases: claims that come back later, also where the service cannot delay."""

import time
from dataclasses import replace

import pytest
from doubles.troubled_queues import TroubledQueues, times

from claim_queues import QueueUnavailable
from claim_queues.releases import Releases
from claim_queues.sqlite import SqliteQueues


@pytest.fixture
def queues(tmp_path):
    with SqliteQueues(tmp_path / "q.sqlite3") as real:
        real.post("q", ["a", "b"])
        yield TroubledQueues(real, replace(real.limits, release_delay=0))


@pytest.fixture
def now(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


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


def test_all_are_released_at_once_where_that_is_asked_for_also_after_the_service_failed(queues):
    releases = Releases(queues)
    releases.add(claim(queues), 30)
    releases.add(claim(queues), 40)
    queues.fails["release"] = times(1, QueueUnavailable("gone"))
    with pytest.raises(QueueUnavailable):
        releases.due(all_at_once=True)
    releases.due(all_at_once=True)

    assert queues.stats("q")[:3] == (2, 0, 0)


def test_what_its_claim_does_not_outlive_is_left_to_expire(queues):
    releases = Releases(queues)
    releases.add(claim(queues), 61)
    releases.due(all_at_once=True)

    assert queues.calls["release"] == 0
