"""Write README's table of services and the tables of docs/options.md from the code itself: `make readme`."""

import re
from collections.abc import Callable
from pathlib import Path

import click

import claim_queues.__main__
import widget_consumer
import widget_maker
import widget_producer
from claim_queues import Limits, cloud_queues, sqlite, sqs, zaqar
from claim_queues.command_line import Number

README = Path(__file__).resolve().parent.parent / "README.md"
OPTIONS = README.parent / "docs" / "options.md"
QUEUES = ("queue_url", "create", "request_queue", "response_queue", "dead_letter_queue")
"""Options that mean the same everywhere."""
SCRIPTS = {
    "widget_producer.py": widget_producer.cli,
    "widget_consumer.py": widget_consumer.cli,
    "widget_maker.py": widget_maker.cli,
}


SERVICES = {
    "SQS": sqs.LIMITS,
    "Cloud Queues v1": cloud_queues.LIMITS,
    "Zaqar v2": zaqar.LIMITS,
    "embedded": sqlite.LIMITS,
}
DIFFERENCES: list[tuple[str, Callable[[Limits], object], str]] = [
    ("claim TTL, seconds", lambda limits: limits.claim_ttl, "the scripts take 60 to 43,200 everywhere"),
    ("grace, seconds", lambda limits: limits.grace or "none", "`--grace` is refused where there is none"),
    (
        "TTL of a message, seconds",
        lambda limits: limits.message_ttl or "the queue's",
        "`--ttl` and `--response-ttl` are refused where the queue has one for all",
    ),
    ("messages in a claim", lambda limits: f"up to {limits.claim_limit}", "`--claim-limit` is at most that"),
    ("messages in a post", lambda limits: f"up to {limits.post_batch:,}", "`--count` posts so many at once"),
    ("bytes of a body", lambda limits: f"{limits.message_bytes:,}", "requests are at most 65,536 everywhere"),
    (
        "counts receives",
        lambda limits: _yes(limits.counts_receives),
        "elsewhere `--receive-counts` counts, each machine apart",
    ),
    (
        "looks without claiming",
        lambda limits: _yes(limits.can_browse),
        "elsewhere `--wait`, `peek` and `dead-letters` are refused",
    ),
    (
        "releases one message",
        lambda limits: _yes(limits.releases_one_message),
        "elsewhere a message in backoff stays claimed, and its claim is released when the backoff ends",
    ),
    (
        "notices a late delete",
        lambda limits: _yes(limits.fenced_delete),
        "elsewhere the consumer trusts its own clock",
    ),
    (
        "response and delete in one transaction",
        lambda limits: _yes(limits.atomic_settle),
        "elsewhere a crash can repeat a response",
    ),
    (
        "counts messages exactly",
        lambda limits: _yes(not limits.stats_settle),
        "elsewhere `--drain` ends after a minute without messages",
    ),
]


def written() -> str:
    """README with its table as it should be."""
    return replaced(README.read_text(), "services", service_table())


def written_options() -> str:
    """docs/options.md with its tables as they should be."""
    return replaced(OPTIONS.read_text(), "options", _option_tables())


def replaced(text: str, name: str, table: str) -> str:
    """The text with the table between its two marks."""
    begin, end = f"<!-- {name}: written by `make readme` -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def service_table() -> str:
    rows = [f"| | {' | '.join(SERVICES)} | what it means for the scripts |", "| --- " * (len(SERVICES) + 2) + "|"]
    for what, found, meaning in DIFFERENCES:
        rows.append(f"| {what} | {' | '.join(str(found(limits)) for limits in SERVICES.values())} | {meaning} |")
    return "\n".join(rows) + "\n"


def _yes(capability: object) -> str:
    return "yes" if capability else "no"


def _option_tables() -> str:
    tool = claim_queues.__main__.cli
    return "\n".join(
        [
            _table("All but the maker", [option for option in _options(widget_consumer.cli) if option.name in QUEUES]),
            *(_table(f"`{name}`", _own(command)) for name, command in SCRIPTS.items()),
            _table(
                "`python -m claim_queues`",
                [option for command in tool.commands.values() for option in _own(command)],
                [name for name, command in tool.commands.items() for _ in _own(command)],
            ),
        ]
    )


def _options(command: click.Command) -> list[click.Option]:
    return [found for found in command.params if isinstance(found, click.Option) and found.name != "version"]


def _own(command: click.Command) -> list[click.Option]:
    return [found for found in _options(command) if found.name not in QUEUES]


def _table(title: str, options: list[click.Option], commands: list[str] | None = None) -> str:
    """commands: whose option each is, where that is not one command's table."""
    rows = ["| option | takes | default | |", "| --- | --- | --- | --- |"]
    for place, option in enumerate(options):
        name = f"{commands[place]} {option.opts[0]}" if commands else option.opts[0]
        rows.append(f"| `{name}` | {_takes(option)} | {_default(option)} | {_help(option)} |")
    return "\n".join([f"**{title}**", "", *rows]) + "\n"


def _takes(option: click.Option) -> str:
    kind = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, Number):
        return kind.allowed
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    return str(option.make_metavar(click.Context(click.Command(""))))


def _default(option: click.Option) -> str:
    if said := re.search(r"\[default: (.*)\]", option.help or ""):
        return said[1]
    default = option.to_info_dict()["default"]
    if option.is_flag or default is None or default == ():
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _help(option: click.Option) -> str:
    return re.sub(r"  \[default: .*\]", "", option.help or "").replace("|", "\\|")


if __name__ == "__main__":
    README.write_text(written())
    OPTIONS.write_text(written_options())
