"""Bad input: on a command line one clear line and the right exit code, in a queue a dead letter that steers nothing."""

import re
from pathlib import Path

import click
import pytest
from doubles.scripted_maker import Reply
from in_process import Ended, run_command
from rig import REQUESTS, Rig

import widget_consumer
import widget_maker
import widget_producer
from claim_queues.__main__ import cli as tool

USAGE, CREDENTIALS, STORE = 2, 4, 5

Values = tuple[tuple[str, ...], tuple[str, ...]]
"""What an option refuses, and the extreme values that it takes."""


def whole(low: int, high: int) -> Values:
    return (str(low - 1), str(high + 1), "", "x", "1e2", "60.5", "9" * 23), (str(low), str(high))


def decimal(low: float, high: float) -> Values:
    return (str(low - 0.05), f"{high + 1:f}", "", "x", "inf", "nan"), (str(low), str(high))


ANY: Values = (), ()
NAME: Values = (("", "two words", "../x"), ())
URL: Values = (("queue", "http://127.0.0.1/", "sqlite:", "sqlite://host/x", "sqlite:///", "sqs://r?x=1"), ())
MAKER: Values = (("ftp://x/", "//host/x", "http:///x", "http://exa mple/", "http://x:99999/", "http://u:p@[::1]/"), ())
CLAIM, MESSAGE = whole(60, 43_200), whole(60, 1_209_600)
CHOICE: Values = (("", "xml"), ())
SECRET: Values = (("", "missing"), ())
QUEUES = {"--queue-url": URL, "--create": ANY}
REQUEST, RESPONSE, LETTERS = ({f"--{kind}-queue": NAME} for kind in ("request", "response", "dead-letter"))
ALL_QUEUES = QUEUES | REQUEST | RESPONSE | LETTERS
SERVER = {
    "--log-format": CHOICE,
    "--log-level": CHOICE,
    "--signing-secret-file": SECRET,
    "--signing-secret-keyring": ANY,
}
LIMIT = {"--limit": whole(1, 1_000_000_000)}
COMMANDS: dict[str, tuple[click.Command, list[str], dict[str, Values]]] = {
    "producer": (
        widget_producer.cli,
        [],
        QUEUES
        | REQUEST
        | RESPONSE
        | {"--widget-id": ANY, "--count": whole(1, 100_000_000), "--ids-file": (("missing", "/"), ())}
        | {"--ttl": MESSAGE, "--wait": ANY, "--timeout": decimal(0.1, 1_209_600), "--json": ANY},
    ),
    "consumer": (
        widget_consumer.cli,
        ["--drain"],  # so that one that takes what it should refuse comes to an end
        ALL_QUEUES
        | SERVER
        | {"--maker-url": MAKER, "--health-url": MAKER, "--allow-plain-http": ANY, "--claim-ttl": CLAIM}
        | {"--grace": CLAIM, "--claim-limit": whole(1, 20), "--slots": whole(1, 256), "--post-batch": whole(1, 20)}
        | {"--deadline": decimal(0.1, 43_190), "--max-receives": whole(2, 1000), "--poll-interval": decimal(0.1, 20)}
        | {"--response-ttl": MESSAGE, "--drain": ANY, "--drain-timeout": decimal(1, 1_209_600), "--check": ANY}
        | {"--receive-counts": ANY, "--metrics-port": whole(1, 65_535), "--metrics-host": ANY},
    ),
    "maker": (
        widget_maker.cli,
        ["--host", "no.such.invalid"],  # for the same reason
        SERVER
        | {"--host": ANY, "--port": whole(1, 65_535), "--database": ANY, "--fault-id": ANY}
        | {"--allowed-host": (("", "x:80", "http://x"), ())}
        | {"--fail-rate": decimal(0, 1), "--latency": decimal(0, 3600)}
        | {"--outage": (("", "5", "5:", ":5", "a:b", "-1:5", "1:2:3"), ("0:0", "2.5:30"))},
    ),
    "stats": (tool, ["stats"], ALL_QUEUES | {"--json": ANY}),
    "peek": (tool, ["peek"], ALL_QUEUES | LIMIT | {"--json": ANY}),
    "dead-letters": (tool, ["dead-letters"], QUEUES | LETTERS | LIMIT | {"--json": ANY}),
    "redrive": (tool, ["redrive"], QUEUES | REQUEST | LETTERS | LIMIT | {"--dry-run": ANY, "--ttl": MESSAGE}),
    "purge": (tool, ["purge", "request"], ALL_QUEUES | {"--yes": ANY}),
    "check": (tool, ["check"], ALL_QUEUES),
}
each_command = pytest.mark.parametrize(("cli", "words", "options"), COMMANDS.values(), ids=COMMANDS)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def assert_refused(ended: Ended, code: int = USAGE) -> None:
    """One line that says it, nothing on stdout, no traceback."""
    assert (ended.code, ended.out, ended.err.count("\n")) == (code, "", 1), ended
    assert ended.err.startswith("error: "), ended


# Options


@each_command
def test_each_option_has_a_row_here(cli: click.Command, words: list[str], options: dict[str, Values]) -> None:
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", run_command(cli, *words, "--help").out, flags=re.MULTILINE)
    assert set(shown) - {"--help", "--version"} == set(options)


@each_command
def test_an_option_refuses_what_it_cannot_use_and_takes_both_ends_of_its_range(
    cli: click.Command, words: list[str], options: dict[str, Values]
) -> None:
    for option, (bad, good) in options.items():
        code = CREDENTIALS if option == "--signing-secret-file" else USAGE
        for value in bad:
            assert_refused(run_command(cli, *words, option, value), code)
        for value in good:  # the help is shown once all options are read
            assert run_command(cli, *words, option, value, "--help").code == 0
            assert run_command(cli, *words, option, value, "--no-such-option").code == USAGE
        if bad and option not in ("--ids-file", "--signing-secret-file"):
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv(f"WIDGET_{option[2:].replace('-', '_').upper()}", bad[-1])
                assert run_command(cli, *words).code == USAGE


@each_command
def test_what_is_no_option_is_refused_and_leaves_no_file(
    cli: click.Command, words: list[str], options: dict[str, Values], tmp_path: Path
) -> None:
    for wrong in (["--no-such-option"], ["--no-such-option=1"], ["-x"], ["stray"], ["--", "--stray"]):
        assert_refused(run_command(cli, *words, *wrong))
    assert [path.name for path in tmp_path.rglob("*.sqlite3")] == []


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("maker", ["--fault-id", "x"]),
        ("producer", ["--timeout", "5"]),
        ("producer", ["--count", "1", "--widget-id", "a"]),
        ("producer", ["--widget-id", "a", "--ids-file", "-"]),
        ("producer", ["--request-queue", "same", "--response-queue", "SAME", "--wait"]),
        ("consumer", ["--deadline", "50.1", "--claim-ttl", "60"]),
        ("consumer", ["--drain-timeout", "5"]),
        ("consumer", ["--request-queue", "same", "--dead-letter-queue", "same"]),
        ("consumer", ["--maker-url", "http://maker.example/widgets"]),
        ("consumer", ["--signing-secret-file", "x", "--signing-secret-keyring", "me"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(command: str, options: list[str], tmp_path: Path) -> None:
    assert_refused(run_command(COMMANDS[command][0], *options))
    assert [path.name for path in tmp_path.rglob("*.sqlite3")] == []


# Files


@pytest.mark.parametrize(
    ("command", "option", "url"),
    [
        ("producer", "--queue-url", "sqlite:///{}"),
        ("consumer", "--queue-url", "sqlite:///{}"),
        ("consumer", "--receive-counts", "{}"),
        ("maker", "--database", "{}"),
        ("stats", "--queue-url", "sqlite:///{}"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_left_as_it_is(
    command: str, option: str, url: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("just a text file, and a dear one\n" * 50)
    cli, words, _ = COMMANDS[command]

    ended = run_command(cli, *words, option, url.format(file))

    *_, said = ended.err.splitlines()
    assert (ended.code, ended.out, said[:7], str(file) in said) == (STORE, "", "error: ", True), ended
    assert file.read_text() == "just a text file, and a dear one\n" * 50


# Bodies

BAD_BODIES = ["\x1b[2J\r\nlevel=info \u2028\u202e", "x" * 200_000, None, [{"widget_id": "a"}], {"widget_id": ["a"]}]
BAD_TEXTS = ['{"widget_id": "a", "n": Infinity}', '{"widget_id": "a"', "[" * 5_000]


def test_what_is_no_request_is_a_dead_letter_with_its_body_and_the_good_one_behind_is_made(rig: Rig) -> None:
    good = {"widget_id": "a\nb\x1b[2J", "url": "http://169.254.169.254/", "headers": {"Host": "evil", "X-Evil": "1"}}
    good["note"] = "a\r\nX-Evil: 1\x1b[2J%n{0.__class__}\u2028"
    rig.post_bodies(*BAD_BODIES)
    for text in BAD_TEXTS:
        rig.post_text(text)
    rig.post_bodies(good)

    consumer = rig.drain("--log-format", "text")

    assert [post.json for post in rig.maker.posts] == [good]
    assert rig.maker.posts[0].headers["X-Evil"] is None
    letters = sorted(rig.letters(), key=lambda letter: int(letter["request_id"].rpartition("-")[2]))
    assert [letter["body"] for letter in letters] == BAD_BODIES + BAD_TEXTS
    assert {letter["status"] for letter in letters} == {None}
    assert all("not a request" in letter["reason"] for letter in letters)
    assert sorted(response["outcome"] for response in rig.responses()) == ["created"] + ["failed"] * len(letters)
    assert all(line.isprintable() and len(line) < 2_000 for line in consumer.err.splitlines())


def test_odd_widget_ids_are_the_makers_business(rig: Rig) -> None:
    ids = ["", "ü€😀", "\ud800", "a\r\nX-Evil: 1", "../../x?y#z", "x" * 60_000, "İ"]
    rig.post(*ids)

    consumer = rig.drain()

    assert sorted(post.widget_id for post in rig.maker.posts) == sorted(ids)
    assert len(consumer.events("created")) == len(ids)  # each is one line of the log
    assert rig.outcomes() == dict.fromkeys(ids, "created")


def test_a_dead_letter_that_no_queue_would_take_leaves_its_message_queued(rig: Rig) -> None:
    rig.post_bodies("x" * 262_100)
    with rig.consumer() as consumer:
        rig.wait(lambda: rig.queues.stats(REQUESTS).delayed == 1, hurry=False)
        [event] = consumer.events("no queue accepts the outcome: message stays queued")
    assert (event["level"], rig.left(), rig.letters(), rig.responses()) == ("error", 1, [], [])


def test_an_endless_reason_is_cut_so_that_it_fits_a_queue(rig: Rig) -> None:
    rig.post("w")
    rig.maker.answer = lambda post: Reply(422, {"error": {"code": "x", "message": "why? " * 100_000}})

    rig.drain()

    [response] = rig.responses()
    assert (response["outcome"], response["status"], rig.left(), rig.letters()) == ("rejected", 422, 0, [])
    assert 100 < len(response["reason"]) <= 1_000
