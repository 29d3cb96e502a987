"""What a POST says, what the maker's answer means, and what is stored of it."""

import pytest
from doubles.scripted_maker import Reply as Sent
from doubles.scripted_maker import ScriptedMaker, Silence

from claim_queues import ConfigError, Message
from receive_counts import Receives
from widgets.delivery import Answer, Delivery, Failure, Maker, Reply, check_url, judge

WIDGET = "31f37378-54f4-11e5-ad75-3c970e65f731"
OWN_ERROR = {"error": {"code": "bad_widget_id", "message": "not a UUID of version 1"}}
QUEUES = ["requests", "responses", "letters"]


def delivery(body=None, *, id_="message-1", receives=1, counted=None):
    message = Message(id_, {"widget_id": WIDGET} if body is None else body, 3.7, counted)
    return Delivery(message, Receives(), Receives(receives, first_at=1_700_000_000.0, last_at=1_700_000_060.5))


@pytest.mark.parametrize("status", [200, 201])
def test_an_answer_that_names_the_widget_is_created(status):
    assert judge(Reply(status, {"id": WIDGET.upper()}), WIDGET).outcome == "created"


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_maker_s_own_error_of_these_is_a_rejection_with_its_reason(status):
    answer = judge(Reply(status, OWN_ERROR), WIDGET)

    assert (answer.outcome, answer.reason, answer.status) == ("rejected", "not a UUID of version 1", status)


@pytest.mark.parametrize(
    ("failure", "status", "body"),
    [
        *((Failure.MISCONFIGURED, status, {}) for status in (200, 204, 301, 400, 403, 405, 407, 501, 600)),
        *((Failure.MISCONFIGURED, status, OWN_ERROR) for status in (401, 404, 421, 505)),
        (Failure.MISCONFIGURED, 200, {"id": "another"}),
        (Failure.MISCONFIGURED, 201, {"id": None}),
        (Failure.MISCONFIGURED, 308, {"id": WIDGET}),
        (Failure.MISCONFIGURED, 422, {"error": "text"}),
        *((Failure.UNAVAILABLE, status, {}) for status in (408, 425, 502, 504, 508, 521, 561, 599)),
        *((Failure.UNAVAILABLE, status, OWN_ERROR) for status in (429, 503)),
        *((Failure.FAILED, status, OWN_ERROR) for status in (500, 507, 521)),
        (Failure.FAILED, 500, {}),
    ],
)
def test_any_other_answer_is_a_failure_of_its_class(failure, status, body):
    answer = judge(Reply(status, body), WIDGET)

    assert (answer.outcome, answer.failure, answer.status) == (None, failure, status)


@pytest.mark.parametrize("widget_id", ["", "None"])
@pytest.mark.parametrize("body", [{}, {"id": None}])
def test_no_widget_id_is_created_by_an_answer_without_an_id(widget_id, body):
    assert judge(Reply(200, body), widget_id).outcome is None


def test_a_rate_limit_and_a_503_with_retry_after_ask_for_patience():
    assert judge(Reply(429, {}), WIDGET).asks_for_patience
    assert judge(Reply(503, {}, retry_after=1), WIDGET).asks_for_patience
    assert not judge(Reply(503, {}), WIDGET).asks_for_patience
    assert not judge(Reply(500, {}, retry_after=1), WIDGET).asks_for_patience


@pytest.mark.parametrize(
    "url",
    [
        "http:///widgets",
        "http://user:secret@127.0.0.1/widgets",
        "http://127.0.0.1/widgets#there",
        "http://127.0.0.1:0/widgets",
        "http://127.0.0.1/widgets\r\nX: y",
        "http://[::1/widgets",
    ],
)
def test_a_url_that_cannot_be_posted_to_is_refused_without_showing_credentials(url):
    with pytest.raises(ConfigError) as caught:
        check_url(url, allow_plain_http=True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "[::1]"])
def test_plain_http_to_this_machine_is_allowed(host):
    check_url(f"http://{host}:5000/widgets", allow_plain_http=False)


@pytest.mark.parametrize("host", ["10.0.0.1", "maker.example", "localhost.example", "[2001:db8::1]"])
def test_plain_http_to_another_machine_must_be_asked_for(host):
    with pytest.raises(ConfigError, match="--allow-plain-http"):
        check_url(f"http://{host}/widgets", allow_plain_http=False)
    check_url(f"http://{host}/widgets", allow_plain_http=True)
    check_url(f"https://{host}/widgets", allow_plain_http=False)


def test_a_post_names_the_message_in_headers_that_cannot_be_broken_out_of():
    headers = delivery(id_="a\r\nb é").headers("requests")

    assert headers["Idempotency-Key"] == headers["webhook-id"] == "a%0D%0Ab%20%C3%A9"
    assert headers["X-Message-Age"] == "3"


@pytest.mark.parametrize("body", [[], "text", None, {}, {"widget_id": 7}, {"widget_id": None}])
def test_a_body_without_a_string_widget_id_is_not_a_request(body):
    assert Delivery(Message("id", body, 0.0), Receives(), Receives()).widget_id is None


def test_a_response_says_the_outcome_and_has_the_same_id_when_it_is_repeated():
    made = delivery(receives=2)
    made.answer = Answer("created", status=201)
    first, again = (made.settlement(QUEUES, 60) for _ in range(2))
    (post,) = first.posts

    assert first == again
    assert (post.queue, post.ttl, first.fenced) == ("responses", 60, False)
    assert post.body == {
        "version": 1,
        "response_id": post.body["response_id"],
        "request_id": "message-1",
        "widget_id": WIDGET,
        "outcome": "created",
        "reason": "",
        "status": 201,
        "receive_count": 2,
    }


def test_a_failed_message_is_a_dead_letter_first_and_deleted_only_under_its_claim():
    failed = delivery({"widget_id": WIDGET, "colour": "red"}, receives=5)
    failed.answer = Answer("failed", Failure.FAILED, 500, "HTTP 500")
    settlement = failed.settlement(QUEUES, None)
    letter, response = settlement.posts

    assert settlement.fenced
    assert (letter.queue, letter.ttl, response.queue) == ("letters", None, "responses")
    assert letter.body == {
        "version": 1,
        "request_id": "message-1",
        "queue": "requests",
        "body": {"widget_id": WIDGET, "colour": "red"},
        "reason": "HTTP 500",
        "status": 500,
        "receive_count": 5,
        "first_received_at": "2023-11-14T22:13:20.000Z",
        "last_received_at": "2023-11-14T22:14:20.500Z",
    }
    assert response.body["outcome"] == "failed"


def test_the_service_s_own_receive_count_is_shown_where_it_is_higher():
    assert delivery(receives=2, counted=7).receive_count == 7
    assert delivery(receives=2, counted=None).receive_count == 2


@pytest.fixture
def server():
    with ScriptedMaker() as server:
        yield server


@pytest.fixture
def maker(server):
    return Maker(server.url, deadline=30)


def test_a_rejection_is_believed_from_a_maker_by_its_header_or_by_a_widget_that_it_has_created(server, maker):
    server.answer, server.says_maker = lambda post: Sent(422, OWN_ERROR), False
    answer = maker.post(delivery(), "q")
    assert (answer.outcome, answer.failure) == (None, Failure.MISCONFIGURED)
    assert "Widget-Maker" in answer.reason

    server.says_maker = True
    assert maker.post(delivery(), "q").outcome == "rejected"

    server.answer, server.says_maker = server.make, False
    assert maker.post(delivery(), "q").outcome == "created"
    server.answer = lambda post: Sent(400, OWN_ERROR)
    assert maker.post(delivery(), "q").outcome == "rejected"


@pytest.mark.parametrize(
    ("target", "said"), [("/elsewhere", "/elsewhere, which"), ("http://h\xe9/\xff", "to http://h")]
)
def test_a_redirect_is_not_followed_and_its_target_is_said_even_if_it_is_no_text(server, maker, target, said):
    server.answer = lambda post: Sent(307, headers={"Location": target})
    answer = maker.post(delivery(), "q")

    assert answer.failure is Failure.MISCONFIGURED
    assert said in answer.reason
    assert [post.path for post in server.posts] == ["/widgets"]


def test_a_query_of_the_url_is_sent_and_not_shown(server):
    maker = Maker(f"{server.url}?token=secret", deadline=30)
    maker.post(delivery(), "q")
    maker.post_batch([delivery(id_="a"), delivery(id_="b")])

    assert "secret" not in maker.url
    assert [post.path for post in server.posts] == ["/widgets?token=secret", "/widgets/batch?token=secret"]


@pytest.mark.parametrize(("sent", "seconds"), [("9", 9), ("9 ", 9), ("-5", 0), ("soon", 0), ("1000000", 300)])
def test_retry_after_is_heard_up_to_300_seconds(server, maker, sent, seconds):
    server.answer = lambda post: Sent(503, headers={"Retry-After": sent})

    assert maker.post(delivery(), "q").retry_after == seconds


def test_an_answer_over_a_mebibyte_is_not_the_maker_s(server, maker):
    server.answer = lambda post: Sent(201, {"id": WIDGET, "more": "x" * 1_100_000})

    assert maker.post(delivery(), "q").failure is Failure.MISCONFIGURED


def test_each_item_of_a_batch_has_its_own_answer_and_one_left_out_has_failed(server, maker):
    items = [
        {"message_id": "b", "status": 422, "body": OWN_ERROR},
        {"message_id": "a", "status": 201, "body": {"id": WIDGET}},
        {"message_id": "c", "status": "201", "body": {"id": WIDGET}},
        {"message_id": ["d"], "status": 201, "body": {"id": WIDGET}},
    ]
    server.batch = Sent(200, {"answers": items})
    group = [delivery(id_=id_) for id_ in "abcd"]

    assert maker.post_batch(group) is None
    assert [each.answer.outcome for each in group] == ["created", "rejected", None, None]
    assert group[2].answer.failure is group[3].answer.failure is Failure.FAILED
    server.batch = Silence.CUT
    assert maker.post_batch(group).failure is Failure.CUT
    assert maker.takes_batches


@pytest.mark.parametrize(("status", "takes"), [(404, False), (405, False), (501, False), (500, True), (503, True)])
def test_a_maker_without_batches_is_asked_for_none_any_more(server, maker, status, takes):
    server.batch = status
    whole = maker.post_batch([delivery(id_="a"), delivery(id_="b")])

    assert whole.status == status
    assert maker.takes_batches is takes


def test_a_body_that_cannot_be_sent_has_failed_without_a_post(server, maker):
    answer = maker.post(delivery({"widget_id": WIDGET, "size": float("nan")}), "q")

    assert (answer.outcome, answer.status) == ("failed", None)
    assert not server.posts


@pytest.mark.parametrize(
    ("status", "is_well"),
    [(200, True), (302, True), (404, True), (429, False), (500, False), (503, False)],
)
def test_a_maker_is_well_when_its_health_page_answers_with_anything_but_429_and_5xx(server, maker, status, is_well):
    server.health = status

    assert maker.is_well(1.0) is is_well
    assert bool(maker.health) is not is_well


def test_threads_share_a_health_answer(server):
    maker = Maker(server.url, deadline=30, health_url=server.url.replace("widgets", "alive"))
    for _ in range(5):
        maker.is_well(1.0)

    assert [get.path for get in server.gets] == ["/alive"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_health_page_that_is_not_well_or_not_there_after_a_widget_was_created_says_nothing(server, is_there):
    server.health = 503
    elsewhere = None if is_there else "http://127.0.0.1:1/healthz"
    maker = Maker(server.url, deadline=30, health_url=elsewhere)
    assert not maker.is_well(1.0)
    maker.post(delivery(), "q")

    assert maker.is_well(1.0)


def test_a_maker_that_is_gone_right_after_its_first_widget_is_not_well(server, maker):
    server.health = Silence.CUT
    maker.post(delivery(), "q")

    assert not maker.is_well(1.0)


def test_nobody_there_is_unavailable():
    answer = Maker("http://127.0.0.1:1/widgets", deadline=30).post(delivery(), "q")

    assert (answer.failure, answer.status) == (Failure.UNAVAILABLE, None)
    assert answer.reason
