"""What the command lines share: errors and exit codes, options, safe lines, logging, signals."""

import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import structlog
from in_process import run_command
from support import HERE, tool_or_skip, wait_until

import claim_queues.cli
import widget_consumer
import widget_maker
import widget_producer
from claim_queues import (
    ConfigError,
    CredentialsError,
    PostIncomplete,
    QueueError,
    QueueNotFound,
    StoreError,
)
from claim_queues.__main__ import cli as tool
from claim_queues.cli import (
    Command,
    Group,
    as_line,
    configure_logging,
    one_line,
    opened,
    queue_options,
    require_queues,
    state_path,
)
from claim_queues.sqlite import SqliteQueues


def command(function: Callable[..., object], *decorators: Callable[..., Any]) -> click.Command:
    """A command that does this."""
    for decorate in reversed(decorators):
        function = decorate(function)
    return click.command(cls=Command)(function)


def raising(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    return command(fail)


def run_python(program: str, stderr: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QueueError("the queue fails"), 1),
        (ConfigError("bad value"), 2),
        (CredentialsError("who are you"), 4),
        (StoreError("disk full"), 5),
        (PostIncomplete("half", accepted={}, refused={}, unknown=()), 6),
        (click.ClickException("it failed"), 1),
        (click.UsageError("no such option"), 2),
        (OSError(28, "No space left on device"), 1),
        (click.Abort("interrupted"), 130),
        (KeyboardInterrupt("interrupted"), 130),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error: BaseException, code: int) -> None:
    ended = run_command(raising(error))
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    assert (ended.code, ended.out, ended.err.lstrip("\n")) == (code, "", f"error: {message}\n")


def test_a_long_or_hostile_error_stays_one_line() -> None:
    ended = run_command(raising(ConfigError("a\nb\x1b[2J" + "x" * 5000)))
    assert ended.err.startswith("error: a\\nb\\x1b[2Jxxx")
    assert (ended.err.count("\n"), len(ended.err)) == (1, len("error: \n") + 1000)


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


@pytest.mark.parametrize("given", [None, 0, 3])
def test_what_a_command_returns_is_its_exit_code_in_a_group_too(given: int | None) -> None:
    group = click.group(cls=Group)(lambda: None)
    group.command("do")(lambda: given)
    assert run_command(command(lambda: given)).code == run_command(group, "do").code == (given or 0)


def test_a_group_without_a_command_shows_its_help_on_stderr() -> None:
    group = click.group(cls=Group, help="Many things.")(lambda: None)
    ended = run_command(group)
    assert (ended.code, ended.out) == (2, "")
    assert "Many things." in ended.err


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("broken", ["/dev/full", "closed"])
def test_a_stdout_that_takes_nothing_is_exit_1_without_a_traceback(option: str, broken: str) -> None:
    redirection = ">&-" if broken == "closed" else f">{broken}"
    line = f'"{sys.executable}" widget_producer.py {option} {redirection}'
    ended = subprocess.run(["/bin/sh", "-c", line], cwd=HERE, stderr=subprocess.PIPE, text=True, check=False)
    reason = "[Errno 9] Bad file descriptor" if broken == "closed" else "[Errno 28] No space left on device"
    assert (ended.returncode, ended.stderr) == (1, f"error: {reason}\n")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_stderr_that_takes_nothing_changes_no_exit_code(redirection: str) -> None:
    line = f'"{sys.executable}" widget_producer.py --no-such-option {redirection}'
    assert subprocess.run(["/bin/sh", "-c", line], cwd=HERE, check=False).returncode == 2


# Options


def depth(**more: Any) -> Callable[..., Any]:
    return click.option("--deep-water", type=click.IntRange(1, 9), default=4, help="In metres.", **more)


def test_an_option_shows_default_and_range_and_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    diver = command(lambda deep_water: click.echo(f"{deep_water} m"), depth())
    assert "In metres. [default: 4; 1<=x<=9]" in " ".join(run_command(diver, "--help").out.split())
    assert run_command(diver).out == "4 m\n"
    monkeypatch.setenv("WIDGET_DEEP_WATER", "7")
    group = click.group(cls=Group)(lambda: None)
    group.add_command(diver, "dive")
    assert run_command(diver).out == run_command(group, "dive").out == "7 m\n"
    assert run_command(diver, "--deep-water", 8).out == "8 m\n"
    monkeypatch.setenv("WIDGET_DEEP_WATER", "70")
    assert run_command(diver).code == 2


@pytest.mark.parametrize("value", ["tcp://10.0.0.5:5000", "udp://10.0.0.5:53"])
def test_the_address_that_kubernetes_sets_for_a_service_is_no_value(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIDGET_DEEP_WATER", value)
    assert run_command(command(lambda deep_water: click.echo(f"{deep_water} m"), depth())).out == "4 m\n"


COMMANDS = {
    "producer": (widget_producer.cli, []),
    "consumer": (widget_consumer.cli, []),
    "maker": (widget_maker.cli, []),
    "tool": (tool, []),
    **{name: (tool, [name]) for name in tool.commands},
}


@pytest.mark.parametrize(("cli", "words"), COMMANDS.values(), ids=COMMANDS)
def test_the_help_fits_80_columns_and_explains_each_option(cli: click.Command, words: list[str]) -> None:
    shown = run_command(cli, *words, "--help").out
    assert max(map(len, shown.splitlines())) <= 80
    *options, last = re.split(r"\n  (?=-)", shown)[1:]
    assert last.startswith("-h, --help  ")
    assert ("Examples:\n  " in shown) == (cli is not tool or bool(words))
    for option in options:
        assert re.search(r"  +\S+ \S+", option), option  # words that explain it
        if "RANGE" in option:
            assert re.search(r"\d<=x<=\d", "".join(option.split())), option


def test_the_queues_have_names_and_a_file_of_this_user_by_default(tmp_path: Path) -> None:
    shown = run_command(command(lambda **given: click.echo(json.dumps(given)), queue_options("request", "dead-letter")))
    assert json.loads(shown.out) == {
        "queue_url": f"sqlite:///{tmp_path}/state/itchy-octo-chainsaw/queues.sqlite3",
        "create": False,
        "request_queue": "itchy-octo-chainsaw-request",
        "dead_letter_queue": "itchy-octo-chainsaw-dead-letter",
    }


def test_the_state_directory_is_for_this_user_alone() -> None:
    directory = state_path("x").parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_state_directory_that_cannot_be_made_names_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    ended = run_command(command(lambda queue_url, create: None, queue_options()))
    assert ended.code == 5
    assert f"{tmp_path}/file/itchy-octo-chainsaw: Not a directory" in ended.err
    assert "XDG_STATE_HOME" in ended.err
    assert "--queue-url" in ended.err


# Queues and what a service can do


@pytest.mark.parametrize("names", [("a", "a", "b"), ("a", "b", "a"), ("x", "Queue", "queue")])
def test_queues_must_differ_whatever_their_case(names: tuple[str, ...]) -> None:
    kinds = ("request", "response", "dead-letter")
    options = [word for kind, name in zip(kinds, names, strict=True) for word in (f"--{kind}-queue", name)]
    refused = run_command(command(lambda **given: None, queue_options(*kinds)), *options)
    assert (refused.code, refused.err) == (2, f"error: the queues must differ: {', '.join(names)}\n".lower())


def test_a_missing_queue_is_an_error_unless_it_is_to_be_created(tmp_path: Path) -> None:
    class Strict(SqliteQueues):
        limits = replace(SqliteQueues.limits, makes_queues=False)
        made: tuple[str, ...] = ()

        def create(self, queue: str) -> None:
            self.made += (queue,)

        def exists(self, queue: str) -> bool:
            return queue in self.made

    with Strict(tmp_path / "q") as queues:
        with pytest.raises(QueueNotFound, match=f"queue b does not exist at {queues.address}: create it with --create"):
            require_queues(queues, ["b"], create=False)
        require_queues(queues, ["a", "b"], create=True)
        require_queues(queues, ["a", "b"], create=False)
        assert queues.made == ("a", "b")


def test_a_queue_that_is_made_at_its_first_use_need_not_exist_but_to_be_looked_at(tmp_path: Path) -> None:
    with SqliteQueues(tmp_path / "q") as queues:
        with pytest.raises(ConfigError, match="no/name"):
            require_queues(queues, ["no/name"], create=False)
        with pytest.raises(QueueNotFound, match="create it with --create"):
            require_queues(queues, ["a"], create=False, looking=True)
        assert list(tmp_path.iterdir()) == []
        require_queues(queues, ["a"], create=False)
        assert queues.exists("a")


@pytest.mark.parametrize(
    ("option", "lacking"),
    [("grace", "has_grace"), ("response-ttl", "has_message_ttl"), ("wait", "can_browse"), ("dry-run", "can_browse")],
)
def test_an_option_is_refused_where_it_is_given_and_the_service_cannot_honour_it(
    option: str, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Bare", (SqliteQueues,), {"limits": replace(SqliteQueues.limits, service="Bare", **{lacking: False})})
    monkeypatch.setattr(claim_queues.cli, "open_queues", lambda url: kind(Path(url)))

    @click.command(cls=Command)
    @queue_options()
    @click.option(f"--{option}", default="60")
    def consider(**given: Any) -> None:
        with opened(given):
            pass

    assert run_command(consider).code == 0
    refused = run_command(consider, f"--{option}", 60)
    assert (refused.code, refused.err.startswith(f"error: --{option}: Bare ")) == (2, True)
    monkeypatch.setenv(f"WIDGET_{option.replace('-', '_').upper()}", "60")
    assert run_command(consider) == refused


# Lines


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain ü 漢", "plain ü 漢"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\x1b[31m\x7f\x9b", "\\x1b[31m\\x7f\\x9b"),
        ("\u2028\u2029\u202e\u2066\ufeff", "\\u2028\\u2029\\u202e\\u2066\\ufeff"),
        ("\ud800", "\\ud800"),
        (None, "None"),
    ],
)
def test_one_line_escapes_what_breaks_a_line_or_steers_a_terminal(text: object, line: str) -> None:
    assert one_line(text) == line


def test_the_words_of_a_line_are_escaped_and_a_dash_where_nothing_is_known() -> None:
    assert as_line("a\nb", 5, None, "") == "a\\nb 5 - "


@pytest.mark.parametrize("text", ["x" * 11, "\n" * 10, "\u202e" * 1_000_000])
def test_one_line_is_cut_at_its_limit(text: str) -> None:
    cut = one_line(text, 10)
    assert len(cut) == 10
    assert cut.endswith("…")
    assert one_line("x" * 10, 10) == "x" * 10


# Logging


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Log some events in a form and at a level; gives what was written."""

    def write(form: str, level: str = "info") -> str:
        configure_logging(form, level)
        log = structlog.get_logger()
        log.debug("details")
        log.info("created", message="m1", widget='a "b"\nc', status=201, reason=None, error=ValueError("d\x1b[2J\ne"))
        logging.getLogger("library").info("token=secret")
        try:
            int("why\nnot")
        except ValueError:
            logging.getLogger("library").log(logging.WARNING + 5, "re\ntry %d", 7, exc_info=True)
        log.error("failed")
        return capsys.readouterr().err

    return write


def test_a_text_log_is_one_line_an_event_whatever_a_value_holds(logged: Callable[..., str]) -> None:
    created, library, failed = logged("text").splitlines()
    assert created.split(" ", 1)[1] == (
        "[info     ] created message=m1 widget='a \"b\"\\\\nc' status=201 error=d\\x1b[2J\\ne"
    )
    assert "[warning  ] re\\ntry 7\\nTraceback" in library
    assert library.endswith("library=library")
    assert "ValueError: invalid literal" in library
    assert failed.endswith("[error    ] failed")


def test_a_json_log_is_one_object_an_event(logged: Callable[..., str]) -> None:
    created, library, failed = map(json.loads, logged("json").splitlines())
    assert created.pop("timestamp").endswith("Z")
    values = {"message": "m1", "widget": 'a "b"\nc', "status": 201, "reason": None, "error": "d\x1b[2J\ne"}
    assert created == {"level": "info", "event": "created"} | values
    assert library["event"].startswith("re\ntry 7\nTraceback")
    assert (library["library"], library["level"], failed["event"]) == ("library", "warning", "failed")


def test_the_least_level_is_obeyed_and_libraries_stay_quiet_at_debug(logged: Callable[..., str]) -> None:
    assert [json.loads(line)["event"] for line in logged("json", "error").splitlines()] == ["failed"]
    details = logged("text", "debug")
    assert "details" in details
    assert "secret" not in details


@pytest.mark.parametrize(
    ("env", "is_coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({}, False)],
)
def test_only_a_terminal_that_can_and_may_shows_colours(
    env: dict[str, str], is_coloured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure_logging("text", "info")
    structlog.get_logger().error("gone")
    assert ("\x1b[" in capsys.readouterr().err) == is_coloured


def test_a_log_that_cannot_be_written_does_not_end_the_work() -> None:
    program = """
import structlog
from claim_queues.cli import configure_logging
configure_logging("text", "info")
for _ in range(2000):
    structlog.get_logger().info("made", widget="x" * 50)
print("done")
"""
    with Path("/dev/full").open("w") as full:
        ended = run_python(program, stderr=full)
    assert ended.stdout == "done\n"


# Signals

WORKER = """
import signal, threading, click
from claim_queues.cli import Command, run_until_signal
stopped = threading.Event()
def work():
    print("working", flush=True)
    stopped.wait()
    print("done", flush=True)
def stop():
    print("stopping", flush=True)
    {stop}
click.command(cls=Command)(lambda: run_until_signal(work, stop))()
"""


@pytest.fixture
def worker() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that works until a signal; `stop` is what its stop does."""
    started: list[subprocess.Popen[str]] = []

    def start(stop: str, **options: Any) -> subprocess.Popen[str]:
        program = WORKER.format(stop=stop)
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE,
            **options,
        )
        started.append(process)
        assert read(process) == "working\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_stops_the_work_in_good_order(number: int, worker: Any) -> None:
    process = worker("stopped.set()")
    process.send_signal(number)
    assert process.communicate() == ("stopping\ndone\n", "")
    assert process.returncode == 0


def test_a_second_signal_does_not_wait_for_a_stop_that_takes_long(worker: Any) -> None:
    process = worker("threading.Event().wait()")
    process.send_signal(signal.SIGTERM)
    assert read(process) == "stopping\n"
    wait_until(lambda: process.send_signal(signal.SIGINT) or process.poll() is not None)
    assert process.returncode == 130


def test_signals_at_the_same_time_are_one(worker: Any) -> None:
    process = worker("signal.raise_signal(signal.SIGTERM); stopped.set()")
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("stopping\ndone\n", "")
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_from_the_start_stays_so(number: int, worker: Any) -> None:
    process = worker("stopped.set()", preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    (ignored,) = re.findall(r"SigIgn:\t([0-9a-f]+)", Path(f"/proc/{process.pid}/status").read_text())
    assert int(ignored, 16) >> (number - 1) & 1


def test_an_error_of_the_work_ends_the_command_with_its_exit_code() -> None:
    program = """
import click
from claim_queues import StoreError
from claim_queues.cli import Command, run_until_signal
def work():
    raise StoreError("disk full")
click.command(cls=Command)(lambda: run_until_signal(work, lambda: None))()
"""
    ended = run_python(program)
    assert (ended.returncode, ended.stderr) == (5, "error: disk full\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_that_does_not_wait_for_one(number: int, code: int, tmp_path: Path) -> None:
    program = f"""
import click, threading
from claim_queues.cli import Command
@click.command(cls=Command)
def cli():
    open("{tmp_path}/started", "w").close()
    threading.Event().wait()
cli()
"""
    # As process 1 of a namespace, for which the kernel drops signals that nobody handles.
    unshare = tool_or_skip("unshare", package="util-linux")
    if subprocess.run([unshare, "--pid", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a namespace of process ids")
    process = subprocess.Popen([unshare, "--pid", "--fork", sys.executable, "-c", program], cwd=HERE)
    try:
        wait_until((tmp_path / "started").exists)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), number)
        assert process.wait(30) == code
    finally:
        process.kill()
        process.wait()
