"""What a consumer tells of itself over HTTP, with a consumer whose every number a test decides, and with a real one."""

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from scripted_maker import Raw, Reply, ScriptedMaker
from support import HERE, free_port, tool_or_skip, wait_until

import monitoring
from claim_queues import QueueUnavailable, Stats, fresh
from claim_queues.breaker import Failure
from claim_queues.sqlite import SqliteQueues
from delivery import Durations, Maker
from monitoring import Monitor, serve
from widget_maker import create_app

NAMES = {"request": "requests", "dead_letter": "dead-letters"}
STATUS = {"claims": 2, "held": 12, "waiting": 7, "posting": 5, "busy_slots": 4}


class Consumer:
    """As much of a consumer as a monitor looks at."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.post_times = Durations()
        self.maker_trouble: Failure | None = None
        self.is_stuck = False

    def status(self) -> dict[str, int]:
        return STATUS


class Service(SqliteQueues):
    """A queue service whose stats a test decides. asked: how often it was asked for them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[str] = []
        self.answer: Callable[[str], Stats] = super().stats

    def stats(self, queue: str) -> Stats:
        self.asked.append(queue)
        return self.answer(queue)


class Bench:
    """A monitor that is served, and what it looks at."""

    def __init__(self, service: Service, maker: ScriptedMaker, port: int) -> None:
        self.consumer = Consumer()
        self.service = service
        self.maker = maker
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(self.url + path, headers=headers, timeout=10)

    def metrics(self) -> dict[str, float]:
        """Each sample by its name and labels, as `name{label="value"}`."""
        return samples(self.get("/metrics").text)


def samples(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(monitoring, "PATIENCE_S", 0.3)
    monkeypatch.setattr(fresh, "KEEP_S", 0.0)
    port = free_port()
    with ScriptedMaker() as maker, Service(tmp_path / "q.sqlite3") as service:
        made = Bench(service, maker, port)
        monitor: Any = made.consumer
        with serve(Monitor(monitor, Maker(maker.url, deadline_s=5), service, NAMES), port):
            yield made


# Metrics


def test_metrics_tell_what_the_consumer_counted(bench: Bench) -> None:
    bench.consumer.totals.update(received=20, redelivered=3, created=9, failed=1, retried=2, excused=4, lost=5)
    bench.service.post("requests", [1, 2])
    found = bench.metrics()
    assert {name: found[f"widget_consumer_{name}"] for name in WANTED} == WANTED


WANTED = {
    "receives_total": 20,
    "redeliveries_total": 3,
    'outcomes_total{outcome="created"}': 9,
    'outcomes_total{outcome="rejected"}': 0,
    'outcomes_total{outcome="failed"}': 1,
    'returns_total{why="failed"}': 2,
    'returns_total{why="excused"}': 4,
    "claims_lost_total": 5,
    "claims_held": 2,
    'messages{state="held"}': 12,
    'messages{state="waiting"}': 7,
    'messages{state="posting"}': 5,
    "slots_busy": 4,
    'breaker_state{state="closed"}': 1,
    'breaker_state{state="misconfigured"}': 0,
    'queue_messages{queue="request",state="free"}': 2,
    'queue_messages{queue="dead_letter",state="free"}': 0,
}


def test_metrics_are_prometheus_text(bench: Bench) -> None:
    assert bench.get("/metrics").headers["Content-Type"] == CONTENT_TYPE_LATEST


def test_post_times_are_a_histogram_in_seconds(bench: Bench) -> None:
    for seconds in (0.0005, 0.001, 0.3, 99):
        bench.consumer.post_times.add(seconds)
    name, found = "widget_consumer_post_duration_seconds", bench.metrics()
    assert [found[f'{name}_bucket{{le="{le}"}}'] for le in ("0.001", "0.25", "0.5", "60.0", "+Inf")] == [2, 2, 3, 3, 4]
    assert (found[f"{name}_count"], round(found[f"{name}_sum"], 4)) == (4, 99.3015)


@pytest.mark.parametrize("trouble", Failure)
def test_an_open_breaker_says_what_it_is_open_for(bench: Bench, trouble: Failure) -> None:
    bench.consumer.maker_trouble = trouble
    found = bench.metrics()
    states = {state: found[f'widget_consumer_breaker_state{{state="{state}"}}'] for state in monitoring.BREAKER_STATES}
    assert [state for state, value in states.items() if value] == [trouble.value]


def test_requests_to_the_service_are_those_of_the_consumer_and_of_the_monitor(bench: Bench) -> None:
    bench.consumer.requests.update(claim=5, count=1)
    bench.service.requests.update(count=2)
    found = bench.metrics()
    assert found['widget_consumer_queue_requests_total{operation="claim"}'] == 5
    assert found['widget_consumer_queue_requests_total{operation="count"}'] == 3


def test_the_oldest_age_is_left_out_where_there_is_none(bench: Bench) -> None:
    bench.service.post("requests", [1])
    found = bench.metrics()
    assert found['widget_consumer_queue_oldest_age_seconds{queue="request"}'] >= 0
    assert 'widget_consumer_queue_oldest_age_seconds{queue="dead_letter"}' not in found


def refuse(queue: str) -> Stats:
    raise QueueUnavailable("the service is down")


def test_a_service_that_fails_leaves_the_depth_out_and_nothing_else(bench: Bench) -> None:
    assert 'widget_consumer_queue_messages{queue="request",state="free"}' in bench.metrics()
    bench.service.answer = refuse
    found = bench.metrics()
    assert [name for name in found if name.startswith("widget_consumer_queue_")] == []
    assert found["widget_consumer_slots_busy"] == 4


def test_a_service_that_hangs_is_asked_once_and_not_waited_for(bench: Bench) -> None:
    hanging = threading.Event()
    bench.service.answer = lambda queue: Stats(0, 0, 0, None) if hanging.wait(30) else refuse(queue)
    try:
        for _ in range(3):
            assert "widget_consumer_slots_busy" in bench.metrics()
        assert sorted(bench.service.asked) == ["dead-letters", "requests"]
    finally:
        hanging.set()
    wait_until(lambda: 'widget_consumer_queue_messages{queue="request",state="free"}' in bench.metrics())


def test_the_service_is_not_asked_for_each_scrape(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "KEEP_S", 60.0)
    assert bench.metrics().keys() == bench.metrics().keys()
    assert sorted(bench.service.asked) == ["dead-letters", "requests"]


def test_without_the_option_prometheus_client_is_not_imported() -> None:
    program = "import sys, widget_consumer; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE, check=False).returncode == 0


# Health


def test_health_is_200_until_the_claim_loop_is_stuck(bench: Bench) -> None:
    assert (bench.get("/healthz").status_code, bench.get("/healthz").json()) == (200, {"status": "ok"})
    bench.consumer.is_stuck = True
    assert (bench.get("/healthz").status_code, bench.get("/healthz").json()) == (503, {"status": "stuck"})


def test_an_outage_of_others_is_not_ready_but_alive(bench: Bench) -> None:
    bench.service.answer = refuse
    bench.maker.health = Reply(503)
    assert bench.get("/readyz").status_code == 503
    assert bench.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("health", "answer", "troubles"),
    [
        (Reply(200, {"status": "ok"}), None, []),
        (Reply(200, {"status": "ok"}), refuse, ["queue"]),
        (Reply(503), None, ["maker"]),
        (Reply(200, "<h1>Welcome</h1>"), None, ["maker"]),
        (Raw(end="hang"), refuse, ["queue", "maker"]),
    ],
)
def test_ready_says_what_cannot_be_reached(
    bench: Bench, health: Reply | Raw, answer: Callable[[str], Stats] | None, troubles: list[str]
) -> None:
    bench.maker.health = health
    bench.service.answer = answer or bench.service.answer
    found = bench.get("/readyz")
    assert found.status_code == (503 if troubles else 200)
    told = found.json()
    assert (told.pop("status"), list(told)) == ("not ready" if troubles else "ok", troubles)
    assert all(told.values())


# The page


class Links(HTMLParser):
    """What a page has its reader fetch, and the tags that have an end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.targets += [value or "" for name, value in attributes if name in ("href", "src", "action")]


def test_the_page_shows_what_goes_on_without_files_from_outside(bench: Bench) -> None:
    bench.consumer.totals.update(created=1234)
    bench.service.post("requests", [1])
    found = bench.get("/")
    assert (found.status_code, found.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    for words in ("at work", "1,234", "12, of which 5 are being POSTed", "1 messages, the oldest", bench.maker.url):
        assert words in found.text
    links = Links(found.text)
    assert {target: bench.get(target).status_code for target in links.targets} == {
        "/style.css": 200,
        "/metrics": 200,
        "/healthz": 200,
        "/readyz": 200,
    }
    assert not links.tags.keys() & {"script", "iframe", "img"}
    assert "default-src 'none'" in found.headers["Content-Security-Policy"]
    assert bench.get("/style.css").headers["Content-Type"] == "text/css"


def test_the_page_shows_trouble_as_text(bench: Bench) -> None:
    def refuse_in_html(queue: str) -> Stats:
        raise QueueUnavailable("<script>alert(1)</script>")

    bench.service.answer = refuse_in_html
    bench.consumer.maker_trouble = Failure.MISCONFIGURED
    text = bench.get("/").text
    assert "in trouble" in text
    assert "open: the maker is misconfigured" in text
    assert "&lt;script&gt;" in text
    assert "script" not in Links(text).tags


def test_no_other_path_is_served(bench: Bench) -> None:
    assert bench.get("/widgets").status_code == 404
    assert requests.post(f"{bench.url}/metrics", timeout=5).status_code == 501


@pytest.mark.parametrize(("host", "status"), [("localhost:9", 200), ("127.0.0.1", 200), ("evil.example", 421)])
def test_a_page_of_another_web_site_reads_nothing(bench: Bench, host: str, status: int) -> None:
    for path in ("/metrics", "/", "/healthz", "/readyz"):
        found = bench.get(path, Host=host)
        assert found.status_code == status
        assert ("widget_consumer_" in found.text) == (status == 200 and path == "/metrics")


# Conventions, and what is built on the names


def exposed(bench: Bench, tmp_path: Path) -> dict[str, str]:
    """The consumer's and the maker's /metrics, with a sample in each."""
    bench.consumer.totals.update(created=1)
    bench.consumer.requests.update(claim=1)
    bench.service.post("requests", [1])
    maker = create_app(tmp_path / "widgets.sqlite3").test_client()
    for id_ in ("31f37378-54f4-11e5-ad75-3c970e65f731", "no id"):
        maker.post("/widgets", json={"widget_id": id_})
    return {"consumer": bench.get("/metrics").text, "maker": maker.get("/metrics").text}


@pytest.mark.parametrize("whose", ["consumer", "maker"])
def test_promtool_finds_nothing_to_say_about_the_metrics(bench: Bench, tmp_path: Path, whose: str) -> None:
    promtool = tool_or_skip("promtool", package="prometheus")
    text = exposed(bench, tmp_path)[whose]
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"widget_(?:consumer|maker)_[a-z_]+", re.sub(r'"[^"]*"', "", expression)))


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(bench: Bench, tmp_path: Path) -> None:
    there = {re.sub(r"\{.*", "", name) for text in exposed(bench, tmp_path).values() for name in samples(text)}
    dashboard = json.loads((HERE / "deploy" / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += re.findall(r"expr: (.*)", (HERE / "deploy" / "prometheus-alerts.yml").read_text())
    assert len(asked) > 20
    for expression in asked:
        wanted = names_in(expression)
        assert wanted or "up{" in expression, expression
        assert wanted <= there | {"widget_maker_faults_total"}, expression
    own = {name for name in there if name.startswith("widget_consumer_")}
    unused = own - {name for expression in asked for name in names_in(expression)}
    assert unused == {"widget_consumer_post_duration_seconds_count", "widget_consumer_post_duration_seconds_sum"}


def test_promtool_takes_the_alerts() -> None:
    promtool = tool_or_skip("promtool", package="prometheus")
    rules = HERE / "deploy" / "prometheus-alerts.yml"
    done = subprocess.run([promtool, "check", "rules", rules], capture_output=True, text=True, check=False)
    assert (done.returncode, "SUCCESS: 7 rules found" in done.stdout) == (0, True), done.stdout + done.stderr
