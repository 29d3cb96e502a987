"""Makers that are none, that fail, limit or hang, ahead of good requests; and how work is shared."""

import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from doubles.scripted_maker import Answer, Post, Reply, ScriptedMaker
from support import Script, free_port, wait_until

from .world import (
    RESPONSES,
    Campaign,
    Result,
    World,
    expect,
    patience,
    scaled,
    since,
    together,
    wait_to_begin,
    widget_ids,
    world,
)

RECEIVES = ("--max-receives", 5)
HOPELESS = 1
"""The exit code of a drain through which nothing passes."""
LOGIN = Reply(302, "", {"Location": "/login"})
FOREIGN = Reply(400, {"error": {"code": "BadRequest", "message": "no"}})


@contextmanager
def scene() -> Iterator[tuple[World, ScriptedMaker]]:
    with world() as made, made.scripted() as maker:
        yield made, maker


def for_some(maker: ScriptedMaker, ids: Collection[str], answer: Callable[[], Answer]) -> None:
    """Let it answer so for these widgets; all others are made."""
    maker.answer = lambda post: answer() if post.widget_id in ids else maker.make(post)


def ends(consumer: Script, scale: float) -> str:
    """A drain through which nothing passes: at full size it ends by itself, with exit code 1; else it is stopped."""
    if scale == 1:
        return expect(consumer, HOPELESS, what="the drain", seconds=240)
    return stops(consumer)


def stops(consumer: Script) -> str:
    consumer.signal(signal.SIGTERM)
    return expect(consumer, 0, what="after SIGTERM")


def wrong_urls(scale: float) -> Result:
    """What stands where the maker should be takes nothing; later the maker is there and all is made."""
    cases = [(LOGIN, Reply(200)), (FOREIGN, Reply(404)), (FOREIGN, Reply(200)), (Reply(401), Reply(401)), (None, None)]
    return together(lambda case: _wrong_url(scale, *case), cases, lanes=5)


def _wrong_url(scale: float, answer: Reply | None, health: Reply | None) -> Result:
    """answer: None for a file server of Python."""
    with scene() as (made, maker):
        made.post_ids(widget_ids(100))
        port = free_port()
        words = [sys.executable, "-m", "http.server", str(port)]
        server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if answer and health:
            maker.says_maker, maker.answer, maker.health = False, lambda post: answer, health
        url = f"{made.maker_url if answer else f'http://127.0.0.1:{port}'}/widgets"
        consumer = made.consumer(*RECEIVES, "--drain", "--maker-url", url)
        wait_to_begin(consumer)
        time.sleep(3)
        broken = ends(consumer, scale)
        server.kill()
        server.wait()
        left, ended = made.stats().total, made.stats(RESPONSES).total
        maker.says_maker, maker.answer, maker.health = True, maker.make, Reply(200)
        made.drain(*RECEIVES)
        kept = "" if (left, ended) == (100, 0) else f"{left} left, {ended} responses"
        return made.check(maker.made).plus(broken, kept)


def failing(scale: float) -> Result:
    """Everything is answered 500, or by a gateway, for a time, while the health page is well; then all is made."""
    return together(lambda answer: _failing(scale, answer), [500, Reply(521, "<html>"), Reply(503, "")], lanes=3)


def _failing(scale: float, answer: Answer) -> Result:
    with scene() as (made, maker):
        made.post_ids(widget_ids(100))
        maker.answer = lambda post: answer
        consumer = made.consumer(*RECEIVES)
        time.sleep(max(3, 20 * scale))
        maker.answer = maker.make
        started = time.monotonic()
        wait_until(lambda: not made.stats().total, 120)
        took = since(started)
        return made.check(maker.made).plus(stops(consumer), most_seconds_until_all_was_made=took)


class Limit:
    """A limit of 30 POSTs in a second. counts_all: refused ones too."""

    def __init__(self, maker: ScriptedMaker, retry_after: str | None, *, counts_all: bool) -> None:
        self._maker, self._headers, self._counts_all = maker, {"Retry-After": retry_after}, counts_all
        self._recent, self._lock = deque[float](), Lock()

    def __call__(self, post: Post) -> Answer:
        with self._lock:
            while self._recent and self._recent[0] < post.at - 1:
                self._recent.popleft()
            is_over = len(self._recent) >= 30
            if self._counts_all or not is_over:
                self._recent.append(post.at)
        return Reply(429, "slow down", self._headers) if is_over else self._maker.make(post)


def limits(scale: float) -> Result:
    """429 beyond 30 POSTs a second, with Retry-After and without, and 503 to a third of the POSTs."""
    cases = [(600, after, counts_all) for after in (None, "1") for counts_all in (False, True)]
    return together(lambda case: _limit(scale, *case), [(1_500, None, None), *cases], lanes=3)


def _limit(scale: float, count: int, after: str | None, counts_all: bool | None) -> Result:
    with scene() as (made, maker):
        if counts_all is None:
            maker.answer = lambda post: Reply(503, "") if random.random() < 1 / 3 else maker.make(post)
        else:
            maker.answer = Limit(maker, after, counts_all=counts_all)
        made.post_ids(widget_ids(scaled(count, scale, 60)))
        made.drain(*RECEIVES, hurry=False)
        return made.check(maker.made).plus(POSTs=len(maker.posts))


def hanging(scale: float) -> Result:
    """Three that hang among 300: the others are made in the time of one deadline. Twelve ahead of 500: in 3 minutes."""
    deadline = max(2.0, 20 * scale)
    more = patience(scale)
    cases = [([0, 150, 302], 300, deadline + 3 + more), ([*range(12)], 500, 9 * deadline + more)]
    return together(lambda case: _hanging(deadline, *case), cases)


def _hanging(deadline: float, hung: list[int], good: int, most: float) -> Result:
    with scene() as (made, maker):
        ids = widget_ids(good + len(hung))
        for_some(maker, {ids[number] for number in hung}, maker.hang)
        consumer = made.consumer(*RECEIVES, "--deadline", deadline, "--claim-ttl", 60)
        wait_to_begin(consumer)
        made.post_ids(ids)
        started = time.monotonic()
        wait_until(lambda: len(maker.made) >= good, 300)
        took = since(started)
        maker.answer = maker.make
        maker.release()
        stopped = stops(consumer)
        made.drain(*RECEIVES)
        figures = {f"seconds for {good} with {len(hung)} that hang for {deadline:g} s": took}
        return made.check(maker.made).plus(stopped, f"{took} s, not {most:g}" if took > most else "", **figures)


def bad_ahead(scale: float) -> Result:
    """200 and 1,000 bad ones ahead of 500 good: these are made within 30 s, and the drain ends with exit code 1."""
    return together(lambda count: _bad_ahead(scale, count), [200, 1_000])


def _bad_ahead(scale: float, count: int) -> Result:
    with scene() as (made, maker):
        bad, good = widget_ids(scaled(count, scale, 30)), widget_ids(scaled(500, scale, 50))
        for_some(maker, set(bad), lambda: 500)
        made.post_ids(bad + good)
        consumer = made.consumer(*RECEIVES, "--drain")
        wait_to_begin(consumer)
        started = time.monotonic()
        wait_until(lambda: len(maker.made) >= len(good), 120)
        took = since(started)
        broken = ends(consumer, scale), f"the good ones took {took} s" if took > 30 + patience(scale) else ""
        maker.answer = maker.make
        made.drain(*RECEIVES)
        return made.check(maker.made, poison=bad).plus(*broken, **{f"seconds for the good behind {len(bad)} bad": took})


def alone(scale: float) -> Result:
    """One message in the queue: what fails or hangs is a dead letter at the end, what is answered 403 stays."""
    cases = [("fail", 5, 1), ("hang", 10, 1), ("403", None, 0)]
    return together(lambda case: _alone(scale, *case), cases, lanes=3)


def _alone(scale: float, what: str, most: int | None, letters: int) -> Result:
    with scene() as (made, maker):
        ids = widget_ids(1)
        made.post_ids(ids)
        answers: dict[str, Callable[[], Answer]] = {"fail": lambda: 500, "hang": maker.hang, "403": lambda: Reply(403)}
        for_some(maker, ids, answers[what])
        broken = ""
        if letters:
            made.drain("--max-receives", 5 if what == "fail" else 2, "--deadline", 0.3)
        else:
            consumer = made.consumer(*RECEIVES, "--drain")
            wait_until(lambda: maker.posts)
            broken = ends(consumer, scale)
        posts = len(maker.posts)
        found = made.check(maker.made, poison=ids, is_drained=letters > 0).plus(broken, **{f"POSTs of {what}": posts})
        lines = f"{posts} POSTs" if most and posts != most else "", f"{found.figures['dead letters']} dead letters"
        return found.plus(lines[0], lines[1] if found.figures["dead letters"] != letters else "")


def health_urls(scale: float) -> Result:
    """A health page that refuses, redirects, wants a login or fails, at a good maker: all is made but a bad one."""
    return together(_health_url, [None, LOGIN, Reply(401, ""), Reply(503, "")], lanes=2)


def _health_url(health: Reply | None) -> Result:
    with scene() as (made, maker):
        ids = widget_ids(41)
        for_some(maker, ids[20:21], lambda: 500)
        maker.health = health or Reply(200)
        made.post_ids(ids)
        made.drain(*RECEIVES, *([] if health else ["--health-url", "http://127.0.0.1:1/healthz"]))
        found = made.check(maker.made, poison=ids[20:21])
        return found.plus("" if found.figures["dead letters"] == 1 else "no dead letter")


def moved_name(scale: float) -> Result:
    """A consumer that is never idle: how long it keeps a connection, and so the address of a name that has moved."""
    lives: dict[int, list[float]] = {}
    with scene() as (made, maker):

        def make(post: Post) -> Answer:
            lives.setdefault(post.connection, []).append(post.at)
            time.sleep(0.02)
            return maker.make(post)

        maker.answer = make
        made.post_ids(widget_ids(scaled(4_000, scale)))
        made.drain("--slots", 1)
        longest = max(round(ends[-1] - ends[0], 1) for ends in lives.values())
        found = made.check(maker.made).plus(most_seconds_on_one_connection=longest, connections=len(lives))
        return found.plus(f"{longest} s on one connection" if longest > 61 else "")


def fairness(scale: float) -> Result:
    """24 requests of 5 s on three consumers of 8 slots, 14 of 40 s on two of 2."""
    cases = [(24, max(1.5, 5 * min(1, 10 * scale)), 3, 8), (14, max(1.5, 40 * scale), 2, 2)]
    return together(lambda case: _share(*case, 2 + patience(scale)), cases, lanes=2)


def _share(count: int, seconds: float, consumers: int, slots: int, spare_s: float) -> Result:
    with world() as made, made.maker("--latency", seconds):
        words = ("--slots", slots, "--deadline", max(5, 2 * seconds), "--claim-ttl", max(60, round(3 * seconds)))
        running = [made.consumer(*words) for _ in range(consumers)]
        wait_to_begin(*running)
        time.sleep(1)
        made.post_ids(widget_ids(count))
        started = time.monotonic()
        wait_until(lambda: made.stats(RESPONSES).total >= count, 400)
        took = since(started)
        wait_until(lambda: sum(len(run.events("created")) for run in running) == count)  # each logs what is stored
        shares = sorted(len(run.events("created")) for run in running)
        figures: dict[str, Any] = {f"shares of {count}": "/".join(map(str, shares)), f"seconds for {count}": took}
        most = seconds * -(-count // (consumers * slots)) + spare_s
        late = f"{count} took {took} s, not {most:g}" if took > most else ""
        return made.check().plus(f"shared {shares}" if shares[-1] - shares[0] > 2 else "", late, **figures)


CAMPAIGNS = [
    Campaign("wrong-urls", "a file server, a foreign API, logins at the maker's URL: the queue keeps all", wrong_urls),
    Campaign("failing-maker", "everything fails for 20 s, the maker's health well: no dead letter", failing),
    Campaign("limits", "429 beyond 30 POSTs a second, 503 to a third: all made, no dead letter", limits),
    Campaign("hanging", "messages that hang hold up no others", hanging),
    Campaign("bad-ahead", "200 and 1,000 bad messages ahead of 500 good ones", bad_ahead),
    Campaign("alone", "a message alone that fails, hangs, or is answered 403", alone),
    Campaign(
        "moved-name", "a maker that is always busy: a connection, and so its address, is kept for a minute", moved_name
    ),
    Campaign("health-urls", "a wrong health URL: all is made, and what is bad is a dead letter", health_urls),
    Campaign("fairness", "slow requests are shared evenly", fairness),
]
