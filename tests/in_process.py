"""A script's entry point run in the test's own process, which saves the start of one."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn
from unittest.mock import patch

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


def call(main: Callable[[], NoReturn], *options: object, stdin: bytes = b"") -> Ended:
    """Run the entry point with these options to its exit."""
    usual = signal.getsignal(signal.SIGINT)
    with CliRunner().isolation(stdin) as (out, err, _), patch.object(sys, "argv", ["script", *map(str, options)]):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        finally:
            signal.signal(signal.SIGINT, usual)  # a consumer that starts lets it end the process
        sys.stdout.flush()
        sys.stderr.flush()
        written = out.getvalue().decode(), err.getvalue().decode()
    assert isinstance(code, int)
    return Ended(code, *written)
