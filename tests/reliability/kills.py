"""Processes that are killed, stopped, or stand still, at random times."""

import random
import signal
import time
from contextlib import ExitStack

from support import wait_until

from .world import (
    CLAIM_TTL,
    Campaign,
    Result,
    mixed_bodies,
    patience,
    scaled,
    since,
    together,
    wait_to_begin,
    widget_ids,
    world,
)

KINDS = ((), ("--post-batch", 20), ("--slots", 3))
"""Options of the consumers that run at the same time."""
LIFE_S = 0.4
"""The mean of a consumer that is killed, from when it claims."""


def kill_consumers(scale: float) -> Result:
    """Three consumers on one file are killed again and again while messages flow."""
    kills, count = scaled(1_000, scale), scaled(100_000, scale, 300)
    with world() as made, made.maker():
        poison = set[str]()
        running = [made.consumer(*options) for options in KINDS]
        for number in range(kills):
            bodies, names = mixed_bodies(count * (number + 1) // kills - count * number // kills)
            poison |= names
            made.post(bodies)
            which = random.randrange(len(running))
            wait_to_begin(running[which])
            time.sleep(random.expovariate(1 / LIFE_S))
            running[which].kill()
            running[which] = made.consumer(*KINDS[which])
        for consumer in running:
            consumer.kill()
        made.drain("--post-batch", 20)
        return made.check(poison=poison).plus(kills=kills)


def kill_producers(scale: float) -> Result:
    """What a producer had reported before it was killed is there; what it had not may be."""
    kills, killed = scaled(200, scale), 0
    with world() as made, made.maker():
        consumer = made.consumer("--post-batch", 20)
        while killed < kills:
            producer = made.producer(widget_ids(2_000), env={"POST_LIMIT": "10"})
            wait_until(lambda run=producer: run.out or run.process.poll() is not None)
            time.sleep(random.uniform(0, 0.1))
            producer.kill()
            killed += producer.process.returncode == -signal.SIGKILL
            made.read_producers()
        consumer.kill()
        made.drain("--post-batch", 20)
        return made.check().plus(kills=killed, attempted=len(made.attempted))


def kill_makers(scale: float) -> Result:
    """What a maker had answered before it was killed is there."""
    kills = scaled(200, scale)
    with world() as made:
        consumers = [made.consumer(*options) for options in KINDS[:2]]
        for _ in range(kills):
            made.post_ids(widget_ids(250))
            with made.maker():
                time.sleep(random.uniform(0, 0.5))
        for consumer in consumers:
            consumer.kill()
        with made.maker():
            made.drain("--post-batch", 20)
        return made.check().plus(kills=kills)


def stop_consumers(scale: float) -> Result:
    """SIGTERM at random times, to consumers of a maker that answers, and of one that does not."""
    cases = [(scaled(225, scale), 1), (scaled(225, scale), 1), (scaled(50, scale), 3)]
    return together(lambda case: _stop(*case, 2 + patience(scale)), cases, lanes=3)


def _stop(count: int, deadline: int, spare_s: float) -> Result:
    """deadline 3: the maker is silent."""
    times, broken = [], []
    with world() as made, ExitStack() as stack:
        silent = stack.enter_context(made.scripted()) if deadline > 1 else None
        if silent:
            silent.answer = lambda post: silent.hang()
        else:
            stack.enter_context(made.maker())
        for number in range(count):
            made.post_ids(widget_ids(150))
            consumer = made.consumer("--deadline", deadline, "--claim-ttl", 13, *KINDS[number % 3])
            wait_to_begin(consumer)
            time.sleep(random.uniform(0, 0.5))
            consumer.signal(signal.SIGTERM)
            started = time.monotonic()
            code, left = consumer.exit_code(60), made.stats()
            times.append(since(started))
            if code or times[-1] > deadline + spare_s or left.claimed or (left.delayed and not silent):
                broken.append(f"exit code {code} after {times[-1]} s, left {left}: {consumer.err[-300:]}")
        if silent:
            silent.answer = silent.make
        made.drain("--post-batch", 20)
        figures = {"SIGTERMs": count, f"most seconds with a deadline of {deadline} s": max(times)}
        return made.check(silent and silent.made).plus(*broken, **figures)


def stand_still(scale: float) -> Result:
    """A consumer stands still past its claim TTL; another one takes its messages, then it goes on."""
    return together(_stand_still, range(scaled(100, scale)), lanes=8)


def _stand_still(_: int) -> Result:
    with world() as made, made.maker("--latency", 0.02):
        made.post_ids(widget_ids(400))
        first = made.consumer()
        wait_to_begin(first)
        time.sleep(random.uniform(0, 0.5))
        first.signal(signal.SIGSTOP)
        other = made.consumer("--drain")
        time.sleep(CLAIM_TTL + 1)
        first.signal(signal.SIGCONT)
        codes = [other.exit_code(120)]
        if codes == [1] and "locked by another process" in other.err:  # the first one stands still amid a commit
            codes = [made.drain().exit_code()]
        first.signal(signal.SIGTERM)
        codes.append(first.exit_code())
        return made.check().plus(*(f"exit code {code}" for code in codes if code))


def killed_holds(scale: float) -> Result:
    """A consumer is killed amid slow and fast POSTs: what it hides until its claims end."""
    return together(_kill_amid, [0.5, 0.05] * scaled(10, scale), lanes=2)


def _kill_amid(seconds: float) -> Result:
    with world() as made, made.maker("--latency", seconds):
        made.post_ids(widget_ids(2_000))
        consumer = made.consumer()
        wait_to_begin(consumer)
        time.sleep(random.uniform(2, 4))
        consumer.kill()
        hidden, most = made.stats().claimed, round(8 * (1 + 1 / seconds))
    found = Result({f"most hidden at {seconds} s for a POST": hidden}, [])
    return found.plus(f"{hidden} messages were hidden, not {most}" if hidden > most else "")


CAMPAIGNS = [
    Campaign("kills", "SIGKILL of consumers at random times, three on one file: no request is lost", kill_consumers),
    Campaign("kills-producer", "SIGKILL of producers: what was reported is there", kill_producers),
    Campaign("kills-maker", "SIGKILL of the maker: what was answered is there, each widget once", kill_makers),
    Campaign("sigterm", "SIGTERM: exit code 0 within the deadline and 2 s, everything is free at once", stop_consumers),
    Campaign("sigstop", "a consumer stands still past its claim TTL: each request has one response", stand_still),
    Campaign("killed-holds", "a killed consumer hides its slots and what they finish in a second", killed_holds),
]
