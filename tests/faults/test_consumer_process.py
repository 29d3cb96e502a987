"""The consumer as a process: signals, kill -9, a wrong maker, exit codes, logs and metrics."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path

import pytest
import requests
from scripted_maker import Raw, Reply, Request, ScriptedMaker
from support import Script, free_port, run_script, script, wait_until, widget_maker

import widget_consumer
from claim_queues.sqlite import SqliteQueues

REQUESTS, RESPONSES = "itchy-octo-chainsaw-request", "itchy-octo-chainsaw-response"
DEAD_LETTERS = "itchy-octo-chainsaw-dead-letter"


class Bench:
    """A queue file with ten requests and a maker that holds its answers back until `go_on` is set."""

    def __init__(self, directory: Path, maker: ScriptedMaker, queues: SqliteQueues) -> None:
        self.directory = directory
        self.maker = maker
        self.queues = queues
        self.options: list[object] = ["--queue-url", f"sqlite:///{directory / 'q.sqlite3'}", "--maker-url", maker.url]
        self.go_on = threading.Event()
        self.ids = [f"{number:08x}-54f4-11e5-ad75-3c970e65f731" for number in range(10)]
        queues.post(REQUESTS, [{"widget_id": id_} for id_ in self.ids])
        maker.answer = self._hold_back

    def _hold_back(self, request: Request) -> Reply:
        self.go_on.wait(30)
        return self.maker.real(request)

    def consumer(self, *options: object) -> AbstractContextManager[Script]:
        return script("widget_consumer.py", *self.options, *options, cwd=self.directory)

    def end_claims(self) -> None:
        """As if the claim TTL of every claim had passed."""
        with closing(sqlite3.connect(self.directory / "q.sqlite3")) as file, file:
            file.execute("UPDATE messages SET held_until = 1 WHERE claim IS NOT NULL")

    def outcomes(self) -> list[str]:
        return [message.body["outcome"] for message in self.queues.browse(RESPONSES, limit=1000).messages]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ScriptedMaker() as maker, SqliteQueues(tmp_path / "q.sqlite3") as queues:
        made = Bench(tmp_path, maker, queues)
        yield made
        made.go_on.set()


# Kill -9


def test_what_a_killed_consumer_held_is_received_again_after_the_claim_ttl_and_made_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_and_say_nothing(request: Request) -> Raw:
        bench.maker.real(request)
        return Raw(end="hang")

    bench.maker.answer = make_and_say_nothing
    with bench.consumer("--slots", "4", "--claim-ttl", "60") as killed:
        wait_until(lambda: len(bench.maker.requests) == 4)
        killed.kill()
    bench.maker.answer = bench.maker.real

    assert bench.queues.claim(REQUESTS, ttl=60, grace=60, limit=20) is None
    drain_ahead(bench, monkeypatch, seconds=61)

    assert bench.outcomes() == ["created"] * 10
    assert sorted(bench.maker.widgets) == bench.ids
    assert len(bench.maker.requests) == 4 + 10
    again = [request for request in bench.maker.requests[4:] if request.headers["X-Message-Receive-Count"] == "2"]
    assert len(again) == 10


def test_a_message_that_kills_its_consumer_is_posted_max_receives_times_and_takes_no_other_along(bench: Bench) -> None:
    killer, *innocents = bench.ids

    def kill(request: Request) -> Reply:
        if request.widget_id == killer:
            running.process.send_signal(signal.SIGKILL)
        return bench.maker.real(request)

    bench.maker.answer = kill
    for _ in range(3):
        with bench.consumer("--slots", "1", "--max-receives", "3") as running:
            assert running.exit_code() == -signal.SIGKILL
        bench.end_claims()
    with bench.consumer("--slots", "1", "--max-receives", "3", "--drain") as running:
        assert running.exit_code() == 0

    posted = [request.widget_id for request in bench.maker.requests]
    assert posted == [killer] * 3 + innocents
    assert bench.outcomes() == ["failed"] + ["created"] * 9
    letters = bench.queues.browse(DEAD_LETTERS).messages
    assert [letter.body["body"]["widget_id"] for letter in letters] == [killer]


def test_a_message_that_kills_its_consumer_takes_none_along_that_is_posted_at_the_same_time(bench: Bench) -> None:
    killer, *innocents = bench.ids

    def kill(request: Request) -> Reply | Raw:
        if request.widget_id == killer:
            with suppress(AssertionError):  # the others are not POSTed for ever beside it
                wait_until(lambda: len(bench.maker.requests) - before == 4, 0.5)
            running.process.send_signal(signal.SIGKILL)
        return Raw(end="hang")

    bench.maker.answer = kill
    for _ in range(3):
        before = len(bench.maker.requests)
        with bench.consumer("--slots", "4", "--max-receives", "3") as running:
            assert running.exit_code() == -signal.SIGKILL
        bench.end_claims()
    bench.maker.answer = bench.maker.real
    with bench.consumer("--slots", "4", "--max-receives", "3", "--drain") as running:
        assert running.exit_code() == 0

    assert sorted(bench.maker.widgets) == innocents
    assert [letter.body["body"]["widget_id"] for letter in bench.queues.browse(DEAD_LETTERS).messages] == [killer]


def drain_ahead(bench: Bench, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    """Drain the queue by a consumer, in this process, for which so many seconds have passed."""
    later = SqliteQueues(bench.directory / "q.sqlite3", clock=lambda: time.time() + seconds)
    monkeypatch.setattr(widget_consumer, "open_queues", lambda url: later)
    monkeypatch.setattr(widget_consumer, "configure_logging", lambda form, level: None)
    monkeypatch.setattr(widget_consumer, "run_until_signal", lambda work, stop: work())
    widget_consumer.cli.main([*map(str, bench.options), "--drain"], standalone_mode=False)


# Signals


def test_sigterm_lets_posts_in_flight_end_and_frees_the_rest_at_once(bench: Bench) -> None:
    with bench.consumer("--slots", "2") as consumer:
        wait_until(lambda: len(bench.maker.requests) == 2)
        consumer.signal(signal.SIGTERM)
        wait_until(lambda: bench.queues.stats(REQUESTS).free == 8)
        assert bench.queues.stats(REQUESTS).claimed == 2

        bench.go_on.set()
        assert consumer.exit_code() == 0

    assert bench.outcomes() == ["created", "created"]
    assert (bench.queues.stats(REQUESTS).free, len(bench.maker.requests)) == (8, 2)
    assert "Traceback" not in consumer.err


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_second_signal_ends_the_consumer_at_once(bench: Bench, second: int, code: int) -> None:
    with bench.consumer("--slots", "2") as consumer:
        wait_until(lambda: len(bench.maker.requests) == 2)
        consumer.signal(signal.SIGTERM)
        wait_until(lambda: "a second signal ends at once" in consumer.err)
        # Those that come too soon to be a second one change nothing.
        wait_until(lambda: consumer.signal(second) or consumer.process.poll() is not None, seconds=5)

        assert consumer.exit_code() == code

    assert (bench.queues.stats(REQUESTS).total, bench.outcomes()) == (10, [])
    assert consumer.err.splitlines()[-1].endswith(
        "warning second signal: ending at once; what is held is free when its claim ends"
    )


def test_signals_at_the_same_time_are_one(bench: Bench) -> None:
    with bench.consumer("--slots", "2") as consumer:
        wait_until(lambda: len(bench.maker.requests) == 2)
        # As GNU timeout does to a process and its group; here they differ, or the kernel might merge them.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            consumer.signal(number)
        wait_until(lambda: bench.queues.stats(REQUESTS).free == 8)
        bench.go_on.set()
        assert consumer.exit_code() == 0

    assert bench.outcomes() == ["created", "created"]
    assert bench.queues.stats(REQUESTS).claimed == 0
    assert "second signal:" not in consumer.err


STARTING = """
import signal, sys, time
import widget_consumer

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored

def swallow_interrupts(url):
    try:
        print("starting", flush=True)
        time.sleep(10)
    except KeyboardInterrupt:
        print("swallowed", flush=True)
    sys.exit(7)

widget_consumer.open_queues = swallow_interrupts
widget_consumer.main()
"""
"""A consumer, an import of which swallows KeyboardInterrupt as some that clean up do."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, -15), (signal.SIGHUP, -1)])
def test_a_signal_ends_a_consumer_that_is_starting(number: int, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", STARTING], stdout=subprocess.PIPE, text=True) as starting:
        assert starting.stdout
        assert starting.stdout.readline() == "starting\n"
        starting.send_signal(number)
        assert (starting.wait(5), starting.stdout.read()) == (code, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_an_idle_consumer_promptly(bench: Bench, number: int) -> None:
    bench.queues.purge(REQUESTS)
    with bench.consumer("--poll-interval", "20") as consumer:
        wait_until(lambda: "consuming" in consumer.err)
        consumer.signal(number)

        assert consumer.exit_code(seconds=2) == 0

    assert "Traceback" not in consumer.err


def test_sigterm_ends_a_consumer_that_waits_for_its_maker_promptly(bench: Bench) -> None:
    nobody = f"http://127.0.0.1:{free_port()}/widgets"
    with bench.consumer("--maker-url", nobody) as consumer:
        wait_until(lambda: "the maker is unavailable" in consumer.err)
        consumer.signal(signal.SIGTERM)

        assert consumer.exit_code(seconds=2) == 0

    left = bench.queues.stats(REQUESTS)
    assert (left.total, left.claimed) == (10, 0)


# A wrong maker


def test_a_wrong_maker_url_leaves_the_queue_full_and_asks_nobody_else(bench: Bench) -> None:
    with ScriptedMaker() as elsewhere:
        wrong = iter(
            [
                Reply(404, "<h1>Not found</h1>", {"Content-Type": "text/html"}),
                Reply(307, headers={"Location": elsewhere.url}),
                Reply(200, "<h1>Welcome</h1>", {"Content-Type": "text/html"}),
            ]
        )
        bench.maker.answer = lambda request: next(wrong, Reply(404))
        with bench.consumer("--max-receives", "1", "--slots", "1") as consumer:
            wait_until(lambda: len(bench.maker.requests) >= 3)
            consumer.signal(signal.SIGTERM)
            assert consumer.exit_code() == 0

        assert elsewhere.connections == 0
    assert bench.queues.stats(REQUESTS).total == 10
    assert bench.queues.stats(RESPONSES).total == bench.queues.stats(DEAD_LETTERS).total == 0
    assert consumer.err.count("check --maker-url") == 1


@pytest.mark.parametrize("batch", [1, 20])
def test_the_address_for_batches_leaves_the_queue_full_too(bench: Bench, tmp_path: Path, batch: int) -> None:
    with widget_maker(tmp_path) as (url, _):
        wrong = ["--maker-url", f"{url}/widgets/batch", "--post-batch", batch]
        with bench.consumer(*wrong, "--max-receives", "1") as consumer:
            wait_until(lambda: "single requests go to /widgets" in consumer.err)
            consumer.signal(signal.SIGTERM)
            assert consumer.exit_code() == 0
        checked = run_script("widget_consumer.py", *wrong, "--check", cwd=tmp_path)

    assert bench.queues.stats(REQUESTS).total == 10
    assert bench.queues.stats(RESPONSES).total == bench.queues.stats(DEAD_LETTERS).total == 0
    assert (checked.returncode, "single requests go to /widgets" in checked.stdout) == (1, True)


# Exit codes, logs, metrics


def test_a_queue_file_that_is_no_database_is_exit_code_5(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no database, and nothing to lose\n" * 100)

    ended = run_script("widget_consumer.py", "--queue-url", f"sqlite:///{file}", cwd=tmp_path)

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (5, "", 1)
    assert str(file) in ended.stderr
    assert file.read_text() == "no database, and nothing to lose\n" * 100


def test_a_receive_counts_file_that_is_no_database_is_exit_code_5(tmp_path: Path) -> None:
    (tmp_path / "counts").mkdir()

    ended = run_script("widget_consumer.py", "--receive-counts", "counts", cwd=tmp_path)

    assert (ended.returncode, ended.stderr.count("\n")) == (5, 1)


@pytest.mark.parametrize(
    "options",
    [
        ["--queue-url", "mysql://localhost/q"],
        ["--maker-url", "127.0.0.1:5000/widgets"],
        ["--maker-url", "http://user:secret@127.0.0.1/widgets"],
        ["--claim-ttl", "59"],
        ["--claim-ttl", "43201"],
        ["--grace", "59"],
        ["--slots", "0"],
        ["--max-receives", "0"],
        ["--deadline", "291"],
    ],
    ids=" ".join,
)
def test_a_value_that_cannot_work_is_exit_code_2(tmp_path: Path, options: list[str]) -> None:
    ended = run_script("widget_consumer.py", *options, cwd=tmp_path)

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("error: ")
    assert "secret" not in ended.stderr


def test_a_taken_metrics_port_is_exit_code_2(bench: Bench) -> None:
    options = [*bench.options, "--metrics-port", bench.maker.port]

    ended = run_script("widget_consumer.py", *options, cwd=bench.directory)

    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"metrics port {bench.maker.port}" in ended.stderr


def test_metrics_tell_what_happened_and_what_goes_on(bench: Bench) -> None:
    port = free_port()
    with bench.consumer("--slots", "2", "--metrics-port", port):
        wait_until(lambda: len(bench.maker.requests) == 2)
        busy = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
        assert requests.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
        bench.go_on.set()
        wait_until(lambda: len(bench.outcomes()) == 10)
        done = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text

    assert 'widget_consumer_messages{state="posting"} 2.0' in busy
    assert 'widget_consumer_messages{state="waiting"} 8.0' in busy
    assert "widget_consumer_slots_busy 2.0" in busy
    assert 'widget_consumer_queue_messages{queue="request",state="claimed"} 10.0' in busy
    assert 'widget_consumer_outcomes_total{outcome="created"} 10.0' in done
    assert "widget_consumer_post_duration_seconds_count 10.0" in done
    assert 'widget_consumer_breaker_state{state="closed"} 1.0' in done


def test_the_log_as_json_is_one_object_a_line(bench: Bench) -> None:
    bench.go_on.set()
    bench.queues.post(REQUESTS, [{"widget_id": "two\nlines \x1b[31m"}, "no request"])

    ended = run_script("widget_consumer.py", *bench.options, "--drain", "--log-format", "json", cwd=bench.directory)

    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    events = [line["event"] for line in lines]
    for line in lines[1:-1]:
        assert line["outcome"] == {"dead letter": "failed"}.get(line["event"], line["event"])
        assert (line["receives"], bool(line["message"])) == (1, True)
        if line["event"] != "dead letter":
            assert line["status"] == (201 if line["event"] == "created" else 422)
            assert (bool(line["widget"]), line["ms"] > 0) == (True, True)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert (events[0], events[-1]) == ("consuming", "drained")
    assert set(events[1:-1]) == {"created", "dead letter", "rejected"}
    assert events.count("created") == lines[-1]["created"] == 10


def test_the_log_as_text_is_one_line_an_event(bench: Bench) -> None:
    bench.go_on.set()
    bench.queues.purge(REQUESTS)
    bench.queues.post(REQUESTS, [{"widget_id": "two\nlines \x1b[31m"}])

    ended = run_script("widget_consumer.py", *bench.options, "--drain", cwd=bench.directory)

    assert ended.stderr.count("\n") == 3
    assert " rejected message=" in ended.stderr
    assert "outcome=" not in ended.stderr
    assert "\x1b" not in ended.stderr
