"""Makers that are gone for long, and messages that kill."""

import os
import signal
import time
from collections.abc import Callable
from threading import Timer
from typing import Any
from unittest import mock

import queue_servers
from doubles.scripted_maker import Post, Reply
from support import wait_until

from claim_queues import Queues

from .checker import Evidence, check
from .world import (
    CLAIM_TTL,
    DEAD_LETTERS,
    REQUESTS,
    RESPONSES,
    Campaign,
    Result,
    World,
    scaled,
    since,
    together,
    widget_ids,
    world,
)

REGION = "eu-west-1"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "secret-of-no-one"}


def outage(scale: float) -> Result:
    """The maker is killed, and back after ten claim TTLs: one consumer, then two that share no state."""
    return together(lambda consumers: _outage(scale, consumers), [1, 2], lanes=2)


def _outage(scale: float, consumers: int) -> Result:
    with world() as made:
        made.post_ids(widget_ids(scaled(10_000, scale)))
        took = _without_maker(made, scale, consumers, lambda: made.stats().total)
        return made.check().plus(most_seconds_until_all_was_made=took)


def _without_maker(made: World, scale: float, consumers: int, left: Callable[[], int], **how: Any) -> float:
    with made.maker("--latency", 0.005) as maker:
        running = [
            made.consumer("--max-receives", 5, "--receive-counts", f"{number}.sqlite3", **how)
            for number in range(consumers)
        ]
        wait_until(lambda: len(made.widgets()) * 10 > len(made.posted), 300)
        maker.kill()
    time.sleep(scaled(10, scale) * CLAIM_TTL)
    with made.maker():
        started = time.monotonic()
        wait_until(lambda: not left(), 300)
        took = since(started)
        for consumer in running:
            consumer.signal(signal.SIGTERM)
            assert consumer.exit_code() == 0, consumer.err[-2000:]
    return took


def outage_on_sqs(scale: float) -> Result:
    """The same on SQS, two consumers that share no state. Of 1,000 requests moto lets such short claims lapse."""
    from claim_queues.sqs import SqsQueues

    ids = widget_ids(scaled(500, scale))
    with (
        world() as made,
        mock.patch.dict(os.environ, KEYS),
        queue_servers.sqs(made.directory / "moto.log") as endpoint,
        SqsQueues(REGION, endpoint=endpoint) as queues,
    ):
        for queue in (REQUESTS, RESPONSES, DEAD_LETTERS):
            queues.create(queue)
        for start in range(0, len(ids), 10):
            bodies = [{"widget_id": id_} for id_ in ids[start : start + 10]]
            made.attempted += bodies
            made.posted.update(zip(queues.post(REQUESTS, bodies), bodies, strict=True))
        url = f"sqs://{REGION}?endpoint={endpoint}"
        took = _without_maker(made, scale, 2, lambda: queues.stats(REQUESTS).total, url=url)
        left = [_taken(queues, queue) for queue in (REQUESTS, RESPONSES, DEAD_LETTERS)]
        found = check(Evidence(made.attempted, made.posted, made.widgets(), *left), may_repeat=True)
    return Result(*found).plus(seconds_until_all_was_made=took)


def _taken(queues: Queues, queue: str) -> dict[str, Any]:
    """All that is free in a queue, which cannot be browsed."""
    found: dict[str, Any] = {}
    while claim := queues.claim(queue, ttl=3600, grace=60, limit=10):
        found |= {message.id: message.body for message in claim.messages}
    return found


def maker_killers(scale: float) -> Result:
    """A request whose POST ends the maker for a moment, among 300 others."""
    return together(_kill_maker, [1, 8] * scaled(5, scale), lanes=2)


def _kill_maker(batch: int) -> Result:
    with world() as made, made.scripted() as maker:
        poison = _post_with_poison(made)

        def answer(post: Post) -> Reply:
            if post.widget_id == poison:
                Timer(0.3, maker.up).start()
                with maker.down():
                    time.sleep(0.3)
            return maker.make(post)

        maker.answer = answer
        made.drain("--max-receives", 5, "--post-batch", batch)
        found, posts = made.check(maker.made, poison={poison}), len(maker.posts_of(poison))
    # Two POSTs, and the batch before them, charge nothing: another message may be at fault.
    broken = f"{posts} POSTs" if posts != 7 + (batch > 1) else ""
    return found.plus(broken, "" if found.figures["dead letters"] == 1 else "no dead letter", most_POSTs=posts)


def consumer_killers(scale: float) -> Result:
    """A request whose POST kills the consumer, which is started again, among 300 others."""
    return together(_kill_consumer, range(scaled(10, scale)))


def _kill_consumer(_: int) -> Result:
    with world() as made, made.maker("--latency", 0.005):
        poison = _post_with_poison(made)
        deaths, code = -1, -signal.SIGKILL
        while code == -signal.SIGKILL:
            deaths += 1
            made.free_all()
            code = made.consumer("--max-receives", 5, "--drain", env={"POISON": poison}).exit_code(60)
        found = made.check(poison={poison})
    broken = f"exit code {code}, {deaths} deaths" if (code, deaths) != (0, 5) else ""
    return found.plus(broken, "" if found.figures["dead letters"] == 1 else "no dead letter", deaths=deaths)


def _post_with_poison(made: World) -> str:
    ids = widget_ids(301)
    made.post_ids(ids)
    return ids[10]


CAMPAIGNS = [
    Campaign("outage", "the maker is gone for 10 claim TTLs: all is made after it, no dead letter", outage),
    Campaign("outage-sqs", "the same on Amazon SQS, two consumers that share no state", outage_on_sqs),
    Campaign("maker-killers", "a request that ends the maker: it alone is a dead letter", maker_killers),
    Campaign("consumer-killers", "a request that kills its consumer: it alone is one, after 5", consumer_killers),
]
