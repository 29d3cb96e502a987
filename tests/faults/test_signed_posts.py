"""Consumer and maker as processes that share a signing secret, or do not; and that nobody else learns it."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from signing_double import KEY, OLD_KEY, OLD_SECRET, SECRET, signed, traces
from support import Script, run_script, script, wait_until, widget_maker, widgets

from claim_queues.sqlite import SqliteQueues

IDS = [f"{number:08x}-54f4-11e5-ad75-3c970e65f731" for number in range(5)]
REQUESTS, RESPONSES, DEAD_LETTERS = (f"itchy-octo-chainsaw-{kind}" for kind in ("request", "response", "dead-letter"))
EXIT_CREDENTIALS = 4


class Place:
    """A directory with a queue file and files of secrets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path / 'queues.sqlite3'}"
        self.queues = SqliteQueues(path / "queues.sqlite3")

    def secrets(self, name: str, *secrets: str) -> list[object]:
        (self.path / name).write_text("\n".join(secrets) + "\n")
        return ["--signing-secret-file", self.path / name]

    @contextmanager
    def consumer(self, maker_url: str, *options: object) -> Iterator[Script]:
        words = ["--queue-url", self.url, "--maker-url", f"{maker_url}/widgets", "--log-level", "debug"]
        with script("widget_consumer.py", *words, *options, cwd=self.path) as consumer:
            yield consumer

    def submit(self, *widget_ids: str) -> None:
        self.queues.post(REQUESTS, [{"widget_id": widget_id} for widget_id in widget_ids])

    def bodies(self, queue: str) -> list[Any]:
        return [message.body for message in self.queues.browse(queue, limit=100, claimed=True).messages]

    def all_created(self, count: int) -> bool:
        return [body["outcome"] for body in self.bodies(RESPONSES)] == ["created"] * count


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    with made.queues:
        yield made


@pytest.mark.parametrize("batch", [1, 5])
def test_who_shares_the_secret_gets_widgets_and_others_lose_nothing(place: Place, batch: int) -> None:
    place.submit(*IDS)
    with widget_maker(place.path, *place.secrets("makers", SECRET)) as (url, _):
        for wrong in ([], place.secrets("wrong", OLD_SECRET)):
            with place.consumer(url, "--post-batch", batch, *wrong) as consumer:
                wait_until(lambda consumer=consumer: "the maker refuses us" in consumer.err)
                consumer.signal(signal.SIGTERM)
                assert consumer.exit_code() == 0
                assert "HTTP 401: Standard Webhooks:" in consumer.err
        assert (widgets(url), place.bodies(RESPONSES), place.queues.stats(REQUESTS).total) == ([], [], len(IDS))
        with place.consumer(url, "--post-batch", batch, "--drain", *place.secrets("right", SECRET)) as consumer:
            assert consumer.exit_code() == 0
        assert sorted(widgets(url)) == IDS
        assert place.all_created(len(IDS))


def test_the_secret_is_changed_while_all_goes_on(place: Place) -> None:
    old, both, new = (
        place.secrets("old", OLD_SECRET),
        place.secrets("both", SECRET, OLD_SECRET),
        place.secrets("new", SECRET),
    )
    steps = [(old, old), (both, old), (both, both), (both, new), (new, both), (new, new)]
    for number, (makers, consumers) in enumerate(steps, 1):
        place.submit(f"{number:08x}-54f4-11e5-ad75-3c970e65f731")
        with widget_maker(place.path, *makers) as (url, _), place.consumer(url, "--drain", *consumers) as consumer:
            assert consumer.exit_code() == 0
        assert place.all_created(number)


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-signature": "v1,\xe9\xff"},
        {"webhook-id": "\xe9"},
        {"webhook-signature": ",".join(["v1"] * 1_000)},
        {"webhook-timestamp": "9" * 5_000},
        {"webhook-signature": None},
    ],
    ids=["not ASCII", "id not ASCII", "commas", "time", "none"],
)
def test_a_real_server_answers_hostile_signatures_with_401(place: Place, change: dict[str, str | None]) -> None:
    body = json.dumps({"widget_id": IDS[0]}).encode()
    with widget_maker(place.path, *place.secrets("makers", SECRET)) as (url, maker):
        headers = {"Content-Type": "application/json"} | signed(body) | change
        encoded = {name: value.encode("latin-1") for name, value in headers.items() if value is not None}
        answer = requests.post(f"{url}/widgets", data=body, headers=encoded, timeout=5)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "bad_signature")
        many = encoded | {"webhook-signature": b" ".join([b"v1,AAAA"] * 20_000)}
        assert requests.post(f"{url}/widgets", data=body, headers=many, timeout=5).status_code == 431
        assert widgets(url) == []
        assert "Traceback" not in maker.err


# The secret stays secret: both keys of the doubles begin with "canary"


def seen_from_outside() -> str:
    """The command lines and environments of all processes."""
    found = []
    for name in ("cmdline", "environ"):
        for path in Path("/proc").glob(f"[0-9]*/{name}"):
            try:
                found.append(path.read_text(errors="replace"))
            except OSError:
                continue
    return "".join(found)


def test_no_secret_is_in_a_log_an_error_a_process_list_a_queue_or_a_file(place: Place) -> None:
    place.submit(*IDS, "this_is_not_a_valid_widget_id")
    place.queues.post(REQUESTS, ["no request"])
    makers, consumers = place.secrets("makers", SECRET), place.secrets("consumers", SECRET, OLD_SECRET)
    said = []
    with (
        widget_maker(place.path, *makers, "--log-level", "debug", "--fail-rate", 1) as (url, failing),
        place.consumer(url, *consumers, "--max-receives", 1) as consumer,
    ):
        wait_until(lambda: len(place.bodies(DEAD_LETTERS)) >= 3)
        running = seen_from_outside()
        failing.kill()
        place.submit(*IDS)
        wait_until(lambda: "the maker is unavailable" in consumer.err)
        said += [consumer.out, consumer.err, failing.out, failing.err]
    with widget_maker(place.path, *place.secrets("other", OLD_SECRET), "--log-level", "debug") as (url, maker):
        with place.consumer(url, *makers) as consumer:
            place.submit(*IDS)
            wait_until(lambda: "the maker refuses us" in consumer.err)
            said += [consumer.out, consumer.err]
        said += [requests.get(f"{url}{path}", timeout=5).text for path in ("/", "/metrics", "/openapi.json")]
        said += [maker.out, maker.err]
    weak = place.secrets("weak", SECRET, SECRET[:30])
    for name in ("widget_maker.py", "widget_consumer.py"):
        ended = run_script(name, *weak, cwd=place.path)
        assert ended.returncode == EXIT_CREDENTIALS
        said += [ended.stdout, ended.stderr]
        given = run_script(name, "--signing-secret-file", SECRET, cwd=place.path)
        said += [given.stdout, given.stderr]
    kept = [path.read_text(errors="replace") for path in place.path.rglob("*") if "sqlite3" in path.name]
    queued = json.dumps(place.bodies(DEAD_LETTERS) + place.bodies(RESPONSES))

    assert "widget_consumer.py\0--queue-url" in running
    assert len(kept) >= 3
    everything = "".join([running, *said, *kept, queued])
    for trace in traces(KEY) + traces(OLD_KEY):
        assert trace not in everything
        assert trace[:20] not in everything


def test_a_preflight_signs_too(place: Place) -> None:
    words = ["--check", "--queue-url", place.url, "--maker-url"]
    with widget_maker(place.path, *place.secrets("makers", SECRET)) as (url, _):
        shared, not_shared = (
            run_script("widget_consumer.py", *words, f"{url}/widgets", *secrets, cwd=place.path)
            for secrets in (place.secrets("consumers", SECRET), [])
        )

    assert (shared.returncode, not_shared.returncode) == (0, 1)
    (failure,) = (line for line in not_shared.stdout.splitlines() if line.startswith("failure maker"))
    assert "give the consumer this maker's --signing-secret-file" in failure
    assert "--maker-url" not in failure
