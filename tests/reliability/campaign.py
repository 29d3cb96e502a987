"""What a reliability campaign is: a run of many trials with faults, its figures, and what it found broken."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Result:
    """figures: what was measured, by name (n first). violations: one line for each broken promise, empty when none."""

    figures: dict[str, int | float | str]
    violations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Campaign:
    """name: as `make campaigns ONLY=` takes it. shows: the promise, in one line, for docs/reliability.md.

    run: takes the scale (1: full size; CI runs a small tier, 0.01 or so) and does the trials.
    """

    name: str
    shows: str
    run: Callable[[float], Result]
