"""Messages are looked at without claiming them, where the service can."""

import pytest
from backends import skip_unless

from claim_queues import ConfigError


@pytest.fixture
def limits(limits):
    skip_unless(limits.can_browse, "cannot look without claiming")
    return limits


def test_browsing_is_refused_where_the_service_cannot(queues, queue):
    skip_unless(not queues.limits.can_browse, "can look without claiming")

    with pytest.raises(ConfigError):
        queues.browse(queue)


def test_browsing_shows_free_messages_in_order(service, queue, limits):
    ids = service.queues.post(queue, ["first", "second"])
    ids += service.queues.post(queue, ["third"])

    page = service.another().browse(queue)

    assert [(message.id, message.body) for message in page.messages] == list(
        zip(ids, ["first", "second", "third"], strict=True)
    )


def test_browsing_changes_nothing(queues, queue, limits, terms):
    queues.post(queue, ["seen"])

    first, second = queues.browse(queue), queues.browse(queue)
    claimed = queues.claim(queue, **terms, limit=1).messages

    assert [m.id for m in first.messages] == [m.id for m in second.messages] == [m.id for m in claimed]
    assert claimed[0].receive_count in (1, None)


def test_browsing_an_empty_queue_shows_nothing(queues, queue, other_queue, limits):
    queues.post(other_queue, ["elsewhere"])

    assert queues.browse(queue).messages == ()


def test_a_page_has_at_most_limit_messages_and_its_marker_goes_on_behind_them(queues, queue, limits):
    queues.post(queue, [1, 2, 3])

    first = queues.browse(queue, limit=2)
    second = queues.browse(queue, limit=2, after=first.marker)
    third = queues.browse(queue, limit=2, after=second.marker)

    assert [[m.body for m in page.messages] for page in (first, second, third)] == [[1, 2], [3], []]


def test_a_page_may_be_longer_than_a_request_of_the_service(queues, queue, limits):
    queues.post(queue, list(range(45)))

    first = queues.browse(queue, limit=41)
    second = queues.browse(queue, limit=41, after=first.marker)

    assert [[m.body for m in page.messages] for page in (first, second)] == [list(range(41)), list(range(41, 45))]


def test_the_marker_of_an_empty_page_finds_what_is_posted_later(queues, queue, limits):
    queues.post(queue, ["seen"])
    seen = queues.browse(queue)
    nothing = queues.browse(queue, after=seen.marker)

    queues.post(queue, ["new"])

    assert [m.body for m in queues.browse(queue, after=nothing.marker).messages] == ["new"]


def test_a_marker_holds_when_its_message_is_gone(queues, queue, limits):
    queues.post(queue, [1, 2])
    page = queues.browse(queue, limit=1)
    queues.delete(queue, [page.messages[0].id])

    assert [m.body for m in queues.browse(queue, after=page.marker).messages] == [2]


def test_the_end_marker_lies_behind_all_messages(queues, queue, limits, terms):
    queues.post(queue, ["claimed", "free"])
    queues.claim(queue, **terms, limit=1)
    marker = queues.end_marker(queue)

    queues.post(queue, ["new"])

    assert [m.body for m in queues.browse(queue, after=marker, claimed=True).messages] == ["new"]


def test_the_end_marker_of_an_empty_queue_lies_before_all_that_comes(queues, queue, limits):
    marker = queues.end_marker(queue)

    queues.post(queue, ["new"])

    assert [m.body for m in queues.browse(queue, after=marker).messages] == ["new"]


def test_claimed_messages_are_shown_only_when_asked_for(queues, queue, limits, terms):
    queues.post(queue, [1, 2, 3])
    claims = [queues.claim(queue, **terms, limit=1) for _ in range(2)]
    queues.release(claims[0])

    assert [m.body for m in queues.browse(queue).messages] == [1, 3]
    assert [m.body for m in queues.browse(queue, claimed=True).messages] == [1, 2, 3]


def test_a_page_is_filled_from_behind_claimed_messages(queues, queue, limits, terms):
    queues.post(queue, [1, 2, 3, 4])
    queues.claim(queue, **terms, limit=2)

    assert [m.body for m in queues.browse(queue, limit=2).messages] == [3, 4]


def test_delayed_messages_are_shown_only_when_asked_for(queues, queue, limits, terms):
    skip_unless(limits.release_delay, "cannot delay a release")
    queues.post(queue, ["delayed", "free"])
    queues.release(queues.claim(queue, **terms, limit=1), delay=10)

    assert [m.body for m in queues.browse(queue).messages] == ["free"]
    assert [m.body for m in queues.browse(queue, claimed=True).messages] == ["delayed", "free"]


def test_a_message_whose_claim_lapsed_is_shown_as_free(service, queues, queue, terms, ttl):
    queues.post(queue, [1, 2])
    queues.claim(queue, **terms, limit=1)

    service.advance(ttl + 1)

    assert [m.body for m in queues.browse(queue).messages] == [1, 2]


def test_an_expired_message_is_not_shown(service, queues, queue, limits):
    skip_unless(limits.message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["short-lived"], ttl=limits.message_ttl.low)

    service.advance(limits.message_ttl.low + 1)

    assert queues.browse(queue, claimed=True).messages == ()


def test_a_browsed_message_has_its_age_and_ttl(service, queues, queue, limits):
    skip_unless(limits.message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["seen"], ttl=limits.message_ttl.low + 7)

    service.advance(3)

    (message,) = queues.browse(queue).messages
    assert message.ttl == limits.message_ttl.low + 7
    assert 2 <= message.age < 10
