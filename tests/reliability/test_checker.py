"""The checker finds nothing in a clean run, and in each broken one exactly what is broken there."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from delivery import RESPONSE_IDS

from .checker import Event, Evidence, check, read_history
from .recorded import digest

MADE, REJECTED, FAILED = {"widget_id": "m"}, {"widget_id": "x"}, ["d"]
TTL = 1_000


def claim(id_: str, count: int = 1, *, at: int = 0, claim: str = "c") -> Event:
    return {"op": "claim", "phase": "ok", "claim": claim, "at": at, "until": at + TTL, "received": [[id_, count]]}


def posting(id_: str, body: Any, *, at: int = 10) -> Event:
    return {"op": "post", "phase": "invoke", "at": at, "requests": [[id_, digest(body)]]}


def looked(id_: str, *, at: int) -> Event:
    return {"op": "look", "phase": "ok", "message": id_, "at": at}


def answer(id_: str, outcome: str | None, status: int) -> Event:
    return {"op": "post", "phase": "ok", "at": 20, "answers": [[id_, outcome, status]]}


def settling(id_: str, outcome: str | None, *, letter: bool = False, claim: str = "c", at: int = 30) -> Event:
    return {"op": "settle", "phase": "invoke", "claim": claim, "at": at, "messages": [[id_, outcome, letter]]}


def settled(id_: str, *, claim: str = "c", at: int = 40) -> Event:
    return {"op": "settle", "phase": "ok", "claim": claim, "at": at, "deleted": [id_], "lost": []}


def released(id_: str, phase: str, *, claim: str = "c", at: int = 40) -> Event:
    return {"op": "release", "phase": phase, "claim": claim, "at": at, "messages": [id_]}


def renewed(id_: str, *, at: int, claim: str = "c") -> Event:
    return {"op": "renew", "phase": "ok", "claim": claim, "at": at, "until": at + TTL, "messages": [id_]}


def response(id_: str, outcome: str) -> dict[str, str]:
    own = str(uuid.uuid5(RESPONSE_IDS, f"{id_} {outcome}"))
    return {"request_id": id_, "outcome": outcome, "response_id": own}


def clean() -> Evidence:
    """One request was made, one rejected, one ended as a dead letter; a fourth is still queued."""
    first = [claim("1"), posting("1", MADE), answer("1", "created", 201), settling("1", "created"), settled("1")]
    second = [claim("2"), posting("2", REJECTED), answer("2", "rejected", 422), settling("2", "rejected"), settled("2")]
    third = [claim("3"), settling("3", "failed", letter=True), settled("3")]
    return Evidence(
        attempted=[MADE, REJECTED, FAILED, ["q"]],
        acknowledged={"1": MADE, "2": REJECTED, "3": FAILED, "4": ["q"]},
        histories=[[{"op": "start", "phase": "ok", "needs": 500}, *first, *second], third],
        widgets=["m"],
        queued={"4": ["q"]},
        responses={
            "r1": response("1", "created"),
            "r2": response("2", "rejected") | {"widget_id": "x"},
            "r3": response("3", "failed"),
        },
        dead_letters={"d1": {"request_id": "3", "body": FAILED}},
    )


def test_a_clean_run_breaks_nothing() -> None:
    counts, violations = check(clean())
    assert violations == []
    assert counts == {
        "attempted": 4,
        "acknowledged": 4,
        "ok": 3,
        "lost": 0,
        "unexpected": 0,
        "duplicated": 0,
        "recovered": 0,
    }


def lost(run: Evidence) -> None:
    run.queued.clear()


def deleted_twice(run: Evidence) -> None:
    run.histories[1] += [claim("3", 2, at=50, claim="e"), settling("3", "failed", letter=True, claim="e", at=60)]
    run.histories[1] += [settled("3", claim="e", at=70)]


def deleted_and_queued(run: Evidence) -> None:
    run.queued["1"] = MADE


def made_and_rejected(run: Evidence) -> None:
    run.widgets.append("x")


def rejected_and_dead(run: Evidence) -> None:
    run.dead_letters["d2"] = {"request_id": "2", "body": REJECTED}


def created_and_dead(run: Evidence) -> None:
    run.dead_letters["d2"] = {"request_id": "1", "body": MADE}


def from_nowhere(run: Evidence) -> None:
    run.widgets.append("never asked for")


def changed_on_the_way(run: Evidence) -> None:
    run.histories[0][2] = posting("1", MADE | {"note": "not posted"})


def changed_in_the_queue(run: Evidence) -> None:
    run.acknowledged["4"] = run.attempted[3] = {"widget_id": "q"}
    run.queued["4"] = {"widget_id": "q", "note": "not posted"}


def claimed_by_two(run: Evidence) -> None:
    run.histories += [[claim("4", 1, at=5)], [claim("4", 2, at=5 + TTL - 1, claim="e")]]


def claimed_during_a_renewal(run: Evidence) -> None:
    run.histories += [[claim("4", 1, at=5), renewed("4", at=500)], [claim("4", 2, at=5 + TTL, claim="e")]]


def deleted_too_late(run: Evidence) -> None:
    run.histories[1][-1] = settled("3", at=TTL)


def deleted_by_another_claim(run: Evidence) -> None:
    run.histories[1][-1] = settled("3", claim="e")


def deleted_before_an_outcome(run: Evidence) -> None:
    run.histories[1][1] = settling("3", "failed", letter=False)


def deleted_for_another_outcome(run: Evidence) -> None:
    run.histories[0][4] = settling("1", "rejected")


def posted_too_late(run: Evidence) -> None:
    run.histories[0][2] = posting("1", MADE, at=TTL - 499)


def posted_without_a_claim(run: Evidence) -> None:
    run.histories.append([{"op": "start", "phase": "ok", "needs": 500}, posting("4", ["q"])])


def posted_late_after_a_late_look(run: Evidence) -> None:
    run.histories[0][2:3] = [looked("1", at=TTL - 300), posting("1", MADE, at=TTL - 200)]
    run.resumed = [TTL - 400]


def counted_too_little(run: Evidence) -> None:
    run.histories += [[claim("4", 1)], [claim("4", 1, at=2 * TTL, claim="e")]]


def counted_too_much(run: Evidence) -> None:
    run.histories.append([claim("4", 3)])
    run.deaths = 1


def two_dead_letters(run: Evidence) -> None:
    run.dead_letters["d2"] = run.dead_letters["d1"]


def two_widgets(run: Evidence) -> None:
    run.widgets.append("m")


def new_twice(run: Evidence) -> None:
    run.histories[0].insert(3, answer("1", "created", 201))


def answered_and_not_there(run: Evidence) -> None:
    run.widgets.clear()
    run.queued["5"] = run.acknowledged["5"] = MADE


def no_response(run: Evidence) -> None:
    del run.responses["r3"]


def made_up_response(run: Evidence) -> None:
    run.responses["r4"] = response("4", "created")


def two_responses(run: Evidence) -> None:
    run.responses["r4"] = run.responses["r1"]


def response_id_of_its_own(run: Evidence) -> None:
    run.responses["r1"]["response_id"] = str(uuid.uuid4())


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lost, "C1 lost"),
        (deleted_twice, "C2 deleted more than once"),
        (deleted_and_queued, "C2 deleted and still queued"),
        (made_and_rejected, "C3 made and rejected"),
        (rejected_and_dead, "C3 rejected and a dead letter"),
        (created_and_dead, "C3 a dead letter of what was found to be created"),
        (from_nowhere, "C4 from nowhere"),
        (changed_on_the_way, "C5 POSTed otherwise than posted"),
        (changed_in_the_queue, "C5 queued otherwise than posted"),
        (claimed_by_two, "K1 claimed by two at once"),
        (claimed_during_a_renewal, "K1 claimed by two at once"),
        (deleted_too_late, "K4 3: deleted by a claim that was over"),
        (deleted_by_another_claim, "K4 3: deleted by a claim that was over"),
        (deleted_before_an_outcome, "K5 3: settled as failed"),
        (deleted_for_another_outcome, "K5 1: settled as rejected"),
        (posted_too_late, "K6 1: a POST began with 499 ms"),
        (posted_without_a_claim, "K6 4: a POST began with -10 ms"),
        (posted_late_after_a_late_look, "K6 1: a POST began with 200 ms"),
        (counted_too_little, "R1 received more often than counted"),
        (counted_too_much, "R2 counted more often than received and died"),
        (two_dead_letters, "R6 two dead letters"),
        (two_widgets, "H1 two widgets of one id"),
        (new_twice, "H1 answered as new twice"),
        (answered_and_not_there, "H3 answered and not there"),
        (no_response, "P1 deleted without a response"),
        (made_up_response, "P1 a response that nobody found"),
        (two_responses, "P2 two responses"),
        (response_id_of_its_own, "P3 a response_id of its own"),
    ],
)
def test_each_broken_run_shows_what_is_broken(damage: Callable[[Evidence], None], found: str) -> None:
    run = clean()
    damage(run)
    violations = check(run)[1]
    assert len(violations) == 1, violations
    assert violations[0].startswith(found)


def test_what_may_have_happened_is_no_violation() -> None:
    """Killed during a release and a claim; a power cut that took a claim and its count with it."""
    run = clean()
    run.histories += [[claim("4", 1), released("4", "invoke")], [claim("4", 2, at=50, claim="e")]]
    run.histories += [[claim("4", 4, at=60 + TTL, claim="f"), released("4", "ok", claim="f", at=70 + TTL)]]
    run.histories += [[claim("4", 5, at=80 + TTL, claim="g")], [claim("4", 5, at=100 + TTL, claim="h")]]
    run.cuts = [90 + TTL]
    run.deaths = 2
    assert check(run)[1] == []


def test_what_stood_still_after_its_look_at_the_claim_posts_late() -> None:
    run = clean()
    run.histories[0][2:3] = [looked("1", at=10), posting("1", MADE, at=TTL - 200)]
    run.resumed = [TTL - 300]
    counts, violations = check(run)
    assert (violations, counts["late POSTs"]) == ([], 1)


def test_a_line_that_was_cut_off_is_no_event(tmp_path: Path) -> None:
    (tmp_path / "history").write_text('{"op": "start", "phase": "ok", "needs": 5}\n{"op": "cl')
    assert read_history(tmp_path / "history") == [{"op": "start", "phase": "ok", "needs": 5}]
