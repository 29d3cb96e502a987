"""Write README's section on options from the commands themselves: `make readme`."""

import re
from pathlib import Path

import click

import claim_queues.__main__
import widget_consumer
import widget_maker
import widget_producer
from claim_queues.command_line import Number, WholeNumber

README = Path(__file__).resolve().parent.parent / "README.md"
SECTION = re.compile(
    r"(?<=<!-- options: written by `make readme` from the commands themselves -->\n).*(?=<!-- end of)", re.S
)
QUEUES = ("queue_url", "create", "request_queue", "response_queue", "dead_letter_queue")
"""Options that mean the same everywhere."""
SCRIPTS = {
    "widget_producer.py": widget_producer.cli,
    "widget_consumer.py": widget_consumer.cli,
    "widget_maker.py": widget_maker.cli,
}


def written() -> str:
    """README with the section as it should be."""
    tool = claim_queues.__main__.cli
    tables = [
        _table("All but the maker", [option for option in _options(widget_consumer.cli) if option.name in QUEUES]),
        *(_table(f"`{name}`", _own(command)) for name, command in SCRIPTS.items()),
        _table(
            "`python -m claim_queues`",
            [option for command in tool.commands.values() for option in _own(command)],
            [name for name, command in tool.commands.items() for _ in _own(command)],
        ),
    ]
    return SECTION.sub(lambda _: "\n" + "\n".join(tables) + "\n", README.read_text())


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
    if isinstance(kind, WholeNumber):
        return f"{kind.range}{kind.unit}"
    if isinstance(kind, Number):
        return f"{kind.low:,.9g} to {kind.high:,.9g}{kind.unit}"
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
