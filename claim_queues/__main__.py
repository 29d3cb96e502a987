"""The operator's tool: look at the queues, bring dead letters back, check a set-up before it goes live."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import click

from . import JSON, Message, Queues
from .base import is_loopback
from .checks import Report, check_queues
from .cli import MESSAGE_SECONDS, Group, as_line, note, opened, print_lines, print_table, queue_options
from .letters import PAGE, bring_back, is_letter

KINDS = {"request": "request_queue", "response": "response_queue", "dead-letter": "dead_letter_queue"}
NUMBERS, PORTS = click.IntRange(1, 1_000_000_000), click.IntRange(1, 65_535)
OWN: dict[str, Any] = {"allow_from_autoenv": False, "show_envvar": True}
"""For options whose variable differs from the maker's of that name, which may be set for all commands."""

ttl_option = click.option("--ttl", type=MESSAGE_SECONDS, default=3600, help="Seconds that a request may wait.")
json_option = click.option("--json", "as_json", envvar="WIDGET_JSON", is_flag=True, help="Print JSON lines.")
limit_option = click.option("--limit", type=NUMBERS, default=NUMBERS.max, show_default="all", help="At most this many.")


@click.group(cls=Group)
def cli() -> None:
    """Look at the queues and repair them. For more, see `COMMAND --help`.

    Exit codes: 0 done, 1 failed, 2 usage, 4 credentials, 5 a local file cannot be used, 6 it is unknown whether a
    request was brought back: its dead letter stays.
    """


@cli.command(examples=["", "--queue-url sqs://eu-west-1 --json"])
@queue_options(*KINDS)
@json_option
def stats(*, as_json: bool, **given: Any) -> None:
    """Count the messages of the three queues; ages are in seconds."""
    row = "{:31} {:>8} {:>8} {:>8} {:>8} {:>8}".format
    names = [given[option] for option in KINDS.values()]
    with opened(given, *names, looking=True) as queues:
        if not as_json:
            print_lines([row("queue", "free", "claimed", "delayed", "total", "oldest")])
        for name in names:
            found = queues.stats(name)
            age = "-" if found.oldest_age is None else f"{found.oldest_age:.0f} s"
            fields = {"queue": name, **found._asdict(), "total": found.total}
            print_lines([json.dumps(fields) if as_json else row(name, *found[:3], found.total, age)])


@cli.command(examples=["response", "request --limit 100 --json"])
@click.argument("kind", type=click.Choice(KINDS), default="request")
@queue_options(*KINDS)
@click.option("--limit", type=NUMBERS, default=10, help="At most this many messages.")
@json_option
def peek(kind: str, limit: int, *, as_json: bool, **given: Any) -> None:
    """Show the messages of a queue, oldest first, without claiming them: ID AGE RECEIVES BODY."""
    name = given[KINDS[kind]]
    with opened(given, name, looking=True) as queues:
        found = islice(browse_all(queues, name), limit)
        if as_json:
            for each in found:
                print_lines([json.dumps({key: value for key, value in each._asdict().items() if key != "handle"})])
        else:
            rows = ([each.id, f"{each.age:.0f}s", each.receive_count, json.dumps(each.body)] for each in found)
            print_table(["id", "age", "receives", "body"], rows)


@cli.command("dead-letters", examples=["", "--json | jq -r .reason | sort | uniq -c"])
@queue_options("dead-letter")
@limit_option
@json_option
def dead_letters(dead_letter_queue: str, limit: int, *, as_json: bool, **given: Any) -> None:
    """Show the dead letters, oldest first: REQUEST_ID WIDGET_ID RECEIVES REASON."""
    with opened(given, dead_letter_queue, looking=True) as queues:
        found = islice(browse_all(queues, dead_letter_queue), limit)
        if as_json:
            for each in found:
                print_lines([json.dumps({**as_letter(each.body), "message_id": each.id})])
        else:
            print_table(["request", "widget", "receives", "reason"], (summary(as_letter(each.body)) for each in found))


@cli.command(examples=["--dry-run", "--limit 10"])
@queue_options("request", "dead-letter")
@limit_option
@click.option("--dry-run", is_flag=True, help="Only say what would be brought back.")
@ttl_option
def redrive(limit: int, *, dry_run: bool, **given: Any) -> None:
    """Bring dead letters back to the request queue, oldest first: OLD_ID NEW_ID. Their counts begin at zero.

    Each request is posted before its dead letter is deleted: an interruption can leave it twice, and never loses it.
    """
    names = [given["dead_letter_queue"], given["request_queue"]]
    with opened(given, *names, looking=True) as queues:
        if dry_run:
            letters = (found.body for found in browse_all(queues, names[0]) if is_letter(found.body))
            for letter in islice(letters, limit):
                tell(letter["request_id"], None)
            return
        found = queues.stats(names[0])
        if found.claimed:
            note(f"{names[0]}: {found.claimed:,} are claimed until their claims end, perhaps by another redrive")
        if not found.free:
            note(f"{names[0]}: no dead letters to bring back")
        ttl = given["ttl"] if queues.limits.has_message_ttl else None
        if left := bring_back(queues, *names, limit=limit, ttl=ttl, tell=tell):
            raise click.ClickException(f"{left:,} messages stay: not dead letters, or taken by another meanwhile")


@cli.command(examples=["response", "dead-letter --yes"])
@click.argument("kind", type=click.Choice(KINDS))
@queue_options(*KINDS)
@click.option("--yes", is_flag=True, allow_from_autoenv=False, help="Do not ask. This option has no variable.")
def purge(kind: str, *, yes: bool, **given: Any) -> None:
    """Remove all messages of a queue for good, claimed ones too. Asks first."""
    name = given[KINDS[kind]]
    with opened(given, name, looking=True) as queues:
        found = queues.stats(name).total
        question = f"Remove {found:,} messages from {name} at {queues.address} for good?"
        if not yes and not (sys.stdin.isatty() and click.confirm(question, err=True)):
            raise click.ClickException(f"{name}: nothing removed: say y at a terminal, or add --yes")
        queues.purge(name)
        print_lines([f"{name}: {found:,} messages removed"])


@cli.command(examples=["", "--queue-url rackspace://USER@DFW --create"])
@queue_options(*KINDS)
def check(**given: Any) -> int:
    """Check a set-up before it goes live: each line is ok, warning or failure, with what to do.

    `widget_consumer.py --check` checks its other options and the widget maker too.
    """
    report = Report()
    with opened(given) as queues:
        check_queues(report, queues, [given[option] for option in KINDS.values()], create=given["create"])
    return report.exit_code


@cli.command(examples=["", "--port 8081 --queue-url zaqar://mycloud"])
@queue_options(*KINDS)
@click.option("--host", default="127.0.0.1", envvar="WIDGET_WEB_HOST", help="Loopback address to listen at.", **OWN)
@click.option("--port", type=PORTS, default=5001, envvar="WIDGET_WEB_PORT", help="Port to listen at.", **OWN)
@ttl_option
def web(host: str, port: int, **given: Any) -> None:
    """Serve a page of the queues to this machine's browsers until Ctrl-C: numbers, messages, dead letters, redrive.

    Only the link that it prints opens the page, and only once: from then on a cookie identifies the browser.
    """
    if not is_loopback(host):
        raise click.UsageError("--host: name a loopback address; from other machines use `ssh -L`")
    from .web import serve

    names = {kind: given[option] for kind, option in KINDS.items()}
    with opened(given, *names.values(), looking=True) as queues:
        serve(queues, names, host, port, ttl=given["ttl"] if queues.limits.has_message_ttl else None)


def as_letter(body: JSON) -> dict[str, JSON]:
    """The dead letter, or why the body is none."""
    return body if is_letter(body) else {"reason": f"not a dead letter: {json.dumps(body)}"}


def summary(letter: dict[str, JSON]) -> list[JSON]:
    """What the table of dead letters shows of one."""
    body = letter.get("body")
    widget_id = body.get("widget_id") if isinstance(body, dict) else None
    return [letter.get("request_id"), widget_id, letter.get("receive_count"), letter.get("reason")]


def tell(old_id: str, new_id: str | None) -> None:
    """Print what was brought back."""
    print_lines([as_line(old_id, new_id)])


def browse_all(queues: Queues, name: str) -> Iterator[Message]:
    """All messages of the queue, fetched page by page as needed. Raises ConfigError where the service shows none."""
    page, marker = queues.browse(name, limit=PAGE)
    if not page:
        note(f"{name}: nothing to show")
    while page:
        yield from page
        page, marker = queues.browse(name, after=marker, limit=PAGE)


if __name__ == "__main__":
    cli()
