"""Decide whose fault a failed delivery is: the message's, or that of the target to which all messages go.

An outage must never count against messages, and one bad message must never stop the others. So a failure that tells
nothing blames nobody at first. When another message passes soon, the target was well, and the one that failed alone
is to blame; when none does, the breaker opens, nobody is blamed, and the target is tried with one message at a time.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Protocol, TypeVar

MOST_FAILURES = 10
"""So many different messages that fail in a row open the breaker."""
UNDECIDED_S = 1.0
"""How long a failure waits for another message to pass, or the breaker opens."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 10.0
"""Between probes: doubled each time, with full jitter."""
CHANCE_CROWDS = 2
"""So often a message may fail together with others by chance; when more often, it is what makes the others fail."""
MOST_REMEMBERED = 1_000
"""Messages that failed together with others."""


class Failure(Enum):
    """What a failed delivery looks like."""

    FAILED = "failed"
    """The target tried and failed with this message."""
    UNAVAILABLE = "unavailable"
    """No answer, or one that asks to come back later."""
    MISCONFIGURED = "misconfigured"
    """Not our target, or it does not know us: waiting does not mend it."""


class Case(Protocol):
    """A message whose delivery failed. retry_after_s: the pause that the target asked for, or None."""

    @property
    def id(self) -> str: ...

    @property
    def failure(self) -> Failure | None: ...

    @property
    def retry_after_s(self) -> float | None: ...


C = TypeVar("C", bound=Case)


@dataclass(frozen=True, slots=True)
class Verdict(Generic[C]):
    """What a failure means.

    blamed: it counts against them. excused: it does not, and they go back. pardoned: ids of messages that were
    blamed before, and wrongly: one receive each does not count after all. opened_by: the failure for which nothing
    but probes may be delivered from now on; None where nothing changes.
    """

    blamed: list[C] = field(default_factory=list)
    excused: list[C] = field(default_factory=list)
    pardoned: list[str] = field(default_factory=list)
    opened_by: C | None = None


class Breaker(Generic[C]):
    """Whether the target can be trusted with more than a probe. Not thread-safe; times are monotonic seconds.

    open_for: why it is open, None while it is closed. last_failed: id of the message that failed last.
    """

    def __init__(
        self, *, uniform: Callable[[float, float], float] = random.uniform, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._uniform = uniform
        self._clock = clock
        self.open_for: Failure | None = None
        self.opened_at = 0.0
        self.next_probe_at = 0.0
        self.misconfigured_since: float | None = None
        self.last_failed = ""
        self._ever_passed = False
        self._failed_probes = 0
        self._row: set[str] = set()
        self._blamed: list[str] = []
        self._suspects: list[C] = []
        self._undecided_until = 0.0
        self._crowds: dict[str, int] = {}

    @property
    def is_open(self) -> bool:
        return self.open_for is not None

    @property
    def decide_at(self) -> float | None:
        """When undecided() has to be called, unless a message passes before; None when nothing is undecided."""
        return self._undecided_until if self._suspects and not self.is_open else None

    def passed(self, *, probe: bool = False) -> Verdict[C]:
        """A message passed, so the target is well now: one that failed alone meanwhile failed by its own fault.

        One that was on its way when the breaker opened shows only that the target was well before.
        """
        if self.is_open and not probe:
            return Verdict()
        suspects, was_open = self.take_suspects(), self.is_open
        self._ever_passed = True
        self._close()
        if was_open:
            return Verdict(excused=suspects)
        blamed = suspects if len({case.id for case in suspects}) == 1 else self._notorious(suspects)
        return Verdict(blamed=blamed, excused=[case for case in suspects if case not in blamed])

    def failed(self, case: C, *, probe: bool = False, guilty: bool = False) -> Verdict[C]:
        """A message failed. probe: it was sent to try the target. guilty: it failed alone, the target being well."""
        if self.is_open and not probe:  # it was on its way when the breaker opened
            return Verdict(excused=[case])
        probing = self.is_open
        self.last_failed = case.id
        if guilty and case.failure is not Failure.MISCONFIGURED:
            self._close()
            return Verdict(blamed=[case], excused=self.take_suspects())
        self._row.add(case.id)
        many = len(self._row) >= MOST_FAILURES
        if case.failure is Failure.FAILED and not probing and not many:
            self._blamed.append(case.id)
            return Verdict(blamed=[case])
        if not self._suspects:
            self._undecided_until = self._clock() + UNDECIDED_S
        self._suspects.append(case)
        stranger = case.failure is Failure.MISCONFIGURED and not self._ever_passed
        return self._open() if probing or many or stranger else Verdict()

    def undecided(self) -> Verdict[C]:
        """No message passed soon enough after one that failed."""
        return self._open()

    def take_suspects(self) -> list[C]:
        """Those whose failure nothing has explained; they are the caller's from now on."""
        suspects, self._suspects = self._suspects, []
        return suspects

    def _close(self) -> None:
        self.open_for = self.misconfigured_since = None
        self._failed_probes = 0
        self._row.clear()
        self._blamed.clear()

    def _open(self) -> Verdict[C]:
        """Open, or stay open after a failed probe. The latest failure alone stays suspect: the next probe decides."""
        now, latest = self._clock(), self._suspects[-1]
        blamed: list[C] = []
        if not self.is_open:
            self.opened_at = now
            blamed = self._notorious(self._suspects)
        if latest.failure is not self.open_for:  # it answers otherwise than before: it may soon be back
            self._failed_probes = 0
        self.open_for = latest.failure
        if latest.failure is not Failure.MISCONFIGURED:
            self.misconfigured_since = None
        elif self.misconfigured_since is None:
            self.misconfigured_since = now
        pause = backoff(self._failed_probes, base_s=FIRST_PAUSE_S, longest_s=LONGEST_PAUSE_S, uniform=self._uniform)
        self._failed_probes += 1
        self.next_probe_at = now + max(pause, latest.retry_after_s or 0)
        pardoned, self._blamed = self._blamed, []
        unexplained = [case for case in self._suspects if case not in blamed]
        self._suspects = unexplained[-1:]
        self._row.clear()
        return Verdict(blamed=blamed, excused=unexplained[:-1], pardoned=pardoned, opened_by=latest)

    def _notorious(self, crowd: list[C]) -> list[C]:
        """Those of a crowd that were in more crowds than chance explains, as one that kills the target is."""
        for id_ in {case.id for case in crowd}:
            self._crowds[id_] = self._crowds.pop(id_, 0) + 1
        while len(self._crowds) > MOST_REMEMBERED:
            del self._crowds[next(iter(self._crowds))]
        return [
            case
            for case in crowd
            if self._crowds.get(case.id, 0) > CHANCE_CROWDS and case.failure is not Failure.MISCONFIGURED
        ]


def backoff(attempt: int, *, base_s: float, longest_s: float, uniform: Callable[[float, float], float]) -> float:
    """Seconds to wait after failure number attempt (from 0): exponential with full jitter."""
    return uniform(0, min(longest_s, base_s * 2.0 ** min(attempt, 32)))
