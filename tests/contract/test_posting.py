"""Queues are created, and messages are posted to them."""

import math
from functools import partial

import pytest
from backends import bodies, skip_unless

from claim_queues import ConfigError, MessageRefused

JSON_VALUES = [None, True, False, 0, -(2**63), 2**63 - 1, 0.1, 1e300, "", "text", "NaN", [], {}]
JSON_VALUES += ['{"text": "that looks like JSON"}', "line\nbreak, \0 and \x7f", "Grüße, 雪, 🦆"]
JSON_VALUES += [{"widget_id": "31f37378-54f4-11e5-ad75-3c970e65f731", "nested": [{"": None}, [[1.5]]]}]


def test_creating_a_queue_that_exists_leaves_it_as_it_is(queues, queue, claim):
    queues.post(queue, ["kept"])

    queues.create(queue)

    assert bodies(claim(queues, 2)) == ["kept"]


@pytest.mark.parametrize("name", ["a", "-", "_", "A-b_9", "x" * 64])
def test_a_queue_name_has_1_to_64_letters_digits_underscores_or_hyphens(queues, rival, name):
    queues.create(name)

    assert queues.exists(name)
    assert rival.exists(name)


def test_any_other_queue_name_is_refused_by_every_operation(queues):
    post, delete = partial(queues.post, bodies=["x"]), partial(queues.delete, ids=["x"])
    claim = partial(queues.claim, ttl=60, grace=60, limit=1)

    for operation in (queues.create, queues.exists, queues.purge, queues.stats, queues.browse, post, delete, claim):
        with pytest.raises(ConfigError):
            operation("a.b")


def test_a_post_gives_an_id_of_its_own_for_each_body_in_their_order(queues, rival, queue, other_queue, limits, claim):
    ids = queues.post(queue, list(range(limits.post_limit)))

    claims = iter(lambda: claim(rival, limits.claim_limit), None)
    claimed = [(message.id, message.body) for found in claims for message in found.messages]
    assert claimed == list(zip(ids, range(limits.post_limit), strict=True))
    assert len({*ids, *queues.post(queue, [0]), *queues.post(other_queue, [0])}) == limits.post_limit + 2


def test_every_json_value_comes_back_as_it_was_posted(queues, queue, claim):
    for body in JSON_VALUES:
        queues.post(queue, [body])

        (message,) = claim(queues, 2).messages
        assert (message.body, type(message.body)) == (body, type(body))


def test_what_is_not_json_is_refused_and_nothing_of_the_post_is_stored(queues, queue, claim):
    with pytest.raises(MessageRefused):
        queues.post(queue, ["good", math.nan])

    assert claim(queues) is None


def test_a_body_may_have_as_many_bytes_as_the_limit_says_and_not_one_more(queues, queue, limits, claim):
    largest = "x" * (limits.message_bytes - len('""'))
    with pytest.raises(MessageRefused):
        queues.post(queue, [largest + "x"])

    queues.post(queue, [largest])

    assert bodies(claim(queues, 2)) == [largest]


def test_a_message_is_there_until_its_ttl_ends_and_without_one_for_14_days(service, queues, queue, limits, claim):
    skip_unless(limits.has_message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["short-lived"], ttl=60)
    queues.post(queue, ["long-lived"], ttl=1_209_600)
    queues.post(queue, ["without a TTL"])

    service.advance(40)
    assert bodies(queues.browse(queue)[0]) == ["short-lived", "long-lived", "without a TTL"]

    service.advance(21)
    assert bodies(queues.browse(queue)[0]) == ["long-lived", "without a TTL"]
    service.advance(1_209_400)
    assert bodies(claim(queues, 3)) == ["long-lived", "without a TTL"]
