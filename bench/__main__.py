"""Measure the project against what a user would pick instead: see docs/performance.md. Run by `make bench`.

Each table runs all its contestants round by round, every other round backwards. A whole table of three rounds or more
goes into docs/performance.md; any other is printed alone.
"""

import fnmatch
import os
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from . import report, runs
from .runs import Record
from .stage import BENCH, DIRECTORY, ROOT, Contestant, prepare

LEAST_ROUNDS = 3
LOOPS = ("loop-http-client", "loop-urllib3", "wrk")
SERVICES = ("ours-sqs", "ours-zaqar", "ours-rackspace", "sqs-consumer")
AWAY = (
    *("ours-64", "ours-sqs-16", "ours-sqs-64", "ours-sqs-128", "ours-sqs-64-two", "ours-zaqar-64", "ours-rackspace-64"),
    *("sqs-consumer-70", "sqs-consumer-160", "loop-boto3-64", "taskiq-64", "dramatiq-64"),
)
LIGHT = tuple(f"ours-{service}-at-{rate}" for service in ("zaqar", "rackspace") for rate in (50, 10, 1))
SCALE = tuple(f"ours-sqs-x{processes}" for processes in (1, 2, 4, 8))
PEERS = ("taskiq", "celery", "dramatiq", "rq", "huey")
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Record]]] = {
    "pinned": (("ours", "ours-batch", *SERVICES, *PEERS, *LOOPS), runs.drain),
    "own-maker": (("ours", "ours-batch", "taskiq", *LOOPS), partial(runs.drain, maker="own")),
    "two": (("ours", "taskiq"), partial(runs.drain, processes=2)),
    "near": (AWAY, partial(runs.drain, away_ms=(10, 20))),
    "far": (AWAY, partial(runs.drain, away_ms=(30, 100))),
    "latency": (("ours", "loop-embedded", "taskiq"), runs.latency),
    "light": (LIGHT, partial(runs.latency, seconds=20, away_ms=(0, 0))),
    "scale": (SCALE, partial(runs.drain, away_ms=(10, 100))),
    "queues": (("ours", "huey-synced", "litequeue", "persist-queue"), runs.queue_operations),
}
"""Whom each compares, and how one of them is measured."""


def read_contestants() -> dict[str, Contestant]:
    """By name."""
    found = tomllib.loads((BENCH / "contestants.toml").read_text())
    services = found["services"] | {"": {}}
    contestants = {}
    for name, one in found["contestants"].items():
        all_of_it = found["contestants"].get(one.pop("like", ""), {}) | one
        service = services[all_of_it.get("service", "")]
        contestants[name] = Contestant(name=name, **all_of_it | {"service": service})
    return contestants


def measure(table: str, names: Sequence[str], rounds: int, count: int) -> list[Record]:
    """Measure each so many times. A run that fails is a record with an `error`."""
    contestants, records = read_contestants(), []
    for number in range(1, rounds + 1):
        for name in names if number % 2 else reversed(names):
            try:
                record = TABLES[table][1](name if table == "queues" else contestants[name], count)
            except Exception as error:
                log = DIRECTORY / "log"
                said = log.read_text(errors="replace")[-600:] if log.exists() else ""
                record = {"error": f"{type(error).__name__}: {error}", "log": said}
            records.append({"name": name, "round": number} | record)
            click.echo(f"{table} {number} {name}: {record}", err=True)
    return records


def origin(rounds: int, count: int) -> str:
    """When, on what and how busily it is measured."""
    git = ["git", "-C", str(ROOT)]
    commit, changed = (
        subprocess.run([*git, *words], check=False, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno", "--", ".", ":!docs"))
    )
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return (
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())},"
        f" commit {commit or 'unknown'}{' and changes' if changed else ''};"
        f" {os.cpu_count()} cores, {cpus[0].partition(': ')[2] if cpus else platform.machine()};"
        f" Linux {platform.release()}, Python {platform.python_version()};"
        f" {rounds} rounds of COUNT={count}; load average {os.getloadavg()[0]:.1f} at the start."
    )


@click.command()
@click.option("--only", default="*", help="Contestants: names or patterns, comma-separated.")
@click.option("--table", default=",".join(TABLES), help=f"Comma-separated: {', '.join(TABLES)}.")
@click.option("--rounds", default=3)
@click.option("--count", default=5000, help="Widgets in a queue.")
def main(only: str, table: str, rounds: int, count: int) -> None:
    """Run the benchmark."""
    if unknown := set(table.split(",")) - set(TABLES):
        sys.exit(f"bench: no such table: {', '.join(unknown)}")
    contestants = read_contestants()
    has_failed = False
    for name in table.split(","):
        every = TABLES[name][0]
        wanted = [one for one in every if any(fnmatch.fnmatch(one, pattern) for pattern in only.split(","))]
        if name == "queues":
            needs = {"peers"} if set(wanted) - {"ours"} else set()
        else:
            needs = {need for one in wanted for need in contestants[one].needs}
        prepare(needs)
        begun = origin(rounds, count)
        records = measure(name, wanted, rounds, count)
        has_failed |= any("error" in record or not record["once"] for record in records)
        lines = [*report.table(name, records, contestants), "", begun]
        click.echo("\n".join(lines))
        if len(wanted) == len(every) and rounds >= LEAST_ROUNDS:
            report.write(name, lines)
    sys.exit(int(has_failed))


if __name__ == "__main__":
    main()
