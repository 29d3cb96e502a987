"""Processes that are killed, stopped, or stand still, at random times."""

import random
import signal
import time

from support import wait_until

from .frame import Result, campaign, patience, scaled
from .world import CLAIM_TTL, begun, seconds_until, stop, widget_ids, world

KINDS = ((), ("--post-batch", 20), ("--slots", 3))
"""Options of the consumers that run at the same time."""
LIFE_S = 0.4
"""The mean of a consumer that is killed, from when it claims."""


@campaign("SIGKILL of consumers at random times, three on one file: no request is lost")
def kills(scale: float) -> Result:
    """Of ten requests eight are made, one is rejected, and one is no request at all."""
    times, count = scaled(1_000, scale), scaled(100_000, scale, 300)
    bodies = [
        random.choice([{"widget_id": id_, "note": number}] * 8 + [{"widget_id": f"no-{id_}"}, [id_]])
        for number, id_ in enumerate(widget_ids(count))
    ]
    with world() as made, made.maker():
        running = [made.consumer(*options) for options in KINDS]
        for number in range(times):
            made.post(bodies[number::times])
            which = random.randrange(len(KINDS))
            begun(running[which])
            time.sleep(random.expovariate(1 / LIFE_S))
            running[which].kill()
            running[which] = made.consumer(*KINDS[which])
        killed = made.killed
        for consumer in running:
            consumer.kill()
        made.drain("--post-batch", 20)
        found = made.check(poison={f'["{body[0]}"]' for body in bodies if isinstance(body, list)})
        return found.plus("" if killed == times else f"{times - killed} ended by themselves", kills=killed)


@campaign("SIGKILL of producers: what was reported is there")
def kills_producer(scale: float) -> Result:
    """What a producer had not reported before it was killed may be there too."""
    times = scaled(200, scale)
    with world() as made, made.maker():
        consumer = made.consumer("--post-batch", 20)
        while made.killed < times:
            producer = made.producer(widget_ids(2_000), env={"POST_LIMIT": "10"})
            wait_until(lambda run=producer: run.out or run.process.poll() is not None)
            time.sleep(random.uniform(0, 0.1))
            producer.kill()
        consumer.kill()
        made.drain("--post-batch", 20)
        return made.check().plus(kills=times, attempted=len(made.attempted))


@campaign("SIGKILL of the maker: what was answered is there, each widget once")
def kills_maker(scale: float) -> Result:
    times, at_work = scaled(200, scale), 0
    with world() as made:
        consumers = [made.consumer(*options) for options in KINDS[:2]]
        for number in range(times):
            made.post_ids(250)
            before = len(made.widgets())
            with made.maker():
                if number == 0:  # while a maker is gone, the consumers pause: not all of the others are at work
                    wait_until(made.widgets)
                time.sleep(random.uniform(0, 0.5))
            at_work += len(made.widgets()) > before
        for consumer in consumers:
            consumer.kill()
        with made.maker():
            made.drain("--post-batch", 20)
        return made.check().plus(kills=times, at_work=at_work)


@campaign(
    "SIGTERM: exit code 0 within the deadline and 2 s, everything is free at once",
    [(225, 1), (225, 1), (50, 3)],
    lanes=3,
)
def sigterm(scale: float, count: int, deadline: int) -> Result:
    """deadline 3: the maker is silent."""
    times, broken, is_silent = [], [], deadline == 3
    with world() as made, made.scripted() if is_silent else made.maker() as maker:
        if is_silent:
            maker.answer = lambda post: maker.hang()
        for number in range(scaled(count, scale)):
            made.post_ids(150)
            consumer = begun(made.consumer("--deadline", deadline, "--claim-ttl", 13, *KINDS[number % 3]))
            time.sleep(random.uniform(0, 0.5))
            consumer.signal(signal.SIGTERM)
            times.append(seconds_until(lambda run=consumer: run.process.poll() is not None, 60))
            code, left = consumer.exit_code(), made.stats()
            is_late = times[-1] > deadline + 2 + patience(scale)
            if code or is_late or left.claimed or (left.delayed and not is_silent):
                broken.append(f"exit code {code} after {times[-1]} s, left {left}: {consumer.err[-300:]}")
        if is_silent:
            maker.answer = maker.make
        made.drain("--post-batch", 20)
        figures = {"SIGTERMs": len(times), f"most seconds with a deadline of {deadline} s": max(times)}
        return made.check().plus(*broken, **figures)


@campaign("a consumer stands still past its claim TTL: each request has one response", times=100, lanes=8)
def sigstop(scale: float) -> Result:
    """Another one takes its messages meanwhile; then it goes on."""
    with world() as made, made.maker("--latency", 0.02):
        made.post_ids(400)
        first = begun(made.consumer())
        wait_until(lambda: made.stats().claimed)
        time.sleep(random.uniform(0, 0.5))
        first.signal(signal.SIGSTOP)
        held, said = made.stats().claimed, first.err
        other = made.consumer("--drain")
        time.sleep(CLAIM_TTL + 1)
        more = len(first.err) - len(said)
        first.signal(signal.SIGCONT)
        code = other.exit_code(120)
        if code == 1 and "locked by another process" in other.err:  # the first one stands still amid a commit
            code = made.drain().exit_code()
        stopped = stop(first)
        still = f"it held {held} messages and wrote {more} characters" if more or not held else ""
        return made.check().plus(f"exit code {code}" if code else "", stopped, still)


@campaign("a killed consumer hides its slots and what they finish in a second", [(0.5,), (0.05,)], times=10, lanes=2)
def killed_holds(scale: float, seconds: float) -> Result:
    """It is killed amid slow and fast POSTs."""
    with world() as made, made.maker("--latency", seconds):
        made.post_ids(2_000)
        consumer = begun(made.consumer())
        time.sleep(random.uniform(2, 4))
        consumer.kill()
        hidden, most = made.stats().claimed, round(8 * (1 + 1 / seconds))
    wrong = "" if 0 < hidden <= most else f"{hidden} messages were hidden, not 1 to {most}"
    return Result({f"most hidden at {seconds} s for a POST": hidden}, []).plus(wrong)
