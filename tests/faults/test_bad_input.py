"""Bad input to each command line: one clear line on stderr, the right exit code, and nothing is touched."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import click
import pytest
from in_process import Ended, call
from scripted_maker import ScriptedMaker
from support import HERE, run_script

import claim_queues.__main__
import widget_consumer
import widget_maker
import widget_producer
from claim_queues import open_queues

USAGE, CREDENTIALS, STORE = 2, 4, 5


@dataclass(frozen=True)
class Values:
    """Values that an option refuses, and the extreme ones that it takes."""

    bad: tuple[str, ...] = ()
    good: tuple[str, ...] = ()


def whole(low: int, high: int) -> Values:
    no_numbers = ("", "x", " 60", "1_000", "\uff16\uff10", "1e2", "60.0", "-60", "9" * 23)
    return Values((str(low - 1), str(high + 1), *no_numbers), (str(low), str(high)))


def decimal(low: float, high: float) -> Values:
    below = () if low == 0 else (str(low / 2),)
    no_numbers = ("", "x", " 1", "1_0", "\uff11", "1e1", "nan", "inf", "-1", "9" * 23)
    return Values((*below, f"{high + 1:f}", *no_numbers), (str(low), str(high)))


QUEUE_NAME = Values(("", "no/name", "two words", "ü", "x" * 65, "../x"), ("x" * 64, "A_b-9"))
QUEUE_URL = Values(
    (
        "queue",
        "http://127.0.0.1/",
        "sqlite:",
        "sqlite://host/x",
        "sqlite:///",
        "rackspace://",
        "rackspace://user:key@DFW",
        "zaqar://c",
        "sqs://r?x=1",
    )
)
MAKER_URL = Values(("ftp://x/", "//host/x", "http:///x", "http://exa mple/", "http://x:99999/", "http://x:abc/", "x"))
SECRET_FILE = Values(("whsec_" + "A" * 43 + "=",))
CLAIM_TTL, GRACE, TTL = whole(60, 43_200), whole(60, 43_200), whole(60, 1_209_600)
DEADLINE = decimal(0.1, 43_190)
CHOICES = Values(("xml", "TEXT", ""))
FLAG, TEXT = Values(), Values()

QUEUE_OPTIONS = {"--queue-url": QUEUE_URL, "--create": FLAG}
REQUESTS, RESPONSES, LETTERS = ({f"--{kind}-queue": QUEUE_NAME} for kind in ("request", "response", "dead-letter"))
LOGGING = {"--log-format": CHOICES, "--log-level": CHOICES}
LIMIT = {"--limit": whole(1, 1_000_000_000)}


@dataclass(frozen=True)
class Script:
    """A command line: how it is started, and each of its options with values for it."""

    main: Callable[[], Any]
    command: click.Command
    options: dict[str, Values]
    words: tuple[str, ...] = ()

    def run(self, *options: object, stdin: bytes = b"") -> Ended:
        return call(self.main, *self.words, *options, stdin=stdin)


def tool(name: str, options: dict[str, Values], *words: str) -> Script:
    command = claim_queues.__main__.cli.commands[name]
    return Script(claim_queues.__main__.main, command, QUEUE_OPTIONS | options, (name, *words))


SCRIPTS = {
    "producer": Script(
        widget_producer.main,
        widget_producer.cli,
        QUEUE_OPTIONS
        | REQUESTS
        | RESPONSES
        | {
            "--widget-id": Values(("\udcff", "x" * 70_000), ("anything",)),
            "--count": whole(1, 100_000_000),
            "--ids-file": Values(("", "missing", "/"), ("-",)),
            "--ttl": TTL,
            "--wait": FLAG,
            "--timeout": decimal(0.1, 1_209_600),
            "--json": FLAG,
        },
    ),
    "consumer": Script(
        widget_consumer.main,
        widget_consumer.cli,
        QUEUE_OPTIONS
        | REQUESTS
        | RESPONSES
        | LETTERS
        | LOGGING
        | {
            "--maker-url": MAKER_URL,
            "--allow-plain-http": FLAG,
            "--signing-secret-file": SECRET_FILE,
            "--signing-secret-keyring": TEXT,
            "--claim-ttl": CLAIM_TTL,
            "--grace": GRACE,
            "--claim-limit": whole(1, 20),
            "--slots": whole(1, 256),
            "--post-batch": whole(1, 20),
            "--deadline": DEADLINE,
            "--max-receives": whole(1, 1000),
            "--poll-interval": decimal(0.1, 20),
            "--response-ttl": TTL,
            "--drain": FLAG,
            "--check": FLAG,
            "--receive-counts": TEXT,
            "--metrics-port": whole(1, 65_535),
        },
    ),
    "maker": Script(
        widget_maker.main,
        widget_maker.cli,
        LOGGING
        | {
            "--host": TEXT,
            "--port": whole(1, 65_535),
            "--database": TEXT,
            "--allowed-host": TEXT,
            "--signing-secret-file": SECRET_FILE,
            "--signing-secret-keyring": TEXT,
            "--fail-rate": decimal(0, 1),
            "--latency": decimal(0, 3600),
            "--fault-id": TEXT,
            "--outage": Values(("", "5", "5:", ":5", "a:b", "-1:5", "5:nan", "1:2:3"), ("0:0", "2.5:30")),
        },
    ),
    "stats": tool("stats", REQUESTS | RESPONSES | LETTERS | {"--json": FLAG}),
    "peek": tool("peek", REQUESTS | RESPONSES | LETTERS | LIMIT | {"--json": FLAG}),
    "dead-letters": tool("dead-letters", LETTERS | LIMIT | {"--json": FLAG}),
    "redrive": tool("redrive", REQUESTS | LETTERS | LIMIT | {"--dry-run": FLAG, "--ttl": TTL}),
    "purge": tool("purge", REQUESTS | RESPONSES | LETTERS | {"--yes": FLAG}, "request"),
    "check": tool(
        "check",
        REQUESTS | RESPONSES | LETTERS | {"--claim-ttl": CLAIM_TTL, "--grace": GRACE, "--deadline": DEADLINE},
    ),
}

each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
each_option = pytest.mark.parametrize(
    ("script", "option", "values"),
    [
        pytest.param(script, option, values, id=f"{name} {option}")
        for name, script in SCRIPTS.items()
        for option, values in script.options.items()
    ],
)

TAKES_FILE = {
    "producer": (SCRIPTS["producer"], "--queue-url"),
    "consumer": (SCRIPTS["consumer"], "--queue-url"),
    "consumer's counts": (SCRIPTS["consumer"], "--receive-counts"),
    "maker": (SCRIPTS["maker"], "--database"),
    "stats": (SCRIPTS["stats"], "--queue-url"),
    "check": (SCRIPTS["check"], "--queue-url"),
}
each_file_option = pytest.mark.parametrize(("script", "option"), TAKES_FILE.values(), ids=TAKES_FILE)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def assert_refused(ended: Ended, code: int, hint: str = "") -> None:
    """One line that says it, nothing on stdout, no traceback."""
    assert (ended.code, ended.out) == (code, ""), ended
    assert ended.err.startswith("error: "), ended
    assert ended.err.count("\n") == 1, ended
    assert hint in ended.err, ended


# Options


@each_script
def test_every_option_of_the_help_has_a_row_in_this_file(script: Script) -> None:
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", script.run("--help").out, flags=re.MULTILINE)
    assert set(shown) - {"--help", "--version"} == set(script.options)


@each_option
def test_an_option_refuses_what_it_cannot_use(script: Script, option: str, values: Values) -> None:
    for value in values.bad:
        assert_refused(script.run(option, value), USAGE)


@each_option
def test_an_option_takes_both_ends_of_its_range(script: Script, option: str, values: Values) -> None:
    for value in values.good:
        script.command.make_context("script", [*script.words[1:], option, value]).close()


@each_option
def test_an_option_is_read_from_the_environment_with_the_same_ranges(
    script: Script, option: str, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"WIDGET_{option.removeprefix('--').replace('-', '_').upper()}"
    if variable not in script.run("--help").out:
        assert script.words, "only the operator's tool has options that the environment cannot give"
        return
    for value in [value for value in values.bad if value and len(value) < 100]:  # an empty variable is none
        monkeypatch.setenv(variable, value)
        assert_refused(script.run(), USAGE)


@each_script
@pytest.mark.parametrize("words", [["--no-such-option"], ["--no-such-option=1"], ["-x"], ["stray"], ["--", "--stray"]])
def test_what_is_no_option_is_refused(script: Script, words: list[str]) -> None:
    assert_refused(script.run(*words), USAGE)


@each_option
def test_a_flag_takes_no_value_and_every_other_option_needs_one(script: Script, option: str, values: Values) -> None:
    assert_refused(script.run(f"{option}=yes" if values is FLAG else option), USAGE)


@pytest.mark.parametrize(
    "options",
    [
        ["--count", "1", "--widget-id", "a"],
        ["--count", "1", "--ids-file", "-"],
        ["--widget-id", "a", "--ids-file", "-"],
        ["--request-queue", "same", "--response-queue", "same"],
        ["--request-queue", "same", "--response-queue", "SAME"],
    ],
)
def test_producer_options_that_exclude_each_other(options: list[str]) -> None:
    assert_refused(SCRIPTS["producer"].run(*options), USAGE)


@pytest.mark.parametrize(
    "options",
    [
        ["--deadline", "50.1", "--claim-ttl", "60"],
        ["--deadline", "290.1"],
        ["--request-queue", "same", "--response-queue", "same"],
        ["--request-queue", "same", "--dead-letter-queue", "same"],
        ["--response-queue", "same", "--dead-letter-queue", "same"],
    ],
)
def test_consumer_options_that_exclude_each_other(options: list[str]) -> None:
    assert_refused(SCRIPTS["consumer"].run(*options), USAGE)


def test_a_usage_error_leaves_no_file_behind(tmp_path: Path) -> None:
    for script in SCRIPTS.values():
        script.run("--no-such-option")
    for options in (["--ttl", "59"], ["--ids-file", "missing"], ["--request-queue", "a", "--response-queue", "a"]):
        SCRIPTS["producer"].run(*options)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("script", [SCRIPTS["consumer"], SCRIPTS["maker"]], ids=["consumer", "maker"])
@pytest.mark.parametrize(
    "content",
    [None, "", "whsec_" + "A" * 28, "A" * 43 + "=", "whsec_!", "whsk_" + "A" * 43 + "=", "whsec_\n\n"],
    ids=lambda content: str(content)[:20],
)
def test_a_signing_secret_that_is_missing_or_weak_is_exit_4(
    script: Script, content: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
        path.chmod(0o600)
    assert_refused(script.run("--signing-secret-file", path), CREDENTIALS, hint=str(path))
    for nowhere in ("", "/", "missing/secret"):
        assert_refused(script.run("--signing-secret-file", nowhere), CREDENTIALS)
    assert_refused(script.run("--signing-secret-file", path, "--signing-secret-keyring", "me"), USAGE)
    assert [path.name for path in tmp_path.rglob("*.sqlite3")] == []


# Files


def newer(path: Path) -> None:
    ours(path)
    with_sqlite(path, "PRAGMA user_version = 99")


def foreign(path: Path) -> None:
    with_sqlite(path, "CREATE TABLE theirs (x); INSERT INTO theirs VALUES (1)")


def damaged(path: Path) -> None:
    ours(path)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 1000)


def no_database(path: Path) -> None:
    path.write_text("just a text file, and a dear one\n" * 50)


def a_directory(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def ours(path: Path) -> None:
    with open_queues(f"sqlite:///{path}") as queues:
        queues.post("q", [1])


def with_sqlite(path: Path, statements: str) -> None:
    connection = apsw.Connection(str(path))
    connection.execute(statements)
    connection.close()


def run_on(script: Script, option: str, path: Path) -> Ended:
    return script.run(option, f"sqlite:///{path}" if option == "--queue-url" else path)


def contents(directory: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in directory.iterdir()}


@each_file_option
@pytest.mark.parametrize("make", [a_directory, a_pipe, no_database, foreign, damaged, newer])
def test_a_file_that_cannot_be_used_is_refused_and_left_as_it_is(
    script: Script, option: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    make(directory / "file")
    before = contents(directory)
    assert_refused(run_on(script, option, directory / "file"), STORE, hint=str(directory / "file"))
    assert contents(directory) == before


@each_file_option
def test_a_file_in_a_directory_that_is_missing_is_refused(script: Script, option: str, tmp_path: Path) -> None:
    assert_refused(run_on(script, option, tmp_path / "missing" / "file"), STORE, hint="missing/file")
    assert not (tmp_path / "missing").exists()


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everything")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["widget_producer.py"], "--queue-url"),
        (["widget_consumer.py"], "--queue-url"),
        (["widget_maker.py"], "--database"),
        (["-m", "claim_queues", "stats"], "--queue-url"),
    ],
)
def test_a_file_without_write_permission_is_refused_and_left_as_it_is(
    command: list[str], option: str, tmp_path: Path
) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    path = directory / "file"
    ours(path)
    path.chmod(0o400)
    before = contents(directory)
    value = f"sqlite:///{path}" if option == "--queue-url" else str(path)
    ended = run_without_privileges([*command, option, value], HERE)
    assert_refused(ended, STORE, hint="not writable")
    assert contents(directory) == before


def run_without_privileges(command: list[str], cwd: Path) -> Ended:
    """Run Python with permissions that count, which they do not for root."""
    before = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    ended = subprocess.run(
        [*before, sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_check_finds_damage_that_the_others_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open_queues(f"sqlite:///{path}") as queues:
        queues.post("q", ["x" * 3000] * 100)
    content = bytearray(path.read_bytes())
    content[-40_960:-20_480] = b"\xaa" * 20_480
    path.write_bytes(content)
    ended = SCRIPTS["check"].run("--queue-url", f"sqlite:///{path}")
    assert (ended.code, ended.err) == (1, "")
    assert "failure" in ended.out
    assert "damaged" in ended.out


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "No such file"),
        (b"\xff\xfe\x00", "line 1: is no UTF-8 text"),
        (b"\x7fELF\x02\x01\xf0", "is no UTF-8 text"),
    ],
)
def test_an_ids_file_that_is_missing_or_no_text_posts_nothing(content: bytes | None, hint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "ids").write_bytes(content)
    assert_refused(SCRIPTS["producer"].run("--ids-file", tmp_path / "ids"), USAGE, hint=hint)
    assert_refused(SCRIPTS["producer"].run("--ids-file", tmp_path), USAGE, hint="Is a directory")


# Queue bodies

WIDGET_ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
POISON = [
    "hello",
    "<widget/>",
    "gASVCAAAAAAAAACMBHRlc3SULg==",
    "__import__('os').abort()",
    "\x1b[2J\r\nlevel=info \u2028\u202e",
    "x" * 200_000,
    " " * 200_000,
    None,
    True,
    5,
    2**63 - 1,
    [],
    {},
    [WIDGET_ID],
    {"widget_id": None},
    {"widget_id": 5},
    {"widget_id": [WIDGET_ID]},
    {"Widget_id": WIDGET_ID},
    {"id": WIDGET_ID},
]
TEMPTING = dict.fromkeys(
    ("url", "maker_url", "callback", "webhook", "host", "method", "path", "__class__", "__proto__"),
    "http://169.254.169.254/",
)
HOSTILE = {"headers": {"Host": "evil", "X-Evil": "1"}, "note": "a\r\nX-Evil: 1\x1b[2J%n{0.__class__}\u2028"}


def test_a_good_request_behind_1000_poisonous_ones_is_made_and_none_of_them_is_lost_or_steers_anything(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path / 'queues.sqlite3'}"
    poison = [POISON[number % len(POISON)] for number in range(1_000)]
    good = {"widget_id": WIDGET_ID} | TEMPTING | HOSTILE
    with open_queues(url) as queues, ScriptedMaker() as maker:
        for start in range(0, len(poison), 100):
            queues.post("itchy-octo-chainsaw-request", poison[start : start + 100])
        queues.post("itchy-octo-chainsaw-request", [good, {"widget_id": WIDGET_ID.upper()}])
        options = ["--queue-url", url, "--maker-url", maker.url, "--drain", "--slots", 1]
        ended = run_script("widget_consumer.py", *options, cwd=tmp_path)
        letters, responses = (
            [found.body for found in queues.browse(f"itchy-octo-chainsaw-{kind}", limit=2_000).messages]
            for kind in ("dead-letter", "response")
        )

    assert ended.returncode == 0
    assert [letter["body"] for letter in letters] == poison
    assert [(request.method, request.path, request.json) for request in maker.requests] == [
        ("POST", "/widgets", good),
        ("POST", "/widgets", {"widget_id": WIDGET_ID.upper()}),
    ]
    assert [request.headers["X-Evil"] for request in maker.requests] == [None, None]
    assert [request.headers["Host"] for request in maker.requests] == [f"127.0.0.1:{maker.port}"] * 2
    assert list(maker.widgets) == [WIDGET_ID]
    assert [response["outcome"] for response in responses] == ["failed"] * 1_000 + ["created"] * 2
    lines = ended.stderr.split("\n")[:-1]
    assert len(lines) == 1 + 1_000 + 2 + 1
    assert lines[-1].endswith("created=2 rejected=0 failed=1000")
    assert all(line.isprintable() and len(line) < 3_000 for line in lines)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("widget_producer.py", "--count", 2), 1),
        (("-m", "claim_queues", "stats"), 1),
        (("widget_consumer.py", "--drain"), 0),
    ],
    ids=["producer", "tool", "consumer"],
)
def test_without_a_stdout_what_writes_there_says_so_and_the_rest_works(
    words: tuple[object, ...], code: int, tmp_path: Path
) -> None:
    done = closed("1", *words, tmp_path=tmp_path)
    assert done.returncode == code, done.stderr
    assert ("Bad file descriptor" in done.stderr) == bool(code)
    assert "Traceback" not in done.stderr


def test_without_a_stderr_everything_works(tmp_path: Path) -> None:
    assert closed("2", "widget_producer.py", "--count", 2, tmp_path=tmp_path).stdout.count("\n") == 2
    assert closed("2", "widget_consumer.py", "--drain", "--claim-limit", 1, tmp_path=tmp_path).returncode == 0
    assert closed("2", "widget_consumer.py", "--no-such-option", tmp_path=tmp_path).returncode == USAGE


def closed(descriptor: str, *words: object, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """What a shell's `command >&-` or `2>&-` comes to, with a maker that makes all."""
    with ScriptedMaker() as maker:
        env = os.environ | {"WIDGET_MAKER_URL": maker.url, "WIDGET_QUEUE_URL": f"sqlite:///{tmp_path}/queue"}
        line = shlex.join([sys.executable, *map(str, words)])
        command = ["sh", "-c", f"exec {line} {descriptor}>&-"]
        return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=60, check=False)
