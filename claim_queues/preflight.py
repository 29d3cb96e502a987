"""Check a set-up before it goes live: each line is ok, warning or failure, and says what to do."""

from collections.abc import Iterator, Sequence

import click

from . import ConfigError, CredentialsError, Queues, QueuesError
from .command_line import distinct, one_line, require_queues

MOST_SKEW_S = 5.0
EXIT_FAILED = 1


class Report:
    """Prints what is found. exit_code: 0, 1 after a failure, 4 where credentials are missing or refused."""

    def __init__(self) -> None:
        self.exit_code = 0

    def ok(self, text: str) -> None:
        self._say("ok", text)

    def warning(self, text: str) -> None:
        """What works, but not as everybody would expect."""
        self._say("warning", text)

    def failure(self, problem: object) -> None:
        """What must be mended first. problem: an error, or words."""
        self.exit_code = max(self.exit_code, 4 if isinstance(problem, CredentialsError) else EXIT_FAILED)
        self._say("failure", problem)

    def _say(self, verdict: str, text: object) -> None:
        click.echo(f"{verdict:8}{one_line(text, 400)}")


def check_queues(
    report: Report, queues: Queues, names: Sequence[str], *, claim_ttl: int, grace: int, deadline: float, create: bool
) -> None:
    """Check the service and its queues for a consumer with these options; changes nothing but for `create`."""
    report.ok(f"{queues.limits.service} opened: {queues.address}")
    report.ok(f"credentials: {queues.credentials}")
    usable = [name for name in names if _check_queue(report, queues, name, create=create)]
    if usable:
        _check_clock(report, queues, usable[0])
    try:
        distinct(*names)
        queues.limits.check_claim(ttl=claim_ttl, grace=grace, limit=queues.limits.claim_limit)
        if queues.limits.grace is None:
            report.ok(f"claim TTL {claim_ttl} s is in range")
        else:
            report.ok(f"claim TTL {claim_ttl} s and grace {grace} s are in range")
    except ConfigError as error:
        report.failure(error)
    if deadline > claim_ttl - 10:
        report.failure(f"deadline {deadline:g} s: must be at most the claim TTL less 10 s; raise --claim-ttl")
    else:
        report.ok(f"deadline {deadline:g} s fits the claim TTL")
    for sentence in _cannot(queues):
        report.warning(f"{queues.limits.service} {sentence}")


def _check_queue(report: Report, queues: Queues, name: str, *, create: bool) -> bool:
    """Say whether the queue can be used."""
    try:
        require_queues(queues, [name], create=create)
        warnings = queues.inspect(name)
        report.ok(f"queue {name}: {queues.stats(name).total:,} messages")
    except QueuesError as error:
        report.failure(error)
        return False
    for warning in warnings:
        report.warning(warning)
    return True


def _check_clock(report: Report, queues: Queues, name: str) -> None:
    ahead_s = queues.clock_ahead(name)
    if ahead_s is None:
        return
    if abs(ahead_s) > MOST_SKEW_S:
        way = "ahead of" if ahead_s > 0 else "behind"
        report.warning(f"this machine's clock is {abs(ahead_s):,.0f} s {way} the service's: set it, by NTP for example")
    else:
        report.ok("this machine's clock and the service's agree")


def _cannot(queues: Queues) -> Iterator[str]:
    """What the service cannot do, and what that means for the scripts."""
    limits = queues.limits
    if not limits.can_browse:
        yield "cannot look without claiming: --wait, peek and dead-letters are refused"
    if not limits.counts_receives:
        yield "does not count receives: consumers count in --receive-counts, each machine apart"
    if not limits.releases_one_message:
        yield "releases whole claims only: a message in backoff stays claimed until the rest of its claim is settled"
    if not limits.fenced_delete:
        yield "does not notice a delete that comes after its claim: the consumer's own clock decides"
    if not limits.atomic_settle:
        yield "posts and deletes one after the other: a crash in between repeats a response"
    if limits.grace is None:
        yield "has no grace: a message can expire while it is claimed"
    if limits.message_ttl is None:
        yield "has one message TTL for the whole queue: --ttl and --response-ttl are refused"
