"""The maker's answers, request by request: what is created, what is refused and why, and what its pages show."""

import html
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from doubles.signing_double import KEY, OLD_KEY, OLD_SECRET, SECRET, signed
from flask.testing import FlaskClient
from support import nth_id

from widget_maker import Faults, Maker
from widgets.signing import Signer
from widgets.store import Widgets

ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
OTHER_ID = "31f37378-54f4-11e5-ad75-3c970e65f732"
BODY = json.dumps({"widget_id": ID}).encode()
BATCH = json.dumps([{"message_id": "m1", "request": {"widget_id": ID}}]).encode()
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"}
Start = Callable[..., FlaskClient]


@pytest.fixture
def widgets(tmp_path: Path) -> Iterator[Widgets]:
    with closing(Widgets(tmp_path / "widgets.sqlite3")) as found:
        yield found


@pytest.fixture
def start(widgets: Widgets) -> Start:
    """A client of a maker with the given faults, further names and signer."""

    def start(faults: Faults | None = None, hosts: Sequence[str] = (), signer: Signer | None = None) -> FlaskClient:
        return Maker(widgets, faults or Faults(), hosts, signer).app.test_client()

    return start


@pytest.fixture
def client(start: Start) -> FlaskClient:
    return start()


def post(client: FlaskClient, widget_id: object = ID, **more: Any) -> Any:
    return client.post("/widgets", json={"widget_id": widget_id}, **more)


def post_body(client: FlaskClient, body: str | bytes, path: str = "/widgets", **headers: str) -> Any:
    return client.post(path, data=body, content_type="application/json", headers=headers)


def outcome(response: Any) -> tuple[int, str]:
    """Status and error code of an answer in the maker's own JSON."""
    assert isinstance(response.json["error"]["message"], str)
    return response.status_code, response.json["error"]["code"]


def widget_ids(client: FlaskClient) -> list[str]:
    return [widget["id"] for widget in client.get("/widgets?limit=100").json["widgets"]]


def posted(client: FlaskClient, count: int) -> list[str]:
    """So many widgets, created in this order."""
    made = [nth_id(number) for number in range(count)]
    items = [{"message_id": each, "request": {"widget_id": each}} for each in made]
    assert client.post("/widgets/batch", json=items).status_code == 200
    return made


def test_a_new_widget_is_answered_201_and_a_repeated_request_200_with_the_same_widget(client: FlaskClient) -> None:
    first, second, third = post(client), post(client), post(client, ID.upper())
    assert [each.status_code for each in (first, second, third)] == [201, 200, 200]
    assert first.json.keys() == {"id", "created_at"}
    assert first.json["id"] == ID
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.json["created_at"])
    assert first.data == second.data == third.data
    assert widget_ids(client) == [ID]
    assert client.get(f"/widgets/{ID}").json == client.get(f"/widgets/{ID.upper()}").json == first.json


def test_other_keys_of_a_request_are_ignored(client: FlaskClient) -> None:
    content = {"widget_id": ID, "color": "red", "__class__": {}, "é": "\ud800", "deep": json.loads("[" * 99 + "]" * 99)}
    assert post_body(client, json.dumps(content)).status_code == 201


@pytest.mark.parametrize("widget_id", [OTHER_ID, "%00", "é", "<b>", "'; DROP TABLE widget; --"])
def test_an_unknown_widget_is_answered_404_as_json_or_as_a_page_for_browsers(
    client: FlaskClient, widget_id: str
) -> None:
    for accept in ("*/*", "application/json", ""):
        assert outcome(client.get(f"/widgets/{widget_id}", headers={"Accept": accept})) == (404, "not_found")
    page = client.get(f"/widgets/{widget_id}", headers=BROWSER)
    assert (page.status_code, page.mimetype) == (404, "text/html")
    assert "there is no widget" in page.text
    assert "<b>" not in page.text


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"\xff", b"\xef\xbb\xbf{}", b"null", b"[]", b'"x"', '{"widget_id": "x"}'.encode("utf-16")),
        *(f'{{"widget_id": "{ID}", "x": {value}}}' for value in ("NaN", "-Infinity", "9" * 5000)),
        *(f'{{"widget_id": "{ID}"}} {{}}', "[" * 60_000, '{"x":' * 10_000),
    ],
    ids=lambda body: str(body[:30]),
)
def test_a_body_that_is_not_a_json_object_is_answered_400(client: FlaskClient, body: str | bytes) -> None:
    assert outcome(post_body(client, body)) == (400, "bad_json")
    assert widget_ids(client) == []


def test_a_body_may_have_64_kib_and_not_a_byte_more(client: FlaskClient) -> None:
    assert outcome(post_body(client, BODY.ljust(65_537))) == (413, "request_entity_too_large")
    assert post_body(client, BODY.ljust(65_536)).status_code == 201


def test_only_json_is_accepted(client: FlaskClient) -> None:
    for content_type in (None, "application/jsonx", "text/plain", "multipart/form-data"):
        response = client.post("/widgets", data=BODY, content_type=content_type)
        assert outcome(response) == (415, "unsupported_media_type")
    assert widget_ids(client) == []
    response = client.post("/widgets", data=BODY, content_type="application/json; charset=UTF-8")
    assert response.status_code == 201


@pytest.mark.parametrize(
    "widget_id",
    [
        *("this_is_not_a_valid_widget_id", f"{ID}\n", f"{{{ID}}}", f"urn:uuid:{ID}", ID.replace("-", ""), ID[:-1]),
        *(ID.replace("3", "٣"), ID.replace("31f3", "+1f3"), ID.replace("31f3", "3_f3")),
        *(ID.replace("11e5", "41e5"), ID.replace("ad75", "cd75")),
        *("x" * 60_000, "\x1b[2J\r\n\u2028\ud800", 5, True, None, [ID]),
    ],
    ids=lambda widget_id: ascii(widget_id)[:40],
)
def test_what_is_not_a_canonical_uuid_of_version_1_is_answered_422_and_shown(
    client: FlaskClient, widget_id: object
) -> None:
    response = post(client, widget_id)
    assert outcome(response) == (422, "bad_widget_id")
    message = response.json["error"]["message"]
    assert "is not a UUID of version 1" in message
    assert message.isprintable()
    assert len(message) < 300
    assert widget_ids(client) == []


def item(message_id: object, widget_id: object = ID) -> dict[str, Any]:
    return {"message_id": message_id, "receive_count": 1, "age": 0, "request": {"widget_id": widget_id}}


def post_batch(client: FlaskClient, *items: Any) -> Any:
    return client.post("/widgets/batch", json=list(items))


def answers(response: Any) -> dict[str, tuple[int, Any]]:
    assert response.status_code == 200
    return {found["message_id"]: (found["status"], found["body"]) for found in response.json["answers"]}


def test_a_batch_is_answered_item_by_item(client: FlaskClient) -> None:
    made = post(client, OTHER_ID).json
    no_request = {"message_id": "none", "request": 3}
    items = item("new", ID.upper()), item("known", OTHER_ID), item("bad", "no id"), no_request, item("again")
    found = answers(post_batch(client, *items))
    statuses = {id_: status for id_, (status, _) in found.items()}
    assert statuses == {"new": 201, "known": 200, "bad": 422, "none": 400, "again": 200}
    assert found["new"][1] == found["again"][1] == client.get(f"/widgets/{ID}").json
    assert found["known"][1] == made
    assert found["bad"][1]["error"]["code"] == "bad_widget_id"
    assert widget_ids(client) == [ID, OTHER_ID]


@pytest.mark.parametrize(
    "batch",
    [
        *({"widget_id": ID}, {}, [], "no batch", 3, [1], [[]], ["message_id"], [{"message_id": "m"}]),
        [{"request": {"widget_id": ID}}],
        [{"message_id": [], "request": {}}],
        [item("twice"), item("twice", OTHER_ID)],
    ],
    ids=str,
)
def test_what_is_not_a_batch_creates_nothing_and_rejects_no_request(client: FlaskClient, batch: Any) -> None:
    assert outcome(client.post("/widgets/batch", json=batch)) == (421, "bad_batch")
    assert widget_ids(client) == []


def test_a_batch_may_have_20_requests_of_the_greatest_size(client: FlaskClient) -> None:
    filled = [{**item(str(number), nth_id(number)), "filling": "x" * 65_000} for number in range(20)]
    assert len(answers(post_batch(client, *filled))) == 20
    assert outcome(post_batch(client, *filled, {**item("more"), "filling": "x" * 20_000}))[0] == 413


@pytest.mark.parametrize(("path", "body"), [("/widgets", BODY), ("/widgets/batch", BATCH)])
def test_a_maker_with_secrets_creates_only_what_one_of_them_signed(start: Start, path: str, body: bytes) -> None:
    client = start(None, (), Signer(f"{SECRET} {OLD_SECRET}", "a test"))
    refused = [
        ({}, "--signing-secret-file"),
        (signed(body, key=b"another key of quite the same size"), "--signing-secret-file"),
        (signed(body) | {"webhook-id": "\xe9"}, "--signing-secret-file"),
        (signed(body) | {"webhook-signature": " ".join(["v1,\xe9\xff"] * 20_000)}, "--signing-secret-file"),
        (signed(body, ahead_s=-310), "set the clocks"),
    ]
    for headers, advice in refused:
        response = post_body(client, body, path, **headers)
        assert outcome(response) == (401, "bad_signature")
        assert advice in response.json["error"]["message"]
        assert response.headers["WWW-Authenticate"] == "StandardWebhooks"
    assert widget_ids(client) == []
    for key in (KEY, OLD_KEY):
        assert post_body(client, body, path, **signed(body, key=key)).status_code in {200, 201}
    for page in ("/", "/widgets", "/healthz", "/metrics"):
        assert client.get(page).status_code == 200


def test_pages_show_every_widget_once_and_newest_first_also_while_more_are_created(client: FlaskClient) -> None:
    made = posted(client, 45)
    seen, sizes, page = [], [], client.get("/widgets").json
    post(client, OTHER_ID)
    while True:
        seen += [widget["id"] for widget in page["widgets"]]
        sizes.append(len(page["widgets"]))
        if page["next"] is None:
            break
        page = client.get("/widgets", query_string={"after": page["next"]}).json
    assert (seen, sizes) == (made[::-1], [24, 21])
    assert client.get("/widgets?after=" + "9" * 19).json == client.get("/widgets").json
    assert client.get("/widgets?after=0").json == {"widgets": [], "next": None}


@pytest.mark.parametrize("path", ["/widgets", "/"])
@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=101", "limit=-1", "limit=", "limit=x", "limit=" + "9" * 5000),
        *("after=x", "after=-1", "after=92233720368547758080", "after=" + "9" * 5000),
    ],
    ids=lambda text: text[:30],
)
def test_a_bad_parameter_is_answered_400(client: FlaskClient, path: str, query: str) -> None:
    assert outcome(client.get(f"{path}?{query}")) == (400, "bad_parameter")


def browse(client: FlaskClient, path: str, **query: Any) -> str:
    response = client.get(path, query_string=query or None, headers=BROWSER)
    assert (response.status_code, response.mimetype) == (200, "text/html")
    return response.text


def shown_ids(page: str) -> list[str]:
    return re.findall(r'<li id="w-([^"]+)"', page)


def links(page: str) -> dict[str, str]:
    """Where the links between pages lead, by their names."""
    found = re.findall(r'<a href="([^"]+)">(\w+)</a>', page[page.index("<nav") :])
    return {name: html.unescape(link) for link, name in found}


def test_the_page_and_the_metrics_count_what_happened(start: Start) -> None:
    client = start(Faults(fail_rate=1, latency=0.001, fault_id=[OTHER_ID]))
    for widget_id in (ID, ID, "no id", OTHER_ID):
        post(client, widget_id)
    post_body(client, "{")
    post_batch(client, item("m", "no id"), item("n", nth_id(0)))
    for asked in ("/favicon.ico", f"/widgets/{OTHER_ID}", "/?limit=0"):  # no request for a widget
        assert client.get(asked).status_code in {400, 404}
    assert {line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")} == {
        'widget_maker_posts_total{outcome="created"} 2.0',
        'widget_maker_posts_total{outcome="repeated"} 1.0',
        'widget_maker_rejections_total{code="bad_widget_id"} 2.0',
        'widget_maker_rejections_total{code="bad_json"} 1.0',
        'widget_maker_faults_total{fault="latency"} 1.0',
        'widget_maker_faults_total{fault="failure"} 1.0',
    }
    text = browse(client, "/")
    assert ">2 widgets made</h1>" in text
    totals = {"Requests": "3", "Rejected requests": "3", "Faults played": "2"}
    assert dict(re.findall(r'<dt>(.+?)</dt><dd class="number">(.+?)</dd>', text)) == totals
    parts = ["2 created", "1 repeated", "2 bad widget id", "1 bad json", "1 latency", "1 failure"]
    assert re.findall(r'<dd class="note">(.+?)</dd>', text) == parts


def test_pages_lead_from_the_newest_to_the_oldest_widget_and_back(client: FlaskClient) -> None:
    made = posted(client, 45)
    text, seen = browse(client, "/"), []
    for mark in ('<meta http-equiv="refresh"', "live.js"):
        assert mark in text
        assert mark not in browse(client, "/?after=5")
    assert links(text).keys() == {"Older", "Oldest"}
    while True:
        seen += shown_ids(text)
        if "Older" not in links(text):
            break
        assert shown_ids(browse(client, links(text)["Oldest"])) == made[23::-1]
        text = browse(client, links(text)["Older"])
    assert seen == made[::-1]
    assert "21 to 1 of 45" in text
    assert shown_ids(browse(client, links(text)["Newer"])) == made[44:20:-1]
    assert links(browse(client, links(text)["Newest"])).keys() == {"Older", "Oldest"}


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (Faults(), []),
        (Faults(fail_rate=0.001, latency=0.5), ["0.1% of POSTs fail and answers come 0.5 s late."]),
        (Faults(fail_rate=1, fault_id=frozenset([ID])), ["100% of POSTs fail, for 1 widget id only."]),
        (Faults(fail_rate=1, outage=(0, 1e9)), ["every POST is answered 503."]),
    ],
    ids=str,
)
def test_the_page_says_what_faults_are_played(start: Start, faults: Faults, says: list[str]) -> None:
    notices = re.findall(r'<p class="notice"><strong>.+?</strong>(.+?)</p>', browse(start(faults), "/"), re.S)
    assert [" ".join(notice.split()) for notice in notices] == says


def test_a_picture_is_the_same_for_one_widget_on_every_page_and_differs_between_widgets(client: FlaskClient) -> None:
    posted(client, 20)
    picture = re.compile(r'<svg class="picture".+?</svg>', re.S)
    listed = picture.findall(browse(client, "/"))
    assert len(set(listed)) == 20
    assert picture.findall(browse(client, f"/widgets/{nth_id(19)}")) == listed[:1]


def test_a_search_finds_the_widgets_whose_ids_begin_so(client: FlaskClient) -> None:
    made = posted(client, 0x20)
    assert shown_ids(browse(client, "/search", id=" 0000001 ")) == made[0x10:]
    for searched in ("00000010-54F4-11e5", nth_id(0x10)):
        assert shown_ids(browse(client, "/search", id=searched)) == [nth_id(0x10)]


def test_what_a_search_found_has_pages_too(client: FlaskClient) -> None:
    made, text = posted(client, 45), browse(client, "/search", id="0000")
    seen = shown_ids(text)
    while more := links(text).get("More"):
        seen += shown_ids(text := browse(client, more))
    assert seen == made


@pytest.mark.parametrize("searched", ["<script>alert(1)</script>", "%", "_", "\0", OTHER_ID, "x" * 5000])
def test_a_search_that_finds_nothing_says_so(client: FlaskClient, searched: str) -> None:
    post(client)
    text = browse(client, "/search", id=searched)
    assert shown_ids(text) == []
    assert "id begins with <code>" in text
    assert "<script>" not in text
    assert len(text) < 5000


def test_the_page_needs_no_file_from_elsewhere(client: FlaskClient) -> None:
    post(client)
    files = re.findall(r'(?:href|src)="([^"]+)"', browse(client, "/"))
    assert files
    for file in files:
        assert file.startswith("/")
        assert client.get(file, buffered=True).status_code == 200


def test_the_description_names_every_route_and_its_methods(client: FlaskClient) -> None:
    described = client.get("/openapi.json", buffered=True).json["paths"]
    routes: dict[str, set[str]] = {}
    for rule in client.application.url_map.iter_rules():
        methods = {method.lower() for method in rule.methods or ()} - {"head", "options"}
        routes.setdefault(re.sub(r"<(\w+)>", r"{\1}", rule.rule), set()).update(methods)
    del routes["/static/<path:filename>"]
    assert {path: set(methods) for path, methods in described.items()} == routes


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST:5000", "[::1]:5000", "10.1.2.3:80", "Widgets.Example:80", ""])
def test_addresses_and_its_allowed_names_are_answered_at_any_port(start: Start, host: str) -> None:
    assert start(None, ["widgets.example"]).get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost:80:80", "[::1", "a b", "é"])
def test_any_other_host_is_answered_421_with_advice_but_a_probe_may_name_any(client: FlaskClient, host: str) -> None:
    for path in ("/", "/widgets", "/metrics", "/static/widgets.css", "/nothing"):
        response = client.get(path, headers={"Host": host})
        assert outcome(response) == (421, "host_not_allowed")
        assert "--allowed-host" in response.json["error"]["message"]
    assert outcome(post(client, headers={"Host": host}))[0] == 421
    assert client.get("/healthz", headers={"Host": host}).status_code == 200
    assert widget_ids(client) == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", path, 200) for path in ("/", "/widgets", "/healthz", "/metrics", "/static/widgets.css")),
        *(("GET", path, 404) for path in ("/nothing", "/static/../widget_maker.py", "/widgets/")),
        *(("GET", "/widgets?limit=0", 400), ("DELETE", "/widgets", 405), ("POST", "/widgets", 415)),
    ],
)
def test_every_answer_says_who_it_is_and_allows_other_web_sites_nothing(
    client: FlaskClient, method: str, path: str, status: int
) -> None:
    for headers in ({}, BROWSER):
        response = client.open(path, method=method, buffered=True, headers=headers)
        assert response.status_code == status
        assert response.headers["Widget-Maker"] == "1"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        policy = response.headers["Content-Security-Policy"]
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
        assert "unsafe" not in policy
        assert not [name for name, _ in response.headers if name.lower().startswith("access-control-")]
        assert status < 400 or headers == BROWSER or outcome(response)[0] == status


def test_a_bug_is_answered_500_without_its_traceback(client: FlaskClient) -> None:
    client.application.view_functions["health"] = lambda: 1 // 0
    response = client.get("/healthz")
    assert outcome(response) == (500, "internal_server_error")
    assert "ZeroDivisionError" not in response.text


def test_the_fail_rate_is_the_share_of_valid_requests_answered_500(start: Start) -> None:
    random.seed(1)
    client = start(Faults(fail_rate=0.3))
    found = answers(post_batch(client, *(item(str(number), nth_id(number)) for number in range(2000))))
    failed = Counter(status for status, _ in found.values())
    assert failed.keys() == {500, 201}
    assert 500 < failed[500] < 700


def test_faults_can_strike_one_id_only_also_in_a_batch_which_waits_once(start: Start) -> None:
    client = start(Faults(fail_rate=1, latency=0.2, fault_id=[ID]))
    began = time.monotonic()
    found = answers(post_batch(client, item("struck", ID.upper()), item("twice"), item("spared", OTHER_ID)))
    assert time.monotonic() - began >= 0.2
    assert {id_: status for id_, (status, _) in found.items()} == {"struck": 500, "twice": 500, "spared": 201}
    assert post(client, OTHER_ID).status_code == 200
    assert 'fault="latency"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(("seconds", "is_out"), [(-10, False), (10, True), (90, True), (110, False)])
def test_an_outage_lasts_from_its_start_to_its_end(start: Start, seconds: int, is_out: bool) -> None:
    client = start(Faults(outage=(time.monotonic() - seconds, 100)))
    for response in (post(client), post_batch(client, item("m", OTHER_ID)), client.get("/healthz")):
        assert response.status_code in ({503} if is_out else {200, 201})
        assert not is_out or (outcome(response), response.headers["Retry-After"]) == ((503, "outage"), "1")
    assert client.get("/").status_code == 200
