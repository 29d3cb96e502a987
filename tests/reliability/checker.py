"""Say from what a run left behind whether a promise was broken. It knows nothing of how the run was made."""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Evidence:
    """attempted: the bodies that were to be posted. posted: those that were reported as stored, by message id.

    widgets: the ids that the maker lists. queued, responses, letters: the bodies left in each queue, by message id.
    """

    attempted: list[Any]
    posted: dict[str, Any]
    widgets: list[str]
    queued: dict[str, Any] = field(default_factory=dict)
    responses: dict[str, Any] = field(default_factory=dict)
    letters: dict[str, Any] = field(default_factory=dict)


def check(
    evidence: Evidence,
    *,
    poison: Collection[str] = (),
    suspects: Collection[str] = (),
    is_drained: bool = True,
    may_repeat: bool = False,
) -> tuple[dict[str, int], list[str]]:
    """The outcomes of the messages, in numbers, and a line for each promise that was broken.

    poison: names of the requests that must be dead letters. suspects: of those that may be. is_drained: nothing may be
    left. may_repeat: the service may store a response twice, as the same.
    """
    answers = defaultdict[str, list[Any]](list)
    for response in evidence.responses.values():
        answers[response["request_id"]].append(response)
    known = evidence.posted | evidence.queued
    outcomes = {id_: {found["outcome"] for found in all_} for id_, all_ in answers.items()}
    responses = {id_: [found["response_id"] for found in all_] for id_, all_ in answers.items()}
    named = {id_: {str(found["widget_id"] or "").lower() for found in all_} for id_, all_ in answers.items()}
    attempted, widgets = {name(body) for body in evidence.attempted}, set(evidence.widgets)
    letters = {letter["request_id"]: letter for letter in evidence.letters.values()}
    dead = {name(letter["body"]) for letter in letters.values()}
    ended = widgets | dead | set().union(*named.values())
    by_outcome = Counter(next(iter(found)) for found in outcomes.values())
    figures = {
        "posted": len(evidence.posted),
        "created": by_outcome["created"],
        "rejected": by_outcome["rejected"],
        "dead letters": len(letters),
        "queued": len(evidence.queued),
        "stored though not reported": len((answers.keys() | evidence.queued.keys()) - evidence.posted.keys()),
    }

    def of(outcome: str) -> set[str]:
        return {each for id_, found in outcomes.items() if outcome in found for each in named[id_] if each}

    differ = (id_ for id_, letter in letters.items() if id_ in known and letter["body"] != known[id_])
    broken = [
        _all("lost", evidence.posted.keys() - answers.keys() - evidence.queued.keys()),
        _all("left in the queue", evidence.queued if is_drained else ()),
        _all("ended and still queued", answers.keys() & evidence.queued.keys()),
        _all("from nowhere", (ended | {name(body) for body in evidence.queued.values()}) - attempted - {""}),
        _all("made twice", _twice(evidence.widgets)),
        _all("called created, but not made", of("created") - widgets),
        _all("called rejected, but made", of("rejected") & widgets),
        _all("of two outcomes", (id_ for id_, found in outcomes.items() if len(found) > 1)),
        _all("answered twice", (id_ for id_, ids in responses.items() if len(set(ids) if may_repeat else ids) > 1)),
        _all("failed without a dead letter", {id_ for id_ in outcomes if "failed" in outcomes[id_]} - letters.keys()),
        _all("a dead letter without a response", letters.keys() - answers.keys()),
        _all("a dead letter two times", _twice(letter["request_id"] for letter in evidence.letters.values())),
        _all("innocent, but a dead letter", dead - {*poison, *suspects}),
        _all("poison, but no dead letter", set(poison) - dead),
        _all("changed in its dead letter", differ),
    ]
    return figures, [line for line in broken if line]


def name(body: Any) -> str:
    """What a request is called: its widget id, or its body where it has none."""
    found = body.get("widget_id") if isinstance(body, dict) else None
    return found.lower() if isinstance(found, str) else json.dumps(body, sort_keys=True)


def _twice(ids: Iterable[str]) -> Iterable[str]:
    return (id_ for id_, times in Counter(ids).items() if times > 1)


def _all(what: str, found: Iterable[str]) -> str:
    """One line, with the first of them; empty where there are none."""
    all_ = sorted(found)
    return f"{len(all_)} {what}: {', '.join(all_[:3])[:300]}" if all_ else ""
