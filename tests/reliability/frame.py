"""What a campaign is, how it is scaled, and how the findings of its parts become one."""

import operator
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Result(NamedTuple):
    """What a campaign, or a part of it, found. broken: a line for each promise that was not kept."""

    figures: dict[str, Any]
    broken: list[str]

    def plus(self, *broken: str, **figures: Any) -> "Result":
        """With these lines, those that are not empty, and these figures: a low line in their names is a space."""
        named = {name.replace("_", " "): value for name, value in figures.items()}
        return Result(self.figures | named, [*self.broken, *filter(None, broken)])


class Campaign(NamedTuple):
    """run: takes the scale, of which 1 is full size."""

    name: str
    shows: str
    run: Callable[[float], Result]


CAMPAIGNS: list[Campaign] = []


def campaign(
    shows: str, cases: Sequence[tuple[Any, ...]] = ((),), *, times: int = 1, lanes: int = 1
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Make a function a campaign of its name. It is called with the scale and each case, so many at the same time.

    times: how often it takes all cases at full size.
    """

    def add(work: Callable[..., Result]) -> Callable[..., Result]:
        def run(scale: float) -> Result:
            return together(lambda case: work(scale, *case), [*cases] * scaled(times, scale), lanes=lanes)

        CAMPAIGNS.append(Campaign(work.__name__.replace("_", "-"), shows, run))
        return work

    return add


def together(work: Callable[[Any], Result], cases: Iterable[Any], *, lanes: int = 1) -> Result:
    """What work(case) finds for each case, so many at a time: added up, but of what is called `most` the greatest."""
    with ThreadPoolExecutor(lanes) as pool:
        found = list(pool.map(work, cases))
    tried = sum(each.figures.pop("n", 1) for each in found)
    figures: dict[str, Any] = {"n": tried} if tried > 1 else {}
    for name, value in (item for each in found for item in each.figures.items()):
        add = max if name.startswith("most ") else operator.add
        figures[name] = add(figures[name], value) if name in figures else value
    return Result(figures, [line for each in found for line in each.broken] if tried else ["nothing was tried"])


def scaled(full: float, scale: float, least: int = 1) -> int:
    return max(least, round(full * scale))


def patience(scale: float) -> float:
    """Seconds more for what must be quick, where the scale is a test's: its machine may be busy."""
    return 0 if scale >= 0.05 else 30
