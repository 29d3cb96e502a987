"""Messages are looked at without claiming them, where the service can."""

import pytest
from backends import bodies, skip_unless

from claim_queues import ConfigError


def test_browsing_and_deleting_are_refused_where_the_service_cannot_browse(queues, queue, limits):
    skip_unless(not limits.can_browse, "can look without claiming")

    with pytest.raises(ConfigError):
        queues.browse(queue)
    with pytest.raises(ConfigError):
        queues.delete(queue, queues.post(queue, ["kept"]))


def test_browsing_shows_messages_in_order_with_their_age_and_changes_nothing(
    service, browser, queues, queue, other_queue, claim
):
    queues.post(other_queue, ["elsewhere"])
    ids = queues.post(queue, ["first", "second"]) + queues.post(queue, ["third"])
    service.advance(3)

    first, second = browser.browse(queue)[0], browser.browse(queue)[0]
    claimed = claim(queues, 3).messages

    assert bodies(first) == ["first", "second", "third"]
    assert all(2 <= message.age < 30 for message in first)
    assert [[message.id for message in found] for found in (first, second, claimed)] == [ids] * 3


def test_a_marker_goes_on_behind_what_was_shown(browser, queues, queue):
    nothing, start = browser.browse(queue)
    queues.post(queue, [1, 2, 3])

    first, after_first = browser.browse(queue, limit=2, after=start)
    second, after_second = browser.browse(queue, limit=2, after=after_first)
    third, after_third = browser.browse(queue, limit=2, after=after_second)

    assert [bodies(page) for page in (nothing, first, second, third)] == [[], [1, 2], [3], []]
    queues.post(queue, ["new"])
    assert bodies(browser.browse(queue, after=after_third)[0]) == ["new"]


def test_a_marker_holds_when_its_message_is_gone_or_the_only_one_left(browser, queues, queue):
    ids = queues.post(queue, [1, 2])
    _, marker = browser.browse(queue, limit=1)
    queues.delete(queue, ids[:1])

    rest, marker = browser.browse(queue, after=marker)

    assert bodies(rest) == [2]
    assert browser.browse(queue, after=marker)[0] == []


def test_claimed_released_and_lapsed_messages_are_shown_at_their_place(service, browser, queues, queue, claim):
    queues.post(queue, [1, 2, 3, 4])
    claims = [claim(queues) for _ in range(2)]
    queues.release(claims[1])

    assert bodies(browser.browse(queue, limit=3)[0]) == [1, 2, 3]
    service.advance(61)
    assert bodies(browser.browse(queue)[0]) == [1, 2, 3, 4]
