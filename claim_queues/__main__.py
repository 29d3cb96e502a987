"""The operator's tool: look at the queues, bring dead letters back, check a set-up before it goes live."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import click

from . import Claim, ConfigError, Message, Queues, QueuesError, Settlement, open_queues
from .command_line import (
    SETTINGS,
    Number,
    WholeNumber,
    __version__,
    distinct,
    one_line,
    option,
    queue_options,
    require_queues,
    run,
)

KINDS = ("request", "response", "dead-letter")
REDRIVE_CLAIM_TTL_S = 60
EXIT_FAILED = 1

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
limit_option = click.option("--limit", type=WholeNumber(1, 1_000_000_000), metavar="N", help="At most so many.")
claim_ttl_option = option(
    "--claim-ttl", type=WholeNumber(60, 43_200, "seconds"), default=300, help="The consumer's --claim-ttl."
)


@click.group(context_settings=SETTINGS)
@click.version_option(__version__)
def cli() -> None:
    """Look at the queues and mend them. `COMMAND --help` tells more.

    Exit codes: 0 done, 1 failed, 2 usage, 4 credentials, 5 a local file cannot be used.
    """


@cli.command()
@queue_options(*KINDS)
@json_option
def stats(queue_url: str | None, as_json: bool, create: bool, **names: str) -> None:
    """Count the messages of the three queues; ages are in seconds."""
    with open_queues(queue_url) as queues:
        require_queues(queues, names.values(), create=create)
        if not as_json:
            click.echo(f"{'queue':40} {'free':>9} {'claimed':>9} {'delayed':>9} {'total':>9} {'oldest':>9}")
        for name in names.values():
            found = queues.stats(name)
            if as_json:
                click.echo(json.dumps({"queue": name, **asdict(found), "total": found.total}))
                continue
            oldest = "-" if found.oldest_age is None else f"{found.oldest_age:.0f} s"
            click.echo(f"{name:40} {found.free:9} {found.claimed:9} {found.delayed:9} {found.total:9} {oldest:>9}")


@cli.command()
@click.argument("kind", type=click.Choice(KINDS), default="request")
@queue_options(*KINDS)
@limit_option
@json_option
def peek(kind: str, queue_url: str | None, limit: int | None, as_json: bool, create: bool, **names: str) -> None:
    """Show the messages of a queue, oldest first, without claiming them: ID AGE RECEIVES BODY."""
    with open_queues(queue_url) as queues:
        name = names[f"{kind.replace('-', '_')}_queue"]
        require_queues(queues, [name], create=create)
        for message in _browse_all(queues, name, limit or 10):
            if as_json:
                click.echo(json.dumps(asdict(message)))
            else:
                receives = "-" if message.receive_count is None else message.receive_count
                click.echo(f"{message.id} {message.age:.0f}s {receives} {one_line(json.dumps(message.body))}")


@cli.command("dead-letters")
@queue_options("dead-letter")
@limit_option
@json_option
def dead_letters(queue_url: str | None, dead_letter_queue: str, limit: int | None, as_json: bool, create: bool) -> None:
    """Show the dead letters, oldest first: REQUEST_ID WIDGET_ID RECEIVES REASON."""
    with open_queues(queue_url) as queues:
        require_queues(queues, [dead_letter_queue], create=create)
        for message in _browse_all(queues, dead_letter_queue, limit):
            letter = message.body if isinstance(message.body, dict) else {"reason": message.body}
            if as_json:
                click.echo(json.dumps({"message_id": message.id, **letter}))
                continue
            body = letter.get("body")
            widget_id = body.get("widget_id") if isinstance(body, dict) else None
            words = (letter.get("request_id"), widget_id, letter.get("receive_count"), letter.get("reason"))
            click.echo(" ".join("-" if word is None else one_line(word) for word in words))


@cli.command()
@queue_options("request", "dead-letter")
@limit_option
@click.option("--dry-run", is_flag=True, help="Only say what would be brought back.")
@option("--ttl", type=WholeNumber(60, 1_209_600, "seconds"), default=3600, help="Seconds a request may wait.")
def redrive(queue_url: str | None, create: bool, limit: int | None, *, dry_run: bool, ttl: int, **names: str) -> int:
    """Bring dead letters back to the request queue, oldest first: OLD_ID NEW_ID. Their counts begin anew.

    The request is posted first and the dead letter deleted then: what interrupts it leaves a request twice, never lost.
    """
    request_queue, dead_letter_queue = names["request_queue"], names["dead_letter_queue"]
    distinct(request_queue, dead_letter_queue)
    with open_queues(queue_url) as queues:
        require_queues(queues, names.values(), create=create)
        strange = 0
        if dry_run:
            for message in _browse_all(queues, dead_letter_queue, limit):
                click.echo(f"{_request_id(message)} -")
            return 0
        for claim in _claims(queues, dead_letter_queue, limit):
            letters = [message for message in claim.messages if _is_letter(message)]
            for letter in letters:
                posted_ttl = ttl if queues.limits.message_ttl else None
                (new_id,) = queues.post(request_queue, [letter.body["body"]], ttl=posted_ttl)
                queues.settle(claim, [Settlement(letter)])
                click.echo(f"{_request_id(letter)} {new_id}")
            strange += len(claim.messages) - len(letters)
    if strange:
        click.echo(f"error: {strange} messages are no dead letters of the consumer: left where they are", err=True)
    return EXIT_FAILED if strange else 0


@cli.command()
@click.argument("kind", type=click.Choice(KINDS))
@queue_options(*KINDS)
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(kind: str, queue_url: str | None, yes: bool, create: bool, **names: str) -> None:
    """Remove all messages of a queue for good, claimed ones too. Asks first."""
    with open_queues(queue_url) as queues:
        name = names[f"{kind.replace('-', '_')}_queue"]
        require_queues(queues, [name], create=create)
        found = queues.stats(name).total
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(f"purge of {name}: there is no terminal to ask at; add --yes")
            click.confirm(f"Remove {found:,} messages from {name} at {queues.address} for good?", abort=True, err=True)
        queues.purge(name)
        click.echo(f"{name}: {found:,} messages removed")


@cli.command()
@queue_options(*KINDS)
@claim_ttl_option
@option("--grace", type=WholeNumber(60, 43_200, "seconds"), default=60, help="The consumer's --grace.")
@option("--deadline", type=Number(0.1, 43_190, "seconds"), default=20.0, help="The consumer's --deadline.")
def check(queue_url: str | None, claim_ttl: int, grace: int, deadline: float, create: bool, **names: str) -> int:
    """Check a set-up before it goes live: each line is ok, warning or failure, with what to do."""
    failed = False

    def say(verdict: str, text: object) -> None:
        nonlocal failed
        failed |= verdict == "failure"
        click.echo(f"{verdict:8}{one_line(text, 400)}")

    with open_queues(queue_url) as queues:
        say("ok", f"{queues.limits.service} opened: {queues.address}")
        for name in names.values():
            try:
                require_queues(queues, [name], create=create)
                warnings = queues.inspect(name)
                say("ok", f"queue {name}: {queues.stats(name).total:,} messages")
                for warning in warnings:
                    say("warning", warning)
            except QueuesError as error:
                say("failure", error)
        try:
            distinct(*names.values())
            queues.limits.check_claim(ttl=claim_ttl, grace=grace, limit=queues.limits.claim_limit)
            say("ok", f"claim TTL {claim_ttl} s and grace {grace} s are in range")
        except ConfigError as error:
            say("failure", error)
        if deadline > claim_ttl - 10:
            say("failure", f"deadline {deadline:g} s: must be at most the claim TTL less 10 s; raise --claim-ttl")
        else:
            say("ok", f"deadline {deadline:g} s fits the claim TTL")
        for sentence in _cannot(queues):
            say("warning", f"{queues.limits.service} {sentence}")
    return EXIT_FAILED if failed else 0


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


def _browse_all(queues: Queues, name: str, limit: int | None) -> Iterator[Message]:
    marker, left = "", limit
    while left is None or left > 0:
        page = queues.browse(name, after=marker, limit=min(left or 20, 20), claimed=True)
        if not page.messages:
            return
        yield from page.messages
        marker, left = page.marker, None if left is None else left - len(page.messages)


def _claims(queues: Queues, name: str, limit: int | None) -> Iterator[Claim]:
    """Claims of what is in the queue now, so that what fails again meanwhile does not go round; released behind."""
    found = queues.stats(name).free
    left, claims = found if limit is None else min(limit, found), []
    try:
        while left > 0:
            most = min(left, queues.limits.claim_limit)
            claim = queues.claim(name, ttl=REDRIVE_CLAIM_TTL_S, grace=REDRIVE_CLAIM_TTL_S, limit=most)
            if claim is None:
                return
            claims.append(claim)
            left -= len(claim.messages)
            yield claim
    finally:
        for claim in claims:
            queues.release(claim)


def _is_letter(message: Message) -> bool:
    return isinstance(message.body, dict) and "body" in message.body and "request_id" in message.body


def _request_id(message: Message) -> str:
    return one_line(message.body["request_id"]) if _is_letter(message) else message.id


def main() -> None:
    """Entry point of the command `claim-queues`."""
    run(cli)


if __name__ == "__main__":
    main()
