"""Producer, consumers and the real maker together, as processes, while things go wrong."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import Script, free_port, run_script, script, wait_until, widget_maker, widgets

from claim_queues.sqlite import SqliteQueues

REQUESTS, RESPONSES = "itchy-octo-chainsaw-request", "itchy-octo-chainsaw-response"
DEAD_LETTERS = "itchy-octo-chainsaw-dead-letter"
KNOWN_ID = "31f37378-54f4-11e5-ad75-3c970e65f731"


@pytest.fixture
def queues(tmp_path: Path) -> Iterator[SqliteQueues]:
    with SqliteQueues(tmp_path / "q.sqlite3") as opened:
        yield opened


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'q.sqlite3'}"


def submit(url: str, cwd: Path, *options: object) -> list[str]:
    """Submit requests; gives their widget ids."""
    ended = run_script("widget_producer.py", "--queue-url", url, *options, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    return [line.split()[1] for line in ended.stdout.splitlines()]


def outcomes(queues: SqliteQueues) -> Counter[tuple[str, str]]:
    """How often each (widget id, outcome) stands in the response queue."""
    bodies = [message.body for message in queues.browse(RESPONSES, limit=10_000).messages]
    return Counter((body["widget_id"], body["outcome"]) for body in bodies)


def left(queues: SqliteQueues) -> tuple[int, int]:
    """Requests and dead letters that are left."""
    return queues.stats(REQUESTS).total, queues.stats(DEAD_LETTERS).total


def test_two_consumers_and_a_maker_that_often_fails_make_each_widget_once(
    tmp_path: Path, queues: SqliteQueues, url: str
) -> None:
    ids = submit(url, tmp_path, "--count", 300)
    with widget_maker(tmp_path, "--fail-rate", 0.2) as (maker_url, _):
        options = ["--queue-url", url, "--maker-url", f"{maker_url}/widgets", "--drain", "--max-receives", 20]
        with (
            script("widget_consumer.py", *options, cwd=tmp_path) as one,
            script("widget_consumer.py", *options, cwd=tmp_path) as other,
        ):
            assert (one.exit_code(60), other.exit_code(60)) == (0, 0)
        made = widgets(maker_url)

    assert sorted(made) == sorted(ids)
    assert outcomes(queues) == Counter((id_, "created") for id_ in ids)
    assert left(queues) == (0, 0)
    assert "failed, comes back" in one.err + other.err


def test_a_maker_killed_in_the_middle_and_started_again_costs_nothing(
    tmp_path: Path, queues: SqliteQueues, url: str
) -> None:
    ids = submit(url, tmp_path, "--count", 200)
    port = free_port()
    options = ["--queue-url", url, "--maker-url", f"http://127.0.0.1:{port}/widgets", "--drain"]
    with ExitStack() as running:
        with widget_maker(tmp_path, "--latency", 0.05, port=port) as (_, maker):
            consumer = running.enter_context(script("widget_consumer.py", *options, cwd=tmp_path))
            wait_until(lambda: queues.stats(RESPONSES).total >= 50)
            maker.kill()
            wait_until(lambda: "the maker is unavailable" in consumer.err)
        assert left(queues)[0] > 0
        with widget_maker(tmp_path, port=port) as (maker_url, _):
            assert consumer.exit_code(90) == 0
            made = widgets(maker_url)

    assert sorted(made) == sorted(ids)
    assert outcomes(queues) == Counter((id_, "created") for id_ in ids)
    assert left(queues) == (0, 0)
    assert consumer.err.count("the maker is unavailable") == consumer.err.count("the maker is back") == 1


def test_an_id_that_always_fails_is_a_dead_letter_delays_nobody_and_can_be_brought_back(
    tmp_path: Path, queues: SqliteQueues, url: str
) -> None:
    submit(url, tmp_path, "--widget-id", KNOWN_ID)
    good = submit(url, tmp_path, "--count", 30)
    port = free_port()
    faults = ["--fail-rate", 1, "--latency", 1, "--fault-id", KNOWN_ID]
    with widget_maker(tmp_path, *faults, port=port) as (maker_url, _):
        options = ["--queue-url", url, "--maker-url", f"{maker_url}/widgets", "--drain", "--max-receives", 3]
        ended = run_script("widget_consumer.py", *options, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    own = (" consuming ", " waiting: ", " drained ")
    log = [line for line in ended.stderr.splitlines() if not any(event in line for event in own)]

    (letter,) = [message.body for message in queues.browse(DEAD_LETTERS).messages]
    assert (letter["body"], letter["receive_count"], letter["status"]) == ({"widget_id": KNOWN_ID}, 3, 500)
    assert outcomes(queues) == Counter([(KNOWN_ID, "failed"), *((id_, "created") for id_ in good)])
    assert [KNOWN_ID in line for line in log if " created " not in line] == [True] * 3
    assert all(KNOWN_ID in line for line in log[-2:])  # all others were done before it failed twice

    redriven = run_script("claim_queues", "redrive", "--queue-url", url, cwd=tmp_path)
    assert redriven.stdout.split()[0] == letter["request_id"]
    with widget_maker(tmp_path, port=port) as (maker_url, _):
        assert run_script("widget_consumer.py", *options, cwd=tmp_path).returncode == 0
        assert KNOWN_ID in widgets(maker_url)
    assert outcomes(queues)[KNOWN_ID, "created"] == 1
    assert left(queues) == (0, 0)


def test_with_no_option_at_all_three_scripts_in_three_directories_work_together(tmp_path: Path) -> None:
    port = free_port()
    env = {"WIDGET_PORT": str(port), "WIDGET_MAKER_URL": f"http://127.0.0.1:{port}/widgets"}
    directories = [tmp_path / name for name in ("one", "two", "three")]
    for directory in directories:
        directory.mkdir()

    with (
        script("widget_maker.py", cwd=directories[0], env=env) as maker,
        script("widget_consumer.py", cwd=directories[1], env=env) as consumer,
    ):
        good = run_script("widget_producer.py", f"--widget-id={KNOWN_ID}", "--wait", cwd=directories[2], env=env)
        bad_id = "this_is_not_a_valid_widget_id"
        bad = run_script("widget_producer.py", f"--widget-id={bad_id}", "--wait", cwd=directories[2], env=env)
        again = run_script("widget_producer.py", f"--widget-id={KNOWN_ID}", "--wait", cwd=directories[2], env=env)
        assert stop(consumer) == stop(maker) == 0

    assert (good.returncode, good.stdout) == (0, f"{KNOWN_ID} created\n")
    assert bad.returncode == 1
    assert bad.stdout.startswith(f"{bad_id} rejected ")
    assert len(bad.stdout.split()) > 3
    assert (again.returncode, again.stdout) == (0, f"{KNOWN_ID} created\n")
    assert not [path for path in directories[2].iterdir() if not path.name.startswith("widget_")]


def stop(running: Script) -> int:
    running.process.terminate()
    return running.exit_code()
