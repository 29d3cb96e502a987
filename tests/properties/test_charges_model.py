"""Charges, row, breaker and receive counts against a plain model of the table of charges, in random histories.

HISTORIES in the environment says how many are tried.
"""

import os
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock, patch

from hypothesis import example, given, settings
from hypothesis import strategies as st

from claim_queues import Message
from receive_counts import ReceiveCounts
from widgets.breaker import Breaker
from widgets.charges import Charges
from widgets.delivery import Answer, Failure
from widgets.monitoring import Metrics
from widgets.slots import Slots

MOST = 3
ANSWERS = {
    "created": Answer("created", status=201),
    "failed": Answer(failure=Failure.FAILED, status=500),
    "refused": Answer(failure=Failure.UNAVAILABLE),
    "gateway": Answer(failure=Failure.UNAVAILABLE, status=502),
    "late": Answer(failure=Failure.LATE),
    "cut": Answer(failure=Failure.CUT),
    "wrong": Answer(failure=Failure.MISCONFIGURED, status=404),
    "too many": Answer(failure=Failure.UNAVAILABLE, status=429),
}
STEPS = st.one_of(
    st.tuples(st.sampled_from(sorted(ANSWERS)), st.integers(0, 13), st.booleans(), st.booleans()),
    st.tuples(st.just("crash"), st.integers(0, 13), st.just(True), st.just(False)),
)


class Model:
    """The rules as design and docs/how-it-works.md state them, without threads, files or clocks."""

    def __init__(self):
        self.charged, self.open = {}, {}
        self.restart()

    def crash(self, id_):
        self.charged[id_] = self.charged.get(id_, 0) + 5
        self.open[id_] = self.open.get(id_, 0) + 1

    def restart(self):
        self.row, self.silent, self.has_passed, self.is_open = {}, set(), False, False

    def answer(self, id_, name, is_well, *, is_alone):
        """Returns whether the message is a dead letter now."""
        opens = self.open.get(id_, 0)
        self.open[id_] = 0
        if name == "created":
            self.row, self.silent, self.has_passed, self.is_open = {}, set(), True, False
            return False
        if name == "cut" or (name in ("late", "gateway") and not is_well):
            self.open[id_] = opens + 1
        if name == "refused":  # nothing was sent
            self.open[id_] = opens
        if is_alone and name in ("cut", "late", "gateway"):
            self.silent.add(id_)
            charge = 5 if len(self.silent) < 10 else 0
        else:
            charge = 0 if name == "too many" else self.row_charge(id_, name, is_well)
        self.charged[id_] = self.charged.get(id_, 0) + charge
        return self.charged[id_] >= MOST * 5

    def row_charge(self, id_, name, is_well):
        if len(self.row) < 10:
            self.row.setdefault(id_, 0)
        is_full = len(self.row) == 10
        self.is_open = self.is_open or is_full or (name == "wrong" and not self.has_passed)
        if is_full:
            for other, charge in self.row.items():
                self.charged[other] = max(0, self.charged.get(other, 0) - charge)
            self.row = dict.fromkeys(self.row, 0)
            return 0
        if not is_well:
            return 0
        charge = {"failed": 5, "refused": 1, "gateway": 1, "late": 1, "cut": 0, "wrong": 0}[name]
        self.row[id_] += charge
        return charge


@settings(max_examples=int(os.environ.get("HISTORIES", "150")))
@given(st.lists(STEPS, max_size=60))
@example([("crash", 0, True, False)] * 4)  # the last is a dead letter without a POST
def test_what_is_charged_and_when_the_breaker_opens_follow_the_table(steps):
    clock = [1000.0]
    with tempfile.TemporaryDirectory() as directory, patch.object(time, "monotonic", lambda: clock[0]):
        path = Path(directory) / "counts.sqlite3"
        maker, model, slots = Mock(), Model(), Slots(1, 1)

        def start():
            counts, breaker = ReceiveCounts(path, "q"), Breaker()
            return counts, breaker, Charges(counts, maker, breaker, slots, Metrics(), most=MOST)

        counts, breaker, charges = start()
        for name, number, is_well, is_alone in steps:
            clock[0] += 1
            maker.is_well.return_value = is_well
            id_ = f"m{number}"
            [delivery] = charges.deliveries([Message(id_, {"widget_id": id_}, 0.0)])
            is_spent = charges.ends_unposted(delivery)
            assert is_spent == (model.charged.get(id_, 0) >= MOST * 5)
            assert delivery.before.open == model.open.get(id_, 0)
            if is_spent:  # a dead letter without a POST
                counts.forget([id_])
                model.charged.pop(id_), model.open.pop(id_, None)
                continue
            assert charges.begin([delivery])
            if name == "crash":
                model.crash(id_)
                model.restart()
                counts.close()
                counts, breaker, charges = start()
                continue
            delivery.answer = ANSWERS[name]
            charges.judge([delivery], clock[0], is_alone=is_alone)
            is_dead = model.answer(id_, name, is_well, is_alone=is_alone)
            assert (delivery.answer.outcome == "failed") == is_dead
            # A fresh message that passed keeps its charge until it is settled, which forgets it.
            kept = 5 if name == "created" and not delivery.before.open else 0
            assert counts.of([id_])[id_].charged == kept + model.charged.get(id_, 0)
            assert breaker.is_open == model.is_open
            if delivery.answer.outcome:
                counts.forget([id_])
                model.charged.pop(id_, None), model.open.pop(id_, None)
        counts.close()
        slots.close()
