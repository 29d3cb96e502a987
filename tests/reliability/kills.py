"""Campaigns that kill processes with SIGKILL: at random times, and at each step of a message's life."""

import random
import time
from collections import Counter
from collections.abc import Iterator

from .campaign import Campaign, Result
from .recorded import STEPS, Plan
from .trial import CLAIM_TTL, Run, Trial, mixed_bodies, scaled, side_by_side, trial, widget_ids

CONSUMER_LIFE_S = 0.6
KINDS = ((), ("--post-batch", 20), ("--slots", 3))
"""Options of the consumers that run side by side."""


def kill_consumers(scale: float) -> Result:
    """Three consumers on one file are killed again and again while messages flow."""
    kills, count = scaled(1_000, scale), scaled(100_000, scale, 500)
    with trial() as made, made.maker():
        producers = [made.producer(batch, Plan()) for batch in _batches(widget_ids(count), 10_000)]
        made.post(mixed_bodies(scaled(1_000, scale, 20)))
        started = time.monotonic()
        _keep_killing(made, kills)
        for producer in producers:
            assert producer.wait() == 0
        made.drain("--post-batch", 20, seconds=400)
        counts, violations = made.check()
        return Result({"kills": kills, **counts, "seconds": round(time.monotonic() - started)}, violations)


def _keep_killing(made: Trial, kills: int) -> None:
    chance = random.Random(1)
    running = [made.consumer(*options) for options in KINDS]
    for number in range(kills):
        which = chance.randrange(len(running))
        running[which].wait_for_events()
        time.sleep(chance.expovariate(len(running) / CONSUMER_LIFE_S))
        running[which].kill()
        made.deaths += 1
        if number < kills - 1:
            running[which] = made.consumer(*KINDS[which])
    for run in running:
        run.kill()
    made.deaths += len(running) - 1


def kill_producers(scale: float) -> Result:
    """A producer is killed while it posts; what it has reported is there, what it has not may be."""
    kills, each = scaled(200, scale), 400
    chance = random.Random(2)
    killed = complete = 0
    with trial() as made, made.maker():
        consumers = [made.consumer("--post-batch", 20) for _ in range(2)]
        while killed < kills:
            producer = made.producer(widget_ids(each), Plan(history=made.path("unused"), post_batch=10))
            time.sleep(chance.uniform(0, 0.12))
            producer.kill()
            complete += producer.process.exitcode == 0
            killed += producer.process.exitcode != 0
        for consumer in consumers:
            consumer.kill()
            made.deaths += 1
        made.drain("--post-batch", 20, seconds=400)
        counts, violations = made.check()
        return Result({"kills": killed, "too late": complete, **counts}, violations)


def kill_makers(scale: float) -> Result:
    """The maker is killed with all its processes while it makes widgets, and started again."""
    kills, each = scaled(200, scale), 250
    chance = random.Random(3)
    with trial() as made:
        consumers = [made.consumer(*options) for options in KINDS[:2]]
        for _ in range(kills):
            made.post([{"widget_id": id_} for id_ in widget_ids(each)])
            with made.maker():
                time.sleep(chance.uniform(0, 0.5))
        with made.maker():
            for consumer in consumers:
                consumer.kill()
                made.deaths += 1
            made.drain("--post-batch", 20, seconds=400)
        counts, violations = made.check()
        return Result({"kills": kills, **counts}, violations)


def _batches(ids: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


# At each step


def fail_at_steps(scale: float, steps: tuple[str, ...] = tuple(STEPS), bug: str = "") -> Result:
    """Consumers die at one named step of a message's life, time after time; then one works off the rest."""
    each = scaled(100, scale)
    figures: Counter[str] = Counter()
    violations: list[str] = []
    for step, (kills, counts, broken) in zip(
        steps, side_by_side(lambda step: _fail_at(step, each, bug), steps, 4), strict=True
    ):
        figures.update({"kills": kills, **counts})
        violations += [f"{step} ({STEPS[step]}): {line}" for line in broken]
    return Result({"steps": len(steps), **figures}, violations)


def _fail_at(step: str, kills: int, bug: str) -> tuple[int, dict[str, int], list[str]]:
    chance = random.Random(step)
    options = maker_options(step)
    with trial() as made:
        with made.maker(*options):
            for _ in range(kills):
                made.post([*mixed_bodies(7, chance.randrange(10**6)), ["no request", len(made.attempted)]])
                run = made.consumer(
                    "--slots",
                    3,
                    plan=Plan(claim_ttl=CLAIM_TTL, kill=(step, chance.randint(1, most_hits(step))), bug=bug),
                )
                code = _until_dead(made, run)
                made.deaths += 1
                if code != -9:
                    return made.deaths, {}, [f"the consumer was not killed there: exit code {code}"]
            if not options:
                made.drain(seconds=300)
        if options:
            with made.maker():
                made.drain(seconds=300)
        return (kills, *made.check())


def maker_options(step: str) -> list[object]:
    """The faults without which a consumer does not get to the step, or not for long."""
    if step.startswith("k11"):
        return ["--latency", 0.5]
    if step.startswith("k12"):
        return ["--fail-rate", 0.4]
    return ["--latency", 0.03] if step in ("k5", "k13") else []


def most_hits(step: str) -> int:
    """How often a consumer gets to the step with a few messages."""
    return 3 if step in ("k3-look", "k3", "k4", "k5", "k6", "k7") else 1


def _until_dead(made: Trial, run: Run) -> int | None:
    """Wait for the end; a step that is not reached any more needs more messages."""
    for _ in range(20):
        run.process.join(3)
        if not run.is_running:
            return run.process.exitcode
        made.post(mixed_bodies(8))
    run.kill()
    return None


CAMPAIGNS = [
    Campaign(
        "kills",
        "SIGKILL of consumers at random times, three on one file: no request is lost, none claimed by two at once",
        kill_consumers,
    ),
    Campaign("kills-producer", "SIGKILL of producers: what was reported is there", kill_producers),
    Campaign("kills-maker", "SIGKILL of the maker: what was answered is there, each widget once", kill_makers),
    Campaign("failpoints", "SIGKILL of the consumer at each named step of a message's life", fail_at_steps),
]
