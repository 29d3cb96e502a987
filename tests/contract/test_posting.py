"""Queues are made, and messages are posted to them."""

import math
from functools import partial

import pytest
from backends import skip_unless

from claim_queues import ConfigError, MessageRefused

JSON_VALUES = [
    None,
    True,
    False,
    0,
    -(2**63),
    2**63 - 1,
    0.1,
    1e300,
    "",
    "text",
    "NaN",
    '{"text": "that looks like JSON"}',
    "line\nbreak, \0 and \x7f",
    "Grüße, 雪, 🦆",
    [],
    {},
    {"widget_id": "31f37378-54f4-11e5-ad75-3c970e65f731", "nested": [{"": None}, [[1.5]]]},
]

NO_JSON_VALUES = [
    math.nan,
    math.inf,
    [-math.inf],
    2**63,
    {"deep": [{"down": -(2**63) - 1}]},
    b"bytes",
    {1, 2},
    {("no", "string"): 1},
]


def test_creating_a_queue_that_exists_leaves_it_as_it_is(queues, queue, terms):
    queues.post(queue, ["kept"])

    queues.create(queue)

    assert [message.body for message in queues.claim(queue, **terms, limit=2).messages] == ["kept"]


def test_a_created_queue_exists_for_all(service, queue):
    assert service.queues.exists(queue)
    assert service.another().exists(queue)


@pytest.mark.parametrize("name", ["a", "-", "_", "A-b_9", "x" * 64])
def test_a_queue_name_has_1_to_64_letters_digits_underscores_or_hyphens(queues, name):
    queues.create(name)
    assert queues.exists(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "two words", "a/b", "a.b", "ä", "a\n", "٣"])
def test_any_other_queue_name_is_refused_by_every_operation(queues, terms, name):
    for operation in (
        queues.create,
        queues.exists,
        queues.purge,
        queues.stats,
        partial(queues.post, bodies=["lost"]),
        partial(queues.claim, **terms, limit=1),
        partial(queues.delete, ids=[]),
        queues.browse,
        queues.end_marker,
    ):
        with pytest.raises(ConfigError):
            operation(name)


def test_a_post_gives_one_id_for_each_body_in_their_order(queues, queue, terms):
    ids = queues.post(queue, ["first", "second", "third"])

    claim = queues.claim(queue, **terms, limit=3)
    assert [(message.id, message.body) for message in claim.messages] == list(
        zip(ids, ["first", "second", "third"], strict=True)
    )


def test_ids_are_unique_across_posts_and_queues(queues, queue, other_queue):
    ids = [
        *queues.post(queue, ["same", "same"]),
        *queues.post(queue, ["same"]),
        *queues.post(other_queue, ["same"]),
    ]

    assert len(set(ids)) == 4


def test_posting_nothing_stores_nothing(queues, queue, terms):
    assert queues.post(queue, []) == []
    assert queues.claim(queue, **terms, limit=1) is None


def test_a_posted_message_is_there_for_every_process(service, queue, terms):
    service.queues.post(queue, ["for all"])

    assert service.another().claim(queue, **terms, limit=1).messages[0].body == "for all"


def test_more_bodies_than_one_request_takes_are_all_stored_in_order(queues, queue, limits, terms):
    count = limits.post_batch + 1

    ids = queues.post(queue, list(range(count)))

    claims = iter(lambda: queues.claim(queue, **terms, limit=limits.claim_limit), None)
    messages = [message for claim in claims for message in claim.messages]
    assert [message.id for message in messages] == ids
    assert [message.body for message in messages] == list(range(count))


@pytest.mark.parametrize("body", JSON_VALUES, ids=repr)
def test_every_json_value_comes_back_as_it_was_posted(queues, queue, terms, body):
    queues.post(queue, [body])

    (message,) = queues.claim(queue, **terms, limit=1).messages
    assert message.body == body
    assert type(message.body) is type(body)


@pytest.mark.parametrize("body", NO_JSON_VALUES, ids=repr)
def test_what_no_queue_takes_is_refused_and_nothing_of_the_post_is_stored(queues, queue, limits, terms, body):
    with pytest.raises(MessageRefused):
        queues.post(queue, ["good"] * limits.post_batch + [body])

    assert queues.claim(queue, **terms, limit=1) is None


def test_a_body_may_have_as_many_bytes_as_the_limit_says_and_not_one_more(queues, queue, limits, terms):
    largest = "x" * (limits.message_bytes - len('""'))
    with pytest.raises(MessageRefused):
        queues.post(queue, [largest + "x"])

    queues.post(queue, [largest])

    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == [largest]


def test_a_message_ttl_may_be_at_both_ends_of_its_range(queues, queue, limits, terms):
    skip_unless(limits.message_ttl, "gives all messages of a queue one TTL")
    low, high = limits.message_ttl.low, limits.message_ttl.high

    queues.post(queue, ["short"], ttl=low)
    queues.post(queue, ["long"], ttl=high)

    claim = queues.claim(queue, **terms, limit=2)
    assert [message.body for message in claim.messages] == ["short", "long"]
    assert claim.messages[1].ttl == high


def test_a_message_ttl_out_of_range_is_refused_and_nothing_is_stored(queues, queue, limits, terms):
    skip_unless(limits.message_ttl, "gives all messages of a queue one TTL")
    for wrong in (limits.message_ttl.low - 1, limits.message_ttl.high + 1, limits.message_ttl.low + 0.5, True):
        with pytest.raises(ConfigError):
            queues.post(queue, ["lost"], ttl=wrong)

    assert queues.claim(queue, **terms, limit=1) is None


def test_a_message_is_gone_when_its_ttl_ends(service, queues, queue, limits, terms):
    skip_unless(limits.message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["short-lived"], ttl=limits.message_ttl.low)
    queues.post(queue, ["long-lived"], ttl=limits.message_ttl.high)

    service.advance(limits.message_ttl.low + 1)

    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == ["long-lived"]


def test_a_message_is_there_until_its_ttl_ends(service, queues, queue, limits, terms):
    skip_unless(limits.message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["short-lived"], ttl=limits.message_ttl.low)

    service.advance(limits.message_ttl.low - 5)

    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == ["short-lived"]


def test_a_message_without_ttl_never_expires(service, queues, queue, limits, terms):
    skip_unless(limits.keeps_for_ever, "lets every message expire")
    queues.post(queue, ["kept"])

    service.advance(20 * 366 * 86_400)

    (message,) = queues.claim(queue, **terms, limit=1).messages
    assert (message.body, message.ttl) == ("kept", None)


def test_a_message_without_ttl_lives_as_long_as_the_service_can_keep_it(queues, queue, limits, terms):
    skip_unless(limits.message_ttl and not limits.keeps_for_ever, "has no longest message TTL")
    queues.post(queue, ["kept"])

    assert queues.claim(queue, **terms, limit=1).messages[0].ttl == limits.message_ttl.high
