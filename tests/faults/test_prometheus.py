"""A real Prometheus scrapes a consumer and a maker at work, and each panel of the dashboard gets an answer from it."""

import json
import math
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from support import HERE, free_port, run_script, script, tool_or_skip, wait_until, widget_maker

from claim_queues import open_queues

DASHBOARD = json.loads((HERE / "deploy" / "grafana-dashboard.json").read_text())
EMBEDDED_HAS_NONE = "widget_consumer_queue_requests_total"
"""The embedded queue sends no requests."""
CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}}
rule_files: ["{rules}"]
scrape_configs:
  - {{job_name: widget_consumer, static_configs: [{{targets: ["127.0.0.1:{consumer}"]}}]}}
  - {{job_name: widget_maker, static_configs: [{{targets: ["{maker}"]}}]}}
"""


class Prometheus:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/-/ready", timeout=1).status_code == requests.codes.ok
        return False

    def query(self, expression: str) -> list[float]:
        """The values that the expression has now."""
        answer = requests.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=5).json()
        assert answer["status"] == "success", answer
        return [float(result["value"][1]) for result in answer["data"]["result"]]

    def alerts(self) -> dict[str, str]:
        """Each alert's rule and its health, `ok` once it was evaluated."""
        groups: Any = requests.get(f"{self.url}/api/v1/rules", timeout=5).json()["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes a consumer with an outcome of each kind, and its maker."""
    program = tool_or_skip("prometheus", package="prometheus")
    consumer, port = free_port(), free_port()
    with ExitStack() as stack:
        url, _ = stack.enter_context(widget_maker(tmp_path, "--latency", "0.001"))
        options = ["--maker-url", f"{url}/widgets", "--metrics-port", consumer]
        stack.enter_context(script("widget_consumer.py", *options, cwd=tmp_path))
        config = tmp_path / "prometheus.yml"
        rules = HERE / "deploy" / "prometheus-alerts.yml"
        config.write_text(CONFIG.format(consumer=consumer, maker=url.removeprefix("http://"), rules=rules))
        log = stack.enter_context((tmp_path / "prometheus.log").open("wb"))
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        found = Prometheus(port)
        wait_until(lambda: found.is_ready() or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "prometheus.log").read_text()
        wait_until(lambda: found.query("sum(up)") == [2.0])
        posted = run_script("widget_producer.py", "--count", 9, cwd=tmp_path)
        assert posted.returncode == 0, posted.stderr
        assert run_script("widget_producer.py", "--widget-id", "no id", "--wait", cwd=tmp_path).returncode == 1
        with open_queues() as queues:
            queues.post("itchy-octo-chainsaw-request", ["no request"])
        for outcome, number in {"created": 9.0, "failed": 1.0}.items():
            query = f'widget_consumer_outcomes_total{{outcome="{outcome}"}}'
            wait_until(lambda query=query, number=number: found.query(query) == [number])
        yield found


def test_a_real_prometheus_answers_each_panel_of_the_dashboard(prometheus: Prometheus) -> None:
    assert prometheus.query("widget_consumer_post_duration_seconds_count") == [10.0]
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for expression in expressions:
        asked = expression.replace("$__rate_interval", "1m")
        if EMBEDDED_HAS_NONE in expression:
            assert prometheus.query(asked) == []
            continue
        values = wait_until(partial(prometheus.query, asked))
        assert not any(map(math.isnan, values)), expression
    assert prometheus.query('sum(rate(widget_consumer_outcomes_total{outcome="created"}[1m]))')[0] > 0
    assert wait_until(lambda: set(prometheus.alerts().values()) == {"ok"})
