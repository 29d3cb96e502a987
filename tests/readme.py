"""Write README's section on options from the commands themselves: `make readme`."""

import re
from pathlib import Path

import click

import claim_queues.__main__
import widget_consumer
import widget_maker
import widget_producer

README = Path(__file__).resolve().parent.parent / "README.md"
SECTION = re.compile(
    r"(?<=<!-- options: written by `make readme` from the commands themselves -->\n).*(?=<!-- end of)", re.S
)
NOT_LISTED = {"--help", "--version"}


def written() -> str:
    """README with the section as it should be."""
    tables = [
        options_table("widget_producer.py", widget_producer.cli),
        options_table("widget_consumer.py", widget_consumer.cli),
        options_table("widget_maker.py", widget_maker.cli),
    ]
    for name, command in claim_queues.__main__.cli.commands.items():
        tables.append(options_table(f"python -m claim_queues {name}", command))
    return SECTION.sub(lambda _: "\n" + "\n".join(tables) + "\n", README.read_text())


def options_table(title: str, command: click.Command) -> str:
    head = [f"**`{title}`**", "", "| option | default | what it does |", "| --- | --- | --- |"]
    context = click.Context(command)
    options = [found for found in command.params if isinstance(found, click.Option)]
    rows = [_row(found, context) for found in options if not NOT_LISTED & set(found.opts)]
    return "\n".join([*head, *rows]) + "\n"


def _row(option: click.Option, context: click.Context) -> str:
    text = option.help or ""
    shown = re.search(r"  \[default: (.*)\]", text)
    if shown:
        default, text = shown[1], text.replace(shown[0], "")
    else:
        default = "" if option.is_flag or option.multiple else str(option.get_default(context) or "")
    takes = "" if option.is_flag else f" {option.make_metavar(context)}"
    return f"| `{', '.join(option.opts)}{takes}` | {default} | {text.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    README.write_text(written())
