"""Messages are removed without a claim."""

import pytest
from backends import bodies, skip_unless

from claim_queues import ConfigError, Settlement


@pytest.fixture
def deleter(rival, limits):
    """Another process, which deletes."""
    skip_unless(limits.can_browse, "deletes claimed messages alone")
    return rival


def test_a_delete_is_refused_where_the_service_cannot(queues, queue, limits):
    skip_unless(not limits.can_browse, "can delete without a claim")

    with pytest.raises(ConfigError):
        queues.delete(queue, queues.post(queue, ["kept"]))


def test_a_free_message_is_deleted_by_its_id_and_a_claimed_one_stays(deleter, queues, queue, claim):
    ids = queues.post(queue, ["claimed", "deleted", "left"])
    held = claim(queues)

    deleter.delete(queue, ids[:2])
    deleter.delete(queue, [ids[1], f"{ids[2]}0", ids[2][:-1] + "z", "", "x"])  # gone, or never there

    assert bodies(claim(queues, 2)) == ["left"]
    assert queues.settle(held, [Settlement(held.messages[0])]).deleted == {ids[0]}


def test_a_delete_leaves_other_queues_alone(deleter, queues, queue, other_queue, claim):
    ids = queues.post(queue, ["kept"])

    deleter.delete(other_queue, ids)

    assert bodies(claim(queues)) == ["kept"]


def test_a_message_whose_claim_lapsed_can_be_deleted(service, deleter, queues, queue, claim):
    ids = queues.post(queue, ["free again"])
    claim(queues)
    service.advance(61)

    deleter.delete(queue, ids)

    assert claim(queues) is None


def test_a_purge_removes_all_messages_of_its_queue_claimed_ones_too(service, queues, rival, queue, other_queue, claim):
    queues.post(queue, ["claimed", "free"])
    queues.post(other_queue, ["elsewhere"])
    claim(queues)

    rival.purge(queue)

    service.advance(61)
    assert claim(queues) is None
    assert bodies(claim(queues, 2, of=other_queue)) == ["elsewhere"]
    queues.post(queue, ["new"])
    assert bodies(claim(queues, 2)) == ["new"]
