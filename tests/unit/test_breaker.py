"""Whose fault a failed delivery is: each rule of the breaker, then random histories of a target and its messages."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claim_queues.breaker import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MOST_FAILURES,
    UNDECIDED_S,
    Breaker,
    Failure,
    Verdict,
    backoff,
)

FAILED, UNAVAILABLE, MISCONFIGURED = Failure


@dataclass(frozen=True, eq=False)
class Case:
    id: str
    failure: Failure | None = UNAVAILABLE
    retry_after_s: float | None = None


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker[Case]:
    """One with the longest of the pauses that jitter allows, whose target has answered before."""
    breaker: Breaker[Case] = Breaker(uniform=lambda low, high: high, clock=clock)
    breaker.passed()
    return breaker


def fail_many(breaker: Breaker[Case], failure: Failure, number: int = MOST_FAILURES) -> list[Verdict[Case]]:
    return [breaker.failed(Case(f"m{place}", failure)) for place in range(number)]


def ids(cases: list[Case]) -> list[str]:
    return [case.id for case in cases]


# Closed


def test_a_message_with_which_the_target_failed_is_blamed_at_once(breaker: Breaker[Case]) -> None:
    verdict = breaker.failed(case := Case("bad", FAILED))
    assert verdict == Verdict(blamed=[case])
    assert not breaker.is_open


@pytest.mark.parametrize("failure", [UNAVAILABLE, MISCONFIGURED])
def test_a_failure_that_tells_nothing_blames_nobody_at_first(breaker: Breaker[Case], failure: Failure) -> None:
    assert breaker.failed(Case("m", failure)) == Verdict()
    assert not breaker.is_open


@pytest.mark.parametrize("failure", [UNAVAILABLE, MISCONFIGURED])
def test_another_message_that_passes_soon_leaves_the_blame_with_one_that_failed_alone(
    breaker: Breaker[Case], failure: Failure
) -> None:
    breaker.failed(case := Case("m", failure))
    assert breaker.passed() == Verdict(blamed=[case])
    assert breaker.passed() == Verdict()


def test_of_several_that_failed_before_another_passed_nobody_is_blamed(breaker: Breaker[Case]) -> None:
    breaker.failed(first := Case("first"))
    breaker.failed(second := Case("second"))
    assert breaker.passed() == Verdict(excused=[first, second])


def test_a_message_in_whose_company_others_fail_again_and_again_is_blamed_from_the_third_time(
    breaker: Breaker[Case],
) -> None:
    for time in range(2):
        breaker.failed(Case("killer"))
        breaker.failed(Case(f"innocent {time}"))
        assert breaker.passed().blamed == []
    breaker.failed(killer := Case("killer"))
    breaker.failed(innocent := Case("another innocent"))
    assert breaker.passed() == Verdict(blamed=[killer], excused=[innocent])


def test_so_is_one_with_which_the_breaker_opens_again_and_again(breaker: Breaker[Case]) -> None:
    for time in range(2):
        breaker.failed(Case("killer"))
        breaker.failed(Case(f"innocent {time}"))
        assert breaker.undecided().blamed == []
        breaker.passed(probe=True)
    breaker.failed(killer := Case("killer"))
    breaker.failed(innocent := Case("another innocent"))
    assert breaker.undecided() == Verdict(blamed=[killer], opened_by=innocent)
    assert breaker.take_suspects() == [innocent]


def test_what_is_not_our_target_makes_no_message_notorious(breaker: Breaker[Case]) -> None:
    for _ in range(5):
        breaker.failed(Case("one", MISCONFIGURED))
        breaker.failed(Case("two", MISCONFIGURED))
        assert breaker.passed().blamed == []


def test_a_failure_has_to_be_decided_a_second_after_it(breaker: Breaker[Case], clock: Clock) -> None:
    assert breaker.decide_at is None
    breaker.failed(Case("first"))
    clock.now += 0.7
    breaker.failed(Case("second"))
    assert breaker.decide_at == 1_000 + UNDECIDED_S


def test_a_message_that_passes_leaves_nothing_undecided(breaker: Breaker[Case]) -> None:
    breaker.failed(Case("m"))
    breaker.passed()
    assert breaker.decide_at is None


def test_when_none_passes_the_breaker_opens_and_excuses_all_but_the_latest(breaker: Breaker[Case]) -> None:
    first, second, latest = Case("first"), Case("second"), Case("latest")
    for case in (first, second, latest):
        breaker.failed(case)
    verdict = breaker.undecided()
    assert verdict == Verdict(excused=[first, second], opened_by=latest)
    assert breaker.open_for is UNAVAILABLE
    assert breaker.decide_at is None


@pytest.mark.parametrize("failure", Failure)
def test_ten_messages_failing_in_a_row_open_the_breaker(breaker: Breaker[Case], failure: Failure) -> None:
    verdicts = fail_many(breaker, failure)
    assert [verdict.opened_by for verdict in verdicts[:-1]] == [None] * 9
    assert verdicts[-1].opened_by is not None
    assert breaker.open_for is failure


def test_one_message_failing_ten_times_does_not_open_the_breaker(breaker: Breaker[Case]) -> None:
    for _ in range(10):
        assert breaker.failed(Case("bad", FAILED)).opened_by is None


def test_a_message_that_passes_ends_the_row(breaker: Breaker[Case]) -> None:
    fail_many(breaker, FAILED, 9)
    breaker.passed()
    fail_many(breaker, FAILED, 9)
    assert not breaker.is_open


def test_opening_pardons_what_was_blamed_in_the_row(breaker: Breaker[Case]) -> None:
    breaker.failed(Case("before", FAILED))
    breaker.passed()
    verdicts = fail_many(breaker, FAILED)
    assert [ids(verdict.blamed) for verdict in verdicts] == [[f"m{place}"] for place in range(9)] + [[]]
    assert verdicts[-1].pardoned == [f"m{place}" for place in range(9)]


def test_a_message_blamed_twice_in_the_row_is_pardoned_twice(breaker: Breaker[Case]) -> None:
    breaker.failed(Case("m0", FAILED))
    assert fail_many(breaker, FAILED)[-1].pardoned.count("m0") == 2


def test_what_opened_the_breaker_is_pardoned_only_once(breaker: Breaker[Case]) -> None:
    fail_many(breaker, FAILED)
    assert breaker.failed(Case("probe", FAILED), probe=True).pardoned == []


# Misconfigured


def test_a_stranger_at_the_first_answer_opens_the_breaker_at_once(clock: Clock) -> None:
    breaker: Breaker[Case] = Breaker(clock=clock)
    verdict = breaker.failed(case := Case("m", MISCONFIGURED))
    assert verdict == Verdict(opened_by=case)
    assert breaker.open_for is MISCONFIGURED


def test_an_unavailable_target_at_the_first_message_does_not_open_it_at_once(clock: Clock) -> None:
    breaker: Breaker[Case] = Breaker(clock=clock)
    assert breaker.failed(Case("m", UNAVAILABLE)).opened_by is None


def test_misconfigured_is_never_blamed_on_its_own(breaker: Breaker[Case]) -> None:
    breaker.failed(Case("other", MISCONFIGURED))
    breaker.undecided()
    verdict = breaker.failed(case := Case("m", MISCONFIGURED), probe=True, guilty=True)
    assert verdict.blamed == []
    assert verdict.opened_by is case


def test_misconfigured_since_tells_since_when_without_a_break(breaker: Breaker[Case], clock: Clock) -> None:
    assert breaker.misconfigured_since is None
    breaker.failed(Case("first", MISCONFIGURED))
    breaker.undecided()
    clock.now += 30
    breaker.failed(Case("second", MISCONFIGURED), probe=True)
    assert breaker.misconfigured_since == 1_000
    breaker.failed(Case("third", UNAVAILABLE), probe=True)
    assert breaker.misconfigured_since is None
    breaker.failed(Case("fourth", MISCONFIGURED), probe=True)
    assert breaker.misconfigured_since == 1_030
    breaker.passed(probe=True)
    assert breaker.misconfigured_since is None


# Open


def open_breaker(breaker: Breaker[Case]) -> Case:
    breaker.failed(last := Case("opened it"))
    breaker.undecided()
    return last


@pytest.mark.parametrize("failure", Failure)
def test_what_was_on_its_way_when_the_breaker_opened_is_excused(breaker: Breaker[Case], failure: Failure) -> None:
    open_breaker(breaker)
    assert breaker.failed(case := Case("m", failure)) == Verdict(excused=[case])
    assert breaker.last_failed == "opened it"


@pytest.mark.parametrize("failure", Failure)
def test_a_failed_probe_stays_suspect_and_excuses_the_one_before(breaker: Breaker[Case], failure: Failure) -> None:
    before = open_breaker(breaker)
    verdict = breaker.failed(probe := Case("probe", failure), probe=True)
    assert verdict == Verdict(excused=[before], opened_by=probe)
    assert breaker.open_for is failure
    assert breaker.last_failed == "probe"


def test_the_next_probe_passing_closes_the_breaker_and_excuses_the_failed_one(breaker: Breaker[Case]) -> None:
    open_breaker(breaker)
    breaker.failed(probe := Case("probe"), probe=True)
    assert breaker.passed(probe=True) == Verdict(excused=[probe])
    assert not breaker.is_open


def test_a_suspect_that_was_taken_is_the_callers(breaker: Breaker[Case]) -> None:
    last = open_breaker(breaker)
    assert breaker.take_suspects() == [last]
    assert breaker.passed() == Verdict()


@pytest.mark.parametrize("failure", [FAILED, UNAVAILABLE])
def test_a_guilty_probe_is_blamed_and_closes_the_breaker(breaker: Breaker[Case], failure: Failure) -> None:
    open_breaker(breaker)
    breaker.take_suspects()
    assert breaker.failed(probe := Case("opened it", failure), probe=True, guilty=True) == Verdict(blamed=[probe])
    assert not breaker.is_open


def test_a_guilty_probe_excuses_whoever_is_suspect_still(breaker: Breaker[Case]) -> None:
    last = open_breaker(breaker)
    assert breaker.failed(Case("probe"), probe=True, guilty=True).excused == [last]
    assert breaker.decide_at is None


def test_a_message_that_was_on_its_way_and_passes_shows_nothing(breaker: Breaker[Case]) -> None:
    last = open_breaker(breaker)
    assert breaker.passed() == Verdict()
    assert breaker.is_open
    assert breaker.take_suspects() == [last]


def test_a_probe_whose_breaker_closed_meanwhile_counts_as_any_message(breaker: Breaker[Case]) -> None:
    open_breaker(breaker)
    breaker.passed(probe=True)
    assert breaker.failed(case := Case("probe", FAILED), probe=True) == Verdict(blamed=[case])


def test_ten_more_failures_in_a_row_are_needed_after_it_closed(breaker: Breaker[Case]) -> None:
    fail_many(breaker, FAILED)
    breaker.passed(probe=True)
    fail_many(breaker, FAILED, 9)
    assert not breaker.is_open


def test_opened_at_stays_through_failed_probes(breaker: Breaker[Case], clock: Clock) -> None:
    open_breaker(breaker)
    clock.now += 50
    breaker.failed(Case("probe"), probe=True)
    assert breaker.opened_at == 1_000


# Pauses


def test_pauses_between_probes_double_up_to_ten_seconds(breaker: Breaker[Case], clock: Clock) -> None:
    open_breaker(breaker)
    pauses = [breaker.next_probe_at - clock.now]
    for place in range(7):
        breaker.failed(Case(f"p{place}"), probe=True)
        pauses.append(breaker.next_probe_at - clock.now)
    assert pauses == [1, 2, 4, 8, 10, 10, 10, 10]


def test_pauses_start_over_once_the_target_is_back(breaker: Breaker[Case], clock: Clock) -> None:
    open_breaker(breaker)
    breaker.failed(Case("probe"), probe=True)
    breaker.passed(probe=True)
    open_breaker(breaker)
    assert breaker.next_probe_at - clock.now == 1


@pytest.mark.parametrize(("asked", "pause"), [(None, 1), (0.0, 1), (0.2, 1), (90.0, 90)])
def test_a_probe_waits_as_long_as_the_target_asks_and_no_less_than_the_pause(
    breaker: Breaker[Case], clock: Clock, asked: float | None, pause: float
) -> None:
    breaker.failed(Case("m", UNAVAILABLE, asked))
    breaker.undecided()
    assert breaker.next_probe_at - clock.now == pause


@given(st.integers(0, 10_000), st.floats(0.001, 10), st.floats(0.001, 1_000), st.floats(0, 1))
def test_backoff_lies_between_nothing_and_its_bound(attempt: int, base_s: float, longest_s: float, luck: float) -> None:
    found = backoff(attempt, base_s=base_s, longest_s=longest_s, uniform=lambda low, high: low + luck * (high - low))
    assert 0 <= found <= longest_s
    assert found <= base_s * 2.0 ** min(attempt, 32)


def test_backoff_doubles_from_its_base() -> None:
    longest = [backoff(attempt, base_s=0.5, longest_s=300, uniform=lambda low, high: high) for attempt in range(11)]
    assert longest == [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300]


# Random histories


@dataclass
class History:
    """Drives a breaker as a consumer does: many messages while it is closed, one probe at a time while it is open."""

    clock: Clock = field(default_factory=Clock)
    blamed: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    pardoned: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    held: dict[int, Case] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.breaker: Breaker[Case] = Breaker(uniform=lambda low, high: high, clock=self.clock)

    def deliver(self, message: str, failure: Failure | None) -> None:
        """One delivery; while the breaker is open, a probe once that is due."""
        breaker = self.breaker
        if breaker.is_open:
            self.clock.now = max(self.clock.now, breaker.next_probe_at)
        if failure is None:
            self.act_on(breaker.passed(probe=breaker.is_open))
            return
        case = Case(message, failure)
        self.failures[message] += 1
        self.held[id(case)] = case
        self.act_on(breaker.failed(case, probe=breaker.is_open))

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        if (due := self.breaker.decide_at) is not None and self.clock.now >= due:
            self.act_on(self.breaker.undecided())

    def act_on(self, verdict: Verdict[Case]) -> None:
        self.blame(verdict.blamed)
        for case in verdict.excused:
            self.excused[self.held.pop(id(case)).id] += 1
        self.pardoned.update(verdict.pardoned)

    def blame(self, cases: list[Case]) -> None:
        for case in cases:
            self.blamed[self.held.pop(id(case)).id] += 1

    def charged(self, message: str) -> int:
        return self.blamed[message] - self.pardoned[message]


messages = st.sampled_from([f"m{place}" for place in range(14)])
waits = st.sampled_from([0.0, 0.3, 0.8, 2.0])
deliveries = st.tuples(messages, st.sampled_from([None, *Failure]), waits)


@given(st.lists(deliveries, max_size=80))
def test_every_failure_is_blamed_or_excused_or_still_suspect(steps: list[tuple[str, Failure | None, float]]) -> None:
    history = History()
    for message, failure, wait in steps:
        history.deliver(message, failure)  # a case that ends twice is missing from `held` the second time
        history.wait(wait)
    suspects = history.breaker.take_suspects()
    assert {id(case) for case in suspects} == set(history.held)
    assert history.failures == history.blamed + history.excused + Counter(ids(suspects))
    assert all(history.pardoned[message] <= number for message, number in history.blamed.items())


@given(st.lists(st.tuples(messages, st.sampled_from([FAILED, UNAVAILABLE]), waits), min_size=1, max_size=60))
def test_while_the_target_is_down_no_failure_counts_once_the_breaker_is_open(
    outage: list[tuple[str, Failure, float]],
) -> None:
    history = History()
    history.deliver("before", None)
    for message, failure, wait in outage:
        history.deliver(message, failure)
        history.wait(wait)
        if history.breaker.is_open:
            assert all(history.charged(message) == 0 for message in history.failures)
    unavailable = {message for message, _, _ in outage} - {
        message for message, failure, _ in outage if failure is FAILED
    }
    assert all(history.blamed[message] == 0 for message in unavailable)


@given(st.lists(st.lists(messages, min_size=1, max_size=30), min_size=1, max_size=2))
def test_an_outage_costs_no_message_a_receive(outages: list[list[str]]) -> None:
    history = History()
    for outage in outages:
        history.deliver("between", None)
        for message in outage:
            history.deliver(message, UNAVAILABLE)
            history.wait(2)
        history.deliver("between", None)
    assert not history.blamed


@given(st.lists(st.sampled_from(["good", "failing", "hanging", "foreign"]), max_size=60), st.floats(0, 0.1))
def test_a_bad_message_among_passing_ones_is_blamed_each_time(kinds: list[str], wait: float) -> None:
    failures = {"failing": FAILED, "hanging": UNAVAILABLE, "foreign": MISCONFIGURED}
    history = History()
    history.deliver("good", None)
    for kind in kinds:
        history.deliver(kind, failures.get(kind))
        history.wait(wait)
        history.deliver("good", None)
    assert history.blamed == history.failures
    assert not history.breaker.is_open


@given(st.lists(messages, min_size=1, max_size=60), waits, st.booleans())
def test_a_target_that_is_never_ours_blames_nothing(misconfigured: list[str], wait: float, passed_before: bool) -> None:
    history = History()
    if passed_before:
        history.deliver("before", None)
    for message in misconfigured:
        history.deliver(message, MISCONFIGURED)
        history.wait(wait)
    assert not history.blamed


def test_a_target_that_answers_again_is_tried_again_soon(breaker: Breaker[Case], clock: Clock) -> None:
    fail_many(breaker, UNAVAILABLE)
    for _ in range(10):
        breaker.failed(Case("m", UNAVAILABLE), probe=True)
    assert breaker.next_probe_at - clock.now == LONGEST_PAUSE_S
    breaker.failed(Case("m", FAILED), probe=True)
    assert breaker.next_probe_at - clock.now == FIRST_PAUSE_S
