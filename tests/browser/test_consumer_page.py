"""The consumer's page in a real Chromium: at work, without work, and while the maker is gone."""

import signal
from pathlib import Path

import pytest
from browser.conftest import Open
from playwright.sync_api import expect
from support import free_port, run_script, script, wait_until, widget_maker

pytestmark = pytest.mark.xdist_group("browser")


@pytest.mark.slow
def test_the_page_tells_what_it_does_why_it_waits_and_what_failed(tmp_path: Path, open_page: Open) -> None:
    env = {"WIDGET_QUEUE_URL": f"sqlite:///{tmp_path / 'queues'}", "WIDGET_RECEIVE_COUNTS": str(tmp_path / "counts")}
    port = free_port()

    def submit(*words: object) -> None:
        assert run_script("widget_producer.py", *words, cwd=tmp_path, env=env).returncode == 0

    with widget_maker(tmp_path) as (url, maker):
        env["WIDGET_MAKER_URL"] = f"{url}/widgets"
        with script("widget_consumer.py", "--metrics-port", port, cwd=tmp_path, env=env) as consumer:
            wait_until(lambda: "consuming" in consumer.err)
            watched = open_page(f"http://127.0.0.1:{port}")
            page = watched.page
            expect(page.locator("h1")).to_have_text("Working")
            expect(page.locator("#failures")).to_contain_text("None since the start.")
            watched.shoot("consumer-empty")
            submit("--count", 60)
            submit("--widget-id", "<b>no id</b>")
            expect(page.locator("#outcomes")).to_contain_text("60")
            expect(page.locator("#failures li")).to_contain_text("is not a UUID of version 1")
            expect(page.locator("#failures li")).to_contain_text("widget <b>no id</b>")
            watched.shoot("consumer-data")
            maker.signal(signal.SIGTERM)
            assert maker.exit_code() == 0
            submit("--count", 30)
            expect(page.locator("h1")).to_have_text("Waiting for the maker")
            expect(page.locator("#troubles")).to_contain_text("The breaker is open (unavailable)")
            expect(page.locator("#troubles")).to_contain_text("Failed to connect")
            watched.shoot("consumer-outage")
