"""Write docs/performance.md, and its plot, from bench/results/*.json."""

import json
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import environments
from .runs import Contestant, Record

DOCS = environments.ROOT / "docs"
RESULTS = environments.BENCH / "results"

INTRODUCTION = """\
# Performance

Written by `make bench`; the contestants, each with its settings, are in `bench/contestants.toml`. `make bench
TABLE=pinned ONLY='ours*,taskiq'` measures a part again and prints it alone, as it does whole tables of fewer than 3
rounds (`ROUNDS=1 COUNT=1000`). It needs Linux with two cores and the Debian packages
gcc, libc6-dev, redis-server, wrk, nodejs and npm.

The work is the same for all: widget requests wait in a queue, each is POSTed as JSON to the same `widget_maker.py`
(one process, every commit synced), and each widget must be made exactly once, which is checked afterwards in the
maker's own rows and counts. A rate is taken from those rows, from the first widget to the last. Just before each run
wrk, with 8 connections, is given a second against the same maker on the same cores: *of wrk* is the quotient of the
two. A figure is the median of the rounds, with the lowest and the highest; rounds run the contestants forwards and
backwards in turn. CPU is user and system time between a tenth of the queue and its end.
Compare within a table: not all were measured on one machine, and the line below each says what that took.

![Rates as shares of wrk's, and claims with a backlog](performance.svg)
"""

TITLES = {
    "pinned": (
        "One process on one core",
        "The maker has one core; the contestant and its queue service share the other.",
    ),
    "unpinned": ("Two processes", "Two processes of the contestant, its service and the maker share both cores."),
    "answering": (
        "One and two processes, with the maker out of the way",
        (
            "An endpoint that only answers takes the maker's place; nothing is pinned from outside. In the first and"
            " the last tenth one of two processes may still start, or have ended. Idle: how many of the machine's cores"
            " had nothing to do, or waited for the disk. Apart: what two processes make of this machine that share no"
            " queue."
        ),
    ),
    "latency": (
        "Latency at 50 requests a second",
        (
            "Pinned as above. From just before a request's post until the maker's answer leaves. Idle: what the"
            " consumer takes of a core with nothing to do. Zaqar and Cloud Queues have no long poll: what is posted"
            " after a rest waits for up to --poll-interval (2 s), which is their p99 here. On the embedded queue a"
            " request passes four wake-ups of threads and two syncs: where more than one nap in 600 is late (below the"
            " table), the machine alone fills the worst hundredth."
        ),
    ),
    "requests": (
        "Requests to the queue service",
        "Redis: commands, as it counts them. SQS and Zaqar: HTTP requests, counted by a proxy.",
    ),
    "queues": (
        "The embedded queue alone",
        (
            "Posts, then claims with deletes, through the public API of each. Power cut: whether an acknowledged post"
            " survives one. The peers post and claim one message a call, and know nothing else; huey's claim deletes."
            " Ours delete a batch and claim the next in one call, which the consumer, with a thread for each, does not."
        ),
    ),
    "backlog": ("Claims with a backlog", "500 claims, each followed by its delete and by as many posts."),
    "maker": (
        "The maker under wrk",
        (
            "widget_maker.py, and the same application on waitress; the maker has one core, wrk the other. Half"
            " load: the connections pause at random so that half the top rate is left."
        ),
    ),
}
DURABILITY = {
    "ours": "survives (WAL, synced outside the lock)",
    "ours-10": "survives (WAL, synced outside the lock)",
    "ours-10-ttl": "survives (WAL, synced outside the lock)",
    "huey-synced": "survives (WAL, synchronous=FULL)",
    "huey-unsynced": "may be lost (WAL, synchronous=OFF)",
    "litequeue": "may be lost (WAL, synchronous=NORMAL)",
    "persist-queue": "survives (WAL, synchronous=FULL)",
}
HOW = {
    "ours": "claims of 10, posts one by one",
    "ours-10": "claims of 10, posts of 10",
    "ours-10-ttl": "the same, each expires after an hour",
    "huey-synced": "SqliteStorage(fsync=True)",
    "huey-unsynced": "SqliteStorage(fsync=False)",
    "litequeue": "LiteQueue",
    "persist-queue": "SQLiteAckQueue",
    "own": "granian",
    "waitress": "8 threads",
}

Column = tuple[str, Callable[[list[Record]], str]]


def write(contestants: list[Contestant]) -> None:
    """docs/performance.md and docs/performance.svg."""
    parts = [INTRODUCTION]
    for name, (title, text) in TITLES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            lines = table(name, result, contestants)
            parts += [f"## {title}\n", f"{text}\n", *lines, "", _origin(result), ""]
    DOCS.mkdir(exist_ok=True)
    (DOCS / "performance.md").write_text("\n".join(parts))
    python = environments.VENVS / "bench-plots/bin/python"
    subprocess.run([python, environments.BENCH / "plots.py", RESULTS, DOCS / "performance.svg"], check=True)


def table(name: str, result: Record, contestants: list[Contestant]) -> list[str]:
    """The lines of a table in Markdown."""
    how = HOW | {one.name: one.how for one in contestants}
    delivery = {one.name: one.delivery for one in contestants}
    keys = ("contestant", "processes", "waiting", "connections")
    rows: dict[tuple[Any, ...], list[Record]] = {}
    failed = []
    for record in result["records"]:
        if "error" in record:
            failed.append(f"{record['contestant']} (round {record['round']}): {record['error']}")
        else:
            rows.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    shown = [number for number, key in enumerate(keys) if any(row[number] is not None for row in rows)]
    columns = COLUMNS[name]
    head = [keys[number] for number in shown] + [title for title, _ in columns]
    head += ["how"] + (["delivery"] if name in ("pinned", "unpinned") else [])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row, records in sorted(rows.items(), key=lambda item: _place(name, item)):
        cells = [f"{row[number]:,}" if isinstance(row[number], int) else str(row[number]) for number in shown]
        cells += [cell(records) for _, cell in columns]
        cells += [how.get(row[0], "")] + ([delivery.get(row[0], "")] if name in ("pinned", "unpinned") else [])
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *(f"Failed: {one}" for one in failed)] if failed else lines


def _place(name: str, item: tuple[tuple[Any, ...], list[Record]]) -> Any:
    """Where a row stands: fastest first where that can be said."""
    _, records = item
    if name in ("pinned", "unpinned"):
        return -statistics.median(record["of_wrk"] for record in records)
    return statistics.median(record["p50_ms"] for record in records) if name == "latency" else 0


def _figure(values: Iterable[float], digits: int) -> str:
    values = sorted(values)
    if not values:  # measured before this was
        return ""
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), values[0], values[-1]))
    return f"{middle} ({low} to {high})" if low != high else middle


def _number(title: str, key: str, digits: int = 0) -> Column:
    return title, lambda records: _figure((record[key] for record in records if key in record), digits)


def _sum(title: str, key: str) -> Column:
    return title, lambda records: f"{sum(record[key] for record in records):,}"


def _exactly_once(records: list[Record]) -> str:
    return "yes" if all(record["exactly_once"] for record in records) else "NO"


def _errors(records: list[Record]) -> str:
    return "; ".join(sorted({error for record in records for error in record["errors"]})) or "none"


DRAIN: list[Column] = [
    _number("widgets/s", "per_s"),
    _number("of wrk", "of_wrk", 2),
    _number("consumer CPU µs/widget", "cpu_us"),
    _number("service CPU µs/widget", "service_cpu_us"),
    _number("memory MiB", "rss_mib"),
    _number("first widget s", "first_s", 2),
    ("exactly once", _exactly_once),
]
COLUMNS: dict[str, list[Column]] = {
    "pinned": DRAIN,
    "unpinned": DRAIN,
    "answering": [
        DRAIN[0],
        _number("without first and last tenth", "steady_per_s"),
        DRAIN[2],
        _number("endpoint CPU µs/widget", "maker_cpu_us"),
        _number("idle cores", "idle_cores", 2),
        DRAIN[6],
    ],
    "latency": [
        _number("p50 ms", "p50_ms", 2),
        _number("p99 ms", "p99_ms", 2),
        _number("consumer CPU µs/widget", "cpu_us"),
        _number("idle %", "idle_percent", 1),
        ("exactly once", _exactly_once),
    ],
    "requests": [_number("requests/widget", "requests", 2)],
    "queues": [
        _number("posts/s", "posted_per_s"),
        _number("post CPU µs", "post_cpu_us"),
        _number("claims with delete/s", "taken_per_s"),
        _number("claim with delete CPU µs", "take_cpu_us"),
        _sum("delivered twice", "twice"),
        _sum("missing", "missing"),
        ("errors", _errors),
        ("power cut", lambda records: DURABILITY[records[0]["contestant"]]),
    ],
    "backlog": [_number("p50 ms", "p50_ms", 2), _number("p99 ms", "p99_ms", 2)],
    "maker": [
        _number("POSTs/s", "per_s"),
        _number("p99 ms at the top", "top_p99_ms", 1),
        _number("POSTs/s at half load", "half_per_s"),
        _number("p50 ms at half load", "p50_ms", 1),
        _number("p99 ms at half load", "p99_ms", 1),
        _sum("errors", "errors"),
    ],
}


MACHINE = (
    ("spin_ms", 1, "a loop of 100,000 additions took {} ms of CPU"),
    ("wake_us", 0, "a byte to the other core and back {} µs"),
    ("sync_ms", 2, "to sync a page after a rest {} ms"),
    ("late_percent", 1, "{} % of naps of 1 ms lasted 3 ms or longer"),
)


def _origin(result: Record) -> str:
    """When, on what and how busily it was measured."""
    run, records = result["run"], result["records"]
    favour = f"favoured by nice {run['favour']}; " if run["favour"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    size = f" of COUNT={run['count']}" if "count" in run else ""
    return (
        f"{run['at']}, commit {run['commit']}; {run['machine']}; {run['system']}; {run['rounds']} rounds"
        f"{size};"
        f" load average {run['load']:.1f} at the start; {favour}before the"
        f" runs {'; '.join(_machine(records))}.{f' {versions}.' if versions else ''}"
    )


def _machine(records: list[Record]) -> Iterator[str]:
    """What the machine took, whatever was measured on it."""
    for name, digits, text in MACHINE:
        if found := [record[name] for record in records if name in record]:
            yield text.format(_figure(found, digits))
