"""One run of one contestant (or maker, or embedded queue). Its record is a dict for the JSON."""

import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import environments
from .processes import cpu_s, end, has_ended, idle_s, rss_mib, waited_s
from .stage import DIRECTORY, MAKER_CORE, Maker, last_json, rate, stage, steady_rate, wrk

Record = dict[str, Any]

LONGEST_RUN_S = 300
LOOK_EVERY_S = 0.05
WARM_S = 1.0
"""So much of the latency's trickle is not counted."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """See contestants.toml."""

    name: str
    how: str
    drain: str = ""
    delivery: str = ""
    load: str | None = None
    drain2: str | None = None
    produce: str | None = None
    count: int | None = None
    needs: tuple[str, ...] = ()
    service: dict[str, Any] | None = None
    variables: dict[str, str] = field(default_factory=dict)


def drain(contestant: Contestant, *, count: int, processes: int = 1, pinned: bool = True, maker: str = "own") -> Record:
    """Load a queue, then let the contestant drain it."""
    count = min(count, contestant.count or count)
    record: Record = {"count": count, "load": os.getloadavg()[0]}
    given = {"maker": maker, "pinned": pinned, "service": contestant.service, "variables": contestant.variables}
    with stage(**given) as on:
        ids = on.write_ids(count)
        if contestant.load:
            record["loaded_per_s"] = count / on.run(contestant.load)["seconds"]
        maker_before = cpu_s(on.maker.process), waited_s(on.maker.process)
        started_at = time.time()
        worker = on.spawn(contestant.drain if processes == 1 else contestant.drain2 or "")
        try:
            early = _wait_for(on.maker, max(count // 10, 1), worker)
            early_costs = cpu_s(worker), cpu_s(on.service)
            early_at, early_idle_s = time.monotonic(), idle_s()
            made = _wait_for(on.maker, count, worker)
            record["idle_cores"] = (idle_s() - early_idle_s) / (time.monotonic() - early_at)
            costs = cpu_s(worker), cpu_s(on.service)
            if not has_ended(worker):  # a loop ends by itself, perhaps before it is looked at
                record |= {"rss_mib": rss_mib(worker), "waited_s": waited_s(worker)}
        finally:
            end(worker)
        time.sleep(0.1)  # for what would be made twice
        widgets = on.maker.made()
        per_s = rate(widgets.values())
        record |= {
            "wrk_per_s": on.wrk_per_s,
            "per_s": per_s,
            "steady_per_s": steady_rate(widgets.values()),
            "of_wrk": per_s / on.wrk_per_s,
            "cpu_us": (costs[0] - early_costs[0]) / (made - early) * 1e6,
            "service_cpu_us": (costs[1] - early_costs[1]) / (made - early) * 1e6,
            "maker_cpu_us": (cpu_s(on.maker.process) - maker_before[0]) / count * 1e6,
            "maker_waited_s": waited_s(on.maker.process) - maker_before[1],
            "first_s": min(widgets.values()) - started_at,
            "answers": (answers := on.maker.answers()),
            "exactly_once": set(widgets) == set(ids) and answers == {"created": count},
        }
    return record


def service_requests(contestant: Contestant, *, count: int) -> Record:
    """Count the requests that the contestant sends to its queue service for each widget."""
    count = min(count, contestant.count or count)
    with stage(service=contestant.service, variables=contestant.variables, counted=True) as on:
        on.write_ids(count)
        on.run(contestant.load or "")
        before = on.service_requests()
        worker = on.spawn(contestant.drain)
        try:
            _wait_for(on.maker, count, worker)
            time.sleep(0.5)  # the last acknowledgements
            return {"count": count, "requests": (on.service_requests() - before) / count}
        finally:
            end(worker)


def latency(contestant: Contestant, *, per_s: float, seconds: float) -> Record:
    """Serve requests that come one by one; from just before the post of each until its widget's answer leaves."""
    count, warm = int(per_s * (seconds + WARM_S)), int(per_s * WARM_S)
    record: Record = {"per_s": per_s, "load": os.getloadavg()[0]}
    variables = contestant.variables | {"BENCH_RATE": str(per_s)}
    with stage(maker="timed", service=contestant.service, variables=variables) as on:
        worker = on.spawn(contestant.drain)
        try:
            on.write_ids(1)
            on.run(contestant.produce or "")
            _wait_for(on.maker, 1, worker)
            on.maker.forget()
            idle_from = time.monotonic(), cpu_s(worker)
            time.sleep(3)
            record["idle_percent"] = (cpu_s(worker) - idle_from[1]) / (time.monotonic() - idle_from[0]) * 100
            ids, before = on.write_ids(count), cpu_s(worker)
            on.spawn(contestant.produce or "", MAKER_CORE).wait(seconds + 60)
            _wait_for(on.maker, count, worker)
            record["cpu_us"] = (cpu_s(worker) - before) / count * 1e6
        finally:
            end(worker)
        time.sleep(0.1)
        made = on.maker.made()
        record["exactly_once"] = set(made) == set(ids) and on.maker.answers() == {"created": count}
        lines = Path(on.env["BENCH_PRODUCED"]).read_text().splitlines()
    produced = {line.split()[0]: float(line.split()[1]) for line in lines}
    return record | _percentiles([(made[id_] - produced[id_]) * 1000 for id_ in ids[warm:]])


def _percentiles(took_ms: list[float]) -> Record:
    took_ms.sort()
    at_99 = took_ms[int(len(took_ms) * 0.99)]
    return {"p50_ms": statistics.median(took_ms), "p99_ms": at_99, "max_ms": took_ms[-1]}


def maker(kind: str, *, connections: int, seconds: float) -> Record:
    """The top rate of a maker under wrk, and how long its answers take at half of that."""
    with stage(maker=kind) as on:

        def ask(seconds: float, delay_ms: float = 0) -> Any:
            return wrk(on.env, on.core, seconds=seconds, connections=connections, delay_ms=delay_ms)

        top = ask(seconds)
        cycle_ms = 2 * connections / top["per_s"] * 1000
        trial = ask(1, cycle_ms)
        answer_ms = connections / trial["per_s"] * 1000 - cycle_ms
        half = ask(seconds, max(1.0, cycle_ms - answer_ms))
    return {
        "per_s": top["per_s"],
        "top_p99_ms": top["p99_ms"],
        "half_per_s": half["per_s"],
        "p50_ms": half["p50_ms"],
        "p99_ms": half["p99_ms"],
        "errors": top["errors"] + half["errors"],
        "load": os.getloadavg()[0],
    }


def queue_operations(command: str, queue: str, *words: object) -> Record:
    """Run programs/queue_operations.py in the queue's environment."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.mkdir()
    env = environments.variables()
    python = env["PYTHON"] if queue.startswith("ours") else environments.VENVS / "bench-embedded/bin/python"
    program = environments.BENCH / "programs/queue_operations.py"
    done = subprocess.run(
        [python, program, command, queue, *map(str, words), DIRECTORY],
        env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=LONGEST_RUN_S,
    )  # fmt: skip
    return {"load": os.getloadavg()[0], **last_json(done.stdout)}


def _wait_for(maker: Maker, count: int, worker: subprocess.Popen[Any]) -> int:
    """Wait until there are so many widgets; gives how many there are."""
    give_up_at = time.monotonic() + LONGEST_RUN_S
    while (made := maker.count()) < count:
        if has_ended(worker) and maker.count() < count:
            raise RuntimeError(f"it ended with {worker.returncode} after {maker.count()} of {count} widgets")
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"only {made} of {count} widgets within {LONGEST_RUN_S} s")
        time.sleep(LOOK_EVERY_S)
    return made
