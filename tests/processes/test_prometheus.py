"""A real Prometheus scrapes a consumer and a maker at work, and each panel of the dashboard gets an answer."""

import json
import math
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import requests
from support import ANSWER_S, HERE, REQUESTS, free_port, nth_id, script, status, tool_or_skip, wait_until, widget_maker

from claim_queues.sqlite import SqliteQueues

DASHBOARD = json.loads((HERE / "deploy" / "grafana-dashboard.json").read_text())
CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
scrape_configs:
  - {{job_name: widget_consumer, static_configs: [{{targets: ["127.0.0.1:{consumer}"]}}]}}
  - {{job_name: widget_maker, static_configs: [{{targets: ["{maker}"]}}]}}
"""


def values(url: str, expression: str) -> list[float]:
    """Those that the expression has now."""
    answer = requests.get(f"{url}/api/v1/query", params={"query": expression}, timeout=ANSWER_S).json()
    assert answer["status"] == "success", answer
    return [float(result["value"][1]) for result in answer["data"]["result"]]


def test_a_real_prometheus_answers_each_panel_of_the_dashboard(tmp_path: Path) -> None:
    program = tool_or_skip("prometheus", package="prometheus")
    consumer, port = free_port(), free_port()
    query = partial(values, f"http://127.0.0.1:{port}")
    with ExitStack() as stack:
        maker, _ = stack.enter_context(widget_maker(tmp_path, "--latency", "0.001"))
        queues = stack.enter_context(SqliteQueues(tmp_path / "q"))
        options = ["--queue-url", f"sqlite:///{tmp_path}/q", "--maker-url", f"{maker}/widgets", "--create"]
        stack.enter_context(script("widget_consumer.py", *options, "--metrics-port", consumer, cwd=tmp_path))
        config = tmp_path / "prometheus.yml"
        config.write_text(CONFIG.format(consumer=consumer, maker=maker.removeprefix("http://")))
        log = stack.enter_context((tmp_path / "prometheus.log").open("wb"))
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        wait_until(lambda: status(f"http://127.0.0.1:{port}/-/ready") == 200 or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "prometheus.log").read_text()
        wait_until(lambda: query("sum(up)") == [2.0])

        good = [{"widget_id": nth_id(number)} for number in range(9)]
        queues.post(REQUESTS, ["no request", {"widget_id": "no id"}, *good])

        for outcome, number in {"created": 9.0, "rejected": 1.0, "failed": 1.0}.items():
            total = f'widget_consumer_outcomes_total{{outcome="{outcome}"}}'
            wait_until(lambda total=total, number=number: query(total) == [number])
        wait_until(lambda: query("widget_consumer_post_duration_seconds_count") == [10.0])
        for expression in [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]:
            found = wait_until(partial(query, expression.replace("$__rate_interval", "1m")))
            assert not any(map(math.isnan, found)), expression
        wait_until(lambda: sum(query('rate(widget_consumer_outcomes_total{outcome="created"}[1m])')) > 0)
