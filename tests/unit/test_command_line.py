"""What the command lines share: option types, errors and exit codes, safe lines, logging."""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from in_process import Ended, call
from support import wait_until

from claim_queues import ConfigError, CredentialsError, PostIncomplete, QueueError, QueuesError, StoreError
from claim_queues.command_line import (
    Log,
    Number,
    WholeNumber,
    configure_logging,
    distinct,
    one_line,
    option,
    run,
)


def command(function: Callable[..., object], *decorators: Callable[..., object]) -> Callable[[], object]:
    """The entry point of a command that does this."""
    for decorate in reversed(decorators):
        function = decorate(function)
    made = click.command()(function)
    return lambda: run(made)


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


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
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error: Exception, code: int) -> None:
    ended = call(command(raising(error)))
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    assert ended == Ended(code, "", f"error: {message}\n")


def test_every_error_of_the_tree_has_an_exit_code_of_the_table() -> None:
    kinds = [QueuesError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.exit_code for kind in kinds} == {1, 2, 4, 5, 6}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_one_line_and_130(error: BaseException) -> None:
    ended = call(command(raising(error)))
    assert (ended.code, ended.err.strip()) == (130, "error: interrupted")


def test_a_long_or_hostile_error_stays_one_line() -> None:
    ended = call(command(raising(ConfigError("a\nb\x1b[2J" + "x" * 5000))))
    assert ended.err.startswith("error: a\\nb\\x1b[2Jxxx")
    assert (ended.err.count("\n"), len(ended.err)) == (1, len("error: \n") + 1000)


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        call(command(raising(ZeroDivisionError())))


@pytest.mark.parametrize("given", [None, 0, 3])
def test_what_the_command_returns_is_the_exit_code(given: int | None) -> None:
    assert call(command(lambda: given)).code == (given or 0)


def test_a_stdout_that_takes_nothing_is_exit_1_without_a_traceback(tmp_path: Path) -> None:
    program = "import click\nfrom claim_queues.command_line import run\nrun(click.command()(lambda: click.echo('x')))"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (1, "error: [Errno 28] No space left on device\n")


# Signals


def test_a_second_signal_does_not_wait_for_a_stop_that_takes_long() -> None:
    program = """
import threading
from claim_queues.command_line import run_until_signal
def forever(name):
    print(name, flush=True)
    threading.Event().wait()
run_until_signal(lambda: forever("working"), stop=lambda: forever("stopping"))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        wait_until(lambda: process.send_signal(signal.SIGINT) or process.poll() is not None, seconds=5)
    assert process.returncode == 130


def test_an_interrupt_that_is_ignored_from_the_start_stays_so() -> None:
    program = """
import signal
from claim_queues.command_line import end_at_interrupt
signal.signal(signal.SIGINT, signal.SIG_IGN)
end_at_interrupt()
signal.raise_signal(signal.SIGINT)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Options


@pytest.mark.parametrize(
    "text",
    ["59", "43201", "1_000", " 60", "60 ", "\uff16\uff10", "+60", "-60", "6e1", "60.0", "0x40", "", "9" * 30, "sixty"],
)
def test_a_whole_number_is_ascii_digits_in_its_range(text: str) -> None:
    with pytest.raises(click.BadParameter, match="60 to 43,200 seconds"):
        WholeNumber(60, 43_200, "seconds").convert(text, None, None)


@pytest.mark.parametrize(("text", "value"), [("60", 60), ("43200", 43_200), ("00060", 60)])
def test_a_whole_number_includes_both_ends_of_its_range(text: str, value: int) -> None:
    assert WholeNumber(60, 43_200).convert(text, None, None) == value


@pytest.mark.parametrize(
    "text", ["0.09", "1209600.1", "nan", "inf", "1e3", ".5", "5.", "1_0.0", "\uff11", "-1", "", " 1"]
)
def test_a_number_is_ascii_decimal_in_its_range(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"0\.1 to 1,209,600 seconds"):
        Number(0.1, 1_209_600, "seconds").convert(text, None, None)


@pytest.mark.parametrize(("text", "value"), [("0.1", 0.1), ("1209600", 1_209_600.0), ("20", 20.0)])
def test_a_number_includes_both_ends_of_its_range(text: str, value: float) -> None:
    assert Number(0.1, 1_209_600).convert(text, None, None) == value


def test_an_option_shows_its_default_and_variable_and_is_read_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    main = command(
        lambda deep_water: click.echo(f"{deep_water} m"),
        option("--deep-water", type=WholeNumber(1, 9, "metres"), default=4, help="In metres."),
    )
    assert "[env var: WIDGET_DEEP_WATER; default: 4]" in " ".join(call(main, "--help").out.split())
    assert call(main).out == "4 m\n"
    monkeypatch.setenv("WIDGET_DEEP_WATER", "7")
    assert call(main).out == "7 m\n"
    assert call(main, "--deep-water", "8").out == "8 m\n"
    monkeypatch.setenv("WIDGET_DEEP_WATER", "70")
    assert call(main).code == 2


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b", "a"), ("Queue", "queue")])
def test_queues_must_differ(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="must differ"):
        distinct(*names)


def test_different_queues_are_fine() -> None:
    distinct("a", "b", "c")


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


@pytest.mark.parametrize("text", ["x" * 11, "\n" * 10, "\u202e" * 1_000_000])
def test_one_line_is_cut_at_its_limit(text: str) -> None:
    cut = one_line(text, 10)
    assert len(cut) == 10
    assert cut.endswith("…")


def test_a_line_of_just_the_limit_is_not_cut() -> None:
    assert one_line("x" * 10, 10) == "x" * 10


# Logging

CHATTY = ("urllib3", "botocore", "keystoneauth", "pyrax")


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str, str], str]]:
    """Log one event in a form and at a level; gives what was written."""
    root = logging.getLogger()
    before = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in (None, *CHATTY)}

    def write(form: str, least: str = "info") -> str:
        log = Log("test")
        configure_logging(form, least)
        log.debug("details")
        log.info("created", message="m1", widget='a "b"\nc', status=201, reason=None)
        log.warning("slow", seconds=1.5)
        try:
            int("why\nnot")
        except ValueError:
            logging.getLogger("other").exception("failed\nbadly")
        log.error("gone")
        return capsys.readouterr().err

    yield write
    root.handlers[:] = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_text_logs_are_one_line_an_event_with_time_level_and_fields(logged: Callable[..., str]) -> None:
    created, slow, failed, gone = logged("text").splitlines()
    date, moment, rest = created.split(" ", 2)
    assert (len(date), len(moment)) == (len("2026-01-01"), len("00:00:00.000"))
    assert rest == 'info    created message=m1 widget="a \\"b\\"\\\\nc" status=201'
    assert slow.endswith(" warning slow seconds=1.5")
    assert " error   failed\\nbadly Traceback" in failed
    assert "ValueError: invalid literal" in failed
    assert gone.endswith(" error   gone")


def test_json_logs_are_one_object_an_event(logged: Callable[..., str]) -> None:
    created, slow, failed, gone = map(json.loads, logged("json").splitlines())
    assert created.pop("time") > 1_700_000_000
    assert created == {"level": "info", "event": "created", "message": "m1", "widget": 'a "b"\nc', "status": 201}
    assert (slow["seconds"], gone["level"]) == (1.5, "error")
    assert failed["traceback"].startswith("Traceback")


def test_the_least_level_is_obeyed(logged: Callable[..., str]) -> None:
    assert [line.split()[3] for line in logged("text", "error").splitlines()] == ["failed\\nbadly", "gone"]
    assert " debug   details" in logged("text", "debug")


def test_libraries_that_print_tokens_stay_quiet_at_debug(logged: Callable[..., str]) -> None:
    logged("text", "debug")
    for name in CHATTY:
        assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)
