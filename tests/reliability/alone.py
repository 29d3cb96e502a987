"""Run the campaigns of one module by themselves: `python -m reliability.fuzz --scale 0.01`."""

import sys
import time
from collections.abc import Sequence

import click

from .campaign import Campaign


def main(campaigns: Sequence[Campaign]) -> None:
    """Run them and print figures and violations; exit 1 where a promise broke."""

    @click.command()
    @click.option("--scale", type=float, default=1.0, show_default=True)
    @click.option("--only", default="", help="Name of one campaign.")
    def cli(scale: float, only: str) -> None:
        broken = 0
        for campaign in campaigns:
            if only in ("", campaign.name):
                started = time.monotonic()
                result = campaign.run(scale)
                broken += len(result.violations)
                click.echo(f"{campaign.name}: {result.figures} in {time.monotonic() - started:.0f} s")
                for violation in result.violations:
                    click.echo(f"  BROKEN: {violation}")
        sys.exit(1 if broken else 0)

    cli()
