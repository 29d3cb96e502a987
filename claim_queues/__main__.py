"""The operator's tool: look at the queues, bring dead letters back, check a set-up before it goes live."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import click

from . import (
    JSON,
    Claim,
    ClaimLost,
    ConfigError,
    Message,
    PostIncomplete,
    Queues,
    Settlement,
    open_queues,
)
from .command_line import (
    SETTINGS,
    Number,
    WholeNumber,
    __version__,
    distinct,
    message_ttl,
    one_line,
    option,
    queue_options,
    require_grace,
    require_queues,
    run,
)
from .preflight import EXIT_FAILED, Report, check_queues

KINDS = ("request", "response", "dead-letter")
PEEK_MESSAGES = 10
REDRIVE_CLAIM_TTL_S = 60
"""Enough for the messages of one claim, and no long wait for what a killed redrive held."""
REDRIVE_WAIT_S = 2
"""A claim that does not wait may overlook messages (SQS). Where none are left it is waited once, at the end."""
RENEW_EVERY_S = 20.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
limit_option = click.option(
    "--limit", type=WholeNumber(1, 1_000_000_000, "messages"), help="At most so many messages.  [default: all]"
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
@click.option(
    "--limit",
    type=WholeNumber(1, 1_000_000_000, "messages"),
    default=PEEK_MESSAGES,
    show_default=True,
    help="At most so many messages.",
)
@json_option
def peek(kind: str, queue_url: str | None, limit: int, as_json: bool, create: bool, **names: str) -> None:
    """Show the messages of a queue, oldest first, without claiming them: ID AGE RECEIVES BODY."""
    with open_queues(queue_url) as queues:
        name = names[f"{kind.replace('-', '_')}_queue"]
        messages = _browse_all(queues, name, claimed=True)
        require_queues(queues, [name], create=create)
        for message in islice(messages, limit):
            if as_json:
                click.echo(json.dumps({key: value for key, value in message._asdict().items() if key != "handle"}))
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
        messages = _browse_all(queues, dead_letter_queue, claimed=True)
        require_queues(queues, [dead_letter_queue], create=create)
        for message in islice(messages, limit):
            letter = message.body if _is_letter(message) else {"reason": f"no dead letter: {json.dumps(message.body)}"}
            if as_json:
                click.echo(json.dumps({**letter, "message_id": message.id}))
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
@click.pass_context
def redrive(ctx: click.Context, /, queue_url: str | None, limit: int | None, *, dry_run: bool, **given: Any) -> int:
    """Bring dead letters back to the request queue, oldest first: OLD_ID NEW_ID. Their counts begin anew.

    The request is posted first and the dead letter deleted then: what interrupts it leaves a request twice, never lost.
    """
    request_queue, dead_letter_queue = given["request_queue"], given["dead_letter_queue"]
    distinct(request_queue, dead_letter_queue)
    with open_queues(queue_url) as queues:
        ttl = message_ttl(ctx, queues.limits, "ttl")
        shown = _browse_all(queues, dead_letter_queue, claimed=False) if dry_run else iter(())
        require_queues(queues, (request_queue, dead_letter_queue), create=given["create"])
        if dry_run:
            for letter in islice(filter(_is_letter, shown), limit):
                click.echo(f"{one_line(letter.body['request_id'])} -")
            return 0
        if not queues.stats(dead_letter_queue).free:
            click.echo(f"{dead_letter_queue}: no dead letters to bring back", err=True)
        strange = _redrive(queues, request_queue, dead_letter_queue, limit=limit, ttl=ttl)
    if strange:
        click.echo(f"error: {strange:,} messages are no dead letters of the consumer: left as they are", err=True)
    return EXIT_FAILED if strange else 0


@cli.command()
@click.argument("kind", type=click.Choice(KINDS))
@queue_options(*KINDS)
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(kind: str, queue_url: str | None, yes: bool, create: bool, **names: str) -> int:
    """Remove all messages of a queue for good, claimed ones too. Asks first."""
    with open_queues(queue_url) as queues:
        name = names[f"{kind.replace('-', '_')}_queue"]
        require_queues(queues, [name], create=create)
        found = queues.stats(name).total
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(f"purge of {name}: there is no terminal to ask at; add --yes")
            if not click.confirm(f"Remove {found:,} messages from {name} at {queues.address} for good?", err=True):
                click.echo(f"error: {name}: nothing removed", err=True)
                return EXIT_FAILED
        queues.purge(name)
        click.echo(f"{name}: {found:,} messages removed")
    return 0


@cli.command()
@queue_options(*KINDS)
@option("--claim-ttl", type=WholeNumber(60, 43_200, "seconds"), default=300, help="The consumer's --claim-ttl.")
@option("--grace", type=WholeNumber(60, 43_200, "seconds"), default=60, help="The consumer's --grace.")
@option("--deadline", type=Number(0.1, 43_190, "seconds"), default=20.0, help="The consumer's --deadline.")
@click.pass_context
def check(ctx: click.Context, /, queue_url: str | None, create: bool, **given: Any) -> int:
    """Check a set-up before it goes live: each line is ok, warning or failure, with what to do.

    `widget_consumer.py --check` checks the widget maker too.
    """
    report, options = Report(), {name: given.pop(name) for name in ("claim_ttl", "grace", "deadline")}
    with open_queues(queue_url) as queues:
        require_grace(ctx, queues.limits)
        check_queues(report, queues, list(given.values()), create=create, **options)
    return report.exit_code


def _browse_all(queues: Queues, name: str, *, claimed: bool) -> Iterator[Message]:
    """All messages of the queue, asked for as they are taken; a service that cannot show them is refused at once."""
    if not queues.limits.can_browse:
        raise ConfigError(f"{queues.limits.service} cannot show messages without claiming them")
    return _browse_on(queues, name, claimed=claimed)


def _browse_on(queues: Queues, name: str, *, claimed: bool) -> Iterator[Message]:
    page = queues.browse(name, claimed=claimed)
    while page.messages:
        yield from page.messages
        page = queues.browse(name, after=page.marker, claimed=claimed)


def _redrive(queues: Queues, request_queue: str, name: str, *, limit: int | None, ttl: int | None) -> int:
    """Bring back what is there now, so that what fails again meanwhile does not go round.

    Gives the number of messages that are no dead letters. They stay claimed to the end, to get at those behind them.
    """
    found, renew_at = queues.stats(name).free, time.monotonic() + RENEW_EVERY_S
    wanted, held, strange = found if limit is None else limit, list[tuple[Claim, list[Message]]](), 0
    try:
        while wanted > 0 and found > 0:
            if time.monotonic() >= renew_at:
                for claim, others in held:
                    queues.renew(claim, ttl=REDRIVE_CLAIM_TTL_S, messages=others)
                renew_at = time.monotonic() + RENEW_EVERY_S
            most = min(wanted, found, queues.limits.claim_limit)
            next_claim = queues.claim(
                name, ttl=REDRIVE_CLAIM_TTL_S, grace=REDRIVE_CLAIM_TTL_S, limit=most, wait=REDRIVE_WAIT_S
            )
            if next_claim is None:
                break
            letters = list(filter(_is_letter, next_claim.messages))
            others = [message for message in next_claim.messages if not _is_letter(message)]
            held.append((next_claim, others))
            wanted, found, strange = wanted - len(letters), found - len(next_claim.messages), strange + len(others)
            if letters:
                _bring_back(queues, next_claim, letters, request_queue, ttl)
            if not others:
                held.pop()
    finally:
        for claim, _ in held:
            queues.release(claim)
    return strange


def _bring_back(queues: Queues, claim: Claim, letters: Sequence[Message], queue: str, ttl: int | None) -> None:
    failure = None
    try:
        new_ids = dict(enumerate(queues.post(queue, [letter.body["body"] for letter in letters], ttl=ttl)))
    except PostIncomplete as error:
        new_ids, failure = error.accepted, error
    settled = queues.settle(claim, [Settlement(letters[index]) for index in new_ids])
    for index, new_id in new_ids.items():
        click.echo(f"{one_line(letters[index].body['request_id'])} {new_id}")
    if failure:
        raise failure
    if settled.lost:
        raise ClaimLost(f"{len(settled.lost)} dead letters were brought back but not deleted: the claim had ended")


def _is_letter(message: Message) -> bool:
    body: JSON = message.body
    return isinstance(body, dict) and "body" in body and isinstance(body.get("request_id"), str)


def main() -> None:
    """Entry point of the command `claim-queues`."""
    run(cli)


if __name__ == "__main__":
    main()
