"""The maker's pages for people, as HTML: what is drawn on them, and where one can go from each."""

import math
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Any

from flask import Flask, render_template

from claim_queues.command_line import one_line
from widgets import Widgets

FOUND_PER_PAGE = 20
BUCKET_S, BUCKETS = 5, 60
RATE_S = 10
Total = tuple[str, int, list[tuple[str, int]]]
"""What is counted, how often it was, and of what parts that is the sum."""


class Pages:
    """The pages of an application's widgets; its directory `templates` holds them.

    faults: a `widget_maker.Faults`. totals: gives what is counted besides the widgets.
    """

    def __init__(self, app: Flask, widgets: Widgets, faults: object, totals: Callable[[], list[Total]]) -> None:
        self._widgets = widgets
        self._faults = faults
        self._totals = totals
        self._made_before = lru_cache(maxsize=2 * BUCKETS)(widgets.made_before)  # most are asked for each second
        app.jinja_env.globals["chooser"] = chooser

    def listed(self, after: int, limit: int) -> str:
        """Up to `limit` widgets behind the marker `after`; before the newest widget: with rates, totals and faults."""
        found, following = self._widgets.page(after, limit)
        count = self._widgets.count()
        shown = {"widgets": found, "count": count, "limit": limit, "pages": _ways(after, limit, count, following)}
        if after <= count:
            return render_template("widgets.html", last=after - 1, **shown)
        totals = [("Widgets", count, []), *self._totals()]
        rates = measure_rates(self._made_before)
        return render_template("widgets.html", is_first=True, totals=totals, faults=self._faults, **rates, **shown)

    def found(self, prefix: str, after: str) -> str:
        """The widgets whose ids begin with `prefix`, behind the id `after`."""
        found, following = self._widgets.search(prefix, after, FOUND_PER_PAGE)
        return render_template("search.html", searched=one_line(prefix, 80), widgets=found, following=following)

    def one(self, widget: dict[str, Any]) -> str:
        """That widget, and what its id says."""
        return render_template("widget.html", widget=widget, origin=read_id(widget["id"]))


def measure_rates(made_before: Callable[[datetime], int]) -> dict[str, Any]:
    """Widgets per second: rate, over the last RATE_S; rates, for each of the last BUCKETS of BUCKET_S, oldest first."""
    now = datetime.now(UTC)
    end = now.timestamp() // BUCKET_S * BUCKET_S
    ends = [datetime.fromtimestamp(end - BUCKET_S * ago, UTC) for ago in reversed(range(BUCKETS + 1))]
    rates = [(after - before) / BUCKET_S for before, after in pairwise(map(made_before, ends))]
    return {
        "rate": (made_before(now) - made_before(now - timedelta(seconds=RATE_S))) / RATE_S,
        "rate_s": RATE_S,
        "rates": rates,
        "top": round_up(max(rates)),
        "minutes": BUCKETS * BUCKET_S // 60,
    }


def round_up(number: float) -> float:
    """The next number that is 1, 2 or 5 times a power of ten; 1 for 0."""
    power: float = 10.0 ** math.floor(math.log10(number or 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


def read_id(widget_id: str) -> dict[str, Any]:
    """What a UUID of version 1 says of its origin: made_at (ISO 8601, UTC), node, is_random (node), clock_sequence."""
    found = uuid.UUID(widget_id)
    made_at = datetime(1582, 10, 15, tzinfo=UTC) + timedelta(microseconds=found.time // 10)
    return {
        "made_at": made_at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "node": found.node.to_bytes(6).hex(":"),
        "is_random": bool(found.node >> 40 & 1),
        "clock_sequence": found.clock_seq,
    }


def chooser(widget_id: str) -> Callable[[Sequence[Any]], Any]:
    """A function that chooses from its options, each time anew, and for the same widget always the same."""
    bits = int.from_bytes(blake2b(widget_id.encode(), digest_size=16).digest())

    def choose(options: Sequence[Any]) -> Any:
        nonlocal bits
        bits, which = divmod(bits, len(options))
        return options[which]

    return choose


def _ways(after: int, limit: int, count: int, following: str | None) -> list[tuple[str, int | str | None]]:
    """The pages that one can go to from the one behind `after`: name and marker (None: the first)."""
    found: list[tuple[str, int | str | None]] = []
    if after <= count:
        found += [("Newest", None), ("Newer", after + limit if after + limit <= count else None)]
    if following:
        found += [("Older", following), ("Oldest", limit + 1)]
    return found
