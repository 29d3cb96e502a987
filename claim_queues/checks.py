"""What a check before going live prints: each line is ok, warning or failure, and says what to do."""

import resource
from collections.abc import Sequence
from pathlib import Path

from . import ConfigError, CredentialsError, Queues, QueuesError
from .cli import one_line, print_lines, require_queues

OWN_DESCRIPTORS = 64
"""What a consumer needs however many slots it has: files, connections to the queue service, clients of the metrics."""


class Report:
    """Prints what is found: `ok`, `warning` (it works, but not as everybody would expect), `failure`.

    exit_code: 0, 1 after a failure, 4 where credentials are missing or refused.
    """

    def __init__(self) -> None:
        self.exit_code = 0

    def ok(self, text: str) -> None:
        self._say("ok", text)

    def warning(self, text: str) -> None:
        self._say("warning", text)

    def failure(self, problem: object) -> None:
        self.exit_code = 4 if getattr(problem, "exit_code", 1) == CredentialsError.exit_code else self.exit_code or 1
        self._say("failure", problem)

    def _say(self, verdict: str, text: object) -> None:
        print_lines([f"{verdict:8}{one_line(text, 400)}"])


def check_queues(
    report: Report, queues: Queues, names: Sequence[str], *, claim_ttl: int, deadline: float, create: bool
) -> None:
    """Check the service and its queues for a consumer with these options; changes nothing but for `create`."""
    report.ok(f"{queues.limits.service} opened: {queues.address}")
    report.ok(f"credentials: {queues.credentials}")
    for name in names:
        try:
            if queues.limits.makes_queues and not create and not queues.exists(name):
                report.ok(f"queue {name}: is made at its first use")
                continue
            require_queues(queues, [name], create=create)
            report.ok(f"queue {name}: {queues.stats(name).total:,} messages")
            for surprise in queues.inspect(name):
                report.warning(surprise)
        except QueuesError as error:
            report.failure(error)
    if len({name.casefold() for name in names}) < len(names):
        report.failure(ConfigError(f"the queues must differ: {', '.join(names)}"))
    if deadline > claim_ttl - 10:
        report.failure(f"deadline {deadline:g} s: must be at most the claim TTL less 10 s; raise --claim-ttl")
    else:
        report.ok(f"deadline {deadline:g} s fits the claim TTL")
    limits = queues.limits
    for is_usual, sentence in (
        (limits.can_browse, "cannot look without claiming: --wait, peek, dead-letters and --dry-run are refused"),
        (limits.release_delay, "cannot delay a release: a message in backoff stays claimed until that ends"),
        (limits.has_grace, "has no grace: a message can expire while it is claimed"),
        (limits.has_message_ttl, "has one message TTL for the whole queue: --ttl and --response-ttl are refused"),
        (not limits.approximate_s, f"counts roughly: a drain ends after {limits.approximate_s:g} s without messages"),
    ):
        if not is_usual:
            report.warning(f"{limits.service} {sentence}")


def check_state(report: Report, path: Path) -> None:
    """Warn where the file does not outlive this machine or container; Linux says so."""
    mounts = Path("/proc/mounts")
    kinds = dict(line.split()[1:3] for line in mounts.read_text().splitlines()) if mounts.exists() else {}
    kind = next((kinds[str(found)] for found in [path.resolve(), *path.resolve().parents] if str(found) in kinds), "")
    if kind in ("tmpfs", "ramfs", "overlay"):
        report.warning(
            f"{path}: lies on {kind}: counts are lost with this machine or container; use a volume or a disk"
        )


def check_descriptors(slots: int) -> None:
    """Raise ConfigError where this process may not open so many connections at once."""
    most, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], slots + OWN_DESCRIPTORS
    if most != resource.RLIM_INFINITY and most < needed:
        raise ConfigError(f"--slots {slots} needs {needed} descriptors; this process may open {most}: see ulimit -n")
