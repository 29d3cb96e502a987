"""Makers that are gone for long, and messages that kill."""

import signal
import time
from collections.abc import Callable
from typing import Any

import queue_servers
from backend_sqs import REGION, credentials
from doubles.scripted_maker import Post, Reply
from support import wait_until

from claim_queues import Queues
from claim_queues.sqs import SqsQueues

from .frame import Result, campaign, scaled
from .world import CLAIM_TTL, QUEUES, REQUESTS, World, seconds_until, stop, world

RECEIVES = ("--max-receives", 5)


@campaign("the maker is gone for 10 claim TTLs: all is made after it, no dead letter", [(1,), (2,)], lanes=2)
def outage(scale: float, consumers: int) -> Result:
    """It is killed, and comes back: one consumer, then two that share no state."""
    with world() as made:
        made.post_ids(scaled(10_000, scale, 500))
        broken, took = _without_maker(made, scale, consumers, lambda: made.stats().total)
        return made.check().plus(*broken, most_seconds_until_all_was_made=took)


def _without_maker(
    made: World, scale: float, consumers: int, left: Callable[[], int], **how: Any
) -> tuple[list[str], float]:
    """The lines of what went wrong, and the seconds until all was made once the maker was back."""
    with made.maker("--latency", 0.05):
        counts = [("--receive-counts", f"{number}.sqlite3") for number in range(consumers)]
        running = [made.consumer(*RECEIVES, *file, **how) for file in counts]
        wait_until(lambda: len(made.widgets()) * 10 > len(made.posted), 300)
    time.sleep(scaled(10, scale) * CLAIM_TTL)
    broken = [] if left() else ["all was made before the outage"]
    with made.maker():
        took = seconds_until(lambda: not left(), 300)
        return [*broken, *map(stop, running)], took


@campaign("the same on Amazon SQS, two consumers that share no state")
def outage_sqs(scale: float) -> Result:
    """Of 1,000 requests moto lets such short claims lapse."""
    with (
        world() as made,
        credentials(),
        queue_servers.sqs(made.directory / "moto.log") as endpoint,
        SqsQueues(REGION, endpoint=endpoint) as queues,
    ):
        for queue in QUEUES:
            queues.create(queue)
        made.post_ids(scaled(500, scale, 100), queues)
        url = f"sqs://{REGION}?endpoint={endpoint}"
        broken, took = _without_maker(made, scale, 2, lambda: queues.stats(REQUESTS).total, url=url)
        found = made.check([_taken(queues, queue) for queue in QUEUES], may_repeat=True)
        return found.plus(*broken, seconds_until_all_was_made=took)


def _taken(queues: Queues, queue: str) -> dict[str, Any]:
    """All that is free in a queue, which cannot be browsed."""
    found: dict[str, Any] = {}
    while claim := queues.claim(queue, ttl=3600, grace=60, limit=10):
        found |= {message.id: message.body for message in claim.messages}
    return found


@campaign("a request that ends the maker: it alone is a dead letter", [(1,), (8,)], times=5, lanes=2)
def maker_killers(scale: float, batch: int) -> Result:
    """Its POST ends the maker for a moment, among 300 others."""
    with world() as made, made.scripted() as maker:
        poison = made.post_ids(301)[10]

        def answer(post: Post) -> Reply:
            if post.widget_id == poison:
                with maker.down():
                    time.sleep(0.3)
            return maker.make(post)

        maker.answer = answer
        made.drain(*RECEIVES, "--post-batch", batch)
        found, posts = made.check(poison=[poison]), len(maker.posts_of(poison))
    # Two POSTs, and the batch before them, charge nothing: another message may be at fault.
    return found.plus(f"{posts} POSTs" if posts != 7 + (batch > 1) else "", most_POSTs=posts)


@campaign("a request that kills its consumer: it alone is one, after 5", times=10)
def consumer_killers(scale: float) -> Result:
    """The consumer is started again each time; 300 other requests are in the queue."""
    with world() as made, made.maker("--latency", 0.005):
        poison = made.post_ids(301)[10]
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            made.free()
            code = made.consumer(*RECEIVES, "--drain", env={"POISON": poison}).exit_code(60)
        found, deaths = made.check(poison=[poison]), made.killed
    return found.plus(f"exit code {code}, {deaths} deaths" if (code, deaths) != (0, 5) else "", deaths=deaths)
