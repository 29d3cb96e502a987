"""One run of one contestant. Its record is a dict of figures."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .processes import Process
from .stage import BENCH, DIRECTORY, PEERS, Contestant, Maker, fresh_directory, stage

Record = dict[str, Any]

LONGEST_RUN_S = 120
LOOK_EVERY_S = 0.05
IDLE_S = 3.0
WARM_S = 1.0
"""So much of the latency's trickle is not counted."""


def drain(
    contestant: Contestant,
    count: int,
    *,
    processes: int = 1,
    maker: str = "stand-in",
    away_ms: tuple[int, int] | None = None,
) -> Record:
    """Load a queue, then let the contestant drain it; two processes are not pinned to a core."""
    count = min(count, contestant.count or count)
    with stage(contestant, maker=maker, is_pinned=processes == 1, away_ms=away_ms) as on:
        ids = on.write_ids(count)
        if contestant.program:
            on.fill(contestant.program, "load")
        on.begin()
        started_at = time.time()
        worker = on.spawn(contestant.drain if processes == 1 else contestant.two)
        try:
            early = _wait_for(on.maker, max(count // 10, 1), worker)
            early_s = worker.cpu_s(), on.service.cpu_s() if on.service else 0
            made = _wait_for(on.maker, count, worker)
            cpu_s = worker.cpu_s(), on.service.cpu_s() if on.service else 0
            is_running = not worker.has_ended()  # a loop ends by itself, perhaps before it is looked at
            record: Record = {"rss_mib": worker.rss_mib()} if is_running else {}
        finally:
            worker.end()
        if requests := on.requests():
            record["requests"] = requests / count
        if maker == "stand-in":
            shares = on.maker.shares()
            record["least_share"] = min(shares) / statistics.mean(shares)
        widgets, answers = on.maker.made()
        made_at = sorted(widgets.values())
        middle = made_at[count // 10 : count - count // 10]
        return record | {
            "per_s": (count - 1) / (made_at[-1] - made_at[0]),
            "middle_per_s": (len(middle) - 1) / (middle[-1] - middle[0]),
            "cpu_us": (cpu_s[0] - early_s[0]) / max(1, made - early) * 1e6,
            "service_cpu_us": (cpu_s[1] - early_s[1]) / max(1, made - early) * 1e6,
            "first_s": made_at[0] - started_at,
            "once": set(widgets) == set(ids) and answers == count,
        }


def latency(contestant: Contestant, _: int, *, seconds: int = 10, away_ms: tuple[int, int] | None = None) -> Record:
    """Serve requests that come one by one; from just before the post of each until its widget's answer leaves."""
    with stage(contestant, away_ms=away_ms) as on:
        per_s = float(on.env["BENCH_RATE"])
        warm = max(1, int(per_s * WARM_S))
        count = int(per_s * seconds) + warm
        worker = on.spawn(contestant.drain)
        try:
            first = on.write_ids(1)
            on.fill(contestant.program, "produce")
            _wait_for(on.maker, 1, worker)
            idle_from, cpu_from = time.monotonic(), worker.cpu_s()
            time.sleep(IDLE_S)
            idle_percent = (worker.cpu_s() - cpu_from) / (time.monotonic() - idle_from) * 100
            ids, cpu_from = on.write_ids(count), worker.cpu_s()
            on.begin()
            on.fill(contestant.program, "produce")
            _wait_for(on.maker, 1 + count, worker)
            cpu_s, requests = worker.cpu_s() - cpu_from, on.requests()
        finally:
            worker.end()
        made, answers = on.maker.made()
    lines = Path(on.env["BENCH_PRODUCED"]).read_text().splitlines()
    produced = {id_: float(at) for id_, at in map(str.split, lines)}
    took_ms = sorted((made[id_] - produced[id_]) * 1000 for id_ in ids[warm:])
    return {
        "p50_ms": statistics.median(took_ms),
        "p99_ms": took_ms[int(len(took_ms) * 0.99)],
        "requests_per_s": max(0, requests - count) / (count / per_s),  # without the posts
        "cpu_us": cpu_s / count * 1e6,
        "idle_percent": idle_percent,
        "once": set(made) == {*first, *ids} and answers == 1 + count,
    }


def queue_operations(queue: str, count: int) -> Record:
    """Run programs/queue_operations.py in the queue's environment."""
    env = fresh_directory()
    python = sys.executable if queue == "ours" else PEERS / "bin/python"
    words = [python, BENCH / "programs/queue_operations.py", queue, str(2 * count), DIRECTORY]
    done = subprocess.run(words, env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=LONGEST_RUN_S)
    found: Record = json.loads(done.stdout)
    return found


def _wait_for(maker: Maker, count: int, worker: Process) -> int:
    """Wait until there are so many widgets; gives how many there are."""
    give_up_at = time.monotonic() + LONGEST_RUN_S
    while (made := maker.count()) < count:
        if worker.has_ended() and maker.count() < count:
            raise RuntimeError(f"it ended after {maker.count()} of {count} widgets")
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"only {made} of {count} widgets within {LONGEST_RUN_S} s")
        time.sleep(LOOK_EVERY_S)
    return made
