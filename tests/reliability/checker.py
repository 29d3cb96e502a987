"""Say from the evidence of a run whether a promise was broken. It knows nothing of how the run was made.

The letters are those of the invariants: C conservation, K claims, R receive counts, H the maker, P responses.
"""

import json
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from delivery import RESPONSE_IDS

from .recorded import digest

Event = dict[str, Any]


@dataclass
class Evidence:
    """What a run left behind, read after a full drain.

    attempted: the bodies that were to be posted. acknowledged: those that a producer reported, by message id.
    histories: the events of each process, in order. widgets: the maker's ids. queued, responses, dead_letters:
    bodies by message id. cuts: store milliseconds of the power cuts, which end all claims.
    resumed: store milliseconds just before a process that stood still was let go on.
    deaths: processes killed, each of which may have claimed what nobody read.
    """

    attempted: list[Any]
    acknowledged: dict[str, Any]
    histories: list[list[Event]]
    widgets: list[str]
    queued: dict[str, Any] = field(default_factory=dict)
    responses: dict[str, Any] = field(default_factory=dict)
    dead_letters: dict[str, Any] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    deaths: int = 0


@dataclass
class Hold:
    """One claim's hold on one message; times in store milliseconds. let_go: when it may have ended by itself."""

    at: int
    until: int
    let_go: float = float("inf")

    @property
    def end(self) -> float:
        return min(self.until, self.let_go)


@dataclass
class _Told:
    """What the histories say, by message id."""

    claims: dict[str, list[Hold]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    deliveries: Counter[str] = field(default_factory=Counter)
    digests: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    outcomes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    made_new: Counter[str] = field(default_factory=Counter)
    deleted: Counter[str] = field(default_factory=Counter)
    late: int = 0
    violations: list[str] = field(default_factory=list)


def check(evidence: Evidence) -> tuple[dict[str, int], list[str]]:
    """The counts of the run, and one line for each invariant that it broke."""
    told = _Told()
    for history in evidence.histories:
        _Reader(told, evidence.resumed).read(history)
    counts, conservation = _conservation(evidence, told)
    if evidence.resumed:
        counts["late POSTs"] = told.late
    violations = [*told.violations, *conservation, *_claims(evidence, told), *_receives(evidence, told)]
    return counts, violations + _maker(evidence, told) + _responses(evidence, told)


def read_history(path: Path) -> list[Event]:
    """The events of one process; a line without an end was cut off by its kill."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def name(body: Any) -> str:
    """What the request is called: its widget id, or its body where it has none."""
    found = body.get("widget_id") if isinstance(body, dict) else None
    return found.lower() if isinstance(found, str) else json.dumps(body, sort_keys=True)


class _Reader:
    """Reads one process's history into what all of them tell."""

    def __init__(self, told: _Told, resumed: list[int]) -> None:
        self._told = told
        self._resumed = resumed
        self._looked: dict[str, int] = {}
        self._holds: dict[tuple[str, str], Hold] = {}
        self._letting_go: dict[tuple[str, str], int] = {}
        self._answered: dict[str, set[str | None]] = defaultdict(set)
        self._needs = 0

    def read(self, history: list[Event]) -> None:
        for event in history:
            getattr(self, f"_{event['op']}_{event['phase']}")(event)
        for key, at in self._letting_go.items():  # it died, or failed, in the middle: it may have happened
            if key in self._holds:
                self._holds[key].let_go = at

    def _start_ok(self, event: Event) -> None:
        self._needs = event["needs"]

    def _claim_ok(self, event: Event) -> None:
        for id_, count in event["received"]:
            hold = self._holds[event["claim"], id_] = Hold(event["at"], event["until"])
            self._told.claims[id_].append(hold)
            self._told.counts[id_].append((event["at"], count))

    def _renew_ok(self, event: Event) -> None:
        for id_ in event["messages"]:
            self._holds[event["claim"], id_].until = event["until"]

    def _look_ok(self, event: Event) -> None:
        self._looked[event["message"]] = event["at"]

    def _post_invoke(self, event: Event) -> None:
        for id_, found in event["requests"]:
            self._told.deliveries[id_] += 1
            self._told.digests[id_].add(found)
            until = max((hold.until for (_, held), hold in self._holds.items() if held == id_), default=0)
            left, looked = until - event["at"], self._looked.get(id_, event["at"])
            if left >= self._needs:
                continue
            # What stands still between its look at the claim and its POST cannot know better.
            if any(looked < resumed <= event["at"] for resumed in self._resumed):
                self._told.late += 1
            else:
                self._told.violations.append(f"K6 {id_}: a POST began with {left} ms of its claim left")

    def _post_ok(self, event: Event) -> None:
        for id_, outcome, status in event["answers"]:
            self._answered[id_].add(outcome)
            if outcome:
                self._told.outcomes[id_].add(outcome)
            self._told.made_new[id_] += status == 201

    def _settle_invoke(self, event: Event) -> None:
        for id_, outcome, has_letter in event["messages"]:
            self._letting_go[event["claim"], id_] = event["at"]
            if not (has_letter if outcome == "failed" else outcome in self._answered[id_]):
                self._told.violations.append(f"K5 {id_}: settled as {outcome}, which nobody had found")

    def _settle_ok(self, event: Event) -> None:
        for id_ in event["deleted"] + event["lost"]:
            self._letting_go.pop((event["claim"], id_), None)
        for id_ in event["deleted"]:
            hold = self._holds.pop((event["claim"], id_), None)
            if hold is None or event["at"] >= hold.until:
                self._told.violations.append(f"K4 {id_}: deleted by a claim that was over")
            if hold:
                hold.let_go = event["at"]
        self._told.deleted.update(event["deleted"])

    def _release_invoke(self, event: Event) -> None:
        self._letting_go.update({(event["claim"], id_): event["at"] for id_ in event["messages"]})

    def _release_ok(self, event: Event) -> None:
        for id_ in event["messages"]:
            self._letting_go.pop((event["claim"], id_), None)
            if hold := self._holds.pop((event["claim"], id_), None):
                hold.let_go = event["at"]


def _conservation(evidence: Evidence, told: _Told) -> tuple[dict[str, int], list[str]]:
    attempted = {name(body) for body in evidence.attempted}
    acknowledged = {name(body) for body in evidence.acknowledged.values()}
    made = set(evidence.widgets)
    rejected = {name(body) for body in evidence.responses.values() if body["outcome"] == "rejected"}
    dead = {name(body["body"]) for body in evidence.dead_letters.values()}
    queued = {name(body) for body in evidence.queued.values()}
    ended, known = made | rejected | dead, {id_: name(body) for id_, body in evidence.acknowledged.items()}
    gone = acknowledged - ended - queued
    created = {known[id_] for id_, outcomes in told.outcomes.items() if "created" in outcomes and id_ in known}
    counts = {
        "attempted": len(attempted),
        "acknowledged": len(acknowledged),
        "ok": len(acknowledged & ended),
        "lost": len(gone),
        "unexpected": len((ended | queued) - attempted),
        "duplicated": sum(told.deliveries[id_] > 1 for id_ in evidence.acknowledged),
        "recovered": len((attempted - acknowledged) & (ended | queued)),
    }
    problems = [
        _all("C1 lost", gone),
        _all("C2 deleted more than once", (id_ for id_, times in told.deleted.items() if times > 1)),
        _all("C2 deleted and still queued", told.deleted.keys() & evidence.queued.keys()),
        _all("C3 made and rejected", made & rejected),
        _all("C3 rejected and a dead letter", rejected & dead),
        _all("C3 a dead letter of what was found to be created", dead & created),
        _all("C4 from nowhere", (ended | queued) - attempted),
        _all("C5 POSTed otherwise than posted", _changed(evidence.acknowledged, told)),
        _all("C5 queued otherwise than posted", _unequal(evidence.acknowledged, evidence.queued)),
    ]
    return counts, [line for line in problems if line]


def _changed(posted: dict[str, Any], told: _Told) -> list[str]:
    return [id_ for id_, found in told.digests.items() if id_ in posted and found != {digest(posted[id_])}]


def _unequal(posted: dict[str, Any], queued: dict[str, Any]) -> list[str]:
    return [id_ for id_, body in queued.items() if id_ in posted and body != posted[id_]]


def _claims(evidence: Evidence, told: _Told) -> list[str]:
    overlaps = []
    for id_, holds in told.claims.items():
        for first, second in pairwise(sorted(holds, key=lambda hold: hold.at)):
            was_cut = any(first.at <= cut <= second.at for cut in evidence.cuts)
            if second.at < first.end and not was_cut:
                overlaps.append(id_)
    return [line] if (line := _all("K1 claimed by two at once", overlaps)) else []


def _receives(evidence: Evidence, told: _Told) -> list[str]:
    under, over = [], []
    for id_, counts in told.counts.items():
        for number, (_, count) in enumerate(sorted(counts), 1):
            if count < number and not evidence.cuts:
                under.append(id_)
        if max(count for _, count in counts) - len(counts) > evidence.deaths:
            over.append(id_)
    twice = [
        id_ for id_, times in Counter(b["request_id"] for b in evidence.dead_letters.values()).items() if times > 1
    ]
    problems = [
        _all("R1 received more often than counted", under),
        _all("R2 counted more often than received and died", over),
        _all("R6 two dead letters", twice),
    ]
    return [line for line in problems if line]


def _maker(evidence: Evidence, told: _Told) -> list[str]:
    known = {id_: name(body) for id_, body in evidence.acknowledged.items()}
    made = set(evidence.widgets)
    new: Counter[str] = Counter()
    for id_, times in told.made_new.items():
        new[known.get(id_, id_)] += times
    created = {known[id_] for id_, outcomes in told.outcomes.items() if "created" in outcomes and id_ in known}
    problems = [
        _all("H1 two widgets of one id", (id_ for id_, times in Counter(evidence.widgets).items() if times > 1)),
        _all("H1 answered as new twice", (request for request, times in new.items() if times > 1)),
        _all("H3 answered and not there", created - made),
    ]
    return [line for line in problems if line]


def _responses(evidence: Evidence, told: _Told) -> list[str]:
    found: dict[str, list[Any]] = defaultdict(list)
    for body in evidence.responses.values():
        found[body["request_id"]].append(body)
    wrong = [
        id_
        for id_, bodies in found.items()
        for body in bodies
        if body["outcome"] != "failed" and body["outcome"] not in told.outcomes[id_]
    ]
    strange = [
        id_
        for id_, bodies in found.items()
        for body in bodies
        if body["response_id"] != str(uuid.uuid5(RESPONSE_IDS, f"{id_} {body['outcome']}"))
    ]
    problems = [
        _all("P1 deleted without a response", told.deleted.keys() - found.keys()),
        _all("P1 a response that nobody found", wrong),
        _all("P2 two responses", (id_ for id_, bodies in found.items() if len(bodies) > 1)),
        _all("P3 a response_id of its own", strange),
    ]
    return [line for line in problems if line]


def _all(what: str, found: Iterable[str]) -> str:
    """One line about all of them, empty for none."""
    names: Sequence[str] = sorted(found)
    return f"{what}: {len(names):,} ({', '.join(names[:3])})" if names else ""
