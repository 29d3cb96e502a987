"""Run reliability campaigns: `make campaigns ONLY=kills,powercuts SCALE=0.1`; at full size, report them too."""

import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

import click
import pytest
from support import HERE

from . import endurance, kills, makers, outages, storage  # noqa: F401 each adds its campaigns
from .frame import CAMPAIGNS, Campaign, Result

REPORT = HERE / "docs" / "reliability.md"
PRODUCT = ("*.py", "claim_queues", "widgets", ":!tests", ":!bench", ":!demo")
"""What campaigns test: a row names the last commit that changed it."""


@click.command()
@click.option("--only", default="", help="Names of campaigns, separated by commas; all if not given.")
@click.option(
    "--scale", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="1: full size."
)
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
        try:
            result = campaign.run(scale)
        except (Exception, pytest.skip.Exception) as error:
            result = Result({}, [f"{type(error).__name__}: {error}"[-1000:]])
        figures = shown(result.figures | {"minutes": round((time.monotonic() - started) / 60, 1)})
        click.echo(f"{campaign.name}: {figures}")
        for line in result.broken:
            click.echo(f"  BROKEN: {line}")
        is_broken = is_broken or bool(result.broken)
        if scale == 1:
            last = ["git", "log", "-1", "--format=%h", "--", *PRODUCT]
            commit = subprocess.run(last, cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()
            cells = [figures, "; ".join(result.broken) or "nothing", datetime.now(UTC).date().isoformat(), commit]
            REPORT.write_text(with_row(REPORT.read_text(), campaign, cells))
    sys.exit(is_broken)


def with_row(report: str, campaign: Campaign, cells: list[str]) -> str:
    """The report with this row in its table: in place of the campaign's row, or at the table's end."""
    plain = (re.sub(r"\s*[\n|]\s*", " ", cell) for cell in (campaign.name, campaign.shows, *cells))
    row = f"| {' | '.join(plain)} |\n"
    lines = report.splitlines(keepends=True)
    table = [number for number, line in enumerate(lines) if line.startswith("|")]
    old = [number for number in table if lines[number].startswith(f"| {campaign.name} |")]
    at = old or [table[-1] + 1]
    lines[at[0] : at[0] + len(old)] = [row]
    return "".join(lines)


def shown(figures: dict[str, Any]) -> str:
    """In one line, without numbers that are zero where they mean nothing."""
    kept = {key: value for key, value in figures.items() if value or key in ("dead letters", "queued")}
    return ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in kept.items())


main.help = f"{main.help} {', '.join(campaign.name for campaign in CAMPAIGNS)}."
if __name__ == "__main__":
    main()
