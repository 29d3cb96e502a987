"""The embedded queue against a model in plain Python: random histories on several connections and a moved clock.

MODEL_EXAMPLES=5000 pytest tests/properties/test_embedded_model.py --timeout=0    looks longer than the usual runs do.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from claim_queues import Claim, ClaimLost, Message, Post, Settlement, Stats
from claim_queues.sqlite import SqliteQueues

QUEUES = ("requests", "responses")
which = st.integers(0, 2)
queue_names = st.sampled_from(QUEUES)
message_ttls = st.sampled_from([60, 61, 120, 1000, None])
masks = st.lists(st.booleans(), min_size=6, max_size=6)
# Eighths of a second are exact as floats, so that the model and the file agree to the millisecond.
steps_ms = st.sampled_from([125, 1_000, 30_000, 59_875, 60_000, 60_125, 200_000])


@dataclass
class Known:
    """One message as the model has it. Times are milliseconds."""

    id: str
    queue: str
    body: object
    posted: int
    expires: float
    held_until: int = 0
    claim: str | None = None

    def hold(self, until: int, claim: str | None, grace: int) -> None:
        self.held_until, self.claim = until, claim
        if self.expires < until:
            self.expires = until + grace * 1000


class EmbeddedQueue(RuleBasedStateMachine):
    """What the embedded queue says must be what the model says, whichever connection is asked."""

    claims = Bundle("claims")

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = TemporaryDirectory(dir=directory)
        self._now = 1_800_000_000_000
        self._posted = 0
        self._known: dict[str, Known] = {}
        self._ids_ever: list[str] = ["unknown"]
        self._connections = [self._open() for _ in range(3)]

    def teardown(self) -> None:
        for connection in self._connections:
            connection.close()
        self._directory.cleanup()

    @rule(which=which, queue=queue_names, count=st.integers(1, 3), ttl=message_ttls)
    def post(self, which: int, queue: str, count: int, ttl: int | None) -> None:
        bodies = list(range(self._posted, self._posted + count))
        self._learn(queue, self._connections[which].post(queue, bodies, ttl=ttl), bodies, ttl)

    @rule(
        target=claims,
        which=which,
        queue=queue_names,
        ttl=st.sampled_from([60, 61, 200]),
        grace=st.sampled_from([60, 90]),
        limit=st.integers(1, 6),
    )
    def claim(self, *, which: int, queue: str, ttl: int, grace: int, limit: int) -> object:
        claim = self._connections[which].claim(queue, ttl=ttl, grace=grace, limit=limit)
        expected = [known for known in self._alive(queue) if known.held_until <= self._now][:limit]
        if claim is None:
            assert not expected
            return multiple()
        for known in expected:
            known.hold(self._now + ttl * 1000, claim.id, grace)
        assert (claim.queue, claim.ttl, claim.grace) == (queue, ttl, grace)
        assert list(claim.messages) == self._seen(expected)
        return claim

    @rule(which=which, claim=claims)
    def renew(self, which: int, claim: Claim) -> None:
        held = self._held(claim)
        if held:
            self._connections[which].renew(claim)
        else:
            with pytest.raises(ClaimLost):
                self._connections[which].renew(claim)
        assert [message.id for message in claim.messages] == [known.id for known in held]
        for known in held:
            known.hold(self._now + claim.ttl * 1000, claim.id, claim.grace)

    @rule(which=which, claim=claims, mask=masks, refused=masks, queue=queue_names, ttl=message_ttls)
    def settle(
        self, *, which: int, claim: Claim, mask: list[bool], refused: list[bool], queue: str, ttl: int | None
    ) -> None:
        chosen = [message for message, is_chosen in zip(claim.messages, mask, strict=False) if is_chosen]
        refusals = {message.id for message, is_refused in zip(chosen, refused, strict=False) if is_refused}
        held = [known for known in self._held(claim) if known.id in {message.id for message in chosen} - refusals]
        posts = {message.id: (Post(queue, ["outcome", message.id], ttl),) for message in chosen}
        posts |= {id_: (*posts[id_], Post(queue, math.nan)) for id_ in refusals}
        before = [message.id for message in claim.messages]

        settled = self._connections[which].settle(claim, [Settlement(each, posts[each.id]) for each in chosen])

        assert (set(settled.refused), settled.deleted) == (refusals, {known.id for known in held})
        assert [message.id for message in claim.messages] == [id_ for id_ in before if id_ not in settled.deleted]
        for known in held:
            del self._known[known.id]
        stored = self._browse_all(self._connections[which], queue)
        new = [message for message in stored if message.id not in self._ids_ever]
        assert [message.body for message in new] == [["outcome", known.id] for known in held]
        self._learn(queue, [message.id for message in new], [message.body for message in new], ttl)

    @rule(which=which, claim=claims, delay=st.sampled_from([0, 0.125, 30, 150]))
    def release(self, which: int, claim: Claim, delay: float) -> None:
        self._connections[which].release(claim, delay=delay)
        for known in self._held(claim):
            known.hold(self._now + int(delay * 1000) if delay else 0, None, claim.grace)

    @rule(which=which, queue=queue_names, picks=st.lists(st.integers(0, 50), max_size=4))
    def delete(self, which: int, queue: str, picks: list[int]) -> None:
        ids = {self._ids_ever[-1 - pick % len(self._ids_ever)] for pick in picks}
        self._connections[which].delete(queue, sorted(ids))
        for known in [self._known[id_] for id_ in ids if id_ in self._known]:
            if known.queue == queue and not (known.claim and known.held_until > self._now):
                del self._known[known.id]

    @rule(which=which, queue=queue_names, really=st.integers(0, 3))
    def purge(self, which: int, queue: str, really: int) -> None:
        if really == 0:  # seldom, or the histories would have little to tell
            self._connections[which].purge(queue)
            self._known = {id_: known for id_, known in self._known.items() if known.queue != queue}

    @rule(milliseconds=steps_ms)
    def advance(self, milliseconds: int) -> None:
        self._now += milliseconds

    @rule(which=which)
    def reopen(self, which: int) -> None:
        self._connections[which].close()
        self._connections[which] = self._open()

    @invariant()
    def every_connection_sees_the_same(self) -> None:
        for queue in QUEUES:
            alive = self._alive(queue)
            held = [known for known in alive if known.held_until > self._now]
            claimed = len([known for known in held if known.claim])
            oldest = (self._now - min(known.posted for known in alive)) / 1000 if alive else None
            for connection in self._connections:
                expected = Stats(len(alive) - len(held), claimed, len(held) - claimed, oldest)
                assert connection.stats(queue) == expected
                assert self._browse_all(connection, queue) == self._seen(alive)

    def _open(self) -> SqliteQueues:
        return SqliteQueues(Path(self._directory.name) / "queues.sqlite3", clock=lambda: self._now / 1000)

    def _learn(self, queue: str, ids: list[str], bodies: list[object], ttl: int | None) -> None:
        self._posted += len(ids)
        for id_, body in zip(ids, bodies, strict=True):
            assert id_ not in self._ids_ever
            self._ids_ever.append(id_)
            self._known[id_] = Known(id_, queue, body, self._now, self._now + (ttl or math.inf) * 1000)

    def _alive(self, queue: str) -> list[Known]:
        return [known for known in self._known.values() if known.queue == queue and known.expires > self._now]

    def _held(self, claim: Claim) -> list[Known]:
        found = (self._known.get(message.id) for message in claim.messages)
        return [known for known in found if known and known.claim == claim.id and known.held_until > self._now]

    def _seen(self, found: list[Known]) -> list[Message]:
        return [Message(known.id, known.body, (self._now - known.posted) / 1000) for known in found]

    @staticmethod
    def _browse_all(connection: SqliteQueues, queue: str) -> list[Message]:
        found, (page, marker) = [], connection.browse(queue, limit=2)
        while page:
            found += page
            page, marker = connection.browse(queue, limit=2, after=marker)
        return found


@pytest.mark.slow
def test_every_history_is_as_the_model_has_it(tmp_path: Path) -> None:
    examples = int(os.environ.get("MODEL_EXAMPLES", "80"))
    histories = settings(max_examples=examples, stateful_step_count=40, database=None)
    run_state_machine_as_test(lambda: EmbeddedQueue(tmp_path), settings=histories)
