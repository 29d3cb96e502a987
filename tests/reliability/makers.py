"""Makers that are none, that fail, limit or hang, ahead of good requests; and how work is shared."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack

from doubles.scripted_maker import Answer, Post, Reply, ScriptedMaker
from support import Script, free_port, wait_until

from .frame import Result, campaign, patience, scaled
from .world import RESPONSES, begun, expect, seconds_until, stop, world

RECEIVES = ("--max-receives", 5)
LOGIN = Reply(302, "", {"Location": "/login"})
FOREIGN = Reply(400, {"error": {"code": "BadRequest", "message": "no"}})
BREAKER = "the maker fails: trying it with one claim at a time"


def for_some(maker: ScriptedMaker, ids: Collection[str], answer: Callable[[], Answer]) -> None:
    """Let it answer so for these widgets; all others are made."""
    maker.answer = lambda post: answer() if post.widget_id in ids else maker.make(post)


def failed(maker: ScriptedMaker) -> str:
    """A line where it did no more than make what it was asked for."""
    return "" if len(maker.posts) > maker.made.total() else "the maker did not fail"


def good_ones(maker: ScriptedMaker, count: int, most: float) -> tuple[float, str, str]:
    """In how many seconds so many are made, at most so many, next to the others; and lines where that went wrong."""
    took = seconds_until(lambda: len(maker.made) >= count, 300)
    return took, failed(maker), f"the good ones took {took} s, not {most:g}" if took > most else ""


def ends(drain: Script, scale: float) -> str:
    """A drain through which nothing passes: at full size it ends by itself, with exit code 1; else it is stopped."""
    return expect(drain, 1, what="the drain", seconds=240) if scale == 1 else stop(drain)


@campaign(
    "a file server, a foreign API, logins at the maker's URL: the queue keeps all",
    [(LOGIN, Reply(200)), (FOREIGN, Reply(404)), (FOREIGN, Reply(200)), (Reply(401), Reply(401)), (None, Reply(200))],
    lanes=5,
)
def wrong_urls(scale: float, answer: Reply | None, health: Reply) -> Result:
    """Later the maker is there, and all is made. answer: None for a file server of Python."""
    port = free_port()
    words = [sys.executable, "-m", "http.server", str(port)]
    with world() as made, made.scripted() as maker, ExitStack() as stack:
        file_server = stack.enter_context(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        stack.callback(file_server.kill)
        made.post_ids(100)
        if answer:
            maker.says_maker, maker.answer, maker.health = False, lambda post: answer, health
        url = f"{made.maker_url if answer else f'http://127.0.0.1:{port}'}/widgets"
        drain = made.consumer(*RECEIVES, "--drain", "--maker-url", url)
        wait_until(lambda: drain.events(BREAKER))
        time.sleep(3)
        broken = ends(drain, scale)
        left, ended = made.stats().total, made.stats(RESPONSES).total
        maker.says_maker, maker.answer, maker.health = True, maker.make, Reply(200)
        made.drain(*RECEIVES)
        return made.check().plus(broken, "" if (left, ended) == (100, 0) else f"{left} left, {ended} responses")


@campaign(
    "everything fails for 20 s, the maker's health well: no dead letter",
    [(500,), (Reply(521, "<html>"),), (Reply(503, ""),)],
    lanes=3,
)
def failing_maker(scale: float, answer: Answer) -> Result:
    with world() as made, made.scripted() as maker:
        made.post_ids(100)
        maker.answer = lambda post: answer
        consumer = begun(made.consumer(*RECEIVES))
        time.sleep(max(3, 20 * scale))
        broken = failed(maker)
        maker.answer = maker.make
        took = seconds_until(lambda: not made.stats().total, 120)
        return made.check().plus(broken, stop(consumer), most_seconds_until_all_was_made=took)


@campaign(
    "429 beyond 30 POSTs a second, 503 to a third: all made, no dead letter",
    [(1_500, None, None), (600, None, False), (600, None, True), (600, "1", False), (600, "1", True)],
    lanes=3,
)
def limits(scale: float, count: int, retry_after: str | None, counts_all: bool | None) -> Result:
    """counts_all: whether refused POSTs count too; None for the 503."""
    counted: list[float] = []

    def answer(post: Post) -> Answer:
        if counts_all is None:
            return Reply(503, "") if random.random() < 1 / 3 else maker.make(post)
        is_over = sum(at > post.at - 1 for at in counted) >= 30
        if counts_all or not is_over:
            counted.append(post.at)
        return Reply(429, "slow down", {"Retry-After": retry_after}) if is_over else maker.make(post)

    with world() as made, made.scripted() as maker:
        maker.answer = answer
        made.post_ids(scaled(count, scale, 60))
        made.drain(*RECEIVES, hurry=False)
        return made.check().plus(failed(maker), POSTs=len(maker.posts))


@campaign("messages that hang hold up no others", [([0, 150, 302], 300, 1, 3), ([*range(12)], 500, 9, 0)])
def hanging(scale: float, hung: list[int], good: int, deadlines: int, spare_s: int) -> Result:
    """The good ones are made in the time of so many deadlines, and a little more."""
    deadline = max(2.0, 20 * scale)
    with world() as made, made.scripted() as maker:
        ids = made.post_ids(good + len(hung))
        for_some(maker, {ids[number] for number in hung}, maker.hang)
        consumer = begun(made.consumer(*RECEIVES, "--deadline", deadline, "--claim-ttl", 60))
        took, *broken = good_ones(maker, good, deadlines * deadline + spare_s + patience(scale))
        maker.answer = maker.make
        maker.release()
        broken.append(stop(consumer))
        made.drain(*RECEIVES)
        figures = {f"seconds for {good} with {len(hung)} that hang for {deadline:g} s": took}
        return made.check().plus(*broken, **figures)


@campaign("200 and 1,000 bad messages ahead of 500 good ones", [(200,), (1_000,)])
def bad_ahead(scale: float, count: int) -> Result:
    """The good ones are made within 30 s, and the drain ends with exit code 1."""
    bad, good = scaled(count, scale, 30), scaled(500, scale, 50)
    with world() as made, made.scripted() as maker:
        suspects = made.post_ids(bad + good)[:bad]
        for_some(maker, set(suspects), lambda: 500)
        drain = begun(made.consumer(*RECEIVES, "--drain"))
        took, *broken = good_ones(maker, good, 30 + patience(scale))
        broken.append(ends(drain, scale))
        maker.answer = maker.make
        made.drain(*RECEIVES)
        return made.check(suspects=suspects).plus(*broken, **{f"seconds for the good behind {bad} bad": took})


@campaign(
    "a message alone that fails, hangs, or is answered 403",
    [("fail", 5, 5), ("hang", 2, 10), ("403", 5, None)],
    lanes=3,
)
def alone(scale: float, what: str, receives: int, most: int | None) -> Result:
    """It is a dead letter after so many POSTs; what is answered 403 stays."""
    with world() as made, made.scripted() as maker:
        ids = made.post_ids(1)
        for_some(maker, ids, {"fail": lambda: 500, "hang": maker.hang, "403": lambda: Reply(403)}[what])
        if most:
            made.drain("--max-receives", receives, "--deadline", 0.3)
            found = made.check(poison=ids)
        else:
            drain = made.consumer("--max-receives", receives, "--drain")
            wait_until(lambda: maker.posts)
            ended = ends(drain, scale)
            found = made.check(is_drained=False).plus(ended)
        posts = len(maker.posts)
        return found.plus(f"{posts} POSTs" if posts != (most or posts) else "", **{f"POSTs of {what}": posts})


@campaign(
    "a wrong health URL: all is made, and what is bad is a dead letter",
    [(None,), (LOGIN,), (Reply(401, ""),), (Reply(503, ""),)],
    lanes=2,
)
def health_urls(scale: float, health: Reply | None) -> Result:
    """health: None where nothing listens."""
    with world() as made, made.scripted() as maker:
        poison = made.post_ids(41)[20:21]
        for_some(maker, poison, lambda: 500)
        maker.health = health or Reply(200)
        made.drain(*RECEIVES, *([] if health else ["--health-url", "http://127.0.0.1:1/healthz"]))
        return made.check(poison=poison)


@campaign("a maker that is always busy: a connection, and so its address, is kept for a minute")
def moved_name(scale: float) -> Result:
    """A consumer that is never idle, and the address of a name that has moved."""
    lives: dict[int, list[float]] = {}
    with world() as made, made.scripted() as maker:

        def make(post: Post) -> Answer:
            lives.setdefault(post.connection, []).append(post.at)
            time.sleep(0.02)
            return maker.make(post)

        maker.answer = make
        made.post_ids(scaled(4_000, scale))
        made.drain("--slots", 1)
        longest = max(round(ends[-1] - ends[0], 1) for ends in lives.values())
        found = made.check().plus(most_seconds_on_one_connection=longest, connections=len(lives))
        was_short = scale == 1 and len(lives) == 1
        return found.plus(f"{longest} s on one connection" if longest > 61 else "", "too short" if was_short else "")


@campaign("slow requests are shared evenly", [(24, 5, 3, 8), (14, 40, 2, 2)], lanes=2)
def fairness(scale: float, count: int, seconds: float, consumers: int, slots: int) -> Result:
    """So many requests, each of so many seconds, on so many consumers of so many slots."""
    seconds = max(1.5, seconds * scale)
    with world() as made, made.maker("--latency", seconds):
        words = ("--slots", slots, "--deadline", max(5, 2 * seconds), "--claim-ttl", max(60, round(3 * seconds)))
        running = [made.consumer(*words) for _ in range(consumers)]
        for consumer in running:
            begun(consumer)
        time.sleep(1)
        made.post_ids(count)
        took = seconds_until(lambda: made.stats(RESPONSES).total >= count, 400)
        wait_until(lambda: sum(len(run.events("created")) for run in running) == count)  # each logs what is stored
        shares = sorted(len(run.events("created")) for run in running)
        most = seconds * -(-count // (consumers * slots)) + 2 + patience(scale)
        uneven = f"shared {shares}" if shares[-1] - shares[0] > 2 else ""
        late = f"{count} took {took} s, not {most:g}" if took > most else ""
        figures = {f"shares of {count}": "/".join(map(str, shares)), f"seconds for {count}": took}
        return made.check().plus(uneven, late, **figures)
