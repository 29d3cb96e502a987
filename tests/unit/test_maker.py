"""The maker's answers, request by request, and what it keeps."""

import html
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import apsw
import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from signing_double import KEY, OLD_KEY, OLD_SECRET, SECRET, signed
from support import wait_until

import claim_queues.store
import widget_maker
import widgets as widgets_module
from claim_queues import StoreError
from claim_queues.signing import Signer
from page import chooser, measure_rates, read_id, round_up
from widget_maker import (
    LOCAL_HOSTS,
    MOST_HOSTS_LOGGED,
    NO_FAULTS,
    SECURITY_HEADERS,
    Faults,
    Refused,
    create_app,
    parse_json,
    parse_request,
)
from widgets import SELECT_FOUND, SELECT_PAGE, Widgets

ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
OTHER_ID = "31f37378-54f4-11e5-ad75-3c970e65f732"
LIMIT_BYTES = 65_536
STARTED = 1000.0


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "widgets.sqlite3"


@pytest.fixture
def start(database: Path) -> Callable[..., FlaskClient]:
    """A client of a maker with the given faults and allowed hosts."""
    return lambda *options: create_app(database, *options).test_client()


@pytest.fixture
def client(start: Callable[..., FlaskClient]) -> FlaskClient:
    return start()


@pytest.fixture
def other_process(database: Path) -> Iterator[apsw.Connection]:
    """Another connection to the maker's file."""
    connection = apsw.Connection(str(database))
    yield connection
    connection.close()


def post(client: FlaskClient, widget_id: object = ID, **more: Any) -> Any:
    return client.post("/widgets", json={"widget_id": widget_id}, **more)


def post_body(client: FlaskClient, body: str | bytes) -> Any:
    return client.post("/widgets", data=body, content_type="application/json")


def error_code(response: Any) -> str:
    error = response.json["error"]
    assert isinstance(error["message"], str)
    return error["code"]


def widget_ids(client: FlaskClient) -> list[str]:
    return [widget["id"] for widget in client.get("/widgets").json["widgets"]]


def number_n(number: int) -> str:
    return f"{number:08x}-54f4-11e5-ad75-3c970e65f731"


# One widget for each id


def test_a_new_widget_is_answered_201_with_its_id_and_its_time(client: FlaskClient) -> None:
    response = post(client)
    assert response.status_code == 201
    assert response.json.keys() == {"id", "created_at"}
    assert response.json["id"] == ID
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", response.json["created_at"])


def test_a_repeated_request_is_answered_200_with_the_same_widget(client: FlaskClient) -> None:
    first, second = post(client), post(client)
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.data == first.data
    assert widget_ids(client) == [ID]


def test_upper_and_lower_case_name_one_widget_kept_in_lower_case(client: FlaskClient) -> None:
    assert post(client, ID.upper()).json["id"] == ID
    assert post(client, ID).status_code == 200


def test_widgets_are_there_after_a_restart(start: Callable[..., FlaskClient]) -> None:
    post(start())
    assert widget_ids(start()) == [ID]


def test_other_keys_of_a_request_are_ignored(client: FlaskClient) -> None:
    assert post_body(client, json.dumps({"widget_id": ID, "color": "red", "__class__": {}})).status_code == 201


def test_a_widget_can_be_looked_up_in_either_case(client: FlaskClient) -> None:
    made = post(client).json
    assert client.get(f"/widgets/{ID}").json == made
    assert client.get(f"/widgets/{ID.upper()}").json == made


@pytest.mark.parametrize("widget_id", [OTHER_ID, "nothing", "%00", "a b", "é", "'; DROP TABLE widget; --"])
def test_an_unknown_widget_is_answered_404(client: FlaskClient, widget_id: str) -> None:
    post(client)
    response = client.get(f"/widgets/{widget_id}")
    assert (response.status_code, error_code(response)) == (404, "not_found")


# What is no request


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"null",
        b"[]",
        b'"x"',
        '{"widget_id": "x"}'.encode("utf-16"),
        f'{{"widget_id": "{ID}", "x": NaN}}',
        f'{{"widget_id": "{ID}", "x": -Infinity}}',
        f'{{"widget_id": "{ID}", "x": 1e999}}',
        f'{{"widget_id": "{ID}", "x": {"9" * 5000}}}',
        f'{{"widget_id": "{ID}", "widget_id": "{ID}"}}',
        f'{{"widget_id": "{ID}", "x": {{"y": 1, "y": 1}}}}',
        f'{{"widget_id": "{ID}", "x": "\\ud800"}}',
        f'{{"widget_id": "{ID}", "\\ud800": 1}}',
        f'{{"widget_id": "{ID}"}} {{}}',
        "[" * 60_000,
        '{"x":' * 10_000,
    ],
)
def test_a_body_that_is_no_json_object_is_answered_400(client: FlaskClient, body: str | bytes) -> None:
    response = post_body(client, body)
    assert (response.status_code, error_code(response)) == (400, "bad_json")
    assert widget_ids(client) == []


def test_a_body_of_64_kib_is_taken(client: FlaskClient) -> None:
    assert post_body(client, json.dumps({"widget_id": ID}).ljust(LIMIT_BYTES)).status_code == 201


def test_a_body_of_more_is_answered_413(client: FlaskClient) -> None:
    assert post_body(client, json.dumps({"widget_id": ID}).ljust(LIMIT_BYTES + 1)).status_code == 413
    assert widget_ids(client) == []


def test_a_body_of_more_that_does_not_say_its_length_is_answered_413(client: FlaskClient) -> None:
    response = client.post(
        "/widgets",
        input_stream=BytesIO(json.dumps({"widget_id": ID}).ljust(2 * LIMIT_BYTES).encode()),
        content_type="application/json",
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert response.status_code == 413
    assert widget_ids(client) == []


def test_a_body_that_says_it_is_larger_is_refused_unread(client: FlaskClient) -> None:
    stream = BytesIO(b"{}")
    response = client.post(
        "/widgets",
        input_stream=stream,
        content_type="application/json",
        environ_overrides={"CONTENT_LENGTH": str(10**10)},
    )
    assert (response.status_code, stream.tell()) == (413, 0)


@pytest.mark.parametrize("body", [json.dumps({"widget_id": ID}), "{"])
def test_a_body_that_is_shorter_than_it_says_is_answered_400(client: FlaskClient, body: str) -> None:
    response = client.post(
        "/widgets",
        data=body,
        content_type="application/json",
        environ_overrides={"CONTENT_LENGTH": str(len(body) + 1), "wsgi.input_terminated": True},
    )
    assert (response.status_code, error_code(response)) == (400, "bad_body")
    assert widget_ids(client) == []


def test_too_many_bodies_on_their_way_are_answered_503(
    start: Callable[..., FlaskClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widget_maker, "MOST_READERS", 0)
    response = post(start())
    assert (response.status_code, error_code(response)) == (503, "busy")
    assert int(response.headers["Retry-After"]) > 0


def nested(levels: int, kind: Any) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"x": value} if kind is dict else [value]
    return value


@pytest.mark.parametrize("kind", [dict, list])
def test_a_request_is_nested_32_levels_deep_at_most(client: FlaskClient, kind: type) -> None:
    taken = client.post("/widgets", json={"widget_id": ID, "x": nested(30, kind)})
    refused = client.post("/widgets", json={"widget_id": OTHER_ID, "x": nested(31, kind)})
    assert (taken.status_code, refused.status_code) == (201, 422)
    assert error_code(refused) == "too_complex"


@pytest.mark.parametrize("inside", [lambda keys: keys, lambda keys: {"x": [[keys]]}], ids=["outer", "inner"])
def test_an_object_of_a_request_has_64_keys_at_most(client: FlaskClient, inside: Callable[[Any], Any]) -> None:
    for keys, status in ((64, 201), (65, 422)):
        widget_id = number_n(keys)
        content = inside({f"k{number}": 1 for number in range(keys - 1)} | {"widget_id": widget_id})
        response = client.post("/widgets", json=content | {"widget_id": widget_id})
        assert response.status_code == status
    assert error_code(response) == "too_complex"


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=UTF-8"])
def test_json_in_utf8_is_taken(client: FlaskClient, content_type: str) -> None:
    body = json.dumps({"widget_id": ID})
    assert client.post("/widgets", data=body, content_type=content_type).status_code == 201


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        "application/jsonx",
    ],
)
def test_any_other_content_type_is_answered_415(client: FlaskClient, content_type: str | None) -> None:
    response = client.post("/widgets", data=json.dumps({"widget_id": ID}), content_type=content_type)
    assert (response.status_code, error_code(response)) == (415, "unsupported_media_type")
    assert widget_ids(client) == []


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_an_encoded_body_is_answered_415(client: FlaskClient, encoding: str) -> None:
    assert post(client, headers={"Content-Encoding": encoding}).status_code == 415


@pytest.mark.parametrize(
    ("widget_id", "says"),
    [
        ("this_is_not_a_valid_widget_id", "'this_is_not_a_valid_widget_id' is no UUID"),
        ("", "is no UUID"),
        (f"{ID}\n", "is no UUID"),
        (f" {ID}", "is no UUID"),
        (f"{{{ID}}}", "is no UUID"),
        (f"urn:uuid:{ID}", "is no UUID"),
        (ID.replace("-", ""), "is no UUID"),
        (ID.replace("3", "٣"), "is no UUID"),
        (ID.replace("f", "\N{FULLWIDTH LATIN SMALL LETTER F}"), "is no UUID"),
        (ID[:-1], "is no UUID"),
        ("x" * 60_000, "is no UUID"),
        ("\x1b[2J\r\n\u2028", r"\x1b[2J\r\n\u2028"),
        ("31f37378-54f4-41e5-ad75-3c970e65f731", "version 4"),
        ("31f37378-54f4-71e5-ad75-3c970e65f731", "version 7"),
        ("31f37378-54f4-11e5-cd75-3c970e65f731", "RFC 4122"),
        ("31f37378-54f4-11e5-7d75-3c970e65f731", "RFC 4122"),
        ("00000000-0000-0000-0000-000000000000", "RFC 4122"),
        (5, "must be a string"),
        (1.5, "must be a string"),
        (True, "must be a string"),
        (None, "must be a string"),
        ([ID], "must be a string"),
        ({"id": ID}, "must be a string"),
    ],
)
def test_what_is_no_widget_id_is_answered_422_and_told_why(client: FlaskClient, widget_id: object, says: str) -> None:
    response = post(client, widget_id)
    assert (response.status_code, error_code(response)) == (422, "bad_widget_id")
    message = response.json["error"]["message"]
    assert says in message.replace("\\\\", "\\")
    assert message.isprintable()
    assert len(message) < 300
    assert widget_ids(client) == []


def test_a_missing_widget_id_is_answered_422(client: FlaskClient) -> None:
    response = post_body(client, b"{}")
    assert (response.status_code, response.json["error"]["message"]) == (422, "widget_id is missing")


@given(st.binary() | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(json.dumps).map(str.encode))
def test_whatever_the_body_holds_it_is_refused_or_names_a_canonical_id(body: bytes) -> None:
    with suppress(Refused):
        assert re.fullmatch("[0-9a-f-]{36}", parse_request(parse_json(body)))


@given(
    st.from_regex(
        r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-1[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}", fullmatch=True
    )
)
def test_every_canonical_uuid_of_version_1_is_a_widget_id(widget_id: str) -> None:
    assert parse_request({"widget_id": widget_id}) == widget_id.lower()


# Batches


def item(message_id: object, widget_id: object = ID) -> dict[str, Any]:
    return {"message_id": message_id, "receive_count": 1, "age": 0, "request": {"widget_id": widget_id}}


def post_batch(client: FlaskClient, *items: Any) -> Any:
    return client.post("/widgets/batch", json=list(items))


def answers(response: Any) -> dict[str, tuple[int, Any]]:
    assert response.status_code == 200
    return {found["message_id"]: (found["status"], found["body"]) for found in response.json["answers"]}


def test_a_batch_is_answered_item_by_item(client: FlaskClient) -> None:
    made = post(client, OTHER_ID).json
    found = answers(
        post_batch(client, item("new", ID.upper()), item("known", OTHER_ID), item("bad", "no id"), item("again"))
    )
    assert {id_: status for id_, (status, _) in found.items()} == {"new": 201, "known": 200, "bad": 422, "again": 200}
    assert found["new"][1] == found["again"][1] == client.get(f"/widgets/{ID}").json
    assert found["known"][1] == made
    assert found["bad"][1]["error"]["code"] == "bad_widget_id"
    assert widget_ids(client) == [ID, OTHER_ID]


def test_a_single_request_among_the_batches_is_not_rejected_for_good(client: FlaskClient) -> None:
    response = client.post("/widgets/batch", json={"widget_id": ID})
    assert (response.status_code, error_code(response)) == (421, "no_batch")
    assert widget_ids(client) == []


@pytest.mark.parametrize(
    "batch",
    [
        [],
        "no batch",
        [1],
        [item(7)],
        [{"message_id": "m"}],
        [{"request": {"widget_id": ID}}],
        [item("twice"), item("twice", OTHER_ID)],
    ],
)
def test_what_is_no_batch_is_answered_400_and_makes_nothing(client: FlaskClient, batch: Any) -> None:
    response = client.post("/widgets/batch", json=batch)
    assert (response.status_code, error_code(response)) == (400, "bad_batch")
    assert widget_ids(client) == []


@pytest.mark.parametrize("request_", [None, 3, [], {}, {"widget_id": None}])
def test_an_item_that_is_no_request_spoils_only_itself(client: FlaskClient, request_: Any) -> None:
    found = answers(post_batch(client, {"message_id": "bad", "request": request_}, item("good")))
    assert (found["bad"][0] in {400, 422}, found["good"][0]) == (True, 201)


def test_a_batch_may_have_twenty_requests_of_the_greatest_size(client: FlaskClient) -> None:
    filled = [{**item(str(number), number_n(number)), "filling": "x" * 65_000} for number in range(20)]
    assert len(answers(post_batch(client, *filled))) == 20
    response = post_batch(client, *filled, {**item("more"), "filling": "x" * 20_000})
    assert (response.status_code, error_code(response)) == (413, "request_entity_too_large")


def test_a_request_too_large_to_be_posted_alone_is_refused_in_a_batch_too(client: FlaskClient) -> None:
    frame = len(json.dumps({"widget_id": ID, "note": ""}))
    fits, over = (
        {"widget_id": id_, "note": "é" * ((LIMIT_BYTES - frame) // 6) + "x" * ((LIMIT_BYTES - frame) % 6 + more)}
        for id_, more in ((ID, 0), (OTHER_ID, 1))
    )
    items = [{"message_id": "fits", "request": fits}, {"message_id": "over", "request": over}, item("good")]
    found = answers(post_batch(client, *items))
    assert {id_: status for id_, (status, _) in found.items()} == {"fits": 201, "over": 413, "good": 200}
    assert found["over"][1]["error"]["code"] == "request_entity_too_large"
    for request_, status in ((fits, 200), (over, 413)):
        assert client.post("/widgets", data=json.dumps(request_), content_type="application/json").status_code == status
    assert widget_ids(client) == [ID]


def test_faults_strike_the_items_of_a_batch_one_by_one(start: Callable[..., FlaskClient]) -> None:
    waits: list[float] = []
    faults = Faults(fail_rate=1.0, latency_s=2.0, ids=frozenset([ID]), sleep=waits.append)
    found = answers(post_batch(start(faults), item("struck"), item("spared", OTHER_ID)))
    assert (found["struck"][0], found["spared"][0], waits) == (500, 201, [2.0])


def test_a_batch_during_an_outage_is_answered_503(start: Callable[..., FlaskClient]) -> None:
    response = post_batch(start(Faults(outage=(0.0, 1e9), started=0.0)), item("m"))
    assert (response.status_code, error_code(response)) == (503, "outage")


# Signatures


@pytest.fixture
def signing(start: Callable[..., FlaskClient]) -> FlaskClient:
    """A client of a maker that takes what one of two secrets has signed."""
    return start(NO_FAULTS, LOCAL_HOSTS, Signer([SECRET, OLD_SECRET]))


BODY = json.dumps({"widget_id": ID}).encode()
BATCH = json.dumps([{"message_id": "m1", "request": {"widget_id": ID}}]).encode()
each_post = pytest.mark.parametrize(("path", "body"), [("/widgets", BODY), ("/widgets/batch", BATCH)])


def post_signed(client: FlaskClient, headers: dict[str, str], path: str = "/widgets", body: bytes = BODY) -> Any:
    return client.post(path, data=body, content_type="application/json", headers=headers)


@each_post
@pytest.mark.parametrize("key", [KEY, OLD_KEY])
def test_what_either_secret_signed_is_made(signing: FlaskClient, path: str, body: bytes, key: bytes) -> None:
    assert post_signed(signing, signed(body, key=key), path, body).status_code in {200, 201}
    assert widget_ids(signing) == [ID]


@each_post
@pytest.mark.parametrize(
    "change",
    [
        lambda _: {},
        lambda body: signed(body, key=b"another key of quite the same size"),
        lambda body: signed(body + b" "),
        lambda body: signed(body, ahead_s=-310),
        lambda body: signed(body) | {"webhook-id": "m2"},
        lambda body: signed(body) | {"webhook-signature": "v1,\xe9"},
        lambda body: signed(body) | {"webhook-signature": " ".join(["v1,AAAA"] * 10_000)},
    ],
    ids=["none", "another key", "another body", "old", "another id", "not ASCII", "10,000"],
)
def test_what_is_not_signed_is_answered_401_and_makes_nothing(
    signing: FlaskClient, path: str, body: bytes, change: Callable[[bytes], dict[str, str]]
) -> None:
    response = post_signed(signing, change(body), path, body)
    assert (response.status_code, error_code(response)) == (401, "bad_signature")
    assert response.headers["WWW-Authenticate"] == "StandardWebhooks"
    assert widget_ids(signing) == []


@pytest.mark.parametrize("ahead_s", [-310, 310])
def test_a_signature_of_another_time_is_a_matter_of_clocks_not_of_secrets(signing: FlaskClient, ahead_s: int) -> None:
    said = post_signed(signing, signed(BODY, ahead_s=ahead_s)).json["error"]["message"]
    assert "set the clocks" in said
    assert "secret" not in said


def test_a_signed_post_that_is_sent_again_changes_nothing(signing: FlaskClient) -> None:
    headers = signed(BODY)
    first, second = post_signed(signing, headers), post_signed(signing, headers)
    assert (first.status_code, second.status_code, first.data) == (201, 200, second.data)


def test_only_writing_needs_a_signature(signing: FlaskClient) -> None:
    for path in ("/", "/widgets", "/healthz", "/metrics"):
        assert signing.get(path).status_code == 200


def test_a_body_that_is_too_large_is_answered_413_whoever_signed_it(signing: FlaskClient) -> None:
    body = BODY.ljust(LIMIT_BYTES + 1)
    assert post_signed(signing, signed(body), body=body).status_code == 413


# Pages


def test_pages_show_every_widget_once_and_newest_first(client: FlaskClient) -> None:
    for number in range(45):
        post(client, number_n(number))
    seen, after, sizes = [], "", []
    while after is not None:
        page = client.get("/widgets", query_string={"after": after}).json
        seen += [widget["id"] for widget in page["widgets"]]
        sizes.append(len(page["widgets"]))
        after = page["next"]
    assert seen == [number_n(number) for number in reversed(range(45))]
    assert sizes == [20, 20, 5]


def test_a_page_that_ends_with_the_last_widget_has_no_next(client: FlaskClient) -> None:
    for number in range(3):
        post(client, number_n(number))
    assert client.get("/widgets?limit=3").json["next"] is None
    assert client.get("/widgets?limit=2").json["next"] is not None


def test_widgets_made_meanwhile_change_no_later_page(client: FlaskClient) -> None:
    for number in range(4):
        post(client, number_n(number))
    after = client.get("/widgets?limit=2").json["next"]
    post(client, number_n(4))
    later = client.get("/widgets", query_string={"after": after}).json
    assert [widget["id"] for widget in later["widgets"]] == [number_n(1), number_n(0)]


@pytest.mark.parametrize("path", ["/widgets", "/"])
@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=101", "limit=-1", "limit=1.5", "limit=", "limit=x", "limit=%D9%A1", "limit=" + "9" * 5000),
        *("after=x", "after=-1", "after=1.5", "after=%D9%A1", "after=9223372036854775808", "after=" + "9" * 5000),
    ],
)
def test_a_bad_parameter_is_answered_400(client: FlaskClient, path: str, query: str) -> None:
    response = client.get(f"{path}?{query}")
    assert (response.status_code, error_code(response)) == (400, "bad_parameter")


def test_a_page_reads_no_more_rows_than_it_shows(client: FlaskClient, other_process: apsw.Connection) -> None:
    plan = str(other_process.execute(f"EXPLAIN QUERY PLAN {SELECT_PAGE}", (5, 20)).fetchall())
    assert "SEARCH widget USING INTEGER PRIMARY KEY" in plan
    assert "TEMP B-TREE" not in plan


# The page for people


BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"}


def browse(client: FlaskClient, path: str, **query: Any) -> str:
    response = client.get(path, query_string=query or None, headers=BROWSER)
    assert (response.status_code, response.mimetype) == (200, "text/html")
    return response.text


def shown_ids(page: str) -> list[str]:
    return re.findall(r'<li id="w-([^"]+)"', page)


def ways(page: str) -> dict[str, str]:
    """Where the links between pages lead, by their names."""
    links = re.findall(r'<a href="([^"]+)">(\w+)</a>', page[page.index("<nav") :])
    return {name: html.unescape(link) for link, name in links}


def test_the_page_shows_the_newest_widgets_and_the_totals(start: Callable[..., FlaskClient]) -> None:
    client = start(Faults(fail_rate=1, ids=frozenset([OTHER_ID])))
    for number in range(25):
        post(client, number_n(number))
    post(client, number_n(0))
    post(client, "no id")
    post_body(client, "{")
    post_batch(client, item("m", "no id"), item("n", OTHER_ID))
    post(client, OTHER_ID)
    for asked in ("/favicon.ico", f"/widgets/{OTHER_ID}", "/?limit=0"):
        assert client.get(asked).status_code in {400, 404}
    assert client.delete("/widgets").status_code == 405
    text = browse(client, "/")
    assert shown_ids(text) == [number_n(number) for number in range(24, 4, -1)]
    assert re.findall(r'<dt>(.+?)</dt><dd class="number">(.+?)</dd>', text) == [
        ("Widgets", "25"), ("Repeated requests", "1"), ("Rejected requests", "3"), ("Faults played", "2")
    ]  # fmt: skip
    assert re.findall(r'<dd class="note">(.+?)</dd>', text) == ["1 bad json", "2 bad widget id", "2 failure"]


def test_pages_lead_from_the_newest_to_the_oldest_widget_and_back(client: FlaskClient) -> None:
    made = [number_n(number) for number in range(45)]
    for widget_id in made:
        post(client, widget_id)
    text, seen = browse(client, "/"), []
    assert ways(text).keys() == {"Older", "Oldest"}
    while True:
        seen += shown_ids(text)
        if "Older" not in ways(text):
            break
        assert shown_ids(browse(client, ways(text)["Oldest"])) == made[19::-1]
        text = browse(client, ways(text)["Older"])
    assert seen == made[::-1]
    assert "5 to 1 of 45" in text
    assert shown_ids(browse(client, ways(text)["Newer"])) == made[24:4:-1]
    assert ways(browse(client, ways(text)["Newest"])).keys() == {"Older", "Oldest"}


def test_only_the_first_page_refreshes_itself(client: FlaskClient) -> None:
    for number in range(25):
        post(client, number_n(number))
    refresh = '<meta http-equiv="refresh"'
    assert refresh in browse(client, "/")
    assert "live.js" in browse(client, "/")
    assert refresh not in browse(client, "/?after=5")
    assert "live.js" not in browse(client, "/?after=5")


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (Faults(), None),
        (Faults(fail_rate=0.25), "25% of POSTs fail."),
        (Faults(latency_s=2), "answers come 2 s late."),
        (Faults(fail_rate=0.001, latency_s=0.5), "0.1% of POSTs fail and answers come 0.5 s late."),
        (Faults(fail_rate=1, ids=frozenset([ID])), "100% of POSTs fail, for 1 widget id only."),
        (Faults(fail_rate=1, outage=(0.0, 1e9)), "every POST is answered 503."),
        (Faults(outage=(1e9, 1.0)), None),
    ],
)
def test_the_page_says_what_faults_are_played(
    start: Callable[..., FlaskClient], faults: Faults, says: str | None
) -> None:
    notices = re.findall(r'<p class="notice"><strong>.+?</strong>(.+?)</p>', browse(start(faults), "/"), re.S)
    assert [" ".join(notice.split()) for notice in notices] == ([says] if says else [])


def test_the_page_of_a_widget_says_what_its_id_holds(client: FlaskClient) -> None:
    made = post(client).json
    text = browse(client, f"/widgets/{ID.upper()}")
    assert re.findall(r'<time datetime="(.+?)"', text) == [made["created_at"], "2015-09-07T00:05:49.145996Z"]
    assert "<code>3c:97:0e:65:f7:31</code>" in text
    assert "random" not in text
    assert re.findall("Clock sequence</dt><dd>(.+?)</dd>", text) == ["11,637"]


def test_times_are_utc_wherever_the_maker_is(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        before, made = datetime.now(UTC), post(client).json
        assert read_id(ID)["made_at"] == "2015-09-07T00:05:49.145996Z"
        assert abs(datetime.fromisoformat(made["created_at"]) - before) < timedelta(minutes=1)
    time.tzset()


def test_a_random_node_is_called_so() -> None:
    assert read_id("31f37378-54f4-11e5-ad75-3d970e65f731")["is_random"]
    assert not read_id(ID)["is_random"]


@given(st.integers(0, 2**60 - 1), st.integers(0, 2**14 - 1), st.integers(0, 2**48 - 1))
def test_every_widget_id_can_be_read(time: int, clock_sequence: int, node: int) -> None:
    fields = (time & 0xFFFFFFFF, time >> 32 & 0xFFFF, time >> 48, clock_sequence >> 8, clock_sequence & 0xFF, node)
    found = read_id(str(uuid.UUID(fields=fields, version=1)))
    assert (found["clock_sequence"], found["node"].replace(":", "")) == (clock_sequence, f"{node:012x}")
    assert datetime.fromisoformat(found["made_at"]) >= datetime(1582, 10, 15, tzinfo=UTC)


def test_a_widgets_picture_is_always_the_same_and_others_differ(client: FlaskClient) -> None:
    for number in range(20):
        post(client, number_n(number))
    picture = re.compile(r'<svg class="picture".+?</svg>', re.S)
    listed = picture.findall(browse(client, "/"))
    assert len(set(listed)) == 20
    assert picture.findall(browse(client, f"/widgets/{number_n(19)}")) == listed[:1]
    choose = chooser(ID)
    assert [choose(range(1000)) for _ in range(4)] == [354, 148, 412, 959]  # in another process too


@pytest.mark.parametrize("widget_id", [OTHER_ID, "nothing", "a b", "<b>", "%00"])
def test_an_unknown_widget_is_a_page_for_browsers_and_json_for_others(client: FlaskClient, widget_id: str) -> None:
    response = client.get(f"/widgets/{widget_id}", headers=BROWSER)
    assert (response.status_code, response.mimetype, response.vary.as_set()) == (404, "text/html", {"accept"})
    assert "there is no widget" in response.text
    assert "<b>" not in response.text
    for accept in ("*/*", "application/json", ""):
        assert error_code(client.get(f"/widgets/{widget_id}", headers={"Accept": accept})) == "not_found"


@pytest.mark.parametrize("searched", ["0000001", " 0000001 ", "0000001".upper(), "00000010-54F4-11e5"])
def test_a_search_finds_the_widgets_whose_ids_begin_so(client: FlaskClient, searched: str) -> None:
    for number in range(0x20):
        post(client, number_n(number))
    expected = [number_n(number) for number in range(0x10, 0x20)]
    assert shown_ids(browse(client, "/search", id=searched)) == (expected[:1] if "-" in searched else expected)


def test_a_search_for_a_whole_id_leads_to_the_widget(client: FlaskClient) -> None:
    post(client)
    response = client.get("/search", query_string={"id": ID.upper()})
    assert (response.status_code, response.location) == (302, f"/widgets/{ID}")


def test_what_a_search_found_has_pages_too(client: FlaskClient) -> None:
    made = [number_n(number) for number in range(45)]
    for widget_id in made[::-1]:
        post(client, widget_id)
    text = browse(client, "/search", id="0000")
    seen = shown_ids(text)
    while more := ways(text).get("More"):
        text = browse(client, more)
        seen += shown_ids(text)
    assert seen == made


@pytest.mark.parametrize("searched", ["g", "zz", "<script>alert(1)</script>", "%", "_", "\0", OTHER_ID, "x" * 5000])
def test_a_search_that_finds_nothing_says_so(client: FlaskClient, searched: str) -> None:
    post(client)
    text = browse(client, "/search", id=searched)
    assert shown_ids(text) == []
    assert "id begins with <code>" in text
    assert "<script>" not in text
    assert len(text) < 5000


def insert(database: apsw.Connection, *times: datetime) -> None:
    database.executemany(
        "INSERT INTO widget (id, created_at) VALUES (?, ?)",
        ((str(uuid.uuid4()), f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 1000:03}Z") for time in times),
    )


def test_rates_are_counted_from_the_times_of_the_widgets(database: Path, other_process: apsw.Connection) -> None:
    with closing(Widgets(database)) as widgets:
        assert measure_rates(widgets.made_before)["rates"] == [0] * 60
        now = datetime.now(UTC).replace(microsecond=0)
        age_s = [400, 310, 200, 200, 100, *range(9, 1, -1)]
        insert(other_process, *(now - timedelta(seconds=age) for age in age_s))
        found = measure_rates(widgets.made_before)
    assert found["rate"] == 0.8
    assert found["top"] == 1
    assert 7 <= round(5 * sum(found["rates"])) <= 11  # the last whole five seconds ended up to five seconds ago
    assert max(found["rates"][:50]) == 0.4


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 50)), st.lists(st.integers(0, 60)))
def test_widgets_before_a_moment_are_those_with_an_earlier_time(times: list[int], moments: list[int]) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    with TemporaryDirectory() as folder, closing(Widgets(Path(folder) / "w")) as widgets:
        insert(widgets._writer[0], *(start + timedelta(seconds=time) for time in sorted(times)))
        found = [widgets.made_before(start + timedelta(seconds=moment)) for moment in moments]
    assert found == [sum(time < moment for time in times) for moment in moments]


@pytest.mark.parametrize(
    ("number", "top"), [(0, 1), (0.2, 0.2), (0.21, 0.5), (1, 1), (1.1, 2), (4, 5), (5.2, 10), (1001, 2000)]
)
def test_a_plot_ends_at_a_round_number(number: float, top: float) -> None:
    assert round_up(number) == pytest.approx(top)


def test_pages_with_100_000_widgets_are_as_fast_as_with_100_and_the_last_as_the_first(
    start: Callable[..., FlaskClient], other_process: apsw.Connection
) -> None:
    client = start()
    now = datetime.now(UTC)

    def make(numbers: range) -> None:
        with other_process:
            insert(other_process, *(now - timedelta(seconds=400 - number / 250) for number in numbers))

    def took(path: str) -> float:
        """Seconds of the fastest of 20 answers: other work on the machine slows down some of them."""
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            browse(client, path)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    make(range(100))
    with_100 = took("/")
    make(range(100, 100_000))
    browse(client, "/")
    first, last, found = took("/"), took(ways(browse(client, "/"))["Oldest"]), took("/search?id=ff&after=ff8")
    assert max(first, last, found) < 3 * with_100
    assert max(last, found) < 2 * first


def test_a_search_reads_no_more_rows_than_it_shows(client: FlaskClient, other_process: apsw.Connection) -> None:
    plan = str(other_process.execute(f"EXPLAIN QUERY PLAN {SELECT_FOUND}", ("0", "0g", 20)).fetchall())
    assert "SEARCH widget USING INDEX" in plan
    assert "TEMP B-TREE" not in plan


def test_an_empty_page_says_so(client: FlaskClient) -> None:
    assert "No widget has been made yet." in client.get("/").text


def test_the_page_needs_no_file_from_elsewhere(client: FlaskClient) -> None:
    post(client)
    links = re.findall(r'(?:href|src)="([^"]+)"', client.get("/").text)
    assert links
    for link in links:
        assert link.startswith("/")
        assert client.get(link, buffered=True).status_code == 200
    assert "url(" not in client.get("/static/widgets.css", buffered=True).text


# The description


def test_the_description_names_every_route_and_its_methods_and_no_other(client: FlaskClient) -> None:
    described = client.get("/openapi.json", buffered=True).json["paths"]
    routes: dict[str, set[str]] = {}
    for rule in client.application.url_map.iter_rules():
        if rule.endpoint != "static":
            path = re.sub(r"<(\w+)>", r"{\1}", rule.rule)
            routes.setdefault(path, set()).update(method.lower() for method in rule.methods - {"HEAD"})
    assert {path: set(methods) for path, methods in described.items()} == routes


def test_the_description_gives_the_makers_own_limits(client: FlaskClient) -> None:
    description = client.get("/openapi.json", buffered=True).json
    schemas = description["components"]["schemas"]
    assert schemas["Request"]["maxProperties"] == widget_maker.MOST_KEYS
    (limit,) = [found for found in description["paths"]["/"]["get"]["parameters"] if found["name"] == "limit"]
    assert limit["schema"]["maximum"] == schemas["Page"]["properties"]["widgets"]["maxItems"]
    assert limit["schema"]["maximum"] == widget_maker.MOST_PER_PAGE
    pattern = re.compile(schemas["WidgetId"]["pattern"])
    for widget_id in (ID, ID.upper(), ID.replace("11e5", "41e5"), ID.replace("ad75", "cd75"), f" {ID}"):
        assert bool(pattern.search(widget_id)) == (post(client, widget_id).status_code in {200, 201})


# Other web sites


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:5000", "[::1]:5000", "127.0.0.1:80"])
def test_its_own_names_are_answered_at_any_port(client: FlaskClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/widgets", "/healthz", "/metrics", "/static/widgets.css", "/nothing"])
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost:80:80", "[::1", "a b", "é"])
def test_any_other_host_is_answered_421_which_rejects_no_request(client: FlaskClient, path: str, host: str) -> None:
    response = client.get(path, headers={"Host": host})
    assert (response.status_code, error_code(response)) == (421, "host_not_allowed")


def test_a_wrong_host_is_told_how_to_allow_it_and_is_one_line_in_the_log(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    for host in ["evil.example", "other.example:80", "evil.example"] * 3:
        response = client.get("/", headers={"Host": host})
        assert "--allowed-host" in response.json["error"]["message"]
    assert [record.fields["host"] for record in caplog.records] == ["evil.example", "other.example:80"]
    assert all("--allowed-host" in record.getMessage() for record in caplog.records)


def test_no_number_of_wrong_hosts_fills_the_log(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3 * MOST_HOSTS_LOGGED):
        client.get("/", headers={"Host": f"x{number}.example"})
    assert len(caplog.records) == MOST_HOSTS_LOGGED


def test_further_hosts_can_be_allowed(start: Callable[..., FlaskClient]) -> None:
    client = start(Faults(), {"widgets.example"})
    assert client.get("/healthz", headers={"Host": "Widgets.Example:80"}).status_code == 200
    assert client.get("/healthz", headers={"Host": "localhost"}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://["},
        {"Origin": "http://localhost:8000"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_another_site_cannot_write(client: FlaskClient, headers: dict[str, str]) -> None:
    response = post(client, headers=headers)
    assert (response.status_code, error_code(response)) == (403, "cross_site")
    assert client.options("/widgets", headers=headers).status_code == 403
    assert widget_ids(client) == []


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://localhost:5000", "Host": "localhost:5000"}, {"Sec-Fetch-Site": "same-origin"}]
)
def test_its_own_site_can_write(client: FlaskClient, headers: dict[str, str]) -> None:
    assert post(client, headers=headers).status_code == 201


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/widgets", 200),
        ("GET", "/healthz", 200),
        ("GET", "/metrics", 200),
        ("GET", "/static/widgets.css", 200),
        ("GET", "/widgets?limit=0", 400),
        ("GET", "/nothing", 404),
        ("GET", "/static/../widget_maker.py", 404),
        ("GET", "/widgets/", 404),
        ("DELETE", "/widgets", 405),
        ("OPTIONS", "/widgets", 405),
        ("POST", "/widgets", 415),
        ("POST", "/", 405),
    ],
)
def test_every_answer_carries_the_security_headers(client: FlaskClient, method: str, path: str, status: int) -> None:
    response = client.open(path, method=method, buffered=True)
    page = client.open(path, method=method, buffered=True, headers=BROWSER)
    assert response.status_code == page.status_code == status
    assert all(response.headers[name] == page.headers[name] for name in SECURITY_HEADERS)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    policy = response.headers["Content-Security-Policy"].split("; ")
    assert policy == [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'self'",
    ]
    assert not [name for name in response.headers.keys() if name.lower().startswith("access-control-")]  # noqa: SIM118
    if status >= 400:
        assert error_code(response)


def test_a_method_cannot_be_overridden(client: FlaskClient) -> None:
    post(client, headers={"X-HTTP-Method-Override": "DELETE"})
    assert widget_ids(client) == [ID]


def test_a_bug_is_answered_500_without_its_traceback(start: Callable[..., FlaskClient]) -> None:
    client = start()
    client.application.view_functions["health"] = lambda: 1 // 0
    response = client.get("/healthz")
    assert (response.status_code, error_code(response)) == (500, "internal_server_error")
    assert "ZeroDivisionError" not in response.text


# The file cannot be used now


def test_a_locked_file_is_answered_503_and_can_still_be_read(
    start: Callable[..., FlaskClient], other_process: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_queues.store, "BUSY_TIMEOUT_S", 0.05)
    client = start()
    post(client)
    other_process.execute("BEGIN IMMEDIATE")
    response = post(client, OTHER_ID)
    assert (response.status_code, error_code(response)) == (503, "store_unavailable")
    assert int(response.headers["Retry-After"]) > 0
    assert "sqlite" not in response.text
    assert client.get("/healthz").status_code == 503
    assert ID in client.get("/").text
    other_process.execute("ROLLBACK")
    assert client.get("/healthz").json == {"status": "ok"}
    assert post(client, OTHER_ID).status_code == 201


def test_widgets_can_be_read_while_another_is_waiting_to_be_made(database: Path) -> None:
    widgets = Widgets(database)
    with closing(apsw.Connection(str(database))) as other_process, ThreadPoolExecutor() as pool:
        other_process.execute("BEGIN IMMEDIATE")
        making = pool.submit(widgets.make, [ID])
        wait_until(widgets._writer[1].locked)
        assert widgets.count() == 0
        assert not making.done()
        other_process.execute("ROLLBACK")
        assert making.result()[0][1]


def test_what_is_asked_for_during_a_commit_is_committed_together(database: Path) -> None:
    widgets, seen = Widgets(database), list[str]()
    widgets._writer[0].exec_trace = lambda _cursor, sql, _bindings: seen.append(sql) or True
    with closing(apsw.Connection(str(database))) as other_process, ThreadPoolExecutor(20) as pool:
        other_process.execute("BEGIN IMMEDIATE")
        first = pool.submit(widgets.make, [number_n(0)])
        wait_until(lambda: "BEGIN IMMEDIATE" in seen)
        others = [pool.submit(widgets.make, [number_n(number), number_n(0)]) for number in range(1, 15)]
        wait_until(lambda: len(widgets._wishes) == 14)
        other_process.execute("ROLLBACK")
        assert first.result()[0][1]
        for number, other in enumerate(others, 1):
            assert [(widget["id"], is_new) for widget, is_new in other.result()] == [
                (number_n(number), True),
                (number_n(0), False),
            ]
    assert seen.count("COMMIT") == 2
    widgets.close()


def test_nobody_whose_widget_is_made_waits_behind_the_commits_of_others(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[float] = []
    usual = widgets_module.transaction

    @contextmanager
    def slow(connection: apsw.Connection) -> Iterator[None]:
        with usual(connection):
            yield
            time.sleep(0.01)  # a disk that takes long to sync
        commits.append(time.monotonic())

    monkeypatch.setattr(widgets_module, "transaction", slow)
    widgets = Widgets(database)

    def make_some(maker: int) -> None:
        for number in range(20):
            widgets.make([number_n(20 * maker + number)])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(make_some, range(16)))
    widgets.close()
    assert len(commits) <= 80  # 40 if each takes along all that waited for it


def test_wishes_that_cannot_be_fulfilled_fail_one_by_one(database: Path) -> None:
    widgets = Widgets(database)
    with closing(apsw.Connection(str(database))) as other_process, ThreadPoolExecutor(20) as pool:
        other_process.execute("BEGIN IMMEDIATE")
        making = [pool.submit(widgets.make, [number_n(number)]) for number in range(10)]
        wait_until(lambda: len(widgets._wishes) == 9)
        other_process.execute("DROP TABLE widget; COMMIT")
        errors = [one.exception() for one in making]
    assert {type(error) for error in errors} == {StoreError}
    assert not widgets._wishes
    widgets.close()


def test_a_full_file_is_answered_503_until_there_is_room(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Widgets] = []

    class FullWidgets(Widgets):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append(self)

    monkeypatch.setattr("widget_maker.Widgets", FullWidgets)
    client = create_app(database).test_client()
    writer, _ = opened[0]._writer
    writer.pragma("max_page_count", writer.pragma("page_count"))
    answers = [post(client, number_n(number)) for number in range(200)]
    assert {answer.status_code for answer in answers} == {201, 503}
    made = [answer.json["id"] for answer in answers if answer.status_code == 201]
    assert client.get("/widgets?limit=100").json["widgets"][-1]["id"] == made[0]
    assert len(client.get("/widgets?limit=100").json["widgets"]) == len(made)


# Numbers


def test_the_metrics_count_what_happened(start: Callable[..., FlaskClient]) -> None:
    client = start(Faults(fail_rate=1, latency_s=0.001, ids=frozenset([OTHER_ID])))
    post(client)
    post(client)
    post(client, "no id")
    post(client, OTHER_ID)
    client.get("/nothing")
    response = client.get("/metrics")
    assert response.content_type.startswith("text/plain")
    assert {line for line in response.text.splitlines() if not line.startswith("#")} == {
        'widget_maker_posts_total{outcome="created"} 1.0',
        'widget_maker_posts_total{outcome="repeated"} 1.0',
        'widget_maker_rejections_total{code="bad_widget_id"} 1.0',
        'widget_maker_faults_total{fault="latency"} 1.0',
        'widget_maker_faults_total{fault="failure"} 1.0',
    }


# Faults


def test_the_fail_rate_is_the_share_of_posts_answered_500(start: Callable[..., FlaskClient]) -> None:
    rolls = iter([0.1, 0.3, 0.0, 0.9])
    client = start(Faults(fail_rate=0.3, random=lambda: next(rolls)))
    assert [post(client, number_n(number)).status_code for number in range(4)] == [500, 201, 500, 201]
    assert widget_ids(client) == [number_n(3), number_n(1)]


def test_a_fault_can_strike_one_id_only(start: Callable[..., FlaskClient]) -> None:
    client = start(Faults(fail_rate=1, ids=frozenset([ID])))
    assert post(client, ID.upper()).status_code == 500
    assert post(client, OTHER_ID).status_code == 201


def test_latency_comes_before_the_answer(start: Callable[..., FlaskClient]) -> None:
    waits: list[float] = []
    client = start(Faults(latency_s=7.0, ids=frozenset([ID]), sleep=waits.append))
    post(client, OTHER_ID)
    assert waits == []
    post(client, ID)
    assert waits == [7.0]


@pytest.mark.parametrize(
    ("seconds", "status"), [(0.0, 201), (9.9, 201), (10.0, 503), (14.9, 503), (15.0, 201), (1000.0, 201)]
)
def test_an_outage_lasts_from_its_start_to_its_end(
    start: Callable[..., FlaskClient], seconds: float, status: int
) -> None:
    client = start(Faults(outage=(10.0, 5.0), started=STARTED, clock=lambda: STARTED + seconds))
    response = post(client)
    assert response.status_code == status
    assert client.get("/healthz").status_code == (503 if status == 503 else 200)
    if status == 503:
        assert error_code(response) == "outage"
        assert int(response.headers["Retry-After"]) > 0
        assert client.get("/").status_code == 200
