"""What the contract itself decides for every service: ranges, names, bodies as JSON text."""

import email.utils
import json
import math
import time
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from claim_queues import ConfigError, Limits, MessageRefused, Range, Stats, base
from claim_queues.base import Queues, ahead_of, decode, parse_retry_after

LIMITS = Limits(
    service="a service",
    claim_ttl=Range(60, 43_200),
    grace=Range(60, 43_200),
    message_ttl=Range(60, 1_209_600),
    keeps_for_ever=False,
    claim_limit=20,
    post_batch=10,
    message_bytes=100,
    can_browse=True,
    counts_receives=False,
    fenced_delete=True,
    atomic_settle=False,
    releases_one_message=False,
    release_delay=900,
    settle_linger=0.1,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@pytest.mark.parametrize(("value", "inside"), [(0, False), (1, True), (3, True), (4, False)])
def test_a_range_holds_both_its_ends(value, inside):
    assert (value in Range(1, 3)) is inside


@pytest.mark.parametrize("value", [2.0, True, "2", None, math.nan])
def test_a_range_holds_only_whole_numbers(value):
    assert value not in Range(0, 3)


def test_a_range_reads_as_people_write_it():
    assert str(Range(60, 43_200)) == "60 to 43,200"


def test_the_total_counts_every_message_once():
    assert Stats(free=1, claimed=20, delayed=300, oldest_age=None).total == 321


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ttl": 59}, "claim TTL 59"),
        ({"ttl": 43_201}, "claim TTL 43201"),
        ({"grace": 59}, "grace 59"),
        ({"grace": 43_201}, "grace 43201"),
        ({"limit": 0}, "claim limit 0"),
        ({"limit": 21}, "claim limit 21"),
    ],
)
def test_what_is_wrong_with_a_claim_is_named_with_the_range(values, named):
    with pytest.raises(ConfigError, match=rf"{named}: a service takes \d+ to [\d,]+ (seconds|messages)"):
        LIMITS.check_claim(**{"ttl": 60, "grace": 60, "limit": 1} | values)


@pytest.mark.parametrize(
    "values", [{"ttl": 60, "grace": 43_200, "limit": 20}, {"ttl": 43_200, "grace": 60, "limit": 1}]
)
def test_a_claim_at_the_ends_of_the_ranges_passes(values):
    LIMITS.check_claim(**values)


def test_any_grace_passes_where_a_claim_does_not_extend_lives():
    replace(LIMITS, grace=None).check_claim(ttl=60, grace=0, limit=1)


@pytest.mark.parametrize("ttl", [None, 60, 1_209_600])
def test_a_message_ttl_in_its_range_or_none_passes(ttl):
    LIMITS.check_message_ttl(ttl)


@pytest.mark.parametrize("ttl", [0, 59, 1_209_601])
def test_a_message_ttl_out_of_its_range_is_refused(ttl):
    with pytest.raises(ConfigError, match=f"message TTL {ttl}: a service takes 60 to 1,209,600 seconds"):
        LIMITS.check_message_ttl(ttl)


def test_any_message_ttl_passes_where_the_whole_queue_has_one():
    replace(LIMITS, message_ttl=None).check_message_ttl(1)


@pytest.mark.parametrize("delay", [0, 0.5, 900])
def test_a_release_delay_up_to_the_longest_passes(delay):
    LIMITS.check_release(delay=delay)


@pytest.mark.parametrize("delay", [-0.1, 900.1, math.nan, math.inf])
def test_any_other_release_delay_is_refused(delay):
    with pytest.raises(ConfigError, match="a service takes 0 to 900 seconds"):
        LIMITS.check_release(delay=delay)


@pytest.mark.parametrize("name", ["", "x" * 65, "two words", "a\n", "٣", "a.b"])
def test_a_queue_name_that_some_service_refuses_is_refused_by_all(name):
    with pytest.raises(ConfigError, match="1 to 64 letters, digits"):
        LIMITS.check_queue(name)


@given(JSON_VALUES)
def test_every_json_value_survives_its_way_through_a_queue(value):
    assert decode(replace(LIMITS, message_bytes=10**9).encode(value)) == value


@given(JSON_VALUES)
def test_a_body_is_plain_ascii_on_its_way(value):
    assert replace(LIMITS, message_bytes=10**9).encode(value).isascii()


@given(st.text())
def test_a_stored_text_is_read_as_something_that_can_be_posted_again(text):
    value = decode(text)
    assert decode(replace(LIMITS, message_bytes=10**9).encode(value)) == value


@pytest.mark.parametrize(("body", "bytes_"), [("x" * 98, 100), ("é" * 16, 98), ([1] * 49, 99)])
def test_a_body_is_measured_as_the_bytes_of_its_json_text(body, bytes_):
    assert len(LIMITS.encode(body)) == bytes_
    with pytest.raises(MessageRefused, match=rf"has {bytes_} bytes; a service takes {bytes_ - 1}"):
        replace(LIMITS, message_bytes=bytes_ - 1).encode(body)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: [0, n], lambda n: {"a": [{"b": n}]}, lambda n: ("tuple", n)])
def test_an_integer_outside_signed_64_bits_is_refused_wherever_it_hides(number, wrap):
    with pytest.raises(MessageRefused, match="64 bits"):
        LIMITS.encode(wrap(number))


@pytest.mark.parametrize("body", [math.nan, [math.inf], b"", {1}, {("a",): 1}], ids=repr)
def test_what_is_no_json_is_refused(body):
    with pytest.raises(MessageRefused, match="not JSON"):
        LIMITS.encode(body)


def nested(depth):
    body = 123_456_789_012_345_678
    for _ in range(depth):
        body = [body]
    return body


def test_a_deeply_nested_body_is_taken():
    assert decode(replace(LIMITS, message_bytes=10_000).encode(nested(600))) == nested(600)


def test_a_body_nested_too_deeply_for_json_is_refused():
    with pytest.raises(MessageRefused, match="not JSON"):
        replace(LIMITS, message_bytes=10**9).encode(nested(100_000))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain text",
        "{",
        "[1,]",
        "NaN",
        '{"a": [Infinity]}',
        "-Infinity",
        "1e999",
        "[9223372036854775808]",
        "9" * 5_000,
        "\ufeff1",
        "[" * 100_000,
        "\udcff",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_a_body_that_is_no_json_is_its_own_text(text):
    assert decode(text) == text


@pytest.mark.parametrize("text", ["null", "-9223372036854775808", "1e-999", '" "', "[[]]", '{"a": {"b": 1.5}}'])
def test_a_body_that_is_json_is_its_value(text):
    assert decode(text) == json.loads(text)


def test_queues_are_closed_at_the_end_of_a_with_block():
    closed = []

    def close(self):
        closed.append(self)

    service = type("Service", (Queues,), dict.fromkeys(Queues.__abstractmethods__, close))

    with service() as queues:
        assert closed == []
    assert closed == [queues]


def test_a_service_that_has_no_surprises_says_nothing():
    service = type("Service", (Queues,), dict.fromkeys(Queues.__abstractmethods__))

    assert service().inspect("requests") == []


# Clocks


@pytest.mark.parametrize("ahead_s", [0, 3600, -3600])
def test_the_clock_is_compared_with_a_date_header(ahead_s: int) -> None:
    found = ahead_of(email.utils.formatdate(time.time() - ahead_s, usegmt=True))
    assert found is not None
    assert -1 <= found - ahead_s < 10


@pytest.mark.parametrize("date", [None, "", "yesterday", "Tue, 99 Foo 2026 25:00:00 GMT"])
def test_without_a_date_the_clock_of_the_service_is_not_known(date: str | None) -> None:
    assert ahead_of(date) is None


# Retry-After

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0),
        ("7", 7),
        ("3600", 3600),
        ("3601", 3600),
        ("9999999999", 3600),
        ("Fri, 02 Jan 2026 03:05:05 GMT", 60),
        ("Fri, 02 Jan 2026 04:05:05 +0100", 60),
        ("Friday, 02-Jan-26 03:05:05 GMT", 60),
        ("Fri Jan  2 03:05:05 2026", 60),
        ("Fri, 02 Jan 2026 03:05:05 -0000", 60),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ("", None),
        (" ", None),
        ("-1", None),
        ("1.5", None),
        ("1e3", None),
        ("0x10", None),
        ("٣", None),
        ("7, 8", None),
        ("soon", None),
        ("99999999999", None),
        ("Fri, 99 Jan 2026 03:05:05 GMT", None),
        ("Fri, 02 Jan 2026 03:05:05 +9999999999", None),
    ],
)
def test_retry_after_is_whole_seconds_or_a_date_or_nothing(
    value: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "time", SimpleNamespace(time=lambda: NOW))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert parse_retry_after(value) == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


words = st.sampled_from(
    ["Fri,", "Fri", "02", "Jan", "2026", "0000", "99999", "03:04:05", "3.4", "GMT", "+9999", "-", ","]
)


@given(st.text() | st.lists(words, max_size=8).map(" ".join) | st.lists(words, max_size=8).map("".join))
@example("Mon, 01 Jan 0001 00:00:00 GMT")
@example("Mon, 01 Jan 0000 00:00:00 GMT")
def test_retry_after_never_raises_and_stays_within_an_hour(value: str) -> None:
    found = parse_retry_after(value)
    assert found is None or 0 <= found <= 3600
