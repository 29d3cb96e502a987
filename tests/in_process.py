"""A command run in the test's own process, which saves the start of one."""

import signal
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import Mock, patch

import click
import pytest
from click.testing import CliRunner

import claim_queues.cli
from claim_queues.sqlite import SqliteQueues


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


def open_as(monkeypatch: pytest.MonkeyPatch, kind: type[SqliteQueues] = SqliteQueues, **limits: Any) -> None:
    """Let commands open queue files as this kind of queues, with these limits."""
    kind = type("Other", (kind,), {"limits": replace(kind.limits, **limits)})
    monkeypatch.setattr(claim_queues.cli, "open_queues", kind.from_url)


def failing(**errors: Exception) -> type[SqliteQueues]:
    """A kind of queues of which the operations of these names raise these errors."""
    return type("Failing", (SqliteQueues,), {name: Mock(side_effect=error) for name, error in errors.items()})


def noted_posts() -> Any:
    """A mock of what queues are asked to post in the block; they post it all the same."""
    return patch.object(SqliteQueues, "post", autospec=True, side_effect=SqliteQueues.post)
