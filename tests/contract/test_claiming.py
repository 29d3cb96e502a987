"""A claim takes free messages for its claim TTL; what is not settled by then is free again."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from backends import skip_unless

from claim_queues import ConfigError


def test_a_claim_takes_the_oldest_free_messages_up_to_its_limit(queues, queue, terms):
    queues.post(queue, [1, 2])
    queues.post(queue, [3])

    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == [1, 2]
    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == [3]


def test_a_claim_is_none_where_no_message_is_free(queues, queue, terms):
    assert queues.claim(queue, **terms, limit=1) is None

    queues.post(queue, ["held"])
    queues.claim(queue, **terms, limit=1)

    assert queues.claim(queue, **terms, limit=1) is None


def test_a_claim_names_its_queue_and_grace_and_has_an_id_of_its_own(queues, queue, terms):
    queues.post(queue, [1, 2])

    first = queues.claim(queue, **terms, limit=1)
    second = queues.claim(queue, **terms, limit=1)

    assert (first.queue, first.grace) == (second.queue, second.grace) == (queue, terms["grace"])
    assert first.id != second.id


def test_a_claim_takes_nothing_from_another_queue(queues, queue, other_queue, terms):
    queues.post(other_queue, ["elsewhere"])

    assert queues.claim(queue, **terms, limit=1) is None


def test_a_claimed_message_is_hidden_from_all_claims(service, queue, terms):
    service.queues.post(queue, [1, 2])
    service.queues.claim(queue, **terms, limit=1)

    assert [m.body for m in service.another().claim(queue, **terms, limit=2).messages] == [2]


def test_a_claim_passes_over_claimed_messages_anywhere_in_the_queue(queues, queue, terms):
    queues.post(queue, [1, 2, 3, 4])
    claims = [queues.claim(queue, **terms, limit=1) for _ in range(3)]
    queues.release(claims[0])
    queues.release(claims[2])

    assert [m.body for m in queues.claim(queue, **terms, limit=4).messages] == [1, 3, 4]


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "an object each"])
def test_claims_at_the_same_time_never_share_a_message(service, queue, terms, ttl, shared):
    service.queues.post(queue, list(range(60)))
    consumers = [service.queues if shared else service.another() for _ in range(4)]

    def claim_all(queues):
        claims = iter(lambda: queues.claim(queue, **{**terms, "ttl": max(ttl, 60)}, limit=3), None)
        return [message.body for claim in claims for message in claim.messages]

    with ThreadPoolExecutor(len(consumers)) as pool:
        claimed = [body for bodies in pool.map(claim_all, consumers) for body in bodies]

    assert sorted(claimed) == list(range(60))


def test_a_message_stays_claimed_for_the_claim_ttl(service, queues, queue, terms, ttl):
    queues.post(queue, ["held"])
    queues.claim(queue, **terms, limit=1)

    service.advance(ttl / 2)

    assert queues.claim(queue, **terms, limit=1) is None


def test_a_message_is_free_again_at_its_old_place_when_the_claim_ttl_ends(service, queue, terms, ttl):
    service.queues.post(queue, [1, 2, 3])
    service.queues.claim(queue, **terms, limit=2)

    service.advance(ttl + 1)

    assert [m.body for m in service.another().claim(queue, **terms, limit=3).messages] == [1, 2, 3]


def test_a_message_has_the_same_id_at_every_receive(service, queues, queue, terms, ttl):
    (id_,) = queues.post(queue, ["again"])
    queues.claim(queue, **terms, limit=1)

    service.advance(ttl + 1)

    assert queues.claim(queue, **terms, limit=1).messages[0].id == id_


def test_the_receive_count_says_how_often_a_message_was_claimed(service, queue, limits, terms, ttl):
    skip_unless(limits.counts_receives, "does not count receives")
    service.queues.post(queue, ["again"])

    for count in (1, 2, 3):
        claim = service.another().claim(queue, **terms, limit=1)
        assert claim.messages[0].receive_count == count
        service.advance(ttl + 1)


def test_the_receive_count_is_none_where_the_service_does_not_count(queues, queue, limits, terms):
    skip_unless(not limits.counts_receives, "counts receives")
    queues.post(queue, ["uncounted"])

    assert queues.claim(queue, **terms, limit=1).messages[0].receive_count is None


def test_receives_are_counted_for_each_message_by_itself(queues, queue, limits, terms):
    skip_unless(limits.counts_receives, "does not count receives")
    queues.post(queue, ["often", "once"])
    queues.release(queues.claim(queue, **terms, limit=1))

    claim = queues.claim(queue, **terms, limit=2)

    assert [message.receive_count for message in claim.messages] == [2, 1]


def test_the_age_of_a_message_runs_from_its_post_whatever_claims_it(service, queues, queue, terms, ttl):
    queues.post(queue, ["ageing"])
    service.advance(3)
    young = queues.claim(queue, **terms, limit=1).messages[0].age

    service.advance(ttl + 1)
    old = queues.claim(queue, **terms, limit=1).messages[0].age

    assert 2 <= young < 10
    assert young + ttl <= old < young + ttl + 10


def test_the_ttl_of_a_message_is_its_whole_life(service, queues, queue, terms, ttl):
    skip_unless(queues.limits.message_ttl, "gives all messages of a queue one TTL")
    queues.post(queue, ["long-lived"], ttl=queues.limits.message_ttl.low + ttl + 100)

    service.advance(50)

    assert queues.claim(queue, **terms, limit=1).messages[0].ttl == queues.limits.message_ttl.low + ttl + 100


def test_a_message_that_would_expire_in_a_claim_lives_on_until_the_grace_after_it(service, queue, limits, terms, ttl):
    skip_unless(limits.grace, "lets messages expire while they are claimed")
    grace, first, second = limits.grace.low, service.queues, service.another()
    first.post(queue, ["short-lived"], ttl=limits.message_ttl.low)
    service.advance(limits.message_ttl.low / 2)
    life = limits.message_ttl.low / 2 + ttl + grace

    (message,) = first.claim(queue, **terms, limit=1).messages
    assert message.ttl == pytest.approx(life, abs=1)

    service.advance(ttl + 1)
    assert second.browse(queue).messages[0].id == message.id

    service.advance(grace)
    assert second.claim(queue, **terms, limit=1) is None


def test_a_message_that_outlives_a_claim_keeps_its_own_ttl(service, queues, queue, limits, ttl):
    skip_unless(limits.grace, "lets messages expire while they are claimed")
    life = limits.message_ttl.low + ttl
    queues.post(queue, ["long enough"], ttl=life)

    claim = queues.claim(queue, ttl=ttl, grace=limits.grace.high, limit=1)

    assert claim.messages[0].ttl == life
    service.advance(life + 1)
    assert queues.claim(queue, ttl=ttl, grace=limits.grace.low, limit=1) is None


def test_claim_values_may_be_at_both_ends_of_their_ranges(queues, queue, limits):
    queues.post(queue, [1, 2])
    low_grace, high_grace = (limits.grace.low, limits.grace.high) if limits.grace else (0, 0)

    assert queues.claim(queue, ttl=limits.claim_ttl.low, grace=low_grace, limit=1)
    assert queues.claim(queue, ttl=limits.claim_ttl.high, grace=high_grace, limit=limits.claim_limit)


def test_a_claim_ttl_out_of_range_is_refused_and_nothing_is_claimed(queues, queue, limits, terms):
    queues.post(queue, ["free"])
    for wrong in (limits.claim_ttl.low - 1, limits.claim_ttl.high + 1, limits.claim_ttl.low + 0.5, True):
        with pytest.raises(ConfigError):
            queues.claim(queue, ttl=wrong, grace=terms["grace"], limit=1)

    assert queues.claim(queue, **terms, limit=1)


def test_a_grace_out_of_range_is_refused_and_nothing_is_claimed(queues, queue, limits, terms, ttl):
    skip_unless(limits.grace, "lets messages expire while they are claimed")
    queues.post(queue, ["free"])
    for wrong in (limits.grace.low - 1, limits.grace.high + 1, limits.grace.low + 0.5, True):
        with pytest.raises(ConfigError):
            queues.claim(queue, ttl=ttl, grace=wrong, limit=1)

    assert queues.claim(queue, **terms, limit=1)


def test_a_claim_limit_out_of_range_is_refused_and_nothing_is_claimed(queues, queue, limits, terms):
    queues.post(queue, ["free"])
    for wrong in (0, -1, limits.claim_limit + 1, 1.5, True):
        with pytest.raises(ConfigError):
            queues.claim(queue, **terms, limit=wrong)

    assert queues.claim(queue, **terms, limit=1)
