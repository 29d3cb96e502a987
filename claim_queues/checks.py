"""What a check before going live prints: each line is ok, warning or failure, and says what to do."""

import resource
from collections.abc import Iterable
from pathlib import Path

from . import ConfigError, CredentialsError, Queues, QueuesError
from .cli import LACKS, one_line, print_lines, require_queues

OWN_DESCRIPTORS = 64
"""What a consumer needs however many slots it has: files, connections to the queue service, clients of the metrics."""


class Report:
    """Prints what is found: `ok`, `warning` (it works, but not as everybody would expect), `failure`.

    exit_code: 0, 1 after a failure, 4 where credentials are missing or refused.
    """

    exit_code = 0

    def ok(self, text: str) -> None:
        print_lines([f"ok      {one_line(text, 400)}"])

    def warning(self, text: str) -> None:
        print_lines([f"warning {one_line(text, 400)}"])

    def failure(self, problem: object) -> None:
        self.exit_code = 4 if getattr(problem, "exit_code", 1) == CredentialsError.exit_code else self.exit_code or 1
        print_lines([f"failure {one_line(problem, 400)}"])


def check_queues(report: Report, queues: Queues, names: Iterable[str], *, create: bool) -> None:
    """Check the service and its queues, the request queue first; changes nothing unless `create` is true."""
    limits = queues.limits
    report.ok(f"{limits.service} opened: {queues.address}")
    report.ok(f"credentials: {queues.credentials}")
    for place, name in enumerate(names):
        try:
            if limits.makes_queues and not create and not queues.exists(name):
                report.ok(f"queue {name}: is made at its first use")
                continue
            require_queues(queues, [name], create=create)
            report.ok(f"queue {name}: {queues.stats(name).total:,} messages")
            for surprise in queues.inspect(name, is_posted_to=place > 0):
                report.warning(surprise)
        except QueuesError as error:
            report.failure(error)
    for limit, (sentence, *_) in LACKS.items():
        if not getattr(limits, limit):
            report.warning(f"{limits.service} {sentence}")


def check_state(report: Report, path: Path) -> None:
    """Warn where the file would be lost with this machine or container. Works on Linux only."""
    mounts = Path("/proc/mounts")
    kinds = dict(line.split()[1:3] for line in mounts.read_text().splitlines()) if mounts.exists() else {}
    kind = kinds.get(max((point for point in kinds if path.resolve().is_relative_to(point)), default=""))
    if kind in ("tmpfs", "ramfs", "overlay"):
        report.warning(f"{path}: lies on {kind}: it is lost with this machine or container; use a volume or a disk")


def check_descriptors(slots: int) -> None:
    """Raise ConfigError where this process may not open so many connections at once."""
    most, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], slots + OWN_DESCRIPTORS
    if most != resource.RLIM_INFINITY and most < needed:
        raise ConfigError(f"--slots {slots} needs {needed} descriptors; this process may open {most}: see ulimit -n")
