"""Messages are removed without a claim."""

from backends import skip_unless

from claim_queues import Settlement


def test_a_free_message_is_deleted_by_its_id_from_any_process(service, queue, terms, limits):
    skip_unless(limits.can_browse, "deletes claimed messages alone")
    deleted, _ = service.queues.post(queue, ["deleted", "left"])

    service.another().delete(queue, [deleted])

    assert [m.body for m in service.queues.claim(queue, **terms, limit=2).messages] == ["left"]


def test_a_delete_leaves_a_claimed_message_alone(service, queues, queue, terms, limits):
    skip_unless(limits.can_browse, "deletes claimed messages alone")
    ids = queues.post(queue, ["claimed", "free"])
    claim = queues.claim(queue, **terms, limit=1)

    service.another().delete(queue, ids)

    assert queues.settle(claim, [Settlement(claim.messages[0])]).deleted == {ids[0]}
    assert queues.claim(queue, **terms, limit=1) is None


def test_deleting_what_is_gone_or_was_never_there_is_no_error(queues, queue, terms, limits):
    skip_unless(limits.can_browse, "deletes claimed messages alone")
    gone, kept = queues.post(queue, ["gone", "kept"])
    queues.delete(queue, [gone])

    queues.delete(queue, [gone, f"{gone}0", gone[:-1] + "z", "", "x"])
    queues.delete(queue, [])

    assert [m.id for m in queues.claim(queue, **terms, limit=2).messages] == [kept]


def test_a_delete_leaves_other_queues_alone(queues, queue, other_queue, terms, limits):
    skip_unless(limits.can_browse, "deletes claimed messages alone")
    (id_,) = queues.post(queue, ["kept"])

    queues.delete(other_queue, [id_])

    assert queues.claim(queue, **terms, limit=1).messages[0].id == id_


def test_a_message_whose_claim_lapsed_can_be_deleted(service, queue, terms, ttl, limits):
    queues = service.queues
    skip_unless(limits.can_browse, "deletes claimed messages alone")
    ids = queues.post(queue, ["free again"])
    queues.claim(queue, **terms, limit=1)
    service.advance(ttl + 1)

    queues.delete(queue, ids)

    assert queues.claim(queue, **terms, limit=1) is None


def test_a_purge_removes_all_messages_claimed_ones_too(service, queue, other_queue, terms, ttl):
    queues = service.queues
    queues.post(queue, ["claimed", "free"])
    queues.post(other_queue, ["elsewhere"])
    queues.claim(queue, **terms, limit=1)

    service.another().purge(queue)

    service.advance(ttl + 1)
    assert queues.claim(queue, **terms, limit=2) is None
    assert queues.claim(other_queue, **terms, limit=1)


def test_a_purged_queue_can_be_posted_to(queues, queue, terms):
    queues.post(queue, ["old"])
    queues.purge(queue)

    queues.post(queue, ["new"])

    assert [m.body for m in queues.claim(queue, **terms, limit=2).messages] == ["new"]
