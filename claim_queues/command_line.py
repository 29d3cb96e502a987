"""What the command lines share: option types, environment variables, errors and exit codes, logging."""

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from .base import Limits, Queues
from .errors import ConfigError, QueueNotFound, QueuesError
from .terminal import RESET, TerminalHandler, colour, is_terminal

__version__ = "0.1.0"

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

SAME_SIGNAL_S = 0.5
"""GNU timeout, among others, sends a signal to the process and then to its group, which the process is in."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(name: str, *parameter: str, **attributes: Any) -> Decorator:
    """An option that shows its default and can also be given as WIDGET_NAME in the environment."""
    variable = "WIDGET_" + name.removeprefix("--").replace("-", "_").upper()
    shown: dict[str, Any] = {"show_default": True, "show_envvar": True, "envvar": variable}
    return click.option(name, *parameter, **shown | attributes)


class Number(click.ParamType[Any]):
    """A decimal number in ASCII digits, from low to high; click's own takes `1_000` and other scripts' digits."""

    name = "number"
    kind: type[Any] = float
    digits = r"[0-9]{1,9}(\.[0-9]{1,9})?"

    def __init__(self, low: float, high: float, unit: str = "") -> None:
        self.low, self.high = low, high
        self.allowed = f"{low:,.10g} to {high:,.10g}" + (f" {unit}" if unit else "")

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not (re.fullmatch(self.digits, value) and self.low <= float(value) <= self.high):
            self.fail(f"{value!r} is not a {self.name} from {self.allowed}.", param, ctx)
        return self.kind(value)


class WholeNumber(Number):
    """A whole number likewise."""

    name = "whole number"
    kind = int
    digits = "[0-9]{1,12}"


class QueueName(click.ParamType[str]):
    """A name that Limits.check_queue takes, refused here before anything is opened."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
            self.fail(f"{value!r} is no queue name: use 1 to 64 letters, digits, '_' or '-'.", param, ctx)
        return str(value)


def queue_options(*names: str) -> Decorator:
    """--queue-url, --create and the options that name the given queues: `request`, `response`, `dead-letter`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            function = option(
                f"--{name}-queue",
                type=QueueName(),
                default=f"itchy-octo-chainsaw-{name}",
                help=f"Name of the {name} queue.",
            )(function)
        function = option("--create", is_flag=True, help="Create queues that are missing.")(function)
        return option(
            "--queue-url",
            metavar="URL",
            help="Queue service: sqlite:///PATH, rackspace://USER@REGION, zaqar://CLOUD or sqs://REGION."
            "  [default: one SQLite file per user]",
        )(function)

    return decorate


def distinct(*queues: str) -> None:
    """Raise ConfigError when two of the queues are one."""
    if len({queue.casefold() for queue in queues}) < len(queues):
        raise ConfigError(f"the queues must differ: {', '.join(queues)}")


def require_queues(queues: Queues, names: Iterable[str], *, create: bool) -> None:
    """Create queues that are missing, or raise QueueNotFound: a wrong name must not look like an empty queue."""
    for name in names:
        if create:
            queues.create(name)
        elif not queues.exists(name):
            raise QueueNotFound(f"queue {name} does not exist at {queues.address}: create it with --create")


def one_line(text: object, limit: int = 256) -> str:
    """The text with what would break a line or steer a terminal escaped, cut at `limit` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def message_ttl(ctx: click.Context, limits: Limits, name: str) -> int | None:
    """The option `name` as a TTL for posts, None where the service has one TTL for the whole queue.

    Raises ConfigError where the user gave it and the service cannot honour it.
    """
    if limits.message_ttl is not None:
        return int(ctx.params[name])
    if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
        raise ConfigError(f"--{name.replace('_', '-')}: {limits.service} has one message TTL for the whole queue")
    return None


def require_grace(ctx: click.Context, limits: Limits) -> None:
    """Raise ConfigError where the user gave --grace and the service knows no such thing."""
    if limits.grace is None and ctx.get_parameter_source("grace") is not ParameterSource.DEFAULT:
        raise ConfigError(f"--grace: {limits.service} has no such thing")


def run(command: click.Command) -> NoReturn:
    """Run the command and exit by the table of exit codes; an error is one line on stderr."""
    # What the caller has closed is None: nothing to read, nowhere to log, and no output without an error.
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115 stays open as stdin does
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    try:
        code = command.main(standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help(), err=True)
        code = error.exit_code
    except click.ClickException as error:
        code = _report(" ".join(error.format_message().split()), error.exit_code)
    except QueuesError as error:
        code = _report(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        code = _report("interrupted", 130)
    except OSError as error:
        code = _report(str(error), 1)
    _flush_stdout()
    sys.exit(code)


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process as SIGTERM does, until run_until_signal(): nothing is to be put in order before.

    A KeyboardInterrupt may be swallowed, by an import's clean-up among others. Who starts it may have it ignore Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_until_signal(work: Callable[[], None], *, stop: Callable[[], None]) -> None:
    """Do the work; the first signal calls `stop` in a thread, a second one ends the process at once.

    What comes within SAME_SIGNAL_S of the first is that one again.
    """

    def watch() -> None:
        with reader:
            if not reader.recv(1):
                return
            first_at = time.monotonic()
            threading.Thread(target=stop, name="stop", daemon=True).start()  # or a second signal would wait for it
            while number := reader.recv(1):
                if time.monotonic() - first_at >= SAME_SIGNAL_S:
                    log.warning("second signal: ending at once; what is held is free when its claim ends")
                    os._exit(128 + number[0])

    # A handler runs only between two steps of the main thread; the number of its signal gets through at once.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    with writer:
        signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=watch, name="signals", daemon=True).start()
        try:
            work()
        finally:
            signal.set_wakeup_fd(-1)  # the next file may be given the same number


def _report(message: str, code: int) -> int:
    click.echo(f"error: {one_line(message, 1000)}", err=True)
    return code


def _flush_stdout() -> None:
    """Write out what stdout holds; where that fails it is dropped, or the flush at exit would print a traceback.

    Nothing is lost unseen: click.echo flushes each line, so a failure was reported before.
    """
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Log(logging.LoggerAdapter[logging.Logger]):
    """Events with fields, one line each: `log.info("created", message=..., widget=...)`."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name))

    def process(self, event: str, fields: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        return event, {"extra": {"fields": fields}}


log = Log("claim_queues")


def configure_logging(form: str, level: str) -> None:
    """Log to stderr as `text` (time, level, event, key=value) or `json` (one object a line)."""
    handler = TerminalHandler() if form == "text" and is_terminal(sys.stderr) else logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("urllib3", "botocore", "pyrax"):  # they print headers, with tokens, at debug
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("keystoneauth").setLevel(logging.ERROR)  # it warns of what it then raises


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        fields = getattr(record, "fields", {})
        start = colour(record.levelno, sys.stderr)
        level = f"{start}{record.levelname.lower():7}{RESET if start else ''}"
        words = [f"{moment}.{int(record.msecs):03d} {level} {one_line(record.getMessage(), 500)}"]
        told = (None, record.msg)
        words += [f"{key}={_quoted(value)}" for key, value in fields.items() if value not in told]
        if record.exc_info:
            words.append(one_line(self.formatException(record.exc_info), 4000))
        return " ".join(words)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{key: value for key, value in getattr(record, "fields", {}).items() if value is not None},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _quoted(value: object) -> str:
    text = one_line(value)
    return json.dumps(text, ensure_ascii=False) if " " in text or '"' in text else text
