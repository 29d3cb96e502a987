"""The maker's page in a real Chromium, while producer, consumer and maker run and faults are played."""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from browser.conftest import Open
from playwright.sync_api import expect
from support import ANSWER_S, run_script, script, wait_until, widget_maker, widgets

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Producer, consumer and a maker that plays faults: the maker's URL, once it has made 60 widgets."""
    cwd = tmp_path_factory.mktemp("running")
    env = {"WIDGET_QUEUE_URL": f"sqlite:///{cwd / 'queues'}", "WIDGET_RECEIVE_COUNTS": str(cwd / "counts")}
    with widget_maker(cwd, "--fail-rate", 0.1, "--latency", 0.01) as (url, _):
        env["WIDGET_MAKER_URL"] = f"{url}/widgets"
        with script("widget_consumer.py", "--max-receives", 20, cwd=cwd, env=env):
            assert run_script("widget_producer.py", "--count", 60, cwd=cwd, env=env).returncode == 0
            assert run_script("widget_producer.py", "--widget-id", "no id", cwd=cwd, env=env).returncode == 0
            wait_until(lambda: len(widgets(url)) == 60)
            yield url


def make(url: str, widget_id: str | None = None) -> str:
    """Make a widget, however often the maker plays a failure: its id."""
    widget_id = widget_id or str(uuid.uuid1())
    wait_until(lambda: requests.post(f"{url}/widgets", json={"widget_id": widget_id}, timeout=ANSWER_S).ok)
    return widget_id


@pytest.mark.slow
def test_every_page_is_flawless_at_each_width_and_colour_scheme(running: str, open_page: Open) -> None:
    made = make(running)
    paths = {
        "first": "/",
        "older": "/?after=41",
        "widget": f"/widgets/{made}",
        "found": f"/search?id={made[0]}",
        "nothing-found": "/search?id=no+id",
    }
    watched = open_page(f"{running}/")
    for name, path in paths.items():
        watched.page.goto(running + path)
        watched.shoot(name)


@pytest.mark.slow
def test_a_maker_that_has_made_nothing_says_what_to_type_and_one_in_an_outage_says_so(
    tmp_path: Path, open_page: Open
) -> None:
    for name, words, shown in (
        ("empty", [], "python widget_producer.py --wait"),
        ("outage", ["--outage", "0:1000"], "Outage on purpose"),
    ):
        with widget_maker(tmp_path, *words) as (url, _):
            watched = open_page(f"{url}/")
            expect(watched.page.locator("main")).to_contain_text(shown)
            watched.shoot(name)


def test_a_widgets_page_tells_of_its_message_and_leads_to_its_neighbours(running: str, open_page: Open) -> None:
    page = open_page(f"{running}/?after=41").page
    page.locator(".cards a").first.click()
    this = page.url
    for words in ("For the message", "Receives until then", "Seconds from request to widget"):
        expect(page.locator("dl")).to_contain_text(words)
    page.get_by_role("link", name="The next one made").click()
    expect(page).not_to_have_url(this)
    page.get_by_role("link", name="The one made before").click()
    expect(page).to_have_url(this)


@pytest.mark.slow
def test_without_javascript_everything_is_shown_and_the_page_reloads_itself(running: str, open_page: Open) -> None:
    page = open_page(f"{running}/", java_script_enabled=False).page
    expect(page.locator("#list > li svg.picture")).to_have_count(24)
    assert page.locator("#totals").is_visible()
    expect(page.locator(".bar").first).to_be_visible()
    assert page.get_by_role("button", name="Pause").is_hidden()
    made = make(running)
    expect(page.locator("#list code").first).to_have_text(made)


@pytest.mark.parametrize("has_javascript", [True, False])
def test_search_leads_to_a_widgets_own_page(running: str, open_page: Open, has_javascript: bool) -> None:
    made = make(running, "31f37378-54f4-11e5-ad75-3c970e65f731")
    page = open_page(f"{running}/", java_script_enabled=has_javascript).page
    page.get_by_label("Widget id").fill(made[:20].upper())
    page.get_by_role("button", name="Find").click()
    expect(page.locator(".cards li")).to_have_count(1)
    page.get_by_role("link", name=made).click()
    expect(page).to_have_url(f"{running}/widgets/{made}")
    expect(page.get_by_role("heading", level=1)).to_have_text(made)


@pytest.mark.parametrize("text", ["'\"><img src=x onerror=alert(1)>", "{{ 7 * 7 }}"])
def test_hostile_text_is_shown_and_never_run(running: str, open_page: Open, text: str) -> None:
    watched = open_page(f"{running}/")
    for path in ("/search?id=", "/widgets/"):
        watched.page.goto(running + path + quote(text))
        expect(watched.page.locator("main")).to_contain_text(text)
    assert [problem for problem in watched.problems if "status of 404" not in problem] == []
    assert [asked for asked in watched.requests if not asked.startswith(f"{running}/")] == []


@pytest.mark.slow
def test_new_widgets_show_without_a_reload_unless_one_points_at_the_list_or_pauses(
    running: str, open_page: Open
) -> None:
    watched = open_page(f"{running}/")
    page = watched.page
    page.evaluate("window.isTheSame = true")
    first, older = page.locator("#list a").first, page.get_by_role("link", name="Older")
    count = page.locator("#totals dd.number").first
    before, where = int(count.inner_text().replace(",", "")), first.get_attribute("href")

    def stands_at(place: int) -> None:
        """The link that was the first at the start."""
        expect(page.locator("#list a").nth(place)).to_have_attribute("href", where)

    first.focus()
    make(running)
    expect(count).to_have_text(f"{before + 1:,}")
    stands_at(0)
    expect(first).to_be_focused()
    older.focus()
    make(running)
    stands_at(2)
    expect(older).to_be_focused()
    page.get_by_role("button", name="Pause").focus()
    page.locator("#list").hover()
    make(running)
    expect(count).to_have_text(f"{before + 3:,}")
    stands_at(2)
    page.mouse.move(0, 0)
    stands_at(3)
    page.keyboard.press("Space")
    expect(page.locator("#state")).to_have_text("Paused")
    asked = len(watched.requests)
    make(running)
    page.wait_for_timeout(2000)
    assert len(watched.requests) == asked
    stands_at(3)
    page.keyboard.press("Space")
    stands_at(4)
    expect(page.locator("#list > li")).to_have_count(24)
    assert page.evaluate("window.isTheSame")
    watched.assert_flawless()


def test_everything_is_reached_by_the_tab_key_and_the_focus_is_seen(running: str, open_page: Open) -> None:
    reached = open_page(f"{running}/").reached_by_tab()
    assert {"id", "pause", "Find", "Older", "Oldest", "Prometheus metrics"} <= reached


@pytest.mark.slow
def test_the_page_says_that_the_maker_is_gone_and_goes_on_when_it_is_back(tmp_path: Path, open_page: Open) -> None:
    with widget_maker(tmp_path) as (url, _):
        page = open_page(f"{url}/").page
        expect(page.locator("#empty")).to_contain_text("No widget has been made yet.")
        make(url)
        expect(page.locator("#empty")).to_be_empty()
    expect(page.locator("#state")).to_have_text("The maker does not answer: trying again")
    with widget_maker(tmp_path, port=int(url.rpartition(":")[2])) as (_, maker):
        expect(page.locator("#state")).to_have_text("Live")
        os.killpg(maker.process.pid, signal.SIGSTOP)
        expect(page.locator("#state")).to_have_text("The maker does not answer: trying again")
        os.killpg(maker.process.pid, signal.SIGCONT)
        expect(page.locator("#state")).to_have_text("Live")
