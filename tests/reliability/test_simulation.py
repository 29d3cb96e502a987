"""A small tier of the simulation, seeds that failed once, and proof that it replays and that it bites."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from support import HERE

from claim_queues import keeper
from claim_queues.base import Settled
from receive_counts import ReceiveCounts

from . import simulation
from .simulation import MARKS, simulate
from .world import ZaqarDouble

FAILED_ONCE = {
    266: "a look at /healthz took its time from that for which the claim was held",
    1461: "bad messages at the head of the queue were tried in turn for ever, and no other",
    1524: "the same, on Zaqar",
    8745: "a charge waited for the counts until its claim was too short for a POST",
}
TIER = 200


@pytest.mark.parametrize("first", range(0, TIER, 50))
def test_every_promise_holds(first: int) -> None:
    found = {seed: simulate(seed).violations for seed in range(first, first + 50)}
    assert {seed: violations for seed, violations in found.items() if violations} == {}


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_a_seed_that_failed_once_passes(seed: int) -> None:
    assert simulate(seed).violations == []


def test_every_mark_is_reached() -> None:
    marks: Counter[str] = Counter()
    for seed in range(TIER, TIER + simulation.ALL_MARKS_WITHIN):
        marks += simulate(seed).marks
        if all(marks[mark] for mark in MARKS):
            return
    assert [mark for mark in MARKS if not marks[mark]] == []


def test_a_seed_replays_to_the_bit_even_in_another_process() -> None:
    """Also with other hashes of strings, which decide the order of sets."""
    seeds = range(3)
    command = "from reliability.simulation import simulate; print([simulate(seed).digest for seed in range(3)])"
    paths = os.pathsep.join([str(HERE), str(HERE / "tests"), *sys.path])
    told = {
        subprocess.run(
            [sys.executable, "-c", command],
            env=os.environ | {"PYTHONHASHSEED": hashes, "PYTHONPATH": paths},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for hashes in ("1", "2")
    }
    assert told == {str([simulate(seed).digest for seed in seeds])}
    assert len({simulate(seed).digest for seed in seeds}) == len(seeds)


def test_a_campaign_tells_what_it_ran_and_which_seed_broke_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    result = simulation.run(10 / simulation.FULL_SIZE)
    assert (result.figures["n"], result.violations) == (10, [])

    broken = replace(simulate(0), violations=["at 1 s: lost"])
    monkeypatch.setattr(simulation, "simulate", lambda seed: broken)
    assert simulation.run(1 / simulation.FULL_SIZE).violations == ["seed 0: at 1 s: lost"]
    monkeypatch.setattr(simulation, "ALL_MARKS_WITHIN", 1)
    assert any("never reached" in violation for violation in simulation.run(1 / simulation.FULL_SIZE).violations)


# Planted bugs


def is_seen(promise: str, seeds: int = 300) -> bool:
    return any(promise in violation for seed in range(seeds) for violation in simulate(seed).violations)


def test_a_delete_before_the_response_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(self: ZaqarDouble, claim: Any, settlements: Any) -> Settled:
        self._delete_unfenced(claim.queue, [each.message.id for each in settlements], {claim.id})
        return SETTLE(self, claim, settlements)

    monkeypatch.setattr(ZaqarDouble, "settle", settle)
    assert is_seen("deleted before its outcome was stored")


SETTLE = ZaqarDouble.settle


def test_receives_that_an_outage_costs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReceiveCounts, "excuse", lambda *args: None)
    assert is_seen("receives of its own fault")


def test_work_on_a_lost_claim_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper.Keeper, "holds", lambda *args: True)
    assert is_seen("is not held")


def test_a_count_that_is_not_stored_before_the_post_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReceiveCounts, "_store", lambda *args, **options: None)
    assert is_seen("is POSTed as received")
