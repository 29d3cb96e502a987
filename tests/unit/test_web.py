"""The queues in a browser: who is let in, what the page shows, and how dead letters are redriven and deleted."""

import html
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import requests
from doubles.troubled_queues import TroubledQueues
from flask.testing import FlaskClient
from in_process import run_command
from support import ANSWER_S, REQUESTS, free_port, letter, script, wait_until
from werkzeug.test import TestResponse

from claim_queues import JSON, QueueUnavailable
from claim_queues.__main__ import cli
from claim_queues.letters import as_text
from claim_queues.sqlite import SqliteQueues
from claim_queues.web import Watch, Web, as_path

NAMES = {"request": "requests", "response": "responses", "dead-letter": "letters"}
ORIGIN = "http://127.0.0.1:5001"
DOWN = QueueUnavailable("the service does not answer")


class Bench:
    """The page of an embedded queue, without its thread: `look` is that. client: a browser that came by the link.

    now_s: the clock of the queue, which a test moves.
    """

    def __init__(self, directory: Path, **limits: Any) -> None:
        self.now_s = time.time()
        self.real = SqliteQueues(directory / "q", clock=lambda: self.now_s)
        for name in NAMES.values():
            self.real.create(name)
        self.queues: Any = TroubledQueues(self.real, replace(self.real.limits, **limits))
        self.watch = Watch(self.queues, NAMES)
        self.web = Web(self.watch, ORIGIN, 3600)
        self.web.app.config["SERVER_NAME"] = "127.0.0.1:5001"  # where clients of tests ask
        self.look = self.watch.look
        self.look()
        self.client = self.stranger()
        assert self.client.get(self.web.link).status_code == 303

    def stranger(self) -> FlaskClient:
        return self.web.app.test_client()

    def page(self, path: str = "/") -> str:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def form(self, path: str) -> tuple[str, dict[str, str]]:
        """Where the form of that confirmation leads, and what it sends."""
        text = self.page(path)
        (action,) = re.findall(r'<form method="post" action="(.*?)">', text)
        fields = re.findall(r'<input type="hidden" name="(\w+)" value="(.*?)">', text)
        return action, {name: html.unescape(value) for name, value in fields}

    def act(self, path: str, *, headers: dict[str, str] | None = None, **changed: str) -> TestResponse:
        """Send that form, with these fields changed, and wait until it is done."""
        action, fields = self.form(path)
        answer = self.client.post(action, data=fields | changed, headers=headers)
        wait_until(lambda: not self.web.working.locked())
        return answer

    def links(self, path: str = "/") -> dict[str, str]:
        """Where the letters' links lead: by `Redrive old-1`, or `Redrive all`."""
        found = re.findall(r'<a href="(/(?:redrive|delete)[^"]*)">(.*?)</a>', self.page(path))
        return {re.sub("<.*?>", "", name): html.unescape(where) for where, name in found}

    def bodies(self, kind: str) -> list[JSON]:
        return [message.body for message in self.real.browse(NAMES[kind], limit=10_000)[0]]

    def said(self) -> str:
        """What the page says of the last action."""
        return " ".join(re.findall(r'<p class="notice">(.*?)</p>', self.page()))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.real.close()


@pytest.fixture
def blind(tmp_path: Path) -> Iterator[Bench]:
    """Of a service that shows messages only to who claims them."""
    bench = Bench(tmp_path, can_browse=False, service="Blind")
    bench.queues.fails = dict.fromkeys(["browse", "delete"], lambda: AssertionError("it cannot"))
    yield bench
    bench.real.close()


def texts(page: str, pattern: str) -> list[str]:
    return [" ".join(html.unescape(re.sub("<.*?>", "", found)).split()) for found in re.findall(pattern, page, re.S)]


def numbers(page: str) -> list[str]:
    return texts(page, '<dd class="number">(.*?)</dd>')


def letters_of(page: str) -> list[str]:
    return texts(page, r'<li class="panel">(.*?)</li>')


# Who is let in


def test_the_link_gives_a_cookie_and_leads_to_the_page_without_its_token(bench: Bench) -> None:
    client = bench.stranger()
    answer = client.get(bench.web.link)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith("queues-5001=")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert not re.search("Domain|Expires|Max-Age", cookie)
    assert client.get("/").status_code == 200


def test_a_link_is_good_for_one_browser_and_the_terminal_shows_the_next(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    link = bench.web.link
    assert bench.stranger().get(link).status_code == 303
    assert bench.stranger().get(link).status_code == 403
    (told,) = re.findall(r"http\S+", capsys.readouterr().err)
    assert told == bench.web.link != link
    assert bench.stranger().get(told).status_code == 303
    spent = bench.client.get(link)  # from the history of a browser that has come before
    assert (spent.status_code, spent.headers["Location"]) == (303, "/")


@pytest.mark.parametrize("path", ["/", "/?search=a", "/redrive", "/delete?id=a", "/nothing", "/healthz"])
@pytest.mark.parametrize("token", ["", "wrong", "é", "%ED%A0%80"])
def test_who_did_not_come_by_the_link_is_told_where_it_is(bench: Bench, path: str, token: str) -> None:
    bench.real.post("letters", [letter(1)])
    client = bench.stranger()
    client.set_cookie("queues-5001", token, domain="127.0.0.1")
    with_token = f"{path}{'&' if '?' in path else '?'}token={token}"
    for answer in (client.get(path), client.post(path), client.get(with_token)):
        assert answer.status_code == 403
        assert "the link that the terminal shows" in answer.text
        assert "old-1" not in answer.text
    assert bench.bodies("dead-letter") == [letter(1)]


def test_only_its_style_is_for_everybody(bench: Bench) -> None:
    for name in ("pages.css", "queues.css", "live.js", "icon.svg"):
        assert bench.stranger().get(f"/static/{name}", buffered=True).status_code == 200


@pytest.mark.parametrize("path", ["/", "/redrive", "/static/live.js"])
def test_another_host_is_answered_421_with_advice(bench: Bench, path: str) -> None:
    answer = bench.client.get(path, headers={"Host": "evil.example"}, buffered=True)
    assert answer.status_code == 421
    assert "the link that the terminal shows" in answer.text


def test_a_form_of_another_site_or_port_and_a_form_without_its_token_do_nothing(bench: Bench) -> None:
    bench.real.post("letters", [letter(1)])
    for action in ("/redrive", "/delete"):
        for origin in ("http://evil.example", "http://127.0.0.1:5000", "https://127.0.0.1:5001", "null", ""):
            assert bench.act(action, headers={"Origin": origin}).status_code == 403
        for token in ("", "wrong", "é"):
            assert bench.act(action, form_token=token).status_code == 403
        assert bench.client.post(action).status_code == 403
    assert (bench.bodies("request"), bench.bodies("dead-letter")) == ([], [letter(1)])


def test_looking_at_any_page_changes_nothing(bench: Bench) -> None:
    bench.real.post("letters", [letter(1), "odd"])
    for path in ("/", "/redrive", "/delete", *bench.links().values()):
        bench.page(path)
    assert (bench.bodies("request"), bench.bodies("dead-letter")) == ([], [letter(1), "odd"])
    assert bench.real.stats("letters").free == 2


def test_every_answer_allows_other_web_sites_nothing(bench: Bench) -> None:
    for path in ("/", "/redrive", "/nothing", "/static/live.js"):
        headers = bench.client.get(path, buffered=True).headers
        policy = set(headers["Content-Security-Policy"].split("; "))
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'self'"} <= policy
        assert headers["Cache-Control"] == "no-store"


# What it shows


def test_it_shows_the_numbers_of_each_queue_with_their_history(bench: Bench) -> None:
    bench.real.post("requests", list(range(1234)))
    claim = bench.real.claim("requests", ttl=60, grace=60, limit=3)
    assert claim
    bench.real.release(claim, delay=60)
    assert bench.real.claim("requests", ttl=60, grace=60, limit=2)
    bench.look()
    page = bench.page()
    assert re.findall('<section id="([a-z-]+)" class="panel"', page)[:3] == ["request", "response", "dead-letter"]
    (request,) = re.findall('<section id="request".*?</section>', page, re.S)
    assert texts(request, "<dt>(.*?)</dt>") == ["Waiting", "Claimed", "Delayed", "Oldest"]
    assert numbers(request) == ["1,229", "2", "3", "0:00:00"]
    assert 'aria-label="Waiting over the last 5 minutes: at most 1,229"' in request
    assert len(re.findall(r'class="bar" d="M', request)) >= 3


def test_a_plot_has_a_bar_for_each_look_and_a_gap_where_nothing_is_known() -> None:
    assert as_path([(4, 5), (2, None), (0, 10)]) == "M296.0 40V20.0h2.5V40M300.0 40V0.0h2.5V40"
    assert as_path([(0, 0), (0, None)]) == as_path([]) == ""


def test_five_minutes_are_kept(bench: Bench) -> None:
    for _ in range(200):
        bench.look()
    assert len(bench.watch.looks) == 150


def test_it_shows_the_newest_messages_the_newest_first(bench: Bench) -> None:
    def newest(kind: str) -> list[str]:
        (found,) = re.findall(rf'<section id="newest-{kind}".*?</section>', bench.page(), re.S)
        return texts(found, "<li><time.*?<code>(.*?)</code></li>")

    assert (newest("request"), newest("response")) == ([], [])
    for first in (0, 1000):
        bench.real.post("requests", list(range(first, first + 1000)))
    bench.real.post("responses", ["done"])
    for _ in range(2):
        bench.look()  # on a slow machine each reads on by one page of a thousand
    assert newest("request") == [str(number) for number in range(1999, 1989, -1)]
    assert newest("response") == ['"done"']
    bench.real.purge("requests")
    bench.real.post("requests", ["another"])
    bench.look()
    assert newest("request")[:2] == ['"another"', "1999"]


def test_it_shows_dead_letters_with_reason_receives_and_times(bench: Bench) -> None:
    bench.real.post("letters", [letter(1), {"odd": 1}])
    dead, odd = letters_of(bench.page())
    for words in ("HTTP 501", '"widget_id": "w1"', "Request old-1, received 5 times", "first 2026-01-02 03:04:05"):
        assert words in dead
    assert "last 2026-01-02 03:14:15, a dead letter for 0:00:00" in dead
    assert odd.startswith('not a dead letter: it holds no request {"odd": 1}')
    assert bench.links().keys() >= {"Redrive all", "Delete all", "Redrive old-1", "Delete old-1"}
    assert len([name for name in bench.links() if name.startswith("Redrive")]) == 2


@pytest.mark.parametrize(
    ("words", "found"), [("old-3", [3]), ("http 504", [4]), ("W1", [1]), ("RED", [1, 2, 3, 4]), ("none", [])]
)
def test_a_search_finds_letters_by_any_words_in_them(bench: Bench, words: str, found: list[int]) -> None:
    bench.real.post("letters", [letter(number) for number in range(1, 5)])
    page = bench.page(f"/?search={words}")
    assert re.findall(r"Request <code>old-(\d)", page) == list(map(str, found))
    assert f'value="{words}"' in page
    assert ("None holds these words." in page) is not bool(found)
    assert "Redrive all" not in page  # which would be more than what was found


@pytest.mark.parametrize(("path", "wanted"), [("/", 2120), ("/?search=w2", 231)])
def test_more_letters_than_a_page_shows_are_reached_a_thousand_messages_at_once(
    bench: Bench, path: str, wanted: int
) -> None:
    bench.real.post("letters", [letter(number) for number in range(2120)])
    seen = list[str]()
    while path:
        bench.queues.calls.clear()
        page = bench.page(path)
        assert bench.queues.calls["browse"] <= 20
        seen += letters_of(page)
        path = "".join(map(html.unescape, re.findall(r'href="([^"]+)">Further ones', page)))
    assert (len(seen), len(set(seen))) == (wanted, wanted)


@pytest.mark.parametrize("text", ['"><script>alert(1)</script>', "\ud800", "a\nb\x1b[31m\0"], ids=ascii)
def test_hostile_text_is_shown_and_never_run(bench: Bench, text: str) -> None:
    bench.real.post("letters", [letter(1) | {"reason": text, "request_id": text, "body": text}, text])
    bench.real.post("requests", [text])
    bench.look()
    for path in ("/", '/?search="><script>', *bench.links().values()):
        page = bench.page(path)
        assert "<script>" not in page
        assert "\x1b" not in page


def test_letters_of_any_form_are_shown(bench: Bench) -> None:
    odd = letter(1) | {"receive_count": [1], "first_received_at": 7, "reason": None}
    bench.real.post("letters", [odd, letter(1) | {"reason": {"a": 1}}, {"request_id": "x", "body": None}])
    assert len(letters_of(bench.page())) == 3


def test_a_body_that_is_nested_too_deep_is_said_to_be() -> None:
    body = reduce(lambda inner, _: [inner], range(5000), list[JSON]())
    assert as_text(body) == "(nested too deep to be shown)"


# In an outage


@pytest.mark.parametrize("error", [DOWN, RuntimeError("a bug of an SDK")], ids=str)
def test_an_outage_is_a_sentence_on_the_page_and_a_gap_in_the_plots(bench: Bench, error: Exception) -> None:
    bench.real.post("letters", [letter(1)])
    bench.queues.fails["stats"] = lambda: error
    bench.look()
    page = bench.page()
    assert f"The queues cannot be read now: {error}" in page
    assert "Not known now." in page
    assert set(numbers(page)) == {"\N{EN DASH}"}
    bench.queues.fails.clear()
    bench.look()
    page = bench.page()
    assert "cannot be read" not in page
    assert len(letters_of(page)) == 1


def test_what_fails_between_two_looks_is_told_too(bench: Bench) -> None:
    bench.queues.fails["browse"] = lambda: DOWN
    assert "The queues cannot be read now: the service does not answer" in bench.page()
    bench.queues.fails["stats"] = lambda: DOWN
    answer = bench.client.get("/redrive")
    assert answer.status_code == 503
    assert "The service does not answer" in answer.text


@pytest.mark.parametrize("after", ["x", "9" * 30])
def test_a_place_that_is_none_is_no_failure_of_the_service(bench: Bench, after: str) -> None:
    assert "there is no such place" in bench.page(f"/?after={after}")
    answer = bench.client.get(f"/redrive?id=a&after={after}")
    assert (answer.status_code, "there is no such place" in answer.text) == (400, True)


# Redrive and delete


def test_one_dead_letter_is_redriven_and_is_then_said_to_be_gone(bench: Bench) -> None:
    bench.real.post("letters", [letter(number) for number in range(60)])
    for path, number in (("/", 3), ("/?search=old-57", 57)):
        where = bench.links(path)[f"Redrive old-{number}"]
        answer = bench.act(where, headers={"Origin": ORIGIN})
        assert (answer.status_code, answer.headers["Location"]) == (303, "/")
        assert f"Request old-{number} is queued as " in bench.said()
        again = bench.client.get(where)
        assert (again.status_code, "not there any more" in again.text) == (404, True)
    assert bench.bodies("request") == [letter(3)["body"], letter(57)["body"]]
    assert bench.bodies("dead-letter") == [letter(number) for number in range(60) if number not in (3, 57)]
    assert numbers(bench.page())[0] == "2"  # as soon as that


def test_a_redriven_request_lives_as_long_as_asked(bench: Bench) -> None:
    bench.real.post("letters", [letter(1), letter(2)])
    bench.act(bench.links()["Redrive old-1"])
    bench.act("/redrive")
    for seconds, left in ((3500, 2), (100, 0)):
        bench.now_s += seconds
        assert bench.real.stats("requests").total == left


@pytest.mark.parametrize(
    ("name", "operation", "requests"),
    [
        ("Redrive old-1", "post", []),
        ("Redrive all", "post", []),
        ("Redrive old-1", "delete", [letter(1)["body"]]),
        ("Redrive all", "settle", [letter(1)["body"]]),
    ],
)
def test_a_letter_is_deleted_only_after_its_request_is_stored_and_a_redrive_that_breaks_says_why(
    bench: Bench, name: str, operation: str, requests: list[JSON]
) -> None:
    bench.real.post("letters", [letter(1)])
    where = bench.links()[name]
    bench.queues.fails[operation] = lambda: DOWN
    assert bench.act(where).status_code == 303
    assert "It failed: the service does not answer" in bench.said()
    assert (bench.bodies("request"), bench.bodies("dead-letter")) == (requests, [letter(1)])
    assert bench.real.stats("letters").free == 1


@pytest.mark.parametrize("action", ["Redrive", "Delete"])
def test_a_letter_that_a_claim_holds_stays_and_the_page_says_so(bench: Bench, action: str) -> None:
    bench.real.post("letters", [letter(1)])
    where = bench.links()[f"{action} old-1"]
    assert bench.real.claim("letters", ttl=60, grace=60, limit=1)
    bench.act(where)
    assert bench.bodies("dead-letter") == [letter(1)]
    assert "a claim holds the dead letter: it stays" in bench.said()


@pytest.mark.parametrize("action", ["redrive", "delete"])
def test_no_more_are_taken_than_were_confirmed(bench: Bench, action: str) -> None:
    bench.real.post("letters", [letter(number) for number in range(30)])
    assert "There are 30 in" in bench.page(f"/{action}")
    bench.act(f"/{action}", most="25")
    assert bench.bodies("dead-letter") == [letter(number) for number in range(25, 30)]
    for most in ("", "-1", "x"):
        bench.act(f"/{action}", most=most)
    assert len(bench.bodies("dead-letter")) == 5


def test_one_or_all_are_deleted_but_for_what_a_claim_holds(bench: Bench) -> None:
    ids = bench.real.post("letters", [letter(1), "odd", *(letter(number) for number in range(2, 300))])
    bench.act(bench.links()[f"Delete {ids[1]}"])
    assert "odd" not in bench.bodies("dead-letter")
    assert "Deleted." in bench.said()
    assert bench.real.claim("letters", ttl=60, grace=60, limit=2)
    bench.act(bench.links()["Delete all"])
    assert bench.bodies("dead-letter") == [letter(1), letter(2)]
    assert bench.bodies("request") == []


def test_what_is_no_dead_letter_can_only_be_deleted(bench: Bench) -> None:
    id_, _ = bench.real.post("letters", ["odd", letter(1)])
    answer = bench.client.get(f"/redrive?id={id_}")
    assert (answer.status_code, "it can only be deleted" in answer.text) == (409, True)
    bench.act("/redrive")
    assert "Redriven: 1." in bench.said()
    assert "1 messages stay" in bench.said()
    assert (bench.bodies("dead-letter"), bench.real.stats("letters").free) == (["odd"], 1)


def test_a_letter_that_goes_before_its_action_begins_is_not_redriven(bench: Bench) -> None:
    (id_,) = bench.real.post("letters", [letter(1)])
    action, fields = bench.form(bench.links()["Redrive old-1"])
    looks = bench.queues.calls["browse"]

    def take_away() -> None:
        if bench.queues.calls["browse"] == looks + 2:  # the first look is of the form, the second of the action
            bench.real.delete("letters", [id_])

    bench.queues.fails["browse"] = take_away
    assert bench.client.post(action, data=fields).status_code == 303
    wait_until(lambda: not bench.web.working.locked())
    assert "not there any more" in bench.said()
    assert bench.bodies("request") == []


def test_one_action_at_a_time_and_a_long_one_goes_on_in_its_own_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("claim_queues.web.WAIT_S", 0.05)
    bench.real.post("letters", [letter(1)])
    action, fields = bench.form("/redrive")
    go_on = threading.Event()
    bench.queues.fails["post"] = lambda: go_on.wait(30) and None
    assert bench.client.post(action, data=fields).status_code == 303
    assert bench.said() == "Redriven: 0."
    busy = bench.client.post("/delete", data=fields)
    assert (busy.status_code, "wait until that has ended" in busy.text) == (409, True)
    go_on.set()
    wait_until(lambda: not bench.web.working.locked())
    assert "Redriven: 1." in bench.said()
    assert bench.bodies("request") == [letter(1)["body"]]


def test_where_the_service_cannot_browse_there_are_numbers_and_redrive_all(blind: Bench) -> None:
    blind.real.post("letters", [letter(1), letter(2)])
    blind.look()
    page = blind.page()
    assert "Blind does not show messages without claiming them" in page
    assert numbers(page)[8] == "2"
    assert blind.links() == {"Redrive all": "/redrive"}
    for words in ('id="search"', "Newest", "cannot be read"):
        assert words not in page
    blind.act("/redrive")
    assert blind.bodies("request") == [letter(1)["body"], letter(2)["body"]]
    assert blind.bodies("dead-letter") == []


@pytest.mark.parametrize("path", ["/delete", "/redrive?id=a"])
def test_where_the_service_cannot_browse_all_else_is_refused_with_what_to_do(blind: Bench, path: str) -> None:
    blind.real.post("letters", [letter(1)])
    _, fields = blind.form("/redrive")
    for answer in (blind.client.get(path), blind.client.post(path, data=fields)):
        assert answer.status_code == 409
        assert "Blind neither shows nor deletes single messages" in answer.text
        assert "purge dead-letter" in html.unescape(answer.text)
    assert blind.bodies("dead-letter") == [letter(1)]


# The command


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/q"


def test_it_serves_until_a_signal(tmp_path: Path, url: str) -> None:
    port = free_port()
    env = {"WIDGET_WEB_PORT": str(port), "WIDGET_PORT": "1", "WIDGET_HOST": "0.0.0.0"}
    with script("claim_queues", "web", "--queue-url", url, "--create", cwd=tmp_path, env=env) as running:
        (link,) = wait_until(lambda: re.findall(rf"http://127\.0\.0\.1:{port}/\?token=\S+\n", running.err))
        with requests.Session() as browser, SqliteQueues(tmp_path / "q") as queues:
            assert "The embedded queue" in browser.get(link.strip(), timeout=ANSWER_S).text
            queues.post(REQUESTS, [1, 2, 3])
            wait_until(lambda: '"number">3<' in browser.get(f"http://127.0.0.1:{port}/", timeout=ANSWER_S).text)
        running.signal(signal.SIGTERM)
        assert running.exit_code() == 0
        assert running.out == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.com", "10.0.0.1"])
def test_it_serves_this_machine_alone(url: str, host: str) -> None:
    ended = run_command(cli, "web", "--queue-url", url, "--host", host)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "ssh -L" in ended.err


def test_missing_queues_are_told_and_no_file_is_made(url: str, tmp_path: Path) -> None:
    ended = run_command(cli, "web", "--queue-url", url)
    assert (ended.code, "create it with --create" in ended.err) == (1, True)
    assert not (tmp_path / "q").exists()
