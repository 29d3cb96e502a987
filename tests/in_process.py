"""A command run in the test's own process, which saves the start of one."""

import signal
from dataclasses import dataclass

import click
from click.testing import CliRunner


@dataclass(frozen=True)
class Ended:
    """What a shell sees of a command."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def run_command(command: click.Command, *options: object, stdin: bytes = b"") -> Ended:
    """Run the command with these options to its exit; what is no SystemExit is raised. Signals stay as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        result = CliRunner().invoke(command, list(map(str, options)), input=stdin, catch_exceptions=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Ended(result.exit_code, result.stdout, result.stderr)
