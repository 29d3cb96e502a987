"""Measure the project against what a user would pick instead: see docs/performance.md. Run by `make bench`.

Each table runs all its contestants round by round, every other round backwards. A whole table of three rounds or more
goes to bench/results/TABLE.json and into docs/performance.md; any other is printed alone.
"""

import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from . import environments, report, runs
from .processes import FAVOUR, late_percent, spin_ms, sync_ms, wake_us
from .runs import Contestant, Record
from .stage import CONTESTANT_CORE, DIRECTORY, MAKER_CORE

QUEUES = ("ours", "ours-10", "ours-10-ttl", "huey-synced", "huey-unsynced", "litequeue", "persist-queue")
BACKLOGS = {
    "ours": (1_000, 10_000, 100_000, 1_000_000),
    "huey-synced": (1_000, 10_000, 100_000),
    "litequeue": (1_000, 10_000, 100_000),
    "persist-queue": (1_000, 10_000),
}
"""Messages waiting; the peers post one by one."""
LEAST_ROUNDS = 3
ANSWERED = ("ours-embedded", "ours-embedded-apart", "taskiq")
"""Whose rate is taken without the maker too."""
MAKERS = ("own", "waitress")
CONNECTIONS = (8, 32)

Run = tuple[dict[str, Any], Callable[[], Record]]
"""What the records of one measurement are told apart by, and how it is done."""


def read_contestants() -> list[Contestant]:
    """All of contestants.toml, each number of threads as a contestant of its own."""
    found = tomllib.loads((environments.BENCH / "contestants.toml").read_text())
    contestants = []
    for name, given in found["contestants"].items():
        if "service" in given:
            given["service"] = found["services"][given["service"]]
        for threads in given.pop("threads", [None]):
            own = given if threads is None else given | {"variables": {"THREADS": str(threads)}}
            contestants.append(Contestant(name=name if threads is None else f"{name}-{threads}", **own))
    return contestants


def pinned(contestants: list[Contestant], count: int) -> Iterator[Run]:
    for one in contestants:
        if one.drain and (one.load or not one.produce):
            yield {"contestant": one.name}, partial(runs.drain, one, count=count)


def unpinned(contestants: list[Contestant], count: int) -> Iterator[Run]:
    for one in contestants:
        if one.drain and one.drain2:
            yield {"contestant": one.name}, partial(runs.drain, one, count=count, processes=2, pinned=False)


def answering(contestants: list[Contestant], count: int) -> Iterator[Run]:
    for one in contestants:
        if one.name in ANSWERED:
            for processes in (1, 2) if one.drain else (2,):
                options = {"count": 4 * count, "processes": processes, "pinned": False, "maker": "answering"}
                yield {"contestant": one.name, "processes": processes}, partial(runs.drain, one, **options)


def latency(contestants: list[Contestant], _: int) -> Iterator[Run]:
    for one in contestants:
        if one.produce:
            yield {"contestant": one.name}, partial(runs.latency, one, per_s=50, seconds=10)


def requests(contestants: list[Contestant], _: int) -> Iterator[Run]:
    for one in contestants:
        if one.service:
            yield {"contestant": one.name}, partial(runs.service_requests, one, count=1000)


def queues(_: list[Contestant], count: int) -> Iterator[Run]:
    for name in QUEUES:
        for processes in (1, 2):
            key = {"contestant": name, "processes": processes}
            yield key, partial(runs.queue_operations, "work", name, processes, 2 * count)


def backlog(_: list[Contestant], __: int) -> Iterator[Run]:
    for name, numbers in BACKLOGS.items():
        for waiting in numbers:
            key = {"contestant": name, "waiting": waiting}
            yield key, partial(runs.queue_operations, "backlog", name, waiting)


def maker(_: list[Contestant], __: int) -> Iterator[Run]:
    for kind in MAKERS:
        for connections in CONNECTIONS:
            key = {"contestant": kind, "connections": connections}
            yield key, partial(runs.maker, kind, connections=connections, seconds=4)


TABLES = {made.__name__: made for made in (pinned, unpinned, answering, latency, requests, queues, backlog, maker)}
NEEDS = {"answering": {"http"}, "queues": {"embedded"}, "backlog": {"embedded"}, "maker": {"waitress"}}


def measure(table: str, wanted: list[Run], rounds: int, head: Record) -> Record:
    """Run everything `rounds` times; gives the table's JSON. A run that fails is a record with an `error`."""
    records = []
    for number in range(1, rounds + 1):
        for key, run in wanted if number % 2 else reversed(wanted):
            machine = {
                "spin_ms": spin_ms(),
                "wake_us": wake_us((MAKER_CORE, CONTESTANT_CORE)),
                "sync_ms": sync_ms(environments.BENCH),
                "late_percent": late_percent(),
            }
            try:
                record = run()
            except Exception as error:
                log = DIRECTORY / "log"
                said = log.read_text(errors="replace")[-600:] if log.exists() else ""
                record = {"error": f"{type(error).__name__}: {error}", "log": said}
            records.append(key | {"round": number} | machine | record)
            shown = {name: round(value, 2) if isinstance(value, float) else value for name, value in record.items()}
            click.echo(f"{table} {number} {' '.join(map(str, key.values()))}: {shown}", err=True)
    return {"run": head, "records": records}


def describe(needs: set[str], rounds: int, count: int) -> Record:
    """What the figures depend on: commit, machine, versions."""
    git = ["git", "-C", str(environments.ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
    own = [":!bench/results", ":!docs/performance.*"]
    status = [*git, "status", "--porcelain", "-uno", "--", ".", *own]
    changed = subprocess.run(status, check=True, capture_output=True, text=True).stdout
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit.strip() + (" and changes" if changed else ""),
        "machine": f"{os.cpu_count()} cores, {models[0].partition(': ')[2] if models else platform.machine()}",
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "rounds": rounds,
        "count": count,
        "favour": FAVOUR,
        "load": os.getloadavg()[0],
        "versions": environments.versions(needs),
    }


@click.command()
@click.option("--only", default="*", help="Contestants: names or patterns, comma-separated.")
@click.option("--table", default=",".join(TABLES), help=f"Comma-separated: {', '.join(TABLES)}.")
@click.option("--rounds", default=3)
@click.option("--count", default=5000, help="Widgets in a queue.")
def main(only: str, table: str, rounds: int, count: int) -> None:
    """Run the benchmark."""
    environments.require_debian_packages()
    if unknown := set(table.split(",")) - set(TABLES):
        sys.exit(f"bench: no such table: {', '.join(unknown)}")
    patterns = only.split(",")
    contestants = read_contestants()
    complete = False
    for name in table.split(","):
        every = list(TABLES[name](contestants, count))
        wanted = [run for run in every if any(fnmatch.fnmatch(run[0]["contestant"], found) for found in patterns)]
        named = {run[0]["contestant"] for run in wanted}
        if not named:
            click.echo(f"{name}: none of its contestants is called {only}", err=True)
            continue
        needs = NEEDS.get(name, set()).union(*(one.needs for one in contestants if one.name in named))
        environments.prepare(needs)
        result = measure(name, wanted, rounds, describe(needs, rounds, count))
        if len(wanted) == len(every) and rounds >= LEAST_ROUNDS:
            report.RESULTS.mkdir(exist_ok=True)
            (report.RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            complete = True
        click.echo("\n".join(report.table(name, result, contestants)))
    if complete:
        environments.prepare(["plots"])
        report.write(contestants)


if __name__ == "__main__":
    main()
