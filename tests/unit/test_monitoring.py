"""What a real consumer at work tells of itself over HTTP."""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from doubles.scripted_maker import Post, Reply, ScriptedMaker
from doubles.troubled_queues import TroubledQueues
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from rig import OPTIONS, working
from support import ANSWER_S, free_port, wait_until

from claim_queues import QueueForbidden
from claim_queues.sqlite import SqliteQueues
from receive_counts import ReceiveCounts
from widget_consumer import Consumer
from widgets.delivery import Maker
from widgets.monitoring import watched

QUEUES = {"request_queue": "requests", "response_queue": "responses", "dead_letter_queue": "letters"}
REJECTED = Reply(422, {"error": {"code": "bad", "message": "no such \ud83d widget"}})


class Bench:
    """A consumer that is watched, and what it works with. url: where it is served."""

    def __init__(self, directory: Path, maker: ScriptedMaker, closing: ExitStack) -> None:
        self.maker = maker
        self.file = directory / "q"
        self.real = closing.enter_context(SqliteQueues(self.file))
        self.queues: Any = TroubledQueues(self.real)
        counts = ReceiveCounts(directory / "counts", "requests")
        closing.callback(counts.close)
        for name in QUEUES.values():
            self.real.create(name)
        self._maker = Maker(maker.url, deadline=30)
        self.consumer = Consumer(self.queues, self._maker, counts, OPTIONS)

    def post(self, *ids: str) -> None:
        self.real.post("requests", [{"widget_id": id_} for id_ in ids])

    def working(self) -> AbstractContextManager[Future[None]]:
        return working(self.consumer)

    @contextmanager
    def watched(self, host: str = "127.0.0.1", queue_url: str = "", port: int = 0) -> Iterator[None]:
        port = port or free_port()
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        given = {"metrics_host": host, "metrics_port": port, "log_format": "text"}
        with watched(self.consumer, self._maker, QUEUES | given | {"queue_url": queue_url or f"sqlite:///{self.file}"}):
            yield

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(self.url + path, headers=headers, timeout=ANSWER_S)

    def metrics(self) -> dict[str, float]:
        return samples(self.get("/metrics").text)

    def troubles(self) -> dict[str, str]:
        """What keeps it from being ready."""
        found = self.get("/readyz")
        reasons: dict[str, str] = found.json()
        status = reasons.pop("status")
        assert (found.status_code, status) == ((503, "not ready") if reasons else (200, "ok"))
        return reasons


def samples(text: str) -> dict[str, float]:
    """Each sample by its name, without the prefix of the consumer's, and its labels' values."""
    return {
        " ".join([sample.name.removeprefix("widget_consumer_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ScriptedMaker() as maker, ExitStack() as closing:
        yield Bench(tmp_path, maker, closing)


def test_metrics_count_what_the_consumer_does(bench: Bench) -> None:
    def answer(post: Post) -> Any:
        if post.widget_id == "fails once" and len(bench.maker.posts_of("fails once")) == 1:
            return 500
        return REJECTED if post.widget_id == "bad" else bench.maker.make(post)

    bench.maker.answer = answer
    bench.post("a", "b", "bad", "fails once")
    bench.real.post("requests", ["no request"])
    with bench.watched(), bench.working():
        wait_until(lambda: bench.real.stats("responses").total == 5)
        wait_until(lambda: bench.metrics()["messages held"] == 0)
        wait_until(lambda: "queue_oldest_age_seconds request" not in bench.metrics())
        found = bench.metrics()
        assert bench.get("/metrics").headers["Content-Type"] == CONTENT_TYPE_LATEST
    wanted = {
        "receives_total": 6,
        "redeliveries_total": 1,
        "outcomes_total created": 3,
        "outcomes_total rejected": 1,
        "outcomes_total failed": 1,
        "returns_total failed": 1,
        "returns_total excused": 0,
        "claims_lost_total": 0,
        "slots_busy": 0,
        "breaker_state closed": 1,
        "breaker_state misconfigured": 0,
        "service_failing settle": 0,
        "post_duration_seconds_count": 5,
        "queue_messages request free": 0,
        "queue_messages dead_letter free": 1,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["queue_oldest_age_seconds dead_letter"] >= 0
    assert found["process_open_fds"] > 0


def test_what_is_in_flight_is_held_and_waits_for_its_slot(bench: Bench) -> None:
    bench.maker.answer = lambda post: bench.maker.hang()
    bench.post("a", "b", "c")
    with bench.watched(), bench.working():
        wait_until(lambda: len(bench.maker.posts) == 2)
        wait_until(lambda: bench.metrics().get("queue_messages request claimed", 0) >= 2)
        found = bench.metrics()
        assert (found["slots_busy"], found["messages held"]) == (2, found["queue_messages request claimed"])
        bench.maker.answer = bench.maker.make
        bench.maker.release()


@pytest.mark.slow
def test_an_outage_of_the_maker_is_reported_with_its_reasons_and_is_no_cause_to_restart(bench: Bench) -> None:
    bench.post(*map(str, range(12)))
    with bench.watched(), bench.working():
        wait_until(lambda: bench.metrics()["outcomes_total created"] == 12)  # its health page was asked, and was well
        assert bench.troubles() == {}
        bench.maker.health = Reply(503)
        bench.maker.answer = lambda post: 503
        bench.post(*(f"more {number}" for number in range(12)))
        wait_until(lambda: bench.troubles().keys() == {"maker", "breaker"})
        assert bench.troubles() == {"maker": f"{bench.maker.url}: HTTP 503", "breaker": "HTTP 503: scripted 503"}
        states = {name: value for name, value in bench.metrics().items() if name.startswith("breaker_state")}
        assert {name for name, value in states.items() if value} == {"breaker_state unavailable"}
        assert bench.get("/healthz").status_code == 200
        with bench.maker.down():
            wait_until(lambda: "onnect" in bench.troubles()["maker"])
        bench.maker.health, bench.maker.answer = Reply(200), bench.maker.make
        wait_until(lambda: bench.troubles() == {})


def test_outcomes_that_cannot_be_stored_are_reported_with_the_reason(bench: Bench) -> None:
    bench.queues.fails["settle"] = lambda: QueueForbidden("SendMessage is denied")
    bench.post("a")
    with bench.watched(), bench.working():
        wait_until(lambda: bench.troubles() == {"settle": "SendMessage is denied"})
        found = bench.metrics()
        assert (found["service_failing settle"], found["service_failing claim"], found["messages held"]) == (1, 0, 1)
        bench.queues.fails.clear()
        wait_until(lambda: bench.troubles() == {})
        assert bench.metrics()["service_failing settle"] == 0
    assert bench.real.stats("responses").total == 1


def test_queues_that_cannot_be_looked_at_any_more_are_reported_and_only_their_numbers_left_out(bench: Bench) -> None:
    with bench.watched():
        wait_until(lambda: "queue_messages request free" in bench.metrics())
        bench.file.rename(bench.file.with_name("elsewhere"))
        wait_until(lambda: "was removed" in bench.troubles().get("queue", ""))
        wait_until(lambda: not [name for name in bench.metrics() if name.startswith("queue_")])
        assert bench.metrics()["slots_busy"] == 0


def test_a_queue_service_that_is_silent_holds_up_no_answer(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"zaqar://?endpoint=http://127.0.0.1:{silent.getsockname()[1]}&project=p"
        began = time.monotonic()
        with bench.watched(queue_url=url):
            assert bench.troubles().keys() == {"queue"}
            assert "slots_busy" in bench.metrics()
        assert time.monotonic() - began < 20


def test_a_consumer_that_stops_is_neither_healthy_nor_ready(bench: Bench) -> None:
    with bench.watched(), bench.working():
        wait_until(lambda: bench.troubles() == {})
        assert (bench.get("/healthz").status_code, bench.get("/healthz").json()) == (200, {"status": "ok"})
        bench.consumer.stop()
        assert (bench.get("/healthz").status_code, bench.get("/healthz").json()) == (503, {"status": "stopping"})
        assert bench.troubles() == {"consumer": "it is stopping"}
        assert ">Stopping<" in bench.get("/").text


def test_the_page_shows_what_goes_on_without_files_from_outside(bench: Bench) -> None:
    bench.maker.answer = lambda post: REJECTED if post.widget_id == "bad" else bench.maker.make(post)
    bench.post("bad", *map(str, range(1234)))
    with bench.watched(), bench.working():
        wait_until(lambda: bench.real.stats("responses").total == 1235, 90)
        wait_until(lambda: ">1,234</dd>" in bench.get("/").text)
        found = bench.get("/")
        targets = re.findall('(?:href|src|action)="(.*?)"', found.text)
        assert re.search(r"[012] of 2</dd>", found.text)  # slots
        assert {"/metrics", "/healthz", "/readyz"} <= set(targets)
        assert [target for target in targets if not target.startswith("/") or not bench.get(target).ok] == []
    for words in (">Working<", '<noscript><meta http-equiv="refresh"', "p99 of the last 500", bench.maker.url):
        assert words in found.text
    failure = r"no such \\ud83d widget.*</p>\s*<p class=.note.>.* UTC: rejected, receive 1 of message"
    assert re.search(failure, found.text)


def test_a_maker_whose_health_page_is_wrong_is_working(bench: Bench) -> None:
    bench.maker.health = Reply(503)
    bench.post("w")
    with bench.watched(), bench.working():
        wait_until(lambda: bench.consumer.metrics.totals()["created"])
        wait_until(lambda: ">Working<" in bench.get("/").text)
        assert bench.metrics()["maker_well"] == 0


@pytest.mark.parametrize(("host", "says"), [("no.such.invalid", ""), ("ä" * 70, ""), ("127.0.0.1", "in use")])
def test_a_place_that_cannot_be_listened_at_is_an_error_that_names_it(bench: Bench, host: str, says: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        names_it = pytest.raises(OSError, match=f"cannot listen at {host} port {port}: (?!Unknown error).*{says}")
        with names_it, bench.watched(host=host, port=port):
            pass


def test_the_page_shows_trouble_as_text(bench: Bench) -> None:
    bench.consumer.trouble.begins("claim", QueueForbidden("<script>alert(1)</script>"))
    with bench.watched():
        text = bench.get("/").text
    assert ">Waiting for the queue service<" in text
    assert "Claim: &lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("path", ["/", "/metrics", "/readyz"])
def test_no_other_web_site_reads_what_this_machine_alone_may(bench: Bench, path: str) -> None:
    with bench.watched():
        assert bench.get(path, Host="fade.de:9100").status_code == 421  # hexadecimal, as an address
        assert bench.get(path, Host="10.1.2.3:9100").status_code == 200
        assert bench.get("/healthz", Host="probed.example").status_code == 200


def test_one_that_others_may_reach_answers_to_any_name(bench: Bench) -> None:
    with bench.watched(host="0.0.0.0"):
        assert bench.get("/metrics", Host="consumer.example:9100").status_code == 200


def test_its_port_is_free_again_after_the_end(bench: Bench) -> None:
    port = free_port()

    def is_free() -> bool:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return True
        return False

    with bench.watched(port=port):
        assert bench.get("/").ok
    wait_until(is_free)
