"""The page of the queues in a real Chromium, on the embedded queue and on a Zaqar of this machine."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from backend_zaqar import zaqar_mongodb
from backends import embedded
from browser.conftest import Open
from playwright.sync_api import Page, expect
from support import LETTERS, REQUESTS, RESPONSES, Script, free_port, letter, script, wait_until

from claim_queues import Queues

pytestmark = pytest.mark.xdist_group("browser")


@contextmanager
def served(directory: Path, url: str) -> Iterator[Script]:
    """The page of these queues until the block ends."""
    port = free_port()
    with script("claim_queues", "web", "--port", port, "--queue-url", url, "--create", cwd=directory) as running:
        yield running


def link(running: Script) -> str:
    """The first, which is good for one browser."""
    return wait_until(lambda: re.findall(r"http://\S+token=\S+\n", running.err))[0].strip()


@pytest.fixture
def queues(tmp_path: Path) -> Iterator[Queues]:
    with embedded(tmp_path) as service:
        for name in (REQUESTS, RESPONSES, LETTERS):
            service.queues.create(name)
        yield service.queues


@pytest.fixture
def running(queues: Queues, tmp_path: Path) -> Iterator[Script]:
    with served(tmp_path, queues.address) as found:
        yield found


def tile(page: Page, kind: str) -> Any:
    return page.locator(f"#{kind} dd.number").first


@pytest.mark.slow
def test_every_page_is_flawless_at_each_width_and_colour_scheme(
    queues: Queues, running: Script, tmp_path: Path, open_page: Open
) -> None:
    watched = open_page(link(running))
    page = watched.page
    expect(page.locator("#letters")).to_contain_text("None.")
    watched.shoot("queues-empty")
    queues.post(REQUESTS, [{"widget_id": "w" * 300}] * 1500)
    queues.post(RESPONSES, [{"widget_id": "w", "outcome": "created"}])
    why = {"reason": "HTTP 500: " + "the maker says why, at some length, " * 5}
    queues.post(LETTERS, [*(letter(number) | why for number in range(5)), "x" * 500])
    expect(tile(page, "request")).to_have_text("1,500")
    expect(page.locator("#letters > li")).to_have_count(6)
    page.wait_for_timeout(1000)
    watched.shoot("queues-data")
    page.get_by_role("link", name="Redrive old-3").click()
    watched.shoot("queues-redrive-one")
    page.get_by_role("link", name="Go back").click()
    page.get_by_role("link", name="Delete all").click()
    watched.shoot("queues-delete-all")
    page.goto(f"{page.url.rpartition('/')[0]}/?search=nothing")
    watched.shoot("queues-nothing-found")
    Path(queues.address.removeprefix("sqlite:///")).rename(tmp_path / "elsewhere")
    expect(page.locator("#said")).to_contain_text("cannot be read now")
    watched.shoot("queues-outage")


@pytest.mark.parametrize("service", [embedded, zaqar_mongodb], ids=["embedded", "zaqar"])
@pytest.mark.parametrize("has_javascript", [True, False], ids=["", "without-javascript"])
def test_one_dead_letter_is_redriven_one_deleted_and_then_all_are_redriven(
    service: Any, has_javascript: bool, tmp_path: Path, open_page: Open
) -> None:
    with service(tmp_path) as found:
        queues = found.queues
        for name in (REQUESTS, RESPONSES, LETTERS):
            queues.create(name)
            queues.purge(name)
        queues.post(LETTERS, [letter(number) for number in range(5)])
        url = queues.address if service is embedded else f"zaqar://?endpoint={found.url}&project=contract"
        with served(tmp_path, url) as running:
            page = open_page(link(running), java_script_enabled=has_javascript).page

            def confirm(name: str, shown: str, said: str) -> None:
                page.get_by_role("link", name=name).click()
                expect(page.get_by_role("main")).to_contain_text(shown)
                page.get_by_role("button", name=name.partition(" ")[0]).click()
                expect(page.locator("#said")).to_contain_text(said)

            confirm("Redrive old-2", "Redrive this dead letter?", "Request old-2 is queued as")
            expect(page.locator("#letters > li")).to_have_count(4)
            expect(tile(page, "request")).to_have_text("1")
            confirm("Delete old-4", "Delete this dead letter?", "Deleted.")
            confirm("Redrive all", "There are 3 in", "Redriven: 3.")
            expect(page.locator("#letters")).to_contain_text("None.")
            bodies = [message.body for message in queues.browse(REQUESTS)[0]]
            assert bodies[0] == letter(2)["body"]
            assert sorted(bodies, key=str) == [letter(number)["body"] for number in range(4)]
            assert queues.stats(LETTERS).total == 0


def test_the_page_follows_the_queues_and_holds_still_where_one_types_or_points(
    queues: Queues, running: Script, open_page: Open
) -> None:
    queues.post(LETTERS, [letter(1)])
    page = open_page(link(running)).page
    page.evaluate("window.isTheSame = true")
    search = page.get_by_role("searchbox", name="Dead letters")
    search.press_sequentially("HTTP")
    where = search.bounding_box()
    queues.post(REQUESTS, [{"widget_id": "a"}])
    queues.post(LETTERS, [letter(2)])
    expect(tile(page, "request")).to_have_text("1")
    expect(page.locator("#newest-request li")).to_contain_text('"widget_id": "a"')
    expect(page.locator("#letters > li")).to_have_count(2)
    expect(search).to_be_focused()
    assert search.bounding_box() == where
    page.get_by_role("link", name="Redrive old-2").hover()
    queues.purge(LETTERS)
    expect(tile(page, "dead-letter")).to_have_text("0")
    page.wait_for_timeout(1500)
    expect(page.locator("#letters > li")).to_have_count(2)
    page.mouse.move(0, 0)
    expect(page.locator("#letters")).to_contain_text("None.")
    assert page.evaluate("window.isTheSame")
    search.press_sequentially(" 502")
    page.keyboard.press("Enter")
    expect(page.locator("#letters")).to_contain_text("None holds these words.")
    expect(search).to_have_value("HTTP 502")


def test_everything_is_reached_by_the_tab_key_and_the_focus_is_seen(
    queues: Queues, running: Script, open_page: Open
) -> None:
    queues.post(LETTERS, [letter(1)])
    reached = open_page(link(running)).reached_by_tab()
    assert {"search", "pause", "Redrive all", "Delete all", "Redrive old-1"} <= reached


def test_a_page_from_another_port_which_is_sent_the_cookie_too_deletes_nothing(
    queues: Queues, running: Script, open_page: Open
) -> None:
    queues.post(LETTERS, [letter(1)])
    page = open_page(link(running)).page
    page.get_by_role("link", name="Delete all").click()
    token = page.locator("input[name=form_token]").get_attribute("value")
    fields = f'<input name="most" value="1"><input name="form_token" value="{token}">'
    form = f'<form method="post" action="{page.url}">{fields}<button>Win</button></form>'
    page.route("http://127.0.0.1:1/", lambda route: route.fulfill(body=form, content_type="text/html"))
    page.goto("http://127.0.0.1:1/")
    page.get_by_role("button", name="Win").click()
    expect(page.get_by_role("main")).to_contain_text("Not sent by a form of these pages")
    assert queues.stats(LETTERS).total == 1


def test_the_page_says_that_its_server_is_gone(running: Script, open_page: Open) -> None:
    page = open_page(link(running)).page
    expect(page.locator("#state")).to_have_text("Live")
    running.kill()
    expect(page.locator("#state")).to_have_text("No answer: trying again; see the terminal")
