"""Consumer and maker as processes that share a signing secret, or do not; and that nobody else learns it."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from doubles.signing_double import KEY, OLD_KEY, OLD_SECRET, SECRET, traces
from support import Script, run_script, script, wait_until, widget_maker, widgets

from claim_queues.sqlite import SqliteQueues

IDS = [f"{number:08x}-54f4-11e5-ad75-3c970e65f731" for number in range(5)]
REQUESTS, RESPONSES, DEAD_LETTERS = (f"itchy-octo-chainsaw-{kind}" for kind in ("request", "response", "dead-letter"))


class Place:
    """A directory with a queue file and files of secrets."""

    def __init__(self, path: Path, queues: SqliteQueues) -> None:
        self.path, self.queues = path, queues

    def secrets(self, name: str, *secrets: str) -> list[object]:
        (self.path / name).write_text("\n".join(secrets) + "\n")
        return ["--signing-secret-file", self.path / name]

    @contextmanager
    def consumer(self, maker_url: str, *options: object) -> Iterator[Script]:
        words = ["--queue-url", f"sqlite:///{self.path}/q.sqlite3", "--maker-url", f"{maker_url}/widgets", "--create"]
        with script("widget_consumer.py", *words, "--log-level", "debug", *options, cwd=self.path) as consumer:
            yield consumer

    def submit(self, *widget_ids: str) -> None:
        self.queues.post(REQUESTS, [{"widget_id": widget_id} for widget_id in widget_ids])

    def bodies(self, queue: str) -> list[Any]:
        return [message.body for message in self.queues.browse(queue, limit=100)[0]]

    def outcomes(self) -> list[str]:
        return [body["outcome"] for body in self.bodies(RESPONSES)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with SqliteQueues(tmp_path / "q.sqlite3") as queues:
        yield Place(tmp_path, queues)


@pytest.mark.parametrize("batch", [1, 5])
def test_who_shares_the_secret_gets_widgets_and_others_lose_nothing(place: Place, batch: int) -> None:
    place.submit(*IDS)
    with widget_maker(place.path, *place.secrets("makers", SECRET)) as (url, _):
        for wrong in ([], place.secrets("wrong", OLD_SECRET)):
            with place.consumer(url, "--post-batch", batch, *wrong) as consumer:
                wait_until(lambda consumer=consumer: "HTTP 401: Standard Webhooks: " in consumer.err)
                consumer.signal(signal.SIGTERM)
                assert consumer.exit_code() == 0
        assert (widgets(url), place.outcomes(), place.queues.stats(REQUESTS).total) == ([], [], len(IDS))
        with place.consumer(url, "--post-batch", batch, "--drain", *place.secrets("right", SECRET)) as consumer:
            assert consumer.exit_code() == 0
        assert (sorted(widgets(url)), place.outcomes()) == (IDS, ["created"] * len(IDS))


@pytest.mark.slow
def test_the_secret_is_changed_while_all_goes_on(place: Place) -> None:
    old, both = place.secrets("old", OLD_SECRET), place.secrets("both", SECRET, OLD_SECRET)
    new = place.secrets("new", SECRET)
    steps = [(old, old), (both, old), (both, both), (both, new), (new, both), (new, new)]
    for number, (makers, consumers) in enumerate(steps, 1):
        place.submit(f"{number:08x}-54f4-11e5-ad75-3c970e65f731")
        with widget_maker(place.path, *makers) as (url, _), place.consumer(url, "--drain", *consumers) as consumer:
            assert consumer.exit_code() == 0
        assert place.outcomes() == ["created"] * number


def test_no_secret_is_in_a_log_an_error_a_process_list_a_queue_or_a_file(place: Place) -> None:
    place.submit(*IDS, "this_is_not_a_valid_widget_id")
    place.queues.post(REQUESTS, ["no request"])
    makers, consumers = place.secrets("makers", SECRET), place.secrets("consumers", SECRET, OLD_SECRET)
    with (
        widget_maker(place.path, *makers, "--log-level", "debug", "--fail-rate", 1) as (url, failing),
        place.consumer(url, *consumers) as consumer,
    ):
        wait_until(lambda: place.bodies(DEAD_LETTERS) and "rejected" in place.outcomes())
        seen = [
            Path(f"/proc/{one.process.pid}/{what}") for one in (consumer, failing) for what in ("cmdline", "environ")
        ]
        said = [path.read_text(errors="replace") for path in seen]
        assert "widget_consumer.py\0--queue-url" in said[0]
        failing.kill()
        said += [consumer.out, consumer.err, failing.out, failing.err]
    with widget_maker(place.path, *place.secrets("other", OLD_SECRET), "--log-level", "debug") as (url, maker):
        with place.consumer(url, *makers) as consumer:
            place.submit(*IDS)
            wait_until(lambda: "HTTP 401" in consumer.err)
            said += [consumer.out, consumer.err]
        said += [requests.get(f"{url}{path}", timeout=5).text for path in ("/", "/metrics", "/openapi.json")]
        said += [maker.out, maker.err]
    weak = place.secrets("weak", SECRET, SECRET[:30])
    for name in ("widget_maker.py", "widget_consumer.py"):
        for words, code in ((weak, 4), (["--signing-secret-file", SECRET], 2)):
            ended = run_script(name, *words, cwd=place.path)
            assert (ended.returncode, len(ended.stderr.splitlines())) == (code, 1)
            said += [ended.stdout, ended.stderr]
    kept = [path.read_text(errors="replace") for path in place.path.rglob("*") if "sqlite3" in path.name]
    assert len(kept) >= 3
    everything = "".join([*said, *kept, json.dumps(place.bodies(DEAD_LETTERS) + place.bodies(RESPONSES))])
    for trace in traces(KEY) + traces(OLD_KEY):
        assert trace not in everything
        assert trace[:20] not in everything
