"""Drain: it waits for what others hold and for a maker that is away, and gives up where waiting does not help."""

from dataclasses import replace

import pytest
from doubles.troubled_queues import TroubledQueues
from structlog.testing import capture_logs

from claim_queues.sqlite import SqliteQueues
from widgets.breaker import Breaker
from widgets.delivery import Answer, Failure
from widgets.drain import Drain, DrainTimedOut, NothingPasses

WRONG = Answer(failure=Failure.MISCONFIGURED, status=404, reason="HTTP 404")
AWAY = Answer(failure=Failure.UNAVAILABLE, reason="refused")


@pytest.fixture
def queues(tmp_path):
    with SqliteQueues(tmp_path / "q.sqlite3") as queues:
        yield queues


def test_it_gives_up_after_a_minute_in_which_another_server_answers(queues, now):
    drain, breaker = Drain(queues, "requests", None), Breaker()
    breaker.failed("a", WRONG, 0, is_well=True)
    now[0] += 60
    drain.check(breaker)

    now[0] += 1
    with pytest.raises(NothingPasses, match="HTTP 404"):
        drain.check(breaker)


def test_it_waits_for_a_maker_that_is_not_well_unless_its_time_is_over(queues, now):
    drain, breaker = Drain(queues, "requests", 5000), Breaker()
    for number in range(10):
        breaker.failed(f"m{number}", AWAY, 0, is_well=False)
    now[0] += 4999
    drain.check(breaker)

    now[0] += 2
    with pytest.raises(DrainTimedOut):
        drain.check(breaker)


def test_it_is_over_when_nothing_is_left_neither_claimed_nor_delayed(queues):
    drain = Drain(queues, "requests", None)
    queues.post("requests", ["a"])
    claim = queues.claim("requests", ttl=60, grace=60, limit=1)
    assert not drain.is_over(found=False)

    queues.release(claim, delay=100)
    assert not drain.is_over(found=False)

    queues.purge("requests")
    assert drain.is_over(found=False)


def test_where_the_service_counts_roughly_the_queue_must_stay_empty_which_is_said_once(queues, now):
    rough = TroubledQueues(queues, replace(queues.limits, approximate_s=60))
    drain = Drain(rough, "requests", None)
    with capture_logs() as logs:
        found = []
        for _ in range(3):
            found.append(drain.is_over(found=False))
            now[0] += 30

    assert found == [False, False, True]
    assert [line["event"].partition(":")[0] for line in logs] == ["waiting"]
