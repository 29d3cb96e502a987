"""Run reliability campaigns: `make campaigns ONLY=kills,powercuts SCALE=0.1`; at full size, report them too."""

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from . import bitflips, calls, fuzz, hostile, kills, network, simulation, soak, stops, storage
from .campaign import Campaign, Result

CAMPAIGNS: list[Campaign] = [
    campaign
    for module in (simulation, kills, stops, calls, storage, bitflips, soak, network, fuzz, hostile)
    for campaign in module.CAMPAIGNS
]
ROOT = Path(__file__).resolve().parent.parent.parent
PRODUCT = ("claim_queues", "*.py", ":!tests", ":!bench", ":!demo")
"""What campaigns test: a result names the last commit that changed it."""
RESULTS = Path(__file__).parent / "results"
REPORT = ROOT / "docs" / "reliability.md"
INTRODUCTION = """# Reliability

Written by `make campaigns` from its last runs at full size; a part of them, smaller: `make campaigns ONLY=kills
SCALE=0.1`. A campaign runs the scripts, most as real processes, provokes faults many times, and then compares all that
was submitted with all that became of it; the rules are in `tests/reliability/checker.py`. Where n trials broke nothing,
fewer than 3 in n break something, with 95 % confidence. The commit is the last one that changed the scripts.

"""
LIMITS = """
## What cannot be promised

- A request is delivered at least once, not exactly once. What happens once is the effect: one widget for each id.
- Amazon SQS and Zaqar can give one message to two consumers at once, and SQS cannot refuse a late delete. The consumer
  deletes only what has its outcome, and the maker makes each widget once: that is what protects there.
- Receives are counted by `--receive-counts` where the service does not: consumers of several machines that count apart
  deliver a message up to `--max-receives` times each. One that lost its claim unseen (it stood still, or its
  machine's clock jumped ahead by a claim TTL) may POST once more what another has received since.
- A response can come twice where it is not in the same file as the request. `response_id` tells that it is the same.
- After a power cut, the last claims, renewals and releases of the embedded queue may be as if they had never been: a
  message is then delivered again, and its receive not counted.
- Bodies in the embedded queue's file have checksums, and so has its log (`-wal`); the rest of the file has none. Damage
  there is mostly refused or seen, but it can make single messages vanish. Where the log is damaged, SQLite takes what
  follows for never written: the latest messages are gone, and nothing tells it from a power cut.
- A process that is stopped (SIGSTOP) within a transaction keeps the embedded queue locked for all until it goes on or
  is killed. One that is stopped between the look at its claim and the POST sends that POST late.
- A disk that says it has written what it has not, and a queue file on a network file system, can lose anything.
- A POST in chunks that is cut before its last one is answered as if it were whole if its JSON is: granian ends both
  alike. The consumer says each body's length, and the maker refuses a body that is shorter.
- The live services of Rackspace and Amazon were not used: the tests run against Zaqar itself, and against a local SQS.
"""


@click.command()
@click.option("--only", default="", help="Names of campaigns, separated by commas; all if not given.")
@click.option("--scale", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="1: full size.")
def main(only: str, scale: float) -> None:
    """Run campaigns and print their figures; exit 1 where a promise was broken. Names:"""
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := set(names) - {campaign.name for campaign in CAMPAIGNS}:
        raise click.UsageError(f"no campaign is called {', '.join(sorted(unknown))}")
    is_broken = False
    for campaign in CAMPAIGNS:
        if names and campaign.name not in names:
            continue
        started = time.monotonic()
        result = campaign.run(scale)
        seconds = round(time.monotonic() - started)
        click.echo(f"{campaign.name}: {_figures(result.figures)} ({seconds} s)")
        for violation in result.violations:
            click.echo(f"  BROKEN: {violation}")
        is_broken = is_broken or bool(result.violations)
        if scale == 1:
            _keep(campaign, result)
    sys.exit(is_broken)


def _keep(campaign: Campaign, result: Result) -> None:
    last = ["git", "log", "-1", "--format=%h", "--", *PRODUCT]
    commit = subprocess.run(last, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "figures": result.figures,
        "violations": result.violations,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{campaign.name}.json").write_text(json.dumps(found, indent=2) + "\n")
    REPORT.write_text(report(RESULTS))


def report(results: Path) -> str:
    """What docs/reliability.md says of the results in that directory."""
    rows = ["| campaign | what it shows | figures | broken | date | commit |", "| --- | --- | --- | --- | --- | --- |"]
    for campaign in CAMPAIGNS:
        if (path := results / f"{campaign.name}.json").exists():
            found = json.loads(path.read_text())
            broken = "; ".join(found["violations"]) or "nothing"
            cells = (campaign.name, campaign.shows, _figures(found["figures"]), broken, found["date"], found["commit"])
            rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return INTRODUCTION + "\n".join(rows) + "\n" + LIMITS


def _figures(figures: dict[str, Any]) -> str:
    """In one line, without the simulation's counts of each mark."""
    shown = {key: value for key, value in figures.items() if not key.startswith("mark: ")}
    return ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in shown.items())


main.help = f"{main.help} {', '.join(campaign.name for campaign in CAMPAIGNS)}."
if __name__ == "__main__":
    main()
