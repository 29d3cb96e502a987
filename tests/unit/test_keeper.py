"""Holding claims until every message has ended: on the embedded queue, and on a service that can less.

The queue and the keeper share one clock, which stands still until a test moves it.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from support import wait_until

from claim_queues import (
    Claim,
    ClaimLost,
    ConfigError,
    Message,
    MessageRefused,
    Post,
    QueueError,
    QueueForbidden,
    QueueUnavailable,
    Settled,
    Settlement,
    StoreError,
)
from claim_queues.keeper import LONGEST_PAUSE_S, REFUSED_DELAY_S, SAFETY_S, End, Held, Keeper
from claim_queues.sqlite import LIMITS, SqliteQueues

TTL = 60
HALF = TTL / 2 - SAFETY_S
"""When a claim is renewed first: half its time before it is trusted no more."""
REQUESTS, RESPONSES = "requests", "responses"
OUTAGE = QueueUnavailable("the service is down")


class Clock:
    """A clock that only move() moves; the keeper looks again then."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.moved: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.moved()


class Watched(SqliteQueues):
    """The embedded queue. calls: what the keeper asked for. trouble: run before each call; what it raises, it fails."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        super().__init__(path, clock=clock)
        self.calls: list[tuple[str, list[str]]] = []
        self.trouble: Callable[[str, Claim], None] = lambda call, claim: None
        self.running: Counter[str] = Counter()

    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        with self._call("renew", claim, messages):
            super().renew(claim, ttl=ttl, messages=messages)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        with self._call("settle", claim, [settlement.message for settlement in settlements]):
            return super().settle(claim, settlements)

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        with self._call("release", claim, messages):
            super().release(claim, messages, delay=delay)

    def _call(self, name: str, claim: Claim, messages: Collection[Message] | None) -> ExitStack:
        """Note the call until the end of the block; two at once about one claim are no good."""
        self.running[claim.id] += 1
        assert self.running[claim.id] == 1
        with ExitStack() as stack:
            stack.callback(self.running.subtract, [claim.id])
            self.calls.append((name, [message.id for message in messages or ()]))
            self.trouble(name, claim)
            return stack.pop_all()

    def made(self, name: str) -> list[list[str]]:
        """The messages of each such call."""
        return [ids for made, ids in self.calls if made == name]


class WholeClaims(Watched):
    """A service that releases whole claims only, without delay, and does not notice lapsed ones."""

    limits = replace(
        LIMITS,
        service="the test's",
        fenced_delete=False,
        atomic_settle=False,
        releases_one_message=False,
        release_delay=0,
        settle_linger=0.1,
    )

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        if messages is not None or delay:
            raise ConfigError("only whole claims are released here, at once")
        super().release(claim)


class Told:
    """What the keeper told its owner."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, End]] = []
        self.refused: list[str] = []
        self.failures = 0
        self.answers = 0
        self.died: Exception | None = None
        self.trouble: Exception | None = None

    def messages_ended(self, ended: list[Held], end: End) -> None:
        self.ended += [(held.message.id, end) for held in ended]
        if self.trouble is not None:
            raise self.trouble

    def message_refused(self, held: Held, error: MessageRefused) -> None:
        self.refused.append(held.message.id)

    def service_failed(self, error: Exception) -> None:
        self.failures += 1

    def service_answered(self) -> None:
        self.answers += 1

    def keeper_died(self, error: Exception) -> None:
        self.died = error


class Bench:
    """A keeper, its queues, its clock, and what it told."""

    def __init__(self, kind: type[Watched], path: Path) -> None:
        self.clock = Clock()
        self.queues = kind(path, self.clock)
        self.told = Told()
        self.keeper = Keeper(self.queues, self.told, claim_ttl=TTL, grace=60, clock=self.clock)
        self.clock.moved = self.look_again

    def look_again(self) -> None:
        with self.keeper._changed:
            self.keeper._changed.notify()

    def claim(self, number: int) -> list[Held]:
        self.queues.post(REQUESTS, [{"n": n} for n in range(number)])
        return self.keeper.claim(REQUESTS, limit=20)

    def settle(self, *held: Held) -> None:
        for one in held:
            self.keeper.settle(one, [Post(RESPONSES, {"of": one.message.id})], fenced=True)

    def wait_for(self, *ended: tuple[Held, End]) -> None:
        """Wait until these have ended, all of them and none twice."""
        expected = Counter((held.message.id, end) for held, end in ended)
        wait_until(lambda: len(self.told.ended) >= expected.total() or self.told.died)
        assert Counter(self.told.ended) == expected

    def wait_until_idle(self) -> None:
        """Wait until the keeper has done all that is due: a message of another queue then passes through it."""
        self.queues.post("markers", ["marker"])
        (marker,) = self.keeper.claim("markers", limit=1)
        end = (marker.message.id, End.SETTLED)
        self.keeper.settle(marker, [], fenced=True)
        wait_until(lambda: end in self.told.ended)
        self.told.ended.remove(end)
        self.queues.calls.remove(("settle", [marker.message.id]))

    def responses(self) -> list[str]:
        return [message.body["of"] for message in self.queues.browse(RESPONSES, limit=100).messages]

    def close(self) -> None:
        self.keeper.close(0)
        self.keeper._thread.join()
        self.queues.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(Watched, tmp_path / "queues.sqlite3")
    yield bench
    bench.close()


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose service can only release whole claims, and is not fenced."""
    bench = Bench(WholeClaims, tmp_path / "queues.sqlite3")
    yield bench
    bench.close()


@pytest.fixture(params=[Watched, WholeClaims], ids=["embedded", "whole claims"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(request.param, tmp_path / "queues.sqlite3")
    yield bench
    bench.close()


def ids(*held: Held) -> list[str]:
    return [one.message.id for one in held]


def failing(*names: str, error: Exception = OUTAGE) -> Callable[[str, Claim], None]:
    def trouble(name: str, claim: Claim) -> None:
        if name in names:
            raise error

    return trouble


def no_trouble(name: str, claim: Claim) -> None:
    """The service works."""


# Hold


def test_what_was_claimed_is_held(either: Bench) -> None:
    held = either.claim(3)
    assert [one.message.body for one in held] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert either.keeper.count() == 3


def test_nothing_to_claim_is_nothing_held(either: Bench) -> None:
    assert either.keeper.claim(REQUESTS, limit=20) == []
    assert either.keeper.count() == 0


def test_a_claim_is_renewed_at_half_its_ttl_and_not_before(either: Bench) -> None:
    held = either.claim(2)
    either.clock.move(HALF - 0.1)
    either.wait_until_idle()
    assert either.queues.made("renew") == []
    either.clock.move(0.1)
    wait_until(lambda: either.queues.made("renew"))
    assert either.queues.made("renew") == [ids(*held)]


def test_a_claim_whose_answer_was_late_is_renewed_all_the_same(either: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = either.queues.claim

    def answer_late(*queue: str, **terms: float) -> Claim | None:
        found = claim(*queue, **terms)
        either.clock.now += HALF
        return found

    monkeypatch.setattr(either.queues, "claim", answer_late)
    held = either.claim(1)
    wait_until(lambda: either.queues.made("renew"), seconds=TTL / 8)
    assert either.queues.made("renew") == [ids(*held)]


def test_a_renewed_claim_is_held_for_as_long_as_its_work_takes(either: Bench) -> None:
    either.claim(1)
    for times in range(1, 8):
        either.clock.move(TTL / 2)
        wait_until(lambda times=times: len(either.queues.made("renew")) == times)
    assert either.queues.claim(REQUESTS, ttl=TTL, grace=60, limit=20) is None
    assert either.keeper.count() == 1


def test_only_open_messages_are_renewed(bench: Bench) -> None:
    first, second = bench.claim(2)
    bench.settle(first)
    bench.clock.move(HALF)
    wait_until(lambda: bench.queues.made("renew") and bench.told.ended)
    bench.clock.move(TTL / 2)
    wait_until(lambda: len(bench.queues.made("renew")) == 2)
    assert bench.queues.made("renew")[1] == ids(second)


def test_a_claim_that_the_service_calls_lost_ends_its_messages(either: Bench) -> None:
    held = either.claim(2)
    SqliteQueues.release(either.queues, held[0].of.claim)
    either.clock.move(HALF)
    either.wait_for(*((one, End.LOST) for one in held))
    assert [one.lost for one in held] == [True, True]
    assert either.keeper.count() == 0


def test_a_service_that_loses_some_messages_leaves_the_others_held(bench: Bench) -> None:
    first, second = bench.claim(2)
    bench.queues.trouble = failing("renew", error=ClaimLost("one lapsed", ids=frozenset(ids(first))))
    bench.clock.move(HALF)
    bench.wait_for((first, End.LOST))
    bench.settle(second)
    bench.wait_for((first, End.LOST), (second, End.SETTLED))


def test_a_claim_that_could_not_be_renewed_in_time_is_lost(either: Bench) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing("renew")
    either.clock.move(TTL - SAFETY_S - 0.1)
    wait_until(lambda: either.told.failures)
    assert not held.lost
    either.clock.move(0.1)
    either.wait_for((held, End.LOST))


def test_a_lost_message_is_neither_posted_nor_deleted(either: Bench) -> None:
    (held,) = either.claim(1)
    either.clock.move(TTL)
    either.wait_for((held, End.LOST))
    either.settle(held)
    either.keeper.give_back(held)
    either.wait_until_idle()
    assert either.queues.made("settle") == either.queues.made("release") == []
    assert held.message.id not in either.responses()
    assert either.queues.stats(REQUESTS).total == 1


def test_a_message_lost_while_its_settlement_waits_is_not_settled(whole: Bench) -> None:
    first, second = whole.claim(2)
    whole.queues.trouble = failing("settle", "renew")
    whole.settle(first)
    whole.clock.move(0.1)
    wait_until(lambda: whole.told.failures)
    whole.queues.trouble = no_trouble
    asked = len(whole.queues.made("settle"))
    whole.clock.move(TTL)
    whole.wait_for((first, End.LOST), (second, End.LOST))
    assert len(whole.queues.made("settle")) == asked


# Hold for a POST


def test_a_message_held_long_enough_needs_no_renewal(either: Bench) -> None:
    (held,) = either.claim(1)
    assert either.keeper.holds(held, TTL - SAFETY_S)
    assert either.queues.calls == []


def test_a_message_not_held_long_enough_is_renewed_first(either: Bench) -> None:
    (held,) = either.claim(1)
    either.clock.move(10)
    assert either.keeper.holds(held, TTL - SAFETY_S)
    assert either.queues.made("renew") == [ids(held)]


def test_a_message_is_not_held_when_its_claim_cannot_be_renewed(either: Bench) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing("renew")
    either.clock.move(10)
    assert not either.keeper.holds(held, TTL - SAFETY_S)
    assert either.keeper.holds(held, TTL - SAFETY_S - 10)
    assert (either.told.failures, held.lost) == (1, False)


def test_a_message_of_a_claim_that_proves_lost_is_not_held(either: Bench) -> None:
    (held,) = either.claim(1)
    SqliteQueues.release(either.queues, held.of.claim)
    either.clock.move(10)
    assert not either.keeper.holds(held, TTL - SAFETY_S)
    assert not either.keeper.holds(held, 0)
    assert either.told.ended == [(held.message.id, End.LOST)]


def test_a_damaged_file_reaches_the_one_who_asks_to_hold(either: Bench) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing("renew", error=StoreError("damaged"))
    either.clock.move(10)
    with pytest.raises(StoreError):
        either.keeper.holds(held, TTL - SAFETY_S)


def test_many_that_need_the_same_renewal_share_it(bench: Bench) -> None:
    held = bench.claim(8)
    bench.clock.move(10)
    meet = threading.Barrier(8)
    answers = []

    def ask(one: Held) -> None:
        meet.wait()
        answers.append(bench.keeper.holds(one, TTL - SAFETY_S))

    threads = [threading.Thread(target=ask, args=(one,)) for one in held]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    assert len(bench.queues.made("renew")) == 1


# Settle


def test_a_settled_message_is_posted_for_and_deleted(either: Bench) -> None:
    (held,) = either.claim(1)
    either.settle(held)
    either.wait_for((held, End.SETTLED))
    assert either.responses() == ids(held)
    assert either.queues.stats(REQUESTS).total == 0
    assert either.keeper.count() == 0


def test_settlements_of_a_claim_wait_for_company(either: Bench) -> None:
    first, second, third = either.claim(3)
    either.settle(first)
    either.clock.move(either.queues.limits.settle_linger / 2)
    either.settle(second)
    either.wait_until_idle()
    assert either.queues.made("settle") == []
    either.clock.move(either.queues.limits.settle_linger / 2)
    either.wait_for((first, End.SETTLED), (second, End.SETTLED))
    assert either.queues.made("settle") == [ids(first, second)]
    assert either.keeper.count() == 1
    assert not third.lost


def test_settlements_wait_no_longer_once_nothing_can_join_them(either: Bench) -> None:
    first, second, third = either.claim(3)
    either.keeper.give_back(third, delay=5)
    either.settle(first, second)
    either.wait_for(
        (first, End.SETTLED),
        (second, End.SETTLED),
        *([] if isinstance(either.queues, WholeClaims) else [(third, End.RELEASED)]),
    )
    assert either.queues.made("settle") == [ids(first, second)]


def test_a_message_that_another_holds_by_now_is_lost_to_the_settlement(bench: Bench) -> None:
    first, second = bench.claim(2)
    SqliteQueues.release(bench.queues, first.of.claim, [first.message])
    bench.settle(first, second)
    bench.wait_for((first, End.LOST), (second, End.SETTLED))
    assert bench.responses() == ids(second)


def test_an_outcome_that_no_queue_takes_leaves_its_message_queued_for_ten_minutes(bench: Bench) -> None:
    first, second = bench.claim(2)
    bench.keeper.settle(first, [Post(RESPONSES, "x" * 300_000)], fenced=True)
    bench.settle(second)
    bench.wait_for((second, End.SETTLED), (first, End.RELEASED))
    assert bench.told.refused == ids(first)
    bench.clock.move(REFUSED_DELAY_S - 1)
    assert bench.keeper.claim(REQUESTS, limit=20) == []
    bench.clock.move(1)
    assert ids(*bench.keeper.claim(REQUESTS, limit=20)) == ids(first)


def test_a_refused_message_of_a_whole_claim_is_held_for_ten_minutes(whole: Bench) -> None:
    (held,) = whole.claim(1)
    whole.keeper.settle(held, [Post(RESPONSES, "x" * 300_000)], fenced=True)
    wait_until(lambda: whole.told.refused)
    for _ in range(20):
        assert whole.keeper.backing_off() == 1
        whole.clock.move(TTL / 2)
        whole.wait_until_idle()
    whole.wait_for((held, End.RELEASED))


def test_settlements_that_the_service_fails_are_tried_again_with_pauses(either: Bench) -> None:
    held = either.claim(2)
    either.queues.trouble = failing("settle")
    either.settle(*held)
    pauses = []
    for attempt in range(1, 9):
        wait_until(lambda attempt=attempt: either.told.failures == attempt)
        pauses.append(round(held[0].of.settling.until - either.clock.now, 3))
        if attempt == 8:
            either.queues.trouble = no_trouble
        either.clock.move(pauses[-1] + 0.001)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, LONGEST_PAUSE_S]
    either.wait_for(*((one, End.SETTLED) for one in held))
    assert sorted(either.responses()) == sorted(ids(*held))
    wait_until(lambda: either.told.answers == 1)


def test_a_claim_whose_settlement_fails_for_ever_holds_up_no_other_and_is_still_renewed(either: Bench) -> None:
    (bad,) = either.claim(1)

    def trouble(name: str, claim: Claim) -> None:
        if name == "settle" and claim.id == bad.of.claim.id:
            raise QueueForbidden("not that one")

    either.queues.trouble = trouble
    either.settle(bad)
    wait_until(lambda: either.told.failures)
    (good,) = either.claim(1)
    either.settle(good)
    either.wait_for((good, End.SETTLED))
    for renewals in range(1, 5):
        either.clock.move(TTL / 2)
        wait_until(lambda renewals=renewals: len(either.queues.made("renew")) == renewals)
    assert not bad.lost
    assert either.told.answers == 0


def test_a_renewal_that_is_due_comes_before_settlements_that_wait(either: Bench) -> None:
    (blocker,), (in_flight,), (other,) = either.claim(1), either.claim(1), either.claim(1)
    asked, answer = threading.Event(), threading.Event()

    def trouble(name: str, claim: Claim) -> None:
        asked.set()
        answer.wait(30)

    either.queues.trouble = trouble
    either.settle(blocker)
    assert asked.wait(30)
    either.settle(other)
    either.clock.move(HALF)
    answer.set()
    either.wait_for((blocker, End.SETTLED), (other, End.SETTLED))
    assert either.queues.calls.index(("renew", ids(in_flight))) < either.queues.calls.index(("settle", ids(other)))


def test_a_claim_that_cannot_be_renewed_is_still_settled(either: Bench) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing("renew", error=QueueForbidden("no renewals"))
    either.clock.move(HALF)
    wait_until(lambda: either.told.failures)
    either.settle(held)
    either.wait_for((held, End.SETTLED))


def test_claims_lost_in_an_outage_are_no_sign_that_the_service_is_back(either: Bench) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing("renew", "settle", "release")
    either.clock.move(HALF)
    wait_until(lambda: either.told.failures)
    either.clock.move(TTL)
    either.wait_for((held, End.LOST))
    assert either.told.answers == 0
    either.queues.trouble = no_trouble
    either.wait_until_idle()
    wait_until(lambda: either.told.answers == 1)


def test_a_service_that_never_failed_is_not_told_to_be_back(either: Bench) -> None:
    either.wait_until_idle()
    either.wait_until_idle()
    assert either.told.answers == 0


def test_a_failed_renewal_for_a_post_is_told_as_mended_too(either: Bench) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing("renew")
    either.clock.move(10)
    assert not either.keeper.holds(held, TTL - SAFETY_S)
    either.queues.trouble = no_trouble
    assert either.keeper.holds(held, TTL - SAFETY_S)
    assert either.told.answers == 1


@pytest.mark.parametrize(
    "error", [StoreError("damaged"), ConfigError("no credentials"), RuntimeError("a bug")], ids=repr
)
@pytest.mark.parametrize("call", ["settle", "renew", "release"])
def test_what_waiting_cannot_mend_ends_the_keeper(either: Bench, call: str, error: Exception) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing(call, error=error)
    {
        "settle": lambda: either.settle(held),
        "renew": lambda: either.clock.move(HALF),
        "release": lambda: either.keeper.give_back(held),
    }[call]()
    wait_until(lambda: either.told.died)
    assert either.told.died is error
    assert either.keeper.close(0) == 1
    assert either.queues.stats(REQUESTS).total == 1


def test_the_pause_that_the_service_asks_for_is_kept(either: Bench) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing("settle", error=QueueUnavailable("too many requests", retry_after_s=30))
    either.settle(held)
    either.clock.move(either.queues.limits.settle_linger)
    wait_until(lambda: held.of.settling.seconds)
    assert held.of.settling.until == either.clock.now + 30
    either.queues.trouble = no_trouble


def test_an_owner_that_fails_when_told_does_not_make_the_keeper_settle_twice(either: Bench) -> None:
    first, second = either.claim(2)
    either.told.trouble = QueueUnavailable("the counts are locked")
    either.settle(first, second)
    wait_until(lambda: either.told.failures)
    either.told.trouble = None
    either.clock.move(LONGEST_PAUSE_S)
    either.wait_until_idle()
    either.wait_for((first, End.SETTLED), (second, End.SETTLED))
    assert either.queues.made("settle") == [ids(first, second)]


# Give back


def test_a_message_given_back_is_free_at_once(either: Bench) -> None:
    (held,) = either.claim(1)
    either.keeper.give_back(held)
    either.wait_for((held, End.RELEASED))
    assert ids(*either.keeper.claim(REQUESTS, limit=20)) == ids(held)


def test_the_service_keeps_the_delay_where_it_can(bench: Bench) -> None:
    first, second, third = bench.claim(3)
    bench.keeper.give_back(first, delay=10)
    bench.keeper.give_back(second, delay=100)
    bench.wait_for((first, End.RELEASED), (second, End.RELEASED))
    assert (bench.keeper.count(), bench.keeper.backing_off()) == (1, 0)
    bench.clock.move(10)
    assert ids(*bench.keeper.claim(REQUESTS, limit=20)) == ids(first)
    assert not third.lost


def test_a_delay_is_at_most_what_the_service_takes(bench: Bench) -> None:
    (held,) = bench.claim(1)
    bench.keeper.give_back(held, delay=LIMITS.release_delay + 1_000)
    bench.wait_for((held, End.RELEASED))
    bench.clock.move(LIMITS.release_delay)
    assert bench.keeper.claim(REQUESTS, limit=20)


def test_a_release_that_the_service_fails_is_tried_again(either: Bench) -> None:
    (held,) = either.claim(1)
    either.queues.trouble = failing("release")
    either.keeper.give_back(held)
    wait_until(lambda: either.told.failures)
    either.queues.trouble = no_trouble
    either.clock.move(LONGEST_PAUSE_S)
    either.wait_for((held, End.RELEASED))


def test_releases_reached_before_the_service_failed_are_not_repeated(bench: Bench) -> None:
    first, second = bench.claim(2)
    gate = threading.Event()

    def trouble(name: str, claim: Claim) -> None:
        gate.wait()
        if bench.queues.made("release")[1:] == [ids(second)]:
            raise OUTAGE

    bench.queues.trouble = trouble
    (blocker,) = bench.claim(1)
    bench.settle(blocker)  # so that both are given back before the keeper comes to them
    bench.keeper.give_back(first, delay=10)
    bench.keeper.give_back(second, delay=20)
    gate.set()
    wait_until(lambda: bench.told.failures)
    bench.clock.move(LONGEST_PAUSE_S)
    bench.wait_for((blocker, End.SETTLED), (first, End.RELEASED), (second, End.RELEASED))
    assert bench.queues.made("release") == [ids(first), ids(second), ids(second)]


def test_a_whole_claim_is_released_at_its_latest_backoff(whole: Bench) -> None:
    first, second = whole.claim(2)
    whole.keeper.give_back(second, delay=20)
    whole.keeper.give_back(first, delay=5)
    whole.clock.move(19.9)
    whole.wait_until_idle()
    assert whole.told.ended == []
    assert (whole.keeper.count(), whole.keeper.backing_off()) == (2, 2)
    whole.clock.move(0.1)
    whole.wait_for((first, End.RELEASED), (second, End.RELEASED))
    assert len(whole.queues.made("release")) == 1


def test_a_whole_claim_is_renewed_until_its_latest_backoff(whole: Bench) -> None:
    (held,) = whole.claim(1)
    whole.keeper.give_back(held, delay=5 * TTL)
    for _ in range(9):
        whole.clock.move(TTL / 2)
        whole.wait_until_idle()
        assert whole.queues.claim(REQUESTS, ttl=TTL, grace=60, limit=20) is None
    whole.clock.move(TTL / 2)
    whole.wait_for((held, End.RELEASED))


@pytest.mark.parametrize("hurried", [False, True])
def test_a_whole_claim_is_never_released_while_one_of_its_posts_is_in_flight(whole: Bench, hurried: bool) -> None:
    given_back, in_flight = whole.claim(2)
    if hurried:
        whole.keeper.hurry()
    whole.keeper.give_back(given_back)
    whole.wait_until_idle()
    assert whole.told.ended == []
    whole.settle(in_flight)
    whole.wait_for((in_flight, End.SETTLED), (given_back, End.RELEASED))
    assert [name for name, _ in whole.queues.calls] == ["settle", "release"]


# End


def test_in_a_hurry_settlements_wait_for_no_company(either: Bench) -> None:
    first, second = either.claim(2)
    either.settle(first)
    either.keeper.hurry()
    either.wait_for((first, End.SETTLED))
    assert not second.lost


def test_in_a_hurry_whole_claims_wait_for_no_backoff(whole: Bench) -> None:
    (held,) = whole.claim(1)
    whole.keeper.give_back(held, delay=100)
    whole.wait_until_idle()
    assert whole.told.ended == []
    whole.keeper.hurry()
    whole.wait_for((held, End.RELEASED))


def test_closing_settles_and_gives_back_all_that_is_over(either: Bench) -> None:
    settled, given_back = either.claim(2)
    either.settle(settled)
    either.keeper.give_back(given_back, delay=100)
    assert either.keeper.close(30) == 0
    either.wait_for((settled, End.SETTLED), (given_back, End.RELEASED))


def test_closing_leaves_what_is_not_over_and_asks_for_nothing_more(either: Bench) -> None:
    over, left, also_left = either.claim(3)
    either.settle(over)
    wait_until(lambda: either.keeper.close(0.05) == 2 or not either.keeper.count())
    either.keeper._thread.join(30)
    assert not either.keeper._thread.is_alive()
    asked = list(either.queues.calls)
    either.clock.move(HALF)
    either.keeper.give_back(left)
    either.settle(also_left)
    assert either.queues.calls == asked


def test_closing_waits_no_longer_than_its_patience_for_a_service_that_hangs(either: Bench) -> None:
    (held,) = either.claim(1)
    asked, answer = threading.Event(), threading.Event()

    def trouble(name: str, claim: Claim) -> None:
        asked.set()
        answer.wait(30)

    either.queues.trouble = trouble
    either.settle(held)
    assert asked.wait(30)
    assert either.keeper.close(0.01) == 1
    answer.set()
    either.keeper._thread.join(30)
    assert not either.keeper._thread.is_alive()


def test_closing_waits_for_a_post_in_flight(either: Bench) -> None:
    (held,) = either.claim(1)
    left: list[int] = []
    closing = threading.Thread(target=lambda: left.append(either.keeper.close(30)))
    closing.start()
    wait_until(lambda: either.keeper._closing)
    either.settle(held)
    closing.join()
    assert left == [0]
    either.wait_for((held, End.SETTLED))


# All at once


def test_threads_that_do_everything_at_once_end_each_message_once(either: Bench) -> None:
    dice = random.Random(1)

    def trouble(name: str, claim: Claim) -> None:
        if dice.random() < 0.2:
            raise QueueError("not now")

    def work(messages: list[Held], dice: random.Random) -> None:
        for held in messages:
            either.keeper.holds(held, TTL - SAFETY_S - dice.choice([0, 100]))
            if dice.random() < 0.7:
                either.settle(held)
            else:
                either.keeper.give_back(held, delay=dice.choice([0, 3]))

    held = [one for _ in range(15) for one in either.claim(20)]
    either.queues.trouble = trouble
    dice.shuffle(held)
    threads = [threading.Thread(target=work, args=(held[n::6], random.Random(n))) for n in range(6)]
    for thread in threads:
        thread.start()

    def all_ended() -> bool:
        either.clock.move(0.1)
        return not either.keeper.count()

    wait_until(all_ended)
    for thread in threads:
        thread.join()
    wait_until(lambda: len(either.told.ended) == len(held))
    assert sorted(id_ for id_, _ in either.told.ended) == sorted(ids(*held))
    settled = [id_ for id_, end in either.told.ended if end is End.SETTLED]
    assert either.queues.stats(RESPONSES).total == len(settled)
    assert either.queues.stats(REQUESTS).total == len(held) - len(settled)
    assert either.told.died is None
