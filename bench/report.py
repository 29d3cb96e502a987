"""The tables, in Markdown, and their places in docs/performance.md."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from .runs import Record
from .stage import ROOT, Contestant

PAGE = ROOT / "docs/performance.md"
QUEUES = {
    "ours": "WAL, synchronous=FULL; posts and claims of 10",
    "huey-synced": "SqliteStorage(fsync=True): WAL, synchronous=FULL; one by one, a claim deletes",
    "litequeue": "LiteQueue: WAL, synchronous=NORMAL, may be lost in a power cut; one by one",
    "persist-queue": "SQLiteAckQueue: WAL, synchronous=FULL; one by one",
}

Column = tuple[str, Callable[[list[Record]], str]]


def table(name: str, records: Sequence[Record], contestants: Mapping[str, Contestant]) -> list[str]:
    """Its lines: a row for each contestant, the best first."""
    rows: dict[str, list[Record]] = {}
    first = "ours-sqs-64" if name in ("near", "far") else "ours"
    ours = {record["round"]: record for record in records if record["name"] == first}
    for record in records:
        if "error" not in record:
            rate = next((key for key in ("per_s", "taken_per_s", "p50_ms") if key in record), "")
            own = ours.get(record["round"], {}).get(rate)
            of_ours = {"of_ours": record[rate] / own} if own else {}
            rows.setdefault(record["name"], []).append(record | of_ours)
    columns = COLUMNS.get(name, DRAIN)
    how = QUEUES if name == "queues" else {one.name: one.how for one in contestants.values()}
    head = ["contestant", *(title for title, _ in columns), "how"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row, found in sorted(rows.items(), key=lambda item: _place(item[1])):
        lines.append(f"| {row} | {' | '.join(cell(found) for _, cell in columns)} | {how[row]} |")
    failed = [f"Failed: {each['name']} (round {each['round']}): {each['error']}" for each in records if "error" in each]
    return [*lines, "", *failed] if failed else lines


def write(name: str, lines: Iterable[str]) -> None:
    """Put the table into the page, between its marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    text = PAGE.read_text()
    before, after = text.partition(begin)[0], text.partition(end)[2]
    PAGE.write_text("\n".join([before + begin, *lines, "", end + after]))


def _place(records: list[Record]) -> float:
    keys = {"per_s": -1, "taken_per_s": -1, "p50_ms": 1}
    key = next(key for key in keys if key in records[0])
    return keys[key] * statistics.median(record[key] for record in records)


def _number(title: str, key: str, digits: int = 0) -> Column:
    """The median, with the lowest and the highest where they differ."""

    def cell(records: list[Record]) -> str:
        values = sorted(record[key] for record in records if key in record)
        if not values:
            return ""
        middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), values[0], values[-1]))
        return f"{middle} ({low} to {high})" if low != high else middle

    return title, cell


OF_OURS = _number("of ours", "of_ours", 2)
ONCE: Column = ("exactly once", lambda records: "yes" if all(record["once"] for record in records) else "NO")
DRAIN = [
    _number("widgets/s", "per_s"),
    OF_OURS,
    _number("consumer CPU µs/widget", "cpu_us"),
    _number("service CPU µs/widget", "service_cpu_us"),
    _number("memory MiB", "rss_mib"),
    _number("first widget s", "first_s", 2),
    ONCE,
]
AWAY = [
    _number("widgets/s", "per_s"),
    OF_OURS,
    _number("requests/widget", "requests", 2),
    _number("CPU µs/widget", "cpu_us"),
    _number("memory MiB", "rss_mib"),
    ONCE,
]
COLUMNS = {
    "near": AWAY,
    "far": AWAY,
    "scale": [
        _number("widgets/s", "middle_per_s"),
        _number("least share of the mean", "least_share", 2),
        _number("requests/widget", "requests", 2),
        _number("CPU µs/widget", "cpu_us"),
        ONCE,
    ],
    "light": [
        _number("p50 ms", "p50_ms"),
        _number("p99 ms", "p99_ms"),
        _number("requests/s", "requests_per_s", 1),
        ONCE,
    ],
    "latency": [
        _number("p50 ms", "p50_ms", 2),
        OF_OURS,
        _number("p99 ms", "p99_ms", 2),
        _number("consumer CPU µs/widget", "cpu_us"),
        _number("idle %", "idle_percent", 1),
        ONCE,
    ],
    "queues": [
        _number("posts/s", "posted_per_s"),
        _number("post CPU µs", "post_cpu_us"),
        _number("claims with delete/s", "taken_per_s"),
        OF_OURS,
        _number("claim with delete CPU µs", "take_cpu_us"),
        ONCE,
    ],
}
