"""The embedded queue against a model in plain Python: random histories on several connections and a moved clock.

MODEL_EXAMPLES=5000 pytest tests/properties/test_embedded_model.py --timeout=0    looks longer than the usual runs do.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from claim_queues import Claim, ClaimLost, Message, Post, Settlement
from claim_queues.sqlite import SqliteQueues

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "120"))
CONNECTIONS = 3
QUEUES = ("requests", "responses")

which = st.integers(0, CONNECTIONS - 1)
queue_names = st.sampled_from(QUEUES)
claim_ttls = st.sampled_from([60, 61, 200])
graces = st.sampled_from([60, 90])
message_ttls = st.sampled_from([60, 61, 120, 1000, None])
masks = st.lists(st.booleans(), min_size=6, max_size=6)
delays = st.sampled_from([0, 0.125, 30, 150])
# Eighths of a second are exact as floats, so that the model and the file agree to the millisecond.
steps_ms = st.sampled_from([125, 1_000, 30_000, 59_875, 60_000, 60_125, 200_000])


@dataclass
class Known:
    """One message as the model has it. Times are milliseconds."""

    id: str
    queue: str
    body: object
    posted: int
    expires: int | None
    held_until: int = 0
    claim: str | None = None
    receives: int = 0

    def hold(self, until: int, claim: str | None, grace: int) -> None:
        self.held_until, self.claim = until, claim
        if self.expires is not None and self.expires < until:
            self.expires = until + grace * 1000


class EmbeddedQueue(RuleBasedStateMachine):
    """What the embedded queue says must be what the model says, whichever connection is asked."""

    claims = Bundle("claims")

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = TemporaryDirectory(dir=directory)
        self._now = 1_800_000_000_000
        self._bodies = iter(range(1_000_000))
        self._known: dict[str, Known] = {}
        self._ids_ever: list[str] = ["unknown"]
        self._connections = [self._open() for _ in range(CONNECTIONS)]

    def teardown(self) -> None:
        for connection in self._connections:
            connection.close()
        self._directory.cleanup()

    @rule(which=which, queue=queue_names, count=st.integers(0, 3), ttl=message_ttls)
    def post(self, which: int, queue: str, count: int, ttl: int | None) -> None:
        bodies = [next(self._bodies) for _ in range(count)]
        ids = self._connections[which].post(queue, bodies, ttl=ttl)
        assert len(ids) == count
        self._learn(queue, zip(ids, bodies, strict=True), ttl)

    @rule(target=claims, which=which, queue=queue_names, ttl=claim_ttls, grace=graces, limit=st.integers(1, 6))
    def claim(self, which: int, queue: str, ttl: int, grace: int, limit: int) -> object:
        claim = self._connections[which].claim(queue, ttl=ttl, grace=grace, limit=limit)
        expected = self._visible(queue)[:limit]
        if claim is None:
            assert not expected
            return multiple()
        for known in expected:
            known.hold(self._now + ttl * 1000, claim.id, grace)
            known.receives += 1
        assert (claim.queue, claim.grace) == (queue, grace)
        assert claim.messages == tuple(map(self._as_message, expected))
        return claim

    @rule(which=which, claim=claims, ttl=claim_ttls, mask=st.none() | masks)
    def renew(self, which: int, claim: Claim, ttl: int, mask: list[bool] | None) -> None:
        messages = self._chosen(claim, mask)
        held = self._held(claim, messages)
        if held:
            self._connections[which].renew(claim, ttl=ttl, messages=None if mask is None else messages)
        else:
            with pytest.raises(ClaimLost):
                self._connections[which].renew(claim, ttl=ttl, messages=None if mask is None else messages)
        for known in held:
            known.hold(self._now + ttl * 1000, claim.id, claim.grace)

    @rule(which=which, claim=claims, mask=masks, refused=masks, queue=queue_names, ttl=message_ttls)
    def settle(
        self, *, which: int, claim: Claim, mask: list[bool], refused: list[bool], queue: str, ttl: int | None
    ) -> None:
        messages = self._chosen(claim, mask)
        refusals = {message.id for message in self._chosen(claim, refused)} & {message.id for message in messages}
        posts = {message.id: (Post(queue, next(self._bodies), ttl=ttl),) for message in messages}
        posts |= {id_: (*posts[id_], Post(queue, math.nan)) for id_ in refusals}
        marker = self._connections[which].end_marker(queue)

        settled = self._connections[which].settle(
            claim, [Settlement(message, posts[message.id]) for message in messages]
        )

        acceptable = [message for message in messages if message.id not in refusals]
        held = [known.id for known in self._held(claim, acceptable)]
        assert set(settled.refused) == refusals
        assert settled.deleted == set(held)
        assert settled.lost == {message.id for message in acceptable} - set(held)
        page = self._connections[which].browse(queue, after=marker)
        assert [message.body for message in page.messages] == [posts[id_][0].body for id_ in held]
        self._learn(queue, [(message.id, message.body) for message in page.messages], ttl)
        for id_ in held:
            del self._known[id_]

    @rule(which=which, claim=claims, mask=st.none() | masks, delay=delays)
    def release(self, which: int, claim: Claim, mask: list[bool] | None, delay: float) -> None:
        messages = self._chosen(claim, mask)
        self._connections[which].release(claim, None if mask is None else messages, delay=delay)
        for known in self._held(claim, messages):
            known.hold(self._now + int(delay * 1000) if delay else 0, None, claim.grace)

    @rule(which=which, queue=queue_names, picks=st.lists(st.integers(0, 50), max_size=4))
    def delete(self, which: int, queue: str, picks: list[int]) -> None:
        ids = [self._ids_ever[-1 - pick % len(self._ids_ever)] for pick in picks]
        self._connections[which].delete(queue, ids)
        for id_ in ids:
            known = self._known.get(id_)
            if known and known.queue == queue and not (known.claim and known.held_until > self._now):
                del self._known[id_]

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
    def every_connection_counts_the_same(self) -> None:
        for queue in QUEUES:
            alive = self._alive(queue)
            held = [known for known in alive if known.held_until > self._now]
            claimed = [known for known in held if known.claim]
            oldest = (self._now - min(known.posted for known in alive)) / 1000 if alive else None
            for connection in self._connections:
                stats = connection.stats(queue)
                assert (stats.free, stats.claimed, stats.delayed, stats.oldest_age) == (
                    len(alive) - len(held),
                    len(claimed),
                    len(held) - len(claimed),
                    oldest,
                )

    @invariant()
    def browsing_shows_free_messages_or_all(self) -> None:
        for connection, queue in zip(self._connections, QUEUES, strict=False):
            for claimed, expected in ((False, self._visible(queue)), (True, self._alive(queue))):
                assert self._browse_all(connection, queue, claimed) == list(map(self._as_message, expected))

    def _open(self) -> SqliteQueues:
        return SqliteQueues(Path(self._directory.name) / "queues.sqlite3", clock=lambda: self._now / 1000)

    def _learn(self, queue: str, posted: Iterable[tuple[str, object]], ttl: int | None) -> None:
        for id_, body in posted:
            assert id_ not in self._ids_ever
            self._ids_ever.append(id_)
            expires = None if ttl is None else self._now + ttl * 1000
            self._known[id_] = Known(id_, queue, body, self._now, expires)

    def _alive(self, queue: str) -> list[Known]:
        return [
            known
            for known in self._known.values()
            if known.queue == queue and (known.expires is None or known.expires > self._now)
        ]

    def _visible(self, queue: str) -> list[Known]:
        return [known for known in self._alive(queue) if known.held_until <= self._now]

    def _held(self, claim: Claim, messages: Iterable[Message]) -> list[Known]:
        found = (self._known.get(message.id) for message in messages)
        return [known for known in found if known and known.claim == claim.id and known.held_until > self._now]

    def _as_message(self, known: Known) -> Message:
        ttl = None if known.expires is None else (known.expires - known.posted) // 1000
        return Message(known.id, known.body, (self._now - known.posted) / 1000, ttl, known.receives)

    @staticmethod
    def _chosen(claim: Claim, mask: list[bool] | None) -> list[Message]:
        chosen = mask or [True] * len(claim.messages)
        return [message for message, is_chosen in zip(claim.messages, chosen, strict=False) if is_chosen]

    @staticmethod
    def _browse_all(connection: SqliteQueues, queue: str, claimed: bool) -> list[Message]:
        found: list[Message] = []
        page = connection.browse(queue, limit=2, claimed=claimed)
        while page.messages:
            found += page.messages
            page = connection.browse(queue, limit=2, claimed=claimed, after=page.marker)
        return found


def test_every_history_is_as_the_model_has_it(tmp_path: Path) -> None:
    run_state_machine_as_test(
        lambda: EmbeddedQueue(tmp_path),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
