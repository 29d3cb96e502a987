"""Fuzzing: queue bodies and makers' answers, the maker's API, command lines.

The first two need .venvs/fuzz, which `make .venvs/fuzz/installed` makes.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from in_process import Ended, call
from support import HERE, widget_maker

import claim_queues.__main__
import widget_consumer
import widget_maker as maker_module
import widget_producer
from claim_queues.command_line import Number, WholeNumber
from claim_queues.sqlite import SqliteQueues

from .campaign import Campaign, Result

FUZZ = HERE / ".venvs" / "fuzz"
BODIES, API_REQUESTS, COMMAND_LINES = 1_000_000, 20_000, 5_000
VARIED_OPERATIONS = 6
"""Of the maker's API: the others have no parameters, so each of them is one request."""
PROCESS_SHARE = 100
"""One in so many command lines runs as a real process, too."""
ID = "31f37378-54f4-11e5-ad75-3c970e65f731"


def is_installed() -> bool:
    return (FUZZ / "installed").exists()


# Bodies and answers

REQUEST = f'{{"widget_id": "{ID}", "x": [1, 2.5, {{"y": null}}]}}'
ANSWER = f'{{"id": "{ID}", "created_at": "2026-01-02T03:04:05.678Z"}}'
BATCH = f'{{"answers": [{{"message_id": "m1", "status": 201, "body": {ANSWER}}}, {{"message_id": "m2"}}]}}'
ERROR = '{"error": {"code": "bad_widget_id", "message": "no"}}'
SEEDS = [
    *(b"\x10" + text for text in (b"null", b"[[]]", b'"y"', b"1e400", b'{"a": {"b": [1]}}')),
    *(b"\x30" + text for text in (ID.encode(), ID.upper().encode(), b"\\u0041", b"no id", b"")),
    *(
        b"\x90" + bytes([n]) + body.encode()
        for n, body in ((0, ANSWER), (1, ANSWER), (5, ERROR), (6, ERROR), (0, BATCH))
    ),
    *(b"\x60" + text.encode() for text in (REQUEST, REQUEST.upper(), "[]", "NaN", '{"widget_id": "\\ud800"}', "<x/>")),
    *(
        b"\xff\x20HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body.encode())
        for status, body in ((201, ANSWER), (200, BATCH), (422, ERROR), (503, ERROR), (302, ""))
    ),
    b"\xff\x20HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n4d\r\n" + ANSWER.encode() + b"\r\n0\r\n\r\n",
]
WORDS = ["widget_id", ID, '{\\"', "error", "code", "message", "HTTP/1.1 201", "Content-Length: ", "chunked", "answers"]


def fuzz_bodies(scale: float) -> Result:
    """Queue bodies through consumer and maker, and answers back, by atheris, which follows the code's branches."""
    runs = max(1, round(BODIES * scale))
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS):
            (corpus / str(number)).write_bytes(seed)
        words = Path(directory) / "words"
        words.write_text("".join(f'"{word}"\n' for word in WORDS))
        code = (
            "import runpy, sys; sys.path.append(sys.argv.pop(1));"
            "runpy.run_module('reliability.fuzz_bodies', run_name='__main__')"
        )
        (site_packages,) = FUZZ.glob("lib/python*/site-packages")
        options = [f"-runs={runs}", "-max_len=4096", "-len_control=20", f"-dict={words}", "-rss_limit_mb=1000"]
        done = subprocess.run(
            [sys.executable, "-c", code, str(site_packages), *options, str(corpus)],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE / 'tests'}"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    figures: dict[str, int | float | str] = {"n": runs}
    if done.returncode == 0:
        figures |= json.loads(done.stdout.splitlines()[-1])
        return Result(figures | {"branches": int(re.findall(r"cov: (\d+)", done.stderr)[-1])})
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("#", "INFO"))]
    return Result(figures, [" | ".join(lines)[:4_000]])


# The maker's API

API_CHECKS = [
    "not_a_server_error",
    *(f"{what}_conformance" for what in ("status_code", "content_type", "response_headers", "response_schema")),
]


def fuzz_api(scale: float) -> Result:
    """Requests made by schemathesis from the maker's own description."""
    with tempfile.TemporaryDirectory() as directory, widget_maker(Path(directory)) as (url, maker):
        report = Path(directory) / "report.ndjson"
        done = subprocess.run(
            [
                str(FUZZ / "bin" / "schemathesis"),
                "--no-color",
                "run",
                f"{url}/openapi.json",
                f"--checks={','.join(API_CHECKS)}",
                f"--phases={'examples,coverage,fuzzing' if scale >= 0.1 else 'fuzzing'}",
                f"--max-examples={max(1, round(API_REQUESTS * scale / VARIED_OPERATIONS))}",
                "--continue-on-failure",
                "--suppress-health-check=all",
                "--generation-database=none",
                "--warnings=off",
                f"--report-ndjson-path={report}",
            ],
            cwd=directory,
            env=os.environ | {"NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=False,
        )
        statuses = Counter(re.findall(r'"status_code": ?(\d+)', report.read_text(errors="replace")))
        violations = [] if done.returncode == 0 else [" | ".join(done.stdout.splitlines()[-60:])]
        if "Traceback" in maker.err:
            violations.append(maker.err)
    return Result(
        {"n": sum(statuses.values()), **{f"HTTP {code}": n for code, n in sorted(statuses.items())}}, violations
    )


# Command lines

COMMANDS: dict[str, tuple[click.Command, Any, tuple[str, ...]]] = {
    "widget_producer.py": (widget_producer.cli, widget_producer.main, ()),
    "widget_consumer.py": (widget_consumer.cli, widget_consumer.main, ()),
    "widget_maker.py": (maker_module.cli, maker_module.main, ()),
    **{
        f"claim_queues {name}": (command, claim_queues.__main__.main, (name,))
        for name, command in claim_queues.__main__.cli.commands.items()
    },
}
DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 130}
USAGE = 2
NO_SLASH = st.characters(codec="utf-8", exclude_characters="/\0")
ODD = st.sampled_from(
    [
        *("", "-", "--", "-1", "0", "1e3", "nan", "inf", " 60", "60 ", "1_000", "0x10", "'", '"', "..", "~", "9" * 30),
        *("\u0666\u0660", "\uff19", "%s%n", "{0.__class__}", "$(id)", "\x1b[2J", "\r\nX: y", "\u202e", "\u2028"),
        *("\ud7ff", "a" * 5_000),
    ]
)
URLS = st.sampled_from(
    [
        *("sqlite:", "sqlite:///", "sqlite://host/x", "sqlite:///queues", "SQLITE:///queues", "file:///x"),
        *("rackspace://", "sqs://", "zaqar://", "http://127.0.0.1:1/", "https://x/", "ftp://x", "//x", "http://["),
        *("http://u:p@x/", "http://169.254.169.254/"),
    ]
)
RARELY = st.sampled_from([True, *[False] * 5])


def values(parameter: click.Parameter) -> st.SearchStrategy[str]:
    """What is written for an option: what it takes, and much that it does not."""
    junk = ODD | URLS | st.text(NO_SLASH, max_size=20)
    likely = sensible(parameter)
    return junk if likely is None else RARELY.flatmap(lambda odd: junk if odd else likely)


def sensible(parameter: click.Parameter) -> st.SearchStrategy[str] | None:
    """Values near the option's range, most of them in it; None where any text will do."""
    kind = parameter.type
    if isinstance(kind, WholeNumber):
        low, high = int(kind.low), 50 if parameter.name == "count" else int(kind.high)
        return st.one_of(st.integers(low, high).map(str), st.integers(low - 2, low + 2).map(str))
    if isinstance(kind, Number):
        return st.floats(kind.low, kind.high).map(lambda number: f"{number:.3f}")
    if isinstance(kind, click.Choice):
        return st.sampled_from(list(kind.choices))
    if str(parameter.name).endswith("_queue"):
        return st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
    return st.just("http://127.0.0.1:1/widgets") if parameter.name == "maker_url" else None


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command and words for it; mostly its own options, with values of all kinds."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    command, _, _ = COMMANDS[name]
    options = [found for found in command.params if isinstance(found, click.Option) and found.name != "version"]
    words: list[str] = []
    for option in draw(st.lists(st.sampled_from(options), max_size=5)):
        written = draw(st.sampled_from(option.opts))
        if option.is_flag:
            words.append(written)
        else:
            value = draw(values(option))
            words += draw(st.sampled_from([[written, value], [f"{written}={value}"]]))
    if draw(RARELY):
        words.insert(draw(st.integers(0, len(words))), draw(ODD | st.text(NO_SLASH, max_size=8)))
    return name, words


class Wire:
    """Stands for the network: nothing is there, and what is asked for is counted."""

    def __init__(self) -> None:
        self.connects: list[object] = []

    def connect(self, _: socket.socket, address: object) -> None:
        if isinstance(address, tuple):
            self.connects.append(address)
        raise ConnectionRefusedError(111, "Connection refused")


@contextmanager
def nothing_served(wire: Wire) -> Iterator[None]:
    """Let what a script does once its options are understood end at once, and the network be empty."""
    with (
        patch.object(widget_consumer, "run_until_signal", lambda *_, **__: None),
        patch.object(widget_consumer, "_watched", lambda *_: nullcontext()),
        patch.object(maker_module, "serve", lambda *_: None),
        patch.object(maker_module, "find_address", lambda host, _: host),
        patch.object(socket.socket, "connect", wire.connect),
        patch.object(socket, "getaddrinfo", side_effect=socket.gaierror(-2, "Name or service not known")),
    ):
        yield


def words_to_run(name: str, words: list[str], queue_url: str) -> list[str]:
    """With a queue of the campaign's own first, where the words name another it wins; nothing waits long or asks."""
    _, _, first = COMMANDS[name]
    ours = [] if name == "widget_maker.py" else ["--queue-url", queue_url]
    short = ["--timeout", "0.1"] if "--wait" in words else []
    return [*first, *ours, *short, *words] if "--timeout" not in "".join(words) else [*first, *ours, *words, *short]


def check_ending(ended: Ended, shown: str) -> list[str]:
    problems = []
    if ended.code not in DOCUMENTED:
        problems.append(f"exit code {ended.code}: {shown}")
    if "Traceback" in ended.err:
        problems.append(f"a traceback: {shown}: {ended.err[-500:]}")
    if ended.code in {USAGE, 4, 5} and not (ended.err.startswith(("error: ", "Usage: ")) or "{" in ended.out):
        problems.append(f"no error line: {shown}: {ended.err[:200]!r}")
    return problems


def fuzz_command_lines(scale: float) -> Result:
    """Command lines by Hypothesis: the exit code is a documented one, and a usage error does nothing."""
    count = max(1, round(COMMAND_LINES * scale))
    codes: Counter[int] = Counter()
    violations: list[str] = []
    ran = processes = 0
    before = Path.cwd()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        os.chdir(directory)
        env = {"HOME": directory, "XDG_STATE_HOME": f"{directory}/state", "AWS_EC2_METADATA_DISABLED": "true"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("WIDGET_", "AWS_", "OS_"))}
        queue_url = f"sqlite:///{directory}/queues.sqlite3"

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(command_lines())
        def run(found: tuple[str, list[str]]) -> None:
            nonlocal ran, processes
            name, words = found
            ran += 1
            wire = Wire()
            given_words = words_to_run(name, words, queue_url)
            requests_before = queued(directory)
            try:
                with nothing_served(wire):
                    ended = call(COMMANDS[name][1], *given_words, stdin=b"")
            except Exception as error:
                violations.append(f"{type(error).__name__}: {error}: {name} {given_words!r}")
                return
            codes[ended.code] += 1
            shown = f"{name} {given_words!r}"
            violations.extend(check_ending(ended, shown))
            if ended.code == USAGE and (wire.connects or queued(directory) != requests_before):
                violations.append(f"a usage error did something: {shown}")
            if ended.code == USAGE and ran % PROCESS_SHARE == 1:
                processes += 1
                violations.extend(run_process(name, given_words, ended))

        try:
            with patch.dict(os.environ, kept | env, clear=True):
                run()
        finally:
            os.chdir(before)
    figures: dict[str, int | float | str] = {"n": ran, "as processes": processes}
    return Result(figures | {f"exit {code}": number for code, number in sorted(codes.items())}, violations[:20])


def queued(directory: str) -> int:
    """How many requests lie in the campaign's own queue."""
    path = Path(directory) / "queues.sqlite3"
    if not path.exists():
        return 0
    with SqliteQueues(path) as queues:
        return queues.stats("itchy-octo-chainsaw-request").total


def run_process(name: str, words: list[str], expected: Ended) -> list[str]:
    """The same as a real process: it ends alike."""
    words = [word for word in words if "\0" not in word]
    script, _, _ = name.partition(" ")
    command = [sys.executable, str(HERE / script)] if script.endswith(".py") else [sys.executable, "-m", script]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=60, check=False)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    problems = check_ending(ended, f"process {name} {words!r}")
    if done.returncode != expected.code:
        problems.append(f"a process ends with {done.returncode}, not {expected.code}: {name} {words!r}")
    return problems


CAMPAIGNS = [
    Campaign(
        "bodies", "no queue body and no answer of a maker breaks consumer or maker, or changes a target", fuzz_bodies
    ),
    Campaign("maker-api", "no request to the maker is answered 5xx or otherwise than it describes", fuzz_api),
    Campaign(
        "command-lines",
        "every command line ends with a documented exit code, and a wrong one does nothing",
        fuzz_command_lines,
    ),
]
