"""What the contract itself decides for every service: names, bodies as JSON text, how long a claim is trusted."""

import json
import math
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claim_queues import Claim, ConfigError, Limits, Message, MessageRefused, Queues, open_queues
from claim_queues.base import check_queue, decode, expiry, is_loopback

LIMITS = Limits(service="a service", claim_limit=20, post_limit=10, message_bytes=10**9)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


def nested(depth):
    body = 123_456_789_012_345_678
    for _ in range(depth):
        body = [body]
    return body


@pytest.mark.parametrize("name", ["", "x" * 65, "two words", "a\n", "٣", "a.b"])
def test_a_queue_name_that_some_service_refuses_is_refused_by_all(name):
    with pytest.raises(ConfigError, match="1 to 64 letters, digits"):
        check_queue(name)


def test_a_claim_holds_for_less_than_its_time_and_not_at_all_once_it_is_lost():
    claim = Claim("c", "q", 60, 60, (), time.monotonic() + 60)
    assert claim.holds(50)
    assert not claim.holds(61)

    claim.expires_at = 0
    assert not claim.holds(0)


def test_a_claim_is_trusted_for_2_s_less_than_its_ttl_from_when_it_was_asked_for():
    assert expiry(1000.0, 60) == 1058.0


def test_messages_leave_a_claim_and_the_others_keep_their_order():
    claim = Claim("c", "q", 60, 60, tuple(Message(id_, None, 0) for id_ in "abcd"), 0)

    claim.drop({"c", "a", "unknown"})

    assert [message.id for message in claim.messages] == ["b", "d"]


@given(JSON_VALUES)
def test_every_json_value_survives_its_way_through_a_queue(value):
    text = LIMITS.encode(value)

    assert text.isascii()
    assert decode(text) == decode(replace(LIMITS, utf8=True).encode(json.loads(text))) == value


@given(st.text())
def test_a_stored_text_is_read_as_something_that_can_be_posted_again(text):
    value = decode(text)

    assert decode(LIMITS.encode(value)) == value


@pytest.mark.parametrize(
    ("body", "utf8", "size"),
    [("x" * 98, False, 100), ("é" * 16, False, 98), ("é" * 16, True, 34), ("雪" * 16, True, 50), ([1] * 49, False, 99)],
)
def test_a_body_is_measured_as_the_service_counts_its_bytes(body, utf8, size):
    assert replace(LIMITS, message_bytes=size, utf8=utf8).encode(body)
    with pytest.raises(MessageRefused, match=rf"has {size} bytes; a service accepts {size - 1}"):
        replace(LIMITS, message_bytes=size - 1, utf8=utf8).encode(body)


def test_half_a_surrogate_pair_is_escaped_where_characters_are_sent_as_utf8():
    text = replace(LIMITS, utf8=True).encode("é\udcff")

    assert text.encode() == b'"\xc3\xa9\\udcff"'
    assert decode(text) == "é\udcff"


@pytest.mark.parametrize(
    "body", [math.nan, [math.inf], b"", {1}, {("a",): 1}, nested(100_000)], ids=lambda b: repr(type(b))
)
def test_what_is_not_json_is_refused(body):
    with pytest.raises(MessageRefused, match="not JSON"):
        LIMITS.encode(body)


def test_a_deeply_nested_body_is_accepted():
    assert decode(LIMITS.encode(nested(600))) == nested(600)


NOT_JSON = ["", "plain text", "{", "[1,]", "NaN", '{"a": [Infinity]}', "-Infinity", "[1e999]", "\ufeff1", "1 2"]


@pytest.mark.parametrize("text", [*NOT_JSON, "[" * 100_000, "\udcff"], ids=lambda text: ascii(text[:20]))
def test_a_body_that_is_not_json_is_its_own_text(text):
    assert decode(text) == text


@pytest.mark.parametrize("text", ["null", "-9223372036854775808", "1e-999", '" "', "[[]]", ' {"a": {"b": 1.5}}\n'])
def test_a_body_that_is_json_is_its_value(text):
    assert decode(text) == json.loads(text)


@pytest.mark.parametrize(
    ("host", "is_own"),
    [(name, True) for name in ("localhost", "127.0.0.1", "127.9.9.9", "::1")]
    + [(name, False) for name in ("10.0.0.1", "localhost.example.org", "", None)],
)
def test_loopback_is_told_from_other_hosts(host, is_own):
    assert is_loopback(host) is is_own


def test_queues_are_closed_at_the_end_of_a_with_block():
    closed = []

    class Service(Queues):
        def close(self):
            closed.append(self)

    with Service() as queues:
        assert closed == []
    assert closed == [queues]


@pytest.mark.parametrize(
    "url", ["", "queue", "/var/queue", "http://example.org/", "redis://me:canary@x", "SQLITE", "://"]
)
def test_a_url_that_names_no_service_is_refused_with_what_would_and_not_repeated(url):
    with pytest.raises(ConfigError) as refused:
        open_queues(url)
    assert "write sqlite:///PATH, rackspace://USER@REGION, zaqar://CLOUD or sqs://REGION" in str(refused.value)
    assert "canary" not in str(refused.value)
