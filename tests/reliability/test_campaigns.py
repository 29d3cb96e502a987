"""That each campaign runs, that the checker notices what is wrong, and that the report gets its row."""

import os
import subprocess
import sys

import pytest
from support import HERE, tool_or_skip

from .__main__ import with_row
from .checker import Evidence, check
from .frame import Campaign, Result, together

A, B, C = ({"widget_id": name} for name in "abc")


def response(request_id, widget_id, outcome, response_id="r"):
    return {"request_id": request_id, "widget_id": widget_id, "outcome": outcome, "response_id": response_id}


def evidence():
    """Of a run in which one request was made, one rejected, and one is a dead letter."""
    ends = [("A", "a", "created"), ("B", "b", "rejected"), ("C", "c", "failed")]
    answers = {str(number): response(*end) for number, end in enumerate(ends, 1)}
    return Evidence([A, B, C], {"A": A, "B": B, "C": C}, ["a"], {}, answers, {"4": {"request_id": "C", "body": C}})


@pytest.mark.parametrize("role", ["poison", "suspects"])
def test_the_checker_finds_nothing_wrong_with_a_good_run(role):
    figures, broken = check(evidence(), **{role: {"c"}})

    assert broken == []
    assert figures["posted"] == 3
    assert (figures["created"], figures["rejected"], figures["dead letters"], figures["queued"]) == (1, 1, 1, 0)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda found: found.responses.pop("1"), "1 lost: A"),
        (lambda found: found.queued.update(A=A), "1 left in the queue: A"),
        (lambda found: found.queued.update(A=A), "1 ended and still queued: A"),
        (lambda found: found.widgets.append("x"), "1 from nowhere: x"),
        (lambda found: found.widgets.append("a"), "1 made twice: a"),
        (lambda found: found.widgets.remove("a"), "1 called created, but not made: a"),
        (lambda found: found.widgets.append("b"), "1 called rejected, but made: b"),
        (lambda found: found.responses.update({"5": response("A", "a", "rejected")}), "1 of two outcomes: A"),
        (lambda found: found.responses.update({"5": response("A", "a", "created")}), "1 answered twice: A"),
        (lambda found: found.letters.pop("4"), "1 failed without a dead letter: C"),
        (lambda found: found.letters.pop("4"), "1 poison, but no dead letter: c"),
        (lambda found: found.letters.update({"5": found.letters["4"]}), "1 a dead letter two times: C"),
        (lambda found: found.letters.update({"5": {"request_id": "A", "body": A}}), "1 innocent, but a dead letter: a"),
        (lambda found: found.letters["4"].update(body=C | {"more": 1}), "1 changed in its dead letter: C"),
    ],
)
def test_the_checker_notices_each_kind_of_fault(spoil, line):
    found = evidence()
    spoil(found)

    assert line in check(found, poison={"c"})[1]


def test_where_the_service_may_repeat_a_response_it_must_be_the_same_one():
    found = evidence()
    found.responses["5"] = response("A", "a", "created")
    assert check(found, poison={"c"}, may_repeat=True)[1] == []

    found.responses["5"] = response("A", "a", "created", "another")
    assert check(found, poison={"c"}, may_repeat=True)[1] == ["1 answered twice: A"]


def test_a_row_of_the_report_is_replaced_or_added_at_the_end_of_the_table():
    report = "# Title\n\n| campaign | figures |\n| --- | --- |\n| kills | old |\n\nno row here\n"
    kills, stops = (Campaign(name, "it works", lambda _: None) for name in ("kills", "stops"))

    once = with_row(report, kills, ["n 3 | 4"])
    assert once == report.replace("| kills | old |", "| kills | it works | n 3 4 |")
    assert with_row(once, stops, ["n 1"]) == once.replace("4 |\n", "4 |\n| stops | it works | n 1 |\n")


def test_parts_are_added_up_and_of_most_the_greatest_counts():
    parts = [Result({"kills": 1, "most POSTs": 5}, []), Result({"kills": 2, "most POSTs": 4}, ["1 lost: A"])]

    assert together(lambda part: part, parts) == ({"n": 2, "kills": 3, "most POSTs": 5}, ["1 lost: A"])


def test_a_campaign_that_tried_nothing_is_broken():
    assert together(lambda _: Result({}, []), []).broken == ["nothing was tried"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kills", "sigterm", "powercuts", "maker-killers"])
def test_a_campaign_runs_at_a_tiny_scale_and_keeps_its_promises(name):
    if name == "powercuts":
        tool_or_skip("gcc", package="gcc")
    command = [sys.executable, "-m", "reliability", "--only", name, "--scale", "0.002"]
    env = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'tests'}"}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
