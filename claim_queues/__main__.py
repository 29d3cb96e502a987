"""The operator's tool: look at the queues, bring dead letters back, check a set-up before it goes live."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import click

from . import JSON, Claim, ConfigError, Message, PostIncomplete, Queues, QueuesError, Settlement, open_queues
from .checks import Report, check_queues
from .cli import (
    CLAIM_SECONDS,
    MESSAGE_SECONDS,
    Group,
    note,
    one_line,
    print_lines,
    queue_options,
    refuse_unsupported,
    require_queues,
)

KINDS = ("request", "response", "dead-letter")
PAGE = 100
REDRIVE_CLAIM = {"ttl": 300, "grace": 60, "wait": 2}
"""One that does not wait may overlook messages (SQS). Where none are left it is waited once, at the end."""

json_option = click.option("--json", "as_json", envvar="WIDGET_JSON", is_flag=True, help="Print JSON lines.")
limit_option = click.option("--limit", type=click.IntRange(1, 1_000_000_000), help="At most so many.  [default: all]")


@click.group(cls=Group)
def cli() -> None:
    """Look at the queues and repair them. `COMMAND --help` tells more.

    Exit codes: 0 done, 1 failed, 2 usage, 4 credentials, 5 a local file cannot be used, 6 partly redriven.
    """


@cli.command()
@queue_options(*KINDS)
@json_option
def stats(queue_url: str, as_json: bool, create: bool, **names: str) -> None:
    """Count the messages of the three queues; ages are in seconds."""
    row = "{:40} {:>9} {:>9} {:>9} {:>9} {:>9}".format
    with open_queues(queue_url) as queues:
        require_queues(queues, names.values(), create=create, looking=True)
        if not as_json:
            print_lines([row("queue", "free", "claimed", "delayed", "total", "oldest")])
        for name in names.values():
            found = queues.stats(name)
            age = "-" if found.oldest_age is None else f"{found.oldest_age:.0f} s"
            fields = {"queue": name, **found._asdict(), "total": found.total}
            print_lines([json.dumps(fields) if as_json else row(name, *found[:3], found.total, age)])


@cli.command()
@click.argument("kind", type=click.Choice(KINDS), default="request")
@queue_options(*KINDS)
@click.option("--limit", type=click.IntRange(1, 1_000_000_000), default=10, help="At most so many messages.")
@json_option
def peek(kind: str, queue_url: str, limit: int, as_json: bool, create: bool, **names: str) -> None:
    """Show the messages of a queue, oldest first, without claiming them: ID AGE RECEIVES BODY."""

    name = names[f"{kind.replace('-', '_')}_queue"]
    with open_queues(queue_url) as queues:
        for found in islice(browse_all(queues, [name], create=create), limit):
            if as_json:
                line = json.dumps({key: value for key, value in found._asdict().items() if key != "handle"})
            else:
                receives = "-" if found.receive_count is None else found.receive_count
                line = f"{one_line(found.id)} {found.age:.0f}s {receives} {one_line(json.dumps(found.body))}"
            print_lines([line])


@cli.command("dead-letters")
@queue_options("dead-letter")
@limit_option
@json_option
def dead_letters(queue_url: str, dead_letter_queue: str, limit: int | None, as_json: bool, create: bool) -> None:
    """Show the dead letters, oldest first: REQUEST_ID WIDGET_ID RECEIVES REASON."""

    with open_queues(queue_url) as queues:
        for found in islice(browse_all(queues, [dead_letter_queue], create=create), limit):
            strange = {"reason": f"no dead letter: {json.dumps(found.body)}"}
            letter = found.body if is_letter(found.body) else strange
            body = letter.get("body")
            widget_id = body.get("widget_id") if isinstance(body, dict) else None
            words = (letter.get("request_id"), widget_id, letter.get("receive_count"), letter.get("reason"))
            line = " ".join("-" if word is None else one_line(word) for word in words)
            print_lines([json.dumps({**letter, "message_id": found.id}) if as_json else line])


@cli.command()
@queue_options("request", "dead-letter")
@limit_option
@click.option("--dry-run", is_flag=True, help="Only say what would be brought back.")
@click.option("--ttl", type=MESSAGE_SECONDS, default=3600, help="Seconds that a request may wait.")
@click.pass_context
def redrive(ctx: click.Context, /, queue_url: str, limit: int | None, *, dry_run: bool, **given: Any) -> None:
    """Bring dead letters back to the request queue, oldest first: OLD_ID NEW_ID. Their counts begin at zero.

    The request is posted first and the dead letter deleted then: what interrupts it leaves a request twice, never lost.
    """
    names = [given["dead_letter_queue"], given["request_queue"]]
    with open_queues(queue_url) as queues:
        refuse_unsupported(ctx, queues.limits)
        if dry_run:
            bodies = (found.body for found in browse_all(queues, names, create=given["create"]))
            for letter in islice(filter(is_letter, bodies), limit):
                print_lines([f"{one_line(letter['request_id'])} -"])
            return
        require_queues(queues, names, create=given["create"], looking=True)
        redrive_all(queues, *names, limit=limit, ttl=given["ttl"] if queues.limits.has_message_ttl else None)


@cli.command()
@click.argument("kind", type=click.Choice(KINDS))
@queue_options(*KINDS)
@click.option("--yes", is_flag=True, allow_from_autoenv=False, help="Do not ask; for this one there is no variable.")
def purge(kind: str, queue_url: str, yes: bool, create: bool, **names: str) -> None:
    """Remove all messages of a queue for good, claimed ones too. Asks first."""
    name = names[f"{kind.replace('-', '_')}_queue"]
    with open_queues(queue_url) as queues:
        require_queues(queues, [name], create=create, looking=True)
        found = queues.stats(name).total
        question = f"Remove {found:,} messages from {name} at {queues.address} for good?"
        if not yes and not (sys.stdin.isatty() and click.confirm(question, err=True)):
            raise click.ClickException(f"{name}: nothing removed: say y at a terminal, or add --yes")
        queues.purge(name)
        print_lines([f"{name}: {found:,} messages removed"])


@cli.command()
@queue_options(*KINDS)
@click.option("--claim-ttl", type=CLAIM_SECONDS, default=300, help="The consumer's --claim-ttl, in seconds.")
@click.option("--grace", type=CLAIM_SECONDS, default=60, help="The consumer's --grace, in seconds.")
@click.option("--deadline", type=click.FloatRange(0.1, 43_190), default=20.0, help="Its --deadline, in seconds.")
@click.pass_context
def check(ctx: click.Context, /, queue_url: str, create: bool, **given: Any) -> int:
    """Check a set-up before it goes live: each line is ok, warning or failure, with what to do.

    `widget_consumer.py --check` checks the widget maker too.
    """
    report, names = Report(), [given[f"{kind.replace('-', '_')}_queue"] for kind in KINDS]
    with open_queues(queue_url) as queues:
        refuse_unsupported(ctx, queues.limits)
        check_queues(report, queues, names, create=create, claim_ttl=given["claim_ttl"], deadline=given["deadline"])
    return report.exit_code


def browse_all(queues: Queues, names: Sequence[str], *, create: bool) -> Iterator[Message]:
    """All messages of the first of these queues, which must all exist, asked for as they are taken."""
    if not queues.limits.can_browse:
        raise ConfigError(f"{queues.limits.service} cannot show messages without claiming them")
    require_queues(queues, names, create=create, looking=True)
    page, marker = queues.browse(names[0], limit=PAGE)
    if not page:
        note(f"{names[0]}: nothing to show")
    while page:
        yield from page
        page, marker = queues.browse(names[0], after=marker, limit=PAGE)


def is_letter(body: JSON) -> bool:
    """Whether a consumer wrote it: anybody can post to the queue."""
    return isinstance(body, dict) and "body" in body and isinstance(body.get("request_id"), str)


def redrive_all(queues: Queues, letter_queue: str, request_queue: str, *, limit: int | None, ttl: int | None) -> None:
    """Bring back what is there now, so that what fails again meanwhile does not go round.

    What is no dead letter is held to the end, to get at those behind it. Raises ClickException where messages stay.
    """
    held, found = list[Claim](), queues.stats(letter_queue).free
    wanted, most = found if limit is None else limit, min(queues.limits.claim_limit, queues.limits.post_limit)
    if not found:
        note(f"{letter_queue}: no dead letters to bring back")
    try:
        while (number := min(wanted, found, most)) > 0:
            if not (claim := queues.claim(letter_queue, limit=number, **REDRIVE_CLAIM)):
                break
            held.append(claim)
            letters = [message for message in claim.messages if is_letter(message.body)]
            wanted, found = wanted - len(letters), found - len(claim.messages)
            if letters:
                bring_back(queues, claim, letters, request_queue, ttl)
        if left := sum(len(claim.messages) for claim in held):
            raise click.ClickException(f"{left:,} messages stay: no dead letters, or taken by another meanwhile")
    finally:
        with suppress(QueuesError):  # else they are free when their claims end
            for claim in held:
                if claim.messages:
                    queues.release(claim)


def bring_back(queues: Queues, claim: Claim, letters: Sequence[Message], queue: str, ttl: int | None) -> None:
    """Post the requests of these dead letters, then delete those letters whose requests are stored."""
    ids, failure = [one_line(letter.body["request_id"]) for letter in letters], None
    try:
        new_ids = dict(enumerate(queues.post(queue, [letter.body["body"] for letter in letters], ttl=ttl)))
    except PostIncomplete as error:
        new_ids, failure = error.accepted, error
        for index, reason in error.refused.items():
            note(f"not brought back: {ids[index]} {one_line(reason)}")
        for index in error.unknown:
            note(f"perhaps brought back, left as it is: {ids[index]}")
    print_lines(f"{ids[index]} {one_line(new_id)}" for index, new_id in new_ids.items())
    queues.settle(claim, [Settlement(letters[index]) for index in new_ids])
    if failure:
        raise failure


if __name__ == "__main__":
    cli()
