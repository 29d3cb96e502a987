"""What the command lines share: errors and exit codes, options, safe lines, logging, signals."""

import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import structlog
from in_process import Ended, open_as, run_command

import widget_consumer
import widget_maker
import widget_producer
from claim_queues import ConfigError, CredentialsError, PostIncomplete, QueueError, QueueNotFound, StoreError
from claim_queues.__main__ import cli as tool
from claim_queues.cli import (
    Command,
    Group,
    as_line,
    configure_logging,
    one_line,
    queue_options,
    require_queues,
    run_until_signal,
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


# Exit codes


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (QueueError("the queue fails"), 1, "the queue fails"),
        (ConfigError("bad value"), 2, "bad value"),
        (CredentialsError("who are you"), 4, "who are you"),
        (StoreError("disk full"), 5, "disk full"),
        (PostIncomplete("half", accepted={}, refused={}, unknown=()), 6, "half"),
        (click.ClickException("it failed"), 1, "it failed"),
        (click.UsageError("no such option"), 2, "no such option"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error: BaseException, code: int, said: str) -> None:
    ended = run_command(raising(error))
    assert (ended.code, ended.out, ended.err.lstrip("\n")) == (code, "", f"error: {said}\n")


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
    ended = run_command(click.group(cls=Group, help="Many things.")(lambda: None))
    assert (ended.code, ended.out) == (2, "")
    assert "Many things." in ended.err


# Options


def depth() -> click.Command:
    option = click.option("--deep-water", type=click.IntRange(1, 9), default=4, help="In metres.")
    return command(lambda deep_water: click.echo(f"{deep_water} m"), option)


def test_an_option_shows_default_and_range_and_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "In metres. [default: 4; 1<=x<=9]" in " ".join(run_command(depth(), "--help").out.split())
    assert run_command(depth()).out == "4 m\n"
    monkeypatch.setenv("WIDGET_DEEP_WATER", "7")
    group = click.group(cls=Group)(lambda: None)
    group.add_command(depth(), "dive")
    assert run_command(depth()).out == run_command(group, "dive").out == "7 m\n"
    assert run_command(depth(), "--deep-water", 8).out == "8 m\n"


@pytest.mark.parametrize("value", ["tcp://10.0.0.5:5000", "udp://10.0.0.5:53"])
def test_the_address_that_kubernetes_sets_for_a_service_is_no_value(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIDGET_DEEP_WATER", value)
    assert run_command(depth()).out == "4 m\n"


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


def test_a_missing_queue_is_an_error_unless_it_is_to_be_created(tmp_path: Path) -> None:
    made: list[str] = []

    class Strict(SqliteQueues):
        limits = replace(SqliteQueues.limits, makes_queues=False)

        def exists(self, queue: str) -> bool:
            return queue in made

        def create(self, queue: str) -> None:
            made.append(queue)

    with Strict(tmp_path / "q") as queues:
        with pytest.raises(QueueNotFound, match=f"queue b does not exist at {queues.address}: create it with --create"):
            require_queues(queues, ["b"], create=False)
        require_queues(queues, ["a", "b"], create=True)
        assert made == ["a", "b"]
        require_queues(queues, ["a", "b"], create=False)


NO_BROWSE, NO_TTL = "cannot show messages without claiming them", "has one message TTL for the whole queue"
NO_GRACE = "has no grace: a message can expire while it is claimed"


@pytest.mark.parametrize(
    ("cli", "words", "given", "lacking", "reason"),
    [
        (widget_consumer.cli, ["--drain"], ["--grace", "60"], "has_grace", NO_GRACE),
        (widget_consumer.cli, ["--drain"], ["--response-ttl", "60"], "has_message_ttl", NO_TTL),
        (widget_producer.cli, [], ["--ttl", "60"], "has_message_ttl", NO_TTL),
        (widget_producer.cli, [], ["--wait"], "can_browse", NO_BROWSE),
        (tool, ["redrive"], ["--ttl", "60"], "has_message_ttl", NO_TTL),
        (tool, ["redrive"], ["--dry-run"], "can_browse", NO_BROWSE),
    ],
)
def test_an_option_is_refused_where_it_is_given_and_the_service_cannot_honour_it(
    cli: click.Command,
    words: list[str],
    given: list[str],
    lacking: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_as(monkeypatch, service="Bare", **{lacking: False})
    option, *value = given
    refused = run_command(cli, *words, *given)
    assert refused == Ended(2, "", f"error: {option}: Bare {reason}\n")
    monkeypatch.setenv(f"WIDGET_{option[2:].replace('-', '_').upper()}", value[0] if value else "1")
    assert run_command(cli, *words) == refused


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


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_at_the_same_time_are_one_and_stop_the_work_in_good_order(number: int) -> None:
    stopped, calls = threading.Event(), []

    def work() -> None:
        signal.raise_signal(number)
        assert stopped.wait(30)

    def stop() -> None:
        calls.append("stop")
        signal.raise_signal(number)  # the same one again
        stopped.set()

    assert run_command(command(lambda: run_until_signal(work, stop))).code == 0
    assert calls == ["stop"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_from_the_start_stays_so(number: int) -> None:
    calls: list[str] = []
    before = signal.signal(number, signal.SIG_IGN)
    try:
        work = partial(signal.raise_signal, number)
        assert run_command(command(lambda: run_until_signal(work, lambda: calls.append("stop")))).code == 0
    finally:
        signal.signal(number, before)
    assert calls == []


def test_an_error_of_the_work_ends_the_command_with_its_exit_code() -> None:
    def work() -> None:
        raise StoreError("disk full")

    ended = run_command(command(lambda: run_until_signal(work, lambda: None)))
    assert (ended.code, ended.err) == (5, "error: disk full\n")
