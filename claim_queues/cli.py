"""What the command lines share: options, logging, signals; docs/operating.md lists the exit codes."""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TextIO
from urllib.parse import quote

import click
import platformdirs
import structlog
from click.core import ParameterSource
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from structlog.typing import EventDict

from . import FORMS, ConfigError, QueueNotFound, Queues, QueuesError, StoreError, open_queues
from .base import check_queue

__version__ = "0.2.0"

CLAIM_SECONDS, MESSAGE_SECONDS = click.IntRange(60, 43_200), click.IntRange(60, 1_209_600)
GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
LACKS = {
    "can_browse": ("cannot show messages without claiming them", "wait", "dry_run"),
    "has_grace": ("has no grace: a message can expire while it is claimed", "grace"),
    "has_message_ttl": ("has one message TTL for the whole queue", "ttl", "response_ttl"),
    "release_delay": ("cannot delay a release: a message in backoff stays claimed until that ends",),
}
"""What a service may lack, by the name of its limit: in words, then the options that it cannot honour."""
SECTIONS = {
    "queue_url": "Queues",
    "maker_url": "Widget maker",
    "host": "Address",
    "signing_secret_file": "Signed POSTs",
    "claim_ttl": "Claims and POSTs",
    "fail_rate": "Faults on purpose",
    "widget_id": "Requests",
    "wait": "Outcomes",
    "drain": "End",
    "receive_counts": "This machine",
    "limit": "Messages",
    "as_json": "Output",
    "log_format": "Other",
    "version": "Other",
}
"""The sections of the help: the option that begins each one, and its title."""
TABLE_ROWS = 20  # printed together
SAME_SIGNAL_S = 0.5  # GNU timeout and others signal the process and then its group: it gets the signal twice


class Command(click.Command):
    """Each option is also a variable (--claim-ttl: WIDGET_CLAIM_TTL); an error is one line and an exit code.

    A number that the command returns is its exit code. examples: options and arguments for its help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "WIDGET", "show_default": True}
        self.context_settings = {**self.context_settings, **settings, "max_content_width": 100}
        self.epilog = "Nearly every option is also an environment variable: --log-level would be WIDGET_LOG_LEVEL."
        self.examples = examples
        click.version_option(__version__, allow_from_autoenv=False)(self)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = {"Options": list[tuple[str, str]]()}
        for parameter in self.get_params(ctx):
            rows = sections.setdefault(SECTIONS.get(str(parameter.name), list(sections)[-1]), [])
            if (record := parameter.get_help_record(ctx)) and record[1]:
                rows.append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            program = f"python {ctx.command_path}" if ctx.command_path.endswith(".py") else ctx.command_path
            with formatter.section("Examples"):
                formatter.write("".join(f"  {program} {words}".rstrip() + "\n" for words in self.examples))
        super().format_epilog(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        if any(isinstance(value, float) and math.isnan(value) for value in ctx.params.values()):
            raise click.UsageError("NaN is in no option's range")  # click's own check of ranges lets it pass
        queues = [check_queue(value).casefold() for name, value in ctx.params.items() if name.endswith("_queue")]
        if len(set(queues)) < len(queues):
            raise click.UsageError(f"the queues must differ: {', '.join(queues)}")
        return super().invoke(ctx)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        _prepare()
        configure_logging("text", "info")
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False}) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            note(error.ctx.get_help())
            code = error.exit_code
        except (click.ClickException, QueuesError, OSError) as error:
            text = " ".join(error.format_message().split()) if isinstance(error, click.ClickException) else error
            note(f"error: {one_line(text, 1000)}")
            code = getattr(error, "exit_code", 1)
        except click.Abort:
            note("error: interrupted")
            code = 128 + signal.SIGINT
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # reported already; else Python would flush again and exit with its own code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        for number in (signal.SIGTERM, signal.SIGHUP):  # for one that comes while Python ends
            signal.signal(number, signal.SIG_DFL)
        sys.exit(code)


class Group(Command, click.Group):
    """Commands of one program."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def queue_options(*kinds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--queue-url, --create and a name for each kind of queue: `request`, `response`, `dead-letter`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for kind in reversed(kinds):
            name = f"itchy-octo-chainsaw-{kind}"
            function = click.option(f"--{kind}-queue", default=name, help=f"Name of the {kind} queue.")(function)
        function = click.option("--create", is_flag=True, help="Create missing queues.")(function)
        text = f"Queue service: {FORMS}.  [default: a file of this user]"
        default: dict[str, Any] = {"default": lambda: f"sqlite:///{quote(str(state_path('queues.sqlite3')))}"}
        return click.option("--queue-url", metavar="URL", **default, show_default=False, help=text)(function)

    return decorate


def state_path(name: str) -> Path:
    """A file in this user's state directory, from any working directory. Raises StoreError where it cannot be made."""
    directory = platformdirs.user_state_path("itchy-octo-chainsaw")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        hint = "set XDG_STATE_HOME, or name each file: --queue-url, --receive-counts, --database"
        raise StoreError(f"{directory}: {error.strerror}: {hint}") from error
    return directory / name


@contextmanager
def opened(given: dict[str, Any], *names: str, looking: bool = False) -> Iterator[Queues]:
    """Open the queue service of these options until the block ends, and require the named queues (require_queues).

    Raises ConfigError for an option that the user gave and the service cannot honour.
    """
    ctx = click.get_current_context()
    with open_queues(given["queue_url"]) as queues:
        for limit, (reason, *options) in LACKS.items():
            for name in options:
                if not getattr(queues.limits, limit) and ctx.get_parameter_source(name) in GIVEN:
                    raise ConfigError(f"--{name.replace('_', '-')}: {queues.limits.service} {reason}")
        require_queues(queues, names, create=given["create"], looking=looking)
        yield queues


def require_queues(queues: Queues, names: Iterable[str], *, create: bool, looking: bool = False) -> None:
    """Create missing queues or raise QueueNotFound: a mistyped name must not look like an empty queue.

    looking: raise it even where the service makes queues at their first use; for commands that change nothing.
    """
    for name in names:
        if queues.exists(name):
            continue
        if not create and (looking or not queues.limits.makes_queues):
            raise QueueNotFound(f"queue {name} does not exist at {queues.address}: create it with --create")
        queues.create(name)
        structlog.get_logger().info("created missing queue", queue=name, at=queues.address)


def one_line(text: object, limit: int = 256) -> str:
    """The text on one line, cut at `limit` characters; what would break the line or control a terminal is escaped."""
    escaped = str(text)[: limit + 1]
    if not escaped.isprintable():
        escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def as_line(*words: object) -> str:
    """The words on one line, each escaped and cut; `-` for None."""
    return " ".join("-" if word is None else one_line(word) for word in words)


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can do more than print."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows: on a terminal as a table of its width; elsewhere one row per line, without the head."""
    if not is_terminal(sys.stdout):
        for row in rows:
            print_lines([as_line(*row)])
        return
    rows, is_first = iter(rows), True
    while page := list(islice(rows, TABLE_ROWS)):
        columns = [Column(title, no_wrap=title != head[-1]) for title in head]  # the last gives way
        table = Table(*columns, box=None, pad_edge=False, show_header=is_first)
        for row in page:
            table.add_row(*(Text(as_line(word), overflow="ellipsis", no_wrap=True) for word in row))
        Console().print(table)
        is_first = False


def note(text: str) -> None:
    """Print a message for people on stderr; does nothing if that cannot be written."""
    with suppress(OSError):
        print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one write; click.echo takes four times as long


def print_lines(lines: Iterable[str]) -> None:
    """Print lines for programs on stdout. If that fails, print them on stderr, so that none is lost, and raise."""
    text = "".join(f"{line}\n" for line in lines)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        note(text.rstrip("\n"))
        raise click.ClickException(f"stdout: {error.strerror}: stopped after the lines above") from error


def _prepare() -> None:
    """Handle closed streams, default signals, and variables that Kubernetes sets."""
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115 it stays open
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")  # each write still fails
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # process 1 of a container would ignore it
            signal.signal(number, lambda found, _: sys.exit(128 + found))
    for name, value in list(os.environ.items()):  # Kubernetes sets WIDGET_PORT for a Service named `widget`
        if name.startswith("WIDGET_") and value.startswith(("tcp://", "udp://", "sctp://")):
            del os.environ[name]


def logging_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--log-format and --log-level."""
    levels, forms = click.Choice(["debug", "info", "warning", "error"]), click.Choice(["text", "json"])
    function = click.option("--log-level", type=levels, default="info", help="Lowest level logged.")(function)
    return click.option("--log-format", type=forms, default="text", help="Format of the log on stderr.")(function)


def configure_logging(form: str, level: str) -> None:
    """Log one event per line on stderr, as `text` or as a JSON object.

    Messages of libraries are included from `warning` up only: at `debug` they print tokens.
    """
    number, is_watched = getattr(logging, level.upper()), form == "text" and is_terminal(sys.stderr)
    stamp = structlog.processors.TimeStamper("%H:%M:%S" if is_watched else "iso", utc=not is_watched)
    looks: dict[str, Any] = {"colors": is_watched and not os.environ.get("NO_COLOR"), "pad_level": not is_watched}
    for_people = [_on_one_line, structlog.dev.ConsoleRenderer(**looks, pad_event_to=0, sort_keys=False)]
    render = for_people if form == "text" else [structlog.processors.JSONRenderer(default=str)]
    structlog.configure(
        processors=[structlog.processors.add_log_level, stamp, *([_in_short] if is_watched else []), *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # note() drops lines while stderr takes none, as on a full disk: the work goes on.
        logger_factory=lambda *_: SimpleNamespace(debug=note, info=note, warning=note, error=note, critical=note),
    )
    logging.basicConfig(format="%(message)s", handlers=[_FromLibraries()], force=True)
    logging.getLogger().setLevel(max(number, logging.WARNING))
    for name in ("keystoneauth", "botocore.credentials"):  # they warn of errors that they then raise or handle
        logging.getLogger(name).setLevel(logging.ERROR)


class _FromLibraries(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(record.levelno // 10 * 10, self.format(record), library=record.name)


def _in_short(_: Any, __: str, fields: EventDict) -> EventDict:
    """Drop the obvious fields, so that the line of a created widget fits 80 columns."""
    if fields["event"] == "created":
        return {key: fields[key] for key in ("event", "timestamp", "level", "widget", "ms")}
    return fields


def _on_one_line(_: Any, __: str, fields: EventDict) -> EventDict:
    """Drop empty fields and escape line breaks. Events of libraries may hold tracebacks, so they are cut later."""
    return {
        key: value if isinstance(value, int | float) else one_line(value, 4000 if key == "event" else 500)
        for key, value in fields.items()
        if value is not None
    }


def run_until_signal(work: Callable[[], object], stop: Callable[[], None]) -> None:
    """Do the work in a thread. The first SIGTERM, SIGINT or SIGHUP calls `stop`; a second one ends the process.

    A signal that is ignored when the process starts, as under nohup, stays ignored.
    """
    stopped_at: float | None = None

    def on_signal(number: int, _: object) -> None:
        nonlocal stopped_at
        if stopped_at is None:
            stopped_at = time.monotonic()
            stop()
        elif time.monotonic() - stopped_at >= SAME_SIGNAL_S:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    with ThreadPoolExecutor(1, "work") as pool:
        working = pool.submit(work)
        while not working.done():  # another thread may take two signals at once; then no wait is interrupted
            wait([working], timeout=0.5)
        working.result()
